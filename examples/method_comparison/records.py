"""The records of runs, and what is read from them.

A study is one JSON Lines file. Its first line has what the runs share: `settings`, and `environments`, a list. Each
further line is one run, with the settings of its own and the index of its environment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

Record = dict[str, Any]
# The runs of this seed choose the learning rate.
CHOICE_SEED = 0
# Settings in which the runs of one study differ.
OWN = ("method", "options", "fold", "rate", "seed")


def write(path: Path, records: Sequence[Record]) -> None:
    """Write a study, whole or not at all.

    Args:
        path (Path): the file; its folder is made if it is missing.
        records (sequence of Record): what `workers.carry_out` gives, of one study.

    Raises:
        ValueError: if settings differ that all runs share, or there is a number that JSON has not.
    """
    settings, environments, runs = common_settings(records[0]), [], []
    for record in records:
        check_settings(common_settings(record), settings, f"the runs of {path}")
        if record["environment"] not in environments:
            environments.append(record["environment"])
        own = {name: value for name, value in record["settings"].items() if name in OWN}
        runs.append({**record, "settings": own, "environment": environments.index(record["environment"])})
    parts = [{"settings": settings, "environments": environments}, *runs]
    lines = [json.dumps(part, allow_nan=False) + "\n" for part in parts]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    temporary.replace(path)


def load(path: Path) -> list[Record]:
    """Read a study. A last line without its end is dropped: the process was killed while it wrote.

    Args:
        path (Path): the file; it may be missing.

    Returns:
        list[Record]: the records, each with all of its settings and its environment.

    Raises:
        ValueError: if a line is no record.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            part = json.loads(line)
            if number == 1:
                settings, environments = part["settings"], part["environments"]
            else:
                own, where = part["settings"], environments[part["environment"]]
                records.append({**part, "settings": {**settings, **own}, "environment": where})
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}, line {number}: this is no record of a run ({error!r}). Remove it.") from error
    return records


def common_settings(record: Record) -> dict[str, Any]:
    """The settings that all runs of a study share."""
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
            f"{where}: the settings differ: {'; '.join(different)}. Choose another --output_dir, or keep its settings."
        )


def of(records: Iterable[Record], method: str, options: dict[str, Any], fold: Optional[str] = None) -> list[Record]:
    """The records of a method with some options, of one fold or all."""
    return [
        record
        for record in records
        if record["settings"]["method"] == method
        and record["settings"]["options"] == options
        and fold in (None, record["settings"]["fold"])
    ]


def choose_rate(
    records: Iterable[Record],
    method: str,
    options: dict[str, Any],
    fold: str,
    rates: Sequence[float],
    more_is_better: bool = True,
) -> Optional[float]:
    """The learning rate with the best value on the validation fold after the last epoch.

    Among equals, the one with the least validation loss. The tested fold is not looked at.

    Args:
        records (iterable of Record): among them, the runs of the first seed with all rates.
        method (str): which method.
        options (dict): its options.
        fold (str): which fold is tested.
        rates (sequence of float): the grid.
        more_is_better (bool): whether a greater value is better. Default: True.

    Returns:
        float, optional: the rate; None as long as a run of the grid is missing.
    """
    scores = {}
    for record in of(records, method, options, fold):
        if record["settings"]["seed"] == CHOICE_SEED:
            value, loss = (record["progress"][name][-1] for name in ("validation", "validation_loss"))
            # A loss that is not finite is worse than all others.
            scores[record["settings"]["rate"]] = (
                value if more_is_better else -value,
                -math.inf if loss is None else -loss,
            )
    if not scores.keys() >= set(rates):
        return None
    return max(sorted(rates), key=lambda rate: scores[rate])


def choice_fold(protocol: dict[str, Any], fold: str) -> str:
    """The tested fold whose validation fold chooses the rate for a fold: itself, or the first."""
    return fold if fold in protocol["rate_folds"] else protocol["rate_folds"][0]


def chosen_rate(records: Iterable[Record], protocol: dict[str, Any], run: Any) -> Optional[float]:
    """The rate that a study chooses for a run, by `choose_rate`; None as long as it cannot."""
    fold, options = choice_fold(protocol, run.fold), dict(run.options)
    better = protocol["metric"] != "wer"
    return choose_rate(records, run.method, options, fold, protocol["rates"][run.method], better)
