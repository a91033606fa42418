"""Recordings with several channels: what is read of them, and what becomes of it."""

import io
import warnings

import numpy as np
import pytest
import soundfile
import torch
from conftest import FRAMES, MEL_BINS, SAMPLING_RATE
from recordings import encode
from transformers import (
    ASTFeatureExtractor,
    ClapFeatureExtractor,
    ParakeetFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Speech2TextFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from peft_softmoa.inference import cut_windows, pcm_blocks
from peft_softmoa.training import AudioError, Collate, DataOptions, ExtractFeatures, SingleLabel, decode_audio
from peft_softmoa.training.audio import audio_blocks, decode_crop
from peft_softmoa.training.channels import (
    check_levels,
    extract_jointly,
    most_channels,
    parse_channels,
    resolve_channels,
)

RATE = 44_100
# The largest error of a lossy codec at these levels.
FORMATS = {"wav": 1e-4, "flac": 1e-4, "ogg": 0.05, "m4a": 0.05, "opus": 0.1, "webm": 0.1}


def stereo(seconds=1.0, rate=RATE):
    """A low tone on the left, and a quieter, higher one on the right: `(2, samples)`."""
    time = np.arange(int(seconds * rate)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * 300 * time), 0.1 * np.sin(2 * np.pi * 700 * time)]).astype("f4")


def write(folder, extension, samples, rate=RATE):
    """A file with these channels, by libsndfile or by FFmpeg."""
    path = folder / f"clip.{extension}"
    container, codec = {"m4a": ("mp4", "aac"), "opus": ("ogg", "libopus"), "webm": ("webm", "libopus")}.get(
        extension, (None, None)
    )
    if codec is None:
        soundfile.write(path, samples.T, rate)
    else:
        path.write_bytes(encode(container, codec, samples, 48_000 if codec == "libopus" else rate, len(samples)))
    return path


def seconds_of(path):
    return 48_000 if path.suffix in (".opus", ".webm") else RATE


def test_choices():
    assert parse_channels(None) is None
    assert parse_channels("all") == "all" == parse_channels(["all"]) and parse_channels(["mono"]) == "mono"
    assert parse_channels([0, 2]) == (0, 2) == parse_channels(["0", "2"]) and parse_channels([1, 0]) == (1, 0)
    assert DataOptions(channels=["1"]).channels == (1,) and DataOptions().channels is None
    assert hash(DataOptions(channels=[0, 1])) == hash(DataOptions(channels=(0, 1)))
    for wrong in ("stereo", [], [-1], [0, 0], ["all", 1], [0.5], [True]):
        with pytest.raises(ValueError, match=r"`channels` must be 'mono', 'all', or numbers of channels from 0 on"):
            DataOptions(channels=wrong)


@pytest.mark.parametrize("extension", FORMATS)
def test_each_path_reads_the_same_channels(tmp_path, extension):
    given = stereo(rate=48_000 if extension in ("opus", "webm") else RATE)
    path = write(tmp_path, extension, given)
    rate = seconds_of(path)
    read = decode_audio(path, rate, channels="all")
    assert read.shape[0] == 2 and read.dtype == np.float32
    # Codecs fade in, and may add samples at the end.
    inner = slice(4000, given.shape[1] - 4000)
    assert np.abs(read[:, inner] - given[:, inner]).max() < FORMATS[extension]
    assert np.array_equal(decode_audio(path, rate), read.mean(0)) or extension not in ("wav", "flac")
    assert np.allclose(decode_audio(path, rate), read.mean(0), atol=1e-6)
    resampled = decode_audio(path, SAMPLING_RATE, channels="all")
    for chosen in ([0], [1], [1, 0]):
        assert np.array_equal(decode_audio(path, SAMPLING_RATE, channels=chosen), resampled[chosen])
    assert np.array_equal(decode_audio(path.read_bytes(), SAMPLING_RATE, channels="all"), resampled)
    assert np.array_equal(np.concatenate(list(audio_blocks(path, SAMPLING_RATE, "all")), axis=-1), resampled)
    half = decode_audio(path, SAMPLING_RATE, 0.5, "all")
    assert half.shape == (2, SAMPLING_RATE // 2) and np.array_equal(half[:, :7000], resampled[:, :7000])
    whole, start = decode_crop(path, SAMPLING_RATE, 10**6, np.random.default_rng(0), "all")
    assert start == 0 and np.array_equal(whole, resampled)


def test_each_channel_is_resampled_as_if_it_were_alone(tmp_path):
    path = write(tmp_path, "wav", stereo())
    read = decode_audio(path, SAMPLING_RATE, channels="all")
    for channel, samples in enumerate(stereo()):
        soundfile.write(tmp_path / "alone.wav", samples, RATE)
        assert np.array_equal(decode_audio(tmp_path / "alone.wav", SAMPLING_RATE), read[channel])


@pytest.mark.parametrize("extension", ["wav", "flac"])
@pytest.mark.parametrize("seconds", [2, 90])
def test_one_crop_for_all_channels(tmp_path, extension, seconds):
    # A short clip is decoded whole, a long one around the place.
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, seconds * 8000).astype("f4")
    path = write(tmp_path, extension, np.stack([samples, -0.5 * samples]), 8000)
    read, start = decode_crop(path, SAMPLING_RATE, 5000, np.random.default_rng(3), "all")
    mono, place = decode_crop(path, SAMPLING_RATE, 5000, np.random.default_rng(3))
    assert read.shape == (2, 5000) and start == place > 0
    assert np.abs(read[1] + 0.5 * read[0]).max() < 1e-4 and np.abs(read.mean(0) - mono).max() < 1e-4
    whole = decode_audio(path, SAMPLING_RATE, channels="all")
    assert np.abs(whole[:, start : start + 5000] - read).max() < 1e-4


def test_a_file_without_the_channel_is_named(tmp_path):
    path = write(tmp_path, "wav", stereo()[:1])
    message = r"clip.wav: it has 1 channel, counted from 0, and no channel 2, 1 of `channels=\[0, 2, 1\]`: choose"
    with pytest.raises(AudioError, match=message):
        decode_audio(path, SAMPLING_RATE, channels=[0, 2, 1])
    assert decode_audio(path, SAMPLING_RATE, channels="all").shape[0] == 1
    rows = {"audio": [str(path), str(write(tmp_path, "flac", stereo()))]}
    options = DataOptions(label_column=None, channels=[1])
    extract = ExtractFeatures(ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS), options=options)
    assert len(extract(rows)["input_values"]) == 1
    [skipped] = extract.skipped
    assert "clip.wav: it has 1 channel" in str(skipped)


def test_channels_that_change_within_a_file_are_an_error(tmp_path):
    parts = [write(tmp_path, "mp3", stereo()[:count]).read_bytes() for count in (2, 1)]
    assert decode_audio(b"".join(parts), RATE).ndim == 1
    with pytest.raises(AudioError, match="its number of channels changes from 2 to 1"):
        decode_audio(b"".join(parts), RATE, channels="all")


EXTRACTORS = {
    "ast": ASTFeatureExtractor(),
    "wav2vec2": Wav2Vec2FeatureExtractor(return_attention_mask=True),
    "whisper": WhisperFeatureExtractor(chunk_length=2),
    "wav2vec2-bert": SeamlessM4TFeatureExtractor(),
}


def noise(levels, samples=16_077):
    """The same noise in channels of these levels."""
    return np.outer(levels, np.random.default_rng(0).standard_normal(samples)).astype("f4")


@pytest.mark.parametrize("name", EXTRACTORS)
def test_features_keep_the_ratio_of_levels(name):
    extractor = EXTRACTORS[name]
    main = extractor.model_input_names[0]
    loud, quiet = extract_jointly(extractor, noise([0.1, 0.05]))[main]
    if name == "wav2vec2":
        # One mean and one variance.
        assert np.sqrt((loud**2).mean() / (quiet**2).mean()) == pytest.approx(2, rel=1e-3)
        joined = np.concatenate([loud, quiet])
        assert abs(joined.mean()) < 1e-5 and joined.var() == pytest.approx(1, rel=1e-3)
    elif name == "whisper":
        # Where there is sound, four times the power is log10(4) / 4; the floor is the same.
        sound = quiet[:, :98] > quiet.min()
        assert np.median((loud[:, :98] - quiet[:, :98])[sound]) == pytest.approx(np.log10(4) / 4, rel=1e-2)
        assert loud.min() == pytest.approx(quiet.min(), abs=1e-6) == pytest.approx(loud.max() - 2, abs=1e-6)
    elif name == "ast":
        # Decibels by two standard deviations, as the extractor has them.
        assert np.median(loud[:90] - quiet[:90]) == pytest.approx(np.log(4) / (2 * extractor.std), rel=1e-2)
    else:
        # Of each mel bin the mean and the variance are those of all channels.
        frames = np.stack([loud, quiet])[:, :-1].reshape(-1, 80)
        assert np.abs(frames.mean(0)).max() < 0.05 and np.abs(frames.std(0) - 1).max() < 0.05
        assert (loud - quiet)[:-1].min() > 0.3


@pytest.mark.parametrize("name", EXTRACTORS)
def test_one_channel_has_the_features_of_mono(name):
    extractor, samples = EXTRACTORS[name], noise([0.1])
    alone = extractor(samples[0], sampling_rate=SAMPLING_RATE, return_tensors="np")
    found = extract_jointly(extractor, samples)
    assert found.keys() == alone.keys()
    for key, values in alone.items():
        assert np.array_equal(found[key], values)
    assert extractor.to_dict() == EXTRACTORS[name].to_dict() and getattr(extractor, "do_normalize", True)


def test_whisper_has_the_floor_of_the_loudest_channel():
    loud, quiet = extract_jointly(EXTRACTORS["whisper"], noise([1, 1e-3]))["input_features"]
    alone = EXTRACTORS["whisper"](noise([1e-3])[0], sampling_rate=SAMPLING_RATE, return_tensors="np")
    assert np.allclose(quiet, np.maximum(alone["input_features"][0], loud.max() - 2), atol=1e-6)
    assert quiet.min() > alone["input_features"].min() + 0.5


def test_clap_cuts_all_channels_at_one_place():
    extractor = ClapFeatureExtractor(max_length_s=1, truncation="rand_trunc")
    np.random.seed(0)
    first, second = extract_jointly(extractor, noise([0.1, 0.1], 200_000))["input_features"]
    assert np.array_equal(first, second)
    other = extract_jointly(extractor, noise([0.1, 0.1], 200_000))["input_features"][0]
    assert not np.array_equal(first, other)


def test_what_removes_levels_is_refused():
    for extractor in EXTRACTORS.values():
        check_levels(extractor)
    for extractor in (Speech2TextFeatureExtractor(), ParakeetFeatureExtractor()):
        with pytest.raises(ValueError, match=f"^{type(extractor).__name__} normalizes each channel by itself"):
            check_levels(extractor)


@pytest.mark.parametrize(
    ("norm", "bias", "warns"), [("group", False, True), ("layer", False, True), ("layer", True, False)]
)
def test_models_that_remove_levels_are_warned_of(norm, bias, warns):
    model = Adapted(num_channels=2)
    model.config = type("Config", (), {"feat_extract_norm": norm, "conv_bias": bias})()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert resolve_channels(None, model) == "all"
    assert [("next to nothing of the differences in level" in str(each.message)) for each in caught] == [True] * warns


class Adapted(torch.nn.Module):
    """A model with the config of an adapter."""

    def __init__(self, **fields):
        super().__init__()
        self.active_peft_config = type("Config", (), fields)()


def test_what_a_model_reads():
    several, mono, lora = Adapted(num_channels=2), Adapted(num_channels=None), Adapted(r=8)
    for given, model, expected in [
        (None, several, "all"), ("all", several, "all"), ((0, 2), several, (0, 2)), (None, mono, "mono"),
        ("mono", mono, "mono"), (None, lora, "mono"), ("all", lora, "all"), (None, torch.nn.Identity(), "mono"),
    ]:  # fmt: skip
        assert resolve_channels(given, model) == expected
    with pytest.raises(ValueError, match=r"`channels=mono` mixes all channels, .*\(num_channels=2\): leave it out"):
        resolve_channels("mono", several)
    for given, named in [("all", "all"), ((0, 2), r"\[0, 2\]")]:
        with pytest.raises(ValueError, match=f"`channels={named}` is for an adapter with `num_channels`"):
            resolve_channels(given, mono)
    with pytest.raises(ValueError, match=r"`channels=\[0, 2, 1\]` are more than the adapter reads \(num_channels=2\)"):
        resolve_channels((0, 2, 1), several)
    any_number = Adapted(num_channels=2, channel_embedding=False)
    assert resolve_channels((0, 2, 1), any_number) == (0, 2, 1)
    assert [most_channels(each) for each in (several, any_number, mono, lora)] == [2, None, None, None]


def extract_all(extractor, *clips, **options):
    rows = {"audio": [{"path": None, "bytes": clip} for clip in clips], "label": ["x"] * len(clips)}
    batch = ExtractFeatures(extractor, SingleLabel(["x"]), DataOptions(channels="all", **options))(rows)
    return [{name: column[index] for name, column in batch.items()} for index in range(len(clips))]


def content(samples):
    file = io.BytesIO()
    soundfile.write(file, samples.T, SAMPLING_RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


@pytest.mark.parametrize("name", EXTRACTORS)
def test_batches_pad_missing_channels(name):
    extractor = EXTRACTORS[name]
    main = extractor.model_input_names[0]
    samples = extract_all(extractor, content(noise([1, 0.5], 9000)), content(noise([0.1], 12_000)))
    assert [sample["channel_mask"].tolist() for sample in samples] == [[True, True], [True]]
    batch = Collate(extractor, SingleLabel(["x"]))(samples)
    assert batch["channel_mask"].tolist() == [[True, True], [True, False]] and batch["labels"].tolist() == [0, 0]
    for (row, channel), is_there in np.ndenumerate(batch["channel_mask"].numpy()):
        values = batch[main][row, channel]
        if not is_there:
            assert not values.any()
            continue
        given = torch.as_tensor(samples[row][main][channel])
        assert torch.equal(values[: len(given)], given)
    if "attention_mask" in batch:
        # One for all channels of a clip.
        assert batch["attention_mask"].shape == (2, batch[main].shape[2]) and batch["attention_mask"].any(-1).all()
    alike = Collate(extractor)([samples[0], samples[0]])
    assert alike["channel_mask"].tolist() == [[True] * 2] * 2 and alike[main].shape[:2] == (2, 2)


def test_batches_have_the_channels_that_the_model_reads():
    extractor = EXTRACTORS["wav2vec2"]
    options = DataOptions(label_column=None, channels=[0])
    extract = ExtractFeatures(extractor, options=options)
    extract.most_channels = 3
    batch = extract({"audio": [{"path": None, "bytes": content(noise([1, 0.5], 900))}]})
    [mask] = batch["channel_mask"]
    assert mask.tolist() == [True, False, False] and batch["input_values"][0].shape == (1, 900)
    found = Collate(extractor)([{name: column[0] for name, column in batch.items()}])
    assert found["input_values"].shape == (1, 3, 900) and found["channel_mask"].tolist() == [mask.tolist()]
    assert not found["input_values"][0, 1:].any() and found["attention_mask"].all()


def test_collating_mono_is_as_before():
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    samples = [{"input_values": each} for each in (np.ones(5, "f4"), np.ones(3, "f4"))]
    batch = Collate(extractor)(samples)
    assert batch["input_values"].shape == (2, 5) and batch.keys() == {"input_values", "attention_mask"}


def test_windows_have_all_channels(tmp_path):
    path = write(tmp_path, "wav", stereo(2.0))
    whole = decode_audio(path, SAMPLING_RATE, channels="all")
    windows = list(cut_windows("clip", audio_blocks(path, SAMPLING_RATE, "all"), SAMPLING_RATE, 9000, 7000))
    assert [(window.start, window.samples.shape) for window in windows] == [
        (start / SAMPLING_RATE, (2, min(9000, 32_000 - start))) for start in range(0, 28_001, 7000)
    ]
    for window in windows:
        start = round(window.start * SAMPLING_RATE)
        assert np.array_equal(window.samples, whole[:, start : start + 9000])


def test_pipes_have_all_channels():
    values = np.arange(-300, 300, dtype="<i2").reshape(-1, 3)
    for channels, expected in (("all", [0, 1, 2]), ([2, 0], [2, 0])):
        [block] = pcm_blocks(io.BytesIO(values.tobytes()), "pipe", num_channels=3, channels=channels)
        assert np.array_equal(block, values.T[expected].astype("f4") / 2**15)
    with pytest.raises(AudioError, match="pipe: it has 3 channels, counted from 0, and no channel 3"):
        next(pcm_blocks(io.BytesIO(values.tobytes()), "pipe", num_channels=3, channels=[3]))
