"""`peft-softmoa inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from ..inspection.inspect_adapter import inspect_adapter
from ..training.options import collect_options, flag_names, name_flags, option
from .parser import CommandParser


@dataclass
class InspectArguments:
    """What an adapter is inspected with."""

    audio: Optional[str] = field(default=None, metadata={"help": "A file with a clip, to see where the slots read it."})
    dataset: Optional[str] = field(
        default=None, metadata={"help": "Dataset to see the experts over: an id on the Hub or a folder."}
    )
    dataset_config_name: Optional[str] = option("config_name")
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    rows: Optional[str] = field(default=None, metadata={"help": "Rows of the dataset, such as fold=5. Default: all."})
    audio_column_name: str = option("audio_column")
    label_column_name: Optional[str] = option(
        "label_column", default=None, help="Column with the labels. Default: label, if there is one."
    )
    max_length_seconds: float = option(
        "max_length_seconds", default=30.0, help="How much of a clip is read, from its start."
    )
    max_clips: Optional[int] = field(default=None, metadata={"help": "Number of clips of the dataset. Default: all."})
    batch_size: int = field(default=8, metadata={"help": "Number of clips in a batch."})
    revision: Optional[str] = field(default=None, metadata={"help": "Branch, tag or commit of the adapter."})
    output_dir: str = field(
        default="inspection", metadata={"help": "Folder for report.html, report.json and the pictures."}
    )


def make_parser() -> CommandParser:
    """The arguments of the verb.

    Returns:
        CommandParser: its parser.
    """
    parser = CommandParser("inspect", {"Clips and report": InspectArguments})
    parser.add_argument("adapter", help="Id on the Hub or folder of the adapter.")
    return parser


def main(arguments: list[str]) -> None:
    """Write a report of what the experts of an adapter do.

    Args:
        arguments (list[str]): the words after the verb.
    """
    given, rest = make_parser().parse(arguments)
    with name_flags(flag_names(InspectArguments)):
        page = inspect_adapter(
            rest.adapter,
            given.output_dir,
            audio=given.audio,
            dataset=given.dataset,
            split=given.split,
            rows=given.rows,
            options=collect_options(given),
            revision=given.revision,
            max_clips=given.max_clips,
            batch_size=given.batch_size,
        )
    print(f"The report is in {page}")
