#!/usr/bin/env python
"""Cross-validate by folds: train once for each fold, which is tested, and print the mean accuracy.

    python examples/cross_validate.py --config esc50 \
        --num_folds 5 --validation_folds 1 --output_dir esc50

All other arguments are those of train_audio_classification.py. The folds are numbered from 1. With --validation_folds,
the folds after the tested one choose the best checkpoint; without it, the last checkpoint is tested. Each fold has its
own folder. Interrupted runs resume: run the same command again, and it skips the finished folds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from train_audio_classification import FLAGS, DataArguments, ModelArguments, parse, settings_of
from train_audio_classification import main as train

from peft_softmoa.training import (
    collect_options,
    name_flags,
    open_source,
    read_run_state,
    summarize_rows,
    write_run_state,
)
from peft_softmoa.training.tasks import SingleLabel

# The arguments that determine which checkpoint is tested, besides those that must stay the same in a run.
CHOICE = ("eval_strategy", "eval_steps")


@name_flags(FLAGS)
def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--num_folds", type=int, required=True, help="how many there are")
    parser.add_argument("--validation_folds", type=int, default=0, help="how many choose the best checkpoint; 0")
    parser.add_argument("--fold_column", default="fold", help="column with the number of a row's fold; fold")
    parser.add_argument("--output_dir", type=Path, required=True)
    own, others = parser.parse_known_args(argv)
    if not 0 <= own.validation_folds < own.num_folds - 1:
        parser.error(
            f"--num_folds {own.num_folds} with --validation_folds {own.validation_folds} leaves no fold to train on"
        )
    parsed = parse([*others, "--output_dir", str(own.output_dir)])
    for name in ("train_rows", "eval_rows", "test_rows"):
        if getattr(parsed[1], name):
            parser.error(f"the folds say what --{name} is: leave it out")
    if parsed[3].push_to_hub:
        parser.error("--push_to_hub would push each fold over the last: push the one that you want")
    if parsed[3].load_best_model_at_end and not own.validation_folds:
        parser.error("--load_best_model_at_end needs a fold that says what is best: give --validation_folds 1")
    is_main = int(os.environ.get("RANK", 0)) == 0
    settings = settings_of(*parsed) | {name: getattr(parsed[3], name) for name in CHOICE}
    settings |= {name: str(value) for name, value in vars(own).items() if name != "output_dir"}
    before = (read_run_state(own.output_dir) or {"settings": {}})["settings"]
    settings = json.loads(json.dumps(settings))
    changed = [
        f"{name} was {value!r} and is {settings.get(name)!r}"
        for name, value in before.items()
        if value != settings.get(name)
    ]
    folders = {test: own.output_dir / f"fold-{test}" for test in range(1, own.num_folds + 1)}
    begun = any(own.output_dir.glob("fold-*/checkpoint-*")) or any(map(is_finished, own.output_dir.glob("fold-*")))
    if changed and begun:
        parser.error(
            f"{own.output_dir} holds a cross-validation with other settings: {'; '.join(changed)}. Use its settings, "
            "or choose another --output_dir"
        )
    if not all(map(is_finished, folders.values())):
        wrong = check_folds(own, parsed[0], parsed[1])
        if wrong:
            parser.error(wrong)
    if is_main:
        write_run_state(own.output_dir, settings, finished=False)
    accuracies: dict[str, float] = {}
    for test, folder in folders.items():
        if not is_finished(folder):
            train([*others, *fold_arguments(test, own, parsed[1].train_split_name), "--output_dir", str(folder)])
        accuracies[str(test)] = json.loads((folder / "test_results.json").read_text())["test_accuracy"]
        if is_main:
            print(f"Fold {test} of {own.num_folds}: accuracy {accuracies[str(test)]:.1%}")
    result = {
        "mean": statistics.mean(accuracies.values()),
        "standard_deviation": statistics.pstdev(accuracies.values()),
        "folds": accuracies,
    }
    if is_main:
        mean, deviation = (100 * result[name] for name in ("mean", "standard_deviation"))
        print(f"Accuracy {mean:.2f} ± {deviation:.2f} % (mean and population standard deviation over folds)")
        (own.output_dir / "cross_validation.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def check_folds(own: argparse.Namespace, model_args: ModelArguments, data_args: DataArguments) -> str | None:
    """What is wrong with the folds, before training: each fold must have rows, and each row must be in a fold."""
    name, split = data_args.dataset_name, data_args.train_split_name
    source = open_source(name, split, collect_options(model_args, data_args))
    if not source.reads_single_columns:
        return None  # it would read all of the audio
    present = set(
        summarize_rows(source.read([own.fold_column]), [own.fold_column], SingleLabel(), f"{name} ({split})").labels
    )
    expected = {str(fold) for fold in range(1, own.num_folds + 1)}
    if present == expected:
        return None
    return (
        f"--num_folds {own.num_folds} means the folds 1 to {own.num_folds}, but column '{own.fold_column}' of {name} "
        f"({split}) has {', '.join(sorted(present, key=lambda fold: (len(fold), fold)))}: correct --num_folds or "
        "--fold_column"
    )


def fold_arguments(test: int, own: argparse.Namespace, split: str) -> list[str]:
    """The folds for training, validation and test, as arguments of the training script."""
    order = [(test - 1 + index) % own.num_folds + 1 for index in range(own.num_folds)]
    validation, training = order[1 : 1 + own.validation_folds], order[1 + own.validation_folds :]
    chosen = {"train": training, "eval": validation, "test": [test]}
    arguments = ["--eval_split_name", split, "--test_split_name", split]
    for use, folds in chosen.items():
        if folds:
            arguments += [f"--{use}_rows", f"{own.fold_column}={','.join(map(str, sorted(folds)))}"]
    return arguments if validation else [*arguments, "--eval_strategy", "no"]


def is_finished(folder: Path) -> bool:
    state = read_run_state(folder)
    return state is not None and state["finished"] and (folder / "test_results.json").is_file()


if __name__ == "__main__":
    main()
