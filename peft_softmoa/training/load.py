"""A split of a dataset as a stream of model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

from datasets import IterableDataset
from transformers import SequenceFeatureExtractor

from .features import ExtractFeatures
from .fingerprint import RowDigest
from .options import DataOptions
from .places import name_tables
from .rows import (
    DatasetSummary,
    check_selection,
    label_name,
    name_some,
    parse_selection,
    select_rows,
    summarize_rows,
)
from .source import Source, open_source
from .streams import AudioStream


def load_stream(
    dataset: Union[str, Source],
    split: str,
    feature_extractor: SequenceFeatureExtractor,
    options: Optional[DataOptions] = None,
    *,
    rows: Optional[str] = None,
    label_names: Optional[Sequence[str]] = None,
    training: bool = True,
    needs_length: bool = True,
) -> AudioStream:
    """Load a split of a dataset as a stream of model inputs.

    The rows and labels are counted first where that does not read the audio. Where it does, the stream takes what the
    dataset declares.

        stream = load_stream("ashraq/esc50", "train", feature_extractor, DataOptions(label_column="category"))

    Args:
        dataset (str or Source): id on the Hub or local folder, as for `open_source`, or what that has opened.
        split (str): name of the split.
        feature_extractor (SequenceFeatureExtractor): the model's feature extractor.
        options (DataOptions, optional): how the dataset is read. With `label_column=None` no labels are read, and the
            rows are not counted. Default: the defaults of `DataOptions`.
        rows (str, optional): which rows, such as `"fold=1,2,3"`. Default: all.
        label_names (Sequence[str], optional): the classes, in the order of the model's outputs. Default: the classes
            that the dataset declares or, if it declares none, the sorted labels that occur; if `rows` selects labels,
            only these. `stream.label_names` has them.
        training (bool): shuffle, and cut long clips at random places. Default: True.
        needs_length (bool): whether it is an error if the rows cannot be counted without their audio. Default: True.

    Returns:
        AudioStream: the stream.

    Raises:
        ValueError: if there is no such split, column or row, a label is none of the classes, or the rows cannot be
            counted.
    """
    source = dataset if isinstance(dataset, Source) else open_source(dataset, split, options)
    options = options or DataOptions()
    where = f"{source.name} ({source.split}{f', {rows}' if rows else ''})"
    column, selected = parse_selection(rows) if rows else (None, ())
    names: Optional[list[str]] = None
    summary: Optional[DatasetSummary] = None
    digest = RowDigest(names_files=source.files is None)
    if options.label_column is not None:
        names = source.classes.get(options.label_column)
        if names is None or source.reads_single_columns:
            audio_column = options.audio_column if digest.names_files else None
            found: set[str] = set()
            labels = _labelled_rows(
                source, options.label_column, rows, where, *filter(None, [audio_column]), found=found
            )
            with name_tables(source.tables):
                summary = summarize_rows(labels, options.label_column, where, digest=digest, audio_column=audio_column)
            if rows:
                check_selection(rows, found, f"{source.name} ({source.split})")
        elif not rows:
            summary = source.declared_summary(options.label_column)
    if summary is None and needs_length:
        raise ValueError(
            f"{where} does not say how many rows it has, and counting them would read all of its audio: train a "
            "number of steps instead of epochs, with `needs_length=False`."
        )
    if label_names is None:
        label_names = names or (summary.labels if summary else ())
        if names and column == options.label_column:
            label_names = [name for index, name in enumerate(names) if {name, str(index)} & set(selected)]
    unknown = sorted(set(summary.labels) - set(label_names)) if summary else []
    if unknown:
        raise ValueError(
            f"{where} has labels that are none of the classes {name_some(label_names)}: {name_some(unknown)}."
        )
    stream = AudioStream(
        _labelled_rows(source, options.label_column, rows, where, options.audio_column),
        ExtractFeatures(feature_extractor, label_names, options, class_names=names, random_crop=training),
        summary,
        shuffle_buffer=options.shuffle_buffer if training else 0,
        seed=options.seed,
        name=source.name,
    )
    stream.fingerprint = digest.fingerprint(source.files)
    return stream


def _labelled_rows(
    source: Source,
    label_column: Optional[str],
    rows: Optional[str],
    where: str,
    *more: str,
    found: Optional[set[str]] = None,
) -> IterableDataset:
    """The selected rows with their label and some more columns; several label columns are joined to one."""
    label_columns = label_column.split(",") if label_column else []
    selection_columns = [parse_selection(rows)[0]] if rows else []
    labelled = source.read([*more, *label_columns, *selection_columns])
    if rows:
        labelled = select_rows(labelled, rows, source.name, found=found)
    if len(label_columns) < 2:
        return labelled
    names_of = {column: source.classes.get(column) for column in label_columns}
    return labelled.map(_join_labels, fn_kwargs={"names_of": names_of, "name": label_column, "where": where})


def _join_labels(
    row: dict[str, Any], names_of: Mapping[str, Optional[list[str]]], name: str, where: str
) -> dict[str, str]:
    return {name: " ".join(label_name(row[column], names, where) for column, names in names_of.items())}
