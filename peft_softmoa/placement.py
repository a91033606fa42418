"""Placement: which modules of a model are adapted, and how their tokens lie.

Nothing else in the package knows the names of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from .experts import PatchGrid
from .shapes import block_widths


def _ast_grid(config: dict[str, Any]) -> PatchGrid:
    def patches(size: str, stride: str) -> int:
        return (config[size] - config["patch_size"]) // config[stride] + 1

    # A class and a distillation token, then the patches, all times of the lowest frequency first.
    return PatchGrid(2, patches("num_mel_bins", "frequency_stride"), patches("max_length", "time_stride"))


class Architecture(NamedTuple):
    """Where the sub-blocks of one architecture are."""

    layers: str  # name of the list of layers
    attention: str  # name of the self-attention block in a layer
    ffn: str  # name of the feed-forward block in a layer
    patch_grid: Optional[Callable[[dict[str, Any]], PatchGrid]] = None  # from the model's config to its grid


ARCHITECTURES = {
    "audio-spectrogram-transformer": Architecture(
        layers="layers", attention="attention", ffn="mlp", patch_grid=_ast_grid
    ),
}


def find_architecture(model_type: str) -> Architecture:
    """Look up where the sub-blocks of an architecture are.

    Args:
        model_type (str): `model_type` of the model's config.

    Returns:
        Architecture: the names of its parts.

    Raises:
        ValueError: if no placement knows the architecture.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"No `placement` is known for models of type '{model_type}', only for: {', '.join(sorted(ARCHITECTURES))}. "
            "Name the modules to adapt in `target_modules`, for example target_modules=['attention']."
        )
    return ARCHITECTURES[model_type]


def placed_blocks(architecture: Architecture, placement: str) -> set[str]:
    """Names of the blocks that a placement adapts in every layer.

    Args:
        architecture (Architecture): where the sub-blocks are.
        placement (str): `"attention"`, `"ffn"` or `"both"`.

    Returns:
        set[str]: endings of module names, as for `target_modules`.
    """
    if placement == "both":
        return {architecture.attention, architecture.ffn}
    return {getattr(architecture, placement)}


def find_patch_grid(model_config: dict[str, Any]) -> PatchGrid:
    """Look up how a model's tokens lie in time and frequency.

    Args:
        model_config (dict): the model's config.

    Returns:
        PatchGrid: the grid.

    Raises:
        ValueError: if the architecture is not known to have one.
    """
    model_type = model_config.get("model_type", "unknown")
    make = ARCHITECTURES[model_type].patch_grid if model_type in ARCHITECTURES else None
    if make is None:
        known = ", ".join(sorted(name for name, architecture in ARCHITECTURES.items() if architecture.patch_grid))
        raise ValueError(
            f"`patch_grid` is known for models of type {known}, not for '{model_type}'. Set it to False: the "
            "convolution then runs over the sequence of tokens."
        )
    return make(model_config)


def choose_targets(config: Any, model_config: dict[str, Any]) -> None:
    """Let `placement` choose the target modules, if they are not given.

    Args:
        config (SoftMoAConfig): the choice is written into it.
        model_config (dict): the model's config.

    Raises:
        ValueError: if no placement knows the architecture.
    """
    if config.target_modules is None:
        architecture = find_architecture(model_config.get("model_type", "unknown"))
        config.target_modules = placed_blocks(architecture, config.placement)
        if config.layers_to_transform is not None and not config.layers_pattern:
            config.layers_pattern = architecture.layers


def find_targets(config: Any, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Find the modules that an adapter adapts, and check that it can adapt all of them.

    Args:
        config (SoftMoAConfig): says which; `"all-linear"` is replaced in it by the names.
        model (nn.Module): the model; its own adapters may be on the same modules.

    Returns:
        dict[str, tuple[int, int]]: D and D' by the name of the module.

    Raises:
        ValueError: if one of them cannot be adapted.
    """
    _maybe_include_all_linear_layers(config, model)
    modules = dict(model.named_modules())
    adapted = [name for name, module in modules.items() if isinstance(module, BaseTunerLayer)]
    inside_adapted = tuple(f"{name}." for name in adapted)
    targets = [
        name
        for name in modules
        if name and not name.startswith(inside_adapted) and check_target_module_exists(config, name)
    ]
    hidden_size = getattr(getattr(model, "config", None), "hidden_size", None)
    widths = {}
    for name in targets:
        inner = next((other for other in adapted if f"{other}.".startswith(f"{name}.")), None)
        if inner is not None and "softmoa_experts" not in getattr(modules[name], "adapter_layer_names", ()):
            raise ValueError(
                f"`target_modules` matches '{name}', but '{inner}' in it has an adapter already, whose weights "
                "would get other names. Adapt the same modules, or modules apart from it."
            )
        outer = next((other for other in targets if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(
                f"`target_modules` matches '{name}' and also '{outer}', which contains it. Write it so that it "
                "matches one of them, or name the other in `exclude_modules`."
            )
        widths[name] = block_widths(name, modules[name], hidden_size)
    return widths
