"""Audio files: decode, mix to mono and resample, with soundfile and soxr."""

from __future__ import annotations

import io
import math
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

import numpy as np
import numpy.typing as npt

from .network import read_url

BLOCK_FRAMES = 65_536
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
    audio: Union[str, os.PathLike[str], bytes, dict[str, Any]], sampling_rate: int, max_seconds: Optional[float] = None
) -> npt.NDArray[np.float32]:
    """Decode one audio file to mono at a sampling rate.

    Args:
        audio (str, PathLike, bytes or dict): path or URL, content, or an undecoded row of datasets, which is a dict
            with `path` and `bytes`.
        sampling_rate (int): in Hz.
        max_seconds (float, optional): how much is read from the start of the clip; the memory that it takes, for files
            on disk, depends on that alone. Default: all.

    Returns:
        np.ndarray: `(samples,)` float32, the mean of all channels.

    Raises:
        AudioError: if the file is missing, not a regular file, unreadable, truncated or empty, or has samples that are
            not finite.
        OSError: if it is there but cannot be read, such as a URL during an outage, as for `read_url`.
        ImportError: if soundfile or soxr is not installed.
    """
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ImportError("Decoding audio needs soundfile and soxr: pip install 'peft-softmoa[audio]'") from error
    name, content = name_and_content(audio)
    # What cannot be read is no bad audio: an outage would have all of it skipped.
    with _open(name, content, whole=max_seconds is None) as source:
        try:
            with soundfile.SoundFile(source) as file:
                wanted = sys.maxsize if max_seconds is None else math.ceil(max_seconds * file.samplerate)
                # In blocks: a broken header may declare any length, and memory is not for it to claim.
                blocks = [file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)]
                while len(blocks[-1]) and sum(map(len, blocks)) < wanted:
                    blocks.append(file.read(BLOCK_FRAMES, dtype="float32", always_2d=True))
                samples = np.concatenate(blocks)[:wanted]
                declared, log, source_rate = file.frames, file.extra_info, file.samplerate
        except (ValueError, soundfile.LibsndfileError) as error:
            raise AudioError(name, f"unreadable ({getattr(error, 'error_string', error)})") from error
        is_truncated = len(samples) < min(declared, wanted)
        if len(samples) < wanted and not is_truncated:  # the file is read to its end
            source.seek(0)
            is_truncated = _is_truncated(source.read(), log)
    if is_truncated:
        raise AudioError(name, "truncated")
    if len(samples) == 0:
        raise AudioError(name, "no samples")
    if not np.isfinite(samples).all():
        raise AudioError(name, "samples that are not finite")
    resampled: npt.NDArray[np.float32] = soxr.resample(samples.mean(axis=1), source_rate, sampling_rate)
    return resampled


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


def _open(name: str, content: Optional[bytes], whole: bool) -> BinaryIO:
    """Open a clip, from memory if its whole content is needed anyway."""
    path = re.sub("^(file|local)://", "", name)
    if content is None and "://" in path:
        content = read_url(path)
    if content is not None:
        return io.BytesIO(content)
    try:
        # A pipe may never end, and neither does a device such as /dev/zero.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AudioError(name, "not a regular file")
        return io.BytesIO(Path(path).read_bytes()) if whole else open(path, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AudioError(name, f"unreadable ({error.strerror})") from error


def _is_truncated(content: bytes, log: str) -> bool:
    """Whether the content of a file ends before its format says; libsndfile reads what is there and only logs it."""
    if content.startswith(b"OggS"):
        # The last page of an Ogg stream has the end-of-stream bit, and its length in a table of segments.
        page = content.rfind(b"OggS")
        segments = content[page + 27 : page + 27 + content[page + 26]] if len(content) > page + 26 else b""
        return not (segments and content[page + 5] & 4 and len(content) >= page + 27 + len(segments) + sum(segments))
    for declared, actual in re.findall(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", log):
        # Writers that stream do not know the length, and declare zero or about the largest number, signed or not.
        if int(actual) < int(declared) < 2**31 - 2**12:
            return True
    return False
