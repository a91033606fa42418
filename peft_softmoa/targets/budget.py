"""The bottleneck that a number of trainable parameters allows, the same in all blocks or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import regex
from torch import nn

from ..config import SoftMoAConfig
from ..expressions import is_path
from ..fields import LARGEST_SIZE, is_integer
from .description import count_parameters, describe_targets

# R at a depth between 0, the first adapted layer, and 1, the last, as a multiple of the mean.
ALLOCATIONS: dict[str, Callable[[float], float]] = {
    "uniform": lambda depth: 1.0,
    "middle": lambda depth: 2 - abs(4 * depth - 2),
    "late": lambda depth: 2 * depth,
}


def largest_r(model: nn.Module, config: SoftMoAConfig, parameters: int) -> int:
    """The largest bottleneck with which an adapter stays within a number of trainable parameters.

    Args:
        model (nn.Module): the base model.
        config (SoftMoAConfig): the adapter's config, apart from `r` and `r_pattern`.
        parameters (int): the most parameters that may be trained.

    Returns:
        int: `r`.

    Raises:
        ValueError: if even `r=1` needs more.
    """
    counts = [count_parameters(model, replace(config, r=r)) for r in (1, 2)]
    if counts[0] > parameters:
        raise ValueError(
            f"`parameters` must be at least {counts[0]:,}, which is what num_experts={config.num_experts} trains with "
            f"r=1, got {parameters:,}. Give more, or choose fewer experts, slots or blocks."
        )
    # Every further unit of the bottleneck costs the same.
    return 1 + (parameters - counts[0]) // (counts[1] - counts[0])


def allocate_r(model: nn.Module, config: SoftMoAConfig, parameters: int, allocate: str) -> SoftMoAConfig:
    """Give the blocks bottlenecks that stay together within a number of trainable parameters.

        R_b = max(1, round(ρ · share(depth_b))),   share = 1, 2 - |4·depth - 2| or 2·depth

    with the largest ρ within the budget. The depth of the i-th of L adapted layers is (i + 1/2) / L, counted from zero.

    Args:
        model (nn.Module): the base model.
        config (SoftMoAConfig): the adapter's config, apart from `r` and `r_pattern`.
        parameters (int): the most parameters that may be trained.
        allocate (str): a name from `ALLOCATIONS`.

    Returns:
        SoftMoAConfig: the config with `r`, the largest that all blocks could have, and an `r_pattern` for the blocks
        that get another one.

    Raises:
        ValueError: if even `r=1` everywhere needs more, or there is no such allocation.
    """
    if not (is_integer(parameters) and parameters > 0):
        raise ValueError(f"`parameters` must be a positive integer, got {parameters!r}.")
    if allocate not in ALLOCATIONS:
        raise ValueError(f"`allocate` must be one of {', '.join(ALLOCATIONS)}, got {allocate!r}.")
    config = replace(config, r=largest_r(model, config, parameters))
    if allocate == "uniform":
        return config
    one, two = (describe_targets(model, replace(config, r=r)) for r in (1, 2))
    units = [more - less for less, more in zip(one.parameters_by_block, two.parameters_by_block)]
    names = [target.name for target in one.targets]
    places = [target.layer or target.name for target in one.targets]
    order = list(dict.fromkeys(places))
    # Rounded, so that what should be alike is.
    shares = [round(ALLOCATIONS[allocate]((order.index(place) + 0.5) / len(order)), 9) for place in places]

    def sizes(scale: float) -> list[int]:
        return [min(LARGEST_SIZE, max(1, round(scale * share))) for share in shares]

    def fits(scale: float) -> bool:
        return one.parameters + sum((r - 1) * unit for r, unit in zip(sizes(scale), units)) <= parameters

    low, high = 0.0, float(LARGEST_SIZE * len(order))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    pattern = {_pattern_for(name, names): r for name, r in zip(names, sizes(low)) if r != config.r}
    return replace(config, r_pattern=pattern or None)


def _pattern_for(name: str, names: list[str]) -> str:
    """What matches one name only: itself or, where others end like it, an expression."""
    is_alone = not any(other.endswith(f".{name}") for other in names)
    return name if is_alone and is_path(name) else f"^{regex.escape(name)}"
