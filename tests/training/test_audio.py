"""Audio files: what is decoded, and what is an error."""

import errno
import io
import os

import numpy as np
import pytest
import soundfile
from conftest import SAMPLING_RATE, write_tone

from peft_softmoa.training import AudioError, decode_audio

FORMATS = [
    ("wav", "PCM_16"),
    ("wav", "FLOAT"),
    ("flac", "PCM_16"),
    ("ogg", "VORBIS"),
    ("mp3", "MPEG_LAYER_III"),
    ("aiff", "PCM_16"),
]


@pytest.mark.parametrize("extension, subtype", FORMATS)
def test_decodes_paths_bytes_and_rows(tmp_path, extension, subtype):
    path = tmp_path / f"tone.{extension}"
    samples = write_tone(path, subtype=subtype, format=extension.upper())
    for audio in (
        path,
        str(path),
        path.read_bytes(),
        {"path": str(path), "bytes": None},
        {"path": None, "bytes": path.read_bytes()},
    ):
        decoded = decode_audio(audio, SAMPLING_RATE)
        assert decoded.dtype == np.float32 and decoded.ndim == 1
        assert np.sqrt(np.mean((decoded[500:7500] - samples[500:7500]) ** 2)) < 0.03


def test_mixes_channels_and_resamples(tmp_path):
    time = np.arange(44_100) / 44_100
    left, right = np.sin(2 * np.pi * 300 * time), np.zeros(44_100)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 44_100)
    decoded = decode_audio(tmp_path / "stereo.wav", SAMPLING_RATE)
    assert len(decoded) == SAMPLING_RATE
    expected = 0.5 * np.sin(2 * np.pi * 300 * np.arange(SAMPLING_RATE) / SAMPLING_RATE)
    assert np.abs(decoded - expected)[200:-200].max() < 2e-3


def test_silence_is_valid(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(800), SAMPLING_RATE)
    assert (decode_audio(tmp_path / "silence.wav", SAMPLING_RATE) == 0).all()


@pytest.mark.parametrize("extension, subtype", FORMATS)
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.95])
def test_truncated_files_are_errors(tmp_path, extension, subtype, kept):
    path = tmp_path / f"tone.{extension}"
    # Noise: a tone is so easily compressed that the end of some formats is empty.
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype("f4")
    soundfile.write(path, noise, SAMPLING_RATE, subtype=subtype, format=extension.upper())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(AudioError, match=f"tone.{extension}: (truncated|unreadable|no samples)"):
        decode_audio(path, SAMPLING_RATE)


@pytest.mark.parametrize("declared", [b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"])
def test_files_of_writers_that_do_not_know_the_length_are_valid(tmp_path, declared):
    write_tone(tmp_path / "tone.wav")
    content = bytearray((tmp_path / "tone.wav").read_bytes())
    at = content.index(b"data") + 4
    content[4:8] = content[at : at + 4] = declared
    assert len(decode_audio(bytes(content), SAMPLING_RATE)) == 8000


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("noise.wav", b"this is no audio", "unreadable"),
        ("empty.wav", b"", "unreadable"),
        ("missing.wav", None, "unreadable"),
        ("short.wav", np.zeros(0), "no samples"),
        ("nan.wav", np.array([0.0, np.nan, 0.1]), "samples that are not finite"),
        ("inf.wav", np.array([0.0, np.inf]), "samples that are not finite"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path, name, content, reason):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        soundfile.write(tmp_path / name, content, SAMPLING_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=f"{name}: {reason}") as error:
        decode_audio(tmp_path / name, SAMPLING_RATE)
    assert error.value.name == str(tmp_path / name) and error.value.reason.startswith(reason)


def test_a_header_that_claims_all_memory_is_an_error(tmp_path):
    write_tone(tmp_path / "tone.flac")
    content = bytearray((tmp_path / "tone.flac").read_bytes())
    content[21] |= 0x0F  # the upper bits of the number of samples, in FLAC's first metadata block
    content[22:26] = b"\xff\xff\xff\xff"
    with pytest.raises(AudioError, match="truncated|unreadable"):
        decode_audio(bytes(content), SAMPLING_RATE)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("prefix", ["", "file://"])
@pytest.mark.parametrize("max_seconds", [None, 1.0])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a pipe"])
def test_only_regular_files_are_read(tmp_path, kind, max_seconds, prefix):
    """A pipe without a writer would wait for ever, and /dev/zero fill the memory."""
    path = tmp_path / "clip.wav"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    with pytest.raises(AudioError, match="clip.wav: not a regular file"):
        decode_audio(f"{prefix}{path}", SAMPLING_RATE, max_seconds)


def test_files_have_urls_too(tmp_path):
    samples = write_tone(tmp_path / "tone.wav", subtype="FLOAT")
    assert np.allclose(decode_audio(f"file://{tmp_path}/tone.wav", SAMPLING_RATE), samples)


def test_a_disk_that_fails_is_no_bad_audio(tmp_path, monkeypatch):
    write_tone(tmp_path / "tone.wav")

    class Failing(io.BytesIO):
        def read(self, *size):
            raise OSError(errno.EIO, "Input/output error", str(tmp_path / "tone.wav"))

    monkeypatch.setattr("builtins.open", lambda *args: Failing(b"RIFF"))
    with pytest.raises(OSError, match="Input/output error: '.*tone.wav'"):
        decode_audio(tmp_path / "tone.wav", SAMPLING_RATE)
