"""Recipes, which are YAML files with options of a training, and configs for `accelerate launch`."""

from __future__ import annotations

import difflib
from pathlib import Path

FOLDER = Path(__file__).parent


def list_recipes() -> dict[str, str]:
    """What the package has.

    Returns:
        dict[str, str]: the first line of each file, which says what it is for, by its name, such as `esc50` or
        `accelerate/ddp`.
    """
    paths = sorted(FOLDER.glob("*.yaml")) + sorted(FOLDER.glob("*/*.yaml"))
    return {
        path.relative_to(FOLDER).with_suffix("").as_posix(): path.read_text().splitlines()[0].lstrip("# ")
        for path in paths
    }


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Args:
        name (str): a name of `list_recipes`, or a file of one's own, which comes first.

    Returns:
        Path: the file.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    names = list(list_recipes())
    if name in names:
        return FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1)
    raise FileNotFoundError(
        f"'{name}' is neither a file nor a recipe. {f'Do you mean {near[0]}? ' if near else ''}"
        f"The recipes are {', '.join(names)}."
    )
