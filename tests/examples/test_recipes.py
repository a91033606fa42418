"""The recipes and cross-validation, on small local copies of the datasets: the same columns and splits."""

import json
import re
import statistics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import training_options, write_tone

from peft_softmoa.commands import cross_validate
from peft_softmoa.commands.train import main
from peft_softmoa.training import load_stream, run

FEW = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none"}


def options_of(recipe, base, dataset, **arguments):
    given = {"config": recipe, "model_name_or_path": base, "dataset_name": dataset}
    return [str(part) for name, value in {**given, **FEW, **arguments}.items() for part in (f"--{name}", value)]


def clip(folder, pitch):
    write_tone(folder / "tone.wav", pitch, seconds=0.2)
    return {"bytes": (folder / "tone.wav").read_bytes(), "path": f"{pitch}.wav"}


def write(path, rows, **features):
    """Write rows with an audio column, and labels that the dataset declares, as a Parquet file."""
    described = {"audio": {"_type": "Audio"}, **features}
    for name, value in rows[0].items():
        if name not in described:
            described[name] = {
                "dtype": {str: "string", int: "int64", float: "float64", bool: "bool"}[type(value)],
                "_type": "Value",
            }
    table = pa.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = json.dumps({"info": {"features": {name: described[name] for name in table.column_names}}})
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), path)


def folds(folder, num_folds, label_column, **others):
    """Two clips of each of two classes in each fold."""
    rows = []
    for fold in range(1, num_folds + 1):
        for index, label in enumerate(("dog", "siren") * 2):
            audio = clip(folder, 200 + 900 * (index % 2) + 10 * fold + index)
            rows.append({**others, "fold": fold, label_column: label, "audio": audio})
    write(folder / "data" / "data" / "train-00000-of-00001.parquet", rows)
    return folder / "data"


def seen_rows(folder):
    """Which folds a run has trained on."""
    settings = json.loads((folder / "run.json").read_text())["settings"]
    return settings["train_rows"]


def test_esc_50(base_folder, tmp_path, capsys):
    others = {"filename": "1-1-A-0.wav", "target": 0, "esc10": True, "src_file": 1, "take": "A"}
    dataset = folds(tmp_path, 5, "category", **others)
    folder = tmp_path / "out"
    options = [*options_of("esc50", base_folder, dataset), "--num_folds", "5", "--validation_folds", "1"]
    result = cross_validate.main([*options, "--output_dir", str(folder)])
    trained = {fold: seen_rows(folder / f"fold-{fold}") for fold in range(1, 6)}
    assert trained == {1: "fold=3,4,5", 2: "fold=1,4,5", 3: "fold=1,2,5", 4: "fold=1,2,3", 5: "fold=2,3,4"}
    accuracies = []
    for fold in range(1, 6):
        metrics = json.loads((folder / f"fold-{fold}" / "all_results.json").read_text())
        assert {"test_accuracy", "eval_accuracy"} <= set(metrics)
        accuracies.append(metrics["test_accuracy"])
        saved = json.loads((folder / f"fold-{fold}" / "adapter_config.json").read_text())
        assert {"classifier", "audio_spectrogram_transformer.layernorm"} < set(saved["modules_to_save"])
        card = (folder / f"fold-{fold}" / "README.md").read_text()
        assert f"train (fold={fold})" in card and f"train (fold={fold % 5 + 1})" in card  # of test and validation
    mean, deviation = statistics.mean(accuracies), statistics.pstdev(accuracies)
    assert (result["mean"]["accuracy"], result["standard_deviation"]["accuracy"]) == (mean, deviation)
    assert [each["accuracy"] for each in result["folds"].values()] == accuracies
    assert set(result["mean"]) == {"accuracy", "f1_macro"}
    assert f"accuracy {mean:.4f} ± {deviation:.4f} (mean" in capsys.readouterr().out

    # It goes on where it stopped, and trains what is finished no more.
    (folder / "fold-4" / "run.json").unlink()
    for path in (folder / "fold-4").glob("[ac]*"):
        if path.is_file():
            path.unlink()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("fold-[1235]/*")}
    for path in (folder / "fold-4").glob("checkpoint-*"):
        path.rename(tmp_path / path.name)
    assert cross_validate.main([*options, "--output_dir", str(folder), "--token", "hf_secret"]) == result
    assert {path: path.stat().st_mtime_ns for path in folder.glob("fold-[1235]/*")} == finished
    assert not any("hf_secret" in path.read_text() for path in folder.rglob("*.json"))
    with pytest.raises(ValueError, match="with other settings: learning_rate was 0.005 and is 1.0"):
        cross_validate.main([*options, "--learning_rate", "1", "--output_dir", str(folder)])


def test_urbansound_8k(base_folder, tmp_path, monkeypatch):
    others = {"slice_file_name": "1-2-3.wav", "fsID": 1, "start": 0.0, "end": 4.0, "salience": 1, "classID": 3}
    dataset = folds(tmp_path, 3, "class", **others)
    read = []

    def load(*args, **kwargs):
        stream = load_stream(*args, **kwargs)
        read.append((kwargs["rows"], stream.summary.num_rows))
        return stream

    monkeypatch.setattr(run, "load_stream", load)
    folder = tmp_path / "out"
    options = options_of("urbansound8k", base_folder, dataset, num_folds=3, output_dir=folder, save_strategy="no")
    result = cross_validate.main(options)
    # Each row is tested once, by a model that was not trained on it.
    assert read[1::2] == [("fold=1", 4), ("fold=2", 4), ("fold=3", 4)]
    assert read[::2] == [("fold=2,3", 8), ("fold=1,3", 8), ("fold=1,2", 8)]
    assert json.loads((folder / "cross_validation.json").read_text()) == result
    assert set(result["folds"]) == {"1", "2", "3"}

    # Results of other settings are not taken for those of these, although there are no checkpoints.
    for name, value in (("learning_rate", "1"), ("metric_for_best_model", "f1_macro")):
        with pytest.raises(ValueError, match=f"with other settings: {name} was"):
            cross_validate.main([*options, f"--{name}", value])
    assert len(read) == 6 and cross_validate.main(options) == result and len(read) == 6


def test_speech_commands(base_folder, tmp_path):
    words = ("yes", "no", "wow")
    dataset = tmp_path / "data"
    for index, word in enumerate((*words, "_background_noise_")):
        (dataset / word).mkdir(parents=True)
        for clip_index in range(4):
            write_tone(dataset / word / f"{clip_index}_nohash_0.wav", 200 + 500 * index, seconds=0.2)
    for number, name in ((2, "validation"), (3, "testing")):
        (dataset / f"{name}_list.txt").write_text("".join(f"{word}/{number}_nohash_0.wav\n" for word in words))
    trainer = main(
        options_of("speech_commands", base_folder, dataset, output_dir=tmp_path / "out", on_bad_audio="raise")
    )
    assert trainer.train_dataset.label_names == sorted(words)
    assert trainer.train_dataset.summary.num_rows == 6
    assert {"eval_accuracy", "test_accuracy"} <= set(json.loads((tmp_path / "out" / "all_results.json").read_text()))


def test_fluent_speech_commands(base_folder, tmp_path):
    intents = [("activate", "lights", "kitchen"), ("activate", "lights", "none"), ("increase", "heat", "none")]
    for split in ("train", "validation", "test"):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        lines = [",file_name,speakerId,transcription,action,object,location"]  # the first column has no name
        for index, intent in enumerate(intents * 2):
            write_tone(folder / f"{index}.wav", 200 + 500 * (index % 3), seconds=0.2)
            lines.append(f'{index},{index}.wav,a1,"Lights, please",{",".join(intent)}')
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    options = options_of("fluent_speech_commands", base_folder, tmp_path / "data", output_dir=tmp_path / "out")
    trainer = main(options)
    assert trainer.train_dataset.label_names == sorted(map(" ".join, intents))
    assert "test_accuracy" in json.loads((tmp_path / "out" / "all_results.json").read_text())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_folds": 2, "validation_folds": 1}, "leaves no fold to train on"),
        ({"num_folds": 2, "train_rows": "fold=1"}, "leave it out"),
        ({"num_folds": 2, "push_to_hub": True}, "would push each fold over the last"),
        ({"num_folds": 3, "fold_column": "part"}, "has no column 'part'"),
        ({"num_folds": 4}, "--num_folds 4 means the folds 1 to 4, but column 'fold' of .* has 1, 2: correct"),
        ({"num_folds": 3, "fold_column": "label"}, "column 'label' of .* has low, high: correct --num_folds or"),
        ({"num_folds": 2, "load_best_model_at_end": True}, "needs a fold that says what is best"),
    ],
)
def test_folds_that_do_not_fit(base_folder, tones_folder, tmp_path, capsys, arguments, message):
    options = training_options(base_folder, tones_folder, tmp_path, **FEW)
    index = options.index("--train_rows")
    options = [*options[:index], *options[options.index("--num_train_epochs") :]]
    more = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    with pytest.raises((SystemExit, ValueError)) as error:
        cross_validate.main([*options, *more])
    assert re.search(message, str(error.value) + capsys.readouterr().err)
    assert not list(tmp_path.glob("fold-*"))


def test_folds_that_are_left_out(base_folder, tmp_path):
    dataset = folds(tmp_path, 3, "class")
    with pytest.raises(ValueError, match="means the folds 1 to 2, but column 'fold' of .* has 1, 2, 3"):
        cross_validate.main(options_of("urbansound8k", base_folder, dataset, num_folds=2, output_dir=tmp_path / "out"))
