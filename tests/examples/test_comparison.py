"""Means over runs and their intervals, and the studies as data."""

import json
import math
import statistics

import numpy as np
import pytest

from examples.method_comparison.intervals import Estimate, by_fold, interval, paired, smallest_difference
from examples.method_comparison.methods import METHODS, RATES, SOFT, why_not
from examples.method_comparison.studies import QUICK, STUDIES
from examples.method_comparison.training import DATA_OPTIONS, OPTIMIZER_OPTIONS, Run, method_options


def test_intervals_are_those_of_the_formula():
    # Mean 84, standard deviation √10, and t = 2.776 with 4 degrees of freedom.
    mean, half = interval([80, 82, 84, 86, 88], 0)
    assert mean == 84 and half == pytest.approx(2.776 * math.sqrt(10) / math.sqrt(5), abs=1e-3)
    # One fold of five is tested and three are trained on: √(1/5 + 1/3) for √(1/5).
    assert interval([80, 82, 84, 86, 88], 1 / 3).half == pytest.approx(half * math.sqrt(8 / 3))
    mean, half = interval([1, 3], 0)
    assert mean == 2 and half == pytest.approx(12.706, abs=1e-3)
    assert interval([7.5], 1) == Estimate(7.5, None)
    # Without any spread there is no interval, also where it is lost in rounding.
    assert interval([2.5, 2.5, 2.5], 1) == interval([2.5, 2.5 + 1e-12, 2.5 - 1e-12], 1) == Estimate(2.5, None)
    assert (Estimate(2, 1).low, Estimate(2, 1).high, Estimate(2, None).low) == (1, 3, -math.inf)
    with pytest.raises(ValueError, match="one fold or more, got 0"):
        interval([], 0)


def test_runs_are_averaged_within_folds_and_paired():
    assert by_fold({("1", 0): 1.0, ("1", 1): 3.0, ("2", 0): 5.0}) == [2.0, 5.0]
    one = {("1", 0): 9.0, ("1", 1): 7.0, ("2", 0): 6.0}
    other = {("1", 0): 8.0, ("1", 1): 4.0, ("3", 0): 5.0}
    assert paired(one, other) == {("1", 0): 1.0, ("1", 1): 3.0} and paired(one, {}) == {}


def test_the_smallest_difference_is_shown_about_as_often_as_said():
    generator = np.random.default_rng(0)
    smallest = smallest_difference(1.5, 5, 0)
    samples = generator.normal(smallest, 1.5, (4000, 5))
    shown = statistics.fmean(float(interval(list(sample), 0).low > 0) for sample in samples)
    assert 0.76 < shown < 0.86
    assert smallest_difference(3.0, 5, 0) == pytest.approx(2 * smallest) and smallest_difference(1.5, 10, 0) < smallest


@pytest.mark.parametrize("name", STUDIES)
def test_studies_are_data(name):
    study = STUDIES[name]
    assert json.loads(json.dumps(study.variants)) == [list(each) for each in study.variants]
    assert {method for method, _ in study.variants} <= set(METHODS) <= set(study.rates)
    method, options = study.variants[study.reference]
    names = {Run(method, "1", 0.1, 0, tuple(each.items())).name for method, each in study.variants}
    assert len(names) == len(study.variants)
    assert set(QUICK) <= set(vars(study)) and set(RATES) == set(METHODS)
    if study.axis is not None:
        # The reference is there at each point.
        points = {each[study.axis] for _, each in study.variants}
        rest = {name: value for name, value in options.items() if name != study.axis}
        assert all((method, {**rest, study.axis: point}) in study.variants for point in points)


def test_what_the_package_does_not_have_is_skipped_with_the_reason():
    assert why_not(SOFT, {"num_slots": 2, "slot_std": 2.0}) is None and why_not("LoRA", {}) is None
    assert "no_such_field" in why_not(SOFT, {"no_such_field": 1})
    assert "`expert_type`" in why_not(SOFT, {"expert_type": "no such form"})
    assert method_options(dict.fromkeys((*DATA_OPTIONS, *OPTIMIZER_OPTIONS, "budget", "num_slots"), 1)) == {
        "num_slots": 1
    }
    assert method_options({"channels": "joined"}) == {"num_channels": 2} and method_options({"channels": "mono"}) == {}
