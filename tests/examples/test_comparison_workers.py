"""The processes that train the runs of a comparison."""

import math

import pytest
import torch
from made_up_runs import clips, made_up, protocol

from examples.method_comparison import records, workers
from examples.method_comparison.methods import SINGLE, SOFT
from examples.method_comparison.training import Run
from examples.method_comparison.workers import Progress, Workers, duration


@pytest.fixture
def cache(tmp_path):
    torch.save(clips().inputs, tmp_path / "made up.pt")
    return tmp_path


def test_the_time_that_is_left():
    progress = Progress(10, processes=2)
    assert progress.left([Run(SOFT, "1", 1.0, 0)]) is None
    for method, seconds in ((SOFT, 10), (SOFT, 20), (SINGLE, 5)):
        progress.add(method, seconds)
    # Soft-MoA takes 15 s, the single adapter 5 s, and the unknown LoRA the mean of both.
    runs = [Run(method, "1", 1.0, 0) for method in (SOFT, SOFT, SINGLE, "LoRA")]
    assert progress.left(runs) == (15 + 15 + 5 + 10) / 2
    assert [duration(seconds) for seconds in (59, 61, 3599, 9900)] == ["59 s", "1 min", "1 h 00 min", "2 h 45 min"]


def test_workers_are_replaced_when_they_die(monkeypatch, cache):
    class Broken:
        def submit(self, *args):
            raise workers.BrokenProcessPool("died")

        def shutdown(self):
            pass

    executors = [Broken(), workers.Here()]
    monkeypatch.setattr(Workers, "_start", lambda self: executors.pop(0))
    monkeypatch.setattr(workers, "carry_out", lambda run: run)
    run = Run(SOFT, "1", 1.0, 0)
    assert Workers(2, {}, clips(), cache).submit(run).result() is run and executors == []


def test_a_process_that_dies_costs_no_run(monkeypatch, cache, capsys):
    """Each run's process dies once, and that of the second one twice."""
    died = []

    def carry_out(run):
        if died.count(run) < (2 if run.rate == 0.2 else 1):
            died.append(run)
            raise workers.BrokenProcessPool("died")
        return made_up(run.method, run.fold, run.rate)

    monkeypatch.setattr(Workers, "_start", lambda self: workers.Here())
    monkeypatch.setattr(workers, "carry_out", carry_out)
    runs, found, study = [Run(SOFT, "1", rate, 0) for rate in (0.1, 0.2, 0.3)], [], cache / "runs.jsonl"
    (failure,) = workers.run_all(runs, Workers(2, {}, clips(), cache), found, study, protocol())
    assert failure == "soft-moa_fold-1_rate-0.2_seed-0: BrokenProcessPool: died"
    assert [record["settings"]["rate"] for record in found] == [0.1, 0.3] and records.load(study) == found
    assert "2 of 3 runs are there." in capsys.readouterr().out


def test_a_record_that_json_does_not_hold_fails_its_run_only(monkeypatch, cache):
    def train(run, *args):
        return made_up(run.method, run.fold, run.rate, test=math.inf if run.rate == 0.2 else 0.5)

    monkeypatch.setattr(workers, "train", train)
    runs, study = [Run(SOFT, "1", rate, 0) for rate in (0.1, 0.2, 0.3)], cache / "runs.jsonl"
    (failure,) = workers.run_all(runs, Workers(1, {}, clips(), cache), [], study, protocol())
    assert failure.startswith("soft-moa_fold-1_rate-0.2_seed-0: ValueError")
    assert [record["settings"]["rate"] for record in records.load(study)] == [0.1, 0.3]
