"""What names of modules and regular expressions in a config may be."""

from __future__ import annotations

import math
from typing import Any

import regex
from peft.utils.constants import DUMMY_TARGET_MODULES

# What is larger is a mistake, or meant to exhaust memory.
LONGEST_EXPRESSION = 10_000
# PEFT makes all endings of each name of `target_modules`, and expressions of the names of `modules_to_save`.
LONGEST_NAME, MOST_TARGETS, MOST_NAMES = 256, 5_000, 256
# Compiling an expression writes out what is repeated: its length times the numbers of all its repetitions, at most.
LARGEST_EXPRESSION = 100_000
# Of all expressions of a field that has several: a config has three such fields.
LONGEST_EXPRESSIONS, LARGEST_EXPRESSIONS = 2_000, 20_000
REPETITION = regex.compile(r"\{([0-9]{0,9})(,[0-9]{0,9})?\}")
# Calls of a part of the expression itself, whose memory has no bound.
RECURSION = regex.compile(r"\(\?(R|P>|&|[+-]?[0-9])")
# Full case-folding, whose sets of characters grow without a bound.
FULL_CASE = regex.compile(r"\(\?[a-zA-Z0-9]*f")
PATH = regex.compile(r"[\w-]+(\.[\w-]+)*")


def are_names(value: Any) -> bool:
    """Whether a value is None or several strings."""
    return value is None or (
        isinstance(value, (list, tuple, set)) and all(isinstance(name, str) and name for name in value)
    )


def are_modules(value: Any, most: int = MOST_TARGETS) -> bool:
    """Whether a value is None or several names that are not too long."""
    names = value or ()
    return are_names(value) and len(names) <= most and all(len(name) <= LONGEST_NAME for name in names)


def is_path(value: Any) -> bool:
    """Whether a value is a name of letters, digits, dots and dashes."""
    return isinstance(value, str) and len(value) <= LONGEST_NAME and PATH.fullmatch(value) is not None


def are_paths(value: Any) -> bool:
    """Whether a value is None or one or several such names."""
    names = [value] if isinstance(value, str) else value
    return are_modules(names, MOST_NAMES) and all(map(is_path, names or ()))


def is_expression(value: Any) -> bool:
    """Whether a value is a regular expression that takes neither much memory nor much time to compile."""
    # PEFT has one string that stands for no module.
    if not isinstance(value, str) or len(value) > LONGEST_EXPRESSION or value == DUMMY_TARGET_MODULES:
        return False
    # Any other brace would be a count with spaces or comments in it, or a match that is only alike.
    if set("{}") & set(REPETITION.sub("", value)) or RECURSION.search(value) or FULL_CASE.search(value):
        return False
    if _size(value) > LARGEST_EXPRESSION:
        return False
    try:
        regex.compile(value)
    except (regex.error, RecursionError):
        return False
    return True


def are_patterns(value: Any) -> bool:
    """Whether a value is None or a dictionary whose keys are names or such expressions; its values may be any."""
    if value is None:
        return True
    if not isinstance(value, dict) or len(value) > MOST_TARGETS:
        return False
    expressions = [key for key in value if not is_path(key)]
    if not all(isinstance(each, str) and len(each) <= LONGEST_EXPRESSIONS for each in expressions):
        return False
    lengths, sizes = sum(map(len, expressions)), sum(map(_size, expressions))
    return lengths <= LONGEST_EXPRESSIONS and sizes <= LARGEST_EXPRESSIONS and all(map(is_expression, expressions))


def _size(expression: str) -> int:
    # What may be left out is not written out: the least number counts.
    return len(expression) * math.prod(max(1, int(least or 1)) for least, _ in REPETITION.findall(expression))
