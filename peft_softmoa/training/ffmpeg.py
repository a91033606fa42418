"""Decoder of audio files with FFmpeg, by PyAV."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Optional

import numpy as np

from .audio_file import BLOCK_FRAMES, DecodeError, Reader, Samples, Source, UnreadableError
from .channels import Channels, select_channels
from .containers import check_header, hide_constant_rate, is_chained, is_truncated

# Without those that read other files, such as playlists.
FORMATS = "aac,ac3,aiff,amr,ape,asf,au,caf,flac,matroska,mov,mp3,ogg,tta,voc,w64,wav,wv"
# Seconds by which what is decoded may be shorter than what the container says: a frame or two of a codec. WMA counts
# the time before playing.
TOLERANCE, ASF_TOLERANCE = 0.06, 0.5
# What codecs need in front of a place: MP3 the bits of earlier frames, Opus 80 ms. Of Ogg, the first page is lost.
PREROLL, OGG_PREROLL = 0.5, 2.5
END = 2**62  # behind all frames: a seek goes to the last packet


class FfmpegDecoder:
    """Decoder of FFmpeg.

    Args:
        source (Source): the file.
        channels (Channels): which of its channels are read.

    Raises:
        DecodeError: if it is no file that FFmpeg reads, or has no sound.
    """

    def __init__(self, source: Source, channels: Channels) -> None:
        self._source = source
        self._channels = channels
        # For who reads from the start: opening some formats takes as long as decoding a second.
        self._opened: Any = self._open()
        stream = self._opened.streams.audio[0]
        self.sampling_rate: int = stream.codec_context.sample_rate
        check_header(self.sampling_rate, stream.codec_context.channels)
        self._format = self._opened.format.name
        self._declared = self._declared_seconds(self._opened, stream)
        guessed = self._opened.duration
        self.guessed_frames = math.inf if guessed is None else guessed / 1e6 * self.sampling_rate
        # The times of packets say less than what is decoded: Ogg counts from 0 again, and a tag is taken for a packet.
        self.can_seek = self._format not in ("aac", "mp3", "ogg") or not is_chained(source)
        self._count: Optional[int] = None
        # FFmpeg remembers in it where the packets are.
        self._sought: Any = None
        self._origin = 0

    def blocks(self, start: int = 0) -> Iterator[Samples]:
        waiting: list[Samples] = []
        shape: Optional[tuple[int, ...]] = None
        try:
            for place, frame in self._frames(start):
                if place + frame.samples > start:
                    block = select_channels(frame_samples(frame), self._channels)[..., max(start - place, 0) :]
                    shape = block.shape[:-1] if shape is None else shape
                    if block.shape[:-1] != shape:
                        raise DecodeError(
                            f"its number of channels changes from {shape[0]} to {len(block)}: convert it to one number"
                        )
                    waiting.append(block)
                if sum(block.shape[-1] for block in waiting) >= BLOCK_FRAMES:
                    yield np.concatenate(waiting, axis=-1)
                    waiting = []
        except DecodeError:
            if waiting:
                yield np.concatenate(waiting, axis=-1)
            raise
        if waiting:
            yield np.concatenate(waiting, axis=-1)

    def count_frames(self) -> int:
        if self._count is None:
            # A header may be wrong, and what is missing shows at the end: so the end is decoded.
            ends = [place + frame.samples for place, frame in self._frames(END if self.can_seek else 0)]
            self._count = ends[-1] if ends else 0
        return self._count

    def _frames(self, start: int) -> Iterator[tuple[int, Any]]:
        """Decoded frames, each with its place in the clip, from shortly before `start` on."""
        import av

        sought = self._seek(start) if start and self.can_seek else None
        is_known = sought is None
        unread, self._opened = self._opened, None
        opened: Any = unread or self._open() if sought is None else nullcontext(sought)
        with opened as container:
            place, page = 0, None
            error: Optional[Exception] = None
            moved: Optional[int] = None
            try:
                for packet in container.demux(container.streams.audio[0]):
                    try:
                        frames = packet.decode()
                    except av.error.FFmpegError as failed:
                        # Tags between the parts of a joined MP3 are no damage, nor is what a codec lacks after a seek.
                        if is_known and (self._format != "mp3" or bytes(packet)[:1] == b"\xff"):
                            error = failed
                        continue
                    page = packet.pos if page is None else page
                    for frame in frames:
                        if error:
                            # What follows would move forward, and who reads a part may never come to the end.
                            raise _damaged(error)
                        if frame.sample_rate != self.sampling_rate:
                            raise DecodeError(
                                f"its sampling rate changes from {self.sampling_rate} to {frame.sample_rate} Hz: "
                                "convert it to one rate"
                            )
                        if not is_known:
                            # The first packet after a seek in Ogg has the time at which its page ends.
                            if frame.pts is None or (self._format == "ogg" and packet.pos == page):
                                continue
                            place, is_known = self._place(frame) - self._origin, True
                        if self._format == "flac" and frame.pts is not None:
                            # Damaged frames are left out without an error, but each frame has its number.
                            moved, before = self._place(frame) - place, moved
                            if before not in (None, moved):
                                raise DecodeError("damaged (a part is missing)")
                        yield place, frame
                        place += frame.samples
            except av.error.FFmpegError as failed:
                error = failed
            if not is_known:
                self.can_seek = False
                yield from self._frames(start)
                return
            tolerance = {"asf": ASF_TOLERANCE, "flac": 0.0}.get(self._format, TOLERANCE)
            if place / self.sampling_rate < self._declared - tolerance or is_truncated(self._source):
                raise DecodeError("truncated")
            if error:
                raise _damaged(error)

    def _seek(self, start: int) -> Any:
        """The container at a packet before `start`, or None if that is the first or cannot be found."""
        import av

        seconds = start / self.sampling_rate - (OGG_PREROLL if self._format == "ogg" else PREROLL)
        if seconds <= 0:
            return None
        try:
            # In Ogg, FFmpeg seeks wrong once it has sought: to the start, or not at all.
            if self._sought is None or self._format == "ogg":
                if self._format == "mp3":
                    hide_constant_rate(self._source)
                self._sought = self._open()
                self._origin = self._place(next(self._sought.decode(audio=0)))
            stream = self._sought.streams.audio[0]
            if start == END:
                self._sought.seek(END, stream=stream)
                return self._seek(self._place(next(self._sought.demux(stream))) - self._origin)
            seconds += self._origin / self.sampling_rate
            self._sought.seek(int(seconds / stream.time_base), stream=stream)
        except (av.error.FFmpegError, StopIteration, TypeError):
            self.can_seek = False
            return None
        return self._sought

    def _place(self, timed: Any) -> int:
        """The place of a frame or a packet, as the container counts."""
        return round(timed.pts * timed.time_base * self.sampling_rate)

    def _open(self) -> Any:
        import av

        try:
            container = av.open(Reader(self._source), options={"format_whitelist": FORMATS})
        except (av.error.FFmpegError, ValueError) as error:
            raise UnreadableError(error) from error
        if not container.streams.audio:
            raise DecodeError("unreadable (there is no sound in it)")
        codec = container.streams.audio[0].codec_context
        if codec is None:
            raise DecodeError("unreadable (its codec is not known): convert it to WAV, FLAC or MP3")
        # The workers of a loader are already as many as the cores.
        codec.thread_count = 1
        if container.format.name in ("flac", "ogg"):
            codec.options = {"err_detect": "crccheck+explode"}
        return container

    def _declared_seconds(self, container: Any, stream: Any) -> float:
        """The length in seconds that the container says; 0 where it says none, and FFmpeg guesses from the rate."""
        if self._format in ("aac", "ac3", "amr", "mp3", "ogg"):
            return 0.0
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        # That of a film may be longer than its sound.
        alone = len(container.streams) == 1 and container.duration is not None
        return container.duration / 1e6 if alone else 0.0


def _damaged(error: Exception) -> DecodeError:
    damaged = DecodeError(f"damaged ({getattr(error, 'strerror', None) or error})")
    damaged.__cause__ = error
    return damaged


def frame_samples(frame: Any) -> Samples:
    """The samples of a frame.

    Args:
        frame (av.AudioFrame): the frame.

    Returns:
        np.ndarray: `(frames, channels)` float32, with full scale at 1.

    Raises:
        DecodeError: if the frame does not hold as many channels as it says.
    """
    channels = len(frame.layout.channels)
    # PyAV would read where no data is.
    if len(frame.planes) != (1 if frame.format.is_packed else channels):
        raise DecodeError(f"damaged: a part of it has {channels} channels")
    values = frame.to_ndarray()
    values = values.reshape(-1, channels) if frame.format.is_packed else values.T
    if values.dtype.kind == "u":
        values = values.astype(np.float32) / 128 - 1
    elif values.dtype.kind == "i":
        values = values.astype(np.float32) / np.float32(2 ** (8 * values.dtype.itemsize - 1))
    return np.ascontiguousarray(values, dtype=np.float32)
