#!/usr/bin/env python
"""Measure what training and running Soft-MoA costs, beside other ways of fine-tuning the same frozen model.

    python examples/benchmark/run.py --quick
    python examples/benchmark/run.py --device cuda

Prints tables, and writes them into the output folder, with pictures of the sweeps and a JSON file with every time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from literal import LITERAL
from measure import count_flops, environment, import_seconds, in_turn, keep_memory, memory_of
from methods import BUDGET, FLOOR, METHODS, MODELS, PROBE, make_batch
from report import draw_sweeps, tables
from torch import Tensor, nn
from transformers import ASTConfig, ASTModel

from peft_softmoa import SoftMoAConfig
from peft_softmoa.mixture import add_mixture, build_mixture

# The layer alone: AST-base's width, and a batch of 8 clips of 500 frames.
WIDTH, BATCH, TOKENS = 768, 8, 590
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Compared in every setting; the others, and larger batches of forward passes, in the first one, float32 and eager.
EVERYWHERE = (PROBE, FLOOR, "LoRA", "Soft-MoA")


def measure_models(
    model_name: str, methods: list[str], sizes: list[int], setting: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train one model in all ways, and run it.

    Args:
        model_name (str): one of MODELS.
        methods (list[str]): names from METHODS.
        sizes (list[int]): batch sizes of forward passes.
        setting (dict): `dtype`, of autocast, and `compiled`.
        arguments (Namespace): of the command line.

    Returns:
        dict[str, Any]: the setting and one row for each method.
    """
    device = arguments.device
    batches = {size: make_batch(model_name, size, device) for size in (*sizes, arguments.batch_size)}
    autocast = torch.autocast(device, torch.bfloat16) if setting["dtype"] == "bfloat16" else nullcontext()
    rows, models, steps = {}, {}, {}
    forwards: dict[int, dict[str, Callable[[], None]]] = {size: {} for size in sizes}
    for method in methods:
        torch.manual_seed(0)
        base = MODELS[model_name][0](arguments.layers).to(device)
        model = models[method] = METHODS[method](base).train()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # The floor's only parameter is not there to be trained.
        optimizer = torch.optim.AdamW(trainable, lr=1e-6) if method != FLOOR else None
        run = model
        if setting["compiled"]:
            # transformers installs hooks in the first call, under a lock that does not compile.
            model(**make_batch(model_name, 1, device))
            run = torch.compile(model, fullgraph=True, dynamic=False)

        def loss(run: nn.Module = run) -> Tensor:
            with autocast:
                return run(**batches[arguments.batch_size]).loss

        def step(loss: Callable[[], Tensor] = loss, model: nn.Module = model, optimizer: Any = optimizer) -> None:
            loss().backward()
            if optimizer is not None:
                optimizer.step()
            model.zero_grad()

        def forward(size: int, run: nn.Module = run) -> None:
            with torch.inference_mode(), autocast:
                run(batches[size]["input_values"])

        row = rows[method] = {"method": method, "trainable_parameters": sum(each.numel() for each in trainable)}
        if not setting["compiled"]:
            row["memory_bytes"] = memory_of(loss, model, device)
            model.zero_grad()
            row["step_flops"] = count_flops(step)
        steps[method] = step
        for size in forwards:
            forwards[size][method] = partial(forward, size)
    for method, seconds in in_turn(steps, arguments.rounds, device, note).items():
        rows[method]["step_seconds"] = seconds
    for model in models.values():
        model.eval()
    for size, functions in forwards.items():
        for method, seconds in in_turn(functions, arguments.rounds, device, note).items():
            rows[method][f"forward_{size}_seconds"] = seconds
    return {
        "model": model_name,
        "layers": arguments.layers,
        **setting,
        "batch_size": arguments.batch_size,
        "memory": "allocator's peak" if device == "cuda" else "kept by autograd",
        "rows": list(rows.values()),
    }


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


def measure_layer(point: dict[str, int], dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward pass of one mixture and the sum with its block's output, without the block.

    Args:
        point (dict): N, P, R, batch size and tokens.
        dtype (str): of the tokens and of the block's output; the adapter is in float32.
        arguments (Namespace): of the command line.

    Returns:
        list[dict[str, Any]]: one row for each routing and form.
    """
    shape = (point["batch_size"], point["num_tokens"], WIDTH)
    rows, functions = [], {}
    for routing, literally in itertools.product(("soft", "dense"), (False, True)):
        if routing == "dense" and (
            point["num_slots"] > 1 or (literally and point["num_experts"] * shape[0] * shape[1] > 16 * BATCH * TOKENS)
        ):
            continue  # it has no slots; and its tensor (B, T, D, N) would be gigabytes
        torch.manual_seed(0)
        options = {"routing": routing, "num_experts": point["num_experts"], "r": point["r"], "init_weights": False}
        if routing == "soft":
            options["num_slots"] = point["num_slots"]
        router, experts = build_mixture(SoftMoAConfig(**options), WIDTH, WIDTH)
        parts = nn.ModuleList([LITERAL[routing](router, experts)] if literally else [router, experts])
        parts.to(arguments.device)
        tokens = torch.randn(shape, dtype=DTYPES[dtype], device=arguments.device, requires_grad=True)

        def run(parts: nn.ModuleList = parts, tokens: Tensor = tokens, literally: bool = literally) -> Tensor:
            if literally:
                return tokens + parts[0](tokens.to(torch.float32)).to(tokens.dtype)
            return add_mixture(tokens, tokens, *parts)[0]

        def both(parts: nn.ModuleList = parts, tokens: Tensor = tokens, run: Callable[[], Tensor] = run) -> None:
            tokens.grad = None
            parts.zero_grad()
            run().backward(tokens.detach())

        name = f"{'Soft' if routing == 'soft' else 'Dense'}-MoA{', literal' if literally else ''}"
        functions[name] = both
        rows.append(
            {
                "method": name,
                **point,
                "dtype": dtype,
                "memory_bytes": memory_of(lambda run=run: run().sum(), parts, arguments.device),
            }
        )
    for row, seconds in zip(
        rows, in_turn(functions, arguments.layer_rounds, arguments.device, note).values(), strict=True
    ):
        row["seconds"] = seconds
    return rows


def note(name: str) -> None:
    """Show what runs, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\033[K{name}", end="\r", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only AST's main rows, with half the batch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of the CPU; as many as torch takes, if it is not given")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--batch_size", type=int, help="of a training step; 8, or 4 with --quick")
    parser.add_argument(
        "--forward_batch_sizes", type=int, nargs="+", help="of forward passes; 1 and 16, or 4 with --quick"
    )
    parser.add_argument("--layers", type=int, default=12, help="of each model")
    parser.add_argument("--rounds", type=int, help="how often each model is timed; 3, or 2 with --quick")
    parser.add_argument("--layer_rounds", type=int, help="how often each layer is timed; 9, or 5 with --quick")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-results"))
    arguments = parser.parse_args(argv)
    defaults = {"batch_size": (8, 4), "forward_batch_sizes": ([1, 16], [4]), "rounds": (3, 2), "layer_rounds": (9, 5)}
    for name, values in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, values[arguments.quick])
    # The methods are different graphs of the same code, each for some sizes.
    torch._dynamo.config.recompile_limit = 64
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    results: dict[str, Any] = {"environment": environment(arguments.device), "models": [], "layer": {}}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    stem = re.sub(
        r"[^a-z0-9]+", "-", f"{results['environment']['device']} {results['environment']['threads']} threads".lower()
    )
    path = arguments.output_dir / f"{stem}{'-quick' if arguments.quick else ''}.json"

    def save() -> None:
        # After every part: a run takes long, and what is done should outlive what breaks it.
        path.write_text(json.dumps(results, indent=1) + "\n")

    for dtype in arguments.dtypes[: 1 if arguments.quick else None]:
        for name, points in sweeps(arguments.quick).items():
            results["layer"].setdefault(name, []).extend(
                row for point in points for row in measure_layer(point, dtype, arguments)
            )
            save()
    settings = [
        {"dtype": dtype, "compiled": mode == "compiled"} for mode in arguments.modes for dtype in arguments.dtypes
    ]
    for model_name in arguments.models[: 1 if arguments.quick else None]:
        for index, setting in enumerate(settings[: 1 if arguments.quick else None]):
            methods = EVERYWHERE if index or arguments.quick else METHODS
            sizes = arguments.forward_batch_sizes[: 1 if index else None]
            torch.compiler.reset()
            results["models"].append(measure_models(model_name, list(methods), sizes, setting, arguments))
            save()
    if not arguments.quick:
        results["import_seconds"] = import_seconds(arguments.layer_rounds)
        save()
        draw_sweeps(results, path.with_suffix(""))
        path.with_suffix(".md").write_text(tables(results))
    print(tables(results))
    print(f"Every single time is in {path}.")


if __name__ == "__main__":
    keep_memory()
    main()
