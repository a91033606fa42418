"""Routing in order of time: what it costs for whole clips, and for streams of tokens."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_softmoa import SoftMoAConfig
from peft_softmoa.method import Mixture
from peft_softmoa.method.past import Past

from .layer import WIDTH
from .measure import in_turn, memory_of, note

# Values of N and R.
SIZES = ((7, 6), (64, 1))
LENGTHS = (128, 512, 2048, 8192, 32_768)
# Tokens of the batches, of several clips if these are shorter.
BATCH_TOKENS = 4096
FORMS: dict[str, dict[str, Any]] = {
    "Dense-MoA": {"routing": "dense"},
    "Soft-MoA": {"routing": "soft"},
    "causal Soft-MoA": {"routing": "soft", "causal": True},
}
# Convolutions of slots keep nothing; those of tokens keep what their kernels reach back to.
STREAMED: dict[str, dict[str, Any]] = {
    "causal Soft-MoA, forgetting": {"routing": "soft", "causal": True, "forgetting": True},
    "Dense-MoA, causal convolutions": {"routing": "dense", "causal": True, "expert_type": "convolution"},
}
# How many tokens of a stream come before those that are timed, and how many these are.
POSITIONS = (100, 1000, 10_000, 100_000)
TIMED = 20


def make_mixture(device: str, **options: Any) -> Mixture:
    """A mixture of AST-base's width.

    Args:
        device (str): where.
        **options: of `SoftMoAConfig`.

    Returns:
        Mixture: with weights that are drawn.
    """
    torch.manual_seed(0)
    config = SoftMoAConfig(init_weights=False, **options)
    return Mixture(WIDTH, WIDTH, **config.mixture_options(), causal=bool(config.causal)).to(device)


def measure_order(lengths: tuple[int, ...], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward pass of mixtures alone, with and without order in time.

    Args:
        lengths (tuple[int, ...]): numbers of tokens.
        arguments (Namespace): of the command line.

    Returns:
        list[dict[str, Any]]: one row for each size, length and form.
    """
    rows, device = [], arguments.device
    for num_experts, r in SIZES:
        for num_tokens in lengths:
            batch_size = max(1, BATCH_TOKENS // num_tokens)
            tokens = torch.randn(batch_size, num_tokens, WIDTH, device=device, requires_grad=True)
            functions: dict[str, Callable[[], None]] = {}
            here = {}
            for name, options in FORMS.items():
                mixture = make_mixture(device, num_experts=num_experts, r=r, **options)

                def run(mixture: Mixture = mixture, tokens: Tensor = tokens) -> Tensor:
                    return mixture(tokens, added_to=tokens)[0]

                def both(mixture: Mixture = mixture, tokens: Tensor = tokens, run: Callable[[], Tensor] = run) -> None:
                    mixture.zero_grad()
                    tokens.grad = None
                    output = run()
                    output.backward(output.detach())

                memory = memory_of(lambda run=run: run().sum(), both, mixture, device)
                functions[name] = both
                here[name] = {"method": name, "num_experts": num_experts, "r": r, "memory_bytes": memory}
                here[name] |= {"batch_size": batch_size, "num_tokens": num_tokens}
            for name, seconds in in_turn(functions, arguments.layer_rounds, device, note, _clock(device)).items():
                rows.append({**here[name], "seconds": seconds})
    return rows


def measure_stream(positions: tuple[int, ...], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One token of a stream after another, far from its beginning and near to it.

    Args:
        positions (tuple[int, ...]): how many tokens come before.
        arguments (Namespace): of the command line.

    Returns:
        list[dict[str, Any]]: one row for each mixture: the numbers of its state, and the seconds of a token, by
        position.
    """
    rows, device = [], arguments.device
    for num_experts, r in SIZES:
        for name, options in STREAMED.items():
            mixture = make_mixture(device, num_experts=num_experts, r=r, **options).eval()
            past, functions = Past(), {}
            for position in sorted(positions):
                while past.num_tokens < position:
                    length = min(1000, position - past.num_tokens)
                    _feed(mixture, torch.randn(1, length, WIDTH, device=device), past)
                functions[str(position)] = partial(_feed_singly, mixture, past.copy())
            seconds = in_turn(functions, arguments.layer_rounds, device, note, _clock(device))
            numbers = sum(tensor.numel() for tensor in past.tensors.values())
            row = {"method": name, "num_experts": num_experts, "r": r, "state_numbers": numbers}
            rows.append({**row, "seconds": {key: [each / TIMED for each in all_] for key, all_ in seconds.items()}})
    return rows


def _clock(device: str) -> Callable[[], float]:
    """Where others use the processor, too, its time says more than that of the clock on the wall."""
    return time.process_time if device == "cpu" else time.perf_counter


def _feed(mixture: Mixture, tokens: Tensor, past: Past) -> None:
    with torch.inference_mode():
        mixture(tokens, added_to=tokens, past=past)


def _feed_singly(mixture: Mixture, past: Past) -> None:
    past = past.copy()  # each round begins at the same position
    token = torch.ones(1, 1, WIDTH, device=mixture.experts.up_weight.device)
    for _ in range(TIMED):
        _feed(mixture, token, past)
