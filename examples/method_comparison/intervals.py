"""Means over folds and their intervals.

The clips of one fold are tested by one training run of each seed, and the runs of one fold share most of what they are
trained on and all of what they are tested on. So runs are first averaged within their fold, and the K means of the
folds are what is taken for a sample:

    mean ± t(0.975, K - 1) · s · √(1 / K + overlap),        s² = Σ (fold - mean)² / (K - 1)

For a difference of two methods, `fold` is the mean of the differences of their runs with the same fold and seed. The
folds are no independent samples either, for their training sets overlap. Without a correction, such intervals are too
narrow; the usual one is to add the number of clips that are tested over that of those that are trained on to 1 / K
(C. Nadeau and Y. Bengio, *Inference for the Generalization Error*, Machine Learning 52, 2003, section 4.1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

from scipy.stats import t as student


class Estimate(NamedTuple):
    """A mean and the half width of its 95% interval, which one value has not, nor values that are all the same."""

    mean: float
    half: Optional[float]

    @property
    def low(self) -> float:
        """The lower end; minus infinity if there is no interval."""
        return -math.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end; infinity if there is no interval."""
        return math.inf if self.half is None else self.mean + self.half


def interval(folds: Sequence[float], overlap: float) -> Estimate:
    """The 95% interval of a mean over folds, by Student's t.

    Args:
        folds (sequence of float): one number for each fold.
        overlap (float): how many clips are tested for each that is trained on.

    Returns:
        Estimate: the mean, and the half width if there are two folds or more that differ.

    Raises:
        ValueError: if there is no fold.
    """
    if not folds:
        raise ValueError("An interval takes one fold or more, got 0.")
    mean = statistics.fmean(folds)
    if len(folds) == 1 or math.isclose(min(folds), max(folds), abs_tol=1e-9):
        return Estimate(mean, None)
    quantile = float(student.ppf(0.975, len(folds) - 1))
    return Estimate(mean, quantile * statistics.stdev(folds) * math.sqrt(1 / len(folds) + overlap))


def by_fold(values: Mapping[tuple[str, int], float]) -> list[float]:
    """The mean of each fold, of values by fold and seed."""
    folds: dict[str, list[float]] = {}
    for (fold, _), value in values.items():
        folds.setdefault(fold, []).append(value)
    return [statistics.fmean(each) for each in folds.values()]


def paired(
    one: Mapping[tuple[str, int], float], other: Mapping[tuple[str, int], float]
) -> dict[tuple[str, int], float]:
    """The differences of runs with the same fold and seed."""
    return {key: value - other[key] for key, value in one.items() if key in other}


def smallest_difference(deviation: float, folds: int, overlap: float, power: float = 0.8) -> float:
    """The smallest difference that a study would probably show, by the deviation of a pilot.

        (t(0.975, K - 1) + t(power, K - 1)) · deviation · √(1 / K + overlap)

    Args:
        deviation (float): the standard deviation of paired differences between folds.
        folds (int): K, two or more.
        overlap (float): how many clips are tested for each that is trained on.
        power (float): the probability with which the interval excludes zero. Default: 0.8.

    Returns:
        float: in the unit of the deviation.
    """
    quantiles = student.ppf([0.975, power], folds - 1)
    return float(quantiles.sum()) * deviation * math.sqrt(1 / folds + overlap)
