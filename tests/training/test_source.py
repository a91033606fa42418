"""Where rows come from, and which of them are read."""

import datasets
import numpy as np
import pytest
from conftest import SAMPLING_RATE, write_parquet, write_tone
from datasets.packaged_modules.parquet.parquet import Parquet
from transformers import ASTFeatureExtractor

from peft_softmoa.training import (
    AudioStream,
    DataOptions,
    DatasetSummary,
    ExtractFeatures,
    class_names,
    decode_audio,
    load_rows,
    load_stream,
    parse_selection,
    select_rows,
    source,
    summarize_rows,
)
from peft_softmoa.training.tasks import SingleLabel


@pytest.fixture
def feature_extractor():
    return ASTFeatureExtractor()


@pytest.fixture(params=["csv", "parquet with classes", "parquet with strings", "downloaded parquet"])
def dataset(request, tones_folder, tmp_path):
    """The same tones in every form, and whether they are streamed."""
    if request.param == "csv":
        return tones_folder, True
    folder = write_parquet(tmp_path / "parquet", tones_folder, class_label=request.param != "parquet with strings")
    return folder, request.param != "downloaded parquet"


def test_rows_become_model_inputs(dataset, feature_extractor, tmp_path):
    folder, streaming = dataset
    rows = load_rows(str(folder), "train", DataOptions(streaming=streaming, cache_dir=str(tmp_path / "cache")))
    task = SingleLabel(declared={"label": class_names(rows, "label")})
    summary = summarize_rows(rows, ["label"], task)
    assert summary == DatasetSummary(16, ("high", "low"), (16,), {"high": 8, "low": 8})
    extract = ExtractFeatures(feature_extractor, task.with_labels(None, summary))
    examples = list(AudioStream(rows, extract))
    assert [example["labels"] for example in examples] == [1] * 4 + [0] * 4 + [1] * 4 + [0] * 4
    expected = feature_extractor(decode_audio(tones_of(folder, rows), SAMPLING_RATE), sampling_rate=SAMPLING_RATE)
    assert np.array_equal(examples[0]["input_values"], expected["input_values"][0])
    assert set(examples[0]) == {"input_values", "labels"}


def tones_of(folder, rows):
    return next(iter(rows))["audio"]


def test_folds_are_chosen_by_the_values_of_a_column(dataset):
    folder, streaming = dataset
    rows = load_rows(str(folder), "train", DataOptions(streaming=streaming))
    assert [str(row["fold"]) for row in select_rows(rows, "fold=2")] == ["2"] * 8
    assert len(list(select_rows(rows, "label=low"))) == 8
    assert len(list(select_rows(rows, "fold = 1, 2"))) == 16
    with pytest.raises(ValueError, match="No rows are left"):
        summarize_rows(select_rows(rows, "fold=3"), ["label"], SingleLabel())
    with pytest.raises(ValueError, match="no column 'part'; its columns are: .*label.*fold"):
        select_rows(rows, "part=1")


@pytest.mark.parametrize("selection", ["fold", "fold=", "=1", "fold=,"])
def test_selections_of_another_form(selection):
    with pytest.raises(ValueError, match=f"column=value,value.*got '{selection}'"):
        parse_selection(selection)


def test_only_the_columns_that_are_asked_for(dataset):
    folder, streaming = dataset
    options = DataOptions(streaming=streaming)
    options = DataOptions(streaming=streaming)
    rows = load_rows(str(folder), "train", options, columns=["label", "fold"])
    assert set(next(iter(rows))) == {"label", "fold"}
    for columns in (["label", "nothing"], ["nothing"]):
        with pytest.raises(ValueError, match="no column 'nothing'; its columns are: .*label"):
            load_rows(str(folder), "train", options, columns=columns)


def test_missing_audio_or_label_column(dataset, feature_extractor):
    folder, streaming = dataset
    rows = load_rows(str(folder), "train", DataOptions(streaming=streaming))
    with pytest.raises(ValueError, match="no column 'sound'; its columns are: .*label"):
        AudioStream(rows, ExtractFeatures(feature_extractor, SingleLabel(["a"]), DataOptions(audio_column="sound")))
    with pytest.raises(ValueError, match="no column 'genre'; its columns are: .*label"):
        summarize_rows(rows, ["genre"], SingleLabel())


def test_splits_are_folders(tones_folder, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_tone(tmp_path / split / "tone.wav")
        (tmp_path / split / "metadata.csv").write_text(f"file_name,label\ntone.wav,{split}\n")
    assert [row["label"] for row in load_rows(str(tmp_path), "test")] == ["test"]
    with pytest.raises(ValueError, match="has no split 'validation', only: test, train"):
        load_rows(str(tmp_path), "validation")
    with pytest.raises(ValueError, match="has no split 'validation', only: train.*layout 'table'"):
        load_rows(str(tones_folder), "validation")


def test_splits_that_do_not_exist(tones_folder, tmp_path):
    write_parquet(tmp_path / "parquet", tones_folder)
    with pytest.raises(ValueError, match="validation"):
        load_rows(str(tmp_path / "parquet"), "validation")


def test_tables_are_read_as_text(tmp_path, feature_extractor):
    write_tone(tmp_path / "tone.wav")
    (tmp_path / "metadata.csv").write_text("file_name,label,fold\ntone.wav,NA,1\ntone.wav,01,\ntone.wav,null,1\n")
    rows = load_rows(str(tmp_path), "train")
    assert summarize_rows(rows, ["label"], SingleLabel())[:3] == (3, ("01", "NA", "null"), (3,))
    assert [row["label"] for row in select_rows(rows, "fold=1")] == ["NA", "null"]
    with pytest.raises(ValueError, match="a row has no label"):
        summarize_rows(rows, ["fold"], SingleLabel())


def test_tables_of_spreadsheets(tmp_path):
    write_tone(tmp_path / "tone.wav")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntone.wav,x\n", encoding="utf-8-sig")
    rows = list(load_rows(str(tmp_path), "train", columns=["audio", "label"]))
    assert rows == [{"audio": {"path": str(tmp_path / "tone.wav"), "bytes": None}, "label": "x"}]


def test_audio_without_a_table_asks_for_one(tmp_path):
    write_tone(tmp_path / "tone.wav")
    message = "no layout that is read. Looked for: metadata.csv.*Found: 1 .wav. Put a metadata.csv"
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path), "train")


def test_table_without_file_names(tmp_path):
    (tmp_path / "metadata.csv").write_text("path,label\na.wav,x\n")
    with pytest.raises(ValueError, match="no column 'file_name'; its columns are: path, label"):
        load_rows(str(tmp_path), "train")


@pytest.mark.parametrize("rows", [None, "fold=1", "label=low"])
def test_a_split_is_looked_up_once(dataset, tones_folder, feature_extractor, tmp_path, monkeypatch, rows):
    """On the Hub, each look-up takes several requests."""
    folder, streaming = dataset
    calls = []

    def look_up(*args, **kwargs):
        calls.append(args)
        return datasets.load_dataset_builder(*args, **kwargs)

    monkeypatch.setattr(source, "load_dataset_builder", look_up)
    monkeypatch.setattr(datasets.load, "load_dataset_builder", look_up)
    options = DataOptions(streaming=streaming, cache_dir=str(tmp_path / "cache"))
    stream = load_stream(str(folder), "train", feature_extractor, options, rows=rows)
    assert len(list(stream)) == stream.summary.num_rows == (8 if rows else 16)
    assert len(calls) == (folder != tones_folder)  # a table is no dataset of datasets


def test_labels_of_parquet_files_are_read_without_the_audio(tones_folder, tmp_path, monkeypatch):
    folder = str(write_parquet(tmp_path / "parquet", tones_folder))
    read, generate = [], Parquet._generate_tables

    def spy(self, *args, **kwargs):
        read.append(self.config.columns)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Parquet, "_generate_tables", spy)
    load_stream(folder, "train", ASTFeatureExtractor(), rows="fold=1")
    assert read == [["label", "fold"]]
