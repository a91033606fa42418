"""The command that carries out studies, and the runs that it leaves."""

import copy
import json

import pytest
from filelock import FileLock
from made_up_runs import clips, protocol, write_clips

from examples.method_comparison import data, records, workers
from examples.method_comparison.methods import METHODS, PROBE, SINGLE, SOFT, paper_budget
from examples.method_comparison.models import Classes
from examples.method_comparison.records import choose_rate
from examples.method_comparison.run import main, parse, plan, protocol_of, study_of
from examples.method_comparison.training import Run
from peft_softmoa import SoftMoAConfig, describe_targets

RATES = [0.001, 0.01]


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def options(base_folder, clips_folder, tmp_path_factory):
    """A command line, with an output folder and other choices."""
    cache = tmp_path_factory.mktemp("cache")

    def make(output, *more, **other):
        given = {
            "dataset": clips_folder,
            "model": base_folder,
            "output_dir": output,
            "cache": cache,
            "epochs": 2,
            "batch_size": 4,
            "budget": 2000,
            "processes": 1,
            **other,
        }
        rates = ["--rates", *map(str, RATES)]
        return (
            ["demo"]
            + [part for name, value in given.items() for part in (f"--{name}", str(value))]
            + rates
            + list(more)
        )

    return make


TWO = ["--methods", "single-adapter", "soft-moa", "--folds", "1", "2", "--seeds", "2"]


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
    del kept["progress"]["seconds"]
    return kept


def by_name(folder):
    """The records of a folder's study, by the name of their run."""
    found = records.load(folder / "runs.jsonl")
    settings = [record["settings"] for record in found]
    runs = [
        Run(*(each[name] for name in ("method", "fold", "rate", "seed")), tuple(each["options"].items()))
        for each in settings
    ]
    assert len(set(runs)) == len(runs)
    return {run.name: record for run, record in zip(runs, found)}


def test_each_run_is_one_line(finished, found, base_folder):
    expected = set()
    for method in (SINGLE, SOFT):
        # The first fold chooses for all.
        rate = choose_rate(found, method, {}, "1", RATES)
        expected |= {Run(method, "1", each, 0).name for each in RATES}
        expected |= {Run(method, fold, rate, seed).name for fold, seed in (("2", 0), ("1", 1), ("2", 1))}
    assert len(expected) == 10 and "soft-moa_fold-1_rate-0.001_seed-0" in expected
    assert by_name(finished).keys() == expected and (finished / "runs.jsonl").read_text().count("\n") == 11
    assert str(base_folder) not in (finished / "runs.jsonl").read_text()


def test_what_a_record_holds(found):
    for record in found:
        settings, progress = record["settings"], record["progress"]
        assert all(len(values) == 2 for values in progress.values()) and progress["epoch"] == [1, 2]
        assert 6 * record["test"] == pytest.approx(round(6 * record["test"]))
        assert 0.5 * settings["budget"] < record["parameters"] <= settings["budget"]
        assert record["head_parameters"] == 2 * 32 + 32 * 2 + 2 and record["training_clips"] == 6
        assert record["step_seconds"] > 0 and record["forward_1_seconds"] > 0 and record["memory_bytes"] > 0
        assert {"device", "threads", "torch", "processes"} <= record["environment"].keys()
        assert record["environment"]["threads"] == 1
        assert ("routing" in record) == (settings["method"] == SOFT)


def test_nothing_runs_twice(finished, options, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    monkeypatch.setattr(workers, "train", lambda *args: pytest.fail("ran again"))
    monkeypatch.setattr(data, "extract_features", lambda *args: pytest.fail("extracted again"))
    assert main(options(finished, *TWO)) == 0
    assert "10 of 10 runs are there." in capsys.readouterr().out
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
    with FileLock(finished / ".lock"):
        assert main(options(finished, *TWO)) == 2
    assert "runs.jsonl is being written by another process" in capsys.readouterr().err


@pytest.mark.parametrize("name, was, now", [("epochs", 2, 3), ("batch_size", 4, 5), ("budget", 2000, 3000)])
def test_other_settings_are_refused_by_name(finished, options, capsys, name, was, now):
    assert main(options(finished, *TWO, **{name: now})) == 2
    assert f"{name} was {was} and is {now}" in capsys.readouterr().err


def test_runs_of_a_gpu_are_not_added_to_those_of_a_cpu(found, options, base_folder, tmp_path):
    arguments = parse(options(tmp_path))
    arguments.device = "cuda"
    given = protocol_of(arguments, study_of(arguments), clips(), Classes(str(base_folder), ["high", "low"]).load())
    with pytest.raises(ValueError, match="device was None and is 'cuda'"):
        records.check_settings(records.common_settings(found[0]), given, "runs")


def test_the_budget_is_the_papers(base_folder):
    model = Classes(str(base_folder), ["high", "low"]).load()
    # 7 experts of width 1 and 7 slots, in two layers.
    assert paper_budget(model) == 2 * (7 * (32 + 1 + 32 + 32) + 32 * 7)
    assert describe_targets(model, SoftMoAConfig(r=1)).parameters > paper_budget(model)


def test_a_failed_run_is_reported_and_the_others_go_on(options, tmp_path, monkeypatch, capsys):
    def fail(model, budget, **options):
        raise RuntimeError("no such method")

    monkeypatch.setitem(METHODS, SOFT, fail)
    arguments = ["--methods", "single-adapter", "soft-moa", "--folds", "1", "--seeds", "2"]
    assert main(options(tmp_path, *arguments, epochs=1)) == 1
    printed = capsys.readouterr()
    assert "soft-moa_fold-1_rate-0.001_seed-0: RuntimeError: no such method" in printed.err
    assert "soft-moa_fold-1_rate-0_seed-1: no rate can be chosen" in printed.err
    assert "3 of 6 runs are there." in printed.out
    assert {record["settings"]["method"] for record in records.load(tmp_path / "runs.jsonl")} == {SINGLE}
    assert "| single adapter | " in (tmp_path / "RESULTS.md").read_text()


def test_processes_give_the_same_records(options, tmp_path, finished):
    # Both rates of one method and fold, at the same time.
    assert main(options(tmp_path, "--methods", "soft-moa", "--folds", "1", "--seeds", "1", processes=2)) == 0
    others, here = by_name(tmp_path), by_name(finished)
    assert others.keys() == {Run(SOFT, "1", rate, 0).name for rate in RATES}
    for name, record in others.items():
        assert without_times(record) == without_times(here[name])


def test_the_order_of_runs(options, tmp_path):
    arguments = parse(options(tmp_path, "--methods", "lora", "soft-moa", "--seeds", "2"))
    given = protocol(rates=dict.fromkeys(METHODS, RATES))
    runs = plan(arguments, study_of(arguments), given)
    # All that choose a rate come first, and then one seed after the other.
    assert [(run.seed, run.fold, run.rate, run.method) for run in runs] == [
        *((0, "1", rate, method) for method in ("LoRA", SOFT) for rate in RATES),
        *((0, fold, None, method) for fold in "23" for method in ("LoRA", SOFT)),
        *((1, fold, None, method) for fold in "123" for method in ("LoRA", SOFT)),
    ]
    arguments.folds = ["4"]
    with pytest.raises(ValueError, match="--folds 4: the folds are 1, 2, 3"):
        plan(arguments, study_of(arguments), given)


def test_what_cannot_be_made_is_skipped_and_said(options, tmp_path, capsys, monkeypatch):
    arguments = parse(options(tmp_path, "--methods", "soft-moa", "conformer"))
    monkeypatch.setattr("examples.method_comparison.run.why_not", lambda method, _: "why" if "C" in method else None)
    runs = plan(arguments, study_of(arguments), protocol(rates=dict.fromkeys(METHODS, RATES)))
    assert {run.method for run in runs} == {SOFT} and "Skipped: Conformer : why" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no-such-study"], "invalid choice"),
        (["demo"], "give a --dataset, or set SOFTMOA_ESC10"),
        (["demo", "--dataset", "x", "--epochs", "0"], "--epochs must be positive, got 0"),
        (["demo", "--dataset", "x", "--rates", "0.1", "-1"], "--rates must be positive"),
        (["demo", "--dataset", "x", "--speakers", "2", "0"], "--speakers must be positive"),
    ],
)
def test_bad_arguments(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("SOFTMOA_ESC10", raising=False)
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_few_clips_and_speakers(options, tmp_path):
    arguments = parse(options(tmp_path, "--methods", "lora", "--clips_per_class", "1", "2"))
    study = study_of(arguments)
    assert study.variants == [("LoRA", {"clips_per_class": number}) for number in (1, 2)]
    assert study.axis == "clips_per_class"
    arguments = parse(["commands", "--dataset", "x", "--speakers", "3", "--methods", "soft-moa"])
    assert study_of(arguments).variants == [(SOFT, {"speakers": 3})]


def test_the_quick_study(options, tmp_path):
    study = study_of(parse(["esc50", "--dataset", "x", "--quick"]))
    assert len(study.variants) == 4 and {PROBE, SINGLE, SOFT} < set(dict(study.variants))
    assert study.epochs == 2 and study.folds == 1 and all(len(each) == 1 for each in study.rates.values())


def test_results_come_again_byte_for_byte(finished):
    names = ["RESULTS.md", "results.png"]
    before = {name: (finished / name).read_bytes() for name in names}
    assert main(["demo", "--report_only", "--output_dir", str(finished)]) == 0
    assert before == {name: (finished / name).read_bytes() for name in names}


def test_without_records_there_is_no_report(tmp_path, capsys):
    assert main(["demo", "--report_only", "--output_dir", str(tmp_path)]) == 2
    assert "has no records" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_times_are_taken_in_turn(finished, options, tmp_path):
    (tmp_path / "runs.jsonl").write_bytes((finished / "runs.jsonl").read_bytes())
    assert main(options(tmp_path, *TWO, "--time", "2")) == 0
    found = json.loads((tmp_path / "times.json").read_text())
    assert [each["method"] for each in found["methods"]] == [SINGLE, SOFT]
    assert all(len(each[name]) == 2 for each in found["methods"] for name in ("step_seconds", "forward_1_seconds"))
    assert "step of 4, ms" in (tmp_path / "RESULTS.md").read_text()


def test_a_plan_runs_nothing(options, tmp_path, capsys):
    assert main(options(tmp_path / "out", *TWO, "--plan")) == 0
    assert "10 runs, within 2,000 parameters" in capsys.readouterr().out and not (tmp_path / "out").exists()
