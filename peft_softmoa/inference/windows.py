"""Windows of audio of any length, from a file or a pipe, in memory that does not depend on the length."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional

import numpy as np

from ..training.audio import AudioError
from ..training.audio_file import DecodeError, Samples
from ..training.channels import Channels, select_channels
from ..training.folders import AUDIO

SAMPLE_FORMATS: dict[str, np.dtype[Any]] = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
# At most so much is read from a pipe at once; a pipe gives what is there.
READ_BYTES = 65_536
# How files begin that are not raw PCM: WAV, FLAC, Ogg, MP3 with tags, AIFF, CAF, AU, WebM, AMR, WavPack and WMA.
HEADERS = (
    *(b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3", b"FORM", b"caff", b".snd", b"\x1aE\xdf\xa3"),
    *(b"#!AMR", b"wvpk", b"\x30\x26\xb2\x75"),
)
HEADER_BYTES = 12


class Window(NamedTuple):
    """A part of a clip.

    Args:
        name (str): the clip.
        samples (np.ndarray): `(samples,)` float32 or, unless mono, `(C, samples)`.
        start (float): where the part begins in the clip, in seconds.
        end (float): where it ends.
    """

    name: str
    samples: Samples
    start: float
    end: float


def cut_windows(
    name: str, blocks: Iterable[Samples], sampling_rate: int, length: int, step: int, min_samples: int = 1
) -> Iterator[Window]:
    """Cut a clip into windows, each of which comes as soon as its last sample is there.

    A window begins every `step` samples. The last one may be shorter: it holds what no window before it holds. It is
    left out if it is shorter than `min_samples`, unless it is the whole clip.

    Args:
        name (str): the clip.
        blocks (iterable of np.ndarray): its samples, `(samples,)` or `(C, samples)` float32 each, of any lengths.
        sampling_rate (int): in Hz.
        length (int): number of samples of a window.
        step (int): number of samples from the start of a window to that of the next.
        min_samples (int): the smallest number of samples that the model takes, from `shortest_clip`. Default: 1.

    Yields:
        Window: the windows, in their order.

    Raises:
        ValueError: if `step` is not from 1 to `length`, so that samples would be in no window.
    """
    if not 1 <= step <= length:
        raise ValueError(f"`step` must be from 1 to the {length} samples of a window, got {step}.")
    held: Optional[Samples] = None
    start = covered = 0
    for block in blocks:
        held = block if held is None else np.concatenate([held, block], axis=-1)
        while held.shape[-1] >= length:
            covered = start + length
            yield Window(name, held[..., :length], start / sampling_rate, covered / sampling_rate)
            held, start = held[..., step:], start + step
    if held is None:
        return
    end = start + held.shape[-1]
    if end > covered and (held.shape[-1] >= min_samples or not covered):
        yield Window(name, held, start / sampling_rate, end / sampling_rate)


def pcm_blocks(
    pipe: BinaryIO, name: str, sample_format: str = "s16le", num_channels: int = 1, channels: Channels = "mono"
) -> Iterator[Samples]:
    """Read raw PCM from a pipe as it comes in.

        ffmpeg -i concert.mkv -f s16le -ar 16000 -ac 1 - | …

    Bytes at the end that are no whole sample are left out: a recorder that is stopped ends anywhere.

    Args:
        pipe (BinaryIO): where it comes from, such as `sys.stdin.buffer`.
        name (str): the clip, for errors.
        sample_format (str): `"s16le"`, 16-bit integers, or `"f32le"`, floats with full scale at 1. Default: `"s16le"`.
        num_channels (int): number of channels, whose samples take turns. Default: 1.
        channels (Channels): which of them are read, as for `decode_audio`. Default: `"mono"`.

    Yields:
        np.ndarray: `(samples,)` float32 or, unless mono, `(C, samples)`.

    Raises:
        AudioError: if it begins like an audio file, which is not raw PCM, or lacks a channel.
    """
    dtype = SAMPLE_FORMATS[sample_format]
    read: Any = getattr(pipe, "read1", pipe.read)
    content = b""
    while len(content) < HEADER_BYTES and (more := read(READ_BYTES)):
        content += more
    if begins_like_a_file(content):
        raise AudioError(
            name,
            "it begins like an audio file, but raw PCM is read from a pipe: let FFmpeg write it "
            f"(`-f {sample_format} -ar RATE -ac {num_channels} -`), or give the file itself",
        )
    while content:
        end = len(content) - len(content) % (dtype.itemsize * num_channels)
        rest = content[end:]
        if end:
            values = np.frombuffer(content[:end], dtype).reshape(-1, num_channels).astype(np.float32)
            try:
                yield select_channels(values / np.float32(2**15) if dtype.kind == "i" else values, channels)
            except DecodeError as error:
                raise AudioError(name, str(error)) from error
        more = read(READ_BYTES)
        content = rest + more if more else b""


def begins_like_a_file(content: bytes) -> bool:
    """Whether bytes begin like an audio file, and not like raw PCM.

    Args:
        content (bytes): the first 12.

    Returns:
        bool: whether they do.
    """
    return content.startswith(HEADERS) or content[4:8] == b"ftyp"  # MP4, M4A and 3GP


def find_clips(paths: Iterable[str]) -> Iterator[str]:
    """The audio files that paths name.

    Args:
        paths (iterable of str): files, URLs or folders.

    Yields:
        str: a file or URL as it is named, and each audio file in a folder and its folders, in the order of their names.
            What begins with a dot is left out.

    Raises:
        ValueError: for a folder without audio files.
    """
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        files = (file for file in Path(path).rglob("*") if file.suffix.lower() in AUDIO and file.is_file())
        found = sorted(
            str(file) for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not found:
            raise ValueError(f"The folder '{path}' has no audio files: they end in {', '.join(sorted(AUDIO))}.")
        yield from found


class Meter:
    """How much audio has been read, and how long it took apart from waiting for it.

    Args:
        sampling_rate (int): of the blocks that are counted, in Hz.
    """

    def __init__(self, sampling_rate: int) -> None:
        self.sampling_rate = sampling_rate
        self.num_samples = 0
        self.waited = 0.0
        self._started = time.perf_counter()

    def count(self, blocks: Iterable[Samples]) -> Iterator[Samples]:
        """Count the samples of blocks.

        Args:
            blocks (iterable of np.ndarray): the blocks.

        Yields:
            np.ndarray: the same blocks.
        """
        for block in blocks:
            self.num_samples += block.shape[-1]
            yield block

    def wait(self, blocks: Iterable[Samples]) -> Iterator[Samples]:
        """Leave out the time that blocks take to come.

        Args:
            blocks (iterable of np.ndarray): the blocks, such as those of a pipe.

        Yields:
            np.ndarray: the same blocks.
        """
        iterator = iter(blocks)
        while True:
            with self.waiting():
                block = next(iterator, None)
            if block is None:
                return
            yield block

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time is left out."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - began

    @property
    def audio_seconds(self) -> float:
        """Duration of the audio."""
        return self.num_samples / self.sampling_rate

    @property
    def compute_seconds(self) -> float:
        """The time since the meter was made, without the waiting."""
        return time.perf_counter() - self._started - self.waited

    def summary(self) -> str:
        """The real-time factor: the time that it took for each second of audio.

        Returns:
            str: one line.
        """
        audio, compute = self.audio_seconds, self.compute_seconds
        if not audio:
            return "No audio was read."
        return f"{audio:.1f} s of audio in {compute:.1f} s: real-time factor {compute / audio:.4f}"
