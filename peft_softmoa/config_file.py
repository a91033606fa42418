"""Where a config comes from: its file, and what it said."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from peft.utils.constants import SEQ_CLS_HEAD_NAMES

from .fields import shorten
from .registration import SOFTMOA

# What PEFT adds to `modules_to_save` when it wraps a model for a task.
TASK_HEADS = {*SEQ_CLS_HEAD_NAMES, "qa_outputs"}
LARGEST_CONFIG = 2**20  # bytes


class LoadedFrom(NamedTuple):
    """Where a config was loaded from, and what it chose then."""

    model_id: str
    subfolder: Optional[str]
    hub: dict[str, Any]  # arguments of `huggingface_hub.hf_hub_download`
    choices: dict[str, Any]

    def chose(self, choices: dict[str, Any]) -> bool:
        """Whether a config chooses what this one chose, but for heads that PEFT names when it wraps a model.

        Args:
            choices (dict[str, Any]): of the config, as from `SoftMoAConfig.choices`.

        Returns:
            bool: whether they are the same.
        """
        before, now = (
            {**each, "modules_to_save": each["modules_to_save"] - TASK_HEADS} for each in (self.choices, choices)
        )
        return before == now


def read_json(path: str) -> Any:
    """Read the file of a config, if it is as small as one.

    Args:
        path (str): the file.

    Returns:
        Any: what it holds.

    Raises:
        ValueError: if it is too large, or no JSON.
    """
    if (size := os.path.getsize(path)) > LARGEST_CONFIG:
        raise ValueError(f"it has {size:,} bytes, and more than {LARGEST_CONFIG:,} are no config")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from error


def read_fields(path: str, known: Iterable[str]) -> dict[str, Any]:
    """Read the fields of a config.

    Args:
        path (str): the file.
        known (iterable of str): names of the fields that a config has.

    Returns:
        dict[str, Any]: the values by name.

    Raises:
        ValueError: if they are none of this method.
    """
    given = read_json(path)
    if not isinstance(given, dict):
        raise ValueError(f"it holds a {type(given).__name__} instead of the fields of a config")
    if given.get("peft_type") != SOFTMOA:
        raise ValueError(f"`peft_type` must be '{SOFTMOA.value}', got {shorten(given.get('peft_type'))}")
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(
            f"the fields {shorten(unknown)} are unknown. A newer version may have written them: upgrade "
            "peft-softmoa and peft. If they do not belong there, remove them"
        )
    return given
