"""Train an adapter on synthesised sounds and use it. Needs no network.

The base model is a small Audio Spectrogram Transformer that was pretrained on other synthesised sounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from transformers import pipeline

from ..quiet import quiet_loading
from ..training import decode_audio
from ..training.arguments import make_run
from ..training.run import train
from .sounds import SAMPLING_RATE, SOUNDS, synthesise, write_dataset

BASE_MODEL = Path(__file__).with_name("ast-small")
# Clips of each class.
CLIPS = {"train": 30, "test": 10}


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Args:
        parameters (int): number of trained parameters.
        accuracy_before (float): share of the test clips that are right before the training.
        accuracy (float): the same after it.
        adapter_bytes (int): size of the adapter's file.
        label (str): class of a new sound.
        predicted (str): what the adapter, loaded anew, says of it.
        score (float): how sure it is.
    """

    parameters: int
    accuracy_before: float
    accuracy: float
    adapter_bytes: int
    label: str
    predicted: str
    score: float


def run_demo(folder: Path) -> DemoResult:
    """Train an adapter on synthesised sounds, load it and classify a new sound.

    Args:
        folder (Path): for the sounds and the adapter; it is made.

    Returns:
        DemoResult: what was trained and how good it is.
    """
    write_dataset(folder / "sounds", CLIPS, seed=0)
    run = make_run(
        model_name_or_path=str(BASE_MODEL),
        dataset_name=str(folder / "sounds"),
        train_rows="part=train",
        eval_split_name="train",
        eval_rows="part=test",
        num_train_epochs=4,
        per_device_train_batch_size=16,
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        output_dir=str(folder / "adapter"),
    )
    trainer = train(run)
    model: Any = trainer.model
    accuracies = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]

    # From here on as somebody else would who has the adapter: load it by name and classify a file.
    with quiet_loading(["classifier"]):
        classifier = pipeline("audio-classification", model=str(folder / "adapter"))
    label = "siren"
    clip = folder / f"{label}.wav"
    soundfile.write(clip, synthesise(label, np.random.default_rng(1)), SAMPLING_RATE)
    best = classifier(decode_audio(clip, SAMPLING_RATE))[0]
    return DemoResult(
        parameters=model.get_nb_trainable_parameters()[0],
        accuracy_before=accuracies[0],
        accuracy=accuracies[-1],
        adapter_bytes=(folder / "adapter" / "adapter_model.safetensors").stat().st_size,
        label=label,
        predicted=best["label"],
        score=best["score"],
    )


def describe_data() -> str:
    """One line about the sounds.

    Returns:
        str: the line.
    """
    return (
        f"{CLIPS['train'] * len(SOUNDS)} synthesised clips of {len(SOUNDS)} classes ({', '.join(SOUNDS)}), and "
        f"{CLIPS['test'] * len(SOUNDS)} others to test"
    )
