"""Rows of a dataset: choose some of them, name their labels, and count them."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from datasets import Audio, ClassLabel, IterableDataset
from tqdm.auto import tqdm

from .fingerprint import RowDigest

if TYPE_CHECKING:
    from .tasks import Task


class DatasetSummary(NamedTuple):
    """Size and labels of a dataset.

    Args:
        num_rows (int): number of rows.
        labels (tuple[str, ...]): names of the labels, in order.
        rows_per_shard (tuple[int, ...], optional): number of rows of each shard, if they were counted.
        counts (mapping, optional): number of rows that have a label, by its name, if they were counted.
    """

    num_rows: int
    labels: tuple[str, ...]
    rows_per_shard: Optional[tuple[int, ...]] = None
    counts: Optional[Mapping[str, int]] = None


def select_rows(
    rows: IterableDataset, selection: str, name: str = "the dataset", *, found: Optional[set[str]] = None
) -> IterableDataset:
    """Select the rows in which a column has one of some values, as for cross-validation by folds.

    Args:
        rows (IterableDataset): all rows.
        selection (str): column and values, such as `"fold=1,2,3"`.
        name (str): name of the dataset, for errors. Default: `"the dataset"`.
        found (set[str], optional): gets the values that rows have, while the rows are read. Default: none.

    Returns:
        IterableDataset: the rows whose value, as a string or as the name of its class, is one of the values.

    Raises:
        ValueError: if the selection has another form, or names a column that does not exist or what is none of its
            classes.
    """
    column, values = parse_selection(selection)
    check_columns(column_names(rows), [column], name)
    names = class_names(rows, column)
    if names is not None:
        check_selection(selection, {*names, *map(str, range(len(names)))}, name)
    arguments = {"values": values, "names": names, "found": found}
    return rows.filter(_has_value, input_columns=[column], fn_kwargs=arguments)


def check_selection(selection: str, present: Collection[str], name: str) -> None:
    """Check that each value of a selection is there: a part of `"label=cat, small"` may be a class of its own.

    Args:
        selection (str): column and values.
        present (Collection[str]): the values of the column.
        name (str): name of the dataset, for errors.

    Raises:
        ValueError: if a value is not there.
    """
    column, values = parse_selection(selection)
    missing = [value for value in values if value not in present]
    if missing:
        raise ValueError(
            f"{name} has no row with {column}={name_some(missing)}. A value with a comma in it stands in double "
            f'quotes, as in {column}="cat, small",dog.'
        )


def parse_selection(selection: str) -> tuple[str, tuple[str, ...]]:
    """Split `"fold=1,2,3"` into the column and its values; in double quotes, a value may have commas.

    Args:
        selection (str): column and values.

    Returns:
        tuple[str, tuple[str, ...]]: the column and the values, as strings.

    Raises:
        ValueError: if the selection has another form.
    """
    column, equals, values = selection.partition("=")
    cells = next(csv.reader([values], skipinitialspace=True), [])
    selected = tuple(value.strip() for value in cells if value.strip())
    if not (column.strip() and equals and selected):
        raise ValueError(f"A selection of rows has the form column=value,value, such as fold=1,2,3; got '{selection}'.")
    return column.strip(), selected


def check_no_shared_rows(parts: Mapping[str, tuple[str, Optional[str]]]) -> None:
    """Check that no row has two uses, such as training and evaluation.

    Args:
        parts (mapping): the split and the selection of rows, if there is one, by the name of their use.

    Raises:
        ValueError: if two uses read the same split and do not select different rows.
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
                f"with `rows` (now {rows} and {other_rows})."
            )


def class_names(rows: IterableDataset, label_column: str) -> Optional[list[str]]:
    """Names of the classes that a dataset declares for a column.

    Args:
        rows (IterableDataset): the rows.
        label_column (str): name of the column with the labels.

    Returns:
        list[str], optional: the names, in order; None if the labels are plain values.
    """
    feature = (rows.features or {}).get(label_column)
    feature = getattr(feature, "feature", feature)  # of a list
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def label_name(value: Any, names: Optional[Sequence[str]], where: str) -> str:
    """Name of a label.

    Args:
        value: the value in the label column.
        names (Sequence[str], optional): names of the classes, if the values are indices.
        where (str): what has the label, for errors.

    Returns:
        str: the name.

    Raises:
        ValueError: if there is no label, it is not the index of a class, or it is of a type that names no class.
    """
    value = value.strip() if isinstance(value, str) else value
    if names is None:
        if value in (None, "") or value != value:
            raise ValueError(f"{where}: a row has no label.")
        if not isinstance(value, (str, int)):
            raise ValueError(
                f"{where}: label {value} is a {type(value).__name__}, but a class is a string or an integer. Give "
                "another `label_column`; or, where rows have several labels or numbers, another `problem_type`."
            )
        return str(value)
    if value is None or not 0 <= value < len(names):
        raise ValueError(f"{where}: label {value} is no index of the {len(names)} classes {name_some(names)}.")
    name: str = names[value]
    return name


def summarize_rows(
    rows: IterableDataset,
    label_columns: Sequence[str],
    task: Task,
    name: str = "the dataset",
    *,
    digest: Optional[RowDigest] = None,
    audio_column: Optional[str] = None,
) -> DatasetSummary:
    """Count the rows and collect their labels in one pass, without reading audio.

    Args:
        rows (IterableDataset): the rows, preferably without their audio.
        label_columns (sequence of str): names of the columns with the labels.
        task (Task): says which labels they are.
        name (str): name of the dataset, for the progress bar and errors. Default: `"the dataset"`.
        digest (RowDigest, optional): gets every row. Default: none.
        audio_column (str, optional): column with the names of the files that the digest looks at. Default: none.

    Returns:
        DatasetSummary: the number of rows, the sorted names of the labels that occur, and the rows of each shard.

    Raises:
        ValueError: if the column is missing or there are no rows.
    """
    columns = [*label_columns, audio_column] if audio_column else list(label_columns)
    check_columns(column_names(rows), columns, name)
    counts: Counter[str] = Counter()
    rows_per_shard = []
    with tqdm(desc=f"Reading labels of {name}", unit=" rows", leave=False, disable=None) as progress:
        for index in range(rows.num_shards):
            count = 0  # a bar that is not shown counts nothing
            for row in rows.shard(rows.num_shards, index).select_columns(columns):
                target = task.parse({column: row[column] for column in label_columns}, name)
                counts.update(set(task.labels_in(target)))
                if digest is not None:
                    digest.add(target, row[audio_column] if audio_column else None)
                count += 1
                progress.update()
            rows_per_shard.append(count)
    if not sum(rows_per_shard):
        raise ValueError(f"No rows are left of {name}: check the split and the selection of rows.")
    return DatasetSummary(sum(rows_per_shard), tuple(sorted(counts)), tuple(rows_per_shard), counts)


def column_names(rows: IterableDataset) -> list[str]:
    """Names of the columns. A mapped stream knows them only from its first row; without rows it has none.

    Args:
        rows (IterableDataset): the rows.

    Returns:
        list[str]: the names.
    """
    return list(rows.column_names or next(iter(rows), []))


def check_columns(present: Collection[str], columns: Sequence[str], name: str) -> None:
    """Check that a dataset has some columns.

    Args:
        present (Collection[str]): the columns of the dataset; empty if it has no rows, and then all is well.
        columns (Sequence[str]): the columns that it should have.
        name (str): name of the dataset, for errors.

    Raises:
        ValueError: if a column is missing.
    """
    for column in columns if present else ():
        if column not in present:
            raise ValueError(f"{name} has no column '{column}'; its columns are: {name_some(present, 50)}.")


def name_some(names: Iterable[str], most: int = 10, separator: str = ", ") -> str:
    """Name the first of many things: a message with thousands is not read.

    Args:
        names (iterable of str): the names.
        most (int): how many are named. Default: 10.
        separator (str): what stands between two names. Default: `", "`.

    Returns:
        str: the first names, and the number of the others.
    """
    names = list(names)
    return separator.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def undecoded(rows: IterableDataset) -> IterableDataset:
    """Rows whose audio stays as it is in the dataset: the decoder of `datasets` needs a system FFmpeg.

    Args:
        rows (IterableDataset): the rows.

    Returns:
        IterableDataset: the rows.
    """
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, Audio):
            rows = rows.cast_column(column, Audio(decode=False))
    return rows


def _has_value(value: Any, values: Sequence[str], names: Optional[Sequence[str]], found: Optional[set[str]]) -> bool:
    forms = {str(value).strip()}
    if names is not None and value is not None and 0 <= value < len(names):
        forms.add(names[value])
    if isinstance(value, float) and value.is_integer():  # pandas makes floats of integers beside a missing one
        forms.add(str(int(value)))
    chosen = forms.intersection(values)
    if found is not None:
        found |= chosen
    return bool(chosen)
