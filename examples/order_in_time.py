"""Show that routing in order of time learns what token-wise routing cannot, and what forgetting is for.

    python examples/order_in_time.py --output_file order-in-time.jsonl

Streams of frames are made of noise, in which now and then a marker of one of four classes sounds, for one frame. The
label of each frame is the class of the last marker. Each layer of the frozen random model reads one frame alone, so
that whatever knows of the past is the adapter's. Two comparisons, of adapters that start and train alike:

- One marker in each stream: causal soft routing beside Dense-MoA, which routes each frame by itself.
- Markers that follow one another: causal soft routing that forgets, beside the same that does not.

Prints accuracies on new streams, one for each seed, and the mean of their differences with its 95% interval. Takes
about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.method_comparison.intervals import interval
from peft_softmoa import SoftMoAConfig

CLASSES, WIDTH, UNKNOWN = 4, 16, -100
# The chance that a frame is a marker; None for one in each stream, in its first half.
TASKS = {"one marker": None, "markers that follow one another": 0.1}
ADAPTERS: dict[str, dict[str, Any]] = {
    "Dense-MoA": {"routing": "dense"},
    "causal Soft-MoA": {"routing": "soft", "causal": True},
    "causal Soft-MoA, forgetting": {"routing": "soft", "causal": True, "forgetting": True},
}
# By the name of the task: what should win, and over what.
COMPARISONS = {
    "one marker": ("causal Soft-MoA", "Dense-MoA"),
    "markers that follow one another": ("causal Soft-MoA, forgetting", "causal Soft-MoA"),
}


def make_streams(task: str, number: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Streams with the classes of their last markers.

    Args:
        task (str): one of TASKS.
        number (int): how many streams, B.
        length (int): how many frames each has, T.
        generator (Generator): draws them.

    Returns:
        tuple[Tensor, Tensor]: frames, `(B, T, D)`, and labels, `(B, T)`, UNKNOWN before the first marker.
    """
    chance = TASKS[task]
    if chance is None:
        places = torch.randint(length // 2, (number, 1), generator=generator)
        is_marker = torch.arange(length) == places
    else:
        is_marker = torch.rand(number, length, generator=generator) < chance
    classes = torch.randint(CLASSES, (number, length), generator=generator)
    sounds = F.one_hot(classes, WIDTH).float()  # the classes are the first axes
    frames = 0.3 * torch.randn(number, length, WIDTH, generator=generator) + 2 * sounds * is_marker.unsqueeze(-1)
    latest = torch.where(is_marker, torch.arange(length), -1).cummax(dim=1).values
    labels = classes.gather(1, latest.clamp_min(0)).masked_fill(latest < 0, UNKNOWN)
    return frames, labels


class FrameModel(nn.Module):
    """Layers that read each frame alone, and a head for each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits, `(B, T, classes)`, of frames, `(B, T, D)`."""
        for layer in self.layers:
            frames = frames + layer(frames).tanh()
        return self.head(frames)


def train(task: str, adapter: str, seed: int, steps: int = 200, length: int = 60) -> tuple[float, int]:
    """Train an adapter and the head, and test them on new streams.

    Args:
        task (str): one of TASKS.
        adapter (str): one of ADAPTERS.
        seed (int): of the frozen model, the adapter and the streams.
        steps (int): of training, each on 16 new streams. Default: 200.
        length (int): of the streams. Default: 60.

    Returns:
        tuple[float, int]: accuracy over all frames with a label, and number of trained parameters.
    """
    torch.manual_seed(seed)
    config = SoftMoAConfig(target_modules=["0", "1"], modules_to_save=["head"], num_experts=4, r=4, **ADAPTERS[adapter])
    model = get_peft_model(FrameModel(), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        frames, labels = make_streams(task, 16, length, generator)
        F.cross_entropy(model(frames).flatten(0, 1), labels.flatten(), ignore_index=UNKNOWN).backward()
        optimizer.step()
        optimizer.zero_grad()
    frames, labels = make_streams(task, 256, length, generator)
    with torch.no_grad():
        is_right = model.eval()(frames).argmax(dim=-1) == labels
    return float(is_right[labels != UNKNOWN].float().mean()), sum(each.numel() for each in trained)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--output_file", type=Path, help="where to add the accuracies, as lines of JSON")
    arguments = parser.parse_args(argv)
    for task in arguments.tasks:
        adapters = COMPARISONS[task]
        accuracies: dict[str, list[float]] = {adapter: [] for adapter in adapters}
        for seed in range(arguments.seeds):
            for adapter in adapters:
                accuracy, parameters = train(task, adapter, seed, arguments.steps)
                accuracies[adapter].append(accuracy)
                row = {"task": task, "adapter": adapter, "seed": seed, "steps": arguments.steps}
                row |= {"trained_parameters": parameters, "accuracy": accuracy}
                if arguments.output_file is not None:
                    with arguments.output_file.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                print(
                    f"{task}, {adapter}, seed {seed}: {accuracy:.3f} with {parameters} trained parameters", flush=True
                )
        first, second = accuracies.values()
        mean, half = interval([one - other for one, other in zip(first, second, strict=True)], 0.0)
        spread = "" if half is None else f" ± {half:.3f}"
        print(f"{task}: {adapters[0]} minus {adapters[1]}: {mean:.3f}{spread} (95% interval over the seeds)")


if __name__ == "__main__":
    main()
