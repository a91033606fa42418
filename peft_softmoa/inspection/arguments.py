"""The arguments of the command `peft-softmoa inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from ..training.options import option


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
