"""Clips, features and records that tests of the comparison of methods make up."""

import torch
from conftest import write_tone

from examples.method_comparison.training import Data


def write_clips(folder):
    """Low and high tones in three folds, with a metadata.csv."""
    lines = ["file_name,label,fold"]
    for fold in (1, 2, 3):
        for label, pitch in (("low", 200), ("high", 2000)):
            for index in range(3):
                name = f"{fold}-{label}-{index}.wav"
                write_tone(folder / name, pitch * (1 + (3 * fold + index) / 20))
                lines.append(f"{name},{label},{fold}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def clips(size=18, folds=3):
    """Data that no file is needed for."""
    generator = torch.Generator().manual_seed(0)
    names = [str(index % folds + 1) for index in range(size)]
    labels = torch.arange(size) // folds % 2
    return Data(torch.randn(size, 64, 128, generator=generator), labels, names, ["high", "low"], "made up")


def made_up(method, fold="1", rate=0.01, seed=0, test=0.5, validation=0.5, loss=1.0, options=None, **other):
    """A record as the tables read it."""
    epochs = {
        "seconds": [2.0, 2.0],
        "loss": [1.0, 0.5],
        "validation_loss": [1.0, loss],
        "validation_accuracy": [0.2, validation],
    }
    settings = {"method": method, "options": options or {}, "fold": fold, "rate": rate, "seed": seed, "epochs": 2}
    common = {
        "model": "m", "model_parameters": 1000, "data": "d", "clips": 9, "classes": 2, "folds": ["1", "2", "3"],
        "batch_size": 4, "budget": 80, "rates": [0.01], "optimizer": "AdamW", "betas": [0.9, 0.98], "eps": 1e-6,
        "weight_decay": 0.1, "schedule": "cosine", "augmentation": "none", "precision": "float32",
    }  # fmt: skip
    where = {"device": "a processor", "threads": 1, "cores": 2, "torch": "2", "transformers": "5", "peft": "0"}
    return {
        "settings": common | settings,
        "environment": where | {"processes": 2},
        "parameters": 78,
        "head_parameters": 10,
        "r": 3,
        "epochs": epochs,
        "test_accuracy": test,
        "step_seconds": 0.1,
        "forward_1_seconds": 0.01,
        "memory_bytes": 2**20,
        "run_seconds": 5.0,
        **other,
    }


def experts_of(idle):
    """What a record holds of the experts of one block."""
    block = {"experts": 7, "effective_number": 6.0, "normalized_entropy": 0.9, "class_information": 0.1}
    return [block | {"idle_experts": idle}]
