"""Names and regular expressions of a config: what they match, in bounded time, and what they give single blocks."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import regex

from ..config import SoftMoAConfig
from ..dependent_fields import PATTERN_FIELDS
from ..expressions import LONGEST_NAME, is_path
from ..fields import shorten

# Seconds that matching may take: an expression with one name, and expressions with all names.
LONGEST_MATCH, LONGEST_EXPRESSION_SEARCH = 0.1, 0.4


def matches(field: str, expression: str, name: str, start: int = 0) -> bool:
    """Whether a name matches a regular expression, which must not take forever to tell.

    Args:
        field (str): the field of the config that has the expression.
        expression (str): the expression.
        name (str): name of a module.
        start (int): where in the name the match begins. Default: at its start.

    Returns:
        bool: whether all of it matches from there on.

    Raises:
        ValueError: if it takes too long.
    """
    try:
        return regex.fullmatch(expression, name, pos=start, timeout=LONGEST_MATCH) is not None
    except TimeoutError as error:
        raise ValueError(
            f"`{field}={expression!r}` takes too long to match against '{name}': repetitions within repetitions, as in "
            "'(a+)+', multiply. Write it without them, or list names."
        ) from error


def block_configs(config: SoftMoAConfig, names: Iterable[str], must_match: bool = True) -> dict[str, SoftMoAConfig]:
    """What a config says for each block.

    As in PEFT's `rank_pattern`, a pattern is for the blocks whose names it matches as a whole, or from one of their
    dots on.

    Args:
        config (SoftMoAConfig): the config; nothing in it changes.
        names (iterable of str): the names of all adapted blocks.
        must_match (bool): whether each pattern has to match one of them. Default: True.

    Returns:
        dict[str, SoftMoAConfig]: for each name a config that has no patterns, but their values.

    Raises:
        ValueError: if a pattern matches no block, two of a field match the same, or they take too long.
    """
    names = list(names)
    if not any(getattr(config, field) for field in PATTERN_FIELDS):
        return dict.fromkeys(names, config)
    own = {name: copy.copy(config) for name in names}
    for field, choice in PATTERN_FIELDS.items():
        patterns: Mapping[str, Any] = getattr(config, field) or {}
        chosen: dict[str, str] = {}
        for pattern, name in _find(field, patterns, names):
            if name in chosen:
                raise ValueError(
                    f"`{field}` has two patterns for '{name}': {shorten(chosen[name])}, which gives "
                    f"{patterns[chosen[name]]}, and {shorten(pattern)}, which gives {patterns[pattern]}. Keep one."
                )
            chosen[name] = pattern
        used = set(chosen.values())
        unused = next((pattern for pattern in patterns if pattern not in used), None)
        if unused is not None and must_match:
            raise ValueError(
                f"`{field}` gives {shorten(unused)} the value {patterns[unused]}, but that matches none of the adapted "
                f"blocks, {', '.join(map(repr, names[:3]))}{', …' if len(names) > 3 else ''}. Correct or remove it."
            )
        for name in names:
            setattr(own[name], field, None)
            if name in chosen:
                setattr(own[name], choice, patterns[chosen[name]])
    return own


def name_patterns(values: Mapping[str, Any], most: int = 4) -> str:
    """What a config says of single blocks, for a sentence.

    Args:
        values (mapping): the fields of the config, by name.
        most (int): how many patterns of a field are named. Default: 4.

    Returns:
        str: such as "r 2 for 'layers.0.attention'"; empty if all blocks are alike.
    """
    named = []
    for field, choice in PATTERN_FIELDS.items():
        patterns = list((values.get(field) or {}).items())
        named += [f"{choice} {value} for {shorten(pattern)}" for pattern, value in patterns[:most]]
        named += [f"{choice} for {len(patterns) - most} more"] if len(patterns) > most else []
    return ", ".join(named)


def _find(field: str, patterns: Mapping[str, Any], names: list[str]) -> Iterator[tuple[str, str]]:
    """Each pattern with each name that it matches."""
    expressions = [pattern for pattern in patterns if not is_path(pattern)]
    began = time.thread_time()
    for name in names:
        starts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        # Names, of which there may be many, are looked up.
        endings = (name[start:] for start in starts if len(name) - start <= LONGEST_NAME)
        yield from ((ending, name) for ending in endings if ending in patterns and is_path(ending))
        for pattern in expressions:
            if _matches_from(field, pattern, name, starts, began + LONGEST_EXPRESSION_SEARCH):
                yield pattern, name


def _matches_from(field: str, expression: str, name: str, starts: Iterable[int], latest: float) -> bool:
    for start in starts:
        if time.thread_time() > latest:
            raise ValueError(
                f"`{field}` takes more than {LONGEST_EXPRESSION_SEARCH} seconds to match against the names of blocks. "
                "Give fewer or simpler expressions, or names."
            )
        if matches(field, expression, name, start):
            return True
    return False
