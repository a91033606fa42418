"""Compare Soft-MoA with other ways of fine-tuning the same pretrained model, by cross-validation.

    python -m examples.method_comparison esc50 --dataset path/to/esc50 --quick
    python -m examples.method_comparison esc50 --dataset path/to/esc50
    python -m examples.method_comparison esc50 --report_only

A study says the model, the dataset, the methods and the protocol; options change them. Each fold is tested once, and
the one after it chooses the learning rate, with the first seed; all others train. Each run becomes one line of
runs.jsonl in the output folder when it ends. Interrupted studies resume: run the same command again. RESULTS.md and its
picture are made from that file, the times of --time and what somebody has written in notes.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from peft_softmoa.training import fingerprint_weights

from . import records, timing
from .data import Data, cached, load_data
from .measures import PRECISIONS, autocast, one_thread
from .methods import METHODS, PROBE, SOFT, paper_budget, why_not
from .models import TASKS, backbone_of, load_extractor, pooled_outputs
from .pages import write_page
from .records import CHOICE_SEED
from .studies import QUICK, QUICK_VARIANTS, STUDIES, Study
from .training import HEAD_RATE, OPTIMIZER, Run, method_options, slug
from .workers import Workers, be_quiet, run_all

PROGRAM = "python -m examples.method_comparison"
RESULTS = Path(__file__).parent / "results"
RUNS = "runs.jsonl"
NAMES = {slug(method): method for method in METHODS}
# Fields of a study that options of the same name replace.
NUMBERS = ("seeds", "epochs", "batch_size", "budget", "seconds")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", choices=STUDIES, metavar="STUDY", help=f"one of {', '.join(STUDIES)}")
    parser.add_argument("--dataset", help="id on the Hub, or folder with a metadata.csv; needs a column with folds")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--split", default="train", help="train")
    parser.add_argument("--audio_column", default="audio", help="audio")
    parser.add_argument("--label_column", help="that of the study")
    parser.add_argument("--fold_column", default="fold", help="fold")
    parser.add_argument("--model", help="id on the Hub, or folder; that of the study")
    parser.add_argument("--task", choices=TASKS, help="that of the study")
    parser.add_argument("--seconds", type=float, help="the length of the clips, for models that read one length")
    parser.add_argument("--methods", nargs="+", choices=NAMES, metavar="METHOD", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--folds", nargs="+", help="the folds that are tested")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--precision", choices=PRECISIONS, help="of the computation; weights are in float32")
    parser.add_argument("--budget", type=int, help="parameters besides the head; those of the paper's Soft-MoA")
    parser.add_argument("--rates", nargs="+", type=float, help="the grid of all methods, instead of their own")
    parser.add_argument("--clips_per_class", nargs="+", type=int, help="training clips of each class")
    parser.add_argument("--speakers", nargs="+", type=int, help="training speakers")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, each on one thread; 2")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    parser.add_argument("--device", choices=devices, default="cpu", help="cpu, or where there is one cuda; cpu")
    parser.add_argument("--output_dir", type=Path, help="a folder for each study in this package's results")
    parser.add_argument("--cache", type=Path, default=RESULTS / "cache", help="folder with the features of all studies")
    parser.add_argument("--quick", action="store_true", help="few methods, clips and epochs, to see that all works")
    parser.add_argument("--plan", action="store_true", help="only say what would be run")
    parser.add_argument(
        "--time", type=int, metavar="ROUNDS", help="time steps of all methods in turn, and nothing else"
    )
    parser.add_argument("--report_only", action="store_true", help="only write RESULTS.md and its picture again")
    arguments = parser.parse_args(argv)
    for name in (*NUMBERS, "processes", "time"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}")
    for name in ("rates", "clips_per_class", "speakers"):
        if min(getattr(arguments, name) or [1]) <= 0:
            parser.error(f"--{name} must be positive, got {min(getattr(arguments, name))}")
    study = STUDIES[arguments.study]
    arguments.dataset = arguments.dataset or (study.dataset and os.environ.get(study.dataset))
    if not arguments.dataset and not arguments.report_only:
        parser.error(f"give a --dataset, or set {study.dataset}")
    folder = RESULTS / "quick" if arguments.quick else RESULTS
    arguments.output_dir = arguments.output_dir or folder / arguments.study
    return arguments


def study_of(arguments: argparse.Namespace) -> Study:
    """The study with what the options change.

    Args:
        arguments (Namespace): of the command line.

    Returns:
        Study: a copy.
    """
    study = STUDIES[arguments.study]
    if arguments.quick:
        first = (study.variants[0], study.variants[study.reference], (SOFT, {}))
        kept = [each for each in study.variants if each in first]
        kept += [each for each in study.variants if each not in kept]
        study = replace(study, **QUICK, variants=kept[:QUICK_VARIANTS])
    given = {name: getattr(arguments, name) for name in (*NUMBERS, "precision", "label_column", "model", "task")}
    study = replace(study, **{name: value for name, value in given.items() if value is not None})
    if arguments.epochs is not None:
        study = replace(study, epochs_of={})
    if arguments.rates is not None:
        study = replace(study, rates={method: sorted(set(arguments.rates)) for method in METHODS})
    if arguments.methods is not None:
        chosen = [NAMES[name] for name in arguments.methods]
        kept = [each for each in study.variants if each[0] in chosen]
        kept += [(method, {}) for method in chosen if method not in dict(kept)]
        study = replace(study, variants=kept)
    for name in ("clips_per_class", "speakers"):
        values = getattr(arguments, name)
        if values is not None:
            others = [(method, {k: v for k, v in each.items() if k != name}) for method, each in study.variants]
            unique = [each for index, each in enumerate(others) if each not in others[:index]]
            study = replace(
                study,
                axis=name,
                variants=[(method, {**each, name: value}) for value in values for method, each in unique],
            )
    return study


def protocol_of(arguments: argparse.Namespace, study: Study, data: Data, model: Any) -> dict[str, Any]:
    """The settings that all runs share. A study that resumes must have the same.

    Args:
        arguments (Namespace): of the command line.
        study (Study): what is compared.
        data (Data): all clips.
        model (PreTrainedModel): the pretrained model with a head.

    Returns:
        dict[str, Any]: the settings.
    """
    fields = {} if study.seconds is None else {"max_length_seconds": study.seconds}
    shared = ["task", "seconds", "epochs", "epochs_of", "batch_size", "precision", "clips_per_class"]
    shared += ["validation_per_class", "test_per_class", "validate_every", "trace", "rates", "groups"]
    values, backbone = asdict(study), backbone_of(model)
    return {
        "study": arguments.study,
        **{name: values[name] for name in shared},
        "metric": TASKS[study.task].metric,
        "model": Path(study.model).name if Path(study.model).exists() else study.model,
        "model_parameters": sum(each.numel() for each in backbone.parameters()),
        "model_sha256": fingerprint_weights(backbone.requires_grad_(False))[:16],
        "data": Path(arguments.dataset).name if Path(arguments.dataset).exists() else arguments.dataset,
        "data_sha256": data.digest,
        "clips": len(data.labels),
        "classes": len(data.label_names),
        "folds": data.fold_names,
        "rate_folds": data.fold_names[: study.rate_folds],
        "budget": study.budget or paper_budget(model, **fields),
        "optimizer": "AdamW",
        **OPTIMIZER,
        "schedule": "cosine to zero by step, without warm-up",
        "augmentation": "none",
        **({"head_epochs": study.head_epochs, "head_rate": HEAD_RATE} if study.head_epochs else {}),
        # Without it, it is the CPU. Times of different devices are not to be mixed.
        **({} if arguments.device == "cpu" else {"device": arguments.device}),
    }


def plan(arguments: argparse.Namespace, study: Study, protocol: dict[str, Any]) -> list[Run]:
    """All runs, first those that choose the rates, then seed by seed, so that what there is soon says something.

    Args:
        arguments (Namespace): of the command line.
        study (Study): what is compared.
        protocol (dict): from `protocol_of`.

    Returns:
        list[Run]: the runs; those with the chosen rate have none yet. What the package cannot do is left out, and said.

    Raises:
        ValueError: for a fold that the data has not.
    """
    folds = list(dict.fromkeys(arguments.folds or protocol["folds"][: study.folds]))
    for fold in folds:
        if fold not in protocol["folds"]:
            raise ValueError(f"--folds {fold}: the folds are {', '.join(protocol['folds'])}.")
    variants = []
    for method, options in study.variants:
        reason = why_not(method, method_options(options))
        if reason is None:
            variants.append((method, tuple(options.items())))
        else:
            print(f"Skipped: {method} {options or ''}: {reason}", flush=True)
    rates = protocol["rates"]
    runs = [
        Run(method, fold, rate, CHOICE_SEED, options)
        for fold in protocol["rate_folds"]
        for method, options in variants
        for rate in rates[method]
    ]
    runs += [
        Run(method, fold, None, seed, options)
        for seed in range(CHOICE_SEED, CHOICE_SEED + study.seeds)
        for fold in folds
        if (seed, fold) not in [(CHOICE_SEED, each) for each in protocol["rate_folds"]]
        for method, options in variants
    ]
    return runs


def carry_out(arguments: argparse.Namespace, study: Study) -> list[str]:
    """Carry out the runs that are not there yet, or what else is asked for.

    Args:
        arguments (Namespace): of the command line.
        study (Study): what is compared.

    Returns:
        list[str]: what failed, one line each.

    Raises:
        ValueError: if the file has other settings, or another process is writing it.
    """
    options = {"audio_column": arguments.audio_column, "config_name": arguments.dataset_config_name}
    data = load_data(
        study,
        arguments.dataset,
        load_extractor(study.model, study.seconds),
        arguments.cache,
        split=arguments.split,
        fold_column=arguments.fold_column,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        model = TASKS[study.task](study.model, data.label_names, study.seconds).load()
    protocol = protocol_of(arguments, study, data, model)
    runs = plan(arguments, study, protocol)
    print(f"{len(runs)} runs, within {protocol['budget']:,} parameters besides the head.", flush=True)
    if arguments.plan:
        return []
    path = arguments.output_dir / RUNS
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(arguments.output_dir / ".lock", timeout=0):
            found = records.load(path)
            if found:
                records.check_settings(records.common_settings(found[0]), protocol, str(path))
            protocol["model_path"] = study.model
            if arguments.time:
                timing.measure(runs, protocol, data, arguments.time, arguments.output_dir)
                return []
            pooled = None
            probes = any(run.method == PROBE for run in runs) and study.num_channels is None and not arguments.quick
            if probes or study.head_epochs:
                pooled = "-".join([data.digest, protocol["model_sha256"], protocol["precision"]])
                with one_thread(), autocast(protocol):
                    cached(arguments.cache, pooled, lambda: pooled_outputs(model, data.inputs))
            workers = Workers(arguments.processes, protocol, data, arguments.cache, pooled)
            return run_all(runs, workers, found, path, protocol)
    except Timeout:
        raise ValueError(f"{path} is being written by another process: wait until it ends.") from None


def main(argv: list[str] | None = None) -> int:
    arguments, failures = parse(argv), []
    be_quiet()
    study = study_of(arguments)
    try:
        if not arguments.report_only:
            failures = carry_out(arguments, study)
        if not arguments.plan:
            found = records.load(arguments.output_dir / RUNS)
            if not found and not arguments.time:
                raise ValueError(f"{arguments.output_dir / RUNS} has no records.")
            if found:
                print(f"{write_page(found, STUDIES[arguments.study], arguments.output_dir)} is written.")
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"Failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
