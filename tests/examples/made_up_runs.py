"""Clips, features and records that tests of the comparison of methods make up."""

import torch
from conftest import write_tone

from examples.method_comparison.data import Data

PROTOCOL = {
    "study": "demo", "task": "audio-classification", "seconds": None, "epochs": 2, "epochs_of": {}, "batch_size": 4,
    "groups": {},
    "clips_per_class": None, "validation_per_class": None, "test_per_class": None, "validate_every": 1, "trace": [],
    "metric": "accuracy",
    "model": "m", "model_parameters": 1000, "model_sha256": "0", "data": "d", "clips": 9, "classes": 2,
    "folds": ["1", "2", "3"], "rate_folds": ["1"], "budget": 4000, "optimizer": "AdamW", "schedule": "cosine",
    "augmentation": "none", "precision": "float32",
    "rates": dict.fromkeys(["linear probe", "LoRA", "single adapter", "Soft-MoA", "top-k"], [0.01]),
}  # fmt: skip


def protocol(model=None, **other):
    """The settings of runs; with a model, those that train."""
    return {**PROTOCOL, **({} if model is None else {"model_path": str(model)}), **other}


def write_clips(folder):
    """Low and high tones in three folds by two speakers each, with a metadata.csv."""
    lines = ["file_name,label,fold,speaker"]
    for fold in (1, 2, 3):
        for label, pitch in (("low", 200), ("high", 2000)):
            for index in range(3):
                name = f"{fold}-{label}-{index}.wav"
                write_tone(folder / name, pitch * (1 + (3 * fold + index) / 20))
                lines.append(f"{name},{label},{fold},{fold}{index % 2}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def clips(size=18, folds=3):
    """Data that no file is needed for."""
    generator = torch.Generator().manual_seed(0)
    names = [str(index % folds + 1) for index in range(size)]
    labels = torch.arange(size) // folds % 2
    speakers = [f"{name}-{index % 4 // 2}" for index, name in enumerate(names)]
    return Data(torch.randn(size, 64, 128, generator=generator), labels, names, speakers, ["high", "low"], "made up")


def made_up(
    method, fold="1", rate=0.01, seed=0, test=0.5, validation=0.5, loss=1.0, options=None, settings=(), **other
):
    """A record as the tables read it."""
    progress = {"epoch": [1, 2], "seconds": [2.0, 4.0], "loss": [1.0, 0.5]}
    progress |= {"validation": [0.2, validation], "validation_loss": [1.0, loss]}
    own = {"method": method, "options": options or {}, "fold": fold, "rate": rate, "seed": seed}
    where = {"device": "a processor", "threads": 1, "cores": 2, "torch": "2", "transformers": "5", "peft": "0"}
    return {
        "settings": PROTOCOL | dict(settings) | own,
        "environment": where | {"processes": 2},
        "parameters": 78,
        "head_parameters": 10,
        "training_clips": 3,
        "progress": progress,
        "test": test,
        "test_loss": 1.0,
        "step_seconds": 0.1,
        "forward_1_seconds": 0.01,
        "memory_bytes": 2**20,
        "run_seconds": 5.0,
        **other,
    }
