"""`peft-softmoa train`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from ..arguments import AdapterArguments
from ..training.arguments import (
    TRAINING_DEFAULTS,
    DataArguments,
    ModelArguments,
    RunArguments,
    TaskArguments,
    TrainingArguments,
)
from ..training.options import flag_names, name_flags
from ..training.run import train
from ..training.trainer import AudioTrainer
from .parser import CommandParser

# The arguments of the Trainer that the help shows first.
TRAINING = (
    *("output_dir", "num_train_epochs", "max_steps", "learning_rate", "warmup_steps", "seed"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("dataloader_num_workers", "bf16", "eval_strategy", "load_best_model_at_end", "metric_for_best_model"),
    *("generation_max_length", "report_to", "push_to_hub", "hub_model_id", "resume_from_checkpoint"),
)

# Errors of the library name Python arguments: what this command calls them.
FLAGS = flag_names(ModelArguments, TaskArguments, DataArguments, AdapterArguments, TrainingArguments) | {
    "rows": "--train_rows, --eval_rows and --test_rows",
    "needs_length=False": "--max_steps",
    "separator": "--label_separator",
}


def make_parser(verb: str = "train", more: Optional[Mapping[str, Any]] = None) -> CommandParser:
    """The arguments of the verb.

    Args:
        verb (str): another verb that takes them too. Default: `"train"`.
        more (mapping, optional): what that verb takes besides, by the titles of their sections. Default: nothing.

    Returns:
        CommandParser: its parser.
    """
    groups: dict[str, Any] = {
        **(more or {}),
        **{"Model": ModelArguments, "Task": TaskArguments, "Data": DataArguments, "Adapter": AdapterArguments},
    }
    hidden = {"the Trainer": TrainingArguments}
    parser = CommandParser(verb, groups, hidden=hidden, shown={"Training": TRAINING}, takes_config=True)
    parser.set_defaults(**TRAINING_DEFAULTS)
    return parser


def parse(arguments: list[str]) -> RunArguments:
    """Parse the options of a run.

    Args:
        arguments (list[str]): the words after the verb.

    Returns:
        RunArguments: the options.

    Raises:
        ValueError: for a value that is not allowed.
    """
    model, task, data, adapter, training, _ = make_parser().parse(arguments)
    return RunArguments(model, task, data, adapter, training)


@name_flags(FLAGS)
def main(arguments: list[str]) -> AudioTrainer:
    """Train an adapter.

    Args:
        arguments (list[str]): the words after the verb.

    Returns:
        AudioTrainer: after training.
    """
    trainer = train(parse(arguments))
    # Ends the process group: a process that ends before may be aborted otherwise.
    trainer.accelerator.end_training()
    return trainer
