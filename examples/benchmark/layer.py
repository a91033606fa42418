"""The layer alone, without a model: one mixture in several forms, at many sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ASTConfig, ASTModel

from peft_softmoa import SoftMoAConfig
from peft_softmoa.method import Mixture
from peft_softmoa.method.routing import soft_routing

from .literal import LITERAL
from .measure import in_turn, memory_of, note
from .methods import BUDGET

# AST-base's width, and a batch of 8 clips of 500 frames.
WIDTH, BATCH, TOKENS = 768, 8, 590
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def sweeps(quick: bool) -> dict[str, list[dict[str, int]]]:
    """What the layer alone is measured at: the values of N, P, R, batch size and tokens, by the name of the sweep."""
    default = {"num_experts": 7, "num_slots": 1, "r": 6, "batch_size": BATCH, "num_tokens": TOKENS}
    experts = [
        default | {"num_experts": number} for number in ((4, 15, 64) if quick else (1, 2, 4, 7, 15, 32, 64, 128))
    ]
    if quick:
        return {"experts at R=6": experts}
    with torch.device("meta"):
        model = ASTModel(ASTConfig())
    budget = []
    for number in (1, 2, 4, 7, 12, 18, 24):
        config = SoftMoAConfig.for_budget(model, BUDGET, num_experts=number)
        budget.append(default | {"num_experts": number, "r": config.r})
    return {
        "experts at R=6": experts,
        f"experts at {BUDGET:,} parameters": budget,
        "slots per expert": [default | {"num_slots": number} for number in (1, 2, 4, 8)],
        "tokens": [default | {"num_tokens": number} for number in (128, 256, 512, 1024, 2048, 4096, 8192)],
        "batch size": [default | {"batch_size": number} for number in (1, 2, 4, 8, 16, 32)],
    }


def forms(point: dict[str, int], dtype: str, device: str) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """The mixture of a point in each form, and how it runs on some tokens, whose block returns them as they are.

    Args:
        point (dict): N, P, R, batch size and tokens.
        dtype (str): of the tokens and of the block's output; the adapter is in float32.
        device (str): where.

    Returns:
        dict: what holds the parameters, and the forward pass, by the name of the form.
    """
    shape = (point["batch_size"], point["num_tokens"], WIDTH)
    tokens = torch.randn(shape, dtype=DTYPES[dtype], device=device, requires_grad=True)
    built: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {}
    for routing, name in (("soft", "Soft-MoA"), ("dense", "Dense-MoA")):
        options = {"num_slots": point["num_slots"]} if routing == "soft" else {}
        if routing == "dense" and point["num_slots"] > 1:
            continue
        torch.manual_seed(0)
        config = SoftMoAConfig(
            routing=routing, num_experts=point["num_experts"], r=point["r"], init_weights=False, **options
        )
        mixture = Mixture(WIDTH, WIDTH, **config.mixture_options()).to(device)
        built[name] = mixture, partial(lambda mixture: mixture(tokens, added_to=tokens)[0], mixture)
        if routing == "soft":
            built[f"{name}, plain"] = mixture, partial(plainly, tokens, mixture.router, mixture.experts)
        # The outputs of all experts for all tokens would be gigabytes.
        if routing == "soft" or point["num_experts"] * shape[0] * shape[1] <= 16 * BATCH * TOKENS:
            literal = LITERAL[routing](mixture.router, mixture.experts).to(device)
            built[f"{name}, literal"] = (
                literal,
                partial(lambda literal: tokens + literal(tokens.to(torch.float32)).to(tokens.dtype), literal),
            )
    return {name: (parts, partial(_zeroed, tokens, run)) for name, (parts, run) in built.items()}


def _zeroed(tokens: Tensor, run: Callable[[], Tensor]) -> Tensor:
    tokens.grad = None
    return run()


def plainly(tokens: Tensor, router: nn.Module, experts: nn.Module) -> Tensor:
    """Soft-MoA with the backward pass that autograd makes of its formula."""
    dispatch, combine = soft_routing(tokens, router.phi)
    return torch.baddbmm(tokens, combine, experts(dispatch.mT @ tokens))


def measure_layer(points: list[dict[str, int]], dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward pass of one mixture and the sum with its block's output, without the block.

    Args:
        points (list[dict]): N, P, R, batch size and tokens of each.
        dtype (str): of the tokens.
        arguments (Namespace): of the command line.

    Returns:
        list[dict[str, Any]]: one row for each point and form.
    """
    rows, functions = {}, {}
    for point in points:
        for name, (parts, run) in forms(point, dtype, arguments.device).items():

            def both(parts: nn.Module = parts, run: Callable[[], Tensor] = run) -> None:
                parts.zero_grad()
                output = run()
                output.backward(output.detach())

            memory = memory_of(lambda run=run: run().sum(), both, parts, arguments.device)
            key = f"{name} {point}"
            functions[key] = both
            rows[key] = {"method": name, **point, "dtype": dtype, "memory_bytes": memory}
    for key, seconds in in_turn(functions, arguments.layer_rounds, arguments.device, note).items():
        rows[key]["seconds"] = seconds
    return list(rows.values())
