"""The records of a comparison, and the learning rate that they choose."""

import json
import math

import pytest
from made_up_runs import made_up

from examples.method_comparison import records
from examples.method_comparison.records import choose_rate
from examples.method_comparison.training import SINGLE, SOFT


def test_files_that_disagree_are_refused(tmp_path):
    for index, epochs in enumerate((2, 3)):
        record = made_up(SOFT)
        record["settings"]["epochs"] = epochs
        records.write(tmp_path / f"{index}.json", record)
    with pytest.raises(ValueError, match=r"1\.json and .*0\.json: the settings differ: epochs was 3 and is 2"):
        records.load(tmp_path)
    (tmp_path / "0.json").write_text('{"settings"')
    with pytest.raises(ValueError, match=r"0\.json is no record of a run"):
        records.load(tmp_path)


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "record.json"
    records.write(path, {"a": [1.5, None]})
    with pytest.raises(ValueError):
        records.write(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": [1.5, None]} and list(tmp_path.iterdir()) == [path]


def test_the_choice_among_equals_and_without_all_runs():
    runs = [made_up(SOFT, rate=rate, loss=loss) for rate, loss in ((0.1, 0.7), (0.2, 0.6), (0.3, None))]
    assert choose_rate(runs, SOFT, "1", [0.1, 0.2, 0.3]) == 0.2
    assert choose_rate(runs, SOFT, "1", [0.1, 0.3]) == 0.1
    assert choose_rate(runs, SOFT, "1", [0.1, 0.4]) is None
    assert choose_rate(runs, SOFT, "2", [0.1]) is None and choose_rate(runs, SINGLE, "1", [0.1]) is None
    # Neither other seeds nor ablations take part.
    runs += [made_up(SOFT, rate=0.1, validation=1.0, seed=1)]
    runs += [made_up(SOFT, rate=0.1, validation=1.0, options={"num_experts": 2})]
    assert choose_rate(runs, SOFT, "1", [0.1, 0.2, 0.3]) == 0.2
