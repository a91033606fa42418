"""Streams, training and inference with several channels, on a model that has the interface of one."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import FRAMES, MEL_BINS, SAMPLING_RATE, tiny_ast_config, training_options
from torch import nn
from transformers import ASTFeatureExtractor, ASTForAudioClassification, Seq2SeqTrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_softmoa.cli import main
from peft_softmoa.commands import classify as classify_command
from peft_softmoa.commands.train import parse
from peft_softmoa.inference import Classifier, classify_windows, cut_windows
from peft_softmoa.training import (
    AudioTrainer,
    Collate,
    DataOptions,
    MultiLabel,
    Regression,
    SingleLabel,
    cached_features,
    load_stream,
    mixup,
    spec_augment,
    swap_channels,
)
from peft_softmoa.training import features as features_module
from peft_softmoa.training.audio import audio_blocks
from peft_softmoa.training.augment import parse_mirror
from peft_softmoa.training.fingerprint import fingerprint_clip
from peft_softmoa.training.run import load_streams

NAMES = ["front", "left", "right"]
LEVELS = {"front": (0.2, 0.2), "left": (0.4, 0.05), "right": (0.05, 0.4)}
MIRROR = {"left": "right", "right": "left"}


class Apart(nn.Module):
    """An AST that reads `(B, C, T, F)`, each channel apart; the logits are the mean over the channels of a clip."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        names = dict(enumerate(NAMES))
        config = tiny_ast_config(num_labels=3, id2label=names, hidden_dropout_prob=0.0, num_hidden_layers=1)
        self.base = ASTForAudioClassification(config)
        self.config = self.base.config
        self.active_peft_config = SimpleNamespace(num_channels=2)
        self.seen = []

    def forward(self, input_values, channel_mask=None, labels=None):
        self.seen.append((input_values.clone(), channel_mask, labels))
        clips, channels = input_values.shape[:2]
        logits = self.base(input_values.flatten(0, 1)).logits.unflatten(0, (clips, channels))
        mask = torch.ones(clips, channels) if channel_mask is None else channel_mask.float()
        logits = (logits * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def extractor():
    return ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of two channels whose levels are the label, in WAV and FLAC, and one clip of one channel."""
    folder = tmp_path_factory.mktemp("stereo")
    lines = ["file_name,label,fold"]
    for index in range(12):
        label = NAMES[index % 3]
        name = f"{index}.{'wav' if index % 2 else 'flac'}"
        samples = np.random.default_rng(index).uniform(-1, 1, 12_000)
        levels = LEVELS[label][:1] if index == 0 else LEVELS[label]
        soundfile.write(folder / name, np.outer(samples, levels), SAMPLING_RATE)
        lines.append(f"{name},{label},{index % 2 + 1}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def load(folder, training=False, **options):
    return load_stream(str(folder), "train", extractor(), DataOptions(**options), training=training)


def same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert np.array_equal(value, other[name]), name
    return True


def test_cached_features_are_those_of_the_stream(folder, tmp_path, monkeypatch):
    streamed = list(load(folder, channels="all"))
    shapes = [sample["input_values"].shape for sample in streamed]
    assert shapes == [(1, FRAMES, MEL_BINS), *[(2, FRAMES, MEL_BINS)] * 11]
    kept = {"streaming": False, "cache_dir": str(tmp_path)}
    assert same(list(load(folder, channels="all", **kept)), streamed)
    monkeypatch.setattr(features_module, "decode_audio", lambda *_: pytest.fail("decoded again"))
    assert same(list(load(folder, channels="all", **kept)), streamed)


def test_each_choice_has_features_of_its_own(folder, tmp_path):
    paths = set()
    for channels in (None, "mono", "all", [0], [0, 1], [1, 0]):
        options = DataOptions(channels=channels, streaming=False, cache_dir=str(tmp_path))
        cache = cached_features.FeatureCache(extractor(), options)
        audio = {"path": str(folder / "1.wav"), "bytes": None}
        cache.get(audio, lambda: cached_features.Features(1, {"input_values": np.zeros(1, "f4")}))
        [path] = cache._new
        assert path.stem == fingerprint_clip(audio)
        paths.add(path)
    # Nothing and mono are one.
    assert len(paths) == 5


def test_a_stream_learns_the_channels_of_its_model(folder):
    mono, several = nn.Identity(), Apart()
    stream = load(folder)
    stream.prepare(several)
    assert next(iter(stream))["channel_mask"].tolist() == [True, False]
    stream.prepare(mono)
    assert next(iter(stream))["input_values"].shape == (FRAMES, MEL_BINS)
    with pytest.raises(ValueError, match="`channels=mono` mixes all channels, but the adapter reads them one by one"):
        load(folder, channels="mono").prepare(several)
    several.active_peft_config.num_channels = 1
    stream.prepare(several)
    [alone] = stream
    assert alone["channel_mask"].tolist() == [True] and len(stream.extract.skipped) == 11
    reason = "it has 2 channels, more than the adapter reads (num_channels=1): choose 1 of them with "
    reason += "`channels`, those that it was trained on"
    assert {skipped.reason for skipped in stream.extract.skipped} == {reason}


def test_random_crops_are_the_same_in_all_channels(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 80_000)
    soundfile.write(tmp_path / "a.wav", np.stack([samples, samples, samples], axis=1), SAMPLING_RATE)
    (tmp_path / "metadata.csv").write_text("file_name,label\na.wav,x\n")
    stream = load(tmp_path, training=True, channels="all", max_length_seconds=0.5)
    [first] = stream
    assert first["input_values"].shape == (3, FRAMES, MEL_BINS)
    for channel in first["input_values"]:
        assert np.array_equal(channel, first["input_values"][0])
    [again] = load(tmp_path, training=True, channels=[1], max_length_seconds=0.5)
    assert np.array_equal(again["input_values"][0], first["input_values"][1])


def arguments(output, **changes):
    defaults = {
        "num_train_epochs": 2, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 5, "report_to": "none",
        "save_strategy": "steps", "save_steps": 3, "logging_strategy": "no", "use_cpu": True, "learning_rate": 1e-3,
    }  # fmt: skip
    return Seq2SeqTrainingArguments(str(output), **{**defaults, **changes})


def test_the_trainer_reads_all_channels_and_resumes_to_the_same_bits(folder, tmp_path):
    def trainer(output):
        return AudioTrainer(
            Apart(), arguments(output), train_dataset=load(folder, training=True), eval_dataset=load(folder),
            mirror_labels=MIRROR, mask_frequencies=4, mask_frames=4, mixup_alpha=0.5,
        )  # fmt: skip

    whole = trainer(tmp_path / "whole")
    whole.train()
    assert len(whole.model.seen) == 8
    assert {values.shape[1] for values, _, _ in whole.model.seen} == {2}
    assert whole.evaluate()["eval_loss"] > 0
    again = trainer(tmp_path / "whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert len(again.model.seen) == 5
    for (values, *_), (others, *_) in zip(again.model.seen, whole.model.seen[3:8], strict=True):
        assert torch.equal(values, others)


def test_training_mirrors_channels_and_labels(folder, tmp_path):
    trainer = AudioTrainer(
        Apart(),
        arguments(tmp_path, num_train_epochs=4),
        train_dataset=load(folder, training=True),
        mirror_labels=MIRROR,
    )
    trainer.train()
    samples = list(load(folder, channels="all"))
    found = 0
    for values, mask, labels in trainer.model.seen:
        for row, label in enumerate(labels.tolist()):
            [given] = [
                sample for sample in samples
                if any(np.array_equal(values[row, 0], channel) for channel in sample["input_values"])
            ]  # fmt: skip
            there = len(given["input_values"])
            swapped = not np.array_equal(values[row, 0], given["input_values"][0])
            found += swapped
            expected = given["input_values"][::-1] if swapped else given["input_values"]
            assert np.array_equal(values[row, :there], expected)
            name = NAMES[given["labels"]]
            assert NAMES[label] == (MIRROR.get(name, name) if swapped else name)
            assert there == 2 or (not swapped and mask[row].tolist() == [True, False])
    assert 8 <= found <= 36


def test_channels_in_reverse_order():
    generator = torch.Generator().manual_seed(0)
    values, masks = torch.randn(200, 3, 5, generator=generator), torch.arange(3)[:, None] > torch.zeros(200, 3, 5)
    there = torch.rand(200, 3, generator=generator) < 0.8
    labels, mirrored = torch.zeros(200, dtype=torch.long), torch.ones(200, dtype=torch.long)
    inputs = {
        "input_values": values, "attention_mask": masks, "channel_mask": there, "labels": labels,
        "decoder_attention_mask": torch.ones(200, 3),
    }  # fmt: skip
    found = swap_channels(inputs, mirrored, torch.Generator().manual_seed(1))
    swapped = found["labels"] == 1
    assert 0.35 < swapped[there.all(1)].float().mean() < 0.65 and not swapped[~there.all(1)].any()
    for name in ("input_values", "attention_mask"):
        assert torch.equal(found[name][swapped], inputs[name][swapped].flip(1))
        assert torch.equal(found[name][~swapped], inputs[name][~swapped])
    assert found["channel_mask"] is there and found["decoder_attention_mask"] is inputs["decoder_attention_mask"]
    again = swap_channels(inputs, mirrored, torch.Generator().manual_seed(1))
    assert torch.equal(again["input_values"], found["input_values"])
    alone = {"input_values": values[:, :1], "channel_mask": there[:, :1], "labels": labels}
    assert torch.equal(swap_channels(alone, mirrored)["labels"], labels)


def test_mirrored_labels():
    single, several = SingleLabel(NAMES), MultiLabel(NAMES)
    assert single.mirrored(torch.tensor([0, 1, 2]), MIRROR).tolist() == [0, 2, 1]
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-100.0, -100.0, -100.0]])
    assert several.mirrored(labels, MIRROR).tolist() == [[1, 1, 0], [0, 0, 1], [-100] * 3]
    with pytest.raises(ValueError, match="`mirror_labels` has up, none of the classes front, left, right"):
        single.mirrored(torch.tensor([0]), {**MIRROR, "up": "front"})
    with pytest.raises(ValueError, match="`mirror_labels` are classes, which the labels of Regression are not"):
        Regression(["angle"]).mirrored(torch.zeros(1, 1), MIRROR)


def test_pairs_of_classes():
    assert parse_mirror({"left": "right"}) == MIRROR == parse_mirror(["left=right"]) == parse_mirror(MIRROR)
    assert parse_mirror(None) == {} == parse_mirror([])
    with pytest.raises(ValueError, match="'left' is mirrored by 'right' and by 'up'"):
        parse_mirror({"left": "right", "up": "left"})
    for word in ("left", "left=", "=right"):
        with pytest.raises(ValueError, match=f"are pairs of classes, such as left=right, got '{word}'"):
            parse_mirror([word])


def test_nothing_to_mirror(folder, tmp_path):
    model = Apart()
    model.active_peft_config.num_channels = None
    trainer = AudioTrainer(model, arguments(tmp_path), train_dataset=load(folder, training=True), mirror_labels=MIRROR)
    with pytest.raises(ValueError, match="`mirror_labels` reverses the order of channels, but clips are read as mono"):
        trainer.train()


def test_masks_of_spectrograms_are_the_same_in_all_channels():
    values = torch.rand(20, 3, 30, 16) + 1
    found = spec_augment(values, 8, 12, torch.Generator().manual_seed(0))
    assert torch.equal(found[:, 0] == 0, found[:, 2] == 0)
    expected = spec_augment(values[:, 1], 8, 12, torch.Generator().manual_seed(0))
    assert torch.equal(found[:, 1], expected)


def test_mixed_clips_have_the_channels_of_both(folder):
    samples = list(load(folder, channels="all"))[:2]
    batch = Collate(extractor(), SingleLabel(NAMES))(samples)
    torch.manual_seed(1)  # each clip with the other one
    found = mixup(batch, nn.functional.one_hot(batch["labels"], 3).float(), 0.5)
    assert found["channel_mask"].all()
    share = found["labels"][0, batch["labels"][0]]
    assert torch.allclose(found["input_values"][0, 1], (1 - share) * batch["input_values"][1, 1])


def test_the_options_of_a_run(folder, base_folder, tmp_path, capsys):
    given = {"channels": "all", "mirror_labels": "left=right"}
    run = parse(training_options(base_folder, folder, tmp_path / "run", **given))
    settings = run.settings()
    assert settings["channels"] == "all" and settings["mirror_labels"] == MIRROR
    assert parse([*training_options(base_folder, folder, tmp_path), "--channels", "0", "2"]).data.channels == (0, 2)
    streams = load_streams(run, run.make_task(), extractor())
    assert next(iter(streams["evaluation"]))["input_values"].shape == (2, FRAMES, MEL_BINS)
    config = tmp_path / "config.yaml"
    config.write_text("channels: [1, 0]\nmirror_labels: [left=right]\n")
    run = parse([*training_options(base_folder, folder, tmp_path), "--config", str(config)])
    assert run.data.channels == (1, 0) and run.data.mirror_labels == MIRROR
    with pytest.raises(SystemExit, match="--channels must be 'mono', 'all', or numbers of channels from 0 on"):
        main(["train", *training_options(base_folder, folder, tmp_path / "run", channels="stereo")])


def test_windows_are_classified_with_all_channels(folder):
    model = Apart().eval()
    classifier = Classifier(model, extractor(), tuple(NAMES), "softmax", False, 10_240, 400, "all")
    paths = [str(folder / "1.wav"), str(folder / "0.flac"), str(folder / "2.flac")]
    windows = [
        window
        for path in paths
        for window in cut_windows(path, audio_blocks(path, SAMPLING_RATE, "all"), SAMPLING_RATE, 8000, 8000, 400)
    ]
    results = list(classify_windows(classifier, windows, batch_size=8))
    assert [(result.name, result.start) for result in results] == [(w.name, w.start) for w in windows]
    # Windows of one channel are not in a batch with those of two.
    assert [values.shape[1] for values, *_ in model.seen] == [2, 1, 2]
    for window, result in zip(windows, results, strict=True):
        rows = extractor()(list(window.samples), sampling_rate=SAMPLING_RATE, return_tensors="pt")["input_values"]
        with torch.no_grad():
            expected = model.base(rows).logits.mean(0).softmax(-1)
        assert np.allclose(result.scores, expected, atol=1e-5)
    # A model with two channels gets two, one of them masked.
    model.seen.clear()
    padded = list(classify_windows(replace(classifier, num_channels=2), windows, batch_size=8))
    assert [values.shape[1] for values, *_ in model.seen] == [2, 2, 2]
    assert [mask.tolist()[0] for _, mask, _ in model.seen] == [[True, True], [True, False], [True, True]]
    for result, other in zip(results, padded, strict=True):
        assert np.allclose(result.scores, other.scores, atol=1e-5)


def test_the_command_classifies_all_channels(folder, tmp_path, monkeypatch, capsys):
    chosen = []

    def load_classifier(adapter, revision, *, channels, **options):
        chosen.append(channels)
        return Classifier(model, extractor(), tuple(NAMES), "softmax", False, 10_240, 400, channels or "all", 2)

    model = Apart().eval()
    monkeypatch.setattr(classify_command, "load_classifier", load_classifier)
    words = ["classify", "adapter", str(folder / "1.wav"), "--format", "json"]
    main(words)
    main([*words, "--channels", "1", "0"])
    assert chosen == [None, (1, 0)]
    (first, *_), (second, *_) = model.seen[0], model.seen[1]
    assert first.shape[1] == 2 and torch.equal(first.flip(1), second)
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 4
    with pytest.raises(SystemExit):
        main([*words, "--channels", "2"])
    assert "1.wav: it has 2 channels, counted from 0, and no channel 2 of" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--channels must be 'mono', 'all'"):
        main([*words, "--channels", "left"])
    soundfile.write(tmp_path / "three.wav", np.zeros((20_000, 3)), SAMPLING_RATE)
    with pytest.raises(SystemExit):
        main(["classify", "adapter", str(tmp_path / "three.wav")])
    assert capsys.readouterr().err.count("three.wav: it has 3 channels, more than the adapter reads") == 1
