"""Times of all methods of a study in turn, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..benchmark.measure import environment, in_turn, note
from ..benchmark.report import markdown, times
from .data import Data
from .measures import autocast, now, one_thread
from .models import TASKS
from .studies import label
from .training import Run, channels_of, make_optimizer, prepare

TIMES = "times.json"


def measure(runs: list[Run], protocol: dict[str, Any], data: Data, rounds: int, folder: Path) -> None:
    """Time a training step and a forward pass of one clip of each method, round by round, and write times.json.

    Args:
        runs (list[Run]): whose methods and options are timed, each once.
        protocol (dict): what all runs have in common.
        data (Data): all clips.
        rounds (int): how often.
        folder (Path): where to.
    """
    device = protocol.get("device", "cpu")
    variants = {(run.method, run.options): run for run in runs}
    steps, forwards, parameters = {}, {}, {}
    with one_thread(), torch.random.fork_rng(devices=[]):
        for (method, options), run in variants.items():
            task = TASKS[protocol["task"]](protocol["model_path"], data.label_names, protocol["seconds"])
            model = prepare(run, protocol, task).to(device)
            clips = torch.arange(protocol["batch_size"]) % len(data.labels)
            inputs = channels_of(data.inputs, dict(options).get("channels"))[clips].to(device)
            targets = task.targets(data.labels[clips]).to(device)
            # A rate of zero: the model that is timed stays the same, and what it computes finite.
            optimizer = make_optimizer(model, 0.0)

            def step(
                model: Any = model, inputs: Any = inputs, targets: Any = targets, optimizer: Any = optimizer
            ) -> None:
                model.train()
                with autocast(protocol):
                    loss = model(inputs, labels=targets).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            @torch.inference_mode()
            def forward(model: Any = model, inputs: Any = inputs, targets: Any = targets) -> None:
                model.eval()
                with autocast(protocol):
                    model(inputs[:1], labels=targets[:1])

            name = json.dumps([method, dict(options)])
            steps[name], forwards[name] = step, forward
            parameters[name] = sum(each.numel() for each in model.parameters() if each.requires_grad)
        step_seconds, forward_seconds = (
            in_turn(each, rounds, device, note, clock=lambda: now(device)) for each in (steps, forwards)
        )
        found = {
            "environment": environment(device),
            "batch_size": protocol["batch_size"],
            "methods": [
                {
                    "method": json.loads(name)[0],
                    "options": json.loads(name)[1],
                    "trained": parameters[name],
                    "step_seconds": step_seconds[name],
                    "forward_1_seconds": forward_seconds[name],
                }
                for name in steps
            ],
        }
    (folder / TIMES).write_text(json.dumps(found, indent=1) + "\n", newline="\n")


def timing_table(found: dict[str, Any]) -> str:
    """What `measure` wrote, as a table."""
    table = [["method", "trained", f"step of {found['batch_size']}, ms", "forward of 1, ms"]]
    for each in found["methods"]:
        row = [label(each["method"], each["options"]), f"{each['trained']:,}"]
        table.append([*row, times(each["step_seconds"]), times(each["forward_1_seconds"])])
    return markdown(table)
