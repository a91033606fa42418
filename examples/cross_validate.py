#!/usr/bin/env python
"""Cross-validate by folds: train once for each fold, which is tested, and print the mean accuracy.

    python examples/cross_validate.py --config examples/recipes/esc50.yaml \
        --num_folds 5 --validation_folds 1 --output_dir esc50

All other arguments are those of train_audio_classification.py. The folds are numbered from 1. With --validation_folds,
the folds after the tested one choose the best checkpoint; without it, the last one is tested. Each fold has a folder
of its own: what is finished is not trained again, and what was cut off goes on, when the same command is started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from train_audio_classification import main as train
from train_audio_classification import parse


def main(argv: list[str] | None = None) -> dict[str, float]:
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
    own.output_dir.mkdir(parents=True, exist_ok=True)
    noted = own.output_dir / "arguments.json"
    given = [*others, f"{own.num_folds} folds by {own.fold_column}, {own.validation_folds} for validation"]
    if noted.exists() and json.loads(noted.read_text()) != given:
        parser.error(
            f"{own.output_dir} is of a cross-validation with other arguments. Choose another --output_dir, or go on "
            f"with its own: {' '.join(json.loads(noted.read_text()))}"
        )
    noted.write_text(json.dumps(given) + "\n")
    accuracies: dict[str, float] = {}
    for test in range(1, own.num_folds + 1):
        folder = own.output_dir / f"fold-{test}"
        arguments = [*others, *fold_arguments(test, own, others), "--output_dir", str(folder)]
        if not is_finished(folder):
            train(arguments)
        accuracies[str(test)] = json.loads((folder / "test_results.json").read_text())["test_accuracy"]
        print(f"Fold {test} of {own.num_folds}: accuracy {accuracies[str(test)]:.1%}")
    mean, deviation = statistics.mean(accuracies.values()), statistics.stdev(accuracies.values())
    print(f"Accuracy {100 * mean:.2f} ± {100 * deviation:.2f} % (mean and sample standard deviation over folds)")
    result = {"mean": mean, "standard_deviation": deviation, "folds": accuracies}
    (own.output_dir / "cross_validation.json").write_text(json.dumps(result, indent=2) + "\n")
    return {"mean": mean, "standard_deviation": deviation}


def fold_arguments(test: int, own: argparse.Namespace, others: list[str]) -> list[str]:
    """Which folds train, validate and are tested, as arguments of the training script."""
    split = parse([*others, "--output_dir", "unused"])[1].train_split_name
    order = [(test - 1 + index) % own.num_folds + 1 for index in range(own.num_folds)]
    validation, training = order[1 : 1 + own.validation_folds], order[1 + own.validation_folds :]
    chosen = {"train": training, "eval": validation, "test": [test]}
    arguments = ["--eval_split_name", split, "--test_split_name", split]
    for use, folds in chosen.items():
        if folds:
            arguments += [f"--{use}_rows", f"{own.fold_column}={','.join(map(str, sorted(folds)))}"]
    return arguments if validation else [*arguments, "--eval_strategy", "no"]


def is_finished(folder: Path) -> bool:
    run = folder / "run.json"
    return run.is_file() and json.loads(run.read_text())["finished"] and (folder / "test_results.json").is_file()


if __name__ == "__main__":
    main()
