"""A dataset as a model reads it: features in one file, which all processes share."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from tqdm.auto import tqdm

from peft_softmoa.training import DataOptions, class_names, decode_audio, load_rows
from peft_softmoa.training.features import extract_features
from peft_softmoa.training.rows import label_name

from .studies import Study


class Data(NamedTuple):
    """A dataset as the model reads it.

    Args:
        inputs (Tensor, optional): `(clips, ...)` or, of C channels, `(clips, C + 1, ...)`, the last one of their mean;
            None on the way to another process, which reads them from their file.
        labels (Tensor): `(clips,)` int64.
        folds (list[str]): the fold of each clip.
        speakers (list[str]): the speaker of each clip; empty if they are not known.
        label_names (list[str]): the classes, or the texts that occur.
        digest (str): of all that it was made from.
    """

    inputs: Optional[Tensor]
    labels: Tensor
    folds: list[str]
    speakers: list[str]
    label_names: list[str]
    digest: str

    @property
    def fold_names(self) -> list[str]:
        """The folds in their order: numbers by their value."""
        return sorted(set(self.folds), key=lambda fold: (len(fold), fold))

    def clips(self, folds: list[str]) -> Tensor:
        """Indices of the clips of some folds, in the order of the dataset."""
        return torch.tensor([index for index, fold in enumerate(self.folds) if fold in folds])

    def split(self, tested: str) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the clips that train, validate and test: the next fold validates, in a circle."""
        held_out = validation_fold(tested, self.fold_names)
        others = [fold for fold in self.fold_names if fold not in (tested, held_out)]
        return self.clips(others), self.clips([held_out]), self.clips([tested])

    def draw(self, clips: Tensor, per_class: Optional[int], speakers: Optional[int], seed: int) -> Tensor:
        """Draw some of the clips: all of as many speakers, and of these as many of each class.

        What is drawn depends on nothing but the arguments, so that all methods get the same.

        Args:
            clips (Tensor): indices.
            per_class (int, optional): how many of each class, at most. Default: all.
            speakers (int, optional): how many speakers. Default: all.
            seed (int): of the choice.

        Returns:
            Tensor: indices, in the order of the dataset.

        Raises:
            ValueError: if there are fewer speakers.
        """
        generator = np.random.default_rng(seed)
        chosen = clips.numpy()
        if speakers is not None:
            names = sorted({self.speakers[index] for index in chosen}) if self.speakers else []
            if len(names) < speakers:
                raise ValueError(f"`speakers` must be at most {len(names)}, which the clips have, got {speakers}.")
            kept = {names[index] for index in generator.permutation(len(names))[:speakers]}
            chosen = np.array([index for index in chosen if self.speakers[index] in kept])
        if per_class is not None:
            labels, shuffled = self.labels.numpy(), generator.permutation(chosen)
            parts = [shuffled[labels[shuffled] == label][:per_class] for label in np.unique(labels[chosen])]
            chosen = np.sort(np.concatenate(parts))
        return torch.from_numpy(chosen)


def validation_fold(fold: str, folds: list[str]) -> str:
    """The fold after the tested one, in a circle."""
    return folds[(folds.index(fold) + 1) % len(folds)]


def load_data(study: Study, dataset: str, extractor: Any, cache: Path, **options: Any) -> Data:
    """Decode a dataset and extract its features, or take them from the cache.

    Args:
        study (Study): its columns, channels and length of clips.
        dataset (str): id on the Hub, or local folder with a metadata.csv.
        extractor (SequenceFeatureExtractor): makes the features.
        cache (Path): folder for the features; it is made. Their file is named by a digest of the clips' content, labels
            and folds, of the extractor's settings and of the length.
        options (Any): of `DataOptions`, and `split` and `fold_column`.

    Returns:
        Data: all clips.

    Raises:
        AudioError: for a clip that cannot be used.
        ValueError: if a column is missing, or there are fewer than three folds.
    """
    split, fold_column = options.pop("split", "train"), options.pop("fold_column", "fold")
    given = DataOptions(label_column=study.label_column, on_bad_audio="raise", **options)
    columns = [study.label_column, fold_column, *([study.speaker_column] if study.speaker_column else [])]
    stream = load_rows(dataset, split, given, columns=[given.audio_column, *columns])
    names = {column: class_names(stream, column) for column in columns}
    rows = list(tqdm(stream, desc=f"Reading {dataset}", unit=" rows", leave=False))
    labels, folds, *others = ([label_name(row[column], names[column], dataset) for row in rows] for column in columns)
    if len(set(folds)) < 3:
        raise ValueError(f"{dataset} has the folds {sorted(set(folds))}; training, validation and test need three.")
    settings = [study.seconds, study.num_channels]
    digest = hashlib.sha256((extractor.to_json_string() + json.dumps(settings)).encode())
    for row, label, fold in zip(rows, labels, folds, strict=True):
        digest.update(hashlib.sha256(_content(row[given.audio_column])).digest() + json.dumps([label, fold]).encode())
    name = digest.hexdigest()[:16]

    def extract() -> Tensor:
        parts = [
            _features(row[given.audio_column], extractor, study)
            for row in tqdm(rows, desc="Extracting features", unit=" clips", leave=False)
        ]
        return torch.from_numpy(np.stack(parts))

    label_names = sorted(set(labels))
    indices = torch.tensor([label_names.index(label) for label in labels])
    return Data(cached(cache, name, extract), indices, folds, others[0] if others else [], label_names, name)


def cached(cache: Path, name: str, make: Callable[[], Tensor]) -> Tensor:
    """A tensor from the cache, which is made and put there if it is missing."""
    path = cache / f"{name}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        (cache / ".gitignore").write_text("*\n")
        temporary = path.with_suffix(".part")
        torch.save(make(), temporary)
        temporary.replace(path)
    return load_cached(cache, name)


def load_cached(cache: Path, name: str) -> Tensor:
    """Read a tensor of the cache from memory that all processes share."""
    return torch.load(cache / f"{name}.pt", weights_only=True, mmap=True)


def _content(audio: dict[str, Any]) -> bytes:
    return Path(audio["path"]).read_bytes() if audio["bytes"] is None else audio["bytes"]


def _features(audio: dict[str, Any], extractor: Any, study: Study) -> np.ndarray:
    """The features of a clip, of one channel or of all and their mean."""
    rate, name = extractor.sampling_rate, str(audio["path"])
    if study.num_channels is None:
        waveforms = [decode_audio(audio, rate, study.seconds)]
    else:
        samples, own = soundfile.read(io.BytesIO(_content(audio)), dtype="float32", always_2d=True)
        if samples.shape[1] != study.num_channels:
            raise ValueError(f"{name} has {samples.shape[1]} channels, and the study reads {study.num_channels}.")
        waveforms = list(soxr.resample(samples, own, rate).T)
        waveforms.append(np.mean(waveforms, axis=0))
    length = None if study.seconds is None else round(study.seconds * rate)
    parts = [
        extract_features(extractor, np.ascontiguousarray(each[:length]), name)[extractor.model_input_names[0]][0]
        for each in waveforms
    ]
    return parts[0] if study.num_channels is None else np.stack(parts)
