"""Features on disk, so that a second epoch neither reads nor decodes a clip."""

from __future__ import annotations

import inspect
import logging
import os
import random
import uuid
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Optional

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .fingerprint import fingerprint_clip
from .options import DataOptions

logger = logging.getLogger(__name__)
FOLDER = "softmoa_features"
# Another version of these may make other features of the same clip.
PACKAGES = ("peft-softmoa", "transformers", "torch", "torchaudio", "numpy", "av", "soundfile", "soxr")

# Packages whose code is known by their versions, not by its text.
RELEASED = ("builtins", "transformers")


class Features(NamedTuple):
    """What a feature extractor makes of one clip.

    Args:
        num_samples (int): length of the waveform that they are made from.
        inputs (dict[str, Any]): inputs of the model, without a batch axis.
        start (float): where the waveform begins in the clip, in seconds; 0 for all that is kept. Default: 0.
    """

    num_samples: int
    inputs: dict[str, Any]
    start: float = 0.0


class FeatureCache:
    """The features of clips, one file for each, for one feature extractor, one greatest length and one choice of
    channels.

    A file is named by what its features depend on, so it is never out of date. It appears whole or not at all, so
    several processes may write and read at once. Nothing is written by a feature extractor that draws random numbers.

    Args:
        feature_extractor (Any): the feature extractor.
        options (DataOptions): how the clips are read.
        whole (bool): whether long clips are refused, and not cut. Default: False.
    """

    def __init__(self, feature_extractor: Any, options: DataOptions, whole: bool = False) -> None:
        self._extractor = feature_extractor
        self._before = _state(feature_extractor)
        read = (options.max_length_seconds, options.channels or "mono", whole)
        made_by = [self._before[0], _sources(feature_extractor), *read, _versions()]
        self._folder = cache_folder(options) / Hasher.hash(made_by)
        self._new: dict[Path, Features] = {}

    def get(self, audio: Any, extract: Callable[[], Features]) -> Features:
        """The features of a clip, from its file if there is one.

        Args:
            audio (Any): the clip, as for `decode_audio`.
            extract (callable): makes the features.

        Returns:
            Features: the features.
        """
        clip = fingerprint_clip(audio)
        if clip is None:
            return extract()
        path = self._folder / clip[:2] / f"{clip}.safetensors"
        features = _load(path)
        if features is None:
            features = extract()
            if all(map(_is_numeric, features.inputs.values())):
                self._new[path] = features
        return features

    def write(self) -> None:
        """Write the features that were made, unless they were made with random numbers."""
        if self._new and _state(self._extractor) == self._before:
            try:
                for path, features in self._new.items():
                    _save(path, features)
            except (OSError, SafetensorError) as error:  # a full disk is the latter
                _warn_once(
                    f"Features are not kept for the next epoch, as {self._folder} cannot be written "
                    f"({getattr(error, 'strerror', None) or error}): free space, or give another `cache_dir`."
                )
        self._new.clear()


def open_cache(
    feature_extractor: Any, options: DataOptions, random_crop: bool, whole: bool = False
) -> Optional[FeatureCache]:
    """Open the cache, if features are the same in each epoch and the dataset is not streamed.

    Args:
        feature_extractor (Any): the feature extractor.
        options (DataOptions): how the clips are read.
        random_crop (bool): whether long clips are cut at a random place.
        whole (bool): whether long clips are refused, and not cut. Default: False.

    Returns:
        FeatureCache, optional: the cache.
    """
    if options.streaming or (random_crop and options.max_length_seconds is not None):
        return None
    try:
        return FeatureCache(feature_extractor, options, whole)
    except Exception as error:  # noqa: BLE001 - pickling a foreign feature extractor may raise anything
        _warn_once(
            f"Features are not kept for the next epoch, as the feature extractor cannot be pickled, or has no "
            f"source code ({error})."
        )
        return None


def cache_folder(options: DataOptions) -> Path:
    """Folder of the cached features; it may be removed at any time.

    Args:
        options (DataOptions): with the folder for downloads.

    Returns:
        Path: the folder `softmoa_features` in it.
    """
    return Path(options.cache_dir or datasets.config.HF_DATASETS_CACHE) / FOLDER


def _state(feature_extractor: Any) -> tuple[Any, ...]:
    """Fingerprint of a feature extractor, and the states of the random generators that it may draw from."""
    state: Any = np.random.get_state()
    _, keys, *rest = state
    numbers = (keys.tobytes(), *rest, torch.get_rng_state().numpy().tobytes(), random.getstate())
    return Hasher.hash(feature_extractor), *numbers


def _sources(feature_extractor: Any) -> list[str]:
    """The code of a feature extractor of one's own, which may change while its attributes stay."""
    own = (each for each in type(feature_extractor).__mro__ if each.__module__.split(".")[0] not in RELEASED)
    return [inspect.getsource(each) for each in own]


@cache
def _versions() -> list[Optional[str]]:
    versions: list[Optional[str]] = []
    for package in PACKAGES:
        try:
            versions.append(version(package))
        except PackageNotFoundError:
            versions.append(None)
    return versions


def _is_numeric(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8


def _load(path: Path) -> Optional[Features]:
    try:
        with safe_open(path, framework="numpy") as file:
            inputs = {name: file.get_tensor(name)[()] for name in file.keys()}  # noqa: SIM118 - it is no dict
            return Features(int(file.metadata()["num_samples"]), inputs)
    except (OSError, SafetensorError):  # not there, or cut off by a crash of the system
        return None


def _save(path: Path, features: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid.uuid4().hex}")
    try:
        inputs = {name: np.ascontiguousarray(value) for name, value in features.inputs.items()}
        save_file(inputs, unfinished, {"num_samples": str(features.num_samples)})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
