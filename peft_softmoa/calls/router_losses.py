"""The load-balancing losses of a model's routers, on their way into the loss that the model returns.

A forward pass of the model in training collects them. Its end adds them up, so that each pass counts once: what
gradient checkpointing computes again in the backward pass is in no pass that collects.
"""

from __future__ import annotations

import warnings
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .forward_pass import ForwardPasses, find_passes
from .one_pass import ForwardPass


def router_aux_loss(
    model: nn.Module, labels: Optional[Tensor] = None, num_items_in_batch: Optional[Tensor | int] = None
) -> Optional[Tensor]:
    """The load-balancing loss of this thread's latest forward pass of a model in training, summed over its routers.

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
    passes = _find_passes_with_loss(model)
    if passes is None or passes.router_loss.value is None:
        return None
    passes.router_loss.is_used = True
    return _share_of_step(labels, num_items_in_batch) * passes.router_loss.value


def used_router_aux_loss(model: nn.Module) -> Optional[Tensor]:
    """The loss of the latest pass, if it is trained with.

    Args:
        model (nn.Module): the model, or one that wraps it.

    Returns:
        Tensor, optional: scalar, detached; None if there is none, or if nobody has added it to another loss.
    """
    passes = _find_passes_with_loss(model)
    if passes is None or passes.router_loss.value is None or not passes.router_loss.is_used:
        return None
    return passes.router_loss.value.detach()


def _find_passes_with_loss(model: nn.Module) -> Optional[ForwardPasses]:
    return next((passes for passes in find_passes(model) if passes.router_loss.value is not None), None)


def begin_router_losses(passes: ForwardPasses, model: nn.Module) -> None:
    """Let the pass that begins collect the losses of its routers, if the model is trained.

    Args:
        passes (ForwardPasses): the passes of the model.
        model (nn.Module): the model.
    """
    latest = passes.router_loss
    if latest.value is not None and not latest.is_used:
        warnings.warn(
            "The load-balancing loss of the latest training pass was not used: the model returned no loss to which it "
            "could be added. Add peft_softmoa.router_aux_loss(model) to the loss that is computed outside.",
            stacklevel=4,
        )
    latest.value, latest.is_used = None, False
    passes.current.router_losses = [] if model.training else None


def add_router_losses(passes: ForwardPasses, ended: ForwardPass, kwargs: dict[str, Any], output: Any) -> Any:
    """Add the losses of the routers in a pass to the loss that the model returns, if it returns one.

    Args:
        passes (ForwardPasses): the passes of the model, which keep the sum.
        ended (ForwardPass): the pass.
        kwargs (dict): what the model was called with by name.
        output (Any): what the model returns; None if it has failed.

    Returns:
        Any: the output, with the losses added.

    Raises:
        ValueError: if the losses have no gradient, under reentrant gradient checkpointing.
    """
    losses = ended.router_losses
    if not losses or output is None:
        return output
    if torch.is_grad_enabled() and not all(loss.requires_grad for loss in losses):
        raise ValueError(
            'The load-balancing loss of `routing="top_k"` has no gradient under reentrant checkpointing. Use '
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or set `router_aux_loss_coef=0.0`."
        )
    total = torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
    loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        passes.router_loss.value = total
        return output
    passes.router_loss.value, passes.router_loss.is_used = total.detach(), True
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
