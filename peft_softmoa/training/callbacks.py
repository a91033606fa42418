"""Callbacks for the Hugging Face Trainer."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..calls.router_losses import used_router_aux_loss


class LogRouterLoss(TrainerCallback):
    """Logs `router_aux_loss`, the part of the training loss that balances the experts of `routing="top_k"`.

    The model itself adds it to its loss. This callback logs it separately whenever the Trainer logs the loss, as a mean
    over the batches and processes since the last entry. It logs nothing if the loss has no such part.

        trainer.add_callback(LogRouterLoss(trainer))

    Args:
        trainer (Trainer): the Trainer, whose `log` is called.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.total: Tensor | float = 0.0
        self.count = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the sums of an earlier run."""
        self.total, self.count = 0.0, 0

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the loss of a batch that is not followed by an optimizer step."""
        self._add(kwargs.get("model"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the loss of a batch, and log."""
        self._add(kwargs.get("model"))
        self._log(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log, if the Trainer logs once per epoch."""
        self._log(control)

    def _add(self, model: Optional[torch.nn.Module]) -> None:
        loss = None if model is None else used_router_aux_loss(model)
        if loss is not None:
            self.total, self.count = self.total + loss, self.count + 1

    def _log(self, control: TrainerControl) -> None:
        if control.should_log and self.count:
            mean = self.trainer.accelerator.gather(torch.as_tensor(self.total / self.count)).mean()
            self.total, self.count = 0.0, 0
            self.trainer.log({"router_aux_loss": mean.item()})
            control.should_log = True  # `log` has reset it, but the Trainer's own entry comes after this one
