"""The fields of `SoftMoAConfig` as arguments of a command."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Any, Optional, get_type_hints

from peft import PeftConfig

from .config import SoftMoAConfig

# What is written out on a command line.
LISTS: dict[str, Any] = {
    "target_modules": Optional[list[str]],
    "exclude_modules": Optional[list[str]],
    "layers_to_transform": Optional[list[int]],
}
# Those that every PEFT config has, and those that a command sets itself.
NOT_ARGUMENTS = {entry.name for entry in fields(PeftConfig)} | {
    "init_weights",
    "layers_pattern",
    "modules_to_save",
    "label_names",
}
TYPES = get_type_hints(SoftMoAConfig)

# For `transformers.HfArgumentParser`; `SoftMoAConfig(**vars(arguments))` makes the config.
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
