"""Measure what training and running Soft-MoA costs, beside other ways of fine-tuning the same frozen model.

    python -m examples.benchmark --quick
    python -m examples.benchmark --device cuda

Prints tables, and writes every single time into a JSON file in the output folder; without --quick the tables and
pictures of the sweeps, too.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import Tensor, nn
from transformers import ASTFeatureExtractor

from peft_softmoa import SoftMoAConfig
from peft_softmoa.inspection import record_routing
from peft_softmoa.inspection.blocks import Statistics
from peft_softmoa.inspection.callback import utilization
from peft_softmoa.training import AudioStream, DatasetSummary, ExtractFeatures, load_rows, make_loader
from peft_softmoa.training.tasks import SingleLabel

from .audio import measure_epochs, measure_formats
from .layer import DTYPES, measure_layer, sweeps
from .measure import count_flops, environment, import_seconds, in_turn, memory_of, note
from .methods import FIXED_LENGTHS, FLOOR, METHODS, MODELS, PROBE, SMALL_AST, make_batch, make_small_ast
from .report import draw_sweeps, tables
from .streaming import LENGTHS, POSITIONS, measure_order, measure_stream

PARTS = [
    *("layer", "models", "deployment", "mixed batches", "input", "audio", "epochs", "recording", "lengths", "import"),
    "order in time",
]
# Compared in every setting; the others, and larger batches of forward passes, in the first one, float32 and eager.
EVERYWHERE = (PROBE, FLOOR, "LoRA", "Soft-MoA")


def measure_models(
    model_name: str,
    methods: list[str],
    sizes: list[int],
    rounds: int,
    setting: dict[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Train one model in all ways, and run it.

    Args:
        model_name (str): one of MODELS.
        methods (list[str]): names from METHODS.
        sizes (list[int]): batch sizes of forward passes.
        rounds (int): how often each is timed.
        setting (dict): `dtype`, of autocast, and `compiled`.
        arguments (Namespace): of the command line.

    Returns:
        dict[str, Any]: the setting and one row for each method.
    """
    device = arguments.device
    batches = {size: make_batch(model_name, size, device) for size in (1, *sizes, arguments.batch_size)}
    autocast = torch.autocast(device, torch.bfloat16) if setting["dtype"] == "bfloat16" else nullcontext()
    rows: dict[str, dict[str, Any]] = {}
    models, steps = {}, {}
    forwards: dict[int, dict[str, Callable[[], None]]] = {size: {} for size in sizes}
    for method in methods:
        torch.manual_seed(0)
        base = MODELS[model_name][0](arguments.layers).to(device)
        model = models[method] = METHODS[method](base).to(device).train()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # The floor's only parameter is not there to be trained.
        optimizer = torch.optim.AdamW(trainable, lr=1e-6) if method != FLOOR else None
        run = model
        if setting["compiled"]:
            # transformers installs hooks in the first call, under a lock that does not compile.
            model(**batches[1])
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
            row["memory_bytes"] = memory_of(loss, step, model, device)
            row["flops"] = count_flops(lambda model=model: model(**batches[1]).loss.backward())
            model.zero_grad()
        steps[method] = step
        for size in forwards:
            forwards[size][method] = partial(forward, size)
    for method, seconds in in_turn(steps, rounds, device, note).items():
        rows[method]["step_seconds"] = seconds
    for model in models.values():
        model.eval()
    for size, functions in forwards.items():
        for method, seconds in in_turn(functions, rounds, device, note).items():
            rows[method][f"forward_{size}_seconds"] = seconds
    return {
        "model": model_name,
        "layers": arguments.layers,
        **setting,
        "batch_size": arguments.batch_size,
        "memory": "allocator's peak" if device == "cuda" else "kept by autograd",
        "rows": list(rows.values()),
    }


def measure_deployment(rounds: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the first model without and with Soft-MoA, in PyTorch, compiled and, on a CPU, in ONNX Runtime.

    Args:
        rounds (int): how often each is timed.
        arguments (Namespace): of the command line.

    Returns:
        list[dict[str, Any]]: one row for each runtime and model.
    """
    name, device = next(iter(MODELS)), arguments.device
    batches = {size: make_batch(name, size, device)["input_values"] for size in arguments.forward_batch_sizes}
    rows = []
    functions: dict[int, dict[str, Callable[[], Any]]] = {size: {} for size in batches}
    for method in (PROBE, "Soft-MoA"):
        torch.manual_seed(0)
        model = METHODS[method](MODELS[name][0](arguments.layers)).to(device).eval()
        with torch.no_grad():
            model(batches[min(batches)])  # transformers installs hooks in the first call
        runtimes = {"PyTorch": model, "compiled": torch.compile(model, fullgraph=True, dynamic=False)}
        if device == "cpu":
            runtimes["ONNX Runtime"] = in_onnx_runtime(model, batches[min(batches)])
        for runtime, run in runtimes.items():
            rows.append({"runtime": runtime, "method": method})
            for size, values in batches.items():
                functions[size][f"{runtime}, {method}"] = partial(_forward, run, values)
    for size, each in functions.items():
        for row, seconds in zip(rows, in_turn(each, rounds, device, note).values(), strict=True):
            row[f"forward_{size}_seconds"] = seconds
    return rows


def _forward(run: Callable[[Tensor], Any], values: Tensor) -> None:
    with torch.inference_mode():
        run(values)


def measure_mixed_batches(rounds: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run 16 samples with three adapters and the base model: in one mixed batch, and in the ways without it.

    Args:
        rounds (int): how often each is timed.
        arguments (Namespace): of the command line.

    Returns:
        list[dict[str, Any]]: one row for each model, with the seconds of each way and the greatest difference between
        its logits and the mixed batch's.
    """
    name = next(iter(MODELS))
    rows = []
    for label, make, layers, times in (
        (f"{name}, {arguments.layers} layers", MODELS[name][0], arguments.layers, 1),
        (SMALL_AST, make_small_ast, 2, 5),
    ):
        torch.manual_seed(0)
        model: Any = get_peft_model(make(layers), SoftMoAConfig(init_weights=False), "first")
        model.add_adapter("second", SoftMoAConfig(init_weights=False, num_experts=15, r=2))
        model.add_adapter("third", SoftMoAConfig(init_weights=False, routing="dense"))
        model = model.to(arguments.device).eval()
        adapters = ["first", "second", "__base__", "third"] * 4
        shape = (model.config.max_length, model.config.num_mel_bins)
        values = torch.randn(len(adapters), *shape, device=arguments.device)

        def alone(values: Tensor, adapter: str, model: Any = model) -> Tensor:
            with torch.inference_mode():
                if adapter == "__base__":
                    with model.disable_adapter():
                        return model(values).logits
                model.set_adapter(adapter)
                return model(values).logits

        def mixed(model: Any = model, values: Tensor = values, adapters: list[str] = adapters) -> Tensor:
            with torch.inference_mode():
                return model(values, adapter_names=adapters).logits

        def one_by_one(values: Tensor = values, adapters: list[str] = adapters, alone: Any = alone) -> Tensor:
            return torch.cat([alone(values[index : index + 1], adapter) for index, adapter in enumerate(adapters)])

        def batch_for_each(values: Tensor = values, adapters: list[str] = adapters, alone: Any = alone) -> Tensor:
            outputs = {adapter: alone(values, adapter) for adapter in dict.fromkeys(adapters)}
            return torch.stack([outputs[adapter][index] for index, adapter in enumerate(adapters)])

        ways = {"mixed batch": mixed, "one by one": one_by_one, "all samples with each": batch_for_each}
        expected = mixed()
        difference = {way: float((run() - expected).abs().max()) for way, run in ways.items()}
        ways["base model alone"] = partial(alone, values, "__base__")
        seconds = in_turn(ways, times * rounds, arguments.device, note)
        rows.append({"model": label, "seconds": seconds, "difference": difference})
    return rows


def measure_input(rounds: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Read, decode and extract features from 64 clips of 5 s with several numbers of workers, beside a training step.

    Args:
        rounds (int): how often each is timed.
        arguments (Namespace): of the command line.

    Returns:
        list[dict[str, Any]]: one row for each number of workers, and one for the step: seconds and samples.
    """
    name, device = next(iter(MODELS)), arguments.device
    number, size = 64, arguments.batch_size
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        lines = ["file_name,label"]
        for index in range(number):
            noise = 0.1 * generator.standard_normal(5 * 44_100).astype("f4")
            soundfile.write(f"{folder}/{index}.wav", noise, 44_100)
            lines.append(f"{index}.wav,noise")
        Path(folder, "metadata.csv").write_text("\n".join(lines))
        rows = load_rows(folder, "train")
        extract = ExtractFeatures(ASTFeatureExtractor(max_length=500), SingleLabel(["noise"]))
        stream = AudioStream(rows, extract, DatasetSummary(number, ("noise",), (number,)))
        functions: dict[str, Callable[[], Any]] = {}
        samples = {}
        for workers in (0, 1, 2):
            loader = make_loader(stream, size, Accelerator(cpu=device == "cpu"), num_workers=workers)
            functions[f"input, {workers} workers"] = partial(list, loader)
            samples[f"input, {workers} workers"] = number
        batch = make_batch(name, size, device)
        model = METHODS["Soft-MoA"](MODELS[name][0](arguments.layers)).to(device).train()
        functions[f"training step of {size}"] = lambda: model(**batch).loss.backward()
        samples[f"training step of {size}"] = size
        seconds = in_turn(functions, rounds, device, note)
    return [{"what": what, "samples": samples[what], "seconds": each} for what, each in seconds.items()]


def measure_recording(rounds: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train as ever, and with what `ExpertUtilizationCallback` does in the steps that it logs.

    Args:
        rounds (int): how often each is timed.
        arguments (Namespace): of the command line.

    Returns:
        list[dict[str, Any]]: one row for each method: seconds of a training step, plain and recorded.
    """
    name, device = next(iter(MODELS)), arguments.device
    batch = make_batch(name, arguments.batch_size, device)
    functions: dict[str, Callable[[], None]] = {}
    methods = ("Soft-MoA", "Dense-MoA")
    for method in methods:
        model = METHODS[method](MODELS[name][0](arguments.layers)).to(device).train()

        def step(model: nn.Module = model) -> None:
            model(**batch).loss.backward()

        def recorded(model: nn.Module = model, step: Callable[[], None] = step) -> None:
            with record_routing(model) as records:
                step()
            statistics = [Statistics() for _ in records]
            for each, record in zip(statistics, records):
                each.update(record)
            utilization([each.result(record.block, record.adapter) for each, record in zip(statistics, records)])

        functions |= {f"{method}, plain": step, f"{method}, recorded": recorded}
    seconds = in_turn(functions, rounds, device, note)
    return [
        {"method": method, **{way: seconds[f"{method}, {way}"] for way in ("plain", "recorded")}} for method in methods
    ]


def measure_lengths(rounds: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train models that read one length of clips, fitted to clips of 1 s and 5 s and at full length.

    Args:
        rounds (int): how often each is timed.
        arguments (Namespace): of the command line.

    Returns:
        list[dict[str, Any]]: one row for each model: seconds of a training step, by the seconds of the clips.
    """
    rows = []
    for name, (make, full) in FIXED_LENGTHS.items():
        functions: dict[str, Callable[[], None]] = {}
        for length in (1.0, 5.0, full):
            config = SoftMoAConfig(max_length_seconds=None if length == full else length)
            model = get_peft_model(make(arguments.layers), config).to(arguments.device).train()
            base = model.get_base_model()
            shape = (round(100 * length), base.config.num_mel_bins)
            values = torch.randn(arguments.batch_size, *shape, device=arguments.device)
            inputs = {base.main_input_name: values.mT if base.main_input_name == "input_features" else values}
            labels = torch.zeros(arguments.batch_size, dtype=torch.long, device=arguments.device)
            functions[f"{length:g}"] = lambda run=model, inputs=inputs, labels=labels: run(
                **inputs, labels=labels
            ).loss.backward()
        rows.append({"model": name, "seconds": in_turn(functions, rounds, arguments.device, note)})
    return rows


def in_onnx_runtime(model: nn.Module, values: Tensor) -> Callable[[Tensor], Any]:
    """A model in ONNX Runtime, with as many threads as torch has.

    Args:
        model (nn.Module): the model.
        values (Tensor): an input.

    Returns:
        callable: runs it.
    """
    import onnxruntime

    with torch.no_grad():
        batch_axis = {"input_values": {0: torch.export.Dim.DYNAMIC}}
        two = values[:1].repeat(2, *[1] * (values.ndim - 1))  # one would be taken for a constant
        program = torch.onnx.export(model, (two,), dynamo=True, dynamic_shapes=batch_axis, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        program.save(f"{folder}/model.onnx")
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    return lambda values: session.run(None, {given.name: values.numpy()})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only AST's main rows, with half the batch")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of the CPU; as many as torch takes, if it is not given")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="with --quick only the first two")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--batch_size", type=int, help="of a training step; 8, or 4 with --quick")
    parser.add_argument(
        "--forward_batch_sizes", type=int, nargs="+", help="of forward passes; 1 and 16, or 4 with --quick"
    )
    parser.add_argument("--layers", type=int, default=12, help="of each model")
    parser.add_argument("--rounds", type=int, help="how often the first model is timed, in float32 and eager; 5, or 2")
    parser.add_argument("--other_rounds", type=int, help="how often each other is timed; 3, or 2")
    parser.add_argument("--layer_rounds", type=int, help="how often each layer is timed; 9, or 5 with --quick")
    parser.add_argument(
        "--audio_folder", type=Path, help="clips of the part 'epochs', such as ESC-50; made ones, if none"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-results"))
    arguments = parser.parse_args(argv)
    defaults = {
        "batch_size": (8, 4),
        "forward_batch_sizes": ([1, 16], [4]),
        "rounds": (5, 2),
        "other_rounds": (3, 2),
        "layer_rounds": (9, 5),
    }
    for name, values in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, values[arguments.quick])
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

    parts = [part for part in arguments.parts if part in PARTS[: 2 if arguments.quick else None]]
    for dtype in arguments.dtypes[: 1 if arguments.quick else None] if "layer" in parts else ():
        for name, points in sweeps(arguments.quick).items():
            results["layer"].setdefault(name, []).extend(measure_layer(points, dtype, arguments))
            save()
    settings = [
        {"dtype": dtype, "compiled": mode == "compiled"} for mode in arguments.modes for dtype in arguments.dtypes
    ]
    for model_name in arguments.models[: 1 if arguments.quick else None] if "models" in parts else ():
        for index, setting in enumerate(settings[: 1 if arguments.quick else None]):
            methods = EVERYWHERE if index or arguments.quick else METHODS
            sizes = arguments.forward_batch_sizes[: 1 if index else None]
            rounds = arguments.other_rounds if results["models"] else arguments.rounds
            torch.compiler.reset()
            # The methods are different graphs of the same code, each for some sizes.
            with torch._dynamo.config.patch(recompile_limit=64):
                results["models"].append(measure_models(model_name, list(methods), sizes, rounds, setting, arguments))
            save()
    if "deployment" in parts:
        torch.compiler.reset()
        results["deployment"] = measure_deployment(arguments.rounds, arguments)
        save()
    if "mixed batches" in parts:
        results["mixed_batches"] = measure_mixed_batches(arguments.rounds, arguments)
        save()
    if "input" in parts:
        results["input"] = measure_input(arguments.rounds, arguments)
        save()
    if "audio" in parts:
        results["audio"] = measure_formats(arguments.rounds, arguments)
        save()
    if "epochs" in parts:
        results["epochs"] = measure_epochs(arguments.other_rounds, arguments)
        save()
    if "recording" in parts:
        results["recording"] = measure_recording(arguments.rounds, arguments)
        save()
    if "lengths" in parts:
        results["lengths"] = measure_lengths(arguments.rounds, arguments)
        results["lengths_batch_size"] = arguments.batch_size
        save()
    if "import" in parts:
        results["import_seconds"] = import_seconds(arguments.layer_rounds)
        save()
    if "order in time" in parts:
        results["order"] = measure_order(LENGTHS, arguments)
        save()
        results["stream"] = measure_stream(POSITIONS, arguments)
        save()
    print(tables(results))
    print(f"Every single time is in {path}.")
    if not arguments.quick:
        path.with_suffix(".md").write_text(tables(results))
        draw_sweeps(results, path.with_suffix(""))
