"""Where the rows of a dataset come from: a split is looked up once, and then says what it has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

from datasets import DatasetBuilder, IterableDataset, load_dataset_builder

from .fingerprint import fingerprint_files
from .folders import describe_folder
from .layouts import Clips, Layout, Splits, describe_layouts, find_layout
from .network import retry
from .options import DataOptions
from .places import Place, find_place, name_tables
from .rows import DatasetSummary, check_columns, class_names, column_names, name_some, undecoded


@dataclass(frozen=True)
class Source:
    """One split of a dataset, from `open_source`.

    Args:
        name (str): id on the Hub or local folder.
        split (str): name of the split.
        rows (IterableDataset): all rows with all columns, as the files have them; the audio is not decoded.
        columns (tuple[str, ...]): names of the columns; empty if there are no rows.
        classes (mapping): names of the classes that the dataset declares, by the column of the labels.
        reads_single_columns (bool): whether a column can be read without the others, as in Parquet files, so that it is
            cheap to read the labels.
        num_rows (int, optional): number of rows, if the dataset states it.
        files (str, optional): fingerprint of the files that hold the rows with their audio. Default: none; then each
            row names a file of its own.
        place (Place, optional): where the files are that the rows name. Default: the rows name them in full.
        tables (tuple[str, ...]): the files that `datasets` reads, for errors. Default: none.
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
    place: Optional[Place] = None
    tables: tuple[str, ...] = ()
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
            return self.place.locate(self.rows) if self.place else self.rows
        check_columns(self.columns, columns, self.name)
        columns = list(dict.fromkeys(columns))
        rows = self.rows
        if self.builder is not None:
            builder = copy.copy(self.builder)
            builder.config, builder.info = replace(builder.config, columns=columns), builder.info.copy()
            rows = undecoded(retry(builder.as_streaming_dataset, split=self.split))
        rows = rows.select_columns(columns)
        return self.place.locate(rows) if self.place and self.place.audio_column in columns else rows

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

    A local folder may have one of the layouts of `LAYOUTS`: a table such as `metadata.csv` with a column `file_name`,
    folders whose names are classes, or how some well-known datasets are published. `datasets` reads everything else: an
    id on the Hub, or a local folder with Parquet, CSV or JSON files.

    A path in a table begins at the folder of the table. Local tables may name any file and URL, those on the Hub only
    files of their own dataset and web addresses.

    Args:
        name (str): id on the Hub or local folder.
        split (str): name of the split.
        options (DataOptions, optional): which audio column, configuration and revision, and whether it is streamed.
            Default: the defaults of `DataOptions`.

    Returns:
        Source: the split.

    Raises:
        ValueError: if the split does not exist, or the dataset has no layout that can be read.
    """
    options = options or DataOptions()
    root = Path(name)
    layout = find_layout(root) if root.is_dir() else None
    if layout is not None:
        return _open_layout(name, split, *layout, options)
    try:
        builder = retry(
            load_dataset_builder,
            name,
            options.config_name,
            revision=options.revision,
            token=options.token,
            cache_dir=options.cache_dir,
        )
    except FileNotFoundError as error:
        if not root.is_dir():
            raise
        raise ValueError(_no_layout(name)) from error
    kind = builder.__module__.rpartition(".")[2]
    if root.is_dir() and kind in ("audiofolder", "text"):
        raise ValueError(_no_layout(name))
    if kind == "audiofolder":
        raise ValueError(
            f"'{name}' is a folder of audio files, which datasets reads with torchcodec and a system FFmpeg only. "
            "Download it and give the local folder, or give it as Parquet: revision 'refs/convert/parquet' may have "
            "that."
        )
    if builder.info.splits and split not in builder.info.splits:
        raise ValueError(f"'{name}' has no split '{split}', only: {', '.join(builder.info.splits)}.")
    tables = tuple((builder.config.data_files or {}).get(split) or ())
    with name_tables(tables):
        rows = undecoded(_all_rows(builder, split, options.streaming))
        columns = tuple(column_names(rows))
    declared = (rows.info.splits or {}).get(split)
    reads_single_columns = hasattr(builder.config, "columns")
    return Source(
        name,
        split,
        rows,
        columns=columns,
        classes={column: names for column in rows.features or () if (names := class_names(rows, column)) is not None},
        reads_single_columns=reads_single_columns,
        num_rows=declared.num_examples if declared else None,
        files=fingerprint_files(builder, split),
        place=find_place(name, options.audio_column, tables),
        tables=tables,
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


def _open_layout(name: str, split: str, layout: Layout, splits: Splits, options: DataOptions) -> Source:
    if split not in splits:
        raise ValueError(
            f"'{name}' has no split '{split}', only: {name_some(splits)}. It is read by its layout '{layout.name}', "
            f"which has {layout.has}; there is: {describe_folder(Path(name))}."
        )
    clips = partial(_clip_rows, splits[split], options.audio_column)
    first = next(clips(), None)
    if first is None:
        raise ValueError(f"'{name}' has no clips in the split '{split}', by its layout '{layout.name}'.")
    return Source(
        name,
        split,
        IterableDataset.from_generator(clips),
        columns=tuple(first),
        classes={},
        reads_single_columns=True,
    )


def _clip_rows(clips: Callable[[], Clips], audio_column: str) -> Iterator[dict[str, Any]]:
    for file, row in clips():
        yield {**row, audio_column: {"path": file, "bytes": None}}


def _no_layout(name: str) -> str:
    return (
        f"'{name}' is a folder of no layout that is read. Looked for: {describe_layouts()}; Parquet, CSV or JSON files."
        f" Found: {describe_folder(Path(name))}. Put a metadata.csv with the columns file_name and label into it."
    )


def _all_rows(builder: DatasetBuilder, split: str, streaming: bool) -> IterableDataset:
    if streaming:
        return retry(builder.as_streaming_dataset, split=split)
    retry(builder.download_and_prepare)
    return builder.as_dataset(split=split).to_iterable_dataset()
