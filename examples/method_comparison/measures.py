"""What is measured of a model that trains: times, memory, and how experts are used."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_softmoa.inspection import expert_report

from ..benchmark.measure import memory_of, synchronize
from .models import Apart

PRECISIONS = ("float32", "bfloat16")


def autocast(protocol: dict[str, Any]) -> torch.autocast:
    """A context in which a model computes with a study's precision, on its device."""
    precision = getattr(torch, protocol["precision"])
    return torch.autocast(protocol.get("device", "cpu"), precision, enabled=precision != torch.float32)


def costs(model: nn.Module, inputs: Tensor, targets: Tensor, times: int = 10) -> dict[str, float]:
    """The median seconds of a forward pass of one clip, and the bytes that autograd keeps of a batch, on any device."""
    device, seconds = next(model.parameters()).device, []
    inputs, targets = inputs.to(device), targets.to(device)
    model.eval()
    with torch.inference_mode():
        for _ in range(times):
            began = now(device.type)
            model(inputs[:1], labels=targets[:1])
            seconds.append(now(device.type) - began)
    model.train()
    kept = memory_of(lambda: model(inputs, labels=targets).loss, lambda: None, model, "cpu")
    return {"forward_1_seconds": statistics.median(seconds), "memory_bytes": kept}


def use_of_experts(model: nn.Module, inputs: Tensor) -> dict[str, list[float]]:
    """How the mixtures use their experts on some clips, with one number for each block.

    Args:
        model (nn.Module): the model.
        inputs (Tensor): `(clips, ...)`.

    Returns:
        dict[str, list[float]]: `largest_load`, `effective_experts` (e to the power of the load's entropy), and of what
        the mean slot reads `tokens_read` (the same of its weights), and `tokens`, the number of all.
    """
    inner = model.model if isinstance(model, Apart) else model
    name = inner.main_input_name
    batch = {name: inputs}
    if inner.can_generate():  # a recogniser's decoder needs to read something
        batch["decoder_input_ids"] = torch.full((len(inputs), 1), inner.config.decoder_start_token_id)
    if isinstance(model, Apart):
        batch[name] = inputs.flatten(0, 1)
    blocks = expert_report(inner, [batch], show_progress=False).blocks
    found = {
        "largest_load": [block.load.max().item() for block in blocks],
        "effective_experts": [block.scalars["effective_number"] for block in blocks],
        "tokens_read": [block.effective_tokens.mean().item() for block in blocks],
        "tokens": [float(block.num_tokens) for block in blocks],
    }
    return {name: [round(value, 4) for value in values] for name, values in found.items()}


def now(device: str) -> float:
    """Seconds: of this process's time on the CPU, or by the clock once another device has done what it was told to."""
    synchronize(device)
    return time.process_time() if device == "cpu" else time.perf_counter()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread, on which sums have one order and processor time is the time that it takes.

    Numbers too small for a normal float are zero here: in attention that is all but saturated, as with too high a
    learning rate, they would more than double the time of a step.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
