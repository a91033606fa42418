"""Running statistics of a frozen model, such as those of batch norms, which training would move."""

from __future__ import annotations

from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle


def freeze_statistics(model: nn.Module) -> list[RemovableHandle]:
    """Let the norms of a frozen model use their running statistics in training, too, and leave them as they are.

    An adapter that is trained while they move fits the statistics of its own training, which are not saved with it.
    Norms whose own parameters are trained are left alone, as are those that an adapter trains and saves whole.

    Args:
        model (nn.Module): the base model, with the adapter.

    Returns:
        list[RemovableHandle]: remove the hooks that do it; empty if there are no such norms.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    saved = {id(module) for wrapper in wrappers for module in wrapper.modules_to_save.modules()}
    norms = [
        module
        for module in model.modules()
        if getattr(module, "running_mean", None) is not None and id(module) not in saved
    ]
    return [norm.register_forward_pre_hook(_use_running_statistics) for norm in norms]


def _use_running_statistics(norm: nn.Module, args: tuple[Any, ...]) -> None:
    if norm.training and not any(parameter.requires_grad for parameter in norm.parameters(recurse=False)):
        norm.eval()
