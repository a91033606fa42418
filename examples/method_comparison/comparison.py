"""What the records of a study say: the rates that they choose, means with their intervals, and other measures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

from ..benchmark.report import machine
from .ablations import AXES, Axis
from .intervals import Estimate, interval
from .records import CHOICE_SEED, Record, choose_rate, common_settings, of
from .training import METHODS, SOFT

SEEDS = 3  # of the whole table, at least
# By fold and seed.
Runs = dict[tuple[str, int], Record]


class Comparison:
    """What the records say, with the learning rates that they choose.

    Args:
        found (list[Record]): the records of one comparison.
    """

    def __init__(self, found: list[Record]) -> None:
        self.records = found
        self.protocol = common_settings(found[0])
        self.folds: list[str] = self.protocol["folds"]
        self.seeds = max(SEEDS, len({record["settings"]["seed"] for record in found}))
        self.rates = {
            method: {
                fold: rate
                for fold in self.folds
                if (rate := choose_rate(found, method, fold, self.protocol["rates"])) is not None
            }
            for method in METHODS
        }
        self.methods = {method: runs for method in METHODS if (runs := self.runs(method))}

    def runs(self, method: str, **options: Any) -> Runs:
        """The runs of a method with the rates that it has chosen, by fold and seed.

        Args:
            method (str): which method.
            options: of an ablation.

        Returns:
            Runs: the records.
        """
        rates = self.rates[method]
        return {
            (fold, record["settings"]["seed"]): record
            for fold in self.folds
            for record in of(self.records, method, fold, **options)
            if record["settings"]["rate"] == rates.get(fold)
        }


def final_accuracy(record: Record) -> float:
    """Accuracy on the tested fold after the last epoch, in percent."""
    return 100 * record["test_accuracy"]


def by_fold(values: dict[tuple[str, int], float]) -> list[float]:
    """The mean of each fold, in the order of the folds."""
    folds: dict[str, list[float]] = {}
    for (fold, _), value in values.items():
        folds.setdefault(fold, []).append(value)
    return [statistics.fmean(each) for each in folds.values()]


def estimate(runs: Runs, value: Callable[[Record], float] = final_accuracy) -> Estimate:
    """Mean and interval of a number of each run."""
    return interval(by_fold({key: value(record) for key, record in runs.items()}), overlap_of(runs))


def overlap_of(runs: Runs) -> float:
    """How many clips are tested for each that is trained on: one fold, and all but two."""
    return 1 / (len(next(iter(runs.values()))["settings"]["folds"]) - 2)


def paired(
    one: Runs,
    other: Runs,
    value: Callable[[Record], float] = final_accuracy,
    compare: Callable[[float, float], float] = lambda one, other: one - other,
    overlap: Optional[float] = None,
) -> Optional[Estimate]:
    """Mean and interval of the comparison of runs with the same fold and seed.

    Args:
        one (Runs): the runs of a method.
        other (Runs): those of another one.
        value (callable): from a record to a number. Default: its accuracy.
        compare (callable): from two numbers to one. Default: their difference.
        overlap (float, optional): how many clips are tested for each that is trained on. Default: that of the runs.

    Returns:
        Estimate, optional: None if no two runs belong together.
    """
    values = {key: compare(value(record), value(other[key])) for key, record in one.items() if key in other}
    return interval(by_fold(values), overlap_of(one) if overlap is None else overlap) if values else None


def contrast(some: Sequence[Runs], others: Sequence[Runs]) -> Optional[Estimate]:
    """The mean accuracy of some variants minus that of others, in folds with runs of all of them.

    Args:
        some (sequence of Runs): variants.
        others (sequence of Runs): those that they are compared with.

    Returns:
        Estimate, optional: points; None if no fold has them all.
    """
    keys = set.intersection(*(set(runs) for runs in (*some, *others))) if some and others else set()
    if not keys:
        return None

    def mean(variants: Sequence[Runs], key: tuple[str, int]) -> float:
        return statistics.fmean(final_accuracy(runs[key]) for runs in variants)

    differences = {key: mean(some, key) - mean(others, key) for key in sorted(keys)}
    return interval(by_fold(differences), overlap_of(some[0]))


def epochs_to(record: Record, share: float = 0.95) -> int:
    """The first epoch, from 1, after which the accuracy on the validation fold has reached a share of its last one."""
    accuracies = record["epochs"]["validation_accuracy"]
    return next(index + 1 for index, each in enumerate(accuracies) if each >= share * accuracies[-1])


def seconds_to(record: Record) -> float:
    """The processor time of training until then."""
    return sum(record["epochs"]["seconds"][: epochs_to(record)])


def kept_bytes(record: Record) -> int:
    """What autograd keeps, and three float32 numbers for each trained parameter."""
    return record["memory_bytes"] + 12 * (record["parameters"] + record["head_parameters"])


def time_ratio(one: Runs, other: Runs, name: str) -> Optional[Estimate]:
    """A time as a multiple of another method's in the run with the same fold and seed."""
    # Folds have clips in common, but times have nothing to do with them.
    return paired(one, other, lambda record: record[name], lambda one, other: one / other, overlap=0)


def mean_of(record: Record, name: str) -> float:
    """A metric as a mean of all blocks."""
    values = [block[name] for block in record["experts"] if block.get(name) is not None]
    return statistics.fmean(values) if values else math.nan


def idle_share(record: Record) -> float:
    """The share of idle experts among those of all blocks."""
    blocks = record["experts"]
    return sum(block["idle_experts"] for block in blocks) / sum(block["experts"] for block in blocks)


def idle_by_rate(found: Iterable[Record]) -> dict[float, float]:
    """The mean share of idle experts with each learning rate, from the least one on."""
    shares: dict[float, list[float]] = {}
    for record in found:
        shares.setdefault(record["settings"]["rate"], []).append(idle_share(record))
    return {rate: statistics.fmean(shares[rate]) for rate in sorted(shares)}


def places(here: Comparison) -> dict[str, list[str]]:
    """Where the runs were made and with what versions, with the commits of each."""
    found: dict[str, list[str]] = {}
    for record in here.records:
        where = record["environment"]
        commits = found.setdefault(f"{machine({'environment': where})}, {where['processes']} runs at a time", [])
        if where.get("commit") is not None:
            commit = where["commit"][:7] + (" with changes" if where["uncommitted changes"] else "")
            if commit not in commits:
                commits.append(commit)
    return found


def ablations(here: Comparison) -> list[tuple[Axis, dict[str, Runs]]]:
    """What was varied, with the runs of each value: the reference and others."""
    values = [(axis, ablation(here, axis)) for axis in AXES]
    return [(axis, each) for axis, each in values if len(each) > 1 and axis.reference in each]


def ablation(here: Comparison, axis: Axis) -> dict[str, Runs]:
    """The runs of the choosing seed for each value that has any, by its label."""
    values = {}
    for label, options in axis.values.items():
        runs = {key: record for key, record in here.runs(SOFT, **options).items() if key[1] == CHOICE_SEED}
        if runs:
            values[label] = runs
    return values


def contrast_of(here: Comparison, axis: Axis) -> Optional[Estimate]:
    """Accuracy of the values of an axis that the paper finds better minus that of the others that it speaks of."""
    values = ablation(here, axis)
    if axis.claim is None or not {*axis.claim.better, *axis.claim.worse} <= values.keys():
        return None
    better, worse = ([values[label] for label in labels] for labels in (axis.claim.better, axis.claim.worse))
    return contrast(better, worse)
