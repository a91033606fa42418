import io
import math
import time
import tracemalloc

import numpy as np
import pytest
import soundfile
from conftest import SAMPLING_RATE, write_tone
from recordings import RATE, encode, signal

from peft_softmoa.inference.windows import Meter, cut_windows, find_clips, pcm_blocks
from peft_softmoa.training import AudioError, decode_audio
from peft_softmoa.training.audio import audio_blocks


def noise(count, seed=0):
    return np.random.default_rng(seed).uniform(-0.9, 0.9, count).astype("f4")


def in_pieces(samples, seed=0):
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(samples) + 1, 7))
    return iter(np.split(samples, cuts))


@pytest.mark.parametrize("count", [1, 9, 10, 11, 12, 19, 20, 21, 57])
@pytest.mark.parametrize("step", [1, 3, 7, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_windows_are_slices_that_hold_all_samples(count, step, seed):
    samples = noise(count)
    windows = list(cut_windows("clip", in_pieces(samples, seed), 5, 10, step))
    number = 1 if count <= 10 else math.ceil((count - 10) / step) + 1
    assert len(windows) == number
    for index, window in enumerate(windows):
        assert np.array_equal(window.samples, samples[index * step : index * step + 10])
        assert (window.name, window.start) == ("clip", index * step / 5)
        assert window.end == min(index * step + 10, count) / 5


def test_a_window_comes_before_the_next_block_is_read():
    def blocks():
        yield noise(15)
        raise AssertionError("read too far")

    windows = cut_windows("clip", blocks(), 5, 10, 5)
    assert [next(windows).end, next(windows).end] == [2, 3]


def test_a_rest_without_a_token_is_left_out():
    def ends(count):
        return [window.end for window in cut_windows("clip", [noise(count)], 1, 10, 10, min_samples=4)]

    assert ends(13) == [10] and ends(14) == [10, 14]
    assert ends(3) == [3]  # a whole clip, which is an error later on


@pytest.mark.parametrize("step", [0, 11])
def test_steps_that_leave_samples_out(step):
    with pytest.raises(ValueError, match="`step` must be from 1 to the 10 samples of a window, got"):
        next(cut_windows("clip", [noise(20)], 1, 10, step))


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_blocks_of_a_file_are_what_is_decoded_at_once(tmp_path, rate):
    soundfile.write(tmp_path / "clip.flac", noise(9 * rate), rate)
    blocks = list(audio_blocks(tmp_path / "clip.flac", SAMPLING_RATE))
    assert len(blocks) > 2
    assert np.array_equal(np.concatenate(blocks), decode_audio(tmp_path / "clip.flac", SAMPLING_RATE))


def test_memory_does_not_depend_on_the_length(tmp_path):
    minutes, rate = 20, 44_100
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate, 1) as file:
        for minute in range(minutes):
            file.write(noise(60 * rate, minute))
    next(audio_blocks(tmp_path / "long.wav", SAMPLING_RATE))  # loads the libraries
    tracemalloc.start()
    length = 10 * SAMPLING_RATE
    windows = cut_windows("clip", audio_blocks(tmp_path / "long.wav", SAMPLING_RATE), SAMPLING_RATE, length, length)
    assert sum(1 for _ in windows) == minutes * 6
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20 < minutes * 60 * SAMPLING_RATE * 4 / 8


class Pipe:
    """Gives a few bytes at once, as a pipe does."""

    def __init__(self, content, count):
        self.file, self.count = io.BytesIO(content), count

    def read(self, size):
        return self.file.read(min(size, self.count))


@pytest.mark.parametrize("count", [1, 3, 5, 7, 64, 10_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("name", "dtype", "subtype"), [("s16le", "<i2", "PCM_16"), ("f32le", "<f4", "FLOAT")])
def test_pcm(tmp_path, count, channels, name, dtype, subtype):
    samples = noise(100 * channels).reshape(-1, channels)
    soundfile.write(tmp_path / "clip.wav", samples, SAMPLING_RATE, subtype)
    stored = samples if name == "f32le" else soundfile.read(tmp_path / "clip.wav", dtype="int16")[0]
    content = stored.astype(dtype).tobytes()
    wanted = decode_audio(tmp_path / "clip.wav", SAMPLING_RATE)
    for cut in (0, 1, 3):  # a pipe that ends within a sample
        end = 100 - (cut > 0)
        blocks = list(pcm_blocks(Pipe(content[: len(content) - cut], count), "pipe", name, channels))
        read = np.concatenate(blocks)
        assert read.dtype == np.float32
        if channels == 1 and name == "s16le" and cut == 3:
            end -= 1
        assert np.array_equal(read, wanted[:end])


def test_a_pipe_with_a_file_in_it(tmp_path):
    write_tone(tmp_path / "clip.wav")
    with pytest.raises(AudioError, match="^pipe: it begins like an audio file, but raw PCM is read from a pipe"):
        next(pcm_blocks(io.BytesIO((tmp_path / "clip.wav").read_bytes()), "pipe"))


@pytest.mark.parametrize("count", [1, 5, 10_000])
@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("mp4", "aac", RATE),
        ("3gp", "libopencore_amrnb", 8000),
        ("amr", "libopencore_amrnb", 8000),
        ("wv", "wavpack", RATE),
        ("asf", "wmav2", RATE),
        ("flac", "flac", RATE),
    ],
)
def test_a_pipe_with_a_file_that_ffmpeg_reads(tmp_path, container, codec, rate, count):
    content = encode(container, codec, signal(0.5, rate), rate, path=tmp_path / "clip")
    with pytest.raises(AudioError, match="^pipe: it begins like an audio file, but raw PCM is read from a pipe"):
        next(pcm_blocks(Pipe(content, count), "pipe"))


def test_an_empty_pipe():
    assert list(pcm_blocks(io.BytesIO(), "pipe")) == [] == list(pcm_blocks(io.BytesIO(b"\0"), "pipe"))


def test_clips_of_folders(tmp_path):
    for name in ("b.wav", "a.FLAC", "in/c.mp3", "in/notes.txt", ".hidden/d.wav", "._a.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = list(find_clips(["first.xyz", str(tmp_path), "https://host/clip.wav"]))
    inner = [str(tmp_path / name) for name in ("a.FLAC", "b.wav", "in/c.mp3")]
    assert found == ["first.xyz", *inner, "https://host/clip.wav"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="/empty' has no audio files: they end in .3gp, "):
        list(find_clips([str(tmp_path / "empty")]))


def test_waiting_is_no_computing():
    def slow():
        for _ in range(3):
            time.sleep(0.2)
            yield noise(50)

    meter = Meter(100)
    assert meter.summary() == "No audio was read."
    assert sum(map(len, meter.count(meter.wait(slow())))) == 150
    assert meter.audio_seconds == 1.5 and meter.waited >= 0.6 and meter.compute_seconds < 0.4
    time.sleep(0.5)
    assert meter.compute_seconds >= 0.5
    assert meter.summary().startswith("1.5 s of audio in 0.")
