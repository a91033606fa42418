"""The command `peft-softmoa`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, HfArgumentParser

from .arguments import AdapterArguments, make_config
from .saving.contents import check_adapter
from .targets.description import describe_targets

USAGE = """peft-softmoa targets MODEL [options]    show what an adapter would adapt in a model
       peft-softmoa check ADAPTER [options]    show what somebody's adapter would change, or refuse it
       peft-softmoa inspect ADAPTER [options]  see what the experts of an adapter do"""


@dataclass
class TargetsArguments:
    """Which model is looked at."""

    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules apart from the adapter that are trained and saved with it."}
    )
    label_names: Optional[list[str]] = field(
        default=None, metadata={"help": "The classes of the head in modules_to_save, if the model has others."}
    )


def main(arguments: Optional[list[str]] = None) -> None:
    """Run a command: `peft-softmoa targets MODEL`, `peft-softmoa check ADAPTER` or `peft-softmoa inspect ADAPTER`.

    `targets` prints what an adapter would adapt in a model, of which only the config is loaded; the fields of
    `SoftMoAConfig` are options. `check` prints what an adapter would change, from its files alone. `inspect` writes a
    report of what the experts of an adapter do.

    Args:
        arguments (list[str], optional): the words after the command. Default: those of this process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    commands = {"targets": show_targets, "check": check, "inspect": inspect}
    parser = ArgumentParser(prog="peft-softmoa", usage=USAGE)
    parser.add_argument("command", choices=commands)
    command = parser.parse_args(given[:1]).command
    try:
        commands[command](given[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"peft-softmoa: {error}")


def show_targets(arguments: list[str]) -> None:
    """Print what an adapter would adapt in a model.

    Args:
        arguments (list[str]): the words after `targets`.
    """
    groups: list[Any] = [TargetsArguments, AdapterArguments]
    parser = HfArgumentParser(groups, prog="peft-softmoa targets")
    parser.add_argument("model", help="Id on the Hub or folder of the model; only its config is loaded.")
    options, adapter, rest = parser.parse_args_into_dataclasses(arguments)
    model = empty_model(rest.model, options.revision)
    config = make_config(adapter, modules_to_save=options.modules_to_save, label_names=options.label_names)
    print(describe_targets(model, config))


def check(arguments: list[str]) -> None:
    """Print what an adapter would change, or refuse it.

    Args:
        arguments (list[str]): the words after `check`.
    """
    parser = ArgumentParser(prog="peft-softmoa check")
    parser.add_argument("adapter", help="Id on the Hub or folder of the adapter; nothing of it is loaded into a model.")
    parser.add_argument("--revision", help="Branch, tag or commit of the adapter.")
    parser.add_argument("--subfolder", help="Where the adapter is in there.")
    given = parser.parse_args(arguments)
    print(check_adapter(given.adapter, subfolder=given.subfolder, revision=given.revision))


def inspect(arguments: list[str]) -> None:
    """Write a report of what the experts of an adapter do.

    Args:
        arguments (list[str]): the words after `inspect`.
    """
    # Only here, because they load matplotlib and datasets.
    from .inspection.arguments import InspectArguments
    from .inspection.inspect_adapter import inspect_adapter
    from .training.options import collect_options, flag_names, name_flags

    parser = HfArgumentParser(InspectArguments, prog="peft-softmoa inspect")  # type: ignore[arg-type]
    parser.add_argument("adapter", help="Id on the Hub or folder of the adapter.")
    given, rest = parser.parse_args_into_dataclasses(arguments)
    with name_flags(flag_names(InspectArguments)):
        page = inspect_adapter(
            rest.adapter,
            given.output_dir,
            audio=given.audio,
            dataset=given.dataset,
            split=given.split,
            rows=given.rows,
            options=collect_options(given),
            revision=given.revision,
            max_clips=given.max_clips,
            batch_size=given.batch_size,
        )
    print(f"The report is in {page}")


def empty_model(name: str, revision: str = "main") -> nn.Module:
    """Make a model from its config, without weights.

    Args:
        name (str): id on the Hub, or a folder.
        revision (str): branch, tag or commit. Default: `"main"`.

    Returns:
        nn.Module: the model on the meta device, of the class that its config names.
    """
    config = AutoConfig.from_pretrained(name, revision=revision)
    classes = [getattr(transformers, architecture, None) for architecture in config.architectures or ()]
    model_class = next((each for each in classes if hasattr(each, "_from_config")), None)
    with torch.device("meta"):
        return model_class._from_config(config) if model_class else AutoModel.from_config(config)
