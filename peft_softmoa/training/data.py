"""From rows of a dataset to batches: choose rows, decode, mix to mono, resample, extract features.

Audio is decoded with soundfile and resampled with soxr, over columns that datasets does not decode: its own decoder
needs a system FFmpeg.
"""

from __future__ import annotations

import csv
import io
import itertools
import logging
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union

import numpy as np
from datasets import Audio, ClassLabel, Features, IterableDataset, Value, load_dataset, load_dataset_builder
from tqdm.auto import tqdm
from transformers import SequenceFeatureExtractor

from .network import patiently, read_url

logger = logging.getLogger(__name__)

METADATA = "metadata.csv"
BLOCK_FRAMES = 65_536
UNNAMED = "a clip without a name"


class AudioError(ValueError):
    """An audio file that cannot be used.

    Args:
        name (str): the file.
        reason (str): what is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class Survey(NamedTuple):
    """What a dataset has: the number of rows, the labels in order and, if it was counted, the rows of each shard."""

    num_rows: int
    labels: tuple[str, ...]
    rows_per_shard: Optional[tuple[int, ...]] = None


# --- rows ---------------------------------------------------------------------------------------------------------


def load_rows(
    name: str,
    split: str,
    *,
    audio_column: str = "audio",
    columns: Optional[Sequence[str]] = None,
    config_name: Optional[str] = None,
    revision: Optional[str] = None,
    token: Union[str, bool, None] = None,
    cache_dir: Optional[str] = None,
    streaming: bool = True,
) -> IterableDataset:
    """Rows of one split, with the audio not decoded.

    A local folder with a `metadata.csv`, whose column `file_name` holds paths relative to it, is one split, `train`; a
    folder with a folder of that kind per split has these splits. Everything else is left to
    `datasets.load_dataset`: an id on the Hub, or a local folder with Parquet files.

    Args:
        name (str): id on the Hub or local folder.
        split (str): name of the split.
        audio_column (str): name of the column with the audio. Default: `"audio"`.
        columns (Sequence[str], optional): the columns to read, which spares Parquet files the reading of the others.
            Default: all.
        config_name (str, optional): configuration of the dataset.
        revision (str, optional): branch, tag or commit on the Hub.
        token (str or bool, optional): access token for the Hub. Default: the one that is logged in.
        cache_dir (str, optional): where downloads go. Default: the Hugging Face cache.
        streaming (bool): read while training instead of downloading first. Default: True.

    Returns:
        IterableDataset: the rows.

    Raises:
        ValueError: if the split does not exist, a column is missing, or the dataset cannot be read without FFmpeg.
    """
    folder = _metadata_folder(name, split)
    if folder is not None:
        path = str(folder / METADATA)
        # As strings: guessed types would make a class NA a missing label, and fold 1 a fold 1.0.
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a byte order mark
            names = next(csv.reader(file), [])
            # pandas numbers the columns without a name, as those of an index.
            text = Features({name or f"Unnamed: {index}": Value("string") for index, name in enumerate(names)})
        rows = load_dataset(
            "csv",
            data_files=path,
            split="train",
            streaming=streaming,
            cache_dir=cache_dir,
            features=text,
            keep_default_na=False,
        )
        rows = rows if streaming else rows.to_iterable_dataset()
        check_columns(rows, ["file_name"], path)
        rows = rows.map(_local_audio, fn_kwargs={"folder": str(folder), "audio_column": audio_column})
    else:
        options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        builder = patiently(load_dataset_builder, name, config_name, **options)
        if builder.__module__.endswith("audiofolder"):
            raise ValueError(
                f"'{name}' is a folder of audio files, which datasets reads with torchcodec and a system FFmpeg only. "
                f"Give it as a local folder with a {METADATA} (columns file_name and label) in it, or as Parquet: on "
                "the Hub, revision 'refs/convert/parquet' may have that."
            )
        if builder.info.splits and split not in builder.info.splits:
            raise ValueError(f"'{name}' has no split '{split}', only: {', '.join(builder.info.splits)}.")
        if columns is not None and hasattr(builder.config, "columns"):
            whole = patiently(load_dataset, name, config_name, split=split, streaming=True, **options)
            check_columns(whole, columns, name)
            options["columns"] = list(columns)
        rows = patiently(load_dataset, name, config_name, split=split, streaming=streaming, **options)
        rows = rows if streaming else rows.to_iterable_dataset()
        if isinstance((rows.features or {}).get(audio_column), Audio):
            rows = rows.cast_column(audio_column, Audio(decode=False))
    if columns is not None:
        check_columns(rows, columns, name)
        rows = rows.select_columns(list(columns))
    return rows


def select_rows(rows: IterableDataset, selection: str, name: str = "the dataset") -> IterableDataset:
    """Rows in which a column has one of some values, as for cross-validation by folds.

    Args:
        rows (IterableDataset): all rows.
        selection (str): column and values, such as `"fold=1,2,3"`.
        name (str): name of the dataset, for errors.

    Returns:
        IterableDataset: the rows whose value, as a string or by the name of its class, is among them.

    Raises:
        ValueError: if the selection has another form or names a column that does not exist.
    """
    column, values = parse_selection(selection)
    check_columns(rows, [column], name)
    names = class_names(rows, column)
    return rows.filter(_has_value, input_columns=[column], fn_kwargs={"values": values, "names": names})


def parse_selection(selection: str) -> tuple[str, tuple[str, ...]]:
    """Split `"fold=1,2,3"` into the column and its values.

    Args:
        selection (str): column and values.

    Returns:
        tuple[str, tuple[str, ...]]: the column and the values, as strings.

    Raises:
        ValueError: if the selection has another form.
    """
    column, equals, values = selection.partition("=")
    chosen = tuple(value.strip() for value in values.split(",") if value.strip())
    if not (column.strip() and equals and chosen):
        raise ValueError(f"A selection of rows has the form column=value,value, such as fold=1,2,3; got '{selection}'.")
    return column.strip(), chosen


def check_apart(parts: Mapping[str, tuple[str, Optional[str]]]) -> None:
    """Check that no row is used for two things, such as training and evaluation.

    Args:
        parts (mapping): split and selection of rows, if there is one, of each use by its name.

    Raises:
        ValueError: if two uses read one split and do not select different rows of it.
    """
    for one, other in itertools.combinations(parts, 2):
        (split, rows), (other_split, other_rows) = parts[one], parts[other]
        column, values = parse_selection(rows) if rows else (None, ())
        other_column, other_values = parse_selection(other_rows) if other_rows else (None, ())
        if split != other_split or (None not in (column, other_column) and column != other_column):
            continue
        if None in (column, other_column) or set(values) & set(other_values):
            raise ValueError(
                f"{one.capitalize()} and {other} both read the split '{split}' and share rows: choose different ones "
                f"with --train_rows, --eval_rows and --test_rows (now {rows} and {other_rows})."
            )


def class_names(rows: IterableDataset, label_column: str) -> Optional[list[str]]:
    """Names of the classes that the dataset declares for its labels.

    Args:
        rows (IterableDataset): the rows.
        label_column (str): name of the column with the labels.

    Returns:
        list[str], optional: the names, in order; None if the labels are plain values.
    """
    feature = (rows.features or {}).get(label_column)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def survey_rows(rows: IterableDataset, label_column: str, name: str = "the dataset") -> Survey:
    """Count the rows and collect their labels in one pass, without reading audio.

    Args:
        rows (IterableDataset): the rows, best without their audio.
        label_column (str): name of the column with the labels.
        name (str): name of the dataset, for the progress bar and errors.

    Returns:
        Survey: the number of rows, the sorted names of the labels that occur, and the rows of each shard.

    Raises:
        ValueError: if the column is missing or there are no rows.
    """
    check_columns(rows, [label_column], name)
    names = class_names(rows, label_column)
    labels = set()
    rows_per_shard = []
    with tqdm(desc=f"Reading labels of {name}", unit=" rows", leave=False) as progress:
        for index in range(rows.num_shards):
            before = progress.n
            for row in rows.shard(rows.num_shards, index).select_columns([label_column]):
                labels.add(label_name(row[label_column], names, name))
                progress.update()
            rows_per_shard.append(progress.n - before)
    if not labels:
        raise ValueError(f"No rows are left of {name}: check the split and the selection of rows.")
    return Survey(sum(rows_per_shard), tuple(sorted(labels)), tuple(rows_per_shard))


def survey_metadata(rows: IterableDataset, label_column: str) -> Optional[Survey]:
    """What a dataset says of itself, without reading a row.

    Args:
        rows (IterableDataset): a whole split.
        label_column (str): name of the column with the labels.

    Returns:
        Survey, optional: the number of rows and the names of the classes; None if the dataset does not say both.
    """
    names = class_names(rows, label_column)
    split = (rows.info.splits or {}).get(str(rows.split))
    return Survey(split.num_examples, tuple(names)) if names and split and split.num_examples else None


def reads_single_columns(name: str, config_name: Optional[str] = None, **hub: Any) -> bool:
    """Whether one column of a dataset can be read without the others, as in Parquet files, so that labels are cheap.

    Args:
        name (str): id on the Hub or local folder.
        config_name (str, optional): configuration of the dataset.
        hub: `revision`, `token` and `cache_dir`, as for `load_rows`.

    Returns:
        bool: whether it can.
    """
    root = Path(name)
    if (root / METADATA).is_file() or (root.is_dir() and any(root.glob(f"*/{METADATA}"))):
        return True
    return hasattr(patiently(load_dataset_builder, name, config_name, **hub).config, "columns")


# --- audio --------------------------------------------------------------------------------------------------------


def decode_audio(
    audio: Union[str, os.PathLike, bytes, dict[str, Any]], sampling_rate: int, max_seconds: Optional[float] = None
) -> np.ndarray:
    """Decode one audio file to mono at a sampling rate.

    Args:
        audio (str, PathLike, bytes or dict): path or URL, content, or an undecoded row of datasets, which is a dict
            with `path` and `bytes`.
        sampling_rate (int): in Hz.
        max_seconds (float, optional): how much is read from the start of the clip; the memory that it takes, for files
            on disk, depends on that alone. Default: all.

    Returns:
        np.ndarray: `(samples,)` float32, the mean of all channels.

    Raises:
        AudioError: if the file is missing, unreadable, truncated or empty, or has samples that are not finite.
        ConnectionError: if a URL cannot be read, after several tries.
        ImportError: if soundfile or soxr is not installed.
    """
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ImportError("Decoding audio needs soundfile and soxr: pip install 'peft-softmoa[audio]'") from error
    name, content = _name_and_content(audio)
    try:
        if content is None and "://" in name:
            # An outage is an error of its own: else all clips would be skipped as if they were bad.
            content = read_url(name)
        elif content is None and max_seconds is None:
            content = Path(name).read_bytes()
        with (
            open(name, "rb") if content is None else io.BytesIO(content) as source,
            soundfile.SoundFile(source) as file,
        ):
            wanted = sys.maxsize if max_seconds is None else math.ceil(max_seconds * file.samplerate)
            # In blocks: a broken header may declare any length, and memory is not for it to claim.
            blocks = [file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)]
            while len(blocks[-1]) and sum(map(len, blocks)) < wanted:
                blocks.append(file.read(BLOCK_FRAMES, dtype="float32", always_2d=True))
            samples = np.concatenate(blocks)[:wanted]
            declared, log, source_rate = file.frames, file.extra_info, file.samplerate
        is_cut = len(samples) < min(declared, wanted)
        if len(samples) < wanted and not is_cut:  # the file is read to its end
            is_cut = _is_cut(Path(name).read_bytes() if content is None else content, log)
    except ConnectionError:
        raise
    except (OSError, ValueError, soundfile.LibsndfileError) as error:
        raise AudioError(name, f"unreadable ({getattr(error, 'error_string', error)})") from error
    if is_cut:
        raise AudioError(name, "truncated")
    if len(samples) == 0:
        raise AudioError(name, "no samples")
    if not np.isfinite(samples).all():
        raise AudioError(name, "samples that are not finite")
    return soxr.resample(samples.mean(axis=1), source_rate, sampling_rate)


class ExtractFeatures:
    """From a batch of undecoded rows to a batch of model inputs, without the rows whose audio cannot be used.

    Args:
        feature_extractor (SequenceFeatureExtractor): the model's feature extractor.
        label_names (Sequence[str]): the classes, in the order of the model's outputs.
        audio_column (str): name of the column with the audio. Default: `"audio"`.
        label_column (str, optional): name of the column with the labels; None if there are none. Default: `"label"`.
        class_names (Sequence[str], optional): names of the classes, if the labels are indices.
        max_length_seconds (float, optional): longer clips are cut to this length. Default: they are not.
        random_crop (bool): cut at a random place, for training, or else at the start. Default: False.
        on_bad_audio ("skip" or "raise"): what happens to audio that cannot be used. Default: `"skip"`, which counts
            it and names it in one warning at the end of the pass.
    """

    def __init__(
        self,
        feature_extractor: SequenceFeatureExtractor,
        label_names: Sequence[str],
        *,
        audio_column: str = "audio",
        label_column: Optional[str] = "label",
        class_names: Optional[Sequence[str]] = None,
        max_length_seconds: Optional[float] = None,
        random_crop: bool = False,
        on_bad_audio: Literal["skip", "raise"] = "skip",
    ) -> None:
        if max_length_seconds is not None and not max_length_seconds > 0:
            raise ValueError(f"`max_length_seconds` must be positive, got {max_length_seconds}.")
        if on_bad_audio not in ("skip", "raise"):
            raise ValueError(f"`on_bad_audio` must be 'skip' or 'raise', got '{on_bad_audio}'.")
        self.feature_extractor: Any = feature_extractor
        self.label_ids = {name: index for index, name in enumerate(label_names)}
        self.audio_column = audio_column
        self.label_column = label_column
        self.class_names = class_names
        self.max_length_seconds = max_length_seconds
        self.random_crop = random_crop
        self.on_bad_audio = on_bad_audio
        self.skipped: list[str] = []
        self._reported: set[str] = set()

    def __call__(self, rows: dict[str, list], generator: Optional[np.random.Generator] = None) -> dict[str, list]:
        """Decode and extract.

        Args:
            rows (dict[str, list]): a batch with the columns.
            generator (np.random.Generator, optional): draws the places of random cuts. Default: a fresh one.

        Returns:
            dict[str, list]: the model's inputs and, if there are any, `labels`.

        Raises:
            AudioError: for audio that cannot be used, if `on_bad_audio="raise"`.
            ValueError: for a label that is not among the classes.
        """
        generator = generator or np.random.default_rng()
        batch: dict[str, list] = {self.feature_extractor.model_input_names[0]: []}
        if self.label_column is not None:
            batch["labels"] = []
        for index, audio in enumerate(rows[self.audio_column]):
            if audio is not None and not isinstance(audio, (str, bytes, dict)):
                raise ValueError(
                    f"Column '{self.audio_column}' holds {type(audio).__name__}, but audio is a path, the content of a "
                    "file, or a dict with both."
                )
            name = _name_and_content(audio)[0]
            label = None
            if self.label_column is not None:
                label = label_name(rows[self.label_column][index], self.class_names, name)
                if label not in self.label_ids:
                    raise ValueError(f"{name}: label '{label}' is none of the classes {', '.join(self.label_ids)}.")
            try:
                inputs = self._extract(audio, name, generator)
            except AudioError as error:
                if self.on_bad_audio == "raise":
                    raise
                self.skipped.append(str(error))
                continue
            for key, features in inputs.items():
                batch.setdefault(key, []).append(features[0])
            if label is not None:
                batch["labels"].append(self.label_ids[label])
        return batch

    def _extract(self, audio: Any, name: str, generator: np.random.Generator) -> Any:
        rate = self.feature_extractor.sampling_rate
        waveform = decode_audio(audio, rate, None if self.random_crop else self.max_length_seconds)
        if self.max_length_seconds is not None:
            excess = len(waveform) - round(self.max_length_seconds * rate)
            if excess > 0:
                start = int(generator.integers(excess + 1)) if self.random_crop else 0
                waveform = waveform[start : start + len(waveform) - excess]
        try:
            return self.feature_extractor(waveform, sampling_rate=rate, return_tensors="np")
        except (ValueError, AssertionError) as error:  # torchaudio asserts a minimum length
            raise AudioError(name, f"no features from {len(waveform)} samples ({error})") from error

    def report(self, num_rows: Optional[int] = None) -> None:
        """Name in one warning the audio that this pass has skipped, unless an earlier one has named it all.

        Args:
            num_rows (int, optional): how many rows there are in all, if it is known.
        """
        if not self._reported.issuperset(self.skipped):
            count = f"{len(self.skipped)}{'' if num_rows is None else f' of {num_rows}'}"
            logger.warning(f"Skipped {count} audio files that cannot be used: {'; '.join(self.skipped)}")
        self._reported.update(self.skipped)


# --- helpers ------------------------------------------------------------------------------------------------------


def _metadata_folder(name: str, split: str) -> Optional[Path]:
    """The folder whose metadata.csv lists a split; None if the dataset is not of that kind."""
    root = Path(name)
    if (root / METADATA).is_file():
        if split != "train":
            raise ValueError(f"'{name}' has one {METADATA}, so its only split is 'train', not '{split}'.")
        return root
    splits = sorted(path.parent.name for path in root.glob(f"*/{METADATA}")) if root.is_dir() else []
    if splits and split not in splits:
        raise ValueError(f"'{name}' has no split '{split}', only: {', '.join(splits)}.")
    return root / split if splits else None


def _local_audio(row: dict[str, Any], folder: str, audio_column: str) -> dict[str, Any]:
    return {audio_column: {"path": os.path.join(folder, row["file_name"]), "bytes": None}}


def _has_value(value: Any, values: Sequence[str], names: Optional[Sequence[str]]) -> bool:
    return str(value) in values or (names is not None and 0 <= value < len(names) and names[value] in values)


def _name_and_content(audio: Union[str, os.PathLike, bytes, dict[str, Any], None]) -> tuple[str, Optional[bytes]]:
    """Name of a clip and its content; None if that has to be read from the place that the name gives."""
    if isinstance(audio, (str, os.PathLike)):
        return os.fspath(audio), None
    path, content = (audio.get("path"), audio.get("bytes")) if isinstance(audio, dict) else (None, audio)
    if path is None and content is None:
        content = b""
    return path or UNNAMED, content


def check_columns(rows: IterableDataset, columns: Sequence[str], name: str) -> None:
    # A stream that has been mapped does not know its columns before its first row; without rows there are none.
    present = list(rows.column_names or next(iter(rows), []))
    for column in columns if present else ():
        if column not in present:
            raise ValueError(f"{name} has no column '{column}'; its columns are: {', '.join(present)}.")


def label_name(value: Any, names: Optional[Sequence[str]], where: str) -> str:
    if names is None:
        if value in (None, ""):
            raise ValueError(f"{where}: a row has no label.")
        return str(value)
    if value is None or not 0 <= value < len(names):
        raise ValueError(f"{where}: label {value} is no index of the {len(names)} classes {', '.join(names)}.")
    return names[value]


def _is_cut(content: bytes, log: str) -> bool:
    """Whether the content of a file ends before its format says; libsndfile reads what is there and only logs it."""
    if content.startswith(b"OggS"):
        # The last page of an Ogg stream has the end-of-stream bit, and its length in a table of segments.
        page = content.rfind(b"OggS")
        segments = content[page + 27 : page + 27 + content[page + 26]] if len(content) > page + 26 else b""
        return not (segments and content[page + 5] & 4 and len(content) >= page + 27 + len(segments) + sum(segments))
    for declared, actual in re.findall(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", log):
        # Writers that stream do not know the length, and declare zero or about the largest number, signed or not.
        if int(actual) < int(declared) < 2**31 - 2**12:
            return True
    return False
