"""How people lay out folders of audio: one small function for each layout, and one table of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

from .folders import AUDIO, TABLES, has_audio, list_files, list_folders, read_lines
from .tables import has_column, read_table

METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
# Folders that say how a dataset is divided, not what is heard.
NO_CLASS = re.compile(r"(fold|part|split|shard)[ _-]?\d+|train(ing)?|test(ing)?|valid(ation)?|val|dev|eval(uation)?")
SPLITS = {"": "train", "training": "train", "dev": "validation", "val": "validation", "valid": "validation"}
SPLITS |= {"testing": "test", "eval": "test", "evaluation": "test"}

# The file of each clip, and its other columns.
Clips = Iterator[tuple[str, dict[str, Any]]]
Splits = Mapping[str, Callable[[], Clips]]


class Layout(NamedTuple):
    """A layout of a folder.

    Args:
        name (str): what it is called.
        has (str): what it is recognised by.
        find (callable): finds the splits of a folder; none if it is of another layout.
    """

    name: str
    has: str
    find: Callable[[Path], Splits]


def find_layout(root: Path) -> Optional[tuple[Layout, Splits]]:
    """Find the first layout that a folder has.

    Args:
        root (Path): the folder.

    Returns:
        tuple[Layout, mapping], optional: the layout, and what reads the clips of each split; None if there is none.

    Raises:
        ValueError: if its files contradict each other.
    """
    return next(((layout, splits) for layout in LAYOUTS if (splits := layout.find(root))), None)


def describe_layouts() -> str:
    """What `find_layout` looks for.

    Returns:
        str: in words, for errors.
    """
    return "; ".join(f"{layout.has} ({layout.name})" for layout in LAYOUTS)


def _tables(root: Path) -> Splits:
    return _with_splits(root, _table)


def _table(folder: Path) -> Optional[Callable[[], Clips]]:
    for path in map(folder.joinpath, METADATA):
        # Parquet with the audio in it may have this name too, and needs no column of files.
        if path.is_file() and (path.suffix == ".csv" or has_column(path, "file_name")):
            return partial(_table_clips, path, folder, "file_name")
    return None


def _table_clips(
    path: Path, folder: Path, file_column: str, label_column: str = "label", has_quotes: bool = True
) -> Clips:
    for row in read_table(path, file_column, has_quotes):
        if label_column in row:
            row.setdefault("label", row[label_column])
        yield _locate(folder, row[file_column], path), row


def _esc50(root: Path) -> Splits:
    table = root / "meta" / "esc50.csv"
    clips = partial(_table_clips, table, root / "audio", "filename", "category")
    return {"train": clips} if table.is_file() else {}


def _urbansound(root: Path) -> Splits:
    audio = root / "audio" if (root / "audio").is_dir() else root
    for table in (root / "metadata" / "UrbanSound8K.csv", root / "UrbanSound8K.csv"):
        if table.is_file():
            return {"train": partial(_urbansound_clips, table, audio)}
    return {}


def _urbansound_clips(table: Path, audio: Path) -> Clips:
    for path, row in _table_clips(table, audio, "slice_file_name", "class"):
        if "fold" not in row:
            raise ValueError(f"{table} has no column 'fold'; its columns are: {', '.join(row)}.")
        yield str(audio / f"fold{row['fold']}" / Path(path).name), row


def _speech_commands(root: Path) -> Splits:
    lists = {"validation": root / "validation_list.txt", "test": root / "testing_list.txt"}
    if not all(path.is_file() for path in lists.values()):
        return {}
    return {split: partial(_speech_commands_clips, root, lists, split) for split in ("train", *lists)}


def _speech_commands_clips(root: Path, lists: Mapping[str, Path], split: str) -> Clips:
    listed = {each: dict.fromkeys(read_lines(path)) for each, path in lists.items()}
    if split == "train":
        for path, row in _class_clips(root):
            # Folders such as _background_noise_ are no words.
            name = f"{row['label']}/{Path(path).name}"
            if not row["label"].startswith("_") and not any(name in names for names in listed.values()):
                yield path, row
    for name in listed.get(split, ()):
        yield str(root / name), {"label": name.rpartition("/")[0]}


def _common_voice(root: Path) -> Splits:
    names = {"train": "train", "validation": "dev", "test": "test", "validated": "validated"}
    tables = {split: root / f"{name}.tsv" for split, name in names.items() if (root / "clips").is_dir()}
    # Its quotes are marks of speech, not of cells.
    clips = partial(_table_clips, file_column="path", has_quotes=False)
    return {split: partial(clips, table, root / "clips") for split, table in tables.items() if table.is_file()}


def _fsd50k(root: Path) -> Splits:
    truth, clips = root / "FSD50K.ground_truth", partial(_fsd50k_clips, root)
    if not (truth / "dev.csv").is_file():
        return {}
    splits = {"train": partial(clips, "dev", "train"), "validation": partial(clips, "dev", "val")}
    return {**splits, "test": partial(clips, "eval")} if (truth / "eval.csv").is_file() else splits


def _fsd50k_clips(root: Path, part: str, split: Optional[str] = None) -> Clips:
    table = root / "FSD50K.ground_truth" / f"{part}.csv"
    for path, row in _table_clips(table, root / f"FSD50K.{part}_audio", "fname"):
        if split is not None and "split" not in row:
            raise ValueError(f"{table} has no column 'split'; its columns are: {', '.join(row)}.")
        if split is None or row["split"] == split:
            yield f"{path}.wav", row


def _nemo(root: Path) -> Splits:
    splits: dict[str, Callable[[], Clips]] = {}
    for path in sorted([*root.glob("*manifest*.json"), *root.glob("*manifest*.jsonl")]):
        name = path.stem.replace("manifest", "").strip("_-.")
        split = SPLITS.get(name, name)
        if not _is_manifest(path):
            continue
        if split in splits:
            raise ValueError(f"'{root}' has two manifests of the split '{split}', one of them {path.name}: keep one.")
        splits[split] = partial(_nemo_clips, path)
    return splits


def _is_manifest(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return '"audio_filepath"' in file.readline()


def _nemo_clips(path: Path) -> Clips:
    for file, row in _table_clips(path, path.parent, "audio_filepath", "command"):
        if row.get("offset"):
            raise ValueError(
                f"{path}: {row['audio_filepath']} begins at an offset of {row['offset']} s, but whole files are read: "
                "cut the audio into a file for each row."
            )
        yield file, row


def _kaldi(root: Path) -> Splits:
    return _with_splits(root, _kaldi_folder) or _with_splits(root / "data", _kaldi_folder)


def _kaldi_folder(folder: Path) -> Optional[Callable[[], Clips]]:
    return partial(_kaldi_clips, folder) if (folder / "wav.scp").is_file() else None


def _kaldi_clips(folder: Path) -> Clips:
    if (folder / "segments").exists():
        raise ValueError(
            f"{folder} has a file segments, but whole files are read: cut the audio into a file for each utterance, as "
            "extract-segments of Kaldi does."
        )
    tables = {"speaker": folder / "utt2spk", "text": folder / "text"}
    columns = {
        column: {key: " ".join(value.split()) for key, value in map(_pair, read_lines(path))}
        for column, path in tables.items()
        if path.is_file()
    }
    for line in read_lines(folder / "wav.scp"):
        utterance, file = _pair(line)
        if file.endswith("|"):
            raise ValueError(
                f"{folder / 'wav.scp'}: {utterance} is the output of a command ({file}), and no command is run: write "
                "its output into a file."
            )
        values = {column: named.get(utterance) for column, named in columns.items()}
        yield _locate(folder, file, folder / "wav.scp"), {"utterance": utterance, **values}


def _pair(line: str) -> tuple[str, str]:
    key, *value = line.split(maxsplit=1)
    return key, "".join(value)


def _class_folders(root: Path) -> Splits:
    """Folders whose names are classes.

    Only where nothing else can be meant: a table beside them, or audio in no class folder, may say otherwise.
    """
    folders = list_folders(root)
    has_splits = any(map(has_audio, (inner for folder in folders for inner in list_folders(folder))))
    splits = {folder.name: folder for folder in folders if _holds_audio(folder)} if has_splits else {"train": root}
    tables = {path.suffix for place in (root, *folders) for path in list_files(place)} & TABLES
    classes = {inner.name for folder in splits.values() for inner in list_folders(folder) if has_audio(inner)}
    if tables or any(map(has_audio, (root, *splits.values()))) or len(classes) < 2:
        return {}
    if all(NO_CLASS.fullmatch(name.lower()) for name in classes):
        return {}
    return {split: partial(_class_clips, folder) for split, folder in splits.items()}


def _class_clips(root: Path) -> Clips:
    for folder in list_folders(root):
        for path in list_files(folder):
            if path.suffix.lower() in AUDIO:
                yield str(path), {"label": folder.name}


def _with_splits(root: Path, find: Callable[[Path], Optional[Callable[[], Clips]]]) -> dict[str, Callable[[], Clips]]:
    """A folder that is one split, or has one folder for each."""
    whole = find(root)
    return {"train": whole} if whole else {each.name: clips for each in list_folders(root) if (clips := find(each))}


def _locate(folder: Path, file: Any, table: Path) -> str:
    """The file that a row of a table names: a URL, or a path that begins at the folder."""
    if not isinstance(file, str) or not file:
        raise ValueError(f"{table} has a row that names no audio file, but {file!r}.")
    return file if "://" in file else os.path.join(folder, file)


def _holds_audio(folder: Path) -> bool:
    return has_audio(folder) or any(map(has_audio, list_folders(folder)))


LAYOUTS = (
    Layout("table", f"{', '.join(METADATA)} with a column file_name, in it or in a folder for each split", _tables),
    Layout("ESC-50", "meta/esc50.csv", _esc50),
    Layout("UrbanSound8K", "metadata/UrbanSound8K.csv or UrbanSound8K.csv", _urbansound),
    Layout("Speech Commands", "validation_list.txt and testing_list.txt", _speech_commands),
    Layout("Common Voice", "a folder clips, and train.tsv, dev.tsv, test.tsv or validated.tsv", _common_voice),
    Layout("FSD50K", "FSD50K.ground_truth/dev.csv", _fsd50k),
    Layout("NeMo", "files such as train_manifest.json with audio_filepath", _nemo),
    Layout("Kaldi", "wav.scp, in it, in data or in a folder for each split", _kaldi),
    Layout(
        "class folders",
        "two or more folders of audio with the names of classes, in it or in folders such as train and test, without a "
        "table or other audio beside them",
        _class_folders,
    ),
)
