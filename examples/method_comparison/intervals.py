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
from collections.abc import Sequence
from typing import NamedTuple, Optional

# Student's t, 97.5%, for 1 to 30 degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


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

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is above or below zero, else 0."""
        return (self.low > 0) - (self.high < 0)


def interval(folds: Sequence[float], overlap: float) -> Estimate:
    """The 95% interval of a mean over folds, by Student's t.

    Args:
        folds (sequence of float): one number for each fold, 31 at most.
        overlap (float): how many clips are tested for each that is trained on.

    Returns:
        Estimate: the mean, and the half width if there are two folds or more that differ.

    Raises:
        ValueError: if there is no fold, or there are too many.
    """
    if not 1 <= len(folds) <= len(T_QUANTILES) + 1:
        raise ValueError(f"An interval takes 1 to {len(T_QUANTILES) + 1} folds, got {len(folds)}.")
    mean = statistics.fmean(folds)
    if len(folds) == 1 or math.isclose(min(folds), max(folds), abs_tol=1e-9):
        return Estimate(mean, None)
    return Estimate(mean, T_QUANTILES[len(folds) - 2] * statistics.stdev(folds) * math.sqrt(1 / len(folds) + overlap))
