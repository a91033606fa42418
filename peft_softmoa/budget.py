"""How many parameters an adapter trains, before it exists."""

from __future__ import annotations

from typing import Any

from torch import nn

from .describe import describe_targets


def count_parameters(model: nn.Module, config: Any) -> int:
    """Number of parameters that `get_peft_model(model, config)` makes trainable, without building anything.

    Args:
        model (nn.Module): the base model, or a `PeftModel` of it; nothing in it changes, and it may be on the meta
            device.
        config (SoftMoAConfig): the adapter's config; nothing in it changes.

    Returns:
        int: the number of trainable parameters; `describe_targets` tells where they are, and has the formula.

    Raises:
        ValueError: if the config does not fit the model.
    """
    return describe_targets(model, config).parameters


def largest_r(model: nn.Module, config: Any, parameters: int) -> int:
    """The largest bottleneck with which an adapter stays within a number of trainable parameters.

    Args:
        model (nn.Module): the base model.
        config (SoftMoAConfig): the adapter's config, apart from `r`.
        parameters (int): the most parameters that may be trained.

    Returns:
        int: `r`.

    Raises:
        ValueError: if even `r=1` needs more.
    """
    counts = []
    for r in (1, 2):
        config.r = r
        counts.append(count_parameters(model, config))
    if counts[0] > parameters:
        raise ValueError(
            f"`parameters` must be at least {counts[0]:,}, which is what num_experts={config.num_experts} trains with "
            f"r=1, got {parameters:,}. Give more, or choose fewer experts, slots or blocks."
        )
    # Every further unit of the bottleneck costs the same.
    return 1 + (parameters - counts[0]) // (counts[1] - counts[0])
