"""The models that are measured, and the ways of training them that are compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

from peft_softmoa import SoftMoAConfig

from .literal import write_literally

CLASSES = 50
# What others are held to: in forward passes and in training steps.
PROBE, FLOOR = "linear probe", "floor"
# Trainable parameters of the adapters on a model of 12 layers: what SoftMoAConfig() takes is the most below it.
BUDGET = 905_000


def make_ast(layers: int) -> nn.Module:
    """AST-base on 500 frames of 10 ms, which are 590 tokens."""
    return ASTForAudioClassification(ASTConfig(max_length=500, num_labels=CLASSES, num_hidden_layers=layers))


SMALL_AST = "AST of width 64, 128 frames, 2 layers"


def make_small_ast(layers: int) -> nn.Module:
    """An AST for which calling each module costs more than its arithmetic."""
    config = ASTConfig(hidden_size=64, num_attention_heads=4, intermediate_size=128, max_length=128)
    config.update({"frequency_stride": 16, "time_stride": 16, "num_labels": CLASSES, "num_hidden_layers": layers})
    return ASTForAudioClassification(config)


def make_wav2vec2(layers: int) -> nn.Module:
    """Wav2Vec2-base without LayerDrop and SpecAugment, by which no two training steps would be alike."""
    config = Wav2Vec2Config(
        num_labels=CLASSES, num_hidden_layers=layers, layerdrop=0.0, apply_spec_augment=False, feat_extract_norm="group"
    )
    model = Wav2Vec2ForSequenceClassification(config)
    model.freeze_feature_encoder()
    return model


# Each with the input of one sample.
MODELS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "AST-base, 500 frames": (make_ast, (500, 128)),
    "Wav2Vec2-base, 5 s": (make_wav2vec2, (80_000,)),
}


def make_whole_ast(layers: int) -> nn.Module:
    """AST-base as it is published, on 1,024 frames."""
    return ASTForAudioClassification(ASTConfig(num_labels=CLASSES, num_hidden_layers=layers))


def make_whisper(layers: int) -> nn.Module:
    """An encoder as large as Whisper tiny's, with four layers at most."""
    return WhisperForAudioClassification(WhisperConfig(num_labels=CLASSES, encoder_layers=min(layers, 4)))


# Models that read one length of clips, with this length in seconds.
FIXED_LENGTHS: dict[str, tuple[Callable[[int], nn.Module], float]] = {
    "AST-base": (make_whole_ast, 10.24),
    "Whisper tiny": (make_whisper, 30.0),
}


def make_batch(model_name: str, batch_size: int, device: str) -> dict[str, Tensor]:
    """A batch of noise.

    Args:
        model_name (str): one of MODELS.
        batch_size (int): number of samples.
        device (str): where to.

    Returns:
        dict[str, Tensor]: `input_values` and `labels`.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(batch_size, *MODELS[model_name][1], generator=generator)
    labels = torch.arange(batch_size) % CLASSES
    return {"input_values": values.to(device), "labels": labels.to(device)}


def train_nothing(model: nn.Module) -> nn.Module:
    """The floor of all adapter training: everything is frozen, and the gradient goes through all layers.

    It is required by a zero that is added to what the first layer reads.
    """
    model.requires_grad_(False)
    layers = next(module for name, module in model.named_modules() if name.endswith(".layers"))
    layers[0].zero = nn.Parameter(torch.zeros(()))
    layers[0].register_forward_pre_hook(lambda layer, args: (args[0] + layer.zero, *args[1:]))
    return model


def train_head(model: nn.Module) -> nn.Module:
    """A linear probe."""
    model.requires_grad_(False)
    return _with_head(model)


def train_adapter(config: Callable[[nn.Module], Any], model: nn.Module, literally: str = "") -> nn.Module:
    """A PEFT method, and the head."""
    model = get_peft_model(model, config(model)).get_base_model()
    if literally:
        write_literally(model, literally)
    return _with_head(model)


def train_all(model: nn.Module) -> nn.Module:
    """Full fine-tuning, but for wav2vec 2.0's convolutions, which stay frozen as is usual."""
    return model


def _with_head(model: nn.Module) -> nn.Module:
    for name, module in model.named_children():
        if name in ("classifier", "projector"):
            module.requires_grad_(True)
    return model


def lora(model: nn.Module) -> LoraConfig:
    """LoRA with as many parameters, on the modules that it usually adapts."""
    return LoraConfig(r=24, lora_alpha=24, target_modules=["q_proj", "v_proj"])


def mixture(routing: str, num_experts: int, model: nn.Module, **options: Any) -> SoftMoAConfig:
    """A mixture within the budget."""
    budget = BUDGET * model.config.num_hidden_layers // 12
    return SoftMoAConfig.for_budget(model, budget, routing=routing, num_experts=num_experts, **options)


# What prepares a model for training, by name; each changes the model that it is given.
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    PROBE: train_head,
    FLOOR: train_nothing,
    "LoRA": partial(train_adapter, lora),
    "single adapter": partial(train_adapter, partial(mixture, "dense", 1)),
    "Conformer adapter": partial(train_adapter, partial(mixture, "dense", 1, expert_type="conformer")),
    "Dense-MoA": partial(train_adapter, partial(mixture, "dense", 7)),
    "Dense-MoA, literal": partial(train_adapter, partial(mixture, "dense", 7), literally="dense"),
    "Soft-MoA": partial(train_adapter, partial(mixture, "soft", 7)),
    "Soft-MoA, feed-forward": partial(train_adapter, partial(mixture, "soft", 7, placement="ffn")),
    "Soft-MoA, literal": partial(train_adapter, partial(mixture, "soft", 7), literally="soft"),
    "full fine-tuning": train_all,
}
