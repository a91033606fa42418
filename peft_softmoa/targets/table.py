"""Rows of equal layers as one, in a table of text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

# A layer's name, up to its index.
INDEXED = re.compile(r"(.*\.)?(\d+)")


class Row(NamedTuple):
    """One line of the table."""

    layer: Optional[str]  # the repeated layer, such as encoder.layers.3
    rest: str  # what follows, such as .attention
    cells: tuple[str, ...]  # what has to be equal
    parameters: int


def group_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Join the rows that differ in the index of their layer only.

    Args:
        rows (iterable of Row): the rows.

    Returns:
        list[tuple[str, ...]]: the cells, in the order in which they first came, such as `encoder.layers.0-11.attention`
        and `12 x 75,306`.
    """
    groups: dict[tuple[str, Row], list[int]] = {}
    for row in rows:
        found = INDEXED.fullmatch(row.layer or "")
        key = (found[1] or "", row._replace(layer=None)) if found else (row.layer or "", row._replace(layer=row.layer))
        groups.setdefault(key, []).extend([int(found[2])] if found else [])
    return [
        (
            f"{prefix}{_ranges(indices)}{row.rest}",
            *row.cells,
            f"{len(indices)} x {row.parameters:,}" if len(indices) > 1 else f"{row.parameters:,}",
        )
        for (prefix, row), indices in groups.items()
    ]


def _ranges(indices: Sequence[int]) -> str:
    """Indices with runs of them shortened, such as `0-3,7`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Align the columns: the first on the left, the others on the right.

    Args:
        rows (sequence of tuple): the cells; all rows have as many.

    Returns:
        str: the lines.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
