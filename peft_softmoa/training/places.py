"""Where the audio of a row is: in the row, or in a file that it names."""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from datasets import Audio, Features, IterableDataset, Value

from .rows import name_some

# What a dataset from elsewhere may name besides its own files: `file://` reads this computer, and `hf://` and others
# use the access tokens of who reads the dataset.
WEB = re.compile(r"https?://")


class Place(NamedTuple):
    """Where the files that the rows of a dataset name are.

    Args:
        name (str): the dataset, for errors.
        audio_column (str): column with the audio.
        root (str): folder of the dataset.
        folder (str): folder of its tables, at which relative paths begin.
        is_local (bool): whether its rows may name any file.
    """

    name: str
    audio_column: str
    root: str
    folder: str
    is_local: bool

    def locate(self, rows: IterableDataset) -> IterableDataset:
        """Let rows name their files in full, and hold samples as the content of a file.

        Args:
            rows (IterableDataset): rows, with or without the audio column; the audio is not decoded.

        Returns:
            IterableDataset: the rows, of which what is no audio stays as it is.

        Raises:
            ValueError: when a row is read that names a file it may not, or whose samples are no list of floats.
        """
        features = rows.features
        if features is not None:
            feature = features.get(self.audio_column)
            if isinstance(feature, (Audio, dict)):
                clip = {"bytes": Value("binary"), "path": Value("string")}
                features = Features({**features, self.audio_column: clip})
            elif not (isinstance(feature, Value) and "string" in feature.dtype):
                return rows
        return rows.map(self._row, features=features)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.audio_column not in row:
            return {}
        audio = row[self.audio_column]
        if isinstance(audio, str):
            return {self.audio_column: self.find(audio)}
        if not isinstance(audio, dict):
            return {}
        path, content = audio.get("path"), audio.get("bytes")
        if content is None and audio.get("array") is not None:
            content = self._wav(audio["array"], audio.get("sampling_rate"))
        return {self.audio_column: {"path": self.find(path) if path and content is None else path, "bytes": content}}

    def find(self, path: str) -> str:
        """The file that a row names.

        Args:
            path (str): as the row has it.

        Returns:
            str: path or URL.

        Raises:
            ValueError: if the dataset is from elsewhere and the file is none of its own.
        """
        if self.is_local:
            return path if "://" in path else os.path.join(self.folder, path)
        repository = self.root.partition("@")[0]
        is_own = bool(repository) and path.startswith((f"{repository}/", f"{repository}@")) and ".." not in path
        if (is_own or WEB.match(path)) and "::" not in path:
            return path
        inner = posixpath.normpath(posixpath.join(self.folder[len(self.root) :].strip("/"), path.replace("\\", "/")))
        if (
            not repository
            or "://" in path
            or "::" in path
            or inner.startswith(("/", ".."))
            or re.match("[A-Za-z]:", path)
        ):
            raise ValueError(
                f"'{self.name}' is a dataset from elsewhere, and a row names '{path}'. Such rows may name files of the "
                "dataset and web addresses only. If you trust it, download it and give its local folder."
            )
        return f"{self.root}/{inner}"

    def _wav(self, array: Any, sampling_rate: Any) -> bytes:
        import soundfile

        samples = np.asarray(array)
        if samples.ndim != 1 or (len(samples) and samples.dtype.kind != "f") or not sampling_rate:
            raise ValueError(
                f"{self.name}: column '{self.audio_column}' holds an array of {samples.dtype} of shape "
                f"{samples.shape} with sampling_rate={sampling_rate}. It must be a list of floats from -1 to 1 with a "
                "sampling_rate."
            )
        buffer = io.BytesIO()
        soundfile.write(buffer, samples.astype(np.float32), int(sampling_rate), format="WAV", subtype="FLOAT")
        return buffer.getvalue()


def find_place(name: str, audio_column: str, files: Sequence[str]) -> Place:
    """Find where the files that the rows of a dataset name are.

    Args:
        name (str): id on the Hub or local folder.
        audio_column (str): column with the audio.
        files (Sequence[str]): the files of its tables.

    Returns:
        Place: the place.
    """
    folder = "/".join(os.path.commonprefix([file.replace(os.sep, "/").split("/")[:-1] for file in files]))
    repository = re.match(r"hf://datasets/[^@]+@[^/]+", folder)
    root = repository[0] if repository else folder
    return Place(name, audio_column, root, folder, is_local=os.path.isdir(name))


@contextmanager
def name_tables(files: Sequence[str]) -> Iterator[None]:
    """Let errors of what reads tables say which tables these are.

    Args:
        files (Sequence[str]): the tables; if there are none, errors stay as they are.

    Raises:
        ValueError: what pandas, pyarrow or `datasets` raise, with the names of the tables.
    """
    try:
        yield
    except Exception as error:
        is_foreign = type(error).__module__.partition(".")[0] in ("pandas", "pyarrow", "datasets")
        if not files or not (is_foreign or isinstance(error, UnicodeDecodeError)):
            raise
        raise ValueError(f"{name_some(files)} cannot be read: {error.__cause__ or error}.") from error
