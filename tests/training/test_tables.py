"""Tables as they are written by hand, by spreadsheets and by pandas, and what is wrong with some."""

import json

import pytest
from conftest import write_tone
from transformers import ASTFeatureExtractor

from peft_softmoa.training import DataOptions, load_rows, load_stream


def table(folder, text, name="metadata.csv", encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return str(folder)


def labels(folder):
    return [row["label"] for row in load_rows(folder, "train")]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "metadata.csv has no rows"),
        ("file_name,label\n", "metadata.csv has no rows"),
        (
            "file_name,label\na.wav,cat, small\n",
            "metadata.csv, line 2 has 3 cells, more than the 2 columns file_name, l",
        ),
        ('file_name,label\na.wav,"cat\nb.wav,dog\n', "metadata.csv, line [0-9]+: unexpected end of data"),
        ("file_name,label,label\na.wav,cat,dog\n", "metadata.csv has two columns of one name: file_name, label, label"),
        ("file;label\na.wav;cat\n", "metadata.csv has no column 'file_name'; its columns are: file;label"),
        ("file_name,label\n,cat\n", "metadata.csv has a row that names no audio file, but ''"),
    ],
)
def test_what_is_wrong_with_a_table(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        labels(table(tmp_path, text))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_other_encodings(tmp_path, encoding, suffix):
    rows = {"csv": "file_name,label\na.wav,Geräusch\n", "jsonl": '{"file_name": "a.wav", "label": "Geräusch"}\n'}
    with pytest.raises(ValueError, match=f"metadata.{suffix} is not in UTF-8 .*: save it as UTF-8"):
        labels(table(tmp_path, rows[suffix], f"metadata.{suffix}", encoding))


@pytest.mark.parametrize(
    "line, message",
    [("{'file_name': 1}", "metadata.jsonl, line 2 is no JSON: .*"), ("[1]", "line 2 is no JSON object but list")],
)
def test_damaged_json_lines(tmp_path, line, message):
    text = json.dumps({"file_name": "a.wav", "label": "x"}) + f"\n{line}\n"
    with pytest.raises(ValueError, match=message):
        labels(table(tmp_path, text, "metadata.jsonl"))


def test_spaces_make_no_classes(tmp_path):
    write_tone(tmp_path / "a.wav")
    folder = table(tmp_path, 'file_name, label, fold\na.wav, dog ,1\n a.wav,dog, 1\na.wav, "dog", 1 \n')
    assert labels(folder) == ["dog"] * 3
    stream = load_stream(folder, "train", ASTFeatureExtractor(), rows="fold=1")
    assert stream.label_names == ["dog"] and len(stream) == 3


def test_short_rows_and_empty_lines_are_read_as_before(tmp_path):
    folder = table(tmp_path, "file_name,label,fold\n\na.wav,x\n\nb.wav,y,2\n")
    assert [(row["label"], row["fold"]) for row in load_rows(folder, "train")] == [("x", ""), ("y", "2")]


def test_the_index_of_pandas(tmp_path):
    folder = table(tmp_path, ",file_name,label\n0,a.wav,x\n")
    [row] = load_rows(folder, "train")
    assert row["Unnamed: 0"] == "0" and row["label"] == "x"


def test_files_elsewhere(tmp_path):
    """A local table may name any file and URL; a URL is no path in the folder."""
    names = ["/sounds/a.wav", "../b.wav", "https://example.org/c.wav", "sub/d.wav"]
    folder = table(tmp_path, "\n".join(["file_name", *names]))
    rows = load_rows(folder, "train", DataOptions(label_column=None), columns=["audio"])
    expected = ["/sounds/a.wav", f"{folder}/../b.wav", "https://example.org/c.wav", f"{folder}/sub/d.wav"]
    assert [row["audio"]["path"] for row in rows] == expected


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"audio,label\na.wav,x\nb.wav,y,3\n", "train.csv cannot be read: .*Expected 2 fields in line 3, saw 3"),
        (b"audio,label\na.wav,Ger\xe4usch\n", "train.csv cannot be read: 'utf-8' codec can't decode"),
        (b"", "train.csv cannot be read: No columns"),
    ],
)
def test_tables_that_datasets_reads(tmp_path, content, message, streaming):
    (tmp_path / "train.csv").write_bytes(content)
    options = DataOptions(streaming=streaming, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        load_stream(str(tmp_path), "train", ASTFeatureExtractor(), options)
