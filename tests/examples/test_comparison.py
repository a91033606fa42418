"""Means over runs, their intervals and what is varied in ablations."""

import math

import pytest
from made_up_runs import made_up

from examples.method_comparison.ablations import AXES, variants
from examples.method_comparison.comparison import by_fold, contrast, paired
from examples.method_comparison.intervals import T_QUANTILES, Estimate, interval
from examples.method_comparison.training import SINGLE, SOFT, Run


def test_intervals_are_those_of_the_formula():
    # Mean 84, standard deviation √10, and t = 2.776 with 4 degrees of freedom.
    mean, half = interval([80, 82, 84, 86, 88], 0)
    assert mean == 84 and half == pytest.approx(2.776 * math.sqrt(10) / math.sqrt(5)) == pytest.approx(3.9259, abs=1e-4)
    # One fold of five is tested and three are trained on: √(1/5 + 1/3) for √(1/5).
    assert interval([80, 82, 84, 86, 88], 1 / 3).half == pytest.approx(half * math.sqrt(8 / 3))
    mean, half = interval([1, 3], 0)
    assert mean == 2 and half == pytest.approx(12.706)
    assert interval([7.5], 1) == Estimate(7.5, None)
    # Without any spread there is no interval, also where it is lost in rounding.
    assert interval([2.5, 2.5, 2.5], 1) == interval([2.5, 2.5 + 1e-12, 2.5 - 1e-12], 1) == Estimate(2.5, None)
    with pytest.raises(ValueError, match="1 to 31 folds, got 0"):
        interval([], 0)
    signs = [Estimate(*each).sign for each in ((2, 1), (-2, 1), (1, 1), (0.5, 1), (3, None))]
    assert signs == [1, -1, 0, 0, 0]


@pytest.mark.parametrize("degrees", range(1, 31))
def test_the_table_of_quantiles(degrees):
    """95% of Student's t lie between minus and plus a number that rounds to it: the density by Simpson's rule."""
    factor = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)

    def share(quantile, steps=1000):
        values = [(1 + (quantile * i / steps) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps + 1)]
        return (
            2 * factor * quantile / steps / 3 * (2 * sum(values[::2]) + 4 * sum(values[1::2]) - values[0] - values[-1])
        )

    quantile = T_QUANTILES[degrees - 1]
    assert share(quantile - 0.0005) < 0.95 < share(quantile + 0.0005)


def test_runs_are_averaged_within_folds_and_paired():
    assert by_fold({("1", 0): 1.0, ("1", 1): 3.0, ("2", 0): 5.0}) == [2.0, 5.0]
    one = {("1", 0): made_up(SOFT, test=0.9), ("1", 1): made_up(SOFT, test=0.7), ("2", 0): made_up(SOFT, test=0.6)}
    other = {("1", 0): made_up(SINGLE, test=0.8), ("1", 1): made_up(SINGLE, test=0.4), ("3", 0): made_up(SINGLE)}
    # Differences of 10 and 30 points in fold 1; the other folds have no partner.
    assert paired(one, other) == Estimate(pytest.approx(20), None)
    other["2", 0] = made_up(SINGLE, test=0.5)
    # With three folds, as many clips are tested as are trained on.
    assert paired(one, other) == (pytest.approx(15), pytest.approx(12.706 * 5 * math.sqrt(3)))
    assert paired(one, {}) is None


def test_contrasts_are_taken_within_folds():
    def runs(**accuracies):
        return {(fold[1:], 0): made_up(SOFT, test=accuracy) for fold, accuracy in accuracies.items()}

    # Fold 1: 30 minus the mean of 10 and 20 points; fold 2: 10 minus 5; fold 3 has not all of them.
    number = contrast([runs(f1=0.3, f2=0.1, f3=0.9)], [runs(f1=0.1, f2=0.0), runs(f2=0.1, f1=0.2)])
    assert number == (pytest.approx(10), pytest.approx(12.706 * 5 * math.sqrt(3)))
    assert contrast([runs(f1=0.3)], [runs(f2=0.1)]) is None and contrast([], []) is None


def test_variants_are_those_of_the_axes():
    experts, slots = (list(axis.values) for axis in AXES[:2])
    assert experts == ["1", "2", "4", "7", "16", "32"] and slots == ["1", "2", "3", "4"]
    assert len(variants()) == 5 + 3 + 2 + 1 + 1 + 2 + 2 + 2 + 1 + 1 and {} not in variants()
    assert all(axis.reference in axis.values for axis in AXES)
    assert len({Run(SOFT, "1", 0.1, 0, tuple(each.items())).name for each in variants()}) == len(variants())
