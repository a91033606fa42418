"""`peft-softmoa recipes`."""

from __future__ import annotations

from ..recipes import find_recipe, list_recipes
from .parser import CommandParser


def make_parser() -> CommandParser:
    """The arguments of the verb.

    Returns:
        CommandParser: its parser.
    """
    parser = CommandParser("recipes")
    parser.add_argument("name", nargs="?", help="The one to print. Default: all are listed.")
    return parser


def main(arguments: list[str]) -> None:
    """List the recipes, or print one.

    Args:
        arguments (list[str]): the words after the verb.
    """
    [given] = make_parser().parse(arguments)
    if given.name:
        print(find_recipe(given.name).read_text(), end="")
        return
    recipes = list_recipes()
    width = max(map(len, recipes))
    for name, purpose in recipes.items():
        print(f"{name.ljust(width)}  {purpose}")
