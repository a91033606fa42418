"""Placement: which blocks of a model's audio encoder are adapted, if they are not named."""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import _find_minimal_target_modules, check_target_module_exists
from torch import nn

from ..config import SoftMoAConfig
from .architectures import parts_around, take_audio
from .choice import ARROW
from .layers import Block, Layer, find_layers, find_module, is_repeated, without_adapters


def choose_targets(config: SoftMoAConfig, model: nn.Module) -> None:
    """Let `placement` choose the target modules, if they are not given.

    In the layers of the audio encoder that is the self-attention, the last feed-forward, or both.

    Args:
        config (SoftMoAConfig): the choice is written into it.
        model (nn.Module): the model.

    Raises:
        ValueError: if the model has no audio encoder, or its layers not what `placement` wants.
    """
    if config.target_modules is not None:
        return
    layers = _select_layers(config, find_encoder(model))
    names = set()
    if config.placement in ("attention", "both"):
        names |= _shortest_names([layer.attentions[0] for layer in layers], model)
    if config.placement in ("ffn", "both"):
        missing = next((layer.name for layer in layers if not layer.ffns), None)
        if missing is not None:
            raise ValueError(
                f"`placement='{config.placement}'` looks for a feed-forward block in every layer, linear layers that "
                f"widen tokens and narrow them again, but finds none in '{missing}'.{_describe_stacks(model)}"
            )
        names |= _shortest_names([layer.ffns[-1] for layer in layers], model)
    config.target_modules = names


def find_encoder(model: nn.Module) -> list[Layer]:
    """Find the layers of a model's audio encoder.

    Its layers have one attention, which is not a decoder's, and belong to a part of the model that takes audio. If
    several stacks are left, it is the one with most layers, together with those of the same class in that part.

    Args:
        model (nn.Module): the model.

    Returns:
        list[Layer]: the layers.

    Raises:
        ValueError: if there is none.
    """
    found: dict[tuple[Any, ...], list[Layer]] = {}
    for layers in find_layers(model):
        parts = parts_around(model, layers[0].name)
        if len(layers[0].attentions) == 1 and take_audio(parts):
            classes = frozenset(type(find_module(model, layer.name)) for layer in layers)
            found.setdefault((id(parts[-1]) if parts else None, classes), []).extend(layers)
    if not found:
        raise ValueError(
            "`placement` looks for the audio encoder of a model: a list of layers, in a part of the model that takes "
            f"audio, with a self-attention in each and no cross-attention. {type(model).__name__} has none."
            f"{_describe_stacks(model)}"
        )
    return max(found.values(), key=len)


def _select_layers(config: SoftMoAConfig, layers: list[Layer]) -> list[Layer]:
    """The layers of `layers_to_transform`."""
    if config.layers_to_transform is None:
        return layers
    if not config.layers_pattern:
        config.layers_pattern = layers[0].name.split(".")[-2]
    probe = copy.copy(config)
    probe.exclude_modules = probe.modules_to_save = None
    probe.target_modules = {"probe"}
    selected = [layer for layer in layers if check_target_module_exists(probe, f"{layer.name}.probe")]
    if not selected:
        raise ValueError(
            f"`layers_to_transform={config.layers_to_transform}` and `layers_pattern={config.layers_pattern!r}` match "
            f"none of the layers '{layers[0].name}' to '{layers[-1].name}'."
        )
    return selected


def _shortest_names(blocks: list[Block], model: nn.Module) -> set[str]:
    """The shortest endings of names that match some blocks and nothing else."""
    entries = {block.exit: block.entry for block in blocks}
    others = {name.replace(".base_layer", "") for name, _ in model.named_modules()} - entries.keys() - {""}
    shortest = _find_minimal_target_modules(set(entries), others)
    names = set()
    for exit, entry in entries.items():
        ending = next(ending for ending in shortest if f".{exit}".endswith(f".{ending}"))
        if entry == exit:
            names.add(ending)
            continue
        # The names of both modules from where they part, and what the ending has before that.
        parts, entry_parts = exit.split("."), entry.split(".")
        common = next((i for i, (a, b) in enumerate(zip(parts, entry_parts)) if a != b), len(entry_parts))
        common = min(common, len(parts) - 1, len(entry_parts) - 1, len(parts) - len(ending.split(".")))
        names.add(".".join(entry_parts[common:]) + ARROW + ".".join(parts[common:]))
    return names


def _describe_stacks(model: nn.Module) -> str:
    """The lists of layers in a model and what is in each layer, for errors."""
    found = []
    for name, module in model.named_modules():
        if is_repeated(module):
            layer = without_adapters(next(iter(module.children())))
            parts = ", ".join(path for path, _ in layer.named_children())
            found.append(f"\n  {name}: {len(list(module.children()))} x {type(layer).__name__} ({parts})")
    what = f" Its repeated blocks are:{''.join(found)}\n" if found else " It has no repeated blocks. "
    return (
        f"{what}Name the modules to adapt in `target_modules`, for example target_modules=['self_attn'], or "
        f"['fc1{ARROW}fc2'] for a block that begins in one module and ends in another."
    )
