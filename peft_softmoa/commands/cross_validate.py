"""`peft-softmoa cross-validate`."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from ..training.arguments import RunArguments
from ..training.checkpoints import read_run_state, write_run_state
from ..training.options import name_flags
from ..training.rows import summarize_rows
from ..training.run import train as run_training
from ..training.source import open_source
from ..training.tasks import SingleLabel
from ..training.trainer import AudioTrainer
from . import train
from .parser import CommandParser

# The arguments that determine which checkpoint is tested, besides those that must stay the same in a run.
CHOICE = ("eval_strategy", "eval_steps")


@dataclass
class FoldArguments:
    """The folds, numbered from 1, of which each is tested once."""

    num_folds: int = field(metadata={"help": "How many folds there are."})
    validation_folds: int = field(
        default=0,
        metadata={
            "help": "How many folds, after the tested one, choose the best checkpoint. Without, the last one is tested."
        },
    )
    fold_column: str = field(default="fold", metadata={"help": "Column with the number of a row's fold."})

    def __post_init__(self) -> None:
        if not 0 <= self.validation_folds < self.num_folds - 1:
            raise ValueError(
                f"`num_folds` {self.num_folds} with `validation_folds` {self.validation_folds} leaves no fold to train "
                "on."
            )

    def arguments(self, test: int, split: str) -> list[str]:
        """The folds for training, validation and test, as options of a run.

        Args:
            test (int): the tested fold.
            split (str): the split with all folds.

        Returns:
            list[str]: words of a command line.
        """
        order = [(test - 1 + index) % self.num_folds + 1 for index in range(self.num_folds)]
        validation, training = order[1 : 1 + self.validation_folds], order[1 + self.validation_folds :]
        words = ["--eval_split_name", split, "--test_split_name", split]
        for use, folds in (("train", training), ("eval", validation), ("test", [test])):
            if folds:
                words += [f"--{use}_rows", f"{self.fold_column}={','.join(map(str, sorted(folds)))}"]
        return words if validation else [*words, "--eval_strategy", "no"]


def make_parser() -> CommandParser:
    """The arguments of the verb: those of `train`, and the folds.

    Returns:
        CommandParser: its parser.
    """
    return train.make_parser("cross-validate", {"Folds": FoldArguments})


@name_flags({**train.FLAGS, "num_folds": "--num_folds", "validation_folds": "--validation_folds"})
def main(arguments: list[str]) -> dict[str, Any]:
    """Train once for each fold, test it there, and print the means of the metrics.

    Each fold has a folder of its own in the output folder. Interrupted runs resume: the same command skips the folds
    that are finished.

    Args:
        arguments (list[str]): the words after the verb.

    Returns:
        dict: `folds` with the metrics of each, `mean` and `standard_deviation` of each metric.

    Raises:
        ValueError: if the folds are not those of the dataset, or options do not go together.
    """
    folds, model, task, data, adapter, training, _ = make_parser().parse(arguments)
    run = RunArguments(model, task, data, adapter, training)
    _check_options(run, folds)
    output_dir = Path(training.output_dir)
    is_main = int(os.environ.get("RANK", 0)) == 0
    settings = run.settings() | {name: getattr(training, name) for name in CHOICE}
    settings |= {name: str(value) for name, value in vars(folds).items()}
    _check_same(output_dir, settings)
    folders = {test: output_dir / f"fold-{test}" for test in range(1, folds.num_folds + 1)}
    if not all(map(_is_finished, folders.values())):
        _check_folds(run, folds)
    if is_main:
        write_run_state(output_dir, settings, finished=False)
    metrics: dict[str, dict[str, float]] = {}
    trainer: Optional[AudioTrainer] = None
    for test, folder in folders.items():
        if not _is_finished(folder):
            words = [*folds.arguments(test, data.train_split_name), "--output_dir", str(folder)]
            _, *parts, _ = make_parser().parse([*arguments, *words])
            trainer = run_training(RunArguments(*parts))
        metrics[str(test)] = _test_metrics(folder)
        if is_main:
            print(f"Fold {test} of {folds.num_folds}: {_listed(metrics[str(test)])}")
    names = list(next(iter(metrics.values())))
    values = {name: [each[name] for each in metrics.values()] for name in names}
    result: dict[str, dict[str, Any]] = {
        "mean": {name: statistics.mean(values[name]) for name in names},
        "standard_deviation": {name: statistics.pstdev(values[name]) for name in names},
        "folds": metrics,
    }
    if is_main:
        for name in names:
            mean, deviation = result["mean"][name], result["standard_deviation"][name]
            print(f"{name} {mean:.4f} ± {deviation:.4f} (mean and population standard deviation over folds)")
        (output_dir / "cross_validation.json").write_text(json.dumps(result, indent=2) + "\n")
    if trainer is not None:
        trainer.accelerator.end_training()
    return result


def _check_options(run: RunArguments, folds: FoldArguments) -> None:
    for name in ("train_rows", "eval_rows", "test_rows"):
        if getattr(run.data, name):
            raise ValueError(f"The folds say what --{name} is: leave it out.")
    if run.training.push_to_hub:
        raise ValueError("--push_to_hub would push each fold over the last: push the one that you want.")
    if run.training.load_best_model_at_end and not folds.validation_folds:
        raise ValueError("--load_best_model_at_end needs a fold that says what is best: give --validation_folds 1.")


def _check_same(output_dir: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with folds of other settings."""
    before = (read_run_state(output_dir) or {"settings": {}})["settings"]
    settings = json.loads(json.dumps(settings))
    changed = [
        f"{name} was {value!r} and is {settings.get(name)!r}"
        for name, value in before.items()
        if value != settings.get(name)
    ]
    begun = any(output_dir.glob("fold-*/checkpoint-*")) or any(map(_is_finished, output_dir.glob("fold-*")))
    if changed and begun:
        raise ValueError(
            f"{output_dir} holds a cross-validation with other settings: {'; '.join(changed)}. Use its settings, or "
            "choose another --output_dir."
        )


def _check_folds(run: RunArguments, folds: FoldArguments) -> None:
    """Check before training that each fold has rows, and each row is in a fold."""
    name, split = run.data.dataset_name, run.data.train_split_name
    source = open_source(name, split, run.data_options(SingleLabel()))
    if not source.reads_single_columns:
        return  # it would read all of the audio
    column = folds.fold_column
    present = set(summarize_rows(source.read([column]), [column], SingleLabel(), f"{name} ({split})").labels)
    if present != {str(fold) for fold in range(1, folds.num_folds + 1)}:
        raise ValueError(
            f"--num_folds {folds.num_folds} means the folds 1 to {folds.num_folds}, but column '{column}' of {name} "
            f"({split}) has {', '.join(sorted(present, key=lambda fold: (len(fold), fold)))}: correct --num_folds or "
            "--fold_column."
        )


def _is_finished(folder: Path) -> bool:
    state: Optional[dict[str, Any]] = read_run_state(folder)
    return state is not None and state["finished"] and (folder / "test_results.json").is_file()


def _test_metrics(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "test_results.json").read_text())
    others = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    values = {name.removeprefix("test_"): value for name, value in found.items() if name.startswith("test_")}
    return {name: value for name, value in values.items() if name not in others}


def _listed(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
