"""`peft-softmoa evaluate`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

from ..inference.evaluate import evaluate_adapter
from ..training.options import collect_options, flag_names, name_flags, option
from .parser import CommandParser


@dataclass
class EvaluateArguments:
    """What an adapter is evaluated on."""

    dataset_name: str = field(
        metadata={"help": "Id of a dataset on the Hub, or a folder of one of the layouts in the documentation."}
    )
    dataset_config_name: Optional[str] = option("config_name")
    dataset_revision: Optional[str] = option("revision")
    split: str = field(default="test", metadata={"help": "Split of the dataset."})
    rows: Optional[str] = field(default=None, metadata={"help": "Rows of the dataset, such as fold=5. Default: all."})
    audio_column_name: str = option("audio_column")
    label_column_name: Optional[str] = option(
        "label_column", default=None, more="Default: label, text for recognition, events for events in time."
    )
    max_length_seconds: Optional[float] = option("max_length_seconds")
    channels: Optional[list[str]] = option("channels")
    on_bad_audio: Literal["skip", "raise"] = option("on_bad_audio")
    metrics: Optional[list[str]] = field(
        default=None, metadata={"help": "Metrics, as for train. Default: two that go with the task."}
    )
    normalize_text: bool = field(
        default=False, metadata={"help": "Compare texts in lower case and without punctuation."}
    )
    label_separator: Optional[str] = field(
        default=None, metadata={"help": "What stands between several labels in one column. Default: a comma."}
    )
    language: Optional[str] = field(
        default=None, metadata={"help": "Language of the texts, for a Whisper of many languages."}
    )
    speech_task: Optional[Literal["transcribe", "translate"]] = field(
        default=None, metadata={"help": "What such a Whisper does."}
    )
    text_case: Optional[Literal["lower", "upper"]] = field(
        default=None, metadata={"help": "The case into which texts are put. Default: texts stay as they are."}
    )
    long_form: bool = field(
        default=False,
        metadata={
            "help": "Let a Whisper transcribe clips of any length, piece by piece. Default: long ones are skipped."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Number of clips in a batch."})
    num_workers: int = field(default=0, metadata={"help": "Number of processes that decode."})
    revision: Optional[str] = field(default=None, metadata={"help": "Branch, tag or commit of the adapter."})
    output: Optional[str] = field(
        default=None, metadata={"help": "JSON file for the metrics. Default: they are printed only."}
    )


def make_parser() -> CommandParser:
    """The arguments of the verb.

    Returns:
        CommandParser: its parser.
    """
    parser = CommandParser("evaluate", {"Data and metrics": EvaluateArguments})
    parser.add_argument("adapter", help="Id on the Hub or folder of the adapter.")
    return parser


@name_flags({**flag_names(EvaluateArguments), "separator": "--label_separator"})
def main(arguments: list[str]) -> None:
    """Evaluate an adapter on a dataset, and print the metrics.

    Args:
        arguments (list[str]): the words after the verb.
    """
    given, rest = make_parser().parse(arguments)
    metrics = evaluate_adapter(
        rest.adapter,
        given.dataset_name,
        given.split,
        rows=given.rows,
        options=collect_options(given, label_column=given.label_column_name),
        revision=given.revision,
        batch_size=given.batch_size,
        num_workers=given.num_workers,
        metrics=given.metrics,
        long_form=given.long_form,
        normalize_text=given.normalize_text,
        text_case=given.text_case,
        separator=given.label_separator,
        language=given.language,
        speech_task=given.speech_task,
    )
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    if given.output:
        Path(given.output).write_text(json.dumps(metrics, indent=2) + "\n")
