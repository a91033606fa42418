"""What the structure of a model does not show: the one table of architectures, and what a part of a model says.

Nothing else in the package knows the names of models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from torch.nn.functional import interpolate
from transformers import PreTrainedModel

from ..calls.folding import Reader, make_reader
from ..calls.masks import argument_names
from ..method.convolution import PatchGrid

# Arguments of models that generate token after token.
CACHES = {"past_key_values", "cache_params", "use_cache"}
FRAME_RATE = 100  # frames of a spectrogram in a second, wherever the length is fixed


def _ast_grid(config: dict[str, Any]) -> PatchGrid:
    def patches(size: str, stride: str) -> int:
        return (config[size] - config["patch_size"]) // config[stride] + 1

    # A class and a distillation token, then the patches, all times of the lowest frequency first.
    height, width = patches("num_mel_bins", "frequency_stride"), patches("max_length", "time_stride")
    return PatchGrid(2, height, width, config["patch_size"], config["frequency_stride"], config["time_stride"])


class ClipLength(NamedTuple):
    """How a part of a model reads clips of one length, and what makes it read another.

    Args:
        reader (nn.Module): the module that is called with the spectrogram.
        time (int): which axis of the spectrogram is time.
        frames (int): how many frames it reads now.
        least (int): the fewest that it can be made to read.
        most (int, optional): the most. None: there is no limit.
        step (int): what the number must be a multiple of.
        fit (callable): from a number of frames to the changes: objects, their attributes, and the new values.
    """

    reader: nn.Module
    time: int
    frames: int
    least: int
    most: Optional[int]
    step: int
    fit: Callable[[int], list[tuple[Any, str, Any]]]


def _ast_length(part: Any) -> Optional[ClipLength]:
    embeddings = getattr(part, "embeddings", None)
    if embeddings is None:
        return None
    config = part.config
    return ClipLength(embeddings, 1, config.max_length, config.patch_size, None, 1, partial(_fit_ast, part))


def _fit_ast(part: Any, frames: int) -> list[tuple[Any, str, Any]]:
    """Positions as AST's own code makes them: the middle of fewer patches in time, interpolated to more."""
    old = _ast_grid(part.config.to_dict())
    width = _ast_grid({**part.config.to_dict(), "max_length": frames}).width
    positions = part.embeddings.position_embeddings
    tokens, patches = positions.detach().split([old.class_tokens, old.height * old.width], dim=1)
    patches = patches.mT.unflatten(2, (old.height, old.width))
    if width <= old.width:
        patches = patches.narrow(3, old.width // 2 - width // 2, width)
    else:
        patches = interpolate(patches, (old.height, width), mode="bilinear")
    fitted = nn.Parameter(torch.cat([tokens, patches.flatten(2).mT], dim=1), requires_grad=positions.requires_grad)
    return [(part.embeddings, "position_embeddings", fitted), (part.config, "max_length", frames)]


def _whisper_length(part: Any) -> Optional[ClipLength]:
    if not hasattr(part, "conv2"):
        return None
    frames = part.config.max_source_positions * part.conv1.stride[0] * part.conv2.stride[0]
    # Whisper's feature extractor counts whole seconds.
    return ClipLength(part, 2, frames, FRAME_RATE, frames, FRAME_RATE, partial(_fit_whisper, part))


def _fit_whisper(part: Any, frames: int) -> list[tuple[Any, str, Any]]:
    """The first positions, which are what it reads of the beginning of a longer clip."""
    rows = frames // (part.conv1.stride[0] * part.conv2.stride[0])
    weight = part.embed_positions.weight
    fitted = nn.Parameter(weight.detach()[:rows].clone(), requires_grad=weight.requires_grad)
    return [
        (part.embed_positions, "weight", fitted),
        (part.embed_positions, "num_embeddings", rows),
        (part, "max_source_positions", rows),
        (part.config, "max_source_positions", rows),
    ]


class Architecture(NamedTuple):
    """What the structure of a model does not show."""

    patch_grid: Optional[Callable[[dict[str, Any]], PatchGrid]] = None  # from the model's config to its grid
    # From a part of the model to the length of clips that it reads; None if another part reads them.
    clip_length: Optional[Callable[[Any], Optional[ClipLength]]] = None
    takes_audio: Optional[bool] = None  # by default what its class says
    causal: Optional[bool] = None  # whether tokens see few or none of those after them; by default what it looks like
    in_time: bool = True  # whether its tokens lie in order of time
    dimensions: Optional[int] = None  # of its inputs; by default 2 of `input_values`, and 3 of others
    padding_mask: Optional[str] = None  # an argument of a block that, against its name, is true for padding


# By the `model_type` of the config. All that is not here goes by structure.
ARCHITECTURES = {
    # Only the config says how the patches lie.
    "audio-spectrogram-transformer": Architecture(
        patch_grid=_ast_grid, clip_length=_ast_length, in_time=False, dimensions=3
    ),
    "clap_audio_model": Architecture(in_time=False, dimensions=4),
    "whisper": Architecture(clip_length=_whisper_length),
    "qwen2_audio_encoder": Architecture(clip_length=_whisper_length),
    # These encoders are made to run while the audio comes in, but only their masks show it.
    "gemma3n_audio": Architecture(causal=True, padding_mask="mask"),
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


def find_clip_length(model: nn.Module) -> Optional[ClipLength]:
    """Look up the length of clips that a model reads, if it reads only one and can be made to read another.

    Args:
        model (nn.Module): the model.

    Returns:
        ClipLength, optional: the length, and what changes it.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            find = architecture_of([part]).clip_length
            if find is not None and (found := find(part)) is not None:
                return found
    return None


def channel_reader(model: nn.Module, adapter_name: str, num_channels: Optional[int] = None) -> Reader:
    """How a model takes clips of several channels.

    Args:
        model (nn.Module): the base model, with or without adapters.
        adapter_name (str): name of the adapter.
        num_channels (int, optional): C. Default: any number.

    Returns:
        Reader: what its hooks need.

    Raises:
        ValueError: if the model writes text, or takes anything beside audio.
    """
    parts = [model] if isinstance(model, PreTrainedModel) else []
    return make_reader(model, adapter_name, num_channels, architecture_of(parts).dimensions)


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
