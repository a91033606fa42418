import pytest
import torch
from accelerate import cpu_offload
from conftest import tiny_ast_config
from torch import nn
from transformers import ASTModel

from peft_softmoa.placement import block_widths, find_architecture, placed_blocks


class Block(nn.Module):
    """Maps (B, T, 12) to (B, T, 5), with a gate of width 4 that comes before everything else."""

    def __init__(self, output="tensor"):
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.inner = nn.Linear(12, 20)
        self.outer = nn.Linear(20, 5)
        self.register_buffer("shift", torch.zeros(5))
        self.output = output

    def forward(self, hidden_states, attention_mask=None):
        gated = hidden_states.unflatten(-1, (3, 4))
        hidden = self.outer(self.inner(hidden_states)) + self.gate(gated).sum() + self.shift
        return {"tensor": hidden, "tuple": (hidden, None), "pooled": hidden.mean(dim=1)}[self.output]


@pytest.mark.parametrize(
    "placement, blocks", [("attention", {"attention"}), ("ffn", {"mlp"}), ("both", {"attention", "mlp"})]
)
def test_blocks_of_the_audio_spectrogram_transformer(placement, blocks):
    assert placed_blocks(find_architecture("audio-spectrogram-transformer"), placement) == blocks


def test_unknown_architecture_says_what_to_do():
    with pytest.raises(ValueError, match="'bert'.*audio-spectrogram-transformer.*`target_modules`"):
        find_architecture("bert")


def test_widths_of_linear_layers():
    assert block_widths("linear", nn.Linear(3, 8)) == (3, 8)


@pytest.mark.parametrize("output", ["tensor", "tuple"])
def test_widths_are_those_of_what_flows_through(output):
    block = Block(output)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    random_state = torch.get_rng_state()
    assert block_widths("block", block) == (12, 5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())


def test_widths_of_blocks_of_a_model_without_weights():
    with torch.device("meta"):
        model = ASTModel(tiny_ast_config())
    assert block_widths("attention", model.layers[0].attention) == (32, 32)
    assert block_widths("mlp", model.layers[0].mlp) == (32, 32)
    assert block_widths("layernorm", model.layers[0].layernorm_before) == (32, 32)


class KeywordOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, *, hidden_states, scale=1.0):
        return scale * self.inner(hidden_states)


class NeedsMore(nn.Module):
    """Cannot run on tokens alone, as attentions with position embeddings."""

    def __init__(self):
        super().__init__()
        self.gate, self.inner = nn.Linear(8, 4), nn.Linear(12, 12)

    def forward(self, hidden_states, positions):
        return self.inner(hidden_states + positions)


def test_tokens_may_be_a_keyword():
    assert block_widths("block", KeywordOnly()) == (12, 12)


def test_blocks_that_need_more_than_tokens_have_the_hidden_size():
    assert block_widths("block", NeedsMore(), hidden_size=12) == (12, 12)
    for hidden_size in (None, 5):
        with pytest.raises(ValueError, match="cannot be adapted") as error:
            block_widths("block", NeedsMore(), hidden_size)
        assert "positions" in str(error.value.__cause__)


def test_the_block_itself_is_not_run():
    block, calls = Block(), []
    block.register_forward_hook(lambda *args: calls.append(args))
    block.inner.register_forward_pre_hook(lambda *args: calls.append(args))
    assert block_widths("block", block) == (12, 5)
    assert not calls and len(block._forward_hooks) == 1


def test_widths_of_offloaded_blocks():
    model = cpu_offload(ASTModel(tiny_ast_config()))
    assert block_widths("attention", model.layers[0].attention) == (32, 32)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(3, 3, 1),
        nn.Conv2d(3, 4, 1),
        nn.Embedding(5, 4),
        nn.Dropout(),
        nn.ModuleList([nn.Linear(3, 3)]),
        Block("pooled"),
        ASTModel(tiny_ast_config()).embeddings,
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_do_not_map_tokens_to_tokens_are_refused(module):
    with pytest.raises(ValueError, match=f"'some.name', a {type(module).__name__}, .*linear layer or a block"):
        block_widths("some.name", module)
