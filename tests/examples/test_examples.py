"""The example scripts, run as users run them: in processes of their own."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLING_RATE, needs_results, training_options, write_parquet
from huggingface_hub import ModelCard

from peft_softmoa.commands.train import main, parse
from peft_softmoa.demo.run import BASE_MODEL
from peft_softmoa.demo.sounds import SOUNDS, synthesise
from peft_softmoa.training import AudioError, load, open_source

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAIN = ["-m", "peft_softmoa", "train"]


def train(base, dataset, output, environment=(), **arguments):
    return subprocess.run(
        [sys.executable, *TRAIN, *training_options(base, dataset, output, **arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **dict(environment)},
    )


def test_trains_evaluates_and_saves_everything(base_folder, tones_folder, tmp_path):
    result = train(base_folder, tones_folder, tmp_path / "out", num_train_epochs=20, eval_on_start=True)
    assert result.returncode == 0, result.stderr
    assert "trainable params: " in result.stdout
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "preprocessor_config.json"} <= files
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["label_names"] == ["high", "low"] and config["modules_to_save"] == ["classifier"]
    assert "import peft_softmoa" in (tmp_path / "out" / "README.md").read_text()
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_accuracy" in entry]
    assert [entry["epoch"] for entry in evaluations] == list(range(21))
    assert evaluations[-1]["eval_accuracy"] == evaluations[-1]["eval_f1_macro"] == 1.0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {each.metric_type: each.metric_value for each in card.data.eval_results} == {"accuracy": 1.0, "f1": 1.0}
    # What is finished goes on only if that is asked for.
    options = training_options(base_folder, tones_folder, tmp_path / "out", num_train_epochs=21)
    with pytest.raises(ValueError, match="other settings: num_train_epochs was 20.0 and is 21.0"):
        main(options)
    assert main([*options, "--resume_from_checkpoint", "True"]).state.epoch == 21


def test_choices_of_the_adapter(base_folder, tones_folder, tmp_path):
    options = {"routing": "top_k", "expert_type": "convolution", "patch_grid": True, "train_norms": True}
    others = {"layers_to_transform": 0, "log_experts_steps": 2}
    trainer = main(training_options(base_folder, tones_folder, tmp_path / "out", **others, **options))
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {name: saved[name] for name in options} == options and saved["layers_to_transform"] == [0]
    assert saved["modules_to_save"] == ["classifier", "audio_spectrogram_transformer.layers.0.layernorm_before"]
    assert any("router_aux_loss" in entry for entry in trainer.state.log_history)
    assert any("experts/layers.0.attention/effective_number" in entry for entry in trainer.state.log_history)


def test_accelerate_launch(base_folder, tones_folder, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *TRAIN,
         "--model_name_or_path", str(base_folder), "--dataset_name", str(tones_folder), "--eval_strategy", "no",
         "--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none",
         "--output_dir", str(tmp_path / "out")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_bad_audio_is_named_once(base_folder, tones_folder, tmp_path):
    folder = tmp_path / "tones"
    folder.mkdir()
    lines = (tones_folder / "metadata.csv").read_text()
    for path in tones_folder.glob("*.wav"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.wav").write_bytes(b"no audio")
    (folder / "cut.wav").write_bytes((folder / "1-low-0.wav").read_bytes()[:999])
    (folder / "metadata.csv").write_text(f"{lines}broken.wav,low,1\ncut.wav,high,1\n")
    result = train(base_folder, folder, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stdout.splitlines() if "Skipped" in line]
    assert len(warnings) == 1 and "Skipped 2 of 10" in warnings[0]
    assert "broken.wav: unreadable" in warnings[0] and "cut.wav: truncated" in warnings[0]
    with pytest.raises(AudioError, match="broken.wav: unreadable|cut.wav: truncated"):
        main(training_options(base_folder, folder, tmp_path / "out2", on_bad_audio="raise"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"label_column_name": "genre"}, "has no column 'genre'; its columns are: .*label"),
        ({"audio_column_name": "sound", "form": "parquet"}, "has no column 'sound'; its columns are: audio, label"),
        ({"train_rows": "label=low"}, "labels that are none of the classes low: high"),
        ({"eval_rows": "fold=1"}, "share rows: choose different ones with --train_rows, --eval_rows"),
        ({"eval_rows": "fold=7"}, "No rows are left of .*fold=7"),
        ({"eval_split_name": "validation"}, "has no split 'validation', only: train"),
        ({"num_experts": 0}, "--num_experts must be an integer from 1 to 65536, got 0"),
        ({"routing": "top_k", "label_smoothing_factor": 0.1}, "label_smoothing_factor and --routing top_k do not go"),
        ({"routing": "dense", "num_slots": 2}, "--num_slots must be left out unless routing='soft'"),
        ({"placement": "everywhere"}, "invalid choice: 'everywhere'"),
        ({"on_bad_audio": "ignore"}, "invalid choice: 'ignore'"),
        ({"shuffle_buffer_size": -5}, "--shuffle_buffer_size must not be negative, got -5"),
    ],
)
def test_bad_input(base_folder, tones_folder, tmp_path, capsys, arguments, message):
    form = arguments.get("form")
    dataset = write_parquet(tmp_path / "parquet", tones_folder) if form == "parquet" else tones_folder
    arguments = {key: value for key, value in arguments.items() if key != "form"}
    with pytest.raises((ValueError, SystemExit)) as error:
        main(training_options(base_folder, dataset, tmp_path / "out", **arguments))
    assert re.search(message, str(error.value) + capsys.readouterr().err)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_arguments_from_a_file(base_folder, tones_folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "# of a run\nlearning_rate: 1e-3\nnum_train_epochs: 7\ntrain_norms: true\nlayers_to_transform: [0, 1]\n"
    )
    options = training_options(base_folder, tones_folder, tmp_path / "out")
    run = parse(["--config", str(config), *options])
    assert run.training.learning_rate == 1e-3 and run.training.num_train_epochs == 2  # the command line's
    assert run.adapter.train_norms and run.adapter.layers_to_transform == [0, 1]
    assert run.data.dataset_name == str(tones_folder)
    config.write_text("learning_rate: 1e-3\nnum_expert: 7\n")
    with pytest.raises(ValueError, match="run.yaml' has num_expert, which this command does not take. Correct"):
        parse([*options, "--config", str(config)])
    config.write_text("a list\n")
    with pytest.raises(ValueError, match="run.yaml' has no fields at all"):
        parse([*options, "--config", str(config)])
    config.write_text("eval_strategy: no\nmax_length_seconds: null\n")
    run = parse([*options, f"--config={config}"])
    assert run.training.eval_strategy == "no" and run.data.max_length_seconds is None
    for mistake in (["--config"], ["--conf", str(config)]):
        with pytest.raises((SystemExit, ValueError)):
            parse([*options, *mistake])


def test_a_test_split(base_folder, tones_folder, tmp_path):
    options = training_options(base_folder, tones_folder, tmp_path / "out", test_split_name="train")
    with pytest.raises(ValueError, match="Training and test both read the split 'train' and share rows"):
        main(options)
    with pytest.raises(ValueError, match="Evaluation and test both read"):
        main([*options, "--test_rows", "fold=2"])
    main([*options, "--test_rows", "fold=2", "--eval_strategy", "no", "--max_steps", "1"])
    metrics = json.loads((tmp_path / "out" / "test_results.json").read_text())
    assert 0 <= metrics["test_accuracy"] <= 1 and not (tmp_path / "out" / "eval_results.json").exists()


def test_a_dataset_that_does_not_say_how_many_rows_it_has(base_folder, tones_folder, tmp_path, monkeypatch):
    """Where labels cannot be read without the audio, the rows are not counted in passing."""
    dataset = write_parquet(tmp_path / "parquet", tones_folder)
    monkeypatch.setattr(load, "open_source", lambda *args: replace(open_source(*args), reads_single_columns=False))
    options = training_options(base_folder, dataset, tmp_path / "out", eval_strategy="no")
    with pytest.raises(
        ValueError, match="parquet \\(train, fold=1\\) does not say how many rows it has.*with --max_steps"
    ):
        main(options)
    assert main([*options, "--max_steps", "5"]).state.global_step == 5
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["label_names"] == ["high", "low"]


def test_a_checkpoint_of_another_run_does_not_overwrite_a_model(base_folder, tones_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_model.bin").write_bytes(b"precious")
    options = training_options(base_folder, tones_folder, tmp_path / "out")
    with pytest.raises(ValueError, match="already holds a model.*adapter_model.bin"):
        main(options)
    with pytest.raises(ValueError, match="must be a checkpoint in the output folder"):
        main([*options, "--resume_from_checkpoint", str(tmp_path / "other" / "checkpoint-2")])
    assert (tmp_path / "out" / "adapter_model.bin").read_bytes() == b"precious"


def picture_of(readme):
    return Path(re.search(r"!\[.*?\]\([^)]*?(examples/inspection/.*?)\)", readme).group(1))


@needs_results
def test_the_picture_of_the_readme_is_there():
    assert (EXAMPLES.parent / picture_of((EXAMPLES.parent / "README.md").read_text())).exists()


@pytest.mark.real_audio
def test_learns_real_sounds(esc10_folder, tmp_path):
    """Folds 1 to 4 for training, fold 5 for evaluation; ten classes, so that chance is 10 %."""
    dataset = write_parquet(tmp_path / "parquet", esc10_folder)
    result = train(
        BASE_MODEL,
        dataset,
        tmp_path / "out",
        train_rows="fold=1,2,3,4",
        eval_rows="fold=5",
        num_train_epochs=1,
        per_device_train_batch_size=16,
        eval_strategy="no",
        test_split_name="train",
        test_rows="fold=5",
        save_strategy="no",
    )
    assert result.returncode == 0, result.stderr
    assert "Skipped" not in result.stdout
    metrics = json.loads((tmp_path / "out" / "test_results.json").read_text())
    print(f"{metrics['test_accuracy']:.1%}")
    assert metrics["test_accuracy"] > 0.6


def test_sounds_are_what_they_say():
    for label in SOUNDS:
        first, second = (synthesise(label, np.random.default_rng(seed)) for seed in (0, 1))
        assert first.dtype == np.float32 and np.isfinite(first).all() and 0.05 < np.abs(first).max() < 1
        assert len(first) != len(second) and 2 * SAMPLING_RATE <= len(first) <= 5 * SAMPLING_RATE
        assert np.array_equal(first, synthesise(label, np.random.default_rng(0)))
