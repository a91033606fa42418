"""Folders as people download them: each layout in a small copy, with the rows and splits of its documentation."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_ast_config, write_tone
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import ASTFeatureExtractor, ASTForAudioClassification, TrainingArguments

from peft_softmoa import SoftMoAConfig
from peft_softmoa.training import AudioTrainer, DataOptions, load_rows, load_stream
from peft_softmoa.training.layouts import LAYOUTS


def write(folder, *files, **texts):
    """Tones and texts by their paths in a folder."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_tone(folder / file)
    return folder


def write_text(folder, file, *lines, encoding="utf-8"):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding=encoding)


def clips(folder, split="train", column="label", **options):
    """Path in the folder and label of each row; every file is there."""
    rows = list(load_rows(str(folder), split, DataOptions(**options)))
    assert all(os.path.isfile(row["audio"]["path"]) and row["audio"]["bytes"] is None for row in rows)
    return [(Path(os.path.relpath(row["audio"]["path"], folder)).as_posix(), row[column]) for row in rows]


def stream(folder, split="train", rows=None, **options):
    return load_stream(str(folder), split, ASTFeatureExtractor(), DataOptions(**options), rows=rows)


def test_class_folders(tmp_path):
    write(tmp_path, "dog/b.wav", "dog/a.flac", "cat/1.WAV", ".git/no.wav", "dog/._a.wav")
    write_text(tmp_path, "README.txt", "Sounds of pets.")
    assert clips(tmp_path) == [("cat/1.WAV", "cat"), ("dog/a.flac", "dog"), ("dog/b.wav", "dog")]
    found = stream(tmp_path)
    assert found.label_names == ["cat", "dog"]
    with pytest.raises(ValueError, match="no split 'test', only: train.*layout 'class folders'.*1 .txt, cat/"):
        clips(tmp_path, "test")


def test_class_folders_below_splits(tmp_path):
    write(tmp_path, "train/dog/a.wav", "train/cat/a.wav", "test/dog/b.wav", "test/cat/c.wav")
    assert clips(tmp_path) == [("train/cat/a.wav", "cat"), ("train/dog/a.wav", "dog")]
    assert clips(tmp_path, "test") == [("test/cat/c.wav", "cat"), ("test/dog/b.wav", "dog")]
    with pytest.raises(ValueError, match="no split 'validation', only: test, train"):
        clips(tmp_path, "validation")


@pytest.mark.parametrize(
    "files, table",
    [
        (["dog/a.wav", "cat/a.wav"], "labels.csv"),
        (["train/a.wav", "test/a.wav"], None),
        (["fold1/a.wav", "fold2/a.wav"], None),
        (["audio/a.wav"], None),
        (["sounds.audio_train/a.wav", "sounds.audio_test/a.wav"], "sounds.meta/train.csv"),
        (["dog/a.wav", "cat/a.wav", "loose.wav"], None),
        (["dog/a.wav", "train/dog/a.wav", "train/cat/a.wav"], None),
    ],
)
def test_folders_that_may_be_no_classes(tmp_path, files, table):
    """Where a table says what is heard, or folders divide the clips, their names would be wrong classes."""
    write(tmp_path, *files)
    if table:
        write_text(tmp_path, table, "name,what", "dog/a.wav,bark")
    with pytest.raises(ValueError, match="no layout that is read. .*class folders.*Found: .* .(1 .wav|cat/)"):
        clips(tmp_path)


@pytest.mark.parametrize("delimiter, suffix", [(",", "csv"), (";", "csv"), ("\t", "csv"), ("\t", "tsv"), (";", "tsv")])
def test_tables_with_any_delimiter(tmp_path, delimiter, suffix):
    write(tmp_path, "a.wav", "b.wav")
    lines = [("file_name", "label", "fold"), ("a.wav", '"cat, small; grey"', "1"), (" b.wav", " dog ", " 2")]
    write_text(tmp_path, f"metadata.{suffix}", *map(delimiter.join, lines))
    assert clips(tmp_path) == [("a.wav", "cat, small; grey"), ("b.wav", "dog")]
    assert len(stream(tmp_path, rows="fold=2")) == 1
    assert stream(tmp_path, rows='label="cat, small; grey"').label_names == ["cat, small; grey"]


def test_json_lines(tmp_path):
    write(tmp_path / "train", "a.wav", "b.wav")
    write(tmp_path / "test", "a.wav")
    rows = [{"file_name": "a.wav", "label": "x", "fold": 1}, {"label": "NA", "file_name": "b.wav", "note": None}]
    write_text(tmp_path, "train/metadata.jsonl", *map(json.dumps, rows))
    write_text(tmp_path, "test/metadata.jsonl", json.dumps({"file_name": "a.wav", "label": 1}))
    assert clips(tmp_path) == [("train/a.wav", "x"), ("train/b.wav", "NA")]
    assert list(load_rows(str(tmp_path), "train", columns=["fold", "note"])) == [
        {"fold": 1, "note": None},
        {"fold": None, "note": None},
    ]
    assert stream(tmp_path, "test").label_names == ["1"]


def test_a_parquet_table_beside_the_audio(tmp_path):
    write(tmp_path, "a.wav", "b.wav")
    features = {
        "file_name": {"dtype": "string", "_type": "Value"},
        "label": {"_type": "ClassLabel", "names": ["dog", "cat"]},
    }
    table = pa.table({"file_name": ["a.wav", "b.wav"], "label": [1, 0]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "metadata.parquet")
    assert clips(tmp_path) == [("a.wav", "cat"), ("b.wav", "dog")]


def test_esc50(tmp_path):
    write(tmp_path, "audio/1-100032-A-0.wav", "audio/1-100038-A-14.wav", "audio/5-9032-A-0.wav")
    write_text(
        tmp_path,
        "meta/esc50.csv",
        "filename,fold,target,category,esc10,src_file,take",
        "1-100032-A-0.wav,1,0,dog,True,100032,A",
        "1-100038-A-14.wav,1,14,chirping_birds,False,100038,A",
        "5-9032-A-0.wav,5,0,dog,True,9032,A",
    )
    write_text(tmp_path, "meta/esc50-human.xlsx", "")
    assert clips(tmp_path) == [
        ("audio/1-100032-A-0.wav", "dog"),
        ("audio/1-100038-A-14.wav", "chirping_birds"),
        ("audio/5-9032-A-0.wav", "dog"),
    ]
    assert stream(tmp_path).label_names == ["chirping_birds", "dog"]
    assert len(stream(tmp_path, rows="fold=5")) == len(stream(tmp_path, rows="esc10=False")) == 1
    assert stream(tmp_path, label_column="target").label_names == ["0", "14"]


def test_common_voice(tmp_path):
    write(tmp_path, *(f"clips/common_voice_en_{index}.mp3" for index in range(1, 5)))
    header = "client_id\tpath\tsentence\tup_votes\tage"
    sentences = ['"Stop!" he said, and ran.', 'An "unclosed quote', " It's, well; fine. ", ""]
    lines = [f"a1\tcommon_voice_en_{index}.mp3\t{each}\t2\t" for index, each in enumerate(sentences, 1)]
    write_text(tmp_path, "train.tsv", header, *lines[:2])
    write_text(tmp_path, "dev.tsv", header, lines[2])
    write_text(tmp_path, "validated.tsv", header, *lines)
    write_text(tmp_path, "invalidated.tsv", header)
    names = [f"clips/common_voice_en_{index}.mp3" for index in range(1, 5)]
    assert clips(tmp_path, column="sentence") == list(zip(names[:2], sentences[:2]))
    assert clips(tmp_path, "validation", column="sentence") == [(names[2], "It's, well; fine.")]
    assert clips(tmp_path, "validated", column="up_votes") == [(name, "2") for name in names]
    with pytest.raises(ValueError, match="no split 'test', only: train, validation, validated. .* 'Common Voice'"):
        clips(tmp_path, "test")
    with pytest.raises(ValueError, match="no column 'label'.*sentence"):
        stream(tmp_path)


def test_fsd50k(tmp_path):
    write(tmp_path, "FSD50K.dev_audio/64760.wav", "FSD50K.dev_audio/16399.wav", "FSD50K.eval_audio/37199.wav")
    write_text(
        tmp_path,
        "FSD50K.ground_truth/dev.csv",
        "fname,labels,mids,split",
        '64760,"Electric_guitar,Guitar,Music","/m/02sgy,/m/0342h,/m/04rlf",train',
        "16399,Bark,/m/05tny_,val",
    )
    write_text(tmp_path, "FSD50K.ground_truth/vocabulary.csv", "0,Accelerating_and_revving_and_vroom,/m/07q2z82")
    assert clips(tmp_path, column="labels") == [("FSD50K.dev_audio/64760.wav", "Electric_guitar,Guitar,Music")]
    assert clips(tmp_path, "validation", column="labels") == [("FSD50K.dev_audio/16399.wav", "Bark")]
    with pytest.raises(ValueError, match="no split 'test', only: train, validation. .* 'FSD50K'"):
        clips(tmp_path, "test")
    write_text(tmp_path, "FSD50K.ground_truth/eval.csv", "fname,labels,mids", '37199,"Bell,Music","/m/0395lw,/m/04rlf"')
    assert clips(tmp_path, "test", column="labels") == [("FSD50K.eval_audio/37199.wav", "Bell,Music")]
    write_text(tmp_path, "FSD50K.ground_truth/dev.csv", "fname,labels", "64760,Music")
    with pytest.raises(ValueError, match="dev.csv has no column 'split'; its columns are: fname, labels"):
        clips(tmp_path)


@pytest.mark.parametrize("published", [True, False], ids=["as published", "as on Kaggle"])
def test_urbansound8k(tmp_path, published):
    audio, metadata = ("audio/", "metadata/") if published else ("", "")
    write(tmp_path, f"{audio}fold5/100032-3-0-0.wav", f"{audio}fold10/100648-1-0-0.wav")
    write_text(
        tmp_path,
        f"{metadata}UrbanSound8K.csv",
        "slice_file_name,fsID,start,end,salience,fold,classID,class",
        "100032-3-0-0.wav,100032,0.0,0.317551,1,5,3,dog_bark",
        "100648-1-0-0.wav,100648,4.823402,5.471927,2,10,1,car_horn",
    )
    assert clips(tmp_path) == [
        (f"{audio}fold5/100032-3-0-0.wav", "dog_bark"),
        (f"{audio}fold10/100648-1-0-0.wav", "car_horn"),
    ]
    assert stream(tmp_path).label_names == ["car_horn", "dog_bark"]
    assert len(stream(tmp_path, rows="fold=10")) == 1


def test_speech_commands(tmp_path):
    words = [f"{word}/{speaker}_nohash_0.wav" for word in ("yes", "no") for speaker in ("a1", "b2", "c3")]
    write(tmp_path, *words, "_background_noise_/pink_noise.wav")
    write_text(tmp_path, "_background_noise_/README.md", "Noise")
    write_text(tmp_path, "validation_list.txt", "yes/b2_nohash_0.wav", "no/b2_nohash_0.wav")
    write_text(tmp_path, "testing_list.txt", "no/c3_nohash_0.wav", "yes/c3_nohash_0.wav")
    write_text(tmp_path, "LICENSE", "CC BY")
    assert clips(tmp_path) == [("no/a1_nohash_0.wav", "no"), ("yes/a1_nohash_0.wav", "yes")]
    assert clips(tmp_path, "validation") == [("yes/b2_nohash_0.wav", "yes"), ("no/b2_nohash_0.wav", "no")]
    assert clips(tmp_path, "test") == [("no/c3_nohash_0.wav", "no"), ("yes/c3_nohash_0.wav", "yes")]
    assert stream(tmp_path).label_names == stream(tmp_path, "test").label_names == ["no", "yes"]
    # Tables that its recipe had people make in the same folder are read as before.
    write_text(tmp_path, "test/metadata.csv", "file_name,label", "../no/c3_nohash_0.wav,no")
    assert clips(tmp_path, "test") == [("no/c3_nohash_0.wav", "no")]


def test_nemo_manifests(tmp_path):
    write(tmp_path, "wavs/a.wav", "wavs/b.wav", "wavs/c.wav")
    row = {"audio_filepath": "wavs/a.wav", "duration": 0.5, "offset": 0.0, "label": "on"}
    write_text(tmp_path, "train_manifest.json", json.dumps(row), "")
    absolute = {"audio_filepath": str(tmp_path / "wavs/b.wav"), "duration": 0.5, "command": "off"}
    write_text(tmp_path, "dev_manifest.json", json.dumps(absolute))
    write_text(tmp_path, "manifest_test.jsonl", json.dumps({"audio_filepath": "wavs/c.wav", "text": "turn it off"}))
    assert clips(tmp_path) == [("wavs/a.wav", "on")]
    assert clips(tmp_path, "validation") == [("wavs/b.wav", "off")]
    assert clips(tmp_path, "test", column="text") == [("wavs/c.wav", "turn it off")]
    write_text(tmp_path, "train_manifest.json", json.dumps({**row, "offset": 1.5}))
    with pytest.raises(ValueError, match=r"train_manifest.json: wavs/a.wav begins at an offset of 1.5 s"):
        clips(tmp_path)


@pytest.mark.parametrize("place", ["", "train/", "data/train/"])
def test_kaldi(tmp_path, place):
    write(tmp_path, f"{place}wav/a.wav", f"{place}wav/b.wav")
    folder = tmp_path / place
    write_text(folder, "wav.scp", "spk1-a wav/a.wav", f"spk2-b\t{folder}/wav/b.wav")
    write_text(folder, "utt2spk", "spk1-a spk1", "spk2-b spk2")
    write_text(folder, "text", "spk1-a yes  please", "spk2-b no")
    assert clips(tmp_path, column="speaker") == [(f"{place}wav/a.wav", "spk1"), (f"{place}wav/b.wav", "spk2")]
    assert stream(tmp_path, label_column="text").label_names == ["no", "yes please"]
    with pytest.raises(ValueError, match="no column 'label'; its columns are: utterance, speaker, text, audio"):
        stream(tmp_path)
    write_text(folder, "wav.scp", "spk1-a sox wav/a.wav -t wav - |")
    with pytest.raises(ValueError, match=r"wav.scp: spk1-a is the output of a command \(sox .*no command is run"):
        clips(tmp_path)
    write_text(folder, "segments", "spk1-a rec 0 1")
    with pytest.raises(ValueError, match="has a file segments, but whole files are read"):
        clips(tmp_path)


def test_a_table_in_one_class_folder(tmp_path):
    write(tmp_path, "dog/a.wav", "cat/a.wav")
    write_text(tmp_path, "dog/metadata.csv", "file_name,label", "a.wav,dog")
    message = "no split 'train', only: dog. .*'table', which has metadata.csv.*; there is: cat/ .1 .wav., dog/ .1 .wav"
    with pytest.raises(ValueError, match=message):
        clips(tmp_path)
    assert clips(tmp_path, "dog") == [("dog/a.wav", "dog")]


def test_a_table_beside_parquet(tmp_path):
    write(tmp_path, "dog/a.wav")
    write_text(tmp_path, "dog/metadata.csv", "file_name,label", "a.wav,dog")
    pq.write_table(pa.table({"label": ["dog"]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no split 'train', only: dog.*; there is: train.parquet, dog/ .*metadata.csv"):
        clips(tmp_path)


def test_workers_divide_the_rows_of_a_layout(tmp_path):
    write(tmp_path, *(f"{name}/{index}.wav" for name in ("dog", "cat") for index in range(3)))
    found = load_stream(str(tmp_path), "train", ASTFeatureExtractor(), DataOptions(seed=3))
    labels = [batch["labels"].tolist() for batch in DataLoader(found, batch_size=1, num_workers=2)]
    assert sorted(sum(labels, [])) == [0, 0, 0, 1, 1, 1]


@pytest.fixture(params=["its table as it is", "as published"])
def real_esc50(request, tmp_path):
    """The real clips, also under the names that they are published with."""
    folder = os.environ.get("SOFTMOA_ESC50")
    if not folder:
        pytest.skip("needs real audio: set SOFTMOA_ESC50 to a folder with the ESC-50 recordings and their metadata.csv")
    if request.param == "its table as it is":
        return folder
    (tmp_path / "esc50" / "meta").mkdir(parents=True)
    (tmp_path / "esc50" / "audio").symlink_to(Path(folder, "audio"))
    header, *lines = Path(folder, "metadata.csv").read_text().splitlines()
    assert header == "file_name,label,fold,target"
    lines = [line.removeprefix("audio/") for line in lines]
    write_text(tmp_path, "esc50/meta/esc50.csv", "filename,category,fold,target", *lines)
    return tmp_path / "esc50"


@pytest.mark.real_audio
def test_esc50_trains_as_it_is(real_esc50, tmp_path):
    extractor = ASTFeatureExtractor(max_length=64)
    found = load_stream(str(real_esc50), "train", extractor, DataOptions(), rows="fold=1,2,3,4")
    assert len(found) == 1600 and len(found.label_names) == 50
    torch.manual_seed(0)
    base = ASTForAudioClassification(tiny_ast_config(num_labels=50))
    model = get_peft_model(base, SoftMoAConfig(modules_to_save=["classifier"], label_names=found.label_names))
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    assert AudioTrainer(model, arguments, train_dataset=found).train().global_step == 2
    assert found.extract.skipped == []
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_the_page_names_each_layout():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    names = [each.name for each in LAYOUTS]
    rows = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
    assert [row for row in rows if row in names] == names
