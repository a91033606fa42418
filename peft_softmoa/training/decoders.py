"""Decoders of audio files with one interface: soundfile for what it reads well, PyAV (FFmpeg) for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from .audio_file import BLOCK_FRAMES, DecodeError, Reader, Samples, Source, UnreadableError
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
    except UnreadableError as error:
        try:
            return FfmpegDecoder(source)
        except UnreadableError:
            raise error from None


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
        self.guessed_frames: float = self._opened.frames
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

        try:
            return soundfile.SoundFile(Reader(self._source))
        except (ValueError, TypeError, soundfile.LibsndfileError) as error:
            raise UnreadableError(error) from error
