"""Numbers and differences in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Optional

from .intervals import Estimate


def duration(seconds: float) -> str:
    """Such as `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def show(number: Optional[Estimate], form: str = ".1f") -> str:
    """Mean ± half width."""
    if number is None:
        return "—"
    return f"{number.mean:{form}}" + ("" if number.half is None else f" ± {number.half:{form.lstrip('+')}}")


def listed(words: Iterable[str]) -> str:
    """Such as `one, two and three`."""
    *some, last = words
    return f"{', '.join(some)} and {last}" if some else last


def difference_in_words(name: str, other: str, number: Optional[Estimate]) -> str:
    """What a difference of accuracies shows.

    Args:
        name (str): of the first method.
        other (str): of the second one.
        number (Estimate, optional): first minus second, in points.

    Returns:
        str: a sentence.
    """
    if number is None:
        return f"There are no runs yet by which {name} and {other} can be compared."
    if number.half is None:
        return (
            f"{name} differs from {other} by {number.mean:+.1f} points, in one fold or in all folds alike, which gives "
            "no interval: this table does not show a difference."
        )
    if number.sign:
        word = "beats" if number.sign > 0 else "is behind"
        return (
            f"{name} {word} {other} by {abs(number.mean):.1f} ± {number.half:.1f} points: the interval excludes zero."
        )
    return (
        f"{name} differs from {other} by {number.mean:+.1f} ± {number.half:.1f} points: the interval includes zero, so "
        "this table does not show a difference."
    )


def several_intervals(numbers: Sequence[Estimate]) -> str:
    """What to remember of many intervals; nothing if there are few."""
    number = sum(each.half is not None for each in numbers)
    return f"Of {number} intervals of 95%, {number / 20:.1f} miss the truth on average." if number > 1 else ""
