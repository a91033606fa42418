"""The length of clips that a model reads, fitted to an adapter's while the adapter is in the model.

AST and Whisper read one length only, 10.24 s and 30 s, and pad shorter clips to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Optional

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import SequenceFeatureExtractor

from ..fields import LENGTH, is_length, shorten
from .architectures import ARCHITECTURES, FRAME_RATE, find_clip_length
from .layers import whole_shape

# Attribute of the model that keeps what it was while it is fitted.
BASE_LENGTH = "_softmoa_base_length"


@dataclass(frozen=True)
class BaseLength:
    """What a model was before it was fitted to a length.

    Args:
        seconds (float): the length that it is fitted to.
        frames (int): how many frames of a spectrogram it reads when it is not fitted.
        before (tuple): objects that were changed, their attributes, and the values before.
        hook (RemovableHandle): removes the hook that cuts longer spectrograms.
        adapters (frozenset[str]): the adapters that need the length.
    """

    seconds: float
    frames: int
    before: tuple[tuple[Any, str, Any], ...]
    hook: RemovableHandle
    adapters: frozenset[str] = frozenset()


def fit_length(model: nn.Module, seconds: Optional[float]) -> None:
    """Make a model read clips of the length that a new adapter needs.

    Args:
        model (nn.Module): the base model, with or without adapters.
        seconds (float, optional): the length. None: the adapter needs the base model's own.

    Raises:
        ValueError: if the model cannot read clips of this length, or other adapters need another one.
    """
    kept: Optional[BaseLength] = getattr(model, BASE_LENGTH, None)
    fitted = kept.seconds if kept is not None else None
    if seconds == fitted:
        return
    if kept is not None or _has_adapters(model):
        now = f"max_length_seconds={fitted}" if kept is not None else "the base model's own length"
        raise ValueError(
            f"`max_length_seconds` must be the same for all adapters in a model, got {seconds}, but the adapters that "
            f"are in it have {now}. Delete them first, or load this adapter into a model of its own."
        )
    if seconds is None:
        return
    length = find_clip_length(model)
    if length is None:
        known = ", ".join(sorted(name for name, architecture in ARCHITECTURES.items() if architecture.clip_length))
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"`max_length_seconds` is known for models of type {known}, not for '{model_type}'. Leave it out: cut the "
            "clips instead, if the model reads any length."
        )
    frames, is_whole = _frames(seconds), length.step == 1 or seconds * FRAME_RATE % length.step == 0
    limits = [f"at least {length.least / FRAME_RATE:g}"]
    if length.most is not None:
        limits.append(f"at most {length.most / FRAME_RATE:g}, its full length")
    if length.step > 1:
        limits.append(f"a multiple of {length.step / FRAME_RATE:g}")
    if not (is_whole and length.least <= frames <= (length.most or frames)):
        raise ValueError(f"`max_length_seconds` of {type(model).__name__} must be {', '.join(limits)}, got {seconds}.")
    if any(tuple(parameter.shape) != whole_shape(parameter) for parameter in length.reader.parameters()):
        raise ValueError(
            "`max_length_seconds` does not work with a model whose weights are divided among processes, as by ZeRO-3. "
            "Leave it out, or load the model before they are divided."
        )
    changes = length.fit(frames)
    before = tuple((owner, name, getattr(owner, name)) for owner, name, _ in changes)
    for owner, name, value in changes:
        _set(owner, name, value)
    hook = length.reader.register_forward_pre_hook(partial(_cut, length.time, frames), with_kwargs=True)
    setattr(model, BASE_LENGTH, BaseLength(seconds, length.frames, before, hook))


def hold_length(model: nn.Module, adapter_name: str) -> list[Any]:
    """Keep a model at the length that it is fitted to as long as an adapter is in it.

    Args:
        model (nn.Module): the base model.
        adapter_name (str): name of the adapter.

    Returns:
        list[Any]: a handle whose `remove` says that the adapter is gone; empty if the model has its own length.
    """
    kept: Optional[BaseLength] = getattr(model, BASE_LENGTH, None)
    if kept is None:
        return []
    # A new object: a rollback puts the earlier one back.
    setattr(model, BASE_LENGTH, replace(kept, adapters=kept.adapters | {adapter_name}))
    return [_Hold(model, adapter_name)]


class _Hold:
    """Keeps a model at its fitted length until it is removed."""

    def __init__(self, model: Optional[nn.Module], adapter_name: str) -> None:
        self.model = model
        self.adapter_name = adapter_name

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hold:
        # A copy of a part of the model holds nothing.
        return _Hold(memo.get(id(self.model)), self.adapter_name)

    def remove(self) -> None:
        kept: Optional[BaseLength] = getattr(self.model, BASE_LENGTH, None)
        if self.model is None or kept is None:
            return
        left = kept.adapters - {self.adapter_name}
        if left:
            setattr(self.model, BASE_LENGTH, replace(kept, adapters=left))
        else:
            _restore(self.model, kept)


@contextmanager
def fitted_length(model: nn.Module, seconds: Optional[float]) -> Iterator[None]:
    """Let a model read clips of a length for a while.

    Args:
        model (nn.Module): the base model, with or without adapters.
        seconds (float, optional): the length. None: the base model's own.

    Raises:
        ValueError: as `fit_length`.
    """
    before = getattr(model, BASE_LENGTH, None)
    fit_length(model, seconds)
    kept: Optional[BaseLength] = getattr(model, BASE_LENGTH, None)
    try:
        yield
    finally:
        if kept is not None and kept is not before:
            _restore(model, kept)


def _restore(model: nn.Module, kept: BaseLength) -> None:
    kept.hook.remove()
    for owner, name, value in kept.before:
        _set(owner, name, _moved(value, getattr(owner, name)))
    delattr(model, BASE_LENGTH)


def _set(owner: Any, name: str, value: Any) -> None:
    # With `low_cpu_mem_usage`, what is registered while an adapter is added goes to the meta device.
    if isinstance(value, nn.Parameter):
        owner._parameters[name] = value
    else:
        setattr(owner, name, value)


def _moved(value: Any, now: Any) -> Any:
    """What was kept of a model, as the model is now: it may have been moved or cast, and its parameters frozen."""
    if not isinstance(value, nn.Parameter):
        return value
    if (now.device, now.dtype) != (value.device, value.dtype):
        value = nn.Parameter(value.detach().to(now.device, now.dtype))
    return value.requires_grad_(now.requires_grad)


def _frames(seconds: float) -> int:
    return round(seconds * FRAME_RATE)


def _cut(
    time: int, frames: int, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cut a longer spectrogram, which the base model's own feature extractor makes."""

    def cut(value: Any) -> Any:
        is_longer = isinstance(value, Tensor) and value.ndim == 3 and value.shape[time] > frames
        return value.narrow(time, 0, frames) if is_longer else value

    # The spectrogram is the first argument.
    return tuple(map(cut, args[:1])) + args[1:], {
        name: cut(value) if name in ("input_features", "input_values") else value for name, value in kwargs.items()
    }


def _has_adapters(model: nn.Module) -> bool:
    return any(
        len(getattr(module, name))
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name in module.adapter_layer_names
    )


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own parameters in the place of those that are fitted to a length.

    Args:
        model (nn.Module): the model, with or without adapters.

    Returns:
        dict[str, Tensor]: by the name in the model's state; empty if it has its own length.
    """
    own = {
        (id(owner), name): _moved(value, getattr(owner, name))
        for module in model.modules()
        if BASE_LENGTH in vars(module)
        for owner, name, value in vars(module)[BASE_LENGTH].before
        if isinstance(value, nn.Parameter)
    }
    return {
        f"{path}.{name}".lstrip("."): own[id(module), name]
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if (id(module), name) in own
    }


def fitting_length(model: nn.Module, seconds: float) -> Optional[float]:
    """The `max_length_seconds` of an adapter for clips that are at most so long.

    Args:
        model (nn.Module): the base model, or a `PeftModel` of it; it may be on the meta device.
        seconds (float): the greatest length of a clip.

    Returns:
        float, optional: the length, rounded up to one that the model can be fitted to; None if it reads any length, or
        no more than that anyway.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    length = find_clip_length(base)
    if length is None:
        return None
    rounded = seconds if length.step == 1 else math.ceil(seconds * FRAME_RATE / length.step) * length.step / FRAME_RATE
    kept: Optional[BaseLength] = getattr(base, BASE_LENGTH, None)
    return rounded if rounded * FRAME_RATE < (kept.frames if kept is not None else length.frames) else None


def fit_feature_extractor(feature_extractor: SequenceFeatureExtractor, seconds: float) -> SequenceFeatureExtractor:
    """Make the feature extractor for an adapter with `max_length_seconds`.

        feature_extractor = fit_feature_extractor(feature_extractor, config.max_length_seconds)
        feature_extractor.save_pretrained(adapter_folder)

    Args:
        feature_extractor (SequenceFeatureExtractor): the base model's.
        seconds (float): the adapter's `max_length_seconds`.

    Returns:
        SequenceFeatureExtractor: a copy that pads and cuts clips to this length.

    Raises:
        ValueError: if the length is not allowed, or the feature extractor has none.
    """
    # `import peft_softmoa` does without them.
    from transformers import ASTFeatureExtractor, WhisperFeatureExtractor

    if not is_length(seconds):
        raise ValueError(f"`seconds` must be {LENGTH}, got {shorten(seconds)}.")
    fitted = copy.deepcopy(feature_extractor)
    if isinstance(fitted, ASTFeatureExtractor):
        fitted.max_length = _frames(seconds)
    elif isinstance(fitted, WhisperFeatureExtractor):
        if seconds != round(seconds):
            raise ValueError(f"`seconds` must be whole for {type(fitted).__name__}, got {seconds}.")
        fitted.chunk_length = round(seconds)
        fitted.n_samples = fitted.chunk_length * fitted.sampling_rate
        fitted.nb_max_frames = fitted.n_samples // fitted.hop_length
    else:
        raise ValueError(
            f"{type(fitted).__name__} has no fixed length. It is used as it is, with a model that reads any length."
        )
    return fitted
