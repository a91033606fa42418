"""The training loop without the Trainer."""

import json
import os
import subprocess
import sys

import pytest
import torch
import train_no_trainer
from conftest import training_options
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForAudioClassification

from peft_softmoa.commands.train import main as train_with_trainer
from peft_softmoa.training import newest_checkpoint

SAME = {"per_device_train_batch_size": 3, "num_train_epochs": 3, "shuffle_buffer_size": 5, "max_length_seconds": 0.4}


def options_of(base_folder, tones_folder, folder, **arguments):
    options = training_options(base_folder, tones_folder, folder, **{**SAME, **arguments})
    index = options.index("--report_to")
    return options[:index] + options[index + 2 :]


def test_it_trains_as_the_trainer_does(base_folder, tones_folder, tmp_path):
    metrics = train_no_trainer.main(options_of(base_folder, tones_folder, tmp_path / "loop"))
    trainer = train_with_trainer(training_options(base_folder, tones_folder, tmp_path / "trainer", **SAME))
    given, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("loop", "trainer"))
    assert given.keys() == expected.keys()
    for name, tensor in given.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
    assert metrics["accuracy"] == trainer.state.log_history[-1]["eval_accuracy"]


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(base_folder, tones_folder, tmp_path, monkeypatch, capsys):
    def options(name):
        arguments = {"save_steps": 2, "mask_frames": 20, "mask_frequencies": 20, "dataloader_num_workers": 1}
        return options_of(base_folder, tones_folder, tmp_path / name, **arguments)

    train_no_trainer.main(options("whole"))
    masked, count = train_no_trainer.spec_augment, []

    def cut_off(*args):
        count.append(args)
        if len(count) == 6:
            raise KeyboardInterrupt
        return masked(*args)

    monkeypatch.setattr(train_no_trainer, "spec_augment", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train_no_trainer.main(options("cut"))
    assert newest_checkpoint(tmp_path / "cut").endswith("checkpoint-4")
    assert "model.safetensors" not in {path.name for path in (tmp_path / "cut" / "checkpoint-4").iterdir()}
    monkeypatch.undo()
    train_no_trainer.main(options("cut"))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["finished"]
    # Everything but the end was done: it evaluates and saves.
    (tmp_path / "cut" / "adapter_model.safetensors").unlink()
    run = tmp_path / "cut" / "run.json"
    run.write_text(run.read_text().replace("true", "false", 1))
    train_no_trainer.main(options("cut"))
    base = AutoModelForAudioClassification.from_pretrained(base_folder)
    assert PeftModel.from_pretrained(base, tmp_path / "cut").get_base_model().config.id2label == {0: "high", 1: "low"}


def test_two_processes(base_folder, tones_folder, tmp_path):
    options = options_of(base_folder, tones_folder, tmp_path / "out", num_train_epochs=2, dataloader_num_workers=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}  # as `accelerate launch` says it
    done = subprocess.run(
        [*command, train_no_trainer.__file__, *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Epoch 2: {'accuracy'") == 1
    # Eight rows are two batches for each of two processes.
    assert newest_checkpoint(tmp_path / "out").endswith("checkpoint-4")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["num_processes"] == 2
    base = AutoModelForAudioClassification.from_pretrained(base_folder)
    PeftModel.from_pretrained(base, tmp_path / "out")
    with pytest.raises(ValueError, match="num_processes was 2 and is 1"):
        train_no_trainer.main(options)


def test_what_is_tracked(base_folder, tones_folder, tmp_path):
    options = options_of(base_folder, tones_folder, tmp_path / "out", num_train_epochs=1)
    train_no_trainer.main([*options, "--report_to", "tensorboard"])
    [folder] = {
        path.parent for path in (tmp_path / "out").rglob("events.out.tfevents*") if path.parent.name == "softmoa"
    }
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert {"learning_rate", "eval_accuracy", "eval_f1_macro"} <= set(events.Tags()["scalars"])
