"""What the structure of a model does not show: the one table of architectures, and what a part of a model says.

Nothing else in the package knows the names of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from torch import nn
from transformers import PreTrainedModel

from ..calls.masks import argument_names
from ..method.experts import PatchGrid

# Arguments of models that generate token after token.
CACHES = {"past_key_values", "cache_params", "use_cache"}


def _ast_grid(config: dict[str, Any]) -> PatchGrid:
    def patches(size: str, stride: str) -> int:
        return (config[size] - config["patch_size"]) // config[stride] + 1

    # A class and a distillation token, then the patches, all times of the lowest frequency first.
    height, width = patches("num_mel_bins", "frequency_stride"), patches("max_length", "time_stride")
    return PatchGrid(2, height, width, config["patch_size"], config["frequency_stride"], config["time_stride"])


class Architecture(NamedTuple):
    """What the structure of a model does not show."""

    patch_grid: Optional[Callable[[dict[str, Any]], PatchGrid]] = None  # from the model's config to its grid
    takes_audio: Optional[bool] = None  # by default what its class says
    causal: Optional[bool] = None  # whether tokens see few or none of those after them; by default what it looks like


# By the `model_type` of the config. All that is not here goes by structure.
ARCHITECTURES = {
    # Only the config says how the patches lie.
    "audio-spectrogram-transformer": Architecture(patch_grid=_ast_grid),
    # These encoders are made to run while the audio comes in, but only their masks show it.
    "gemma3n_audio": Architecture(causal=True),
    "gemma4_audio": Architecture(causal=True),
    "moonshine_streaming_encoder": Architecture(causal=True),
    "nemotron_asr_streaming_encoder": Architecture(causal=True),
    # Its attention is flagged as causal, but sees whole clips.
    "phi4_multimodal_audio": Architecture(causal=False),
    # Its encoder is T5's, which takes the names of ids for its embedded spectrograms.
    "pop2piano": Architecture(takes_audio=True),
}


def find_patch_grid(model_config: dict[str, Any]) -> PatchGrid:
    """Look up how a model's tokens lie in time and frequency.

    Args:
        model_config (dict): the model's config.

    Returns:
        PatchGrid: the grid.

    Raises:
        ValueError: if the architecture is not known to have one.
    """
    grid = known_patch_grid(model_config)
    if grid is None:
        known = ", ".join(sorted(name for name, architecture in ARCHITECTURES.items() if architecture.patch_grid))
        raise ValueError(
            f"`patch_grid` is known for models of type {known}, not for '{model_config.get('model_type', 'unknown')}'. "
            "Set it to False: the convolution then runs over the sequence of tokens."
        )
    return grid


def known_patch_grid(model_config: dict[str, Any]) -> Optional[PatchGrid]:
    """How a model's tokens lie in time and frequency, if its architecture is known to have a grid.

    Args:
        model_config (dict): the model's config.

    Returns:
        PatchGrid, optional: the grid.
    """
    make = ARCHITECTURES.get(model_config.get("model_type", "unknown"), Architecture()).patch_grid
    return None if make is None else make(model_config)


def parts_around(model: nn.Module, name: str) -> list[PreTrainedModel]:
    """The pretrained models around a module, outermost first: the whole one, and in it an encoder or a decoder."""
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and (not path or name.startswith(f"{path}."))
    ]


def architecture_of(parts: list[PreTrainedModel]) -> Architecture:
    """What is known of the innermost of some parts."""
    return ARCHITECTURES.get(parts[-1].config.model_type, Architecture()) if parts else Architecture()


def take_audio(parts: list[PreTrainedModel]) -> bool:
    """Whether all parts around a module take audio."""
    known = architecture_of(parts).takes_audio
    return all(_takes_audio(part, part is parts[-1]) for part in parts) if known is None else known


def _takes_audio(part: PreTrainedModel, is_innermost: bool) -> bool:
    # Where its class says nothing, this is the default.
    says = part.input_modalities != PreTrainedModel.input_modalities
    if says and not (is_innermost and "audio" in part.input_modalities):
        return "audio" in part.input_modalities
    names = argument_names(part)
    if is_innermost and "input_ids" in names and not CACHES.isdisjoint(names):
        return False  # a decoder that generates, also from codes of audio
    # An inner part may have inherited what holds for another one.
    takes_other = any(name.endswith(("input_ids", "pixel_values")) for name in names)
    return not takes_other or any(name.endswith(("input_features", "input_values")) for name in names)


def looks_causal(layer: nn.Module, parts: list[PreTrainedModel]) -> bool:
    """Whether a layer says that it is causal or, if it says nothing, belongs to a part that keeps a cache."""
    # Some decoders have only the second flag.
    flags = [getattr(module, flag, None) for module in layer.modules() for flag in ("is_causal", "is_decoder")]
    keeps_cache = bool(parts) and not CACHES.isdisjoint(argument_names(parts[-1]))
    return True in flags or (keeps_cache and False not in flags)
