"""`peft-softmoa export`."""

from __future__ import annotations

from ..inference.export import export_adapter
from .parser import CommandParser


def make_parser() -> CommandParser:
    """The arguments of the verb.

    Returns:
        CommandParser: its parser.
    """
    parser = CommandParser("export")
    parser.add_argument("adapter", help="Id on the Hub or folder of the adapter.")
    parser.add_argument("--output_dir", default="onnx", help="Folder for model.onnx and what is needed to run it.")
    parser.add_argument("--revision", help="Branch, tag or commit of the adapter.")
    parser.add_argument(
        "--base_model", help="Id on the Hub or folder of the base model. Default: what the adapter says."
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="Fix the length of the clips to so many seconds. Default: any length, if the model takes that.",
    )
    return parser


def main(arguments: list[str]) -> None:
    """Write a model with its adapter as an ONNX file, and say how far it is from PyTorch.

    Args:
        arguments (list[str]): the words after the verb.
    """
    [given] = make_parser().parse(arguments)
    print(
        export_adapter(
            given.adapter,
            given.output_dir,
            revision=given.revision,
            base_model=given.base_model,
            seconds=given.seconds,
        )
    )
