"""Audio that comes in: WAV or raw PCM from a pipe, or from a file that grows."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, BinaryIO, NamedTuple, Optional

import numpy as np

from ..training.audio import AudioError, resample_blocks
from ..training.audio_file import DecodeError, Samples
from ..training.channels import Channels, select_channels
from ..training.containers import UNKNOWN_SIZE, check_header
from .windows import HEADER_BYTES, READ_BYTES, SAMPLE_FORMATS, Meter, begins_like_a_file

# How often a file that grows is looked at.
POLL_SECONDS = 0.05
# A file that has not grown for so long has ended.
IDLE_SECONDS = 10.0
INTEGERS, FLOATS, EXTENSIBLE = 1, 3, 0xFFFE
# The samples of WAV, by their kind and their bits; those of 24 bits have no dtype.
WAV_FORMATS: dict[tuple[int, int], Optional[np.dtype[Any]]] = {
    (INTEGERS, 8): np.dtype("u1"),
    (INTEGERS, 16): np.dtype("<i2"),
    (INTEGERS, 24): None,
    (INTEGERS, 32): np.dtype("<i4"),
    (FLOATS, 32): np.dtype("<f4"),
    (FLOATS, 64): np.dtype("<f8"),
}


def incoming_blocks(
    path: str,
    name: str,
    sampling_rate: int,
    raw: Optional[PCM] = None,
    idle_seconds: float = IDLE_SECONDS,
    meter: Optional[Meter] = None,
    channels: Channels = "mono",
) -> Iterator[Samples]:
    """Read audio while it comes in, at a sampling rate.

    Args:
        path (str): a file that grows or a named pipe; `"-"` is the standard input.
        name (str): the clip, for errors.
        sampling_rate (int): of what is yielded, in Hz.
        raw (PCM, optional): as for `IncomingAudio`.
        idle_seconds (float): as for `IncomingAudio`. Default: 10.
        meter (Meter, optional): leaves out the time that is waited. Default: none.
        channels (Channels): as for `decode_audio`. Default: `"mono"`.

    Yields:
        np.ndarray: `(samples,)` or `(C, samples)` float32.

    Raises:
        AudioError: as for `IncomingAudio`, or if there are no samples, or some are not finite.
        OSError: if it cannot be read.
    """
    meter = Meter(sampling_rate) if meter is None else meter
    with meter.waiting():
        file: Any = nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")  # noqa: SIM115 - closed below
    with file as opened:
        with meter.waiting():
            audio = IncomingAudio(opened, name, raw, idle_seconds, channels)
        yield from resample_blocks(name, meter.wait(audio.blocks()), audio.sampling_rate, sampling_rate)


class PCM(NamedTuple):
    """What raw PCM does not say itself."""

    sampling_rate: int  # in Hz
    sample_format: str = "s16le"  # or "f32le"
    num_channels: int = 1  # their samples take turns


class IncomingAudio:
    """Audio that is read while it comes in.

    A pipe ends when it is closed. A file that grows ends when it has not grown for some seconds, at the length that its
    header says by then, if it says one. Bytes at the end that are no whole sample are left out.

    Args:
        file (BinaryIO): an open file or pipe. Its header is read at once, and waited for.
        name (str): the clip, for errors.
        raw (PCM, optional): what it holds if it has no header. Default: it must have one.
        idle_seconds (float): how long a file may not grow before it has ended. Default: 10.
        channels (Channels): which are read, as for `decode_audio`. Default: `"mono"`.

    Raises:
        AudioError: if it is neither WAV nor, with `raw`, without a header, or its WAV cannot be read while it comes in.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        raw: Optional[PCM] = None,
        idle_seconds: float = IDLE_SECONDS,
        channels: Channels = "mono",
    ) -> None:
        self.name, self.channels = name, channels
        self._file, self._idle_seconds = file, idle_seconds
        self._grows = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        self._size_at: Optional[int] = None  # where the header says how many bytes of samples there are
        self._size = 0
        self._count = 0  # of these
        head = self._take(HEADER_BYTES)
        self._held = b""
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            if raw is not None:
                raise AudioError(name, "it is WAV, which says itself what it holds: leave out what describes raw PCM")
            self.sampling_rate, self._channels, self._dtype = self._read_header()
        elif begins_like_a_file(head):
            raise AudioError(
                name, "it begins like an audio file that is not WAV, but WAV or raw PCM is read while it comes in"
            )
        elif not head:
            raise AudioError(name, "no samples")
        elif raw is None:
            raise AudioError(name, "it has no header of WAV: if it is raw PCM, say its `sampling_rate`")
        else:
            self.sampling_rate, self._channels = raw.sampling_rate, raw.num_channels
            self._dtype, self._held = SAMPLE_FORMATS[raw.sample_format], head

    def blocks(self) -> Iterator[Samples]:
        """The samples, as soon as some are there.

        Yields:
            np.ndarray: `(samples,)` or `(C, samples)` float32, as `select_channels` gives them.

        Raises:
            AudioError: if a file has become shorter, or lacks a channel that is read.
            OSError: if it cannot be read.
        """
        frame = (3 if self._dtype is None else self._dtype.itemsize) * self._channels
        content = self._held
        while True:
            end = len(content) - len(content) % frame
            if end:
                frames = _decode(content[:end], self._dtype).reshape(-1, self._channels)
                try:
                    yield select_channels(frames, self.channels)
                except DecodeError as error:
                    raise AudioError(self.name, str(error)) from error
            more = self._more(READ_BYTES)
            if not more:
                return
            content = content[end:] + more

    def _more(self, count: int) -> bytes:
        """The next bytes, up to a number, as soon as some are there; none at the end."""
        read: Any = getattr(self._file, "read1", self._file.read)
        began = time.monotonic()
        while True:
            content: bytes = read(min(count, self._room(count)))
            self._count += len(content)
            if content or not self._grows or time.monotonic() - began >= self._idle_seconds:
                return content
            if os.fstat(self._file.fileno()).st_size < self._file.tell():
                raise AudioError(self.name, "it has become shorter while it was read")
            time.sleep(POLL_SECONDS)

    def _room(self, count: int) -> int:
        """How many bytes of samples are still to come, if the header says it."""
        if self._size_at is None:
            return count
        if self._grows:  # whoever writes it may by now have written how much it is
            place = self._file.tell()
            self._file.seek(self._size_at)
            self._size = int.from_bytes(self._file.read(4), "little")
            self._file.seek(place)
        return max(self._size - self._count, 0) if 0 < self._size < UNKNOWN_SIZE else count

    def _take(self, count: int) -> bytes:
        """So many bytes, fewer at the end."""
        content = b""
        while len(content) < count and (more := self._more(count - len(content))):
            content += more
        return content

    def _read_header(self) -> tuple[int, int, Optional[np.dtype[Any]]]:
        form, place = b"", HEADER_BYTES
        while True:
            head = self._take(8)
            name, size = head[:4], int.from_bytes(head[4:], "little")
            place += 8
            if len(head) < 8 or (name != b"data" and size > 2**24):
                raise AudioError(self.name, "its header of WAV is damaged or ends too early")
            if name == b"data":
                break
            body = self._take(size + size % 2)
            place += len(body)
            form = body if name == b"fmt " else form
        if len(form) < 16:
            raise AudioError(self.name, "its header of WAV does not say what its samples are")
        kind, channels, rate, bits = (
            int.from_bytes(form[start:end], "little") for start, end in ((0, 2), (2, 4), (4, 8), (14, 16))
        )
        if kind == EXTENSIBLE:
            kind = int.from_bytes(form[24:26], "little")
        try:
            check_header(rate, channels)
        except DecodeError as error:
            raise AudioError(self.name, str(error)) from error
        if (kind, bits) not in WAV_FORMATS:
            raise AudioError(
                self.name,
                f"its samples are of the format {kind} of WAV with {bits} bits, but only integers (1) of 8, 16, 24 and "
                "32 bits and floats (3) are read while they come in: convert it",
            )
        self._size_at, self._size, self._count = place - 4, size, 0
        return rate, channels, WAV_FORMATS[kind, bits]


def _decode(content: bytes, dtype: Optional[np.dtype[Any]]) -> Samples:
    """Samples with full scale at 1."""
    if dtype is None:  # 24 bits: the upper ones of 32
        wide = np.zeros((len(content) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        values = wide.view("<i4")[:, 0]
    else:
        values = np.frombuffer(content, dtype)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    if values.dtype.kind == "u":
        return (values.astype(np.float32) - 128) / np.float32(128)
    return values.astype(np.float32) / np.float32(2.0 ** (8 * values.dtype.itemsize - 1))
