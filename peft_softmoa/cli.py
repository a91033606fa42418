"""The command `peft-softmoa`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, HfArgumentParser

from .arguments import AdapterArguments, make_config
from .describe import describe_targets

USAGE = "peft-softmoa targets MODEL [options]"


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
    """Print what an adapter would adapt in a model: `peft-softmoa targets MODEL`, an id on the Hub or a folder.

    Only the model's config is loaded. The fields of `SoftMoAConfig` are options.

    Args:
        arguments (list[str], optional): the words after the command. Default: those of this process.
    """
    groups: list[Any] = [TargetsArguments, AdapterArguments]
    parser = HfArgumentParser(groups, prog="peft-softmoa", usage=USAGE)
    parser.add_argument("command", choices=["targets"], help="Show what an adapter would adapt in a model.")
    parser.add_argument("model", help="Id on the Hub or folder of the model; only its config is loaded.")
    options, adapter, rest = parser.parse_args_into_dataclasses(arguments)
    try:
        model = empty_model(rest.model, options.revision)
        config = make_config(adapter, modules_to_save=options.modules_to_save, label_names=options.label_names)
        print(describe_targets(model, config))
    except (ValueError, OSError) as error:
        sys.exit(f"peft-softmoa: {error}")


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
