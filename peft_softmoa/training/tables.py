"""Tables as people keep them: CSV with commas, semicolons or tabs, JSON Lines and Parquet."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import ClassLabel, load_dataset_builder

from .rows import check_columns, undecoded

DELIMITERS = ",;\t"
BATCH = 1000  # rows of a Parquet file that are read at a time


def read_table(path: Path, file_column: str, has_quotes: bool = True) -> Iterator[dict[str, Any]]:
    """Read a table row by row.

    Cells of text lose the spaces around them, which would make two classes of one.

    Args:
        path (Path): the table; its suffix says what it is.
        file_column (str): the column with the names of the audio files, by which the delimiter is recognised.
        has_quotes (bool): whether a cell of a CSV file may stand in double quotes, which are no part of it then.
            Default: True.

    Yields:
        dict[str, Any]: each row; of CSV files all cells are strings.

    Raises:
        ValueError: if the table is not in UTF-8, damaged or empty, or lacks the column; the message names the file.
    """
    rows = _read(path, file_column, has_quotes)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} has no rows.")
    check_columns(list(first), [file_column], str(path))
    for row in itertools.chain([first], rows):
        yield {column: value.strip() if isinstance(value, str) else value for column, value in row.items()}


def has_column(path: Path, column: str) -> bool:
    """Whether a table has a column.

    Args:
        path (Path): the table.
        column (str): the column.

    Returns:
        bool: whether its first row has it.

    Raises:
        ValueError: as for `read_table`.
    """
    return column in next(_read(path, column), ())


def _read(path: Path, file_column: str, has_quotes: bool = True) -> Iterator[dict[str, Any]]:
    read = {".jsonl": _read_json_lines, ".json": _read_json_lines, ".parquet": _read_parquet}.get(path.suffix)
    try:
        yield from read(path) if read else _read_csv(path, file_column, has_quotes)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it as UTF-8.") from error


def _read_csv(path: Path, file_column: str, has_quotes: bool) -> Iterator[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a byte order mark
        header = file.readline()
        delimiter = next((each for each in DELIMITERS if file_column in _header(header, each)), ",")
        columns = _header(header, delimiter)
        if len(set(columns)) < len(columns):
            raise ValueError(f"{path} has two columns of one name: {', '.join(columns)}.")
        # Strictly: a quote that is never closed would take all rows after it into one cell.
        quotes: dict[str, Any] = {} if has_quotes else {"quoting": csv.QUOTE_NONE}
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True, **quotes)
        try:
            for cells in reader:
                if len(cells) > len(columns):
                    raise ValueError(
                        f"{path}, line {reader.line_num + 1} has {len(cells)} cells, more than the {len(columns)} "
                        f"columns {', '.join(columns)}: a cell with '{delimiter}' in it stands in double quotes."
                    )
                if cells:
                    yield dict(itertools.zip_longest(columns, cells, fillvalue=""))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num + 1}: {error}.") from error


def _header(line: str, delimiter: str) -> list[str]:
    cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    # pandas writes an index as a column without a name.
    return [cell.strip() or f"Unnamed: {index}" for index, cell in enumerate(cells)]


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    # Twice: a key may be in some rows only, and all rows have the same columns.
    columns = dict.fromkeys(key for row in _json_objects(path) for key in row)
    for row in _json_objects(path):
        yield {column: row.get(column) for column in columns}


def _json_objects(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number} is no JSON: {error}.") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number} is no JSON object but {type(row).__name__}.")
                yield row


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    rows = load_dataset_builder("parquet", data_files=str(path)).as_streaming_dataset(split="train")
    features = rows.features or {}
    names = {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
    # Iteration over the rows themselves would divide them among workers, which the stream does.
    for batch in undecoded(rows).iter(BATCH):
        for values in zip(*batch.values()):
            yield {
                column: value if column not in names or value is None else names[column][value]
                for column, value in zip(batch, values)
            }
