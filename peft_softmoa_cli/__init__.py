"""The start of the command `peft-softmoa`, which shows help and version without loading torch.

It is a package of its own, because importing `peft_softmoa` registers the method with PEFT, which takes seconds.
"""

import sys
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Print a stored page for `--help`, or run the command."""
    given = sys.argv[1:]
    if given[:1] == ["--version"]:
        print(f"peft-softmoa {version('peft-softmoa')}")
    elif page := _find_page(given):
        print(page, end="")
    else:
        from peft_softmoa.cli import main

        main()


def _find_page(given: list[str]) -> str:
    """The page that is asked for; empty if none is, or none is stored."""
    first = given[0] if given else "--help"
    pages = {path.stem: path for path in Path(__file__).with_name("pages").glob("*.txt")}
    if first in ("-h", "--help"):
        return pages["peft-softmoa"].read_text()
    if first in pages and {"-h", "--help"} & set(given):
        return pages[first].read_text()
    return ""
