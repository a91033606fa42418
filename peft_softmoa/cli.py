"""The command `peft-softmoa`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, HfArgumentParser

from .arguments import AdapterArguments
from .config import SoftMoAConfig
from .describe import describe_targets

USAGE = "peft-softmoa targets MODEL [options]"


@dataclass
class TargetsArguments:
    """Which model is looked at."""

    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules apart from the adapter that are trained and saved with it."}
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
        print(describe_targets(model, SoftMoAConfig(**vars(adapter), modules_to_save=options.modules_to_save)))
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
    model_class = next(filter(None, classes), None)
    with torch.device("meta"):
        return model_class._from_config(config) if model_class else AutoModel.from_config(config)
