"""A split of a dataset as a stream of model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Optional, Union

from datasets import IterableDataset
from transformers import SequenceFeatureExtractor

from .features import ExtractFeatures
from .fingerprint import RowDigest
from .options import DataOptions
from .places import name_tables
from .rows import DatasetSummary, check_selection, parse_selection, select_rows, summarize_rows
from .source import Source, open_source
from .streams import AudioStream
from .tasks import SingleLabel, Task


def load_stream(
    dataset: Union[str, Source],
    split: str,
    feature_extractor: SequenceFeatureExtractor,
    options: Optional[DataOptions] = None,
    *,
    task: Optional[Task] = None,
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
        task (Task, optional): what the labels are; that of another stream, `stream.task`, brings its classes with it.
            Default: one label a clip.
        rows (str, optional): which rows, such as `"fold=1,2,3"`. Default: all.
        label_names (Sequence[str], optional): the classes, in the order of the model's outputs. Default: the classes
            of the task or, if it has none, those that the dataset declares or, if it declares none, the sorted labels
            that occur; if `rows` selects labels, only these. `stream.label_names` has them.
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
    columns = options.label_columns
    names: Optional[list[str]] = None
    summary: Optional[DatasetSummary] = None
    digest = RowDigest(names_files=source.files is None)
    if not columns:
        task = None
    else:
        task = replace(task or SingleLabel(), declared={each: source.classes.get(each) for each in columns})
        names = source.classes.get(columns[0]) if len(columns) == 1 and task.takes_declared else None
        if names is None or source.reads_single_columns:
            audio_column = options.audio_column if digest.names_files else None
            found: set[str] = set()
            labels = _selected_rows(source, rows, *filter(None, [audio_column]), *columns, found=found)
            with name_tables(source.tables):
                summary = summarize_rows(labels, columns, task, where, digest=digest, audio_column=audio_column)
            if rows:
                check_selection(rows, found, f"{source.name} ({source.split})")
        elif not rows:
            summary = source.declared_summary(columns[0])
    if summary is None and needs_length:
        raise ValueError(
            f"{where} does not say how many rows it has, and counting them would read all of its audio: train a "
            "number of steps instead of epochs, with `needs_length=False`."
        )
    if task is not None:
        if names and column in columns:
            names = [name for index, name in enumerate(names) if {name, str(index)} & set(selected)]
        task = task.with_labels(label_names or task.label_names or names, summary)
        task.check_known(summary.labels if summary else (), where)
    stream = AudioStream(
        _selected_rows(source, rows, options.audio_column, *columns),
        ExtractFeatures(feature_extractor, task, options, random_crop=training),
        summary,
        shuffle_buffer=options.shuffle_buffer if training else 0,
        seed=options.seed,
        name=source.name,
    )
    stream.fingerprint = digest.fingerprint(source.files)
    return stream


def _selected_rows(
    source: Source, rows: Optional[str], *columns: str, found: Optional[set[str]] = None
) -> IterableDataset:
    """The selected rows with some columns."""
    selection_columns = [parse_selection(rows)[0]] if rows else []
    read = source.read([*columns, *selection_columns])
    return select_rows(read, rows, source.name, found=found) if rows else read
