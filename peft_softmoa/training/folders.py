"""What lies in a folder: its audio, its tables and its folders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .rows import name_some

AUDIO = frozenset(
    (".3gp", ".3gpp", ".aac", ".aif", ".aifc", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mp3")
    + (".mp4", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".sph", ".tta", ".voc", ".w64", ".wav", ".webm", ".wma", ".wv")
)
TABLES = frozenset({".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xls", ".xlsx"})


def describe_folder(root: Path) -> str:
    """What a folder holds, for errors.

    Args:
        root (Path): the folder.

    Returns:
        str: its tables by name, its other files by kind, and the same of its folders.
    """
    inner = {
        folder: _kinds(folder) + [f"{each.name}/" for each in list_folders(folder)] for folder in list_folders(root)
    }
    named = [f"{folder.name}/ ({name_some(kinds) or 'empty'})" for folder, kinds in inner.items()]
    return name_some([*_kinds(root), *named]) or "nothing"


def _kinds(folder: Path) -> list[str]:
    names = [path.name if path.suffix in TABLES else path.suffix or path.name for path in list_files(folder)]
    return [f"{count} {name}" if name.startswith(".") else name for name, count in sorted(Counter(names).items())]


def read_lines(path: Path) -> list[str]:
    """The lines of a text, without those that are empty.

    Args:
        path (Path): the file.

    Returns:
        list[str]: the lines, without spaces around them.

    Raises:
        ValueError: if it is not in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it as UTF-8.") from error
    return [line.strip() for line in lines if line.strip()]


def list_folders(folder: Path) -> list[Path]:
    """The folders in a folder.

    Args:
        folder (Path): the folder.

    Returns:
        list[Path]: by their names, without hidden ones.
    """
    return [path for path in _entries(folder) if path.is_dir() and path.name != "__MACOSX"]


def list_files(folder: Path) -> list[Path]:
    """The files in a folder.

    Args:
        folder (Path): the folder.

    Returns:
        list[Path]: by their names, without hidden ones.
    """
    return [path for path in _entries(folder) if path.is_file()]


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def has_audio(folder: Path) -> bool:
    """Whether a folder itself has audio files.

    Args:
        folder (Path): the folder.

    Returns:
        bool: whether any of its files is one, by its name.
    """
    return any(path.suffix.lower() in AUDIO for path in folder.iterdir() if not path.name.startswith("."))
