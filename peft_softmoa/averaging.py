"""Averages of adapters: model soups (arXiv 2203.05482)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .config import SoftMoAConfig
from .layer import is_adapted


def check_average(
    configs: Mapping[str, Any], adapter_names: Sequence[str], weights: Optional[Sequence[float]], new_name: str
) -> list[float]:
    """Check that adapters have an average.

    Args:
        configs (mapping): the configs of all adapters by name.
        adapter_names (sequence of str): which are averaged.
        weights (sequence of float, optional): one for each, from 0. Default: all the same.
        new_name (str): name of the average.

    Returns:
        list[float]: the share of each adapter; they sum up to 1.

    Raises:
        ValueError: if a name is unknown or taken, the weights are not allowed, or the adapters' configs differ.
    """
    own = {name: config for name, config in configs.items() if isinstance(config, SoftMoAConfig)}
    names = list(adapter_names)
    if not names or not own.keys() >= set(names):
        raise ValueError(f"`adapter_names` must be names of adapters, one or more of {sorted(own)}, got {names}.")
    given = [1.0] * len(names) if weights is None else list(weights)
    are_numbers = all(isinstance(w, (int, float)) and math.isfinite(w) and w >= 0 for w in given)
    if len(given) != len(names) or not are_numbers or not sum(given):
        raise ValueError(f"`weights` must be {len(names)} numbers from 0, not all of them 0, got {given}.")
    if new_name in configs or "." in new_name or not new_name:
        raise ValueError(f"`new_name` must be a name without dots that no adapter has, got '{new_name}'.")
    first = own[names[0]].choices()
    for name in names[1:]:
        other = own[name].choices()
        differing = sorted(field for field in first if first[field] != other[field] and field != "init_weights")
        if differing:
            raise ValueError(f"The adapters '{names[0]}' and '{name}' have no average: they differ in {differing}.")
    return [weight / sum(given) for weight in given]


@torch.no_grad()
def average_into(model: nn.Module, adapter_names: Sequence[str], shares: Sequence[float], new_name: str) -> None:
    """Put the average of adapters in the place of another one of the same config.

    Args:
        model (nn.Module): the model with the adapters.
        adapter_names (sequence of str): which are averaged; integers, such as counts, are taken from the first.
        shares (sequence of float): the share of each.
        new_name (str): the adapter that becomes the average; it is frozen.
    """
    for module in model.modules():
        for container in _containers(module):
            if new_name in container:
                average = copy.deepcopy(container[adapter_names[0]]).requires_grad_(False)
                states = [dict(container[name].state_dict()) for name in adapter_names]
                for key, tensor in average.state_dict().items():
                    if tensor.is_floating_point():
                        tensor.copy_(sum(share * state[key] for share, state in zip(shares, states)))
                container[new_name] = average


def _containers(module: nn.Module) -> list[nn.ModuleDict]:
    """What a module has of each adapter, by the adapter's name."""
    if is_adapted(module):
        return [module.softmoa_mixture]
    return [module.modules_to_save] if isinstance(module, ModulesToSaveWrapper) else []
