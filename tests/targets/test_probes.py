import pytest
import torch
from accelerate import cpu_offload
from conftest import tiny_ast_config
from peft import get_peft_model
from torch import nn
from transformers import ASTModel, MoonshineConfig, MoonshineModel, WhisperConfig, WhisperModel

from peft_softmoa import SoftMoAConfig
from peft_softmoa.targets.probes import block_widths, norms_before


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


def test_norms_of_a_pre_norm_model():
    model = ASTModel(tiny_ast_config())
    blocks = {f"layers.{layer}.{block}": 32 for layer in range(2) for block in ("attention", "mlp")}
    assert norms_before(model, blocks) == {
        "layers.0.attention": "layers.0.layernorm_before",
        "layers.0.mlp": "layers.0.layernorm_after",
        "layers.1.attention": "layers.1.layernorm_before",
        "layers.1.mlp": "layers.1.layernorm_after",
    }
    assert norms_before(model, {"layers.1.attention.q_proj": 32}) == {
        "layers.1.attention.q_proj": "layers.1.layernorm_before"
    }


def test_norms_where_modules_are_defined_in_another_order_than_they_run(tiny_wav2vec2):
    assert norms_before(
        tiny_wav2vec2(pre_norm=True), {"encoder.layers.1.attention": 16, "encoder.layers.1.feed_forward": 16}
    ) == {
        "encoder.layers.1.attention": "encoder.layers.1.layer_norm",
        "encoder.layers.1.feed_forward": "encoder.layers.1.final_layer_norm",
    }


def test_norms_of_a_post_norm_model(tiny_wav2vec2):
    blocks = {f"encoder.layers.{layer}.{block}": 16 for layer in range(2) for block in ("attention", "feed_forward")}
    model = tiny_wav2vec2(pre_norm=False).train()
    random_state = torch.get_rng_state()
    assert norms_before(model, blocks) == {
        "encoder.layers.0.attention": "encoder.layer_norm",
        "encoder.layers.0.feed_forward": "encoder.layers.0.layer_norm",
        "encoder.layers.1.attention": "encoder.layers.0.final_layer_norm",
        "encoder.layers.1.feed_forward": "encoder.layers.1.layer_norm",
    }
    assert torch.equal(random_state, torch.get_rng_state()) and model.training


def test_norms_of_a_model_whose_blocks_take_keywords():
    config = WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=10, vocab_size=20,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    assert norms_before(WhisperModel(config), {"encoder.layers.0.self_attn": 16, "encoder.layers.0.fc1": 16}) == {
        "encoder.layers.0.self_attn": "encoder.layers.0.self_attn_layer_norm",
        "encoder.layers.0.fc1": "encoder.layers.0.final_layer_norm",
    }


def test_norms_of_a_model_with_adapters():
    model = ASTModel(tiny_ast_config())
    adapted = get_peft_model(
        model, SoftMoAConfig(train_norms=True, routing="dense", expert_type="convolution", patch_grid=True)
    )
    assert norms_before(adapted.get_base_model(), {"layers.1.attention": 32, "layers.0.mlp": 32}) == {
        "layers.1.attention": "layers.1.layernorm_before",
        "layers.0.mlp": "layers.0.layernorm_after",
    }


def test_why_no_norm_was_found_is_chained():
    """This layer needs position embeddings, so it fails before its feed-forward is reached."""
    config = MoonshineConfig(
        vocab_size=10, hidden_size=16, intermediate_size=32, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not find a normalization layer") as error:
        norms_before(MoonshineModel(config), {"encoder.layers.0.mlp": 16})
    assert isinstance(error.value.__cause__, TypeError)


def test_a_block_without_a_norm():
    with pytest.raises(
        ValueError, match="does not find a normalization layer whose output the block 'layers.0.mlp.fc2' reads"
    ):
        norms_before(ASTModel(tiny_ast_config()), {"layers.0.mlp.fc2": 64})


class Dropped(nn.Module):
    """Draws a number whenever it runs, as layers do that are dropped at random."""

    def __init__(self):
        super().__init__()
        self.norm, self.block = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 6))

    def forward(self, hidden_states):
        torch.rand(1)
        return self.block(self.norm(hidden_states))


@pytest.mark.parametrize(
    "probe", [lambda model: block_widths("model", model), lambda model: norms_before(model, {"block": 6})]
)
def test_a_probe_leaves_the_random_numbers_as_they_are(probe):
    model = Dropped()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert probe(model)
    assert torch.equal(torch.rand(1), expected)
