"""The records of runs: one JSON file each, and what is read from them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

Record = dict[str, Any]
# The runs of this seed choose the learning rate.
CHOICE_SEED = 0
# Settings in which the runs of one comparison differ.
OWN = ("method", "options", "fold", "validation_fold", "rate", "seed")


def write(path: Path, record: Record) -> None:
    """Write a record, whole or not at all: one line for each of its parts.

    Args:
        path (Path): the file.
        record (Record): what `training.train` gives.

    Raises:
        ValueError: if it holds a number that JSON has not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = ",\n".join(f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in record.items())
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(f"{{\n{parts}\n}}\n", encoding="utf-8", newline="\n")
    temporary.replace(path)


def load(folder: Path) -> list[Record]:
    """Read all records of a folder, in the order of their names.

    Args:
        folder (Path): the folder; it may be missing.

    Returns:
        list[Record]: the records.

    Raises:
        ValueError: if a file is no record, or two have different settings in common.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(json.loads(path.read_text(encoding="utf-8")))
            common = common_settings(records[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no record of a run ({error!r}): remove it.") from error
        if len(records) == 1:
            first, expected = path, common
        check_settings(common, expected, f"{path} and {first}")
    return records


def common_settings(record: Record) -> dict[str, Any]:
    """The settings that all runs of a comparison share."""
    return {name: value for name, value in record["settings"].items() if name not in OWN}


def check_settings(given: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Check that settings agree.

    Args:
        given (dict): those of a file.
        expected (dict): those that it should have.
        where (str): what they are of, for the error.

    Raises:
        ValueError: if they do not; it names each setting and both values.
    """
    # As JSON gives them, which has no tuples.
    expected = json.loads(json.dumps(expected))
    names = [*given, *(name for name in expected if name not in given)]
    different = [
        f"{name} was {given.get(name)!r} and is {expected.get(name)!r}"
        for name in names
        if given.get(name) != expected.get(name)
    ]
    if different:
        raise ValueError(
            f"{where}: the settings differ: {'; '.join(different)}. Choose another --output_dir, or go on with its own "
            "settings."
        )


def of(records: Iterable[Record], method: str, fold: Optional[str] = None, **options: Any) -> list[Record]:
    """The records of a method with some options, of one fold or all."""
    return [
        record
        for record in records
        if record["settings"]["method"] == method
        and record["settings"]["options"] == options
        and fold in (None, record["settings"]["fold"])
    ]


def choose_rate(records: Iterable[Record], method: str, fold: str, rates: Sequence[float]) -> Optional[float]:
    """The learning rate with the best accuracy on the validation fold after the last epoch.

    Among equals, the one with the least validation loss. The tested fold is not looked at.

    Args:
        records (iterable of Record): among them, the runs of the first seed with all rates.
        method (str): which method.
        fold (str): which fold is tested.
        rates (sequence of float): the grid.

    Returns:
        float, optional: the rate; None as long as a run of the grid is missing.
    """
    scores = {}
    for record in of(records, method, fold):
        if record["settings"]["seed"] == CHOICE_SEED:
            epochs = record["epochs"]
            loss = epochs["validation_loss"][-1]
            # A loss that is not finite is worse than all others.
            scores[record["settings"]["rate"]] = (
                epochs["validation_accuracy"][-1],
                -math.inf if loss is None else -loss,
            )
    if not scores.keys() >= set(rates):
        return None
    return max(sorted(rates), key=lambda rate: scores[rate])
