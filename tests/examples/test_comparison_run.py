"""The command that compares methods, and the runs that it leaves."""

import copy

import pytest
from filelock import FileLock
from made_up_runs import clips, write_clips

from examples.method_comparison import records, training, workers
from examples.method_comparison.ablations import AXES, variants
from examples.method_comparison.comparison import Comparison
from examples.method_comparison.pictures import draw
from examples.method_comparison.records import choose_rate
from examples.method_comparison.report import results
from examples.method_comparison.run import main, parse, plan, protocol_of
from examples.method_comparison.training import METHODS, SINGLE, SOFT, Run

RATES = ["0.001", "0.01"]


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def options(base_folder, clips_folder):
    """A command line, with an output folder and other choices."""

    def make(output, *more, **other):
        given = {
            "dataset": clips_folder,
            "model": base_folder,
            "output_dir": output,
            "epochs": 2,
            "batch_size": 4,
            "budget_percent": 20,
            "processes": 1,
            **other,
        }
        rates = ["--rates", *RATES]
        return [part for name, value in given.items() for part in (f"--{name}", str(value))] + rates + list(more)

    return make


TWO = ["--methods", "single-adapter", "soft-moa", "--folds", "1", "2", "--seeds", "0", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, options):
    """A folder with all runs of two methods, two folds and two seeds."""
    output = tmp_path_factory.mktemp("finished")
    assert main(options(output, *TWO)) == 0
    return output


@pytest.fixture
def found(finished):
    return records.load(finished / "runs.jsonl")


def without_times(record):
    """What a run has to give again."""
    kept = copy.deepcopy(record)
    for name in ("environment", "step_seconds", "forward_1_seconds", "run_seconds"):
        del kept[name]
    del kept["epochs"]["seconds"]
    return kept


def by_name(folder):
    """The records of a folder's study, by the name of their run."""
    found = records.load(folder / "runs.jsonl")
    settings = [record["settings"] for record in found]
    runs = [Run(*(each[name] for name in ("method", "fold", "rate", "seed"))) for each in settings]
    assert len(set(runs)) == len(runs)
    return {run.name: record for run, record in zip(runs, found)}


def test_each_run_is_one_line(finished, found):
    chosen = {
        (method, fold): choose_rate(found, method, fold, [0.001, 0.01]) for method in (SINGLE, SOFT) for fold in "12"
    }
    expected = {Run(method, fold, float(rate), 0).name for method, fold in chosen for rate in RATES}
    expected |= {Run(method, fold, rate, 1).name for (method, fold), rate in chosen.items()}
    assert len(expected) == 12 and "soft-moa_fold-1_rate-0.001_seed-0" in expected
    assert by_name(finished).keys() == expected and (finished / "runs.jsonl").read_text().count("\n") == 13
    assert {path.name for path in finished.glob("*.png")} == {"accuracy.png", "epochs.png", "step-time.png"}


def test_what_a_record_holds(found):
    for record in found:
        settings, epochs = record["settings"], record["epochs"]
        assert settings["validation_fold"] == {"1": "2", "2": "3"}[settings["fold"]]
        assert all(len(values) == 2 for values in epochs.values())
        # Clips of the folder: six for each fold, the low ones first.
        first = 6 * (int(settings["fold"]) - 1)
        assert record["test_clips"] == list(range(first, first + 6))
        truth = [1, 1, 1, 0, 0, 0]  # "high" is class 0
        right = [one == other for one, other in zip(record["test_predictions"], truth)]
        assert record["test_accuracy"] == sum(right) / 6
        assert 0.5 * settings["budget"] < record["parameters"] <= settings["budget"]
        assert record["head_parameters"] == 2 * 32 + 32 * 2 + 2
        assert record["step_seconds"] > 0 and record["forward_1_seconds"] > 0 and record["memory_bytes"] > 0
        assert {"device", "threads", "torch", "processes"} <= record["environment"].keys()
        assert record["environment"]["threads"] == 1
        experts = 7 if settings["method"] == SOFT else None
        assert [block["experts"] for block in record.get("experts", ())] == ([7, 7] if experts else [])


def test_nothing_runs_twice(finished, options, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.suffix != ".pt"}
    monkeypatch.setattr(workers, "train", lambda *args: pytest.fail("ran again"))
    monkeypatch.setattr(training, "ExtractFeatures", lambda *args, **kwargs: pytest.fail("extracted again"))
    assert main(options(finished, *TWO)) == 0
    assert "12 of 12 runs are there." in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in before}


def test_a_run_that_was_cut_off_is_run_again_and_gives_the_same(finished, options, tmp_path):
    """The process was killed in the last line."""
    content = (finished / "runs.jsonl").read_bytes()
    (tmp_path / "runs.jsonl").write_bytes(content[:-100])
    assert main(options(tmp_path, *TWO)) == 0
    again, before = by_name(tmp_path), by_name(finished)
    assert list(again) == list(before)
    *_, name = before
    assert without_times(again.pop(name)) == without_times(before.pop(name)) and again == before
    assert (tmp_path / "runs.jsonl").read_bytes().startswith(content[: content.rindex(b"\n", 0, -100)])


def test_only_one_process_writes(finished, options, capsys):
    with FileLock(finished / "cache" / "lock"):
        assert main(options(finished, *TWO)) == 2
    assert "runs.jsonl is being written by another process" in capsys.readouterr().err


@pytest.mark.parametrize("name, was, now", [("epochs", 2, 3), ("batch_size", 4, 5), ("budget_percent", None, 30)])
def test_other_settings_are_refused_by_name(finished, options, capsys, name, was, now):
    assert main(options(finished, *TWO, **{name: now})) == 2
    expected = "budget was " if name == "budget_percent" else f"{name} was {was} and is {now}"
    assert expected in capsys.readouterr().err


def test_runs_of_a_gpu_are_not_added_to_those_of_a_cpu(found, options, tmp_path):
    arguments = parse(options(tmp_path))
    arguments.device = "cuda"
    protocol = protocol_of(arguments, clips())
    with pytest.raises(ValueError, match="device was None and is 'cuda'"):
        records.check_settings(records.common_settings(found[0]), protocol, "runs")


def test_a_failed_run_is_reported_and_the_others_go_on(options, tmp_path, monkeypatch, capsys):
    def fail(model, budget):
        raise RuntimeError("no such method")

    monkeypatch.setitem(METHODS, SOFT, fail)
    arguments = ["--methods", "single-adapter", "soft-moa", "--folds", "1", "--seeds", "0", "1"]
    assert main(options(tmp_path, *arguments, epochs=1)) == 1
    printed = capsys.readouterr()
    assert "soft-moa_fold-1_rate-0.001_seed-0: RuntimeError: no such method" in printed.err
    assert "Soft-MoA, fold 1, seed 1: no rate can be chosen" in printed.err
    assert "3 of 6 runs are there." in printed.out
    assert {record["settings"]["method"] for record in records.load(tmp_path / "runs.jsonl")} == {SINGLE}
    assert "| single adapter | " in (tmp_path / "RESULTS.md").read_text()


def test_processes_give_the_same_records(options, tmp_path, finished):
    # Both rates of one method and fold, at the same time.
    assert main(options(tmp_path, "--methods", "soft-moa", "--folds", "2", "--seeds", "0", processes=2)) == 0
    others, here = by_name(tmp_path), by_name(finished)
    assert others.keys() == {Run(SOFT, "2", float(rate), 0).name for rate in RATES}
    for name, record in others.items():
        assert without_times(record) == without_times(here[name])


def test_the_order_of_runs(options, tmp_path):
    arguments = parse(options(tmp_path, "--methods", "lora", "soft-moa"))
    runs = plan(arguments, clips())
    assert len(runs) == 2 * 3 * (2 + 2)
    order = [(run.seed, run.fold, run.rate, run.method) for run in runs]
    # All that choose a rate come first, and then one seed after the other.
    assert order == [
        *((0, fold, rate, method) for fold in "123" for rate in (0.001, 0.01) for method in ("LoRA", SOFT)),
        *((seed, fold, None, method) for seed in (1, 2) for fold in "123" for method in ("LoRA", SOFT)),
    ]
    arguments.folds = ["4"]
    with pytest.raises(ValueError, match="--folds 4: the folds are 1, 2, 3"):
        plan(arguments, clips())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a --dataset"),
        (["--dataset", "x", "--seeds", "1"], "--seeds needs 0"),
        (["--dataset", "x", "--epochs", "0"], "--epochs must be positive, got 0"),
        (["--dataset", "x", "--rates", "0.1", "-1"], "--rates must be positive"),
        (["--dataset", "x", "--quick", "--ablations"], "exclude each other"),
        (["--dataset", "x", "--ablations", "--methods", "lora"], "varies soft-moa only"),
        (["--dataset", "x", "--model", "missing"], "has no model.safetensors"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_the_quick_run_is_one_fold_one_seed_and_four_methods(options, tmp_path):
    arguments = parse([*options(tmp_path, "--quick")])
    runs = plan(arguments, clips())
    assert len(runs) == 4 * len(RATES) and {(run.fold, run.seed) for run in runs} == {("1", 0)}


def test_the_choice_of_the_rate_does_not_see_the_tested_fold(found):
    expected = {
        (method, fold): choose_rate(found, method, fold, [0.001, 0.01]) for method in (SINGLE, SOFT) for fold in "12"
    }
    assert None not in expected.values()
    altered = copy.deepcopy(found)
    for record in altered:
        # What was not chosen becomes perfect on the tested fold.
        settings = record["settings"]
        is_chosen = settings["rate"] == expected[settings["method"], settings["fold"]]
        record["test_accuracy"], record["test_loss"] = (0.0, 9.0) if is_chosen else (1.0, 0.0)
        record["test_predictions"] = [0] * 6
    assert expected == {key: choose_rate(altered, *key, [0.001, 0.01]) for key in expected}
    for record in altered:
        settings = record["settings"]
        is_chosen = settings["rate"] == expected[settings["method"], settings["fold"]]
        record["epochs"]["validation_accuracy"][-1] = 0.0 if is_chosen else 1.0
    opposite = {key: choose_rate(altered, *key, [0.001, 0.01]) for key in expected}
    assert all(opposite[key] not in (None, expected[key]) for key in expected)


def test_results_come_again_byte_for_byte(finished, found, tmp_path):
    names = ["RESULTS.md", "accuracy.png", "epochs.png", "step-time.png"]
    before = {name: (finished / name).read_bytes() for name in names}
    assert main(["--report_only", "--output_dir", str(finished)]) == 0
    assert before == {name: (finished / name).read_bytes() for name in names}
    assert draw(found, tmp_path) == names[1:]
    assert before["RESULTS.md"].decode() == results(found, names)
    assert all(before[name].startswith(b"\x89PNG") for name in names[1:])


def test_without_records_there_is_no_report(tmp_path, capsys):
    assert main(["--report_only", "--output_dir", str(tmp_path)]) == 2
    assert "has no records" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_ablations(options, tmp_path):
    arguments = options(tmp_path, "--ablations", "--folds", "1", epochs=1, budget_percent=60)
    assert main(arguments) == 0
    found = records.load(tmp_path / "runs.jsonl")
    assert len(found) == len(RATES) + len(variants())
    (rate,) = {record["settings"]["rate"] for record in found if record["settings"]["options"]}
    assert rate == choose_rate(found, SOFT, "1", [0.001, 0.01])
    text = (tmp_path / "RESULTS.md").read_text()
    for axis in AXES:
        assert f"### {axis.title[0].upper()}{axis.title[1:]}" in text
        for label, each in axis.values.items():
            assert f"\n| {label} | " in text
            (record,) = Comparison(found).runs(SOFT, **each).values()
            assert 0.4 * record["settings"]["budget"] < record["parameters"] <= record["settings"]["budget"]
    assert "![ablations](ablations.png)" in text and (tmp_path / "ablations.png").exists()
