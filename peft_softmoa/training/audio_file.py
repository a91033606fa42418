"""An audio file as decoders read it."""

from __future__ import annotations

import io
import os
from typing import BinaryIO, Optional

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]
BLOCK_FRAMES = 65_536
READABLE = "WAV, AIFF, AU, CAF, VOC, FLAC, MP3, Ogg, Opus, M4A, MP4, AAC, WebM, WMA, 3GP, AMR and WavPack"


class DecodeError(Exception):
    """What is wrong with the content of an audio file."""


class Source:
    """An open file from its audio on, without tags in front of it.

    Decoders in C hide an error of the disk and take it for the end of the file, so the source remembers it.

    Args:
        file (BinaryIO): the file; it is closed with the source.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._start = 0
        self._replaced: dict[int, int] = {}
        self.error: Optional[OSError] = None
        self.bytes_read = 0
        self.size = file.seek(0, os.SEEK_END)
        while (head := self.read_at(0, 10))[:3] == b"ID3" and len(head) == 10:
            size = sum((byte & 127) << 7 * place for place, byte in enumerate(reversed(head[6:])))
            skipped = min(10 + size + (10 if head[5] & 16 else 0), self.size)  # the tag may have a footer
            self._start, self.size = self._start + skipped, self.size - skipped

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read_at(self, place: int, count: int) -> bytes:
        """Read some bytes at a place.

        Args:
            place (int): the place.
            count (int): how many.

        Returns:
            bytes: the bytes, fewer at the end.
        """
        try:
            self._file.seek(self._start + min(place, self.size))
            content = self._file.read(count)
        except OSError as error:
            self.error = error
            return b""
        self.bytes_read += len(content)
        replaced = {at - place: byte for at, byte in self._replaced.items() if 0 <= at - place < len(content)}
        if replaced:
            content = bytes(replaced.get(offset, byte) for offset, byte in enumerate(content))
        return content

    def replace(self, place: int, content: bytes) -> None:
        """Read other bytes at a place than the file has.

        Args:
            place (int): the place.
            content (bytes): the bytes.
        """
        self._replaced.update(enumerate(content, place))


class Reader(io.RawIOBase):
    """A source as a file for one decoder, with a place of its own: decoders keep what they have read in buffers.

    Args:
        source (Source): the source.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._source.size}[whence]
        # A broken header may send a decoder anywhere.
        self._place = min(max(base + offset, 0), self._source.size)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._source.read_at(self._place, len(buffer))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


class UnreadableError(DecodeError):
    """A file that a decoder cannot open.

    Args:
        error (Exception): what the decoder says.
    """

    def __init__(self, error: Exception) -> None:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
        super().__init__(f"unreadable ({reason}), where audio files are {READABLE}: convert it to one of them")
