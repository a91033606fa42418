"""One run of a study: its data, its model and what is trained of it."""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import write_tone
from made_up_runs import clips, protocol, write_clips
from transformers import AutoFeatureExtractor, WhisperConfig, WhisperForAudioClassification

from examples.method_comparison import measures, models, training
from examples.method_comparison.data import load_data, validation_fold
from examples.method_comparison.methods import FULL, LORA, METHODS, MIXTURES, PROBE, SOFT, is_slots
from examples.method_comparison.models import Apart, Classes, Head, pooled_outputs
from examples.method_comparison.studies import Study
from examples.method_comparison.training import Run, make_optimizer, prepare
from peft_softmoa.method.routers import SoftRouter
from peft_softmoa.training import AudioError, fingerprint_weights

STUDY = Study("made up", [], speaker_column="speaker")


def load(folder, base_folder, cache, study=STUDY):
    return load_data(study, str(folder), AutoFeatureExtractor.from_pretrained(base_folder), cache)


def test_features_are_those_of_their_clips(base_folder, tmp_path):
    data = load(write_clips(tmp_path), base_folder, tmp_path / "cache")
    assert data.inputs.shape == (18, 64, 128) and data.label_names == ["high", "low"]
    assert data.fold_names == ["1", "2", "3"] and data.folds == [fold for fold in "123" for _ in range(6)]
    assert data.labels.tolist() == [1, 1, 1, 0, 0, 0] * 3 and data.speakers[:3] == ["10", "11", "10"]
    # High tones have their energy in higher bins.
    peaks = data.inputs[:, :40].mean(1).argmax(1)
    assert peaks[data.labels == 0].min() > peaks[data.labels == 1].max()
    (cached,) = (tmp_path / "cache").glob("*.pt")
    assert cached.stem == data.digest and (tmp_path / "cache" / ".gitignore").read_text() == "*\n"


def test_channels_are_kept_apart_beside_their_mean(base_folder, tmp_path):
    lines = ["file_name,label,fold"]
    for fold in (1, 2, 3):
        left, right = (write_tone(tmp_path / "mono.wav", pitch) for pitch in (300, 2000))
        soundfile.write(tmp_path / f"{fold}.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
        lines.append(f"{fold}.wav,tone,{fold}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    study = replace(STUDY, speaker_column=None, num_channels=2)
    data = load(tmp_path, base_folder, tmp_path / "cache", study)
    assert data.inputs.shape == (3, 3, 64, 128)
    low, high, both = data.inputs[0, :, :40].mean(1)
    assert low.argmax() < high.argmax() and both[high.argmax()] > low[high.argmax()]
    assert both[low.argmax()] > high[low.argmax()]
    assert training.channels_of(data.inputs, "mono").equal(data.inputs[:, 2])
    assert training.channels_of(data.inputs, "apart").equal(data.inputs[:, :2])
    with pytest.raises(ValueError, match="has 2 channels, and the study reads 3"):
        load(tmp_path, base_folder, tmp_path / "cache", replace(study, num_channels=3))


def test_other_content_is_other_data(base_folder, tmp_path):
    def write(folder, pitch, folds=(1, 2, 3)):
        folder.mkdir()
        lines = ["file_name,label,fold,speaker"]
        for fold in folds:
            write_tone(folder / f"{fold}.wav", pitch)
            lines.append(f"{fold}.wav,tone,{fold},a")
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
        return folder

    folders = (write(tmp_path / name, pitch) for name, pitch in (("a", 300), ("b", 300), ("c", 301)))
    one, same, other = (load(folder, base_folder, tmp_path / "cache") for folder in folders)
    assert one.digest == same.digest != other.digest
    with pytest.raises(ValueError, match="need three"):
        load(write(tmp_path / "d", 300, folds=(1, 2)), base_folder, tmp_path / "cache")
    (tmp_path / "a" / "2.wav").write_bytes(b"no audio")
    with pytest.raises(AudioError, match=r"2\.wav"):
        load(tmp_path / "a", base_folder, tmp_path / "cache")


def test_the_next_fold_validates():
    assert [validation_fold(fold, ["1", "2", "10"]) for fold in ("1", "2", "10")] == ["2", "10", "1"]
    data = clips(9)._replace(folds=["10", "2", "1"] * 3)
    assert data.fold_names == ["1", "2", "10"]
    assert [part.tolist() for part in data.split("2")] == [[2, 5, 8], [0, 3, 6], [1, 4, 7]]


def test_clips_are_drawn_by_class_and_speaker():
    data = clips(120)
    given = data.clips(["1", "2"])
    drawn = data.draw(given, 3, None, 0)
    assert torch.bincount(data.labels[drawn]).tolist() == [3, 3] and set(drawn.tolist()) <= set(given.tolist())
    assert drawn.equal(data.draw(given, 3, None, 0)) and not drawn.equal(data.draw(given, 3, None, 1))
    assert data.draw(given, None, None, 0).equal(given) and drawn.equal(drawn.sort().values)
    of_two = data.draw(given, None, 2, 0)
    speakers = {data.speakers[index] for index in of_two}
    assert len(speakers) == 2 and len(of_two) == sum(data.speakers[index] in speakers for index in given)
    with pytest.raises(ValueError, match="at most 4, which the clips have, got 5"):
        data.draw(given, None, 5, 0)


def prepared(base_folder, method, budget=4000, seed=0, **options):
    task = Classes(str(base_folder), ["high", "low"])
    model = prepare(Run(method, "1", 0.01, seed, tuple(options.items())), protocol(budget=budget), task)
    return model, {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_backbone_is_the_same_at_each_load(base_folder, tmp_path):
    """Also of classifiers that are their own base model, such as Whisper's."""
    config = WhisperConfig(
        **dict.fromkeys(("d_model", "encoder_ffn_dim"), 16), num_mel_bins=8, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, max_source_positions=8, vocab_size=20, pad_token_id=0, classifier_proj_size=4,
    )  # fmt: skip
    WhisperForAudioClassification(config).save_pretrained(tmp_path)
    for folder in (tmp_path, base_folder):
        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = Classes(str(folder), ["a", "b", "c"]).load()
            found.append(fingerprint_weights(models.backbone_of(model).requires_grad_(False)))
        assert found[0] == found[1], folder


def test_heads_are_trained_alone_first(base_folder, tmp_path):
    data = load(write_clips(tmp_path), base_folder, tmp_path / "cache")
    model = Classes(str(base_folder), data.label_names).load()
    pooled = pooled_outputs(model, data.inputs)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    loss = Head(model)(pooled, labels=data.labels).loss.item()
    training.fit_head(model, pooled, data.labels, size=4, epochs=300, seed=0)
    assert Head(model)(pooled, labels=data.labels).loss.item() < 0.8 * loss
    changed = {name for name, each in model.state_dict().items() if not each.equal(before[name])}
    assert changed == {name for name in before if name.startswith("classifier.")}
    # A run begins with such a head: without a step of its own, it is as good as that.
    one = Run(SOFT, "1", 0.0, 0)
    begun, fresh = (training.train(one, protocol(base_folder, head_epochs=epochs), data, pooled) for epochs in (300, 0))
    assert begun["progress"]["loss"][0] < 0.95 * fresh["progress"]["loss"][0]


KNOWN = [method for method in METHODS if method != "Conformer"]


@pytest.mark.parametrize("method", KNOWN)
def test_what_each_method_trains(base_folder, method):
    model, trained = prepared(base_folder, method)
    head = {name for name in trained if training.is_head(name)}
    everything = {name for name, _ in model.named_parameters()}
    number = sum(each.numel() for name, each in model.named_parameters() if name in trained - head)
    assert sum(dict(model.named_parameters())[name].numel() for name in head) == 2 * 32 + 32 * 2 + 2
    if method == PROBE:
        assert trained == head
    elif method == FULL:
        assert trained == everything
    elif method == "BitFit":
        assert trained == head | {name for name in everything if name.endswith("bias")}
    else:
        assert 0.75 * 4000 < number <= 4000
    model(torch.randn(2, 64, 128), labels=torch.arange(2)).loss.backward()
    assert trained == {name for name, each in model.named_parameters() if each.grad is not None}


def test_all_methods_begin_with_the_same_head_and_model(base_folder):
    values = torch.randn(2, 64, 128)
    expected = prepared(base_folder, PROBE)[0].eval()(values).logits
    for method in KNOWN:
        torch.testing.assert_close(prepared(base_folder, method)[0].eval()(values).logits, expected)
    other = prepared(base_folder, PROBE, seed=1)[0].eval()(values).logits
    assert not torch.allclose(other, expected)


def test_a_probe_on_pooled_outputs_is_the_probe(base_folder):
    data = clips(30)
    model, _ = prepared(base_folder, PROBE)
    pooled = pooled_outputs(model, data.inputs)
    torch.testing.assert_close(Head(model)(pooled).logits, model(data.inputs).logits)
    one, other = (
        training.train(Run(PROBE, "1", 0.01, 0), protocol(base_folder), data, each) for each in (None, pooled)
    )
    assert one["head_parameters"] == other["head_parameters"] == 130 and one["parameters"] == other["parameters"] == 0
    assert (
        one["progress"]["loss"] == pytest.approx(other["progress"]["loss"], rel=1e-4) and one["test"] == other["test"]
    )


def test_a_head_that_maps_tokens_reads_their_mean_as_well():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = WhisperConfig(**sizes, classifier_proj_size=8, max_source_positions=50, num_mel_bins=80, num_labels=3)
    model, values = WhisperForAudioClassification(config).eval(), torch.randn(3, 80, 100)
    torch.testing.assert_close(Head(model)(pooled_outputs(model, values)).logits, model(values).logits)


def test_channels_apart_are_samples_whose_logits_are_averaged(base_folder):
    model, _ = prepared(base_folder, SOFT, channels="apart", slot_std=2.0)
    assert isinstance(model, Apart)
    values = torch.randn(3, 2, 64, 128)
    expected = (model.model(values[:, 0]).logits + model.model(values[:, 1]).logits) / 2
    output = model(values, labels=torch.tensor([0, 1, 0]))
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1, 0])))
    use = measures.use_of_experts(model, values)
    assert len(use["largest_load"]) == 2 and all(1 / 7 <= load <= 1 for load in use["largest_load"])
    for method, options in ((LORA, {"channels": "joined"}), (SOFT, {"channels": "x"}), (LORA, {"num_slots": 2})):
        with pytest.raises(ValueError, match="channels as|has no options"):
            prepared(base_folder, method, **options)


def test_all_methods_read_the_clips_in_the_same_order(base_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(Classes, "loss", lambda self, logits, targets: seen.append(targets.tolist()) or 0.0)
    data = clips(30)._replace(labels=torch.randperm(30, generator=torch.Generator().manual_seed(1)) % 2)
    orders = {}
    for method, seed in ((PROBE, 0), ("top-k", 0), (PROBE, 1)):
        seen.clear()
        training.train(Run(method, "1", 0.001, seed), protocol(base_folder, epochs=1, batch_size=3), data)
        # Three folds of ten clips, one of which is trained on.
        assert sum(map(len, seen)) == 10
        orders[method, seed] = list(seen)
    assert orders[PROBE, 0] == orders["top-k", 0] != orders[PROBE, 1]


def test_training_learns_and_is_traced(base_folder):
    """Clips whose class is plain to see, in 60 steps."""
    data = clips(90)
    data.inputs[data.labels == 1] += 1.0
    given = protocol(base_folder, epochs=6, batch_size=3, trace=[0, 7], validate_every=4)
    record = training.train(Run(SOFT, "1", 0.005, 0), given, data)
    assert record["test"] > 0.9 and record["progress"]["epoch"] == [4, 6] and record["training_clips"] == 30
    assert record["progress"]["loss"][-1] < 0.5
    assert [entry["step"] for entry in record["routing"]] == [0, 7, 60]
    assert all(1 <= each <= 7 for entry in record["routing"] for each in entry["effective_experts"])
    assert record["routing"][0]["largest_load"] != record["routing"][2]["largest_load"]
    assert "model_path" not in record["settings"]
    # Looking changes nothing.
    other = training.train(Run(SOFT, "1", 0.005, 0), {**given, "trace": []}, data)
    assert other["progress"]["loss"] == record["progress"]["loss"]
    few = training.train(Run(SOFT, "1", 0.005, 0, (("clips_per_class", 2),)), {**given, "epochs": 1}, data)
    assert few["training_clips"] == 4


def test_what_is_computed_in_half_precision(base_folder, monkeypatch):
    """All of a run but its weights: training, evaluation, traces and times."""
    seen = {"float32": set(), "bfloat16": set()}
    load = Classes.load

    def watched(task):
        model = load(task)
        linear = next(each for each in model.base_model.modules() if isinstance(each, torch.nn.Linear))
        linear.register_forward_hook(lambda module, args, output: now.add((module.training, output.dtype)))
        return model

    monkeypatch.setattr(Classes, "load", watched)
    losses = {}
    for precision, now in seen.items():
        given = protocol(base_folder, epochs=1, precision=precision, trace=[0])
        record = training.train(Run(SOFT, "1", 0.001, 0), given, clips())
        losses[precision] = record["progress"]["loss"][0]
        assert now == {(mode, getattr(torch, precision)) for mode in (True, False)}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_as_the_cpu_does(base_folder):
    here, there = (
        training.train(Run(SOFT, "1", 0.001, 0), protocol(base_folder, batch_size=3, **device), clips(30))
        for device in ({}, {"device": "cuda"})
    )
    for name in ("loss", "validation_loss"):
        assert there["progress"][name] == pytest.approx(here["progress"][name], rel=1e-3)


def test_a_loss_that_is_not_finite_is_recorded_as_none(base_folder):
    data = clips()
    data.inputs[:] = math.nan
    record = training.train(Run(PROBE, "1", 0.1, 0), protocol(base_folder, epochs=1), data)
    assert record["progress"]["loss"] == record["progress"]["validation_loss"] == [None] == [record["test_loss"]]
    json.dumps(record, allow_nan=False)


def routers(model):
    return [module for module in model.modules() if isinstance(module, SoftRouter)]


def test_parametrisations_of_the_slots(base_folder):
    plain, wide, cold = (
        routers(prepared(base_folder, SOFT, **options)[0]) for options in ({}, {"slot_std": 4.0}, {"temperature": 4.0})
    )
    assert len(plain) == 2
    for one, four, quarter in zip(plain, wide, cold):
        assert torch.equal(4 * one.slots, four.slots) and torch.equal(one.slots / 4, quarter.slots)
    model, trained = prepared(base_folder, SOFT, temperature=4.0)
    assert sum(map(is_slots, trained)) == 2


def test_a_step_moves_slots_by_their_own_rate(base_folder):
    """The first step of Adam changes each entry by the rate, whatever its gradient."""

    def moved(**options):
        own = {name: options.pop(name) for name in list(options) if name in training.OPTIMIZER_OPTIONS}
        model, _ = prepared(base_folder, SOFT, **options)
        with torch.no_grad():  # at the start, zero experts would send no gradient
            for name, each in model.named_parameters():
                if name.endswith("up_weight"):
                    each.normal_()
        before = [router.slots.detach().clone() for router in routers(model)]
        optimizer = make_optimizer(model, 0.01, **own)
        for group in optimizer.param_groups:
            group["eps"] = 1e-20
        model(torch.randn(2, 64, 128), labels=torch.arange(2)).loss.backward()
        optimizer.step()
        return max((router.slots - old).abs().median().item() for router, old in zip(routers(model), before))

    plain = moved(decays_slots=False)
    assert plain == pytest.approx(0.01, rel=1e-3)
    assert moved(slots_rate=0.1, decays_slots=False) == pytest.approx(0.001, rel=1e-3)
    assert moved(unit_slots=True, decays_slots=False) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("method, spared", [("BitFit", "all"), (LORA, "none"), (SOFT, "biases")])
def test_what_has_weight_decay(base_folder, method, spared):
    """Of the head, the matrix; of adapters, matrices; of what is pretrained and trained in few numbers, nothing."""
    model, trained = prepared(base_folder, method)
    parameters = dict(model.named_parameters())
    decaying = {name for name in trained if training.decays(name, parameters[name])}
    head = {name for name in trained if training.is_head(name)}
    assert {name for name in head if parameters[name].ndim == 2} == decaying & head != set()
    biases = {name for name in trained - head if name.endswith("bias")}
    assert (trained - head) - decaying == {"all": trained - head, "none": set(), "biases": biases}[spared]
    groups = make_optimizer(model, 0.1, decays_slots=False).param_groups
    without = {id(each) for group in groups if group["weight_decay"] == 0 for each in group["params"]}
    slots = {name for name in trained if is_slots(name)}
    assert {name for name in trained if id(parameters[name]) in without} == trained - (decaying - slots)


def test_the_training_loss_is_without_load_balancing(base_folder):
    """With next to no learning, it is the loss of the model as it is made."""
    data = clips()
    record = training.train(Run("top-k", "1", 1e-12, 0), protocol(base_folder, epochs=1, batch_size=6), data)
    model, _ = prepared(base_folder, "top-k")
    chosen = data.clips(["3"])
    _, expected = Classes(str(base_folder), data.label_names).evaluate(model, data.inputs[chosen], data.labels[chosen])
    assert record["progress"]["loss"][0] == pytest.approx(expected, abs=1e-5)


def test_tiny_numbers_are_zero_in_a_run_only():
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot take subnormal numbers for zero")
    tiny = torch.full((64,), 1e-39)
    with measures.one_thread():
        assert not (tiny * 1.0).any()
    assert (tiny * 1.0).all()


@pytest.fixture
def whisper_folder():
    folder = os.environ.get("SOFTMOA_WHISPER")
    if not folder:
        pytest.skip("needs a real Whisper: set SOFTMOA_WHISPER to a folder with whisper-tiny.en as it is published")
    return folder


@pytest.mark.parametrize("method", [SOFT, LORA])
def test_a_recogniser_learns_words(whisper_folder, method):
    """Two words of noise that is plain to tell apart, with the real decoder."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(9, 80, 100, generator=generator) * 0.1
    labels = torch.arange(9) // 3 % 2
    inputs[labels == 1] += 0.5
    data = clips(9)._replace(inputs=inputs, labels=labels, folds=["1", "2", "3"] * 3, label_names=["cat", "seven"])
    given = protocol(whisper_folder, task="speech-seq2seq", metric="wer", seconds=1.0, epochs=16, validate_every=8)
    record = training.train(Run(method, "1", 0.005, 0), {**given, "budget": 80_000}, data)
    assert record["head_parameters"] == 0 and 60_000 < record["parameters"] <= 80_000
    first, last = record["progress"]["loss"]
    assert last < 0.7 * first and all(0 <= rate <= 1 for rate in (*record["progress"]["validation"], record["test"]))
    assert ("routing" in record) == (method == SOFT)


def test_mixtures_take_their_own_fields_only():
    assert all({"routing", "num_experts"} <= fields.keys() for fields in MIXTURES.values())
    assert set(models.METRICS) == {task.metric for task in models.TASKS.values()}
