"""What the experts do while a model is trained, as a callback for the Hugging Face Trainer."""

from __future__ import annotations

import contextlib
from typing import Any, Optional

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .records import Record, record_routing
from .report import BlockReport, Statistics, short_names

METRICS = ("normalized_entropy", "effective_number", "coefficient_of_variation", "idle_experts", "effective_tokens")


class ExpertUtilizationCallback(TrainerCallback):
    """Logs how a model uses its experts in every so many optimizer steps, to whatever `report_to` names.

        trainer.add_callback(ExpertUtilizationCallback(trainer))

    An entry of the log has `experts/<block>/<metric>` for each adapted block and `experts/<metric>`, the mean over
    blocks, with the metrics `normalized_entropy`, `effective_number` and `coefficient_of_variation` of the experts'
    load, the number of `idle_experts`, and `effective_tokens`, from how many tokens a slot reads. They are those of
    all batches and processes of the step, as the model trains; `metrics.py` defines them. The steps between cost
    nothing.

    Args:
        trainer (Trainer): the Trainer, whose `log` is called.
        every (int): number of optimizer steps from one entry to the next; the first one is that of the first step.
            Default: 100.

    Raises:
        ValueError: if `every` is not positive.
    """

    def __init__(self, trainer: Trainer, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"`every` must be a positive number of optimizer steps, got {every}.")
        self.trainer = trainer
        self.every = every
        self.recording = contextlib.ExitStack()
        self.records: Optional[list[Record]] = None
        self.statistics: dict[tuple[str, str], Statistics] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what an earlier run that an error has ended has left."""
        self._stop()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to record, if it is this step's turn."""
        if state.global_step % self.every == 0:
            # With what may be around the model, such as its compiled form.
            self.records = self.recording.enter_context(record_routing(self.trainer.model_wrapped))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add up what a batch did after which no optimizer step comes."""
        self._add_up()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log what was recorded."""
        if self.records is None:
            return
        self._add_up()
        own = self.statistics
        self._stop()
        # As objects: where layers are dropped, not all processes have the same blocks.
        total: dict[tuple[str, str], Statistics] = {}
        for key, each in gather_object(list(own.items())):
            total.setdefault(key, Statistics()).merge(each)
        if not total:
            return  # no adapter is active, or all layers are dropped
        should_log = control.should_log
        self.trainer.log(utilization([each.result(*key) for key, each in total.items()]))
        control.should_log = should_log  # which `log` has taken back

    def _add_up(self) -> None:
        for record in self.records or ():
            self.statistics.setdefault((record.block, record.adapter), Statistics()).update(record)
        if self.records:
            self.records.clear()

    def _stop(self) -> None:
        self.recording.close()
        self.records, self.statistics = None, {}


def utilization(blocks: list[BlockReport]) -> dict[str, float]:
    """The entry of a log that tells how experts are used.

    Args:
        blocks (list[BlockReport]): the metrics of each block.

    Returns:
        dict[str, float]: the metrics of each block and their means, by name.
    """
    short = short_names([block.block for block in blocks])
    several = len({block.adapter for block in blocks}) > 1
    entry = {}
    for metric in METRICS:
        values = [block.scalars[metric] for block in blocks]
        for block, value in zip(blocks, values):
            name = short[block.block] + (f"/{block.adapter}" if several else "")
            entry[f"experts/{name}/{metric}"] = value
        entry[f"experts/{metric}"] = torch.tensor(values).mean().item()
    return entry
