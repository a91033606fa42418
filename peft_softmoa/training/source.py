"""Where the rows of a dataset come from: a split is looked up once, and then says what it has."""

from __future__ import annotations

import copy
import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from datasets import Audio, DatasetBuilder, Features, IterableDataset, Value, load_dataset_builder

from .fingerprint import fingerprint_files
from .network import retry
from .options import DataOptions
from .rows import DatasetSummary, check_columns, class_names, column_names

METADATA = "metadata.csv"


@dataclass(frozen=True)
class Source:
    """One split of a dataset, from `open_source`.

    Args:
        name (str): id on the Hub or local folder.
        split (str): name of the split.
        rows (IterableDataset): all rows with all columns; the audio is not decoded.
        columns (tuple[str, ...]): names of the columns; empty if there are no rows.
        classes (mapping): names of the classes that the dataset declares, by the column of the labels.
        reads_single_columns (bool): whether a column can be read without the others, as in Parquet files, so that it is
            cheap to read the labels.
        num_rows (int, optional): number of rows, if the dataset states it.
        files (str, optional): fingerprint of the files that hold the rows with their audio. Default: none; then each
            row names a file of its own.
        builder (DatasetBuilder, optional): reads single columns of a remote or Parquet dataset. Default: none.
    """

    name: str
    split: str
    rows: IterableDataset
    columns: tuple[str, ...]
    classes: Mapping[str, list[str]]
    reads_single_columns: bool
    num_rows: Optional[int] = None
    files: Optional[str] = None
    builder: Optional[DatasetBuilder] = field(default=None, repr=False)

    def read(self, columns: Optional[Sequence[str]] = None) -> IterableDataset:
        """Rows with some of the columns.

        Args:
            columns (Sequence[str], optional): the columns; Parquet files read no others. Default: all.

        Returns:
            IterableDataset: the rows; the audio is not decoded.

        Raises:
            ValueError: if a column is missing.
        """
        if columns is None:
            return self.rows
        check_columns(self.columns, columns, self.name)
        columns = list(dict.fromkeys(columns))
        rows = self.rows
        if self.builder is not None:
            builder = copy.copy(self.builder)
            builder.config, builder.info = replace(builder.config, columns=columns), builder.info.copy()
            rows = _undecoded(retry(builder.as_streaming_dataset, split=self.split))
        return rows.select_columns(columns)

    def declared_summary(self, label_column: str) -> Optional[DatasetSummary]:
        """Size and labels as the dataset declares them; no row is read.

        Args:
            label_column (str): name of the column with the labels.

        Returns:
            DatasetSummary, optional: the number of rows and the names of the classes; None if one is not declared.
        """
        names = self.classes.get(label_column)
        return DatasetSummary(self.num_rows, tuple(names)) if names and self.num_rows else None


def open_source(name: str, split: str, options: Optional[DataOptions] = None) -> Source:
    """Look up a split of a dataset.

    A local folder with a `metadata.csv`, whose column `file_name` holds paths relative to the folder, is one split,
    `train`. A folder with one such folder for each split has these splits. `datasets` reads everything else: an id on
    the Hub, or a local folder with Parquet files.

    Args:
        name (str): id on the Hub or local folder.
        split (str): name of the split.
        options (DataOptions, optional): which audio column, configuration and revision, and whether it is streamed.
            Default: the defaults of `DataOptions`.

    Returns:
        Source: the split.

    Raises:
        ValueError: if the split does not exist, or the dataset cannot be read without FFmpeg.
    """
    options = options or DataOptions()
    folder = _metadata_folder(name, split)
    if folder is not None:
        return _open_table(name, split, folder, options)
    builder = retry(
        load_dataset_builder,
        name,
        options.config_name,
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
    )
    if builder.__module__.endswith("audiofolder"):
        raise ValueError(
            f"'{name}' is a folder of audio files, which datasets reads with torchcodec and a system FFmpeg only. "
            f"Give it as a local folder with a {METADATA} (columns file_name and label) in it, or as Parquet: on the "
            "Hub, revision 'refs/convert/parquet' may have that."
        )
    if builder.info.splits and split not in builder.info.splits:
        raise ValueError(f"'{name}' has no split '{split}', only: {', '.join(builder.info.splits)}.")
    rows = _undecoded(_all_rows(builder, split, options.streaming))
    declared = (rows.info.splits or {}).get(split)
    reads_single_columns = hasattr(builder.config, "columns")
    return Source(
        name,
        split,
        rows,
        columns=tuple(column_names(rows)),
        classes={column: names for column in rows.features or () if (names := class_names(rows, column)) is not None},
        reads_single_columns=reads_single_columns,
        num_rows=declared.num_examples if declared else None,
        files=fingerprint_files(builder, split),
        builder=builder if reads_single_columns and options.streaming else None,
    )


def load_rows(
    name: str, split: str, options: Optional[DataOptions] = None, *, columns: Optional[Sequence[str]] = None
) -> IterableDataset:
    """Rows of one split; the audio is not decoded.

    Args:
        name (str): id on the Hub or local folder, as for `open_source`.
        split (str): name of the split.
        options (DataOptions, optional): as for `open_source`.
        columns (Sequence[str], optional): the columns; Parquet files read no others. Default: all.

    Returns:
        IterableDataset: the rows.

    Raises:
        ValueError: if the split does not exist, a column is missing, or the dataset cannot be read without FFmpeg.
    """
    return open_source(name, split, options).read(columns)


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


def _open_table(name: str, split: str, folder: Path, options: DataOptions) -> Source:
    path = str(folder / METADATA)
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a byte order mark
        # pandas numbers the columns without a name, as those of an index.
        columns = [column or f"Unnamed: {index}" for index, column in enumerate(next(csv.reader(file), []))]
    check_columns(columns, ["file_name"], path)
    # As strings: guessed types would make a class NA a missing label, and fold 1 a fold 1.0.
    text = Features({column: Value("string") for column in columns})
    builder = load_dataset_builder(
        "csv", data_files=path, cache_dir=options.cache_dir, features=text, keep_default_na=False
    )
    rows = _all_rows(builder, "train", options.streaming)
    rows = rows.map(_local_audio, fn_kwargs={"folder": str(folder), "audio_column": options.audio_column})
    columns = [*dict.fromkeys([*columns, options.audio_column])]
    return Source(name, split, rows, tuple(columns), classes={}, reads_single_columns=True)


def _all_rows(builder: DatasetBuilder, split: str, streaming: bool) -> IterableDataset:
    if streaming:
        return retry(builder.as_streaming_dataset, split=split)
    retry(builder.download_and_prepare)
    return builder.as_dataset(split=split).to_iterable_dataset()


def _undecoded(rows: IterableDataset) -> IterableDataset:
    """Rows whose audio stays as it is in the dataset: the decoder of `datasets` needs a system FFmpeg."""
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, Audio):
            rows = rows.cast_column(column, Audio(decode=False))
    return rows


def _local_audio(row: dict[str, Any], folder: str, audio_column: str) -> dict[str, Any]:
    return {audio_column: {"path": os.path.join(folder, row["file_name"]), "bytes": None}}
