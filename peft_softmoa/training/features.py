"""From undecoded rows to the inputs of a model."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Optional

import numpy as np
import numpy.typing as npt
from transformers import SequenceFeatureExtractor

from .audio import AudioError, decode_audio, decode_crop, name_and_content
from .cached_features import Features, open_cache
from .channels import Channels, extract_jointly
from .frames import check_length
from .options import DataOptions
from .rows import name_some
from .tasks.base import Clip, Task

logger = logging.getLogger(__name__)


class Skipped(NamedTuple):
    """A clip that cannot be used: its name, such as its path, and what is wrong with it."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def extract_features(
    feature_extractor: SequenceFeatureExtractor, waveform: npt.NDArray[np.float32], name: str, min_samples: int = 1
) -> dict[str, Any]:
    """Extract the features of one clip.

    Args:
        feature_extractor (SequenceFeatureExtractor): the model's feature extractor.
        waveform (np.ndarray): `(samples,)` float32, at the extractor's sampling rate, or `(C, samples)`, whose channels
            are normalized together.
        name (str): the clip, for errors.
        min_samples (int): the smallest number of samples that the model takes, from `shortest_clip`. Default: 1.

    Returns:
        dict[str, np.ndarray]: inputs of the model, in a batch of one, `(1, ...)` or `(1, C, ...)`.

    Raises:
        AudioError: if the clip is too short, or its features are not finite.
    """
    extract: Any = feature_extractor
    rate, length = extract.sampling_rate, waveform.shape[-1]
    check_length(name, length, min_samples, rate)
    try:
        if waveform.ndim == 1:
            features = dict(extract(waveform, sampling_rate=rate, return_tensors="np"))
        else:
            features = {key: values[None] for key, values in extract_jointly(extract, waveform).items()}
    except (ValueError, AssertionError) as error:  # torchaudio asserts a minimum length
        raise AudioError(name, f"no features from {length} samples ({error})") from error
    if not np.isfinite(features[extract.model_input_names[0]]).all():
        raise AudioError(name, f"features of {length} samples are not finite")
    return features


def mask_channels(name: str, count: int, most: Optional[int]) -> npt.NDArray[np.bool_]:
    """Say which of the channels that a model reads a clip has: the first ones.

    Args:
        name (str): the clip, for the error.
        count (int): its number of channels, as far as they are read.
        most (int, optional): the number that the model reads, from `most_channels`. None: any number.

    Returns:
        np.ndarray: `(C,)` bool.

    Raises:
        AudioError: if it has more.
    """
    if most is not None and count > most:
        raise AudioError(
            name,
            f"it has {count} channels, more than the adapter reads (num_channels={most}): choose {most} of them with "
            "`channels`, those that it was trained on",
        )
    return np.arange(most or count) < count


class ExtractFeatures:
    """From a batch of undecoded rows to a batch of model inputs, without the rows whose audio cannot be used.

    Args:
        feature_extractor (SequenceFeatureExtractor): the model's feature extractor.
        task (Task, optional): what the labels of a row are. Default: the rows have none.
        options (DataOptions, optional): the columns, the greatest length of a clip, and what happens to audio that
            cannot be used. Default: the defaults of `DataOptions`.
        random_crop (bool): cut long clips at a random place, as in training, and not at the start. Default: False.
        min_samples (int): number of samples below which a clip cannot be used, from `shortest_clip`. `AudioTrainer`
            sets it for its model. Default: 1.
    """

    def __init__(
        self,
        feature_extractor: SequenceFeatureExtractor,
        task: Optional[Task] = None,
        options: Optional[DataOptions] = None,
        *,
        random_crop: bool = False,
        min_samples: int = 1,
    ) -> None:
        self.feature_extractor: Any = feature_extractor
        self.task = task
        self.options = options or DataOptions()
        self.random_crop = random_crop
        self.min_samples = min_samples
        # `AudioStream.prepare` sets them for its model.
        self.channels: Channels = self.options.channels or "mono"
        self.most_channels: Optional[int] = None
        self.skipped: list[Skipped] = []
        self._warned: set[Skipped] = set()

    def __call__(self, rows: dict[str, list[Any]], generator: Optional[np.random.Generator] = None) -> dict[str, Any]:
        """Decode the audio and extract the features.

        Args:
            rows (dict[str, list]): a batch with the columns.
            generator (np.random.Generator, optional): draws the places of random cuts. Default: a new one.

        Returns:
            dict[str, list]: the model's inputs and, with a task, `labels`; unless mono, the inputs are `(C, ...)`, and
            `channel_mask` says which of the channels that the model reads are there.

        Raises:
            AudioError: for audio that cannot be used, if `on_bad_audio="raise"`.
            ValueError: for a label that is not among the classes.
        """
        generator = generator or np.random.default_rng()
        audio_column, task = self.options.audio_column, self.task
        batch: dict[str, list[Any]] = {self.feature_extractor.model_input_names[0]: []}
        if task is not None:
            batch["labels"] = []
        rate, can_crop = self.feature_extractor.sampling_rate, task is None or task.can_crop
        options = replace(self.options, channels=self.channels)
        cache = open_cache(self.feature_extractor, options, self.random_crop and can_crop, whole=not can_crop)
        for index, audio in enumerate(rows[audio_column]):
            if audio is not None and not isinstance(audio, (str, bytes, dict)):
                raise ValueError(
                    f"Column '{audio_column}' holds {type(audio).__name__}, but audio is a path, the content of a "
                    "file, or a dict with both."
                )
            name, _ = name_and_content(audio)
            target = None
            if task is not None:
                target = task.parse({column: rows[column][index] for column in self.options.label_columns}, name)
            try:
                extract = partial(self._extract, audio, name, generator)
                found = cache.get(audio, extract) if cache else extract()
                # What lies in the cache may have been made for a model that takes shorter clips.
                check_length(name, found.num_samples, self.min_samples, rate)
                inputs = dict(found.inputs)
                if self.channels != "mono":
                    inputs["channel_mask"] = mask_channels(name, len(next(iter(inputs.values()))), self.most_channels)
                clip = Clip(found.start, found.num_samples, rate)
                labels = None if task is None else task.encode(target, name, clip)
            except AudioError as error:
                if self.options.on_bad_audio == "raise":
                    raise
                self.skipped.append(Skipped(error.name, error.reason))
                continue
            for key, features in inputs.items():
                batch.setdefault(key, []).append(features)
            if task is not None:
                batch["labels"].append(labels)
        if cache:
            cache.write()
        return batch

    def _extract(self, audio: Any, name: str, generator: np.random.Generator) -> Features:
        rate, seconds, start = self.feature_extractor.sampling_rate, self.options.max_length_seconds, 0
        length = None if seconds is None else round(seconds * rate)
        if self.task is not None and not self.task.can_crop:
            longest = min((each for each in (length, self._most_samples()) if each is not None), default=None)
            waveform = decode_audio(audio, rate, None if longest is None else (longest + 1) / rate, self.channels)
            if longest is not None and waveform.shape[-1] > longest:
                raise AudioError(name, f"longer than the {longest / rate:g} s that are read, and its target is of all")
        elif self.random_crop and length is not None:
            waveform, start = decode_crop(audio, rate, length, generator, self.channels)
        else:
            waveform = decode_audio(audio, rate, seconds, self.channels)[..., :length]
        features = extract_features(self.feature_extractor, waveform, name, self.min_samples)
        return Features(waveform.shape[-1], {key: values[0] for key, values in features.items()}, start / rate)

    def _most_samples(self) -> Optional[int]:
        """What an extractor with inputs of one length, such as Whisper's, cuts away in silence."""
        return getattr(self.feature_extractor, "n_samples", None)

    def warn_of_skipped(self, num_rows: Optional[int] = None) -> None:
        """Name the audio that this pass has skipped in one warning, unless earlier warnings have named all of it.

        Args:
            num_rows (int, optional): number of all rows, if it is known.
        """
        if not self._warned.issuperset(self.skipped):
            count = f"{len(self.skipped)}{'' if num_rows is None else f' of {num_rows}'}"
            logger.warning(
                f"Skipped {count} audio files that cannot be used: {name_some(map(str, self.skipped), separator='; ')}"
            )
        self._warned.update(self.skipped)
