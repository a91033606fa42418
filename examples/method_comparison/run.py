"""Compare Soft-MoA with other ways of fine-tuning the same pretrained transformer, by cross-validation.

    python -m examples.method_comparison --dataset path/to/esc10 --quick
    python -m examples.method_comparison --dataset path/to/esc10
    python -m examples.method_comparison --dataset path/to/esc10 --ablations
    python -m examples.method_comparison --report_only

Each fold is tested once; the fold after it chooses the learning rate, with the first seed, and all others train. Each
run becomes one line of runs.jsonl in the output folder when it ends. Interrupted comparisons resume: run the same
command again. RESULTS.md and its pictures are made from runs.jsonl alone. --ablations varies Soft-MoA, with the
learning rate that it has in the comparison.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open

from peft_softmoa.demo.run import BASE_MODEL

from . import records
from .ablations import variants
from .pictures import draw
from .records import CHOICE_SEED
from .report import write_results
from .training import DENSE, METHODS, OPTIMIZER, PROBE, SINGLE, SOFT, Data, Run, load_data, slug
from .workers import Workers, run_all

PROGRAM = "python -m examples.method_comparison"
HERE = Path(__file__).parent
RUNS, CACHE = "runs.jsonl", "cache"
BACKBONE = BASE_MODEL
# Wide enough for full fine-tuning, at its lower end, and for methods of few parameters, at its upper one.
RATES = [2e-4, 1e-3, 5e-3, 2.5e-2]
NAMES = {slug(method): method for method in METHODS}
QUICK = {"methods": [PROBE, SINGLE, DENSE, SOFT], "seeds": [CHOICE_SEED], "epochs": 3}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", help="id on the Hub, or folder with a metadata.csv; needs a column with folds")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--split", default="train", help="train")
    parser.add_argument("--audio_column", default="audio", help="audio")
    parser.add_argument("--label_column", default="label", help="label")
    parser.add_argument("--fold_column", default="fold", help="fold")
    parser.add_argument("--model", type=Path, default=BACKBONE, help="folder of an AST. Default: the one of the demo")
    parser.add_argument("--methods", nargs="+", choices=NAMES, metavar="METHOD", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--folds", nargs="+", help="the folds that are tested; all")
    parser.add_argument("--seeds", nargs="+", type=int, help="the first is 0 and chooses the rate; 0 1 2")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="the grid; 0.0002 0.001 0.005 0.025")
    parser.add_argument("--epochs", type=int, help="6")
    parser.add_argument("--batch_size", type=int, default=8, help="8")
    parser.add_argument(
        "--budget_percent",
        type=float,
        default=8.0,
        help="the most parameters that a method trains besides the head, of the model's; 8",
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, each on one thread; 2")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    parser.add_argument("--device", choices=devices, default="cpu", help="cpu, or where there is one cuda; cpu")
    parser.add_argument("--output_dir", type=Path, help="results in this package; with --quick, results/quick")
    parser.add_argument("--ablations", action="store_true", help="vary Soft-MoA, with the first seed, instead")
    parser.add_argument("--quick", action="store_true", help="one fold, one seed, four methods, three epochs")
    parser.add_argument("--report_only", action="store_true", help="only write RESULTS.md and its pictures again")
    arguments = parser.parse_args(argv)
    if arguments.dataset is None and not arguments.report_only:
        parser.error("give a --dataset, or --report_only")
    if arguments.quick and arguments.ablations:
        parser.error("--quick and --ablations exclude each other")
    given = [NAMES[name] for name in arguments.methods or ()]
    if arguments.ablations:
        if given not in ([], [SOFT]):
            parser.error(f"--ablations varies {slug(SOFT)} only: leave --methods out")
        given, arguments.seeds = [SOFT], [CHOICE_SEED]
    arguments.methods = given or (QUICK["methods"] if arguments.quick else list(METHODS))
    arguments.seeds = arguments.seeds or (QUICK["seeds"] if arguments.quick else [0, 1, 2])
    if arguments.epochs is None:
        arguments.epochs = QUICK["epochs"] if arguments.quick else 6
    if CHOICE_SEED not in arguments.seeds:
        parser.error(f"--seeds needs {CHOICE_SEED}, whose runs choose the rate")
    for name in ("epochs", "batch_size", "processes", "budget_percent"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} must be positive, got {getattr(arguments, name)}")
    if min(arguments.rates) <= 0:
        parser.error(f"--rates must be positive, got {min(arguments.rates)}")
    arguments.output_dir = arguments.output_dir or HERE / "results" / ("quick" if arguments.quick else "")
    arguments.model = arguments.model.resolve()
    if not arguments.report_only and not (arguments.model / "model.safetensors").is_file():
        parser.error(f"--model {arguments.model} has no model.safetensors")
    return arguments


def protocol_of(arguments: argparse.Namespace, data: Data) -> dict[str, Any]:
    """The settings that all runs share. A comparison that resumes must have the same.

    Args:
        arguments (Namespace): of the command line.
        data (Data): all clips.

    Returns:
        dict[str, Any]: the settings.
    """
    weights = arguments.model / "model.safetensors"
    with safe_open(weights, "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (no mapping)
    return {
        "model": arguments.model.name,
        "model_parameters": parameters,
        "model_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()[:16],
        "data": Path(arguments.dataset).name if Path(arguments.dataset).exists() else arguments.dataset,
        "data_sha256": data.digest,
        "clips": len(data.labels),
        "classes": len(data.label_names),
        "folds": data.fold_names,
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "budget": round(parameters * arguments.budget_percent / 100),
        "rates": sorted(set(arguments.rates)),
        "optimizer": "AdamW",
        **OPTIMIZER,
        "schedule": "cosine to zero by step, without warm-up",
        "augmentation": "none",
        "precision": "float32",
        # Without it, it is the CPU. Times of different devices are not to be mixed.
        **({} if arguments.device == "cpu" else {"device": arguments.device}),
    }


def plan(arguments: argparse.Namespace, data: Data) -> list[Run]:
    """All runs, first those that choose the rates, then seed by seed, so that what there is soon says something.

    Args:
        arguments (Namespace): of the command line.
        data (Data): all clips.

    Returns:
        list[Run]: the runs; those with the chosen rate have none yet.

    Raises:
        ValueError: for a fold that the data has not.
    """
    folds = arguments.folds or data.fold_names[: 1 if arguments.quick else None]
    for fold in folds:
        if fold not in data.fold_names:
            raise ValueError(f"--folds {fold}: the folds are {', '.join(data.fold_names)}.")
    runs = []
    folds = dict.fromkeys(folds)
    for fold in folds:
        for rate in sorted(set(arguments.rates)):
            runs += [Run(method, fold, rate, CHOICE_SEED) for method in arguments.methods]
    for seed in dict.fromkeys(arguments.seeds):
        if seed != CHOICE_SEED:
            runs += [Run(method, fold, None, seed) for fold in folds for method in arguments.methods]
    if arguments.ablations:
        runs += [Run(SOFT, fold, None, CHOICE_SEED, tuple(each.items())) for fold in folds for each in variants()]
    return runs


def compare(arguments: argparse.Namespace) -> list[str]:
    """Carry out the runs that are not there yet.

    Args:
        arguments (Namespace): of the command line.

    Returns:
        list[str]: what failed, one line each.

    Raises:
        ValueError: if the study has other settings, or another process is writing it.
    """
    study, cache = arguments.output_dir / RUNS, arguments.output_dir / CACHE
    data = load_data(
        arguments.dataset,
        arguments.model,
        cache,
        split=arguments.split,
        config_name=arguments.dataset_config_name,
        audio_column=arguments.audio_column,
        label_column=arguments.label_column,
        fold_column=arguments.fold_column,
    )
    protocol = protocol_of(arguments, data)
    try:
        with FileLock(cache / "lock", timeout=0):
            found = records.load(study)
            if found:
                records.check_settings(records.common_settings(found[0]), protocol, str(study))
            workers = Workers(arguments.processes, protocol, arguments.model, data, cache)
            return run_all(plan(arguments, data), workers, found, study, protocol["rates"])
    except Timeout:
        raise ValueError(f"{study} is being written by another process: wait until it ends.") from None


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    output, failures = arguments.output_dir, []
    try:
        if not arguments.report_only:
            failures = compare(arguments)
        found = records.load(output / RUNS)
        if not found:
            raise ValueError(f"{output / RUNS} has no records.")
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    write_results(found, output / "RESULTS.md", draw(found, output))
    print(f"{output / 'RESULTS.md'} is written.")
    for failure in failures:
        print(f"Failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
