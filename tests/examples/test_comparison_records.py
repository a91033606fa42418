"""The records of a comparison, and the learning rate that they choose."""

import json
import math

import pytest
from made_up_runs import made_up

from examples.method_comparison import records
from examples.method_comparison.methods import SINGLE, SOFT
from examples.method_comparison.records import choose_rate, chosen_rate
from examples.method_comparison.training import Run


def study():
    """Runs of two environments, and one of an ablation."""
    runs = [
        made_up(SOFT, rate=rate, options=options) for rate, options in ((0.1, {}), (0.2, {}), (0.1, {"scaling": 4.0}))
    ]
    runs[1]["environment"]["torch"] = "3"
    return runs


def test_what_runs_share_is_written_once(tmp_path):
    path, runs = tmp_path / "study" / "runs.jsonl", study()
    assert records.load(path) == []
    records.write(path, runs)
    # The same fields in the same order.
    assert json.dumps(records.load(path)) == json.dumps([ordered(record) for record in runs])
    shared, *lines = map(json.loads, path.read_text().splitlines())
    assert shared["settings"] == records.common_settings(runs[0])
    assert [each["torch"] for each in shared["environments"]] == ["2", "3"]
    assert [line["environment"] for line in lines] == [0, 1, 0]
    assert lines[2]["settings"] == {"method": SOFT, "options": {"scaling": 4.0}, "fold": "1", "rate": 0.1, "seed": 0}


def ordered(record):
    """A record with the settings that all runs share in front of its own."""
    own = {name: value for name, value in record["settings"].items() if name in records.OWN}
    return {**record, "settings": {**records.common_settings(record), **own}}


def test_every_beginning_of_a_file_has_the_runs_whose_lines_are_whole(tmp_path):
    path, runs = tmp_path / "runs.jsonl", study()
    records.write(path, runs)
    content = path.read_bytes()
    for size in range(0, len(content) + 1, 7):
        path.write_bytes(content[:size])
        assert records.load(path) == runs[: max(0, content[:size].count(b"\n") - 1)]


def test_other_lines_are_refused_by_number(tmp_path):
    path = tmp_path / "runs.jsonl"
    records.write(path, study())
    lines = path.read_text().splitlines(keepends=True)
    for bad in ("{\n", "[]\n", '{"settings": {}}\n', lines[1].replace('"environment": 0', '"environment": 2')):
        path.write_text("".join([*lines[:2], bad, *lines[3:]]))
        with pytest.raises(ValueError, match=r"runs\.jsonl, line 3: this is no record of a run"):
            records.load(path)
    path.write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 1: this is no record"):
        records.load(path)


def test_a_study_is_written_whole_or_not_at_all(tmp_path):
    path, runs = tmp_path / "runs.jsonl", study()
    records.write(path, runs)
    other = made_up(SOFT, rate=0.3)
    other["settings"] = other["settings"] | {"epochs": 3}
    with pytest.raises(ValueError, match=r"the runs of .*runs\.jsonl: the settings differ: epochs was 3 and is 2"):
        records.write(path, [*runs, other])
    with pytest.raises(ValueError):
        records.write(path, [*runs, made_up(SOFT, rate=0.3, test=math.nan)])
    assert records.load(path) == runs and list(tmp_path.iterdir()) == [path]


def test_the_choice_among_equals_and_without_all_runs():
    runs = [made_up(SOFT, rate=rate, loss=loss) for rate, loss in ((0.1, 0.7), (0.2, 0.6), (0.3, None))]
    assert choose_rate(runs, SOFT, {}, "1", [0.1, 0.2, 0.3]) == 0.2
    assert choose_rate(runs, SOFT, {}, "1", [0.1, 0.3]) == 0.1
    assert choose_rate(runs, SOFT, {}, "1", [0.1, 0.4]) is None
    assert choose_rate(runs, SOFT, {}, "2", [0.1]) is None and choose_rate(runs, SINGLE, {}, "1", [0.1]) is None
    # Neither other seeds nor other options take part.
    runs += [made_up(SOFT, rate=0.1, validation=1.0, seed=1)]
    runs += [made_up(SOFT, rate=0.1, validation=1.0, options={"num_experts": 2})]
    assert choose_rate(runs, SOFT, {}, "1", [0.1, 0.2, 0.3]) == 0.2
    assert choose_rate(runs, SOFT, {"num_experts": 2}, "1", [0.1]) == 0.1
    # Nor does the tested fold.
    for record in runs:
        record["test"] = 1.0 if record["settings"]["rate"] == 0.3 else 0.0
    assert choose_rate(runs, SOFT, {}, "1", [0.1, 0.2, 0.3]) == 0.2
    runs[0]["progress"]["validation"][-1] = 0.4
    assert choose_rate(runs, SOFT, {}, "1", [0.1, 0.2], more_is_better=False) == 0.1


def test_other_folds_take_the_rate_of_the_first():
    runs = [made_up(SOFT, rate=rate, validation=score) for rate, score in ((0.1, 0.3), (0.2, 0.6))]
    runs += [made_up(SOFT, "2", rate=rate, validation=score) for rate, score in ((0.1, 0.7), (0.2, 0.6))]
    given = {"rate_folds": ["1"], "rates": {SOFT: [0.1, 0.2]}, "metric": "accuracy"}
    assert [chosen_rate(runs, given, Run(SOFT, fold, None, 1)) for fold in "123"] == [0.2, 0.2, 0.2]
    given["rate_folds"] = ["1", "2"]
    assert [chosen_rate(runs, given, Run(SOFT, fold, None, 1)) for fold in "123"] == [0.2, 0.1, 0.2]
