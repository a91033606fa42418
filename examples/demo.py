#!/usr/bin/env python
"""Train an adapter on synthesised sounds and use it. Needs no network; takes a minute or two.

    python examples/demo.py --output_dir demo

keeps the sounds and the adapter, to look at them. The base model is the one in backbone/ast-small, a small Audio
Spectrogram Transformer that was pretrained on other synthesised sounds.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Optional

import numpy as np
import soundfile
from sounds import SAMPLING_RATE, SOUNDS, synthesise, write_dataset
from train_audio_classification import main as train
from transformers import pipeline

import peft_softmoa  # noqa: F401 - registers the method, so that pipeline() can load the adapter
from peft_softmoa.training import decode_audio

BASE_MODEL = Path(__file__).parent.resolve() / "backbone" / "ast-small"


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description="Train an adapter on synthesised sounds and use it.")
    parser.add_argument("--output_dir", help="an empty folder to keep everything in; it is made")
    kept = parser.parse_args(arguments).output_dir
    with contextlib.nullcontext(kept) if kept else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "sounds", {"train": 30, "test": 10}, seed=0)
        print(f"Training on {30 * len(SOUNDS)} synthesised clips of {len(SOUNDS)} classes: {', '.join(SOUNDS)}")
        options = {
            "model_name_or_path": BASE_MODEL,
            "dataset_name": folder / "sounds",
            "train_rows": "part=train",
            "eval_split_name": "train",
            "eval_rows": "part=test",
            "num_train_epochs": 4,
            "per_device_train_batch_size": 16,
            "eval_on_start": True,
            "save_strategy": "no",
            "report_to": "none",
            "output_dir": folder / "adapter",
        }
        trainer = train([part for key, value in options.items() for part in (f"--{key}", str(value))])

        accuracies = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
        size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        print(f"\nTrainable parameters: {trainer.model.get_nb_trainable_parameters()[0]:,}")
        print(f"Accuracy on {10 * len(SOUNDS)} other clips: {accuracies[0]:.0%} before, {accuracies[-1]:.0%} after")
        print(f"Size of the adapter on disk: {size / 1024:.0f} KiB")

        # From here on as somebody else would who has the adapter: load it by name and classify a file.
        classifier = pipeline("audio-classification", model=str(folder / "adapter"))
        label = "siren"
        clip = folder / f"{label}.wav"
        soundfile.write(clip, synthesise(label, np.random.default_rng(1)), SAMPLING_RATE)
        best = classifier(decode_audio(clip, SAMPLING_RATE))[0]
        print(f"A fresh WAV file with a {label}: the reloaded adapter says {best['label']} ({best['score']:.0%})")


if __name__ == "__main__":
    main()
