"""The arguments of a verb of `peft-softmoa`: groups of options, help, errors and config files."""

from __future__ import annotations

import difflib
import json
import textwrap
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn, Optional

import yaml
from transformers import HfArgumentParser

from ..recipes import find_recipe
from . import VERBS

# The same everywhere: the pages are stored. Where the explanation of an option begins, and where a line ends.
COLUMN, WIDTH = 26, 80


class CommandParser(HfArgumentParser):
    """The parser of a verb: `parse` gives what was parsed, `format_help` the verb's page.

        parser = CommandParser("train", {"Model": ModelArguments}, hidden={"Trainer": TrainingArguments})
        parser.add_argument("dataset", help="Folder of the dataset.")
        model, training, rest = parser.parse(arguments)

    Args:
        verb (str): the verb, one of `VERBS`, which say what it does.
        groups (mapping): dataclasses whose fields are options, by the titles of their sections of the help.
        hidden (mapping): further ones, which only `--help-all` shows.
        shown (mapping): names of fields of those that the help shows all the same, by the titles of their sections.
        takes_config (bool): whether `--config` names a YAML file with options. Default: no.
    """

    def __init__(
        self,
        verb: str,
        groups: Mapping[str, Any] | None = None,
        *,
        hidden: Mapping[str, Any] | None = None,
        shown: Mapping[str, Sequence[str]] | None = None,
        takes_config: bool = False,
    ) -> None:
        self.actions: list[Action] = []
        self.groups, self.hidden, self.takes_config = dict(groups or {}), dict(hidden or {}), takes_config
        self.shown = dict(shown or {})
        super().__init__(
            [*self.groups.values(), *self.hidden.values()],
            prog=f"peft-softmoa {verb}",
            description=VERBS[verb],
            allow_abbrev=False,
            add_help=False,
        )
        if takes_config:
            self.add_argument(
                "--config",
                metavar="FILE",
                help="YAML file with options, or the name of a recipe of `peft-softmoa recipes`; options that are "
                "given override it.",
            )
        self.add_argument("-h", "--help", action="help", help="Show this page.")
        if hidden:
            self.add_argument("--help-all", action=_ShowAll, nargs=0, default=SUPPRESS, help="Show all options.")

    def add_argument(self, *names: Any, **options: Any) -> Action:
        """Add an argument, as in `argparse`.

        Args:
            names: its name, or its flags.
            options: what it is.

        Returns:
            Action: the argument.
        """
        action: Action = super().add_argument(*names, **options)
        self.actions.append(action)
        return action

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Parse the words after the verb.

        Args:
            arguments (sequence of str): the words. They override the file that `--config` names.

        Returns:
            tuple: an instance of each dataclass, in their order, and last a `Namespace` with the other arguments.

        Raises:
            ValueError: if the file of `--config` has something else than options of this verb, or a dataclass refuses
                a value.
            OSError: if there is no such file.
        """
        given = list(arguments)
        if self.takes_config:
            files = ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
            files.add_argument("--config")
            file, given = files.parse_known_args(given)
            if file.config:
                given = [*self.read_config(file.config), *given]
        self._refuse_unknown(given)
        values = vars(self.parse_args(given))
        made = [
            each(**{entry.name: values.pop(entry.name) for entry in fields(each) if entry.init})
            for each in self.dataclass_types
        ]
        values.pop("config", None)
        return (*made, Namespace(**values))

    def read_config(self, name: str) -> list[str]:
        """Read options from a YAML file.

        Args:
            name (str): the file, or the name of a recipe of the package.

        Returns:
            list[str]: the options as words of a command line.

        Raises:
            ValueError: if it has something else than options of this verb.
            OSError: if there is no such file.
        """
        given = yaml.safe_load(find_recipe(name).read_text())
        known = {action.dest: action for action in self.actions if action.option_strings}
        for other in ("config", "help", "help_all"):
            known.pop(other, None)
        unknown = sorted(map(str, given.keys() - known)) if isinstance(given, dict) else ["no fields at all"]
        if unknown:
            raise ValueError(
                f"'{name}' has {', '.join(unknown)}, which this command does not take. Correct or remove it: --help "
                "lists all options."
            )
        arguments = []
        for option, value in given.items():
            if value is False and "no" in map(str, known[option].choices or ()):
                value = "no"  # YAML reads it as False
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            if value is not None:
                arguments += [f"--{option}", *map(str, values)]
        return arguments

    def error(self, message: str) -> NoReturn:
        """End the command with one line, and another one that points to the help.

        Args:
            message (str): what is wrong.
        """
        self.exit(2, f"{self.prog}: {message}\nSee `{self.prog} --help`.\n")

    def format_help(self, show_all: bool = False) -> str:
        """The verb's page, the same with all versions of Python and on terminals of any width.

        Args:
            show_all (bool): whether the hidden options are shown too. Default: no.

        Returns:
            str: the page.
        """
        sections = {title: {entry.name for entry in fields(each)} for title, each in self.groups.items()}
        sections |= {title: set(names) for title, names in self.shown.items()}
        if show_all:
            elsewhere = {name for names in self.shown.values() for name in names}
            for title, each in self.hidden.items():
                sections[title] = {entry.name for entry in fields(each)} - elsewhere
        in_groups = {entry.name for each in self.dataclass_types for entry in fields(each)}
        positional = [action for action in self.actions if not action.option_strings]
        others = [action for action in self.actions if action.option_strings and action.dest not in in_groups]
        others.sort(key=lambda action: action.dest in ("help", "help_all"))
        words = " ".join(_placeholder(action) for action in positional)
        lines = [f"usage: {self.prog} {words}{' ' if words else ''}[options]", ""]
        lines += [*textwrap.wrap(str(self.description), WIDTH), ""]
        for action in positional:
            lines += _entry(_placeholder(action), action)
        lines += [""] if positional else []
        for title, names in sections.items():
            lines += [f"{title}:"]
            for action in self.actions:
                if action.dest in names:
                    lines += _entry(f"{action.option_strings[0]} {_placeholder(action)}".rstrip(), action)
            lines += [""]
        lines += ["Other options:" if sections else "Options:"]
        for action in others:
            lines += _entry(f"{', '.join(action.option_strings)} {_placeholder(action)}".rstrip(), action)
        if self.hidden and not show_all:
            titles = " and ".join(self.hidden)
            lines += ["", *textwrap.wrap(f"`{self.prog} --help-all` shows all options of {titles}.", WIDTH)]
        return "\n".join(lines) + "\n"

    def _refuse_unknown(self, arguments: Sequence[str]) -> None:
        known = [flag for action in self.actions for flag in action.option_strings]
        for word in arguments:
            if word == "--":
                return
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in known:
                self.error(f"there is no option {flag}.{suggest(flag, known)}")


class _ShowAll(Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_help(show_all=True), end="")
        parser.exit()


def suggest(word: str, known: Sequence[str]) -> str:
    """A sentence that asks whether another word was meant.

    Args:
        word (str): what was given.
        known (sequence of str): what could have been meant.

    Returns:
        str: the sentence, after a space; empty if nothing is near.
    """
    near = difflib.get_close_matches(word, known, n=1)
    return f" Do you mean {near[0]}?" if near else ""


def _placeholder(action: Action) -> str:
    """What stands for the values of an argument."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        word = "{" + ",".join(map(str, action.choices)) + "}"
    elif action.metavar is not None or not action.option_strings:
        word = str(action.metavar or action.dest.upper())
    elif action.nargs == "?":
        word = "True|False"
    else:
        word = {int: "INTEGER", float: "NUMBER"}.get(action.type, "TEXT")  # type: ignore[call-overload]
    return {"?": f"[{word}]", "+": f"{word} ...", "*": f"[{word} ...]"}.get(str(action.nargs), word)


def _entry(term: str, action: Action) -> Iterator[str]:
    """The lines of one argument."""
    text = " ".join(str(action.help or "").split()) % vars(action)
    if action.option_strings and (default := _default(action)) and "Default:" not in text:
        text += f" Default: {default}."
    if action.option_strings and action.required:
        text += " Required."
    explained = textwrap.wrap(text, WIDTH - COLUMN, break_long_words=False, break_on_hyphens=False)
    if explained and len(term) <= COLUMN - 4:
        yield f"  {term}".ljust(COLUMN) + explained.pop(0)
    else:
        yield f"  {term}"
    yield from (" " * COLUMN + line for line in explained)


def _default(action: Action) -> Optional[str]:
    if action.nargs == 0 or action.default in (None, "", [], SUPPRESS):
        return None
    return " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
