"""From undecoded rows to the inputs of a model."""

from __future__ import annotations

import logging
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Optional

import numpy as np
from peft import PeftModel
from torch import nn
from transformers import SequenceFeatureExtractor

from ..targets.placement import find_encoder
from ..targets.probes import token_probe
from .audio import AudioError, decode_audio, decode_crop, name_and_content
from .cached_features import Features, open_cache
from .options import DataOptions
from .rows import label_name, name_some

logger = logging.getLogger(__name__)
LONGEST_TOKEN = 30  # seconds; no token reads so much


class Skipped(NamedTuple):
    """A clip that cannot be used: its name, such as its path, and what is wrong with it."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def shortest_clip(model: nn.Module, feature_extractor: SequenceFeatureExtractor) -> int:
    """Find how long a clip must be to give a model one token.

    A copy of the model without weights is run on shapes alone, up to the first layer of its encoder.

    Args:
        model (nn.Module): the model, with or without an adapter; it is neither run nor changed.
        feature_extractor (SequenceFeatureExtractor): its feature extractor.

    Returns:
        int: the smallest number of samples; 1 if the model cannot run so, or has no layers.
    """
    extract: Any = feature_extractor
    name, rate = extract.model_input_names[0], extract.sampling_rate
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        probe = token_probe(base, find_encoder(base)[0].name)
    except Exception:  # noqa: BLE001 - a foreign model may raise anything
        return 1

    def is_enough(length: int) -> bool:
        try:
            features = extract(np.zeros(length, np.float32), sampling_rate=rate, return_tensors="pt")[name]
            # Some extractors divide by the deviation over time, which a single frame does not have.
            return bool(features.isfinite().all()) and probe({name: features})
        except Exception:  # noqa: BLE001 - so may a foreign feature extractor
            return False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        enough = 1
        while not is_enough(enough):
            if enough > LONGEST_TOKEN * rate:
                return 1
            enough *= 2
        lengths = range(enough // 2 + 1, enough)
        return enough // 2 + 1 + bisect_left(lengths, True, key=is_enough)


def check_length(name: str, length: int, min_samples: int, sampling_rate: int) -> None:
    """Check that a clip is long enough for the model.

    Args:
        name (str): the clip, for the error.
        length (int): its number of samples.
        min_samples (int): the smallest number that the model takes, from `shortest_clip`.
        sampling_rate (int): in Hz.

    Raises:
        AudioError: if it is too short.
    """
    if length < min_samples:
        raise AudioError(
            name,
            f"the model does not take its {length / sampling_rate:.3f} s, which is shorter than what one token reads "
            f"({min_samples / sampling_rate:.3f} s)",
        )


class ExtractFeatures:
    """From a batch of undecoded rows to a batch of model inputs, without the rows whose audio cannot be used.

    Args:
        feature_extractor (SequenceFeatureExtractor): the model's feature extractor.
        label_names (Sequence[str]): the classes, in the order of the model's outputs.
        options (DataOptions, optional): the columns, the greatest length of a clip, and what happens to audio that
            cannot be used. Default: the defaults of `DataOptions`.
        class_names (Sequence[str], optional): names of the classes, if the labels are indices.
        random_crop (bool): cut long clips at a random place, as in training, and not at the start. Default: False.
        min_samples (int): number of samples below which a clip cannot be used, from `shortest_clip`. `AudioTrainer`
            sets it for its model. Default: 1.
    """

    def __init__(
        self,
        feature_extractor: SequenceFeatureExtractor,
        label_names: Sequence[str],
        options: Optional[DataOptions] = None,
        *,
        class_names: Optional[Sequence[str]] = None,
        random_crop: bool = False,
        min_samples: int = 1,
    ) -> None:
        self.feature_extractor: Any = feature_extractor
        self.label_ids = {name: index for index, name in enumerate(label_names)}
        self.options = options or DataOptions()
        self.class_names = class_names
        self.random_crop = random_crop
        self.min_samples = min_samples
        self.skipped: list[Skipped] = []
        self._warned: set[Skipped] = set()

    def __call__(self, rows: dict[str, list[Any]], generator: Optional[np.random.Generator] = None) -> dict[str, Any]:
        """Decode the audio and extract the features.

        Args:
            rows (dict[str, list]): a batch with the columns.
            generator (np.random.Generator, optional): draws the places of random cuts. Default: a new one.

        Returns:
            dict[str, list]: the model's inputs and, if there is a label column, `labels`.

        Raises:
            AudioError: for audio that cannot be used, if `on_bad_audio="raise"`.
            ValueError: for a label that is not among the classes.
        """
        generator = generator or np.random.default_rng()
        audio_column, label_column = self.options.audio_column, self.options.label_column
        batch: dict[str, list[Any]] = {self.feature_extractor.model_input_names[0]: []}
        if label_column is not None:
            batch["labels"] = []
        cache = open_cache(self.feature_extractor, self.options, self.random_crop)
        for index, audio in enumerate(rows[audio_column]):
            if audio is not None and not isinstance(audio, (str, bytes, dict)):
                raise ValueError(
                    f"Column '{audio_column}' holds {type(audio).__name__}, but audio is a path, the content of a "
                    "file, or a dict with both."
                )
            name, _ = name_and_content(audio)
            label = None
            if label_column is not None:
                label = label_name(rows[label_column][index], self.class_names, name)
                if label not in self.label_ids:
                    raise ValueError(f"{name}: label '{label}' is none of the classes {name_some(self.label_ids)}.")
            try:
                extract = partial(self._extract, audio, name, generator)
                num_samples, inputs = cache.get(audio, extract) if cache else extract()
                # What lies in the cache may have been made for a model that takes shorter clips.
                check_length(name, num_samples, self.min_samples, self.feature_extractor.sampling_rate)
            except AudioError as error:
                if self.options.on_bad_audio == "raise":
                    raise
                self.skipped.append(Skipped(error.name, error.reason))
                continue
            for key, features in inputs.items():
                batch.setdefault(key, []).append(features)
            if label is not None:
                batch["labels"].append(self.label_ids[label])
        if cache:
            cache.write()
        return batch

    def _extract(self, audio: Any, name: str, generator: np.random.Generator) -> Features:
        rate, seconds = self.feature_extractor.sampling_rate, self.options.max_length_seconds
        length = None if seconds is None else round(seconds * rate)
        if self.random_crop and length is not None:
            waveform = decode_crop(audio, rate, length, generator)
        else:
            waveform = decode_audio(audio, rate, seconds)[:length]
        check_length(name, len(waveform), self.min_samples, rate)
        try:
            features = self.feature_extractor(waveform, sampling_rate=rate, return_tensors="np")
        except (ValueError, AssertionError) as error:  # torchaudio asserts a minimum length
            raise AudioError(name, f"no features from {len(waveform)} samples ({error})") from error
        if not np.isfinite(features[self.feature_extractor.model_input_names[0]]).all():
            raise AudioError(name, f"features of {len(waveform)} samples are not finite")
        return Features(len(waveform), {key: values[0] for key, values in features.items()})

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
