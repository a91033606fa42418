"""The command `peft-softmoa`."""

from __future__ import annotations

import sys
import textwrap
from importlib import import_module
from importlib.metadata import version
from typing import Any, Optional

from .commands import VERBS
from .commands.parser import WIDTH, suggest


def main(arguments: Optional[list[str]] = None) -> None:
    """Run a verb of the command, such as `peft-softmoa targets MODEL`.

    Args:
        arguments (list[str], optional): the words after `peft-softmoa`. Default: those of this process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print(help_page(), end="")
        return
    if given[0] == "--version":
        print(f"peft-softmoa {version('peft-softmoa')}")
        return
    verb = given[0]
    if verb not in VERBS:
        print(f"peft-softmoa: there is no command {verb}.{suggest(verb, list(VERBS))}", file=sys.stderr)
        print("See `peft-softmoa --help`.", file=sys.stderr)
        sys.exit(2)
    try:
        load(verb).main(given[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"peft-softmoa {verb}: {' '.join(str(error).split())}")


def load(verb: str) -> Any:
    """The module of a verb, which is imported only when it is called.

    Args:
        verb (str): one of `VERBS`.

    Returns:
        module: it has `make_parser()` and `main(arguments)`.
    """
    return import_module(f".commands.{verb.replace('-', '_')}", __package__)


def help_page(verb: Optional[str] = None) -> str:
    """The page that `--help` shows.

    Args:
        verb (str, optional): one of `VERBS`. Default: the page of the whole command.

    Returns:
        str: the page.
    """
    if verb:
        page: str = load(verb).make_parser().format_help()
        return page
    width = max(map(len, VERBS)) + 2
    lines = [
        textwrap.fill(purpose, WIDTH, initial_indent=f"  {verb.ljust(width)}", subsequent_indent=" " * (width + 2))
        for verb, purpose in VERBS.items()
    ]
    return "\n".join(
        [
            "usage: peft-softmoa COMMAND ...",
            "",
            "Soft mixtures of adapters for audio transformers.",
            "",
            "Commands:",
            *lines,
            "",
            "`peft-softmoa COMMAND --help` explains a command; `--version` shows the version.",
            "",
        ]
    )
