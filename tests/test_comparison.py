"""The comparison of methods: what is run, what is chosen by what, and what is said of it."""

import copy
import json
import math
import re
from functools import partial

import compare_methods
import matplotlib.image
import pytest
import torch
from compare_methods import HERE, Progress, Workers, main, parse, plan, protocol_of
from comparison import records, training
from comparison.ablations import AXES, variants
from comparison.intervals import T_QUANTILES, Estimate, interval
from comparison.pictures import draw
from comparison.records import choose_rate
from comparison.results import (
    Comparison,
    by_fold,
    contrast,
    difference_in_words,
    duration,
    estimate,
    paired,
    results,
    show,
)
from comparison.training import (
    METHODS,
    PROBE,
    SINGLE,
    SOFT,
    UNBUDGETED,
    Data,
    Run,
    is_slots,
    load_model,
    validation_fold,
)
from conftest import write_tone

from peft_softmoa.inspection import expert_report
from peft_softmoa.training import AudioError

RATES = ["0.001", "0.01"]
COMMITTED = HERE / "comparison"


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory):
    """Low and high tones in three folds."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["file_name,label,fold"]
    for fold in (1, 2, 3):
        for label, pitch in (("low", 200), ("high", 2000)):
            for index in range(3):
                name = f"{fold}-{label}-{index}.wav"
                write_tone(folder / name, pitch * (1 + (3 * fold + index) / 20))
                lines.append(f"{name},{label},{fold}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


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
    return records.load(finished / "runs")


def clips(size=18, folds=3):
    """Data that no file is needed for."""
    generator = torch.Generator().manual_seed(0)
    names = [str(index % folds + 1) for index in range(size)]
    labels = torch.arange(size) // folds % 2
    return Data(torch.randn(size, 64, 128, generator=generator), labels, names, ["high", "low"], "made up")


def without_times(record):
    """What a run has to give again."""
    kept = copy.deepcopy(record)
    for name in ("environment", "step_seconds", "forward_1_seconds", "run_seconds"):
        del kept[name]
    del kept["epochs"]["seconds"]
    return kept


# --- runs ---------------------------------------------------------------------------------------------------------


def test_each_run_is_one_file(finished, found):
    chosen = {
        (method, fold): choose_rate(found, method, fold, [0.001, 0.01]) for method in (SINGLE, SOFT) for fold in "12"
    }
    expected = {Run(method, fold, float(rate), 0).name for method, fold in chosen for rate in RATES}
    expected |= {Run(method, fold, rate, 1).name for (method, fold), rate in chosen.items()}
    assert len(expected) == 12 and "soft-moa_fold-1_rate-0.001_seed-0" in expected
    assert {path.stem for path in (finished / "runs").iterdir()} == expected
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
    monkeypatch.setattr(compare_methods, "train", lambda *args: pytest.fail("ran again"))
    monkeypatch.setattr(training, "ExtractFeatures", lambda *args, **kwargs: pytest.fail("extracted again"))
    assert main(options(finished, *TWO)) == 0
    assert "12 of 12 runs are there." in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in before}


def test_a_missing_run_is_run_again_and_gives_the_same(finished, options, tmp_path):
    name = Run(SOFT, "2", 0.01, 0).name
    for path in (finished / "runs").iterdir():
        if path.stem != name:
            records.write(tmp_path / "runs" / path.name, json.loads(path.read_text()))
    assert main(options(tmp_path, *TWO)) == 0
    again, before = (json.loads((folder / "runs" / f"{name}.json").read_text()) for folder in (tmp_path, finished))
    assert without_times(again) == without_times(before)


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


def test_files_that_disagree_are_refused(found, tmp_path):
    for index, epochs in enumerate((2, 3)):
        record = copy.deepcopy(found[0])
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
    assert {path.name[:14] for path in (tmp_path / "runs").iterdir()} == {"single-adapter"}
    assert "| single adapter | " in (tmp_path / "RESULTS.md").read_text()


def test_processes_give_the_same_records(options, tmp_path, finished):
    # Both rates of one method and fold, at the same time.
    assert main(options(tmp_path, "--methods", "soft-moa", "--folds", "2", "--seeds", "0", processes=2)) == 0
    names = [Run(SOFT, "2", float(rate), 0).name for rate in RATES]
    assert {path.stem for path in (tmp_path / "runs").iterdir()} == set(names)
    for name in names:
        other, here = (json.loads((folder / "runs" / f"{name}.json").read_text()) for folder in (tmp_path, finished))
        assert without_times(other) == without_times(here)


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


def test_the_time_that_is_left():
    progress = Progress(10, processes=2)
    assert progress.left([Run(SOFT, "1", 1.0, 0)]) is None
    for method, seconds in ((SOFT, 10), (SOFT, 20), (SINGLE, 5)):
        progress.add(method, seconds)
    # Soft-MoA takes 15 s, the single adapter 5 s, and the unknown LoRA the mean of both.
    runs = [Run(method, "1", 1.0, 0) for method in (SOFT, SOFT, SINGLE, "LoRA")]
    assert progress.left(runs) == (15 + 15 + 5 + 10) / 2
    assert [duration(seconds) for seconds in (59, 61, 3599, 9900)] == ["59 s", "1 min", "1 h 00 min", "2 h 45 min"]


def test_workers_are_replaced_when_they_die(monkeypatch, tmp_path):
    class Broken:
        def submit(self, *args):
            raise compare_methods.BrokenProcessPool("died")

        def shutdown(self):
            pass

    executors = [Broken(), compare_methods.Here()]
    monkeypatch.setattr(Workers, "_start", lambda self: executors.pop(0))
    monkeypatch.setattr(compare_methods, "carry_out", lambda run: run)
    run = Run(SOFT, "1", 1.0, 0)
    workers = Workers(2, {}, tmp_path, clips(), tmp_path)
    assert workers.submit(run).result() is run and executors == []


def test_a_process_that_dies_costs_no_run(monkeypatch, tmp_path, capsys):
    """Each run's process dies once, and that of the second one twice."""
    died = []

    def carry_out(run):
        if died.count(run) < (2 if run.rate == 0.2 else 1):
            died.append(run)
            raise compare_methods.BrokenProcessPool("died")
        return made_up(run.method, run.fold, run.rate)

    monkeypatch.setattr(Workers, "_start", lambda self: compare_methods.Here())
    monkeypatch.setattr(compare_methods, "carry_out", carry_out)
    runs, found = [Run(SOFT, "1", rate, 0) for rate in (0.1, 0.2, 0.3)], []
    (failure,) = compare_methods.run_all(runs, Workers(2, {}, tmp_path, clips(), tmp_path), found, {"rates": [0.1]})
    assert failure == "soft-moa_fold-1_rate-0.2_seed-0: BrokenProcessPool: died"
    assert [record["settings"]["rate"] for record in found] == [0.1, 0.3]
    assert "2 of 3 runs are there." in capsys.readouterr().out


# --- data ---------------------------------------------------------------------------------------------------------


def test_features_are_those_of_their_clips(clips_folder, base_folder, tmp_path):
    data = training.load_data(str(clips_folder), base_folder, tmp_path)
    assert data.inputs.shape == (18, 64, 128) and data.label_names == ["high", "low"]
    assert data.fold_names == ["1", "2", "3"] and data.folds == [fold for fold in "123" for _ in range(6)]
    assert data.labels.tolist() == [1, 1, 1, 0, 0, 0] * 3
    # High tones have their energy in higher bins.
    peaks = data.inputs[:, :40].mean(1).argmax(1)
    assert peaks[data.labels == 0].min() > peaks[data.labels == 1].max()
    (cached,) = tmp_path.glob("*.pt")
    assert cached.stem == data.digest and (tmp_path / ".gitignore").read_text() == "*\n"


def test_other_content_is_other_data(base_folder, tmp_path):
    def write(folder, pitch, folds=(1, 2, 3)):
        folder.mkdir()
        lines = ["file_name,label,fold"]
        for fold in folds:
            write_tone(folder / f"{fold}.wav", pitch)
            lines.append(f"{fold}.wav,tone,{fold}")
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
        return str(folder)

    load = partial(training.load_data, model=base_folder, cache=tmp_path / "cache")
    one, same, other = (load(write(tmp_path / name, pitch)) for name, pitch in (("a", 300), ("b", 300), ("c", 301)))
    assert one.digest == same.digest != other.digest
    with pytest.raises(ValueError, match="need three"):
        load(write(tmp_path / "d", 300, folds=(1, 2)))
    (tmp_path / "a" / "2.wav").write_bytes(b"no audio")
    with pytest.raises(AudioError, match=r"2\.wav"):
        load(str(tmp_path / "a"))


def test_the_next_fold_validates():
    assert [validation_fold(fold, ["1", "2", "10"]) for fold in ("1", "2", "10")] == ["2", "10", "1"]
    folds = ["10", "2", "1"]
    assert clips(3)._replace(folds=folds).fold_names == ["1", "2", "10"]


# --- methods ------------------------------------------------------------------------------------------------------


def prepared(base_folder, method, budget=4000, seed=0, **options):
    torch.manual_seed(seed)
    model = METHODS[method](load_model(base_folder, 2), budget, **options)
    return model, {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_what_each_method_trains(base_folder, method):
    model, trained = prepared(base_folder, method)
    head = {name for name, _ in model.named_parameters() if name.startswith("classifier.")}
    everything = {name for name, _ in model.named_parameters()}
    number = sum(each.numel() for name, each in model.named_parameters() if name in trained - head)
    assert len(head) == 4 and head <= trained
    if method == PROBE:
        assert trained == head
    elif method == "full fine-tuning":
        assert trained == everything
    elif method == "BitFit":
        assert trained == head | {name for name in everything if name.endswith("bias")}
    elif method == "IA³":
        # A factor for each key, value and inner activation, of two layers.
        assert number == 2 * (32 + 32 + 64)
    else:
        assert 0.75 * 4000 < number <= 4000
    assert (number <= 4000) or method in UNBUDGETED
    model(torch.randn(2, 64, 128), labels=torch.arange(2)).loss.backward()
    assert trained == {name for name, each in model.named_parameters() if each.grad is not None}


def test_logits_are_read_from_the_mean_of_all_tokens(base_folder):
    model, _ = prepared(base_folder, PROBE)
    values = torch.randn(2, 64, 128)
    tokens = model.audio_spectrogram_transformer(values).last_hidden_state
    torch.testing.assert_close(model(values).logits, model.classifier(tokens.mean(1)))
    assert model(values).loss is None


def test_all_methods_begin_with_the_same_head_and_model(base_folder):
    values = torch.randn(2, 64, 128)
    expected = prepared(base_folder, PROBE)[0](values).logits
    for method in METHODS:
        torch.testing.assert_close(prepared(base_folder, method)[0].eval()(values).logits, expected)
    other = prepared(base_folder, PROBE, seed=1)[0](values).logits
    assert not torch.allclose(other, expected)


def test_all_methods_read_the_clips_in_the_same_order(base_folder, monkeypatch):
    seen = []

    def keep(logits, labels, cross_entropy=training.cross_entropy):
        seen.append(labels.tolist())
        return cross_entropy(logits, labels)

    monkeypatch.setattr(training, "cross_entropy", keep)
    data = clips(30)._replace(labels=torch.randperm(30, generator=torch.Generator().manual_seed(1)) % 2)
    orders = {}
    for method, seed in ((PROBE, 0), ("top-k", 0), (PROBE, 1)):
        seen.clear()
        protocol = {"epochs": 1, "batch_size": 3, "budget": 4000}
        training.train(Run(method, "1", 0.001, seed), protocol, base_folder, data)
        # Three folds of ten clips, one of which is trained on. Each step asks twice: for the loss and what is recorded.
        assert seen[:8:2] == seen[1:8:2]
        orders[method, seed] = seen[:8:2]
        assert sum(map(len, orders[method, seed])) == 10
    assert orders[PROBE, 0] == orders["top-k", 0] != orders[PROBE, 1]


def test_training_learns(base_folder):
    """Clips whose class is plain to see, in 60 steps."""
    data = clips(90)
    data.inputs[data.labels == 1] += 1.0
    protocol = {"epochs": 6, "batch_size": 3, "budget": 4000}
    record = training.train(Run(SOFT, "1", 0.005, 0), protocol, base_folder, data)
    assert record["test_accuracy"] > 0.9
    assert record["epochs"]["loss"][-1] < 0.5 * record["epochs"]["loss"][0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_as_the_cpu_does(base_folder):
    protocol = {"epochs": 2, "batch_size": 3, "budget": 4000}
    run = Run(SOFT, "1", 0.001, 0)
    here, there = (
        training.train(run, protocol | device, base_folder, clips(30)) for device in ({}, {"device": "cuda"})
    )
    for name in ("loss", "validation_loss"):
        assert there["epochs"][name] == pytest.approx(here["epochs"][name], rel=1e-3)


def test_a_loss_that_is_not_finite_is_recorded_as_none(base_folder, tmp_path):
    data = clips()
    data.inputs[:] = math.nan
    record = training.train(Run(PROBE, "1", 0.1, 0), {"epochs": 1, "batch_size": 6, "budget": 1}, base_folder, data)
    assert record["epochs"]["loss"] == record["epochs"]["validation_loss"] == [None] and record["test_loss"] is None
    records.write(tmp_path / "record.json", record)


@pytest.mark.parametrize("init", ["up at zero", "down and up at zero", "nothing at zero"])
def test_initial_weights(base_folder, init):
    model, trained = prepared(base_folder, SOFT, init=init)
    zero = {name for name, each in model.named_parameters() if name in trained and not each.any()}
    down, up = ({name for name in trained if f"{part}_weight" in name} for part in ("down", "up"))
    assert down and up
    assert zero & (down | up) == {"up at zero": up, "down and up at zero": down | up, "nothing at zero": set()}[init]
    if init == "down and up at zero":  # it stays there
        model(torch.randn(2, 64, 128), labels=torch.arange(2)).loss.backward()
        assert not any(each.grad.any() for name, each in model.named_parameters() if name in down | up)


def test_initial_slots(base_folder):
    plain, wide = (
        [each for name, each in prepared(base_folder, SOFT, slot_std=std)[0].named_parameters() if is_slots(name)]
        for std in (1.0, 4.0)
    )
    assert len(plain) == 2
    for one, other in zip(plain, wide):
        assert torch.equal(4 * one, other) and one.std().item() == pytest.approx(32**-0.5, rel=0.2)


@pytest.mark.parametrize("decays", [True, False])
def test_slots_without_weight_decay(base_folder, monkeypatch, decays):
    """With a decay that takes everything away at once, unless it is spared."""
    monkeypatch.setitem(training.OPTIMIZER, "weight_decay", 1000.0)
    seen = []
    monkeypatch.setattr(training, "expert_report", lambda model, *args, **kwargs: seen.append(model) or expert_report(
        model, *args, **kwargs))  # fmt: skip
    options = () if decays else (("decays_slots", False),)
    protocol = {"epochs": 1, "batch_size": 6, "budget": 4000}
    training.train(Run(SOFT, "1", 0.001, 0, options), protocol, base_folder, clips())
    parameters = {name: each.abs().max() for name, each in seen[0].named_parameters() if each.requires_grad}
    slots = {name for name in parameters if is_slots(name)}
    assert slots and all((parameters[name] < 0.01) == decays for name in slots)
    assert all(parameters[name] < 0.01 for name in parameters if name.endswith("down_weight"))


@pytest.mark.parametrize("method, spared", [("IA³", "all"), ("BitFit", "all"), ("LoRA", "none"), (SOFT, "biases")])
def test_what_has_weight_decay(base_folder, method, spared):
    """Neither what is pretrained and trained in few numbers, nor what starts at one; of the head, the matrix."""
    model, trained = prepared(base_folder, method)
    parameters = dict(model.named_parameters())
    decaying = {name for name in trained if training.decays(name, parameters[name])}
    head = {name for name in trained if name.startswith("classifier.")}
    assert {name for name in decaying & head if parameters[name].ndim == 2} == decaying & head != set()
    biases = {name for name in trained - head if name.endswith("bias")}
    assert (trained - head) - decaying == {"all": trained - head, "none": set(), "biases": biases}[spared]
    assert bool(biases) == (method in ("BitFit", SOFT))


def test_the_training_loss_is_without_load_balancing(base_folder):
    """With next to no learning, it is the loss of the model as it is made."""
    data, protocol = clips(), {"epochs": 1, "batch_size": 6, "budget": 4000}
    record = training.train(Run("top-k", "1", 1e-12, 0), protocol, base_folder, data)
    model, _ = prepared(base_folder, "top-k")
    _, expected = training.predict(model, data, data.clips(["3"]))
    assert record["epochs"]["loss"][0] == pytest.approx(expected, abs=1e-5)


def test_tiny_numbers_are_zero_in_a_run_only():
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot take subnormal numbers for zero")
    tiny = torch.full((64,), 1e-39)
    with training.one_thread():
        assert not (tiny * 1.0).any()
    assert (tiny * 1.0).all()


# --- choices and numbers ------------------------------------------------------------------------------------------


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


def made_up(method, fold="1", rate=0.01, seed=0, test=0.5, validation=0.5, loss=1.0, options=None, **other):
    """A record as the tables read it."""
    epochs = {
        "seconds": [2.0, 2.0],
        "loss": [1.0, 0.5],
        "validation_loss": [1.0, loss],
        "validation_accuracy": [0.2, validation],
    }
    settings = {"method": method, "options": options or {}, "fold": fold, "rate": rate, "seed": seed, "epochs": 2}
    common = {
        "model": "m", "model_parameters": 1000, "data": "d", "clips": 9, "classes": 2, "folds": ["1", "2", "3"],
        "batch_size": 4, "budget": 80, "rates": [0.01], "optimizer": "AdamW", "betas": [0.9, 0.98], "eps": 1e-6,
        "weight_decay": 0.1, "schedule": "cosine", "augmentation": "none", "precision": "float32",
    }  # fmt: skip
    where = {"device": "a processor", "threads": 1, "cores": 2, "torch": "2", "transformers": "5", "peft": "0"}
    return {
        "settings": common | settings,
        "environment": where | {"processes": 2},
        "parameters": 78,
        "head_parameters": 10,
        "r": 3,
        "epochs": epochs,
        "test_accuracy": test,
        "step_seconds": 0.1,
        "forward_1_seconds": 0.01,
        "memory_bytes": 2**20,
        "run_seconds": 5.0,
        **other,
    }


def experts_of(idle):
    """What a record holds of the experts of one block."""
    block = {"experts": 7, "effective_number": 6.0, "normalized_entropy": 0.9, "class_information": 0.1}
    return [block | {"idle_experts": idle}]


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


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, expected",
    [
        (Estimate(2.0, 1.0), "A beats B by 2.0 ± 1.0 points: the interval excludes zero"),
        (Estimate(-2.0, 1.0), "A is behind B by 2.0 ± 1.0 points: the interval excludes zero"),
        (Estimate(0.5, 1.0), "+0.5 ± 1.0 points: the interval includes zero, so this table does not show a difference"),
        (
            Estimate(0.5, None),
            "in one fold or in all folds alike, which gives no interval: this table does not show a difference",
        ),
        (None, "no runs yet"),
    ],
)
def test_differences_in_words(number, expected):
    assert expected in difference_in_words("A", "B", number)


def test_what_does_not_hold_is_said():
    def write(soft, dense_seconds, gain_of_experts):
        experts = experts_of(1)
        runs = []
        for fold, noise in (("1", 0.0), ("2", 0.001), ("3", -0.001)):
            runs += [made_up(SINGLE, fold, test=0.8 + noise)]
            runs += [made_up(SOFT, fold, test=soft - noise, experts=experts)]
            runs += [made_up("Dense-MoA", fold, test=0.8, step_seconds=dense_seconds, experts=experts)]
            for number, times in ((2, 0), (4, 0.2), (16, 1), (32, 1.1)):
                accuracy = soft - noise * times + gain_of_experts * times
                runs += [made_up(SOFT, fold, test=accuracy, options={"num_experts": number})]
        text = results(runs)
        table = dict(
            line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ") and " here | " in line
        )
        return {
            name[2:].split(",")[0].split(" with")[0].split(" (")[0]: verdict for name, verdict in table.items()
        }, text

    verdicts, text = write(0.7, 0.12, -0.02)
    assert verdicts["Beats the single adapter"] == "does not hold here"
    assert verdicts["Matches Dense-MoA"] == "does not hold here"
    assert verdicts["Trains more than 3 times as fast as Dense-MoA"] == "does not hold here"
    assert verdicts["Gains from more"] == "does not hold here"
    assert verdicts["No expert is left unused"] == "does not hold here"
    assert "Soft-MoA is behind the single adapter by 10.0 ± " in text
    verdicts, text = write(0.9, 0.35, 0.02)
    assert verdicts["Beats the single adapter"] == "holds here"
    assert verdicts["Trains more than 3 times as fast as Dense-MoA"] == "holds here"
    assert verdicts["Gains from more"] == "holds here"
    assert "The mean of 16 and 32 minus that of 2 and 4 is +1.9 ± " in text and "so more is gained there" in text
    verdicts, text = write(0.8, 0.35, 0.0)
    assert verdicts["Beats the single adapter"] == verdicts["Gains from more"] == "is not shown here"
    assert "so no difference is shown" in text and "includes zero, so this table does not show a difference" in text


def test_what_was_tried_is_said():
    def write(gain, soft=0.8, folds="123", with_ablations="123"):
        runs = []
        for fold in folds:
            noise = 0.001 * int(fold)
            runs += [made_up(SINGLE, fold, test=0.8), made_up(SOFT, fold, test=soft + noise)]
            if fold in with_ablations:
                runs += [made_up(SOFT, fold, test=soft + noise / 2, options={"scaling": 4.0})]
                runs += [made_up(SOFT, fold, test=soft + gain + noise, options={"num_experts": 2})]
        for record in runs:
            record["experts"] = experts_of(1)
        return results(runs)

    text = write(-0.1, soft=0.79)
    assert "Of the 2 changes to Soft-MoA under Ablations, with seed 0, none is shown to beat the single adapter" in text
    assert (
        "No interval of a difference to 1 excludes zero. Of those to the single adapter, those of 1 and 4 do." in text
    )
    assert "The best mean is that of scaling: 4 (-0.9 ± 0.2 points)" in text
    assert "Behind the single adapter are experts N: 2 (-10.8 ± 0.5 points) and scaling: 4 (-0.9 ± 0.2 points);" in text
    assert "The single adapter is without the change, and has an accuracy of 80.0% with that seed, of 80.0%" in text
    assert "| 2 | 3 | 78 | 69.2 ± 0.5 | -10.0 | -10.8 ± 0.5 | 3 |" in text
    text = write(0.1, soft=0.79)
    assert (
        "these beat the single adapter, which was not given the same change: experts N: 2 (+9.2 ± 0.5 points)" in text
    )
    assert "no ablations with all folds" in write(0.1, soft=0.79, with_ablations="12")
    # Nothing is asked where Soft-MoA is ahead, nor where there is no interval.
    for text in (write(0.1, soft=0.9), write(0.1, soft=0.79, folds="1")):
        assert "under Ablations" not in text and "no ablations with all folds" not in text
    assert "Without two folds there are no intervals" in text


def test_the_learning_rate_may_be_why_experts_are_idle():
    runs = [made_up(SOFT, rate=rate, experts=experts_of(idle)) for rate, idle in ((0.01, 1), (0.02, 2))]
    for record in runs:
        record["settings"]["rates"] = [0.01, 0.02]
    expected = "With the rates 0.01 / 0.02 in all folds, chosen or not, and seed 0, 14.3% / 28.6% of the experts"
    assert expected in results(runs)


def test_times_are_compared_within_folds():
    runs = []
    for fold, step, forward, times_step, times_forward in (("1", 0.1, 0.01, 2, 1), ("2", 0.2, 0.02, 3, 3)):
        runs += [made_up(SINGLE, fold, step_seconds=step, forward_1_seconds=forward)]
        times = {"step_seconds": times_step * step, "forward_1_seconds": times_forward * forward}
        runs += [made_up(SOFT, fold, experts=experts_of(0), **times)]
    # Ratios of 2 and 3, and of 1 and 3: t(0.975, 1) · s / √2, without regard to clips in common.
    expected = "| Soft-MoA | 400 (200–600) | 2.50 ± 6.35 | 1.0 | 35.0 (10.0–60.0) | 2.00 ± 12.71 |"
    assert expected in results(runs)


def test_times_of_several_machines_are_said_to_be_mixed():
    runs = [made_up(SINGLE, "1"), made_up(SINGLE, "2")]
    runs[1]["environment"] |= {"commit": "0123456789", "uncommitted changes": False}
    text = results(runs)
    assert "the table mixes" not in text
    assert (
        "a processor, 1 thread on 2 cores, torch 2, transformers 5, peft 0, 2 runs at a time, commit 0123456." in text
    )
    runs[1]["environment"]["torch"] = "3"
    assert "more than one machine or version of a library, whose times the table mixes" in results(runs)


def test_parts_of_the_runs_are_said_to_be_parts():
    runs = [made_up(SINGLE, "1"), made_up(SINGLE, "2"), made_up(SINGLE, "2", seed=1)]
    text = results(runs)
    # Ten methods, three folds, one rate and two more seeds.
    assert "\n3 of the 90 runs of a whole comparison are there" in text and "3 of them are in the tables" in text
    assert "| single adapter | 78 | 50.0 | — | 3 of 9 |" in text
    # With two rates, nothing is chosen before both are there.
    for record in runs:
        record["settings"]["rates"] = [0.01, 0.02]
    text = results(runs)
    assert "there is no table yet" in text and "| method |" not in text


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
    found = records.load(tmp_path / "runs")
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


def test_variants_are_those_of_the_axes():
    experts, slots = (list(axis.values) for axis in AXES[:2])
    assert experts == ["1", "2", "4", "7", "16", "32"] and slots == ["1", "2", "3", "4"]
    assert len(variants()) == 5 + 3 + 2 + 1 + 1 + 2 + 2 + 2 + 1 + 1 and {} not in variants()
    assert all(axis.reference in axis.values for axis in AXES)
    assert len({Run(SOFT, "1", 0.1, 0, tuple(each.items())).name for each in variants()}) == len(variants())


@pytest.mark.parametrize("part", [".", "finer-rates", "longer"])
def test_committed_results_are_those_of_the_committed_runs(part, tmp_path):
    folder = COMMITTED / part
    found = records.load(folder / "runs")
    text, pictures = (folder / "RESULTS.md").read_text(), draw(found, tmp_path)
    assert text == results(found, pictures)
    assert sorted(pictures) == sorted(path.name for path in folder.glob("*.png"))
    assert all(f"({name})" in text for name in pictures)
    expected = re.search(r"^matplotlib==([\d.]+)", (HERE.parent / "constraints.txt").read_text(), re.MULTILINE)[1]
    if matplotlib.__version__ != expected:
        pytest.skip(f"the pictures are of matplotlib {expected}, and other versions draw otherwise")
    for name in pictures:
        drawn, committed = (matplotlib.image.imread(each / name) for each in (tmp_path, folder))
        assert drawn.shape == committed.shape and abs(drawn - committed).max() < 0.05


def test_the_whole_table_was_run():
    text = (COMMITTED / "RESULTS.md").read_text()
    assert "\nAll 300 runs of a whole comparison are there" in text and text.count(" | 15 of 15 |") == len(METHODS)
    assert f"Beside them there are {5 * len(variants())} runs of ablations." in text
    table = text.partition("## Accuracy\n\n")[2].partition("\n\n")[0]
    assert table.count("\n") == len(METHODS) + 1 and table in (HERE.parent / "README.md").read_text()


def test_what_was_tried_besides_is_as_its_results_say():
    text = (COMMITTED / "README.md").read_text()
    for part in (".", "finer-rates", "longer"):
        here = Comparison([each for each in records.load(COMMITTED / part / "runs") if each["settings"]["seed"] == 0])
        single, soft = (here.methods[method] for method in (SINGLE, SOFT))
        cells = [show(estimate(single)), show(estimate(soft)), show(paired(soft, single), "+.1f")]
        (line,) = (line for line in text.splitlines() if line.startswith("| ") and f"({part}/RESULTS.md)" in line)
        assert line.endswith(f"| {' | '.join(cells)} |")
