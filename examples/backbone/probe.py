"""Ask how much a frozen transformer knows of recorded sounds: a linear probe, beside the same network untrained.

    python -m examples.backbone.probe path/to/esc10

The folder has a metadata.csv with the columns file_name, label and fold. A clip's embedding is the mean of all tokens
behind the last layer norm. Logistic regression on it is trained on all folds but one, and tested on that one; how
strongly it is regularised is chosen by cross-validation within the training folds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedModel

from peft_softmoa.demo.run import BASE_MODEL
from peft_softmoa.training import decode_audio, load_rows

from ..method_comparison.intervals import interval
from .model_card import PROBE, write_card

HERE = Path(__file__).parent
DECAYS = tuple(10.0**power for power in range(-5, 2))


def load_clips(
    folder: str | Path, feature_extractor: Any, folds: Sequence[str] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode a labelled folder.

    Args:
        folder (str or Path): with a metadata.csv.
        feature_extractor: of the model.
        folds (sequence of str, optional): those to read. Default: all.

    Returns:
        tuple: input values `(clips, frames, bins)`, labels `(clips,)` and folds `(clips,)`, numbered by their names.
    """
    rows = list(load_rows(str(folder), "train", columns=["audio", "label", "fold"]))
    rows = [row for row in rows if folds is None or row["fold"] in folds]
    rate = feature_extractor.sampling_rate
    inputs = [
        feature_extractor(decode_audio(row["audio"], rate), sampling_rate=rate, return_tensors="np")["input_values"][0]
        for row in rows
    ]
    columns = (np.unique([row[name] for row in rows], return_inverse=True)[1] for name in ("label", "fold"))
    return torch.from_numpy(np.stack(inputs)), *map(torch.from_numpy, columns)


@torch.inference_mode()
def embed(model: PreTrainedModel, inputs: Tensor, batch_size: int = 32) -> Tensor:
    """The mean of all tokens of the last layer. `(clips, D)`, float64."""
    model.eval()
    parts = [model(batch).last_hidden_state.mean(1) for batch in inputs.split(batch_size)]
    return torch.cat(parts).double()


def fit(embeddings: Tensor, labels: Tensor, train: Tensor, decay: Tensor, steps: int = 200) -> Tensor:
    """Train several logistic regressions at once, each on standardised embeddings.

    Args:
        embeddings (Tensor): `(clips, D)`, float64.
        labels (Tensor): `(clips,)`.
        train (Tensor): `(problems, clips)` bool, which clips each is trained on.
        decay (Tensor): `(problems,)`, the weight of the squared weights beside the mean loss.
        steps (int): of L-BFGS, at most. Default: 200.

    Returns:
        Tensor: `(problems, clips)`, the classes that they predict.
    """
    share = train.double() / train.sum(1, keepdim=True)
    mean = share @ embeddings
    deviation = (share @ embeddings**2 - mean**2).clamp(min=1e-12).sqrt()
    inputs = (embeddings - mean[:, None]) / deviation[:, None]
    classes = int(labels.max()) + 1
    weight = torch.zeros(len(train), embeddings.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(train), 1, classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")
    target = labels.expand(len(train), -1)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ weight + bias
        losses = torch.nn.functional.cross_entropy(logits.mT, target, reduction="none")
        # The problems do not touch each other, so their sum has its minimum where each has its own.
        total = (losses * share).sum() + (decay * weight.square().sum((1, 2))).sum()
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        return (inputs @ weight + bias).argmax(2)


def cross_validate(embeddings: Tensor, labels: Tensor, folds: Tensor) -> list[float]:
    """Accuracy on each fold of the probe that is trained on the others.

    Args:
        embeddings (Tensor): `(clips, D)`, float64.
        labels (Tensor): `(clips,)`.
        folds (Tensor): `(clips,)`, from 0.
    """
    decays = torch.tensor(DECAYS, dtype=torch.float64)
    accuracies = []
    for test in folds.unique():
        inner = [fold for fold in folds.unique() if fold != test]
        train = torch.stack([(folds != test) & (folds != fold) for fold in inner]).repeat_interleave(len(decays), 0)
        right = fit(embeddings, labels, train, decays.repeat(len(inner))) == labels
        held_out = torch.stack([folds == fold for fold in inner]).repeat_interleave(len(decays), 0)
        scores = (right & held_out).sum(1).view(len(inner), len(decays)).sum(0)
        best = decays[len(scores) - 1 - scores.flip(0).argmax()]  # among equals the strongest
        predicted = fit(embeddings, labels, (folds != test)[None], best[None])[0]
        accuracies.append((predicted == labels)[folds == test].double().mean().item())
    return accuracies


def untrained(folder: str | Path, seed: int) -> PreTrainedModel:
    """The network of a checkpoint with random weights."""
    torch.manual_seed(seed)
    return AutoModel.from_config(AutoConfig.from_pretrained(folder))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m examples.backbone.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="with a metadata.csv, such as ESC-10's")
    parser.add_argument("--model", default=str(BASE_MODEL))
    parser.add_argument("--untrained_seeds", type=int, default=5)
    arguments = parser.parse_args(argv)

    inputs, labels, folds = load_clips(arguments.folder, AutoFeatureExtractor.from_pretrained(arguments.model))
    count = len(folds.unique())
    if count < 3:
        raise ValueError(f"The folder has {count} folds; testing, and choosing within the others, take three.")
    pretrained = cross_validate(embed(AutoModel.from_pretrained(arguments.model), inputs), labels, folds)
    seeds = [
        cross_validate(embed(untrained(arguments.model, seed), inputs), labels, folds)
        for seed in range(arguments.untrained_seeds)
    ]
    random = np.mean(seeds, 0)
    spectrogram = cross_validate(torch.cat([inputs.mean(1), inputs.std(1)], 1).double(), labels, folds)
    scores = {
        "this network": pretrained,
        f"the same network untrained, mean of {len(seeds)} seeds": random.tolist(),
        "this network minus untrained": (np.array(pretrained) - random).tolist(),
        "no network: mean and standard deviation over time of each mel bin": spectrogram,
        "this network minus no network": (np.array(pretrained) - spectrogram).tolist(),
    }
    result = {
        "data": Path(arguments.folder).resolve().name,
        "clips": len(labels),
        "classes": int(labels.max()) + 1,
        "untrained_seeds": [float(np.mean(each)) for each in seeds],
        "scores": {
            name: {"mean": each.mean, "low": each.low, "high": each.high, "folds": scores[name]}
            for name, each in ((name, interval(folds, overlap=1 / (count - 1))) for name, folds in scores.items())
        },
    }
    for name, each in result["scores"].items():
        print(f"{name}: {each['mean']:.1%} ({each['low']:.1%} to {each['high']:.1%})")
    (Path(arguments.model) / PROBE).write_text(json.dumps(result, indent=2) + "\n", newline="\n")
    write_card(arguments.model)
    return result


if __name__ == "__main__":
    main()
