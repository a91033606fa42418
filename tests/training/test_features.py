"""From rows to the inputs of a model."""

import logging

import numpy as np
import pytest
import soundfile
import torch
from conftest import FRAMES, MEL_BINS, SAMPLING_RATE, write_parquet, write_tone
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import ASTFeatureExtractor

from peft_softmoa.training import (
    AudioError,
    AudioStream,
    DataOptions,
    DatasetSummary,
    ExtractFeatures,
    decode_audio,
    load_rows,
)
from peft_softmoa.training.tasks import SingleLabel


@pytest.fixture
def feature_extractor():
    return ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS)


def bad_folder(folder):
    """Two good files, one of them silent, between bad ones."""
    write_tone(folder / "good.wav")
    soundfile.write(folder / "silent.wav", np.zeros(8000), SAMPLING_RATE)
    (folder / "noise.wav").write_bytes(b"this is no audio")
    soundfile.write(folder / "nan.wav", np.full(800, np.nan), SAMPLING_RATE, subtype="FLOAT")
    soundfile.write(folder / "blip.wav", np.zeros(20), SAMPLING_RATE)
    names = ["noise.wav", "good.wav", "missing.wav", "nan.wav", "silent.wav", "blip.wav"]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *(f"{name},x" for name in names)]))
    return folder


def test_bad_audio_is_skipped_counted_and_named_once(tmp_path, feature_extractor, caplog):
    rows = load_rows(str(bad_folder(tmp_path)), "train")
    extract = ExtractFeatures(feature_extractor, SingleLabel(["x"]))
    stream = AudioStream(rows, extract, DatasetSummary(6, ("x",)))
    with caplog.at_level(logging.WARNING):
        assert len(list(stream)) == 2
        assert len(list(stream)) == 2 and len(extract.skipped) == 4
    messages = [record.message for record in caplog.records if record.name.startswith("peft_softmoa")]
    assert len(messages) == 1 and messages[0].startswith("Skipped 4 of 6 audio files")
    for name in (
        "noise.wav: unreadable",
        "missing.wav: unreadable",
        "nan.wav: samples that are not finite",
        "blip.wav: no features",
    ):
        assert name in messages[0]


def test_a_warning_of_thousands_names_some(tmp_path, feature_extractor, caplog):
    write_tone(tmp_path / "good.wav")
    names = ["good.wav", *(f"missing-{index}.wav" for index in range(5000))]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *(f"{name},x" for name in names)]))
    stream = AudioStream(load_rows(str(tmp_path), "train"), ExtractFeatures(feature_extractor, SingleLabel(["x"])))
    with caplog.at_level(logging.WARNING):
        assert len(list(stream)) == 1
    [message] = [record.message for record in caplog.records if record.name.startswith("peft_softmoa")]
    assert message.startswith("Skipped 5000 audio files") and message.endswith(" and 4,990 more")
    assert "missing-9.wav" in message and len(message) < 3000


def test_every_skipped_clip_counts(tmp_path, tones_folder, feature_extractor, caplog):
    """Also those without a name, and those with the same name; also if the pass does not end."""
    rows = [{"audio": audio, "label": "x"} for audio in [None, b"no audio", {"path": None, "bytes": b""}]]
    rows += [{"audio": str(tones_folder / "1-low-0.wav"), "label": "x"}] * 20
    extract = ExtractFeatures(feature_extractor, SingleLabel(["x"]))
    dataset = IterableDataset.from_generator(lambda: iter(rows))
    stream = AudioStream(dataset, extract, DatasetSummary(23, ("x",)))
    with caplog.at_level(logging.WARNING):
        examples = iter(stream)
        next(examples)
        examples.close()
    assert "Skipped 3 of 23 audio files" in caplog.text and "<_io" not in caplog.text


def test_nothing_but_bad_audio(tmp_path, feature_extractor):
    (tmp_path / "metadata.csv").write_text("file_name,label\na.wav,x\nb.wav,x\n")
    extract = ExtractFeatures(feature_extractor, SingleLabel(["x"]))
    stream = AudioStream(load_rows(str(tmp_path), "train"), extract)
    with pytest.raises(
        ValueError, match="None of the 2 audio files can be used: .*a.wav: unreadable.*b.wav: unreadable"
    ):
        list(stream)


def test_a_column_that_holds_no_audio(tones_folder, feature_extractor, tmp_path):
    rows = load_rows(str(write_parquet(tmp_path / "parquet", tones_folder)), "train")
    extract = ExtractFeatures(feature_extractor, SingleLabel(["high", "low"]), DataOptions(audio_column="fold"))
    with pytest.raises(ValueError, match="Column 'fold' holds int, but audio is a path"):
        list(AudioStream(rows, extract))


def test_bad_audio_can_be_an_error(tmp_path, feature_extractor):
    rows = load_rows(str(bad_folder(tmp_path)), "train")
    with pytest.raises(AudioError, match="noise.wav: unreadable"):
        list(
            AudioStream(rows, ExtractFeatures(feature_extractor, SingleLabel(["x"]), DataOptions(on_bad_audio="raise")))
        )


def test_labels_that_are_no_classes(tones_folder, feature_extractor, tmp_path):
    rows = load_rows(str(tones_folder), "train")
    with pytest.raises(ValueError, match="1-high-0.wav: label 'high' is none of the classes low, middle"):
        list(AudioStream(rows, ExtractFeatures(feature_extractor, SingleLabel(["low", "middle"]))))
    folder = write_parquet(tmp_path / "parquet", tones_folder)
    rows = load_rows(str(folder), "train")
    with pytest.raises(ValueError, match="label 1 is no index of the 1 classes high"):
        list(AudioStream(rows, ExtractFeatures(feature_extractor, SingleLabel(["high"], {"label": ["high"]}))))


def test_shuffling_differs_between_epochs_and_repeats_with_the_seed(tones_folder, feature_extractor):
    rows = load_rows(str(tones_folder), "train")

    def order(seed, epoch):
        extract = ExtractFeatures(feature_extractor, SingleLabel(["high", "low"]))
        stream = AudioStream(rows, extract, shuffle_buffer=16, seed=seed)
        stream.set_epoch(epoch)
        return [float(example["input_values"].sum()) for example in stream]

    first = order(0, 0)
    assert first == order(0, 0)
    assert first != order(0, 1) and first != order(1, 0)
    assert sorted(first) == sorted(order(0, 1)) == sorted(order(1, 0))


def test_long_clips_are_cut(tmp_path, feature_extractor):
    time = np.arange(2 * SAMPLING_RATE) / SAMPLING_RATE
    soundfile.write(tmp_path / "long.wav", 0.1 * np.sin(400 * time * (1 + time)), SAMPLING_RATE)
    (tmp_path / "metadata.csv").write_text("file_name,label\nlong.wav,x\n")
    rows = load_rows(str(tmp_path), "train")
    lengths = []

    class Recorder:
        sampling_rate, model_input_names = SAMPLING_RATE, ["input_values"]

        def __call__(self, waveform, **options):
            lengths.append(len(waveform))
            return {"input_values": waveform[None]}

    def cut(random_crop=False):
        extract = ExtractFeatures(
            Recorder(), SingleLabel(["x"]), DataOptions(max_length_seconds=0.25), random_crop=random_crop
        )
        stream = AudioStream(rows, extract)
        clips = []
        for epoch in range(3):
            stream.set_epoch(epoch)
            clips.append(next(iter(stream))["input_values"])
        return clips

    whole = decode_audio(tmp_path / "long.wav", SAMPLING_RATE)
    assert all(np.array_equal(clip, whole[:4000]) for clip in cut())
    random = cut(random_crop=True)
    assert set(lengths) == {4000}
    assert not np.array_equal(random[0], random[1])
    assert all(np.array_equal(*clips) for clips in zip(random, cut(random_crop=True), strict=True))


def test_streams_go_through_a_data_loader(tones_folder, feature_extractor):
    extract = ExtractFeatures(feature_extractor, SingleLabel(["high", "low"]))
    stream = AudioStream(load_rows(str(tones_folder), "train"), extract, DatasetSummary(16, ("high", "low")))
    loader = DataLoader(stream, batch_size=6)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert batches[0]["input_values"].shape == (6, FRAMES, MEL_BINS)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == ([1] * 4 + [0] * 4) * 2


def test_a_random_cut_begins_at_every_place(tmp_path, feature_extractor):
    """Of five samples, two: they begin at the first, second, third or fourth, and at no other."""
    samples = np.arange(1, 6, dtype="f4") / 8
    soundfile.write(tmp_path / "five.wav", samples, SAMPLING_RATE, subtype="FLOAT")

    class Samples:
        sampling_rate, model_input_names = SAMPLING_RATE, ["input_values"]

        def __call__(self, waveform, **options):
            return {"input_values": waveform[None]}

    options = DataOptions(label_column=None, max_length_seconds=2 / SAMPLING_RATE)
    extract = ExtractFeatures(Samples(), None, options, random_crop=True)
    generator = np.random.default_rng(0)
    clips = extract({"audio": [str(tmp_path / "five.wav")] * 200}, generator)["input_values"]
    assert {tuple(clip) for clip in clips} == {tuple(samples[start : start + 2]) for start in range(4)}
