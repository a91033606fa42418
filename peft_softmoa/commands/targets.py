"""`peft-softmoa targets`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Optional

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel

from ..arguments import AdapterArguments, make_config
from ..config import SoftMoAConfig
from ..targets.budget import largest_r
from ..targets.description import describe_targets
from ..targets.sizes import compare_lora
from ..training.options import flag_names, name_flags
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


@dataclass
class ReportArguments:
    """What is shown."""

    budget: Optional[int] = field(
        default=None, metadata={"help": "The most parameters that may be trained: the largest r within is chosen."}
    )
    compare: Optional[Literal["lora"]] = field(
        default=None,
        metadata={"help": "Count also what a LoRA on the linear layers of the same blocks trains, at rank r."},
    )
    json: bool = field(default=False, metadata={"help": "Print JSON."})


# Errors of the library name Python arguments.
FLAGS = flag_names(TargetsArguments, ReportArguments, AdapterArguments) | {"parameters": "--budget"}


def make_parser() -> CommandParser:
    """The arguments of the verb.

    Returns:
        CommandParser: its parser.
    """
    parser = CommandParser(
        "targets", {"Model": TargetsArguments, "Report": ReportArguments, "Adapter": AdapterArguments}
    )
    parser.add_argument("model", help="Id on the Hub or folder of the model; only its config is loaded.")
    return parser


def main(arguments: list[str]) -> None:
    """Print what an adapter would adapt in a model.

    Args:
        arguments (list[str]): the words after the verb.
    """
    options, report, adapter, rest = make_parser().parse(arguments)
    model = empty_model(rest.model, options.revision)
    with name_flags(FLAGS):
        config = make_config(adapter, modules_to_save=options.modules_to_save, label_names=options.label_names)
        if report.budget is not None:
            config = fit_budget(model, config, report.budget)
        found = describe_targets(model, config)
    lora = None
    if report.compare:
        lora = compare_lora(model, found.targets, sum(found.parameters_by_block), config.r)
    if report.json:
        values: dict[str, Any] = {"r": config.r, **found.to_dict()}
        print(json.dumps(values | ({"lora": asdict(lora)} if lora else {}), indent=1))
        return
    print(found)
    if report.budget is not None:
        print(f"r={config.r} is the largest within {report.budget:,} parameters")
    if lora:
        print(lora)


def fit_budget(model: nn.Module, config: SoftMoAConfig, parameters: int) -> SoftMoAConfig:
    """Choose the largest `r` within a number of trainable parameters, as `SoftMoAConfig.for_budget`.

    Args:
        model (nn.Module): the base model.
        config (SoftMoAConfig): the config, whose `r` is left at its default.
        parameters (int): the most parameters that may be trained.

    Returns:
        SoftMoAConfig: the config with that `r`.

    Raises:
        ValueError: if `r` or `r_pattern` was given, or even `r=1` needs more.
    """
    if config.r != SoftMoAConfig().r:
        raise ValueError(f"`budget` finds r: leave out `r`, got {config.r}.")
    if config.r_pattern is not None:
        raise ValueError(f"`budget` finds r of all blocks: leave out `r_pattern`, got {config.r_pattern}.")
    return replace(config, r=largest_r(model, config, parameters))


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
