"""`peft-softmoa targets`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel

from ..arguments import AdapterArguments, make_config
from ..targets.description import describe_targets
from .parser import CommandParser


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


def make_parser() -> CommandParser:
    """The arguments of the verb.

    Returns:
        CommandParser: its parser.
    """
    parser = CommandParser("targets", {"Model": TargetsArguments, "Adapter": AdapterArguments})
    parser.add_argument("model", help="Id on the Hub or folder of the model; only its config is loaded.")
    return parser


def main(arguments: list[str]) -> None:
    """Print what an adapter would adapt in a model.

    Args:
        arguments (list[str]): the words after the verb.
    """
    options, adapter, rest = make_parser().parse(arguments)
    model = empty_model(rest.model, options.revision)
    config = make_config(adapter, modules_to_save=options.modules_to_save, label_names=options.label_names)
    print(describe_targets(model, config))


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
