"""The load-balancing losses of a model's routers, on their way into the loss that the model returns.

Hooks on the model open a list in every adapted block before a forward pass and add up what is in them after it. So
each pass counts once: what gradient checkpointing computes again in the backward pass finds no open list.
"""

from __future__ import annotations

import warnings
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .layer import SoftMoALayer

# Attribute of the model that holds the loss of its latest pass.
LATEST = "_softmoa_router_aux_loss"


class _Latest:
    """Holds the loss of the latest pass, whether anybody has added it to another, and the hooks that collect it.

    Copies of the model do not get the loss: a tensor with a history cannot be copied.
    """

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self.loss: Optional[Tensor] = None
        self.used = False
        self.handles = handles
        self.adapters = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loss": None, "used": False}


class _Losses(list):
    """Losses that a forward pass collects; copies are empty, also of one that an error has left behind."""

    def __reduce__(self) -> tuple:
        return _Losses, ()


def router_aux_loss(
    model: nn.Module, labels: Optional[Tensor] = None, num_items_in_batch: Optional[Tensor | int] = None
) -> Optional[Tensor]:
    """The load-balancing loss of a model's latest forward pass in training, weighted and summed over its routers.

    The model adds it to its own loss. Where the model returns none, because the loss is computed outside, add it there.
    In a Trainer that is its `compute_loss_func`, which has to sum up to the step's loss over all batches of a step:

        def compute_loss(outputs, labels, num_items_in_batch=None):
            loss = cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
            return loss + router_aux_loss(model, labels, num_items_in_batch)

    Args:
        model (nn.Module): the model, or one that wraps it, such as a `PeftModel`.
        labels (Tensor, optional): the labels of the batch; those that are -100 do not count. Default: not known.
        num_items_in_batch (Tensor or int, optional): how many labels all batches of the optimizer step have. With it
            the loss is multiplied by this batch's share of them. Default: the batch is the whole step.

    Returns:
        Tensor, optional: scalar; detached if the model has added it already. None after a pass without such a loss:
        in evaluation, or without an active adapter with `routing="top_k"`.
    """
    latest = _find_latest(model)
    if latest is None or latest.loss is None:
        return None
    latest.used = True
    return _share_of_step(labels, num_items_in_batch) * latest.loss


def used_router_aux_loss(model: nn.Module) -> Optional[Tensor]:
    """The loss of the latest pass, if it is trained with.

    Args:
        model (nn.Module): the model, or one that wraps it.

    Returns:
        Tensor, optional: scalar, detached; None if there is none, or if nobody has added it to another loss.
    """
    latest = _find_latest(model)
    return None if latest is None or latest.loss is None or not latest.used else latest.loss.detach()


def _find_latest(model: nn.Module) -> Optional[_Latest]:
    return next((getattr(module, LATEST) for module in model.modules() if hasattr(module, LATEST)), None)


class Collecting:
    """Makes a model add the losses of an adapter's routers to the loss that it returns, in training.

    Args:
        model (nn.Module): the base model, with adapters or before it gets them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        if not hasattr(model, LATEST):
            handles = [model.register_forward_pre_hook(_open), model.register_forward_hook(_add, with_kwargs=True)]
            setattr(model, LATEST, _Latest(handles))
        getattr(model, LATEST).adapters += 1

    def remove(self) -> None:
        """Stop it, with the last adapter that needs it."""
        latest = getattr(self.model, LATEST)
        latest.adapters -= 1
        if not latest.adapters:
            for handle in latest.handles:
                handle.remove()
            delattr(self.model, LATEST)


def _open(model: nn.Module, args: tuple) -> None:
    latest = getattr(model, LATEST)
    if latest.loss is not None and not latest.used:
        warnings.warn(
            "The load-balancing loss of the latest training pass was not used: the model returned no loss to which it "
            "could be added. Add peft_softmoa.router_aux_loss(model) to the loss that is computed outside.",
            stacklevel=4,
        )
    latest.loss, latest.used = None, False
    for module in model.modules():
        if isinstance(module, SoftMoALayer):
            module.router_losses = _Losses() if model.training else None


def _add(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    losses: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, SoftMoALayer):
            losses += module.router_losses or ()
            module.router_losses = None
    if not losses:
        return output
    if torch.is_grad_enabled() and not all(loss.requires_grad for loss in losses):
        raise ValueError(
            'The load-balancing loss of `routing="top_k"` has no gradient under reentrant checkpointing. Use '
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or set `router_aux_loss_coef=0.0`."
        )
    total = torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
    latest = getattr(model, LATEST)
    loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        latest.loss = total
        return output
    latest.loss, latest.used = total.detach(), True
    share = _share_of_step(kwargs.get("labels"), kwargs.get("num_items_in_batch"))
    loss = loss + (share * total).to(loss.device, loss.dtype)
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output


def _share_of_step(labels: Optional[Tensor], num_items: Optional[Tensor | int]) -> Tensor | float:
    """The share of a batch in its optimizer step.

    If a model takes it, the Trainer tells it how many labels all batches of a step have, and then adds up the losses of
    the step's batches. Otherwise it takes the mean of their losses. Some models, such as wav2vec 2.0's classifier, take
    it and do not divide by it; their own loss is then a sum over the batches, but this one still counts once a step.
    """
    if labels is None or num_items is None:
        return 1.0
    return labels.ne(-100).sum() / num_items
