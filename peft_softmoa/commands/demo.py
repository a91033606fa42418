"""`peft-softmoa demo`."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from ..demo.run import describe_data, run_demo
from .parser import CommandParser


def make_parser() -> CommandParser:
    """The arguments of the verb.

    Returns:
        CommandParser: its parser.
    """
    parser = CommandParser("demo")
    parser.add_argument("--output_dir", metavar="FOLDER", help="Folder to keep everything in. Default: nothing stays.")
    return parser


def main(arguments: list[str]) -> None:
    """Train an adapter on synthesised sounds and use it.

    Args:
        arguments (list[str]): the words after the verb.
    """
    [given] = make_parser().parse(arguments)
    with contextlib.nullcontext(given.output_dir) if given.output_dir else tempfile.TemporaryDirectory() as folder:
        print(f"Training on {describe_data()}.")
        result = run_demo(Path(folder))
    print(f"\nTrainable parameters: {result.parameters:,}")
    print(f"Accuracy on the test clips: {result.accuracy_before:.0%} before, {result.accuracy:.0%} after")
    print(f"Size of the adapter on disk: {result.adapter_bytes / 1024:.0f} KiB")
    print(f"A fresh WAV file with a {result.label}: the reloaded adapter says {result.predicted} ({result.score:.0%})")
