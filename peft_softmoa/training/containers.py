"""What the bytes of an audio file say before it is decoded: where it begins, what is missing, who reads it best."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from .audio_file import DecodeError, Source

# Some writers count the header as samples.
HEADER_BYTES = 44
# About the largest number, signed or not: the writer did not know the length.
UNKNOWN_SIZE = 2**31 - 2**12
OGG_PAGE = 65_307  # bytes, at most
XING_FRAMES, XING_BYTES = 1, 2
# How the first matrix of MAT4 begins, one number; the bytes of a number of each type.
MAT4_LITTLE, MAT4_BIG = struct.pack("<III", 0, 1, 1), struct.pack(">III", 1000, 1, 1)
MAT4_BYTES = (8, 4, 4, 2, 2, 1)
RATES, MOST_CHANNELS = (1_000, 1_000_000), 256


class _Chunk(NamedTuple):
    name: bytes
    start: int
    size: int


def is_truncated(source: Source) -> bool:
    """Whether the container of an audio file says that bytes are missing; decoders read what is there.

    Args:
        source (Source): the file.

    Returns:
        bool: True if the end of RIFF, RF64, Wave64, AIFF, CAF, AU, VOC, NIST, AVR, MPC2K, WVE, MAT4, MAT5, MP3 or Ogg
            is missing, beyond 44 bytes. The headers of IRCAM, PAF and PVF hold no length.
    """
    head = source.read_at(0, 40)
    if head.startswith(b"OggS"):
        return not _has_last_page(source)
    if head.startswith((b".snd", b"dns.")):
        order = "big" if head.startswith(b".snd") else "little"
        start, size = (int.from_bytes(head[place : place + 4], order) for place in (4, 8))  # type: ignore[arg-type]
        return size < UNKNOWN_SIZE and start + size - source.size > HEADER_BYTES
    if head.startswith(b"Creative Voice File\x1a"):
        return _voice_end(source, int.from_bytes(head[20:22], "little")) > source.size + HEADER_BYTES
    if head.startswith(b"NIST_1A"):
        return _sphere_end(source) - source.size > HEADER_BYTES
    if head.startswith((b"2BIT", b"\x01\x04", b"ALawSoundFile")):
        return _sampler_end(head) - source.size > HEADER_BYTES
    if head.startswith((b"MATLAB 5.0", MAT4_LITTLE, MAT4_BIG)):
        return _matlab_end(source, head) - source.size > HEADER_BYTES
    if head[:1] == b"\xff":
        return _mp3_length(source) - source.size > HEADER_BYTES
    for chunk in _chunks(source, head):
        if chunk.name in (b"data", b"SSND", b"BODY"):
            known = chunk.size < UNKNOWN_SIZE or (head.startswith((b"RF64", b"riff", b"caff")) and chunk.size < 2**62)
            return known and chunk.start + chunk.size - source.size > HEADER_BYTES
    return False


def check_header(rate: int, channels: int) -> None:
    """Refuse what no clip has, before memory for it is claimed.

    Args:
        rate (int): the sampling rate, in Hz.
        channels (int): the number of channels.

    Raises:
        DecodeError: if one of them is out of its range.
    """
    if not RATES[0] <= rate <= RATES[1]:
        raise DecodeError(f"unreadable (a sampling rate of {rate} Hz; from {RATES[0]} to {RATES[1]} are allowed)")
    if not 1 <= channels <= MOST_CHANNELS:
        raise DecodeError(f"unreadable ({channels} channels; from 1 to {MOST_CHANNELS} are allowed)")


# How AMR, WavPack, WebM and WMA begin.
NOT_OF_LIBSNDFILE = (b"#!AMR", b"wvpk", b"\x1aE\xdf\xa3", b"\x30\x26\xb2\x75")


def needs_ffmpeg(source: Source) -> bool:
    """Whether libsndfile reads an audio file wrong or not at all, in which case it may search the whole file first.

    Args:
        source (Source): the file.

    Returns:
        bool: True for FLAC, MP3, AAC, Ogg that is chained or neither Vorbis nor Opus, WAV that was streamed, and the
        files of phones, browsers and Windows: MP4 with M4A and 3GP, AMR, WavPack, WebM and WMA.
    """
    head = source.read_at(0, 40)
    if head.startswith((b"fLaC", *NOT_OF_LIBSNDFILE)) or head[4:8] == b"ftyp":  # FLAC of any depth, with any total
        return True
    if head.startswith(b"OggS"):
        codec = head[28:36]
        return not codec.startswith((b"\x01vorbis", b"OpusHead")) or is_chained(source)
    # Between blocks libsndfile seeks, which is not exact in MP3, and it believes a length that is guessed.
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        return True
    if head.startswith(b"RIFF"):
        for chunk in _chunks(source, head):
            if chunk.name == b"data" and chunk.size == 0:
                return not _ends_in_chunks(source, head)
    return False


def _chunks(source: Source, head: bytes) -> Iterator[_Chunk]:
    """The chunks of RIFF, RF64, AIFF, CAF and Wave64, as far as their headers are there."""
    wave64, core = head.startswith(b"riff\x2e\x91\xcf\x11"), head.startswith(b"caff")
    if not wave64 and not core and not head.startswith((b"RIFF", b"RIFX", b"RF64", b"FORM")):
        return
    place, width, align = (40, 24, 8) if wave64 else (8, 12, 1) if core else (12, 8, 2)
    order = "big" if head.startswith((b"FORM", b"RIFX", b"caff")) else "little"
    long_size = 0
    # A file of a million empty chunks is no audio.
    for _ in range(1000):
        header = source.read_at(place, width)
        if len(header) < width:
            return
        size = int.from_bytes(header[16 if wave64 else 4 :], order)  # type: ignore[arg-type]
        name, start = header[:4], place + width
        size = max(size - width, 0) if wave64 else size
        if name == b"ds64":
            long_size = int.from_bytes(source.read_at(start + 8, 8), "little")
        if name == b"data" and head.startswith(b"RF64") and size == 0xFFFFFFFF:
            size = long_size
        yield _Chunk(name, start, size)
        place = start + -(-size // align) * align


def _ends_in_chunks(source: Source, head: bytes) -> bool:
    """Whether all of a file is chunks, so that one of size zero is empty and was not streamed."""
    *_, last = chunks = list(_chunks(source, head))
    return (
        all(re.fullmatch(rb"[ -~]{4}", chunk.name) for chunk in chunks)
        and last.start + last.size <= source.size <= last.start + last.size + 1
    )


def _voice_end(source: Source, place: int) -> int:
    """Where the blocks of a VOC file end."""
    for _ in range(100_000):
        header = source.read_at(place, 4)
        if len(header) < 4 or header[0] == 0:
            break
        place += 4 + int.from_bytes(header[1:], "little")
    return place


def _sphere_end(source: Source) -> int:
    """Where the samples of a NIST SPHERE file end, or 0 if its header does not say it."""
    head = source.read_at(0, 1024)
    fields = dict(re.findall(rb"(sample_count|channel_count|sample_n_bytes) -\w+ (\d+)", head))
    start = re.match(rb"NIST_1A\s+(\d+)", head)
    # Shorten packs the samples of some corpora.
    if len(fields) < 3 or not start or b"shorten" in head:
        return 0
    return int(start[1]) + math.prod(map(int, fields.values()))


def _sampler_end(head: bytes) -> int:
    """Where the samples of an AVR, MPC2K or WVE file end."""
    if head.startswith(b"2BIT"):
        frames, bits = int.from_bytes(head[26:30], "big"), int.from_bytes(head[14:16], "big")
        return 128 + frames * (2 if any(head[12:14]) else 1) * (bits // 8)
    if head.startswith(b"ALaw"):
        return 32 + int.from_bytes(head[18:22], "big")
    return 42 + int.from_bytes(head[30:34], "little") * 2 * (1 + head[21])


def _matlab_end(source: Source, head: bytes) -> int:
    """Where the last matrix of a MATLAB file of version 4 or 5 ends that has a header."""
    is_fifth = head.startswith(b"MATLAB")
    is_big = source.read_at(126, 2) == b"MI" if is_fifth else head.startswith(MAT4_BIG)
    place, width = (128, 8) if is_fifth else (0, 20)
    for _ in range(100):
        header = source.read_at(place, width)
        if len(header) < width:
            break
        kind, rows, *more = struct.unpack(f"{'>' if is_big else '<'}{width // 4}I", header)
        if not is_fifth:
            columns, _, name = more
            rows = name + rows * columns * MAT4_BYTES[min(kind // 10 % 10, 5)]
        place += width + rows
    return place


def _has_last_page(source: Source) -> bool:
    # The last page of an Ogg stream has the end-of-stream bit, and its length in a table of segments.
    content = source.read_at(max(source.size - 2 * OGG_PAGE, 0), 2 * OGG_PAGE)
    page = content.rfind(b"OggS")
    segments = content[page + 27 : page + 27 + content[page + 26]] if len(content) > page + 26 else b""
    has_end = page >= 0 and bool(segments) and bool(content[page + 5] & 4)
    return has_end and len(content) >= page + 27 + len(segments) + sum(segments)


def is_chained(source: Source) -> bool:
    """Whether another stream follows the first, as in chained Ogg, or MP3 with tags that were joined.

    Args:
        source (Source): the file.

    Returns:
        bool: True if one does.
    """
    overlap, place, block = 5, 28, 2**20
    # One expression for both would take ten times as long.
    start = re.compile(rb"OggS\0\x02" if source.read_at(0, 4) == b"OggS" else rb"ID3[\x02-\x04]\0")
    while place < source.size:
        content = source.read_at(place, block + overlap)
        if start.search(content):
            return True
        place += block
    return False


def hide_constant_rate(source: Source) -> None:
    """Let an MP3 of a constant rate look as if its rate varied: else FFmpeg computes places in it, and is not exact.

    Args:
        source (Source): the file.
    """
    place = _xing_place(source.read_at(0, 4).ljust(4, b"\0"))
    if source.read_at(place, 4) == b"Info":
        source.replace(place, b"Xing")


def _xing_place(head: bytes) -> int:
    """Where a Xing header is in the first frame of an MP3."""
    stereo, mpeg1 = head[3] >> 6 != 3, head[1] >> 3 & 3 == 3
    return 4 + (32 if stereo else 17) if mpeg1 else 4 + (17 if stereo else 9)


def _mp3_length(source: Source) -> int:
    """Number of bytes that the first frame of an MP3 declares, or 0."""
    head = source.read_at(0, 200).ljust(200, b"\0")
    if head[36:40] == b"VBRI":
        return int.from_bytes(head[46:50], "big")
    place = _xing_place(head)
    if head[place : place + 4] not in (b"Xing", b"Info"):
        return 0
    flags = int.from_bytes(head[place + 4 : place + 8], "big")
    start = place + (12 if flags & XING_FRAMES else 8)
    return int.from_bytes(head[start : start + 4], "big") if flags & XING_BYTES else 0
