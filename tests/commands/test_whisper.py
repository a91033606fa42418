"""A real Whisper, for English, learns to recognise Arabic words by their English labels, from the command."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLING_RATE
from peft import get_peft_model
from transformers import GenerationConfig, WhisperForConditionalGeneration, pipeline

from peft_softmoa import SoftMoAConfig
from peft_softmoa.commands.train import main
from peft_softmoa.inference.evaluate import evaluate_adapter
from peft_softmoa.training import decode_audio

WORDS = ("yes", "no", "up", "down", "left", "right", "one", "two", "three", "four", "five", "six")
FEW = {"train": 6, "test": 2}  # speakers


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory):
    """A table of some words of some speakers, those of the test apart."""
    variables = ("SOFTMOA_WHISPER", "SOFTMOA_COMMANDS")
    if not all(map(os.environ.get, variables)):
        pytest.skip(f"needs a real Whisper and real speech: set {' and '.join(variables)} to their folders")
    source = Path(os.environ["SOFTMOA_COMMANDS"])
    with open(source / "metadata.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] in WORDS]
    speakers = sorted({row["speaker"] for row in rows})
    part_of = dict.fromkeys(speakers[: FEW["train"]], "train")
    part_of |= dict.fromkeys(speakers[FEW["train"] :][: FEW["test"]], "test")
    folder = tmp_path_factory.mktemp("words")
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "part"])
        for row in rows:
            if row["speaker"] in part_of:
                writer.writerow([source / row["file_name"], row["label"], part_of[row["speaker"]]])
    return folder


@pytest.mark.real_audio
@pytest.mark.timeout(900)
def test_learns_words_of_speakers_that_it_has_not_heard(words_folder, tmp_path):
    whisper, folder = os.environ["SOFTMOA_WHISPER"], tmp_path / "out"
    options = {
        "task": "speech-seq2seq",
        "model_name_or_path": whisper,
        "dataset_name": words_folder,
        "train_rows": "part=train",
        "eval_split_name": "train",
        "eval_rows": "part=test",
        "max_length_seconds": 1,
        "generation_max_length": 12,
        "num_train_epochs": 8,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": folder,
    }
    trainer = main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    errors = [entry["eval_wer"] for entry in trainer.state.log_history if "eval_wer" in entry]
    print(f"word error rate {errors[0]:.1%} before, {errors[-1]:.1%} after")
    assert errors[0] > 0.9 and errors[-1] < 0.1
    assert json.loads((folder / "adapter_config.json").read_text())["max_length_seconds"] == 1

    found = evaluate_adapter(str(folder), str(words_folder), "train", rows="part=test")
    assert found["wer"] == errors[-1] and found["num_clips"] == 48
    recognize = pipeline(
        "automatic-speech-recognition", model=str(folder), tokenizer=str(folder), feature_extractor=str(folder)
    )
    with open(words_folder / "metadata.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "test"][:6]
    clips = [decode_audio(row["file_name"], SAMPLING_RATE) for row in rows]
    heard = [recognize(clip)["text"].strip() for clip in clips]
    assert sum(text == row["text"] for text, row in zip(heard, rows)) >= 5


@pytest.mark.real_audio
@pytest.mark.timeout(600)
def test_clips_that_are_longer_than_whisper_reads(words_folder, tmp_path):
    """By default they are skipped, as their texts are of all of them; long_form transcribes them piece by piece."""
    for name, seconds in (("long", 31), ("short", 1)):  # of silence, of which there is little to say
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(seconds * SAMPLING_RATE, np.float32), SAMPLING_RATE)
    (tmp_path / "metadata.csv").write_text("file_name,text\nlong.wav,yes no\nshort.wav,yes\n")
    # Silence makes it write until it may write no more, at each of several temperatures.
    whisper = tmp_path / "whisper"
    whisper.mkdir()
    for path in Path(os.environ["SOFTMOA_WHISPER"]).resolve().iterdir():
        (whisper / path.name).symlink_to(path)
    generation = GenerationConfig.from_pretrained(whisper)
    (whisper / "generation_config.json").unlink()
    generation.max_length = 16
    generation.save_pretrained(whisper)
    base = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32)
    get_peft_model(base, SoftMoAConfig()).save_pretrained(tmp_path / "adapter")
    arguments = str(tmp_path / "adapter"), str(tmp_path), "train"
    assert evaluate_adapter(*arguments)["num_clips"] == 1
    found = evaluate_adapter(*arguments, long_form=True)
    assert found["num_clips"] == 2 and found["wer"] > 0 and "loss" not in found
