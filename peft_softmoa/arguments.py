"""The fields of `SoftMoAConfig` as arguments of a command."""

from __future__ import annotations

import json
import re
from dataclasses import field, fields, make_dataclass
from typing import Any, Optional, get_type_hints

from peft import PeftConfig

from .config import SoftMoAConfig
from .dependent_fields import PATTERN_FIELDS
from .fields import shorten

# What is written out on a command line.
LISTS: dict[str, Any] = {
    "target_modules": Optional[list[str]],
    "exclude_modules": Optional[list[str]],
    "layers_to_transform": Optional[list[int]],
    **dict.fromkeys(PATTERN_FIELDS, Optional[str]),  # as JSON
}
# Those that every PEFT config has, and those that a command sets itself.
NOT_ARGUMENTS = {entry.name for entry in fields(PeftConfig)} | {
    "init_weights",
    "layers_pattern",
    "modules_to_save",
    "label_names",
    "max_length_seconds",
}
TYPES = get_type_hints(SoftMoAConfig)

# For `transformers.HfArgumentParser`; `make_config` makes the config from it.
AdapterArguments = make_dataclass(
    "AdapterArguments",
    [
        (
            entry.name,
            LISTS.get(entry.name) or TYPES[entry.name],
            field(default=entry.default, metadata={"help": entry.metadata["help"]}),
        )
        for entry in fields(SoftMoAConfig)
        if entry.name not in NOT_ARGUMENTS
    ],
)


def make_config(arguments: Any, **options: Any) -> SoftMoAConfig:
    """Make the config from parsed arguments.

    One word for `target_modules` or `exclude_modules` is a name, `all-linear` or, with any of `\\*+?^$()[]{}|`, a
    regular expression; several words are names. Patterns of blocks are JSON.

    Args:
        arguments (AdapterArguments): what was parsed.
        options: fields of the config that are no arguments.

    Returns:
        SoftMoAConfig: the config.

    Raises:
        ValueError: for a value that is not allowed.
    """
    given = vars(arguments) | options
    for name in ("target_modules", "exclude_modules"):
        if given[name] is not None and len(given[name]) == 1:
            [word] = given[name]
            if word == "all-linear" or re.search(r"[\\*+?^$()\[\]{}|]", word):
                given[name] = word
    for name in PATTERN_FIELDS:
        if given[name] is not None:
            try:
                given[name] = json.loads(given[name])
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"`{name}` must be JSON, as in '{{\"layers.0.attention\": 2}}', got {shorten(given[name])}: {error}"
                ) from error
    return SoftMoAConfig(**given)
