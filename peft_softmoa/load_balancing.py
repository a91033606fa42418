"""The load-balancing losses of a model's routers, on their way into the loss that the model returns.

Hooks on the model open a list in every adapted block before a forward pass and add up what is in them after it. So
each pass counts once: what gradient checkpointing computes again in the backward pass finds no open list.
"""

from __future__ import annotations

import warnings
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .layer import SoftMoALayer

# Attribute of the model that holds the loss of its latest pass.
LATEST = "_softmoa_router_aux_loss"


class _Latest:
    """Holds the loss, but not in copies of the model: a tensor with a history cannot be copied."""

    def __init__(self) -> None:
        self.loss: Optional[Tensor] = None

    def __reduce__(self) -> tuple:
        return _Latest, ()


def router_aux_loss(model: nn.Module) -> Optional[Tensor]:
    """The load-balancing loss of a model's latest forward pass in training, weighted and summed over its routers.

    The model adds it to its own loss. Where the model returns none, because the loss is computed outside, add it there:

        loss = my_loss(model(input_values).logits, labels) + router_aux_loss(model)

    Args:
        model (nn.Module): the model, or one that wraps it, such as a `PeftModel`.

    Returns:
        Tensor, optional: scalar; detached if the model has added it already. None after a pass without such a loss:
        in evaluation, or without an active adapter with `routing="top_k"`.
    """
    return next((getattr(module, LATEST).loss for module in model.modules() if hasattr(module, LATEST)), None)


def collect_router_losses(model: nn.Module) -> None:
    """Make a model add the losses of its routers to the loss that it returns, in training.

    Args:
        model (nn.Module): the base model, with adapters or before it gets them.
    """
    if _open not in model._forward_pre_hooks.values():
        setattr(model, LATEST, _Latest())
        model.register_forward_pre_hook(_open)
        model.register_forward_hook(_add, with_kwargs=True)


def stop_collecting(model: nn.Module) -> None:
    """Undo `collect_router_losses`.

    Args:
        model (nn.Module): the base model.
    """
    for hooks, ours in ((model._forward_pre_hooks, _open), (model._forward_hooks, _add)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)
    if hasattr(model, LATEST):
        delattr(model, LATEST)


def _open(model: nn.Module, args: tuple) -> None:
    getattr(model, LATEST).loss = None
    if model.training:
        for module in model.modules():
            if isinstance(module, SoftMoALayer):
                module.router_losses = []


def _add(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    losses = []
    for module in model.modules():
        if isinstance(module, SoftMoALayer) and module.router_losses is not None:
            losses += module.router_losses
            module.router_losses = None
    if not losses:
        return output
    total = torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
    if torch.is_grad_enabled() and not total.requires_grad:
        raise ValueError(
            'The load-balancing loss of `routing="top_k"` has no gradient under reentrant checkpointing. Use '
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or set `router_aux_loss_coef=0.0`."
        )
    loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        getattr(model, LATEST).loss = total
        warnings.warn(
            "The model returns no loss, so its load-balancing loss is not in it. Add "
            "peft_softmoa.router_aux_loss(model) to the loss that is computed outside.",
            stacklevel=2,
        )
        return output
    getattr(model, LATEST).loss = total.detach()
    loss = loss + (_share_of_step(kwargs) * total).to(loss.device, loss.dtype)
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output


def _share_of_step(kwargs: dict[str, Any]) -> Tensor | float:
    """The share of a batch in its optimizer step.

    The Trainer tells models how many labels all batches of a step have, so that they return a sum over the batch
    divided by that; then the losses of the step's batches add up. Otherwise it takes the mean of their losses itself.
    """
    labels, num_items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    if not isinstance(labels, Tensor) or num_items is None:
        return 1.0
    return labels.ne(-100).sum() / num_items
