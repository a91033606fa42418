"""The losses that tasks compute themselves, with the load-balancing loss of the routers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional

from torch import Tensor, nn

from ..calls.router_losses import router_aux_loss
from .tasks import Task


def loss_function(model: nn.Module, task: Task) -> Callable[..., Tensor]:
    """Make a function for the Trainer's `compute_loss_func`.

    Args:
        model (nn.Module): the model, or one that wraps it.
        task (Task): computes the loss.

    Returns:
        Callable: takes outputs, labels and `num_items_in_batch`, and returns the loss with that of the routers.
    """

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Optional[Tensor | int] = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        loss = task.loss(logits, labels, num_items_in_batch)
        balancing = router_aux_loss(model, task.counted(labels), num_items_in_batch)
        return loss if balancing is None else loss + balancing.to(loss.device)

    return compute


def compute_loss(model: nn.Module, inputs: Mapping[str, Any], task: Task) -> Tensor:
    """Compute the loss of a batch, in a loop of one's own.

    Args:
        model (nn.Module): the model.
        inputs (mapping): its inputs with `labels`.
        task (Task): what the labels are.

    Returns:
        Tensor: scalar.
    """
    # A model does not take the labels of mixed clips, which are no classes any more.
    if not (task.has_loss or inputs["labels"].is_floating_point()):
        loss: Tensor = model(**inputs).loss
        return loss
    given = dict(inputs)
    labels = given.pop("labels")
    return loss_function(model, task)(model(**given), labels)
