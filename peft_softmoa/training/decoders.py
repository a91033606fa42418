"""Decoders of audio files with one interface: soundfile for what it reads well, PyAV (FFmpeg) for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from .audio_file import BLOCK_FRAMES, DecodeError, Reader, Samples, Source, UnreadableError
from .channels import Channels, select_channels
from .containers import check_header, is_truncated, needs_ffmpeg
from .ffmpeg import FfmpegDecoder


class Decoder(Protocol):
    """One audio file, read as often as needed.

    Its sampling rate is in Hz; `can_seek` is True if it knows its number of frames, and reads from the middle without
    decoding what is in front. `guessed_frames` costs nothing: what the header says, or infinity.
    """

    sampling_rate: int
    can_seek: bool
    guessed_frames: float

    def blocks(self, start: int = 0) -> Iterator[Samples]:
        """Decode.

        Args:
            start (int): the first frame. Default: 0.

        Yields:
            np.ndarray: `(frames,)` or `(C, frames)` float32, as `select_channels` gives them.

        Raises:
            DecodeError: if the file is damaged or, where it ends, truncated, or lacks a channel.
        """

    def count_frames(self) -> int:
        """Count the frames, without decoding them all if that is possible.

        Returns:
            int: the number of frames.

        Raises:
            DecodeError: if the file is damaged or truncated.
        """


def open_decoder(source: Source, channels: Channels) -> Decoder:
    """Open an audio file with the decoder that reads it best.

    Args:
        source (Source): the file.
        channels (Channels): which of its channels are read.

    Returns:
        Decoder: its decoder.

    Raises:
        DecodeError: if no decoder reads it.
    """
    if source.size == 0:
        raise DecodeError("unreadable (the file is empty)")
    if needs_ffmpeg(source):
        return FfmpegDecoder(source, channels)
    try:
        return SoundfileDecoder(source, channels)
    except UnreadableError as error:
        try:
            return FfmpegDecoder(source, channels)
        except UnreadableError:
            raise error from None


class SoundfileDecoder:
    """Decoder of libsndfile.

    Args:
        source (Source): the file.
        channels (Channels): which of its channels are read.

    Raises:
        DecodeError: if it is no file that libsndfile reads.
    """

    def __init__(self, source: Source, channels: Channels) -> None:
        self._source = source
        self._channels = channels
        # For who reads first: opening Ogg and MP3 takes as long as decoding a second.
        self._opened: Any = self._open_file()
        self.sampling_rate: int = self._opened.samplerate
        self.can_seek: bool = self._opened.seekable()
        self.guessed_frames: float = self._opened.frames
        check_header(self.sampling_rate, self._opened.channels)

    def blocks(self, start: int = 0) -> Iterator[Samples]:
        import soundfile

        with self._open() as file:
            try:
                place = file.seek(start) if start else 0
                while len(block := file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
                    yield select_channels(block, self._channels)
                    place += len(block)
            except (ValueError, soundfile.LibsndfileError) as error:
                raise DecodeError(f"damaged ({getattr(error, 'error_string', error)})") from error
            is_short = place < file.frames
        if is_short or is_truncated(self._source):
            raise DecodeError("truncated")

    def count_frames(self) -> int:
        if not self.can_seek:
            return self._count(0)
        with self._open() as file:
            known = max(file.frames - 1, 0)
        return known + self._count(known)

    def _count(self, start: int) -> int:
        return sum(block.shape[-1] for block in self.blocks(start))

    @contextmanager
    def _open(self) -> Iterator[Any]:
        file, self._opened = self._opened or self._open_file(), None
        with file:
            yield file

    def _open_file(self) -> Any:
        import soundfile

        try:
            return soundfile.SoundFile(Reader(self._source))
        except (ValueError, TypeError, soundfile.LibsndfileError) as error:
            raise UnreadableError(error) from error
