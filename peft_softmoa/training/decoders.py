"""Decoders of audio files with one interface: soundfile for what it reads well, PyAV (FFmpeg) for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Optional, Protocol

import numpy as np
import numpy.typing as npt

from .containers import DecodeError, Source, check_header, hide_constant_rate, is_chained, is_truncated, needs_ffmpeg

Samples = npt.NDArray[np.float32]
BLOCK_FRAMES = 65_536
# Without those that read other files, such as playlists.
FFMPEG_FORMATS = "aac,ac3,aiff,amr,ape,asf,au,caf,flac,matroska,mov,mp3,ogg,tta,voc,w64,wav,wv"
READABLE = "WAV, AIFF, AU, CAF, VOC, FLAC, MP3, Ogg, Opus, M4A, MP4, AAC, WebM, WMA, 3GP, AMR and WavPack"
# Seconds by which what is decoded may be shorter than what the container says: a frame or two of a codec. WMA counts
# the time before playing.
TOLERANCE, ASF_TOLERANCE = 0.06, 0.5
PREROLL_SECONDS = 0.5  # what codecs need in front of a place: MP3 the bits of earlier frames, Opus 80 ms
END = 2**62  # behind all frames: a seek goes to the last packet


class Decoder(Protocol):
    """One audio file, read as often as needed.

    Its sampling rate is in Hz; `can_seek` is True if it knows its number of frames, and reads from the middle without
    decoding what is in front.
    """

    sampling_rate: int
    can_seek: bool

    def blocks(self, start: int = 0) -> Iterator[Samples]:
        """Decode.

        Args:
            start (int): the first frame. Default: 0.

        Yields:
            np.ndarray: `(frames,)` float32, the mean of all channels.

        Raises:
            DecodeError: if the file is damaged or, where it ends, truncated.
        """

    def count_frames(self) -> int:
        """Count the frames, without decoding them all if that is possible.

        Returns:
            int: the number of frames.

        Raises:
            DecodeError: if the file is damaged or truncated.
        """


def open_decoder(source: Source) -> Decoder:
    """Open an audio file with the decoder that reads it best.

    Args:
        source (Source): the file.

    Returns:
        Decoder: its decoder.

    Raises:
        DecodeError: if no decoder reads it.
    """
    if source.size == 0:
        raise DecodeError("unreadable (the file is empty)")
    if needs_ffmpeg(source):
        return FfmpegDecoder(source)
    try:
        return SoundfileDecoder(source)
    except _Unreadable as error:
        try:
            return FfmpegDecoder(source)
        except _Unreadable:
            raise error from None


class _Unreadable(DecodeError):
    def __init__(self, error: Exception) -> None:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
        super().__init__(f"unreadable ({reason}), where audio files are {READABLE}: convert it to one of them")


class SoundfileDecoder:
    """Decoder of libsndfile.

    Args:
        source (Source): the file.

    Raises:
        DecodeError: if it is no file that libsndfile reads.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        # For who reads first: opening Ogg and MP3 takes as long as decoding a second.
        self._opened: Any = self._open_file()
        self.sampling_rate: int = self._opened.samplerate
        self.can_seek: bool = self._opened.seekable()
        check_header(self.sampling_rate, self._opened.channels)

    def blocks(self, start: int = 0) -> Iterator[Samples]:
        import soundfile

        with self._open() as file:
            try:
                place = file.seek(start) if start else 0
                while len(block := file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
                    yield block.mean(axis=1)
                    place += len(block)
            except (ValueError, soundfile.LibsndfileError) as error:
                raise DecodeError(f"damaged ({getattr(error, 'error_string', error)})") from error
            is_short = place < file.frames
        if is_short or is_truncated(self._source):
            raise DecodeError("truncated")

    def count_frames(self) -> int:
        if not self.can_seek:
            return sum(map(len, self.blocks()))
        with self._open() as file:
            known = max(file.frames - 1, 0)
        return known + sum(map(len, self.blocks(known)))

    @contextmanager
    def _open(self) -> Iterator[Any]:
        file, self._opened = self._opened or self._open_file(), None
        with file:
            yield file

    def _open_file(self) -> Any:
        import soundfile

        self._source.seek(0)
        try:
            return soundfile.SoundFile(self._source)
        except (ValueError, TypeError, soundfile.LibsndfileError) as error:
            raise _Unreadable(error) from error


class FfmpegDecoder:
    """Decoder of FFmpeg.

    Args:
        source (Source): the file.

    Raises:
        DecodeError: if it is no file that FFmpeg reads, or has no sound.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        with self._open() as container:
            stream = container.streams.audio[0]
            self.sampling_rate: int = stream.codec_context.sample_rate
            check_header(self.sampling_rate, stream.codec_context.channels)
            self._format = container.format.name
            self._declared = self._declared_seconds(container, stream)
        # The times of packets say less than what is decoded: Ogg counts from 0 again, and a tag is taken for a packet.
        self.can_seek = self._format not in ("aac", "mp3", "ogg") or not is_chained(source)
        self._count: Optional[int] = None
        # FFmpeg remembers in it where the packets are.
        self._sought: Any = None
        self._origin = 0

    def blocks(self, start: int = 0) -> Iterator[Samples]:
        waiting: list[Samples] = []
        try:
            for place, frame in self._frames(start):
                if place + frame.samples > start:
                    waiting.append(_mono(frame)[max(start - place, 0) :])
                if sum(map(len, waiting)) >= BLOCK_FRAMES:
                    yield np.concatenate(waiting)
                    waiting = []
        except DecodeError:
            if waiting:
                yield np.concatenate(waiting)
            raise
        if waiting:
            yield np.concatenate(waiting)

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
        opened: Any = self._open() if sought is None else nullcontext(sought)
        with opened as container:
            place = 0
            error: Optional[Exception] = None
            try:
                for packet in container.demux(container.streams.audio[0]):
                    try:
                        frames = packet.decode()
                    except av.error.FFmpegError as failed:
                        # Tags between the parts of a joined MP3 are no damage, nor is what a codec lacks after a seek.
                        if is_known and (self._format != "mp3" or bytes(packet)[:1] == b"\xff"):
                            error = failed
                        continue
                    for frame in frames:
                        if frame.sample_rate != self.sampling_rate:
                            raise DecodeError(
                                f"its sampling rate changes from {self.sampling_rate} to {frame.sample_rate} Hz: "
                                "convert it to one rate"
                            )
                        if not is_known:
                            if frame.pts is None:
                                continue
                            place, is_known = self._place(frame) - self._origin, True
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
                raise DecodeError(f"damaged ({getattr(error, 'strerror', None) or error})") from error

    def _seek(self, start: int) -> Any:
        """The container at a packet before `start`, or None if that cannot be found."""
        import av

        try:
            if self._sought is None:
                if self._format == "mp3":
                    hide_constant_rate(self._source)
                self._sought = self._open()
                self._origin = self._place(next(self._sought.decode(audio=0)))
            stream = self._sought.streams.audio[0]
            seconds = (start + self._origin) / self.sampling_rate
            if start == END:
                self._sought.seek(END, stream=stream)
                seconds = float(next(self._sought.demux(stream)).pts * stream.time_base)
            seconds = max(seconds - PREROLL_SECONDS, self._origin / self.sampling_rate)
            self._sought.seek(int(seconds / stream.time_base), stream=stream)
        except (av.error.FFmpegError, StopIteration, TypeError):
            self.can_seek = False
            return None
        return self._sought

    def _place(self, frame: Any) -> int:
        return round(frame.pts * frame.time_base * self.sampling_rate)

    def _open(self) -> Any:
        import av

        self._source.seek(0)
        try:
            container = av.open(self._source, options={"format_whitelist": FFMPEG_FORMATS})
        except (av.error.FFmpegError, ValueError) as error:
            raise _Unreadable(error) from error
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


def _mono(frame: Any) -> Samples:
    """`(frames,)`, the mean of all channels of a frame, with full scale at 1."""
    values = frame.to_ndarray()
    values = values.reshape(-1, len(frame.layout.channels)) if frame.format.is_packed else values.T
    if values.dtype.kind == "u":
        values = values.astype(np.float32) / 128 - 1
    elif values.dtype.kind == "i":
        values = values.astype(np.float32) / np.float32(2 ** (8 * values.dtype.itemsize - 1))
    mean: Samples = np.ascontiguousarray(values, dtype=np.float32).mean(axis=1)
    return mean
