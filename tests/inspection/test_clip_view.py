"""The maps of a clip: their shades lie where the slots read, over the spectrogram at the same time."""

import base64
import io

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from conftest import SAMPLING_RATE

from peft_softmoa.inspection import Record, reading_map
from peft_softmoa.inspection.blocks import Statistics
from peft_softmoa.inspection.clip_plots import Clip
from peft_softmoa.inspection.clip_view import clip_view, find_peaks, time_ticks
from peft_softmoa.inspection.clips import ClipReading
from peft_softmoa.inspection.report import ExpertReport
from peft_softmoa.inspection.spectrograms import log_mel, mel_frequencies, own_spectrogram
from peft_softmoa.method import PatchGrid

GRID = PatchGrid(2, 12, 101, 16, 10, 10)
FREQUENCIES = mel_frequencies(128, SAMPLING_RATE)
NOISE = np.random.default_rng(0).normal(size=(128, 1024)).astype("f4")


def pixels(image):
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(image.source.partition("base64,")[2]))), int)


def view(dispatch, grid=GRID, clip=None, **options):
    """What the page shows of one block with dispatch weights (T, N, P)."""
    dispatch = dispatch[None].double()
    record = Record("layer.0.mlp", "default", dispatch, dispatch, dispatch.sum(3), torch.ones(dispatch.shape[:2]) > 0)
    statistics = Statistics()
    statistics.update(record)
    clip = clip or Clip("dog.wav", np.zeros(8 * SAMPLING_RATE, "f4"), SAMPLING_RATE, NOISE, 10.24, FREQUENCIES)
    reading = ClipReading(clip, 8.0, {}, grid, (record,), (reading_map(record, grid),), (), "dog (90%)", **options)
    return clip_view(ExpertReport((statistics.result("layer.0.mlp", "default"),), 1), reading), reading


def test_a_map_is_bright_where_its_slot_reads():
    """At the place of the one patch, low frequencies at the bottom; patches of 16 lie 10 apart."""
    dispatch = torch.zeros(2 + 12 * 101, 2, 1)
    dispatch[0, 0] = 0.25
    dispatch[2 + 1 * 101 + 40, 0] = 0.75
    dispatch[2:, 1] = 1 / (12 * 101)
    found, reading = view(dispatch)
    [block] = found.blocks
    first, second = block.maps
    # 126 of 128 bins, and 1016 of 1024 frames, in steps of two.
    assert pixels(first.image).shape == (63, 508)
    assert (first.image.width, first.image.height) == (pytest.approx(100 * 1016 / 1024), pytest.approx(100 * 126 / 128))
    shades = pixels(first.image)[::-1]  # from the lowest bin on
    rows, columns = np.nonzero(shades)
    assert (rows.min(), rows.max() + 1) == (5, 13) and (columns.min(), columns.max() + 1) == (200, 208)
    assert shades.max() == 255
    # Equal readings have a quarter of the shade, as the legend says, however many patches overlap.
    [zero, one, top] = block.scale
    assert (zero.at, one.label, top.at) == (0, "1", 100) and one.at == pytest.approx(25)
    assert set(np.unique(pixels(second.image))) <= {63, 64}
    assert first.notes[1:] == ["25% elsewhere"] and second.notes == ["up to 1 ×"]
    [peak, _] = find_peaks(reading.maps[0], reading)
    assert first.alt == f"Reads most at {peak['seconds']:.2f} s, {peak['hertz']:.0f} Hz."
    assert (first.name, second.name, second.expert) == ("Expert 0", "Expert 1", 1)


def test_a_map_of_a_sequence_is_a_strip():
    dispatch = torch.zeros(50, 2, 2)
    dispatch[10, 0, 0] = dispatch[:, 0, 1] = 1.0
    samples = np.zeros(SAMPLING_RATE, "f4")
    clip = Clip("dog.wav", samples, SAMPLING_RATE, *log_mel(samples, SAMPLING_RATE, 1.0)[:1], 1.0, FREQUENCIES[:64])
    found, _ = view(dispatch, None, clip, reads_spectrogram=False)
    maps = found.blocks[0].maps
    assert [(each.name, each.expert) for each in maps] == [
        ("Expert 0, slot 0", 0), ("Expert 0, slot 1", 0), ("Expert 1, slot 0", 1), ("Expert 1, slot 1", 1),
    ]  # fmt: skip
    assert pixels(maps[0].image).shape == (1, 50) and np.nonzero(pixels(maps[0].image)[0])[0].tolist() == [10]
    assert maps[0].alt == "Reads most at 0.21 s." and maps[2].alt == "Reads nothing of the clip."
    assert maps[2].notes == ["reads nothing"]
    assert not found.has_frequencies and found.end is None and found.kind == "Log-mel spectrogram"


def test_long_sequences_are_averaged():
    dispatch = torch.zeros(2500, 1, 1)
    dispatch[2000] = 1.0
    samples = np.zeros(50 * SAMPLING_RATE, "f4")
    clip = Clip("dog.wav", samples, SAMPLING_RATE, NOISE, 50.0, FREQUENCIES)
    [only] = view(dispatch, None, clip)[0].blocks[0].maps
    shades = pixels(only.image)[0]
    assert len(shades) == 834 and np.nonzero(shades)[0].tolist() == [2000 // 3]


def test_padding_is_not_drawn():
    found, _ = view(torch.full((2 + 12 * 101, 2, 1), 1e-3))
    assert found.end == pytest.approx(100 * 8 / 10.24)
    assert found.end - 0.5 < found.spectrogram.width <= found.end
    assert pixels(found.spectrogram).shape[0] == 128 and found.sound[:4] == b"RIFF"
    assert found.says == "The model says dog (90%)." and found.kind == "What the model reads"
    for tick in found.frequencies:
        bin_at = tick.at / 100 * 128 - 0.5
        assert np.interp(bin_at, range(128), FREQUENCIES) == pytest.approx(
            1000 * float(tick.label.split()[0]), rel=1e-6
        )


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [
        (5.12, ["0", "1", "2", "3", "4", "5"]),
        (0.5, ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]),
        (30, ["0", "5", "10", "15", "20", "25", "30"]),
        (0.031, ["0", "0.01", "0.02", "0.03"]),
        (10.24, ["0", "2", "4", "6", "8", "10"]),
    ],
)
def test_times_are_round(seconds, labels):
    ticks = time_ticks(seconds)
    assert [tick.label for tick in ticks] == labels
    assert [tick.at for tick in ticks] == pytest.approx([100 * float(label) / seconds for label in labels])


@pytest.mark.parametrize(("pitch", "rate"), [(100, 16_000), (440, 16_000), (3000, 48_000), (1000, 8000)])
def test_a_tone_is_at_its_frequency_and_time(pitch, rate):
    samples = np.zeros(2 * rate, "f4")
    samples[rate : rate + rate // 2] = np.sin(np.arange(rate // 2) * 2 * np.pi * pitch / rate)
    levels, frequencies = log_mel(samples, rate, 2.0)
    assert levels.shape == (64, 200 + 1) and np.isfinite(levels).all()
    bin_at, frame = np.unravel_index(levels.argmax(), levels.shape)
    assert frequencies[max(bin_at - 1, 0)] <= pitch <= frequencies[bin_at + 1] and 100 <= frame <= 150
    assert levels[:, :95].max() <= levels.max() - 75 and levels[:, 160:].max() <= levels.max() - 75


def test_a_long_clip_has_not_more_frames_than_a_page_shows():
    assert log_mel(np.zeros(9, "f4"), 8000, 60.0)[0].shape[1] <= 1000


EXTRACTORS = {
    "Whisper": lambda: transformers.WhisperFeatureExtractor(chunk_length=2),
    "Speech2Text": lambda: transformers.Speech2TextFeatureExtractor(),
    "Wav2Vec2-BERT": lambda: transformers.SeamlessM4TFeatureExtractor(),
}


@pytest.mark.parametrize("name", EXTRACTORS)
def test_the_features_of_a_model_of_spectrograms_are_its_spectrogram(name):
    """Whichever axis has the bins, also if several frames are one input, and if each bin is normalized."""
    extractor = EXTRACTORS[name]()
    samples = np.random.default_rng(0).normal(scale=0.3, size=24_000)
    samples[8000:16_000] += 0.3 * np.sin(np.arange(8000) * 2 * np.pi * 1000 / SAMPLING_RATE)
    features = extractor(samples, sampling_rate=SAMPLING_RATE, return_tensors="np")["input_features"][0]
    spectrogram, frequencies = own_spectrogram(extractor, np.asarray(features))
    assert len(spectrogram) == len(frequencies) == 80 and spectrogram.size == features.size
    assert (np.diff(frequencies) >= 0).all()
    with_tone, without = spectrogram[:, 55:95].mean(1), spectrogram[:, 105:145].mean(1)
    # Or the bin beside it: after a normalization both stand out alike.
    assert abs((with_tone - without).argmax() - np.abs(frequencies - 1000).argmin()) <= 1


def test_other_features_are_no_spectrogram():
    whisper = transformers.WhisperFeatureExtractor(feature_size=80)
    assert own_spectrogram(whisper, np.zeros((80, 80))) is None  # which axis has the bins?
    assert own_spectrogram(whisper, np.zeros((64, 100))) is None
    assert own_spectrogram(whisper, np.zeros(16_000)) is None
    assert own_spectrogram(transformers.Wav2Vec2FeatureExtractor(), np.zeros(16_000)) is None
