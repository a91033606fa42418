"""Audio files: decode, choose or mix channels and resample, whole or in part."""

from __future__ import annotations

import io
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from .audio_file import DecodeError, Samples, Source
from .channels import Channels
from .decoders import Decoder, open_decoder
from .network import read_url

# Shorter clips are decoded whole before a part is cut out.
WHOLE_SECONDS = 60
# Around a part, for the filter of the resampler.
MARGIN_SECONDS = 0.5
MOST_SAMPLES = 2**28  # one gibibyte; 4.7 hours at 16 kHz
UNNAMED = "a clip without a name"


class AudioError(ValueError):
    """An audio file that cannot be used.

    Args:
        name (str): the file.
        reason (str): what is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


def decode_audio(
    audio: Union[str, os.PathLike[str], bytes, dict[str, Any]],
    sampling_rate: int,
    max_seconds: Optional[float] = None,
    channels: Channels = "mono",
) -> npt.NDArray[np.float32]:
    """Decode one audio file at a sampling rate.

    Args:
        audio (str, PathLike, bytes or dict): path or URL, content, or an undecoded row of datasets, which is a dict
            with `path` and `bytes`.
        sampling_rate (int): in Hz.
        max_seconds (float, optional): how much is read from the start of the clip; the memory that it takes, for files
            on disk, depends on that alone. Default: all.
        channels (Channels): which channels are read: `"mono"`, the mean of all, `"all"`, or some by their numbers from
            0 on, such as `[0, 2]`. Default: `"mono"`.

    Returns:
        np.ndarray: `(samples,)` float32 or, unless mono, `(C, samples)`.

    Raises:
        AudioError: if the file is missing, not a regular file, unreadable, damaged, truncated or empty, is longer than
            4.6 hours at 16 kHz, has samples that are not finite, or lacks a channel.
        OSError: if it is there but cannot be read, such as a URL during an outage, as for `read_url`.
        ImportError: if soundfile, soxr or av is not installed.
    """
    name, content = name_and_content(audio)
    with _open(name, content, channels) as (source, decoder):
        wanted = sys.maxsize if max_seconds is None else math.ceil(max_seconds * decoder.sampling_rate)
        return _resample(name, source, _cut(decoder.blocks(), 0, wanted), decoder.sampling_rate, sampling_rate)


def decode_crop(
    audio: Union[str, os.PathLike[str], bytes, dict[str, Any]],
    sampling_rate: int,
    length: int,
    generator: np.random.Generator,
    channels: Channels = "mono",
) -> tuple[npt.NDArray[np.float32], int]:
    """Decode a part of an audio file at a random place, in memory that does not depend on the length of the clip.

    Each place is as likely as any other. The part equals that of the whole clip from `decode_audio`, up to rounding.

    Args:
        audio (str, PathLike, bytes or dict): the clip, as for `decode_audio`.
        sampling_rate (int): in Hz.
        length (int): number of samples of the part.
        generator (np.random.Generator): draws the place, if the clip is longer.
        channels (Channels): as for `decode_audio`; the place is the same in all of them. Default: `"mono"`.

    Returns:
        tuple[np.ndarray, int]: `(length,)` float32 or, unless mono, `(C, length)`; the whole clip if it is not longer;
        and the number of its first sample in the clip.

    Raises:
        AudioError: as for `decode_audio`.
        OSError: as for `decode_audio`.
        ImportError: as for `decode_audio`.
    """
    name, content = name_and_content(audio)
    with _open(name, content, channels) as (source, decoder):
        rate = decoder.sampling_rate
        short = WHOLE_SECONDS * rate
        if not decoder.can_seek or decoder.guessed_frames <= short or decoder.count_frames() <= short:
            whole = list(_cut(decoder.blocks(), 0, short + 1))
            if sum(block.shape[-1] for block in whole) <= short:
                samples = _resample(name, source, iter(whole), rate, sampling_rate)
                spare = samples.shape[-1] - length
                start = int(generator.integers(spare + 1)) if spare > 0 else 0
                return samples[..., start : start + length], start
        total = decoder.count_frames()
        # What `soxr.resample` makes of all frames.
        start = int(generator.integers(max(math.floor(total * sampling_rate / rate + 0.5) - length, 0) + 1))
        # Both rates meet where a sample of one lies on a sample of the other: so the part has the phase of the whole.
        unit, frames = (each // math.gcd(rate, sampling_rate) for each in (sampling_rate, rate))
        margin = math.ceil(MARGIN_SECONDS * sampling_rate)
        while True:
            first = max(start - margin, 0) // unit
            end = math.ceil((start + length + margin) * rate / sampling_rate)
            blocks = _cut(decoder.blocks(first * frames), first * frames, end)
            samples = _resample(name, source, blocks, rate, sampling_rate)[..., start - first * unit :][..., :length]
            if samples.shape[-1] == length or start == 0:
                return samples, start
            # The times of the container leave a gap.
            start = max(start - length + samples.shape[-1], 0)


def audio_blocks(
    audio: Union[str, os.PathLike[str], bytes, dict[str, Any]], sampling_rate: int, channels: Channels = "mono"
) -> Iterator[npt.NDArray[np.float32]]:
    """Decode one audio file at a sampling rate, block by block.

    Args:
        audio (str, PathLike, bytes or dict): the clip, as for `decode_audio`. Of files on disk, only a block is held.
        sampling_rate (int): in Hz.
        channels (Channels): as for `decode_audio`. Default: `"mono"`.

    Yields:
        np.ndarray: `(samples,)` or `(C, samples)` float32; all of them together are what `decode_audio` gives.

    Raises:
        AudioError: as for `decode_audio`, but at any length; blocks may have come before.
        OSError: as for `decode_audio`.
        ImportError: as for `decode_audio`.
    """
    name, content = name_and_content(audio)
    with _open(name, content, channels) as (source, decoder):
        yield from resample_blocks(name, _checked(source, decoder.blocks()), decoder.sampling_rate, sampling_rate)


def resample_blocks(name: str, blocks: Iterable[Samples], rate: int, sampling_rate: int) -> Iterator[Samples]:
    """Resample block by block, which gives what `soxr.resample` gives at once, in less memory.

    Args:
        name (str): the clip, for errors.
        blocks (iterable of np.ndarray): `(samples,)` or `(C, samples)` float32 each.
        rate (int): their sampling rate in Hz.
        sampling_rate (int): the sampling rate of what is yielded.

    Yields:
        np.ndarray: `(samples,)` or `(C, samples)` float32.

    Raises:
        AudioError: if there is no block, or a sample is not finite.
    """
    import soxr

    stream: Any = None
    for block in blocks:
        if not np.isfinite(block).all():
            raise AudioError(name, "samples that are not finite")
        # soxr has the channels last.
        frames = np.ascontiguousarray(block.T)
        if stream is None:
            stream = soxr.ResampleStream(rate, sampling_rate, math.prod(block.shape[:-1]), dtype="float32")
        yield stream.resample_chunk(frames).T
    if stream is None:
        raise AudioError(name, "no samples")
    yield stream.resample_chunk(frames[:0], last=True).T


def audio_seconds(audio: Union[str, os.PathLike[str], bytes, dict[str, Any]]) -> float:
    """Measure how long an audio file is.

    Args:
        audio (str, PathLike, bytes or dict): the clip, as for `decode_audio`.

    Returns:
        float: the duration of what can be decoded, in seconds.

    Raises:
        AudioError: as for `decode_audio`.
        OSError: as for `decode_audio`.
        ImportError: as for `decode_audio`.
    """
    name, content = name_and_content(audio)
    with _open(name, content, "mono") as (_, decoder):
        return decoder.count_frames() / decoder.sampling_rate


def name_and_content(
    audio: Union[str, os.PathLike[str], bytes, dict[str, Any], None],
) -> tuple[str, Optional[bytes]]:
    """Name and content of a clip.

    Args:
        audio (str, PathLike, bytes, dict or None): the clip, as for `decode_audio`.

    Returns:
        tuple[str, bytes or None]: the name and the content; None if the content is in the file that the name gives.
    """
    if isinstance(audio, (str, os.PathLike)):
        return os.fspath(audio), None
    path, content = (audio.get("path"), audio.get("bytes")) if isinstance(audio, dict) else (None, audio)
    if path is None and content is None:
        content = b""
    return path or UNNAMED, content


@contextmanager
def _open(name: str, content: Optional[bytes], channels: Channels) -> Iterator[tuple[Source, Decoder]]:
    """Open a clip and its decoder; what is wrong with it is an AudioError."""
    try:
        import av  # noqa: F401
        import soundfile  # noqa: F401
        import soxr  # noqa: F401
    except ImportError as error:
        raise ImportError("Decoding audio needs soundfile, soxr and av: pip install 'peft-softmoa[audio]'") from error
    path = re.sub("^(file|local)://", "", name)
    if content is None and "://" in path:
        content = read_url(path)
    try:
        # A pipe may never end, and neither does a device such as /dev/zero.
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):
            raise AudioError(name, "not a regular file")
        file = open(path, "rb") if content is None else io.BytesIO(content)  # noqa: SIM115 - `Source` closes it
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AudioError(name, f"unreadable ({error.strerror})") from error
    with Source(file) as source:
        try:
            yield source, open_decoder(source, channels)
        except DecodeError as error:
            # What cannot be read is no bad audio: an outage would have all of it skipped.
            raise source.error or AudioError(name, str(error)) from error


def _cut(blocks: Iterator[Samples], place: int, end: int) -> Iterator[Samples]:
    """Blocks that begin at a frame, up to another frame."""
    for block in blocks:
        yield block[..., : end - place]
        place += block.shape[-1]
        if place >= end:
            return


def _checked(source: Source, blocks: Iterator[Samples]) -> Iterator[Samples]:
    """Blocks of a file; an error of the disk, which decoders take for the end of the file, is raised."""
    yield from blocks
    if source.error:
        raise source.error


def _resample(name: str, source: Source, blocks: Iterator[Samples], rate: int, sampling_rate: int) -> Samples:
    """Resample, up to the greatest length that is held at once."""
    resampled, length = [], 0
    for block in resample_blocks(name, _checked(source, blocks), rate, sampling_rate):
        resampled.append(block)
        length += block.size
        if length > MOST_SAMPLES:
            hours = MOST_SAMPLES / math.prod(block.shape[:-1]) / sampling_rate / 3600
            raise AudioError(name, f"longer than {hours:.1f} hours: cut it, or set `max_length_seconds`")
    return np.concatenate(resampled, axis=-1)
