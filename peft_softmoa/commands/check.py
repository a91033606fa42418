"""`peft-softmoa check`."""

from __future__ import annotations

from ..saving.contents import check_adapter
from .parser import CommandParser


def make_parser() -> CommandParser:
    """The arguments of the verb.

    Returns:
        CommandParser: its parser.
    """
    parser = CommandParser("check")
    parser.add_argument("adapter", help="Id on the Hub or folder of the adapter; nothing of it is loaded into a model.")
    parser.add_argument("--revision", help="Branch, tag or commit of the adapter.")
    parser.add_argument("--subfolder", help="Where the adapter is in there.")
    return parser


def main(arguments: list[str]) -> None:
    """Print what an adapter would change, or refuse it.

    Args:
        arguments (list[str]): the words after the verb.
    """
    [given] = make_parser().parse(arguments)
    print(check_adapter(given.adapter, subfolder=given.subfolder, revision=given.revision))
