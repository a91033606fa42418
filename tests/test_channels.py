"""Clips of several channels in mono models: every family, every head, and what belongs to a call."""

import copy
import threading

import pytest
import torch
import transformers as tf
from families import CONFORMER, FAMILIES, MASKED_WAVE, WHISPER, build
from peft import PeftModel, get_peft_model

from peft_softmoa import SoftMoAConfig, count_parameters
from peft_softmoa.inspection import record_routing

# Models that take audio alone. Of CLAP it is the part that does.
AUDIO_ALONE = [
    name
    for name in FAMILIES
    if name.startswith("Whisper, c") or FAMILIES[name].onnx in ("any length", "fixed length", "one length")
]
OTHERS = [name for name in FAMILIES if name not in AUDIO_ALONE and name not in ("CLAP", "Qwen2.5-Omni")]
CHANNELS = 3


def clap():
    torch.manual_seed(0)
    config = FAMILIES["CLAP"].config()[1].audio_config
    return tf.ClapAudioModelWithProjection._from_config(config).eval()


def model_of(name):
    return clap() if name == "CLAP" else build(name, "eager")


def inputs_of(name, batch=2, channels=CHANNELS):
    """A batch of clips `(B, C, …)` that all differ, and their masks, the same for all channels of a clip."""
    family = FAMILIES[name]
    short, long = family.lengths
    batch = family.inputs([short, *[long] * (batch - 1)])
    batch.pop("input_ids", None)
    generator = torch.Generator().manual_seed(5)
    stacked = {}
    for key, value in batch.items():
        by_channel = value.unsqueeze(1).repeat(1, channels, *[1] * (value.ndim - 1))
        if value.is_floating_point():
            gains = torch.rand(by_channel.shape[:2], generator=generator) + 0.5
            by_channel = by_channel.roll(3, dims=1) * gains.reshape(*gains.shape, *[1] * (value.ndim - 1))
        stacked[key] = by_channel
    return stacked


def mono(batch):
    return {key: value.flatten(0, 1) for key, value in batch.items()}


def adapt(model, channels=CHANNELS, seed=0, **options):
    torch.manual_seed(seed)
    config = SoftMoAConfig(num_channels=channels, **{"num_experts": 3, "r": 2, **options})
    return get_peft_model(model, config).eval()


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch)


def tensors(output):
    """All tensors that a model returns, with those in tuples."""
    found = {}
    for key, value in output.items():
        for index, each in enumerate(value if isinstance(value, tuple) else [value]):
            if isinstance(each, torch.Tensor):
                found[f"{key}.{index}"] = each
    return found


@pytest.mark.parametrize("name", [*AUDIO_ALONE, "CLAP"])
def test_a_fresh_adapter_gives_the_mean_of_the_frozen_model(name):
    model, batch = model_of(name), inputs_of(name)
    extra = {} if name in ("Granite Speech", "Fun-ASR-Nano") else {"output_hidden_states": True}
    before = tensors(outputs(model, {**mono(batch), **extra}))
    after = tensors(outputs(adapt(model, placement="both"), {**batch, **extra}))
    assert after.keys() == before.keys()
    for key, value in before.items():
        by_channel = value.unflatten(0, (2, CHANNELS, *([-1] if len(value) > 2 * CHANNELS else [])))
        wanted = by_channel.mean(dim=1) if key.startswith("logits") else by_channel
        assert torch.equal(after[key], wanted), key


@pytest.mark.parametrize("placement", ["attention", "ffn"])
@pytest.mark.parametrize("name", [*AUDIO_ALONE, "CLAP"])
def test_one_channel_is_mono(name, placement):
    batch = inputs_of(name, channels=1)
    models = [
        adapt(model_of(name), channels, placement=placement, init_weights=False, channel_embedding=False)
        if channels
        else get_peft_model(
            model_of(name), SoftMoAConfig(placement=placement, init_weights=False, num_experts=3, r=2)
        ).eval()
        for channels in (1, None)
    ]
    models[1].load_state_dict(models[0].state_dict())
    given, wanted = tensors(outputs(models[0], batch)), tensors(outputs(models[1], mono(batch)))
    for key, value in wanted.items():
        one = given[key] if key.startswith("logits") else given[key].flatten(0, 1)
        assert torch.equal(one.reshape(value.shape), value), key
