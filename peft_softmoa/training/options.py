"""The options with which a dataset is read: one dataclass, from which scripts make their arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Optional, Union

from .channels import Channels, parse_channels

# An argument in an error of the library, such as `rows` or `streaming=False`.
ARGUMENT = re.compile(r"`(\w+)(?:=([^`]+))?`")


@dataclass(frozen=True)
class DataOptions:
    """How the audio and the labels of a dataset are read.

    The `help` of each field explains it. Where scripts call it otherwise, as transformers' scripts do, `flag` says how.

    Raises:
        ValueError: if a value is not allowed.
    """

    audio_column: str = field(default="audio", metadata={"help": "Column with the audio.", "flag": "audio_column_name"})
    label_column: Optional[str] = field(
        default="label",
        metadata={
            "help": "Column with the labels. Several columns, such as action,object,location, are one label together; "
            "with several labels a clip each of them is a class, and in regression an output.",
            "flag": "label_column_name",
        },
    )
    config_name: Optional[str] = field(
        default=None, metadata={"help": "Configuration of the dataset.", "flag": "dataset_config_name"}
    )
    revision: Optional[str] = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the dataset on the Hub.", "flag": "dataset_revision"},
    )
    token: Union[str, bool, None] = field(
        default=None, metadata={"help": "Access token for the Hub. Default: the token of the user who is logged in."}
    )
    cache_dir: Optional[str] = field(
        default=None, metadata={"help": "Folder for downloads and features. Default: the Hugging Face cache."}
    )
    streaming: bool = field(
        default=True,
        metadata={
            "help": "Read the dataset while training, instead of downloading it first. Without streaming, features "
            "that are the same in each epoch are also made only once, which is all but those of long clips that "
            "training cuts at random places. They lie on disk, 0.5 MB a clip for AST and 1 MB for Whisper, in the "
            "folder softmoa_features of the folder for downloads, by default ~/.cache/huggingface/datasets. Delete it "
            "to free the space."
        },
    )
    max_length_seconds: Optional[float] = field(
        default=None,
        metadata={
            "help": "Longer clips are cut to this length: at a random place in training, otherwise at the start. Where "
            "the target is a text they are skipped. Training also cuts AST and Whisper themselves to it. Default: "
            "clips are not cut."
        },
    )
    channels: Optional[Channels] = field(
        default=None,
        metadata={
            "help": "What is read of recordings with several channels: mono (their mean), all (each of them), or the "
            "numbers of some from 0 on. Features of channels are normalized together, so that they keep their "
            "differences in level. Default: all for an adapter with num_channels, otherwise mono."
        },
    )
    on_bad_audio: Literal["skip", "raise"] = field(
        default="skip",
        metadata={"help": "Audio that cannot be used is skipped, counted and named in one warning, or is an error."},
    )
    shuffle_buffer: int = field(
        default=500,
        metadata={
            "help": "Number of undecoded rows from which training draws the next one.",
            "flag": "shuffle_buffer_size",
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the shuffling and of the random cuts."})

    @property
    def label_columns(self) -> list[str]:
        """The columns with the labels; none if `label_column` is None."""
        return self.label_column.split(",") if self.label_column else []

    def __post_init__(self) -> None:
        if self.max_length_seconds is not None and not self.max_length_seconds > 0:
            raise ValueError(f"`max_length_seconds` must be positive, got {self.max_length_seconds}.")
        if self.on_bad_audio not in ("skip", "raise"):
            raise ValueError(f"`on_bad_audio` must be 'skip' or 'raise', got '{self.on_bad_audio}'.")
        if self.shuffle_buffer < 0:
            raise ValueError(f"`shuffle_buffer` must not be negative, got {self.shuffle_buffer}.")
        object.__setattr__(self, "channels", parse_channels(self.channels))


OPTIONS = {entry.name: entry for entry in fields(DataOptions)}
# What scripts call the options.
FLAGS = {name: entry.metadata.get("flag", name) for name, entry in OPTIONS.items()}


def option(name: str, **changes: Any) -> Any:
    """A field of a script's arguments that stands for a field of `DataOptions`, with its default and help.

        label_column_name: str = option("label_column")

    Args:
        name (str): name of the field of `DataOptions`.
        changes: another `default` or `help`, or `more` to add to the help.

    Returns:
        dataclasses.Field: the field.
    """
    entry = OPTIONS[name]
    text = " ".join(filter(None, [changes.get("help", entry.metadata["help"]), changes.get("more")]))
    return field(default=changes.get("default", entry.default), metadata={"help": text})


def collect_options(*arguments: Any, **others: Any) -> DataOptions:
    """Make the options from the parsed arguments of a script.

    Args:
        arguments: objects with the arguments of the script, by the names of `FLAGS`.
        others: options by their own names, which count instead.

    Returns:
        DataOptions: the options; those that are no arguments of the script have their default.

    Raises:
        ValueError: if a value is not allowed.
    """
    parsed = {key: value for group in arguments for key, value in vars(group).items()}
    return DataOptions(**{name: parsed[flag] for name, flag in FLAGS.items() if flag in parsed} | others)


def flag_names(*classes: Any) -> dict[str, str]:
    """The flags of a script by the Python arguments that they stand for.

    Args:
        classes: dataclasses with the script's arguments.

    Returns:
        dict[str, str]: each flag, with its dashes, by the name of the argument.
    """
    arguments = {flag: name for name, flag in FLAGS.items()}
    return {arguments.get(entry.name, entry.name): f"--{entry.name}" for each in classes for entry in fields(each)}


@contextmanager
def name_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Let errors name the flags of a script, where the library names Python arguments.

    The library writes an argument between backticks, such as `rows` or `streaming=False`.

    Args:
        flags (mapping): what replaces an argument, by its name, or by its name and value as the library writes them.

    Raises:
        ValueError: the error of the library, with the flags in its message.
    """

    def replace(argument: re.Match[str]) -> str:
        name, value = argument.groups()
        whole = argument[0].strip("`")
        if whole in flags:
            return flags[whole]
        return " ".join([flags[name], *filter(None, [value and value.strip("'")])]) if name in flags else argument[0]

    try:
        yield
    except ValueError as error:
        error.args = (ARGUMENT.sub(replace, str(error)),)
        raise
