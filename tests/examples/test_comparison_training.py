"""One run of a comparison: its data, its model and what is trained of it."""

import json
import math
from functools import partial

import pytest
import torch
from conftest import write_tone
from made_up_runs import clips, write_clips

from examples.method_comparison import training
from examples.method_comparison.training import (
    METHODS,
    PROBE,
    SOFT,
    UNBUDGETED,
    Run,
    is_slots,
    load_model,
    validation_fold,
)
from peft_softmoa.inspection import expert_report
from peft_softmoa.training import AudioError


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


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


def test_a_loss_that_is_not_finite_is_recorded_as_none(base_folder):
    data = clips()
    data.inputs[:] = math.nan
    record = training.train(Run(PROBE, "1", 0.1, 0), {"epochs": 1, "batch_size": 6, "budget": 1}, base_folder, data)
    assert record["epochs"]["loss"] == record["epochs"]["validation_loss"] == [None] and record["test_loss"] is None
    json.dumps(record, allow_nan=False)


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
