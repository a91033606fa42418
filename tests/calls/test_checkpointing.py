import numpy as np
import pytest
import torch
from families import FAMILIES, build
from peft import get_peft_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.pe_audio.configuration_pe_audio import PeAudioEncoderConfig
from transformers.models.pe_audio.modeling_pe_audio import PeAudioEncoder

from peft_softmoa import SoftMoAConfig

CHECKPOINTED = [name for name, family in FAMILIES.items() if family.checkpoints]
# The backward pass of transformers' WavLM never ends under reentrant checkpointing, with or without adapters: its
# layers take the position bias of the first one by keyword, where such a checkpoint does not see it.
REENTRANT = [name for name in CHECKPOINTED if name != "WavLM"]


def gradients(family, model, batch):
    model.zero_grad()
    torch.manual_seed(3)
    np.random.seed(3)  # draws what SpecAugment masks
    output = family.encode(model.get_base_model(), batch)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("placement", ["attention", "ffn"])
@pytest.mark.parametrize(
    ("name", "reentrant"),
    [*((name, False) for name in CHECKPOINTED), *((name, True) for name in REENTRANT)],
)
def test_gradients_are_the_same(name, reentrant, placement):
    family = FAMILIES[name]
    model = get_peft_model(build(name), SoftMoAConfig(placement=placement, init_weights=False, num_experts=3, r=2))
    model.train()
    batch = family.inputs(list(family.lengths))
    wanted = gradients(family, model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    given = gradients(family, model, batch)
    for name, gradient in wanted.items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.skipif(
    "__call__" in vars(GradientCheckpointingLayer),
    reason="layers have their hooks in their checkpoint",
)
def test_layers_behind_something_without_gradients():
    """PE-Audio embeds under no_grad, so that it does not help if the encoder's own input requires gradients."""
    encoder = PeAudioEncoder(
        PeAudioEncoderConfig(
            dac_config={
                "encoder_hidden_size": 4, "downsampling_ratios": [2, 4], "hidden_size": 16, "codebook_dim": 8
            },
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        )
    )  # fmt: skip
    model = get_peft_model(encoder, SoftMoAConfig(modules_to_save=["output"], init_weights=False)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    encoder(torch.randn(2, 1, 400)).last_hidden_state.square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_nothing_is_checkpointed_without_being_asked():
    """Gradients that nobody needs are not computed: the encoder's input requires them under reentrant checkpointing."""
    family = FAMILIES["Wav2Vec2"]
    model = get_peft_model(build("Wav2Vec2"), SoftMoAConfig(placement="ffn")).train()
    model.get_base_model().feature_extractor._freeze_parameters()
    seen = []
    encoder = model.get_base_model().encoder
    encoder.pos_conv_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    batch = family.inputs([204])
    model(**batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(**batch)
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)
    assert seen == [False, False, True, False, False]


def test_a_block_before_the_attention_has_no_mask_when_it_is_run_again():
    """A Conformer's first half-step, of which the mask is only known from the layer around it."""
    family = FAMILIES["Wav2Vec2-BERT"]
    targets = ["ffn1.intermediate_dense->ffn1.output_dense"]
    model = get_peft_model(build("Wav2Vec2-BERT"), SoftMoAConfig(target_modules=targets, init_weights=False)).train()
    batch = family.inputs(list(family.lengths))
    wanted = gradients(family, model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "__call__" in vars(GradientCheckpointingLayer):  # earlier transformers run a layer's hooks again, too
        given = gradients(family, model, batch)
        assert all(torch.allclose(given[name], gradient, rtol=1e-4) for name, gradient in wanted.items())
    else:
        with pytest.raises(ValueError, match="layers.1.ffn1.output_dense': Under gradient checkpointing, its mask"):
            gradients(family, model, batch)
    config = SoftMoAConfig(routing="dense", target_modules=targets, init_weights=False)
    model = get_peft_model(build("Wav2Vec2-BERT"), config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(gradient is not None for gradient in gradients(family, model, batch).values())


@pytest.mark.parametrize("given", ["position", "keyword"])
def test_the_first_tokens_require_gradients(given):
    """Also those of an encoder that takes something else first, and writes into its input."""
    from peft_softmoa.calls.checkpointing import require_input_gradients

    class Encoder(nn.Module):
        gradient_checkpointing = True

        def forward(self, ids, frames, mask):
            self.seen = frames.requires_grad, mask.requires_grad
            frames[0] = 0.0
            return frames

    encoder = Encoder()
    handle = require_input_gradients(encoder)
    arguments = {"ids": torch.arange(3), "frames": torch.ones(2, 3), "mask": torch.ones(2, 3)}
    encoder(*arguments.values()) if given == "position" else encoder(**arguments)
    assert encoder.seen == (True, False)
    assert torch.equal(arguments["frames"], torch.ones(2, 3))
    handle.remove()
    encoder(**arguments)
    assert encoder.seen == (False, False)
