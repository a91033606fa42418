"""The ways of fine-tuning that are compared. Each is a function of a model and a budget that changes the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from peft import LoraConfig
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peft_softmoa import SoftMoAConfig, count_parameters, describe_targets
from peft_softmoa.method.routers import SoftRouter

from ..benchmark.methods import train_adapter, train_all, train_head

PROBE, FULL, LORA, SINGLE, DENSE, SOFT = (
    "linear probe",
    "full fine-tuning",
    "LoRA",
    "single adapter",
    "Dense-MoA",
    "Soft-MoA",
)
# The modules of a classification head, by their names in transformers, in their order.
HEAD = ("projector", "classifier")
# The paper's reduction rate: R is the hidden size over this.
REDUCTION = 128


def paper_budget(model: nn.Module, **fields: Any) -> int:
    """Parameters of the paper's Soft-MoA on a model: 7 experts, one slot each, `R = D / 128`.

    Args:
        model (nn.Module): the model, without adapters.
        fields (Any): other fields of the config, such as `max_length_seconds`.

    Returns:
        int: the number, 903,672 on AST-base.
    """
    config: Any = model.config
    width = getattr(config, "d_model", None) or config.hidden_size
    chosen = SoftMoAConfig(r=max(1, round(width / REDUCTION)), **fields)
    return count_parameters(model, chosen) - head_parameters(model, chosen)


def head_parameters(model: nn.Module, config: SoftMoAConfig) -> int:
    """How many of the parameters that an adapter trains are those of the classification head.

    Args:
        model (nn.Module): the model, without adapters.
        config (SoftMoAConfig): the adapter's.

    Returns:
        int: the number.
    """
    saved = describe_targets(model, config).saved
    return sum(count for name, count in saved.items() if name.partition(".")[0] in HEAD)


def train_biases(model: nn.Module, budget: int) -> nn.Module:
    """BitFit: all biases, and the head."""
    train_head(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.requires_grad_(True)
    return model


def train_lora(model: nn.Module, budget: int) -> nn.Module:
    """LoRA on queries and values of the encoder, with the largest rank within the budget, and alpha equal to it."""
    targets = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("q_proj", "v_proj") and "decoder" not in name.split(".")
    }
    size = sum(module.in_features + module.out_features for module in targets.values())
    rank = budget // size
    if rank == 0:
        raise ValueError(f"LoRA needs a budget of {size:,} for rank 1, got {budget:,}.")
    return train_adapter(lambda model: LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), model)


def train_mixture(
    model: nn.Module, budget: int, *, slot_std: float = 1.0, temperature: float = 1.0, **fields: Any
) -> nn.Module:
    """A mixture with the largest bottleneck within the budget.

        Φ = slots / temperature

    Args:
        model (nn.Module): the model.
        budget (int): the most parameters that may be trained apart from the head.
        slot_std (float): initial standard deviation of the slot parameters, in multiples of the package's. Default: 1.
        temperature (float): of the logits. Default: 1.
        fields (Any): of SoftMoAConfig.

    Returns:
        nn.Module: the model.
    """
    # The package counts the head, too.
    total = budget + head_parameters(model, SoftMoAConfig(**fields))
    model = train_adapter(lambda model: SoftMoAConfig.for_budget(model, total, **fields), model)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module.requires_grad_(False)
    for router in [module for module in model.modules() if isinstance(module, SoftRouter)]:
        with torch.no_grad():
            router.slots *= slot_std
        if temperature != 1.0:
            parametrize.register_parametrization(router, "slots", Factor(1 / temperature), unsafe=True)
    return model


class Factor(nn.Module):
    """Multiplies a parameter by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, parameter: Tensor) -> Tensor:
        """The parameter times the factor, of the same shape."""
        return parameter * self.factor


def is_slots(name: str) -> bool:
    """Whether a parameter is the slot parameters of a Soft-MoA."""
    return name.endswith((".slots", ".slots.original"))


# The mixtures, by name, with their fields of SoftMoAConfig.
MIXTURES: dict[str, dict[str, Any]] = {
    SINGLE: {"routing": "dense", "num_experts": 1},
    DENSE: {"routing": "dense", "num_experts": 7},
    SOFT: {"routing": "soft", "num_experts": 7},
    "Soft-MoA, P=2": {"routing": "soft", "num_experts": 7, "num_slots": 2},
    "convolution": {"routing": "dense", "num_experts": 1, "expert_type": "convolution"},
    "Conformer": {"routing": "dense", "num_experts": 1, "expert_type": "conformer"},
    "top-k": {"routing": "top_k", "num_experts": 7},
    "expert choice": {"routing": "expert_choice", "num_experts": 7},
}
METHODS: dict[str, Callable[..., nn.Module]] = {
    PROBE: lambda model, budget: train_head(model),
    FULL: lambda model, budget: train_all(model),
    "BitFit": train_biases,
    LORA: train_lora,
    **{name: partial(train_mixture, **fields) for name, fields in MIXTURES.items()},
}
# The grid of learning rates; the paper's is 5e-3.
RATES = {
    **dict.fromkeys(METHODS, [1e-3, 5e-3]),
    PROBE: [1e-3, 5e-3, 2.5e-2],
    FULL: [5e-5, 2e-4],
}
# What `train_mixture` takes besides fields of SoftMoAConfig.
ROUTER_OPTIONS = ("slot_std", "temperature")


def why_not(method: str, options: dict[str, Any]) -> Optional[str]:
    """Why the package cannot make a method, such as one whose field it does not have; None if it can.

    Args:
        method (str): one of METHODS.
        options (dict): its options.

    Returns:
        str, optional: the reason.
    """
    if method not in MIXTURES:
        return None
    fields = {name: value for name, value in options.items() if name not in ROUTER_OPTIONS}
    try:
        SoftMoAConfig(**{**MIXTURES[method], **fields})
    except (TypeError, ValueError) as error:
        return str(error)
    return None
