"""Loading without warnings of what is meant to be."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# A row of transformers' report after loading a model, whose status may be in colour.
ROW = re.compile(r"^(\S.*?) +\| +(?:\x1b\[[0-9;]*m)*(MISSING|MISMATCH|UNEXPECTED|CONVERSION)\b", re.MULTILINE)
LOGGER = "transformers.modeling_utils"
SILENT = ("At least one mel filter has all zero values", "`is_gradient_checkpointing` is deprecated")


@contextmanager
def quiet_loading(new: Iterable[str] | None = ()) -> Iterator[None]:
    """Load models and feature extractors without warnings of what is meant to be.

        with quiet_loading(["classifier"]):
            model = AutoModelForAudioClassification.from_pretrained(name, num_labels=3)

    Silent are transformers' report of a model's weights if all that it names is new or has another size on purpose, and
    its warning that a mel filter is all zeros: saved feature extractors are those that the model was trained with, and
    the lowest of 128 mel bands is narrower than what 512 samples tell apart. So is the warning that PEFT, when it wraps
    a model, asks transformers for `is_gradient_checkpointing` by its old name. Every other report and warning stays.

    Args:
        new (iterable of str, optional): modules that are new on purpose, such as `modules_to_save`: names, or endings
            of names. Default: none.
    """
    report = _Unexpected(tuple(new or ()))
    logger = logging.getLogger(LOGGER)
    logger.addFilter(report)
    try:
        with warnings.catch_warnings():
            for message in SILENT:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.removeFilter(report)


class _Unexpected(logging.Filter):
    """Lets a report pass if it has something that is not new on purpose."""

    def __init__(self, new: tuple[str, ...]) -> None:
        super().__init__()
        self.new = new

    def filter(self, record: logging.LogRecord) -> bool:
        rows = ROW.findall(record.getMessage())
        return not rows or not all(
            status in ("MISSING", "MISMATCH") and any(f".{name}." in f".{key}" for name in self.new)
            for key, status in rows
        )
