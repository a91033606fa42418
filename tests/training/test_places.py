"""Where the audio of a row is: samples in the row, files beside its table, and no file that a stranger names."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SAMPLING_RATE, write_tone
from hub import loopback_hub

from peft_softmoa.training import DataOptions, decode_audio, load_rows
from peft_softmoa.training.places import find_place


def write_parquet(folder, **columns):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return str(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("streaming", [True, False])
def test_samples_in_a_row(tmp_path, monkeypatch, dtype, streaming):
    """The file that they were read from is another one, or not there."""
    monkeypatch.chdir(tmp_path)
    write_tone(tmp_path / "clip.wav", 2000)
    samples = 1.5 * np.sin(np.arange(4000) / 7).astype(dtype)
    clips = [{"path": path, "array": samples, "sampling_rate": SAMPLING_RATE} for path in ("clip.wav", None)]
    folder = write_parquet(tmp_path / "data", audio=clips, label=["x", "y"])
    options = DataOptions(streaming=streaming, cache_dir=str(tmp_path / "cache"))
    for row in load_rows(folder, "train", options):
        assert np.array_equal(decode_audio(row["audio"], SAMPLING_RATE), samples.astype(np.float32))
    assert [set(row) for row in load_rows(folder, "train", options, columns=["label"])] == [{"label"}] * 2


@pytest.mark.parametrize(
    "clip, message",
    [
        ({"array": [1, -3], "sampling_rate": 8000}, "'audio' holds an array of int64 of shape .2,. .*list of floats"),
        ({"array": [[0.5], [0.1]], "sampling_rate": 8000}, "of shape .2, 1."),
        ({"array": [0.5], "sampling_rate": None}, "sampling_rate=None"),
    ],
)
def test_samples_that_may_be_misread(tmp_path, clip, message):
    folder = write_parquet(tmp_path / "data", audio=[clip])
    with pytest.raises(ValueError, match=message):
        list(load_rows(folder, "train"))


@pytest.mark.parametrize("kind", ["parquet", "parquet of dicts", "csv", "jsonl"])
@pytest.mark.parametrize("streaming", [True, False])
def test_relative_paths_begin_at_the_table(tmp_path, monkeypatch, kind, streaming):
    """Not at the folder in which a run is started, which may have a file of the name too."""
    monkeypatch.chdir(tmp_path)
    write_tone(tmp_path / "clip.wav", 2000)
    folder = tmp_path / "data"
    folder.mkdir()
    write_tone(folder / "clip.wav", 200)
    names = ["clip.wav", str(folder / "clip.wav"), "https://example.org/clip.wav"]
    if kind == "csv":
        (folder / "train.csv").write_text("\n".join(["audio,label", *(f"{name},x" for name in names)]))
    elif kind == "jsonl":
        (folder / "train.jsonl").write_text("\n".join(f'{{"audio": "{name}", "label": "x"}}' for name in names))
    else:
        clips = names if kind == "parquet" else [{"path": name, "bytes": None} for name in names]
        write_parquet(folder, audio=clips, label=["x"] * 3)
    options = DataOptions(streaming=streaming, cache_dir=str(tmp_path / "cache"))
    found = [row["audio"] for row in load_rows(str(folder), "train", options, columns=["label", "audio"])]
    paths = [audio if isinstance(audio, str) else audio["path"] for audio in found]
    assert paths == [str(folder / "clip.wav")] * 2 + ["https://example.org/clip.wav"]


HUB = """
import sys
from peft_softmoa.training import load_rows
for row in load_rows("user/sounds", "train"):
    print(row["audio"] if isinstance(row["audio"], str) else row["audio"]["path"], flush=True)
"""


def hub_rows(folder, content, name="data/train.parquet"):
    with loopback_hub() as hub:
        hub.repos["datasets/user/sounds"] = {name: content}
        environment = {**os.environ, **hub.environment(folder)}
        done = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout.split(), done.stderr


def test_a_dataset_on_the_hub_names_its_own_files(tmp_path):
    names = ["clips/a.wav", "../b.wav", "https://example.org/c.wav", "/etc/hostname"]
    write_parquet(tmp_path / "parquet", audio=[{"path": name, "bytes": None} for name in names])
    code, paths, errors = hub_rows(tmp_path / "home", (tmp_path / "parquet" / "train.parquet").read_bytes())
    assert [path.split("@")[0] for path in paths[:2]] == ["hf://datasets/user/sounds"] * 2
    assert [path.partition("@")[2].partition("/")[2] for path in paths[:2]] == ["data/clips/a.wav", "b.wav"]
    assert paths[2:] == ["https://example.org/c.wav"]
    assert code and "'user/sounds' is a dataset from elsewhere, and a row names '/etc/hostname'. Such rows" in errors


def test_a_csv_on_the_hub_names_no_other_files(tmp_path):
    code, paths, errors = hub_rows(tmp_path / "home", b"audio,label\n/etc/hostname,x\n", "train.csv")
    assert code and not paths and "a row names '/etc/hostname'" in errors


@pytest.mark.parametrize(
    "name",
    ["/etc/hostname", "../../b.wav", "a/../../../b.wav", "file:///etc/hostname", "local:///etc/hostname", "C:/b.wav"]
    + ["C:\\b.wav", "..\\..\\b.wav", "https://a.org/b::file:///etc/hostname", "s3://bucket/b.wav"]
    + ["hf://datasets/user/private/b.wav", "hf://datasets/user/sounds-private/b.wav"]
    + ["hf://datasets/user/sounds/../private/b.wav"],
)
def test_names_that_a_stranger_may_not_give(name):
    place = find_place("user/sounds", "audio", ["hf://datasets/user/sounds@abc/data/train.parquet"])
    assert place.find("b..wav") == "hf://datasets/user/sounds@abc/data/b..wav"
    own = "hf://datasets/user/sounds/b.wav"
    assert place.find(own) == own
    with pytest.raises(ValueError, match="dataset from elsewhere"):
        place.find(name)


@pytest.mark.parametrize("name", ["/etc/hostname", "etc/hostname"])
def test_a_dataset_from_elsewhere_without_a_folder(name):
    with pytest.raises(ValueError, match="dataset from elsewhere"):
        find_place("user/sounds", "audio", []).find(name)
