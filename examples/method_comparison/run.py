#!/usr/bin/env python
"""Compare Soft-MoA with other ways of fine-tuning the same pretrained transformer, by cross-validation.

    python examples/compare_methods.py --dataset path/to/esc10 --quick
    python examples/compare_methods.py --dataset path/to/esc10
    python examples/compare_methods.py --dataset path/to/esc10 --ablations
    python examples/compare_methods.py --report_only

Each fold is tested once; the fold after it chooses the learning rate, with the first seed, and all others train. Every
run is one JSON file in the output folder, written when it ends; the same command goes on where it was cut off. From
these files alone come RESULTS.md and its pictures. --ablations varies Soft-MoA, with the learning rate that it has in
the comparison.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import logging

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "benchmark")]

from comparison import records  # noqa: E402
from comparison.ablations import variants  # noqa: E402
from comparison.pictures import draw  # noqa: E402
from comparison.records import CHOICE_SEED  # noqa: E402
from comparison.results import duration, write_results  # noqa: E402
from comparison.training import (  # noqa: E402
    DENSE,
    METHODS,
    OPTIMIZER,
    PROBE,
    SINGLE,
    SOFT,
    Data,
    Run,
    load_data,
    load_features,
    one_thread,
    slug,
    train,
)
from measure import environment, keep_memory  # noqa: E402

RUNS, CACHE = "runs", "cache"
# Wide enough for full fine-tuning, at its lower end, and for methods of few parameters, at its upper one.
RATES = [2e-4, 1e-3, 5e-3, 2.5e-2]
NAMES = {slug(method): method for method in METHODS}
QUICK = {"methods": [PROBE, SINGLE, DENSE, SOFT], "seeds": [CHOICE_SEED], "epochs": 3}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", help="id on the Hub, or folder with a metadata.csv; needs a column with folds")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--split", default="train", help="train")
    parser.add_argument("--audio_column", default="audio", help="audio")
    parser.add_argument("--label_column", default="label", help="label")
    parser.add_argument("--fold_column", default="fold", help="fold")
    parser.add_argument(
        "--model", type=Path, default=HERE / "backbone" / "ast-small", help="folder of an AST; backbone/ast-small"
    )
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
    parser.add_argument("--output_dir", type=Path, help="comparison beside this file; with --quick, comparison/quick")
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
    arguments.output_dir = arguments.output_dir or HERE / "comparison" / ("quick" if arguments.quick else "")
    arguments.model = arguments.model.resolve()
    if not arguments.report_only and not (arguments.model / "model.safetensors").is_file():
        parser.error(f"--model {arguments.model} has no model.safetensors")
    return arguments


def protocol_of(arguments: argparse.Namespace, data: Data) -> dict[str, Any]:
    """The settings that all runs share, and that have to stay the same when they go on.

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


# --- processes ----------------------------------------------------------------------------------------------------

# What the runs of a process share.
_shared: dict[str, Any] = {}


def prepare(protocol: dict[str, Any], model: Path, data: Data, folder: Path, processes: int) -> None:
    """Tell a process what its runs share."""
    with one_thread():
        where = environment(protocol.get("device", "cpu")) | {"processes": processes}
    _shared.update(protocol=protocol, model=model, data=data, folder=folder, environment=where)


def prepare_process(cache: Path, protocol: dict[str, Any], model: Path, data: Data, *shared: Any) -> None:
    """The same, in a process of its own, which reads the features from their file."""
    Thread(target=end_with_parent, daemon=True).start()
    be_quiet()
    prepare(protocol, model, data._replace(inputs=load_features(cache, data.digest)), *shared)


def end_with_parent() -> None:
    """Do not wait for ever for runs from a process that was killed."""
    parent_process().join()
    os._exit(1)


def be_quiet() -> None:
    """Let transformers say nothing of the models that it loads in each run."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def carry_out(run: Run) -> records.Record:
    """Train, and write the record."""
    record = train(run, _shared["protocol"], _shared["model"], _shared["data"])
    record = {"settings": record.pop("settings"), "environment": _shared["environment"], **record}
    records.write(_shared["folder"] / f"{run.name}.json", record)
    return record


class Here(Executor):
    """Runs in this process, at once."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 (it is reported where the result is asked for)
            future.set_exception(error)
        return future


class Workers:
    """Processes that are replaced if one of them dies.

    Args:
        number (int): how many; one is this process itself.
        protocol (dict): the settings that all runs share.
        model (Path): the pretrained transformer.
        data (Data): all clips.
        output (Path): the folder with records and cache.
    """

    def __init__(self, number: int, protocol: dict[str, Any], model: Path, data: Data, output: Path) -> None:
        self.number, self.cache = number, output / CACHE
        self.shared = (protocol, model, data, output / RUNS, number)
        self.executor = self._start()

    def _start(self) -> Executor:
        if self.number == 1:
            prepare(*self.shared)
            return Here()
        protocol, model, data, *others = self.shared
        shared = (self.cache, protocol, model, data._replace(inputs=None), *others)
        return ProcessPoolExecutor(self.number, get_context("spawn"), prepare_process, shared)

    def submit(self, run: Run) -> Future:
        """Begin a run."""
        try:
            return self.executor.submit(carry_out, run)
        except BrokenProcessPool:
            self.executor.shutdown()
            self.executor = self._start()
            return self.executor.submit(carry_out, run)

    def close(self) -> None:
        """End the processes."""
        self.executor.shutdown()


class Progress:
    """Says after each run how much is done and how long the others will take.

    Args:
        total (int): number of runs.
        processes (int): how many run at a time.
    """

    def __init__(self, total: int, processes: int) -> None:
        self.total, self.processes = total, processes
        self.finished = 0
        self.seconds: dict[str, list[float]] = {}

    def add(self, method: str, seconds: float) -> None:
        """Learn how long a run of a method takes."""
        self.seconds.setdefault(method, []).append(seconds)

    def left(self, runs: list[Run]) -> float | None:
        """Seconds that runs will take: each as long as those of its method, or as all, if none has ended yet."""
        means = {method: sum(each) / len(each) for method, each in self.seconds.items()}
        if not means:
            return None
        usual = sum(means.values()) / len(means)
        return sum(means.get(run.method, usual) for run in runs) / self.processes

    def say(self, what: str, left: list[Run]) -> None:
        """Print a line."""
        remaining = self.left(left)
        rest = f"; about {duration(remaining)} left" if left and remaining is not None else ""
        print(f"[{self.finished}/{self.total}] {what}{rest}", flush=True)


def run_all(plan: list[Run], workers: Workers, found: list[records.Record], protocol: dict[str, Any]) -> list[str]:
    """Carry out all runs that are not there yet.

    Args:
        plan (list[Run]): all runs.
        workers (Workers): carry them out.
        found (list[Record]): the records that are there; those of this call are added.
        protocol (dict): the settings that all runs share.

    Returns:
        list[str]: what failed, one line each.
    """
    progress = Progress(len(plan), workers.number)
    present = set()
    for record in found:
        settings = record["settings"]
        options = tuple(settings["options"].items())
        run = Run(settings["method"], settings["fold"], settings["rate"], settings["seed"], options)
        present.add(run.name)
        progress.add(settings["method"], record["run_seconds"])
    pending, running, failures = list(plan), {}, []
    lost: set[tuple[str, str]] = set()  # the methods and folds whose rate cannot be chosen
    again: set[Run] = set()

    def ready() -> list[tuple[Run, Run]]:
        """The runs that can begin, as planned and with their rate; those that never will or are there are dropped."""
        able = []
        for run in list(pending):
            rate = run.rate
            if rate is None:
                if (run.method, run.fold) in lost:
                    pending.remove(run)
                    failures.append(f"{run.method}, fold {run.fold}, seed {run.seed}: no rate can be chosen")
                    continue
                rate = records.choose_rate(found, run.method, run.fold, protocol["rates"])
                if rate is None:
                    continue
            chosen = replace(run, rate=rate)
            if chosen.name in present:
                pending.remove(run)
                progress.finished += 1
            else:
                able.append((run, chosen))
        return able

    while pending or running:
        for planned, run in ready()[: workers.number - len(running)]:
            pending.remove(planned)
            running[workers.submit(run)] = run
        if not running:
            continue
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool) and run not in again:
                # One process has died, and the others with it, whatever they did.
                again.add(run)
                pending.insert(0, run)
                continue
            progress.finished += 1
            if error is None:
                record = future.result()
                found.append(record)
                progress.add(run.method, record["run_seconds"])
                accuracy = record["epochs"]["validation_accuracy"][-1]
                what = f"{run.name}: validation {accuracy:.1%}, {record['run_seconds']:.0f} s"
            else:
                failures.append(f"{run.name}: {type(error).__name__}: {error}")
                what = f"{failures[-1]} — failed"
                if run.seed == CHOICE_SEED and not run.options:
                    lost.add((run.method, run.fold))
            progress.say(what, [*pending, *running.values()])
    workers.close()
    print(f"{progress.total - len(failures)} of {progress.total} runs are there.", flush=True)
    return failures


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    output, failures = arguments.output_dir, []
    try:
        found = records.load(output / RUNS)
        if not arguments.report_only:
            data = load_data(
                arguments.dataset,
                arguments.model,
                output / CACHE,
                split=arguments.split,
                config_name=arguments.dataset_config_name,
                audio_column=arguments.audio_column,
                label_column=arguments.label_column,
                fold_column=arguments.fold_column,
            )
            protocol = protocol_of(arguments, data)
            if found:
                records.check_settings(records.common_settings(found[0]), protocol, str(output / RUNS))
            workers = Workers(arguments.processes, protocol, arguments.model, data, output)
            failures = run_all(plan(arguments, data), workers, found, protocol)
            found = records.load(output / RUNS)
        if not found:
            raise ValueError(f"{output / RUNS} has no records.")
    except ValueError as error:
        print(f"compare_methods.py: {error}", file=sys.stderr)
        return 2
    write_results(found, output / "RESULTS.md", draw(found, output))
    print(f"{output / 'RESULTS.md'} is written.")
    for failure in failures:
        print(f"Failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    keep_memory()
    be_quiet()
    sys.exit(main())
