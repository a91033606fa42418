"""Audio files as people have them: how long they are, what is in them, and which are refused."""

import contextlib
import csv
import io
import os
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
from conftest import SAMPLING_RATE
from recordings import RATE, encode, id3, riff, signal

from peft_softmoa.training import AudioError, decode_audio
from peft_softmoa.training.audio import audio_seconds, decode_crop
from peft_softmoa.training.audio_file import READABLE, DecodeError, Source
from peft_softmoa.training.ffmpeg import frame_samples
from peft_softmoa.training.folders import AUDIO

SECONDS = 2.0
DELAY = 0.06  # seconds that a codec may add


def written(form, subtype="PCM_16", rate=RATE, seconds=SECONDS):
    content = io.BytesIO()
    soundfile.write(content, signal(seconds, rate), rate, format=form, subtype=subtype)
    return content.getvalue()


def flac_with_total(total):
    """FLAC whose header says another number of samples."""
    content = bytearray(encode("flac", "flac", signal()))
    content[21] &= 0xF0
    content[22:26] = total.to_bytes(4, "big")
    return bytes(content)


def flac_of_bits(bits):
    """FLAC of a depth that few writers have, in verbatim frames of 192 samples."""
    samples = np.rint(signal() * (2 ** (bits - 1) - 1)).astype(int)
    samples = samples[: len(samples) // 192 * 192]
    header = (192).to_bytes(2, "big") * 2 + bytes(6)
    packed = RATE << 44 | 0 << 41 | (bits - 1) << 36 | len(samples)
    content = b"fLaC\x80\0\0\x22" + header + packed.to_bytes(8, "big") + bytes(16)
    codes = {8: 1, 12: 2, 16: 4, 20: 5, 24: 6}
    for number, start in enumerate(range(0, len(samples), 192)):
        coded = bytes([number]) if number < 128 else bytes([0xC0 | number >> 6, 0x80 | number & 63])
        head = bytes([0xFF, 0xF8, 0x19, codes.get(bits, 0) << 1]) + coded
        head += bytes([crc(head, 0x07, 8)])
        values = "".join(f"{int(value) & (1 << bits) - 1:0{bits}b}" for value in samples[start : start + 192])
        body = "00000010" + values
        body += "0" * (-len(body) % 8)
        frame = head + int(body, 2).to_bytes(len(body) // 8, "big")
        content += frame + crc(frame, 0x8005, 16).to_bytes(2, "big")
    return content


def crc(content, polynomial, bits):
    value, mask = 0, (1 << bits) - 1
    for byte in content:
        value ^= byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> bits - 1 else 0)) & mask
    return value


def mp3(**options):
    return encode("mp3", "libmp3lame", signal(), **options)


def m4a(tmp_path, codec="aac", container="ipod"):
    return encode(container, codec, signal(), options={"movflags": "faststart"}, path=tmp_path / "clip.m4a")


PLAIN = [
    "RF64", "W64", "AU", "VOC", "AIFF", "CAF", "NIST", "SVX", "AVR", "MPC2K", "MAT4", "MAT5", "IRCAM", "PAF", "PVF",
]  # fmt: skip
# Name: how it is made, how many times the signal is in it, and the largest error, which is that of the codec.
WHOLE = {
    "MP3": (mp3, 1, 0.05),
    "MP3 without Xing": (lambda: mp3(options={"write_xing": "0"}), 1, 0.05),
    "MP3 through a pipe": (lambda: mp3(pipe=True), 1, 0.05),
    "variable MP3": (lambda: mp3(quality=2), 1, 0.25),
    "variable MP3 without Xing": (lambda: mp3(quality=2, options={"write_xing": "0"}), 1, 0.25),
    "variable MP3 through a pipe": (lambda: mp3(quality=2, pipe=True), 1, 0.25),
    "joined MP3": (lambda: mp3() * 2, 2, 0.05),
    "MP3 with two tags": (lambda: id3() + mp3(), 1, 0.05),
    "FLAC": (lambda: written("FLAC"), 1, 0.02),
    "FLAC through a pipe": (lambda: encode("flac", "flac", signal(), pipe=True), 1, 0.02),
    "FLAC with a total of zero": (lambda: flac_with_total(0), 1, 0.02),
    "FLAC with a small total": (lambda: flac_with_total(1000), 1, 0.02),
    "FLAC with a tag": (lambda: id3() + written("FLAC"), 1, 0.02),
    "FLAC of 12 bits": (lambda: flac_of_bits(12), 1, 0.02),
    "FLAC of 20 bits": (lambda: flac_of_bits(20), 1, 0.02),
    "Ogg-FLAC": (lambda: encode("ogg", "flac", signal()), 1, 0.02),
    "Vorbis": (lambda: written("OGG", "VORBIS"), 1, 0.02),
    "Opus": (lambda: written("OGG", "OPUS", 48_000), 1, 0.02),
    "chained Vorbis": (lambda: written("OGG", "VORBIS") * 2, 2, 0.02),
    "chained Opus": (lambda: written("OGG", "OPUS", 48_000) * 2, 2, 0.02),
    "AAC": (lambda: encode("adts", "aac", signal()), 1, 0.02),
    "M4A": (m4a, 1, 0.02),
    "ALAC": (lambda tmp_path: m4a(tmp_path, "alac"), 1, 0.02),
    "MP4 in pieces": (
        lambda: encode("mp4", "aac", signal(), options={"movflags": "frag_keyframe+empty_moov"}),
        1,
        0.05,
    ),
    "WebM": (lambda: encode("webm", "libopus", signal(rate=48_000), 48_000), 1, 0.02),
    "WebM through a pipe": (lambda: encode("webm", "libopus", signal(rate=48_000), 48_000, pipe=True), 1, 0.02),
    "WMA": (lambda: encode("asf", "wmav2", signal()), 1, 0.05),
    "WavPack": (lambda: encode("wv", "wavpack", signal()), 1, 0.02),
    "WAV": (lambda: riff(signal()), 1, 0.02),
    "WAV with a tag": (lambda: id3() + riff(signal()), 1, 0.02),
    "WAV with a size of zero": (lambda: riff(signal(), size=0), 1, 0.02),
    "WAV without 2 bytes": (lambda: riff(signal())[:-2], 1, 0.02),
    "WAV without 3 bytes": (lambda: riff(signal())[:-3], 1, 0.02),
    "WAV without 44 bytes": (lambda: riff(signal())[:-44], 1, 0.02),
    "NIST without 44 bytes": (lambda: written("NIST")[:-44], 1, 0.02),
    "FLAC of 15 bits": (lambda: flac_of_bits(15), 1, 0.02),
    "NIST of telephones": (lambda: written("NIST", "ULAW"), 1, 0.05),
    "WVE": (lambda: written("WVE", "ALAW", 8000), 1, 0.05),
    **{form: (lambda form=form: written(form), 1, 0.02) for form in PLAIN},
}


def make(tmp_path, name):
    function = WHOLE[name][0]
    return function(tmp_path) if function.__code__.co_varnames[:1] == ("tmp_path",) else function()


def error_of(samples, expected):
    """Of the root mean square, at the best delay that a codec may have."""
    most = int(DELAY * SAMPLING_RATE)
    length = len(expected) - 2 * most - 2000
    part = expected[1000 : 1000 + length]
    errors = [
        np.linalg.norm(samples[1000 + delay : 1000 + delay + length] - part)
        for delay in range(-most // 8, most)
        if 1000 + delay + length <= len(samples)
    ]
    return min(errors) / np.linalg.norm(part)


@pytest.mark.parametrize("name", WHOLE)
def test_all_of_a_clip_is_decoded(tmp_path, name):
    _, times, largest = WHOLE[name]
    content = make(tmp_path, name)
    decoded = decode_audio(content, SAMPLING_RATE)
    assert 0 <= len(decoded) / SAMPLING_RATE - times * SECONDS + 0.01 < times * DELAY + 0.01
    assert audio_seconds(content) == pytest.approx(len(decoded) / SAMPLING_RATE, abs=1e-3)
    assert error_of(decoded, signal(rate=SAMPLING_RATE)) < largest


def read_by_ffmpeg(content):
    """Samples and their rate, with FFmpeg's own mixing."""
    with av.open(io.BytesIO(content)) as file:
        mix, frames = av.AudioResampler("fltp", "mono"), []
        for packet in file.demux(audio=0):
            with contextlib.suppress(av.error.InvalidDataError):  # a tag between two clips
                frames += [part.to_ndarray()[0] for frame in packet.decode() for part in mix.resample(frame)]
        return np.concatenate(frames), file.streams.audio[0].rate


@pytest.mark.parametrize("name", [name for name in WHOLE if re.search("MP3|AAC|M4A|MP4|WebM|WMA|^Vorbis|^FLAC$", name)])
def test_samples_are_those_of_another_reading(tmp_path, name):
    """Of the first clip in the file."""
    content = make(tmp_path, name)
    expected, rate = read_by_ffmpeg(content)
    expected = expected[: int(SECONDS * rate)]
    decoded = decode_audio(content, rate)[: len(expected)]
    assert np.linalg.norm(decoded - expected) < 0.02 * np.linalg.norm(expected)


def test_speech_of_telephones():
    """AMR keeps no waveform, but the length and the loudness."""
    tone = signal(rate=8000)
    for container in ("amr", "3gp"):
        decoded = decode_audio(encode(container, "libopencore_amrnb", tone, 8000), SAMPLING_RATE)
        assert abs(len(decoded) / SAMPLING_RATE - SECONDS) < DELAY
        assert np.std(decoded) == pytest.approx(np.std(tone), rel=0.2)


CUT = [
    "FLAC", "Ogg-FLAC", "Vorbis", "Opus", "MP3", "M4A", "ALAC", "WebM", "WMA", "WavPack", "WAV", "WAV with a tag",
    "NIST of telephones", "WVE", *PLAIN[:-3],
]  # fmt: skip


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("name", CUT)
def test_what_is_cut_is_refused_by_name(tmp_path, name, crop):
    content = make(tmp_path, name)
    clip = {"path": "cut.bin", "bytes": content[: int(0.6 * len(content))]}
    with pytest.raises(AudioError, match="^cut.bin: (truncated|damaged|unreadable)"):
        if crop:
            decode_crop(clip, SAMPLING_RATE, 1000, np.random.default_rng(0))
        else:
            decode_audio(clip, SAMPLING_RATE)


def test_a_damaged_frame_is_refused():
    content = bytearray(written("FLAC"))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(AudioError, match="damaged|truncated"):
        decode_audio(bytes(content), SAMPLING_RATE)


@pytest.mark.parametrize("container, codec", [("flac", "flac"), ("ipod", "aac")])
@pytest.mark.parametrize("count", [40, 60])
@pytest.mark.parametrize("where", [0.3, 0.5])
def test_damage_in_the_middle_is_refused_by_who_reads_a_part(tmp_path, container, codec, count, where):
    noise = 0.05 * np.random.default_rng(0).standard_normal(6 * RATE)
    options = {"movflags": "faststart"} if container == "ipod" else {}
    clip = encode(container, codec, (signal(6.0) + noise).astype("f4"), options=options, path=tmp_path / "clip")
    assert len(decode_audio(clip, SAMPLING_RATE, 5.0)) == 5 * SAMPLING_RATE
    content, hole = bytearray(clip), int(where * len(clip))
    for place in range(hole, hole + count):
        content[place] ^= 0x5A
    with pytest.raises(AudioError, match="damaged"):
        decode_audio(bytes(content), SAMPLING_RATE, 5.0)
    with pytest.raises(AudioError, match="damaged"):
        decode_crop(bytes(content), SAMPLING_RATE, 16_000, np.random.default_rng(0))


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2**31 - 1])
def test_rates_that_no_clip_has_are_refused(rate):
    with pytest.raises(AudioError, match="from 1000 to 1000000 are allowed"):
        decode_audio(riff(signal(), rate), SAMPLING_RATE)


def test_a_raw_file_says_what_to_do(tmp_path):
    (tmp_path / "x.raw").write_bytes(np.random.default_rng(0).bytes(8000))
    for seconds in (None, 1.0):
        with pytest.raises(AudioError, match="x.raw: unreadable .*audio files are WAV, .*: convert it to one of them"):
            decode_audio(tmp_path / "x.raw", SAMPLING_RATE, seconds)


def test_a_clip_of_hours_is_refused(monkeypatch):
    monkeypatch.setattr("peft_softmoa.training.audio.MOST_SAMPLES", 16_000)
    with pytest.raises(AudioError, match="longer than .* hours: cut it, or set `max_length_seconds`"):
        decode_audio(riff(signal()), SAMPLING_RATE)
    assert len(decode_audio(riff(signal()), SAMPLING_RATE, 0.5)) == 8000


def long_clip(path, form, minutes=4):
    with soundfile.SoundFile(path, "w", RATE, 2, "VORBIS" if form == "OGG" else "PCM_16", format=form) as file:
        rng = np.random.default_rng(0)
        for second in range(60 * minutes):
            file.write((0.1 * rng.standard_normal((RATE, 2)) * (1 + second % 5) / 5).astype("f4"))


class Spy:
    """A container of PyAV, or a packet from it, that counts the packets that are decoded."""

    def __init__(self, spied, decoded):
        self.spied, self.decoded = spied, decoded

    def __getattr__(self, name):
        return getattr(self.spied, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.spied.close()

    def __bytes__(self):
        return bytes(self.spied)

    def demux(self, *streams):
        return (Spy(packet, self.decoded) for packet in self.spied.demux(*streams))

    def decode(self, *args, **options):
        self.decoded.append(1)
        return self.spied.decode(*args, **options)


# How it is made, and whether the container counts samples: else it counts milliseconds, or the codec has a long memory.
LONG = {
    "MP3": (("mp3", "libmp3lame"), {}, True),
    "MP3 without Xing": (("mp3", "libmp3lame"), {"options": {"write_xing": "0"}}, True),
    "variable MP3": (("mp3", "libmp3lame"), {"quality": 4}, True),
    "AAC": (("adts", "aac"), {}, True),
    "M4A": (("ipod", "aac"), {}, True),
    "FLAC": (("flac", "flac"), {}, True),
    "FLAC through a pipe": (("flac", "flac"), {"pipe": True}, True),
    "Ogg-FLAC": (("ogg", "flac"), {}, True),
    "WavPack": (("wv", "wavpack"), {}, True),
    "WMA": (("asf", "wmav2"), {}, False),
    "WebM": (("webm", "libopus"), {"rate": 48_000}, False),
    "WebM through a pipe": (("webm", "libopus"), {"rate": 48_000, "pipe": True}, False),
    "AMR": (("amr", "libopencore_amrnb"), {"rate": 8000}, False),
    "3GP": (("3gp", "libopencore_amrnb"), {"rate": 8000}, False),
}


@pytest.mark.parametrize("name", LONG)
def test_a_crop_is_a_part_of_the_whole_and_decodes_no_more(tmp_path, monkeypatch, name):
    (container, codec), options, is_exact = LONG[name]
    rate, decoded, length = options.get("rate", RATE), [], 16_000
    # What is moved by less than a sample of 16 kHz is moved by whole samples of its own rate.
    sampling_rate = SAMPLING_RATE if is_exact else rate
    time = np.arange(90 * rate) / rate
    sweep = 0.3 * np.sin(2 * np.pi * (300 + 8 * time) * time) + 0.1 * np.sin(2 * np.pi * 220 * time) * np.sin(time)
    path = None if options.get("pipe") else tmp_path / "long.bin"
    clip = encode(container, codec, sweep.astype("f4"), path=path, **options)
    opened = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: Spy(opened(*args, **options), decoded))
    whole = decode_audio(clip, sampling_rate)
    packets = len(decoded)
    assert audio_seconds(clip) == pytest.approx(len(whole) / sampling_rate, abs=1e-3 if is_exact else DELAY)
    for seed in range(3):
        decoded.clear()
        crop, start = decode_crop(clip, sampling_rate, length, np.random.default_rng(seed))
        assert len(decoded) < 0.2 * packets
        most = 0 if is_exact else int(DELAY * sampling_rate)
        assert abs(start - np.random.default_rng(seed).integers(len(whole) - length + 1)) <= most
        errors = [
            np.linalg.norm(crop - whole[place : place + length])
            for place in range(max(start - most, 0), min(start + most, len(whole) - length) + 1)
        ]
        assert len(crop) == length and min(errors) < (1e-3 if is_exact else 0.02) * np.linalg.norm(crop)


@pytest.mark.parametrize("form", ["WAV", "OGG"])
def test_a_crop_of_libsndfile_is_a_part_of_the_whole(tmp_path, form):
    path = tmp_path / "long.bin"
    long_clip(path, form, minutes=2)
    whole = decode_audio(path, SAMPLING_RATE)
    for seed in range(5):
        crop, start = decode_crop(path, SAMPLING_RATE, 16_000, np.random.default_rng(seed))
        assert start == np.random.default_rng(seed).integers(len(whole) - 16_000 + 1)
        assert len(crop) == 16_000 and np.abs(crop - whole[start : start + 16_000]).max() < 1e-5


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_a_crop_reads_its_own_part_of_a_file(tmp_path, form, monkeypatch):
    """Not the whole file, with the memory that this takes."""
    path, sources = tmp_path / "long.bin", []
    long_clip(path, form)
    initialize = Source.__init__
    monkeypatch.setattr(Source, "__init__", lambda self, file: (initialize(self, file), sources.append(self))[0])
    decode_crop(path, SAMPLING_RATE, 16_000, np.random.default_rng(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decode_crop(path, SAMPLING_RATE, 16_000, np.random.default_rng(1))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes
    # A chain of Ogg streams is found by reading the file, without decoding it.
    expected = sources[-1].size * (1.3 if form == "OGG" else 0.2)
    assert sources[-1].bytes_read < expected


def test_a_crop_of_hours_of_silence_takes_little_memory(tmp_path):
    """Blocks of FLAC without sound are a few bytes, so a small file is a long clip."""
    path = tmp_path / "silence.flac"
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        for _ in range(60):
            file.write(np.zeros(60 * RATE, "i2"))
    decode_crop(path, SAMPLING_RATE, 1000, np.random.default_rng(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(decode_crop(path, SAMPLING_RATE, 80_000, np.random.default_rng(1))[0]) == 80_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


def test_no_mutated_file_ends_a_run(tmp_path):
    """Set SOFTMOA_FUZZ to try more than a few hundred."""
    rng = np.random.default_rng(0)
    contents = [make(tmp_path, name) for name in WHOLE]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for index in range(int(os.environ.get("SOFTMOA_FUZZ", 200))):
        content = bytearray(contents[index % len(contents)])
        for _ in range(rng.integers(1, 8)):
            end = len(content) if rng.random() < 0.3 else 200
            content[rng.integers(end)] = rng.choice([0, 1, 0x7F, 0xFF, int(rng.integers(256))])
        try:
            decode_audio(bytes(content), SAMPLING_RATE)
            decode_crop(bytes(content), SAMPLING_RATE, 4000, rng)
        except AudioError:
            refused += 1
    assert refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kilobytes


def test_a_frame_with_other_planes_than_channels_is_refused():
    """PyAV would read memory that is not there: AAC may say in the middle that it has 37 channels."""
    frame = SimpleNamespace(
        layout=SimpleNamespace(channels=range(37)),
        planes=range(40),
        format=SimpleNamespace(is_packed=False),
        to_ndarray=lambda: pytest.fail("read"),
    )
    with pytest.raises(DecodeError, match="damaged: a part of it has 37 channels"):
        frame_samples(frame)


@pytest.mark.parametrize("name", ["M4A", "ALAC", "MP4 in pieces", "WebM", "WMA", "WavPack"])
def test_libsndfile_does_not_search_what_it_cannot_read(tmp_path, name, monkeypatch):
    """It would read the whole file into memory, and then say that it does not know it."""
    content = make(tmp_path, name)
    expected = decode_audio(content, SAMPLING_RATE)
    monkeypatch.setattr(soundfile, "SoundFile", lambda *args, **kwargs: pytest.fail("searched"))
    assert np.array_equal(decode_audio(content, SAMPLING_RATE), expected)


FORMATS = {
    "wav": ("wav", "pcm_s16le", {}),
    "flac": ("flac", "flac", {}),
    "flac in Ogg": ("ogg", "flac", {}),
    "aiff": ("aiff", "pcm_s16be", {}),
    "m4a": ("ipod", "aac", {}),
    "alac": ("ipod", "alac", {}),
    "aac": ("adts", "aac", {}),
    "mp4": ("mp4", "aac", {}),
    "wma": ("asf", "wmav2", {}),
    "wv": ("wv", "wavpack", {}),
    "w64": ("w64", "pcm_s16le", {}),
    "caf": ("caf", "pcm_s16le", {}),
    **{
        f"mp3 {quality} {name}": ("mp3", "libmp3lame", {"quality": quality, **options})
        for quality in (None, 4)
        for name, options in {"": {}, "no Xing": {"options": {"write_xing": "0"}}, "pipe": {"pipe": True}}.items()
    },
}


# How files that end so are made, beside those of libsndfile.
ENDINGS = {
    ".3gp": ("3gp", "libopencore_amrnb"),
    ".3gpp": ("3gp", "libopencore_amrnb"),
    ".aac": ("adts", "aac"),
    ".amr": ("amr", "libopencore_amrnb"),
    ".m4a": ("ipod", "aac"),
    ".m4b": ("ipod", "aac"),
    ".mka": ("matroska", "aac"),
    ".mp3": ("mp3", "libmp3lame"),
    ".mp4": ("mp4", "aac"),
    ".opus": ("ogg", "libopus"),
    ".tta": ("tta", "tta"),
    ".webm": ("webm", "libopus"),
    ".wma": ("asf", "wmav2"),
    ".wv": ("wv", "wavpack"),
}
OTHER_NAMES = {"aif": "AIFF", "aifc": "AIFF", "oga": "OGG", "snd": "AU", "sph": "NIST"}


def test_endings_of_audio_are_those_of_what_is_readable(tmp_path):
    names = {"Ogg": ".ogg", "WavPack": ".wv"}
    assert {names.get(name, f".{name.lower()}") for name in re.split(", | and ", READABLE)} <= AUDIO
    for ending in AUDIO:
        if ending in ENDINGS:
            container, codec = ENDINGS[ending]
            rate = {"libopencore_amrnb": 8000, "libopus": 48_000}.get(codec, RATE)
            content = encode(container, codec, signal(rate=rate), rate, path=tmp_path / "clip")
        else:
            form = OTHER_NAMES.get(ending[1:], ending[1:].upper())
            content = written(form, "VORBIS" if form == "OGG" else "PCM_16")
        assert abs(len(decode_audio(content, SAMPLING_RATE)) / SAMPLING_RATE - SECONDS) < DELAY, ending


@pytest.mark.skipif(
    "SOFTMOA_ESC10" not in os.environ,
    reason="needs real audio: set SOFTMOA_ESC10",
)
@pytest.mark.parametrize("name", FORMATS)
def test_real_recordings_keep_their_length_and_samples(name):
    folder = Path(os.environ["SOFTMOA_ESC10"])
    with open(folder / "metadata.csv") as file:
        clips = [row["file_name"] for row in csv.DictReader(file)][::18][:22]
    container, codec, options = FORMATS[name]
    for clip in clips:
        samples, rate = soundfile.read(folder / clip, dtype="float32")
        content = encode(container, codec, samples, rate, **options)
        decoded, (expected, _) = decode_audio(content, rate), read_by_ffmpeg(content)
        assert abs(len(decoded) - len(samples)) < DELAY * rate, clip
        assert len(decoded) == len(expected), clip
        assert np.linalg.norm(decoded - expected) <= 0.02 * np.linalg.norm(expected), clip
