"""Gradient checkpointing of a frozen model: reentrant checkpoints need inputs that require gradients."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def require_input_gradients(encoder: nn.Module) -> RemovableHandle:
    """Make the input of an encoder, or of a layer, require gradients whenever it is under reentrant checkpointing.

    Such a checkpoint drops the gradients of a layer whose input needs none, and nothing before the first adapter does.
    What transformers offers for that needs input embeddings, which most audio models do not have. Later versions of
    transformers run a layer's hooks outside of its checkpoint, earlier ones inside, where it is too late: then the
    encoder's have to do it.

    Args:
        encoder (nn.Module): the module that has the list of layers, or a layer.

    Returns:
        RemovableHandle: removes the hook that does it.
    """
    checkpointed = [module for module in encoder.modules() if hasattr(module, "gradient_checkpointing")]
    return encoder.register_forward_pre_hook(partial(_require_gradients, checkpointed), with_kwargs=True)


def _require_gradients(
    checkpointed: list[nn.Module], encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Optional[tuple[tuple[Any, ...], dict[str, Any]]]:
    if not (torch.is_grad_enabled() and any(map(_is_reentrant, checkpointed))):
        return None
    values: list[Any] = list(args)
    options = dict(kwargs)
    given: Any
    for given, key in [*((values, index) for index in range(len(values))), *((options, name) for name in options)]:
        if isinstance(given[key], Tensor) and given[key].is_floating_point():
            if not given[key].requires_grad:
                # A copy: what requires gradients itself must not be written to in place, as some encoders do.
                given[key] = given[key].detach().requires_grad_().clone()
            break
    return tuple(values), options


def _is_reentrant(module: nn.Module) -> bool:
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    return (
        module.training
        and bool(module.gradient_checkpointing)
        and getattr(checkpoint, "keywords", {}).get("use_reentrant", True)
    )
