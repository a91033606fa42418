"""A callback for the Hugging Face Trainer that logs what the experts do during training."""

from __future__ import annotations

import contextlib
from typing import Any, Optional

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .blocks import BlockReport, Statistics
from .records import Record, record_routing
from .report import short_names

METRICS = ("normalized_entropy", "effective_number", "coefficient_of_variation", "idle_experts", "effective_tokens")


class ExpertUtilizationCallback(TrainerCallback):
    """Logs how a model uses its experts, every few optimizer steps, to the trackers that `report_to` names.

        trainer.add_callback(ExpertUtilizationCallback(trainer))

    An entry of the log has `experts/<block>/<metric>` for each adapted block and `experts/<metric>`, the mean over
    blocks, with the metrics `normalized_entropy`, `effective_number` and `coefficient_of_variation` of the experts'
    load, the number of `idle_experts`, and `effective_tokens`, the number of tokens that a slot reads. They cover all
    batches and processes of the step; `metrics.py` defines them. The other steps cost nothing.

    Args:
        trainer (Trainer): the Trainer, whose `log` is called.
        every (int): number of optimizer steps from one entry to the next; the first step has the first entry.
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
        """Forget the records of an earlier run that ended with an error."""
        self._stop()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to record, if this step is to be logged."""
        if state.global_step % self.every == 0:
            # The wrapped model, which may be compiled.
            self.records = self.recording.enter_context(record_routing(self.trainer.model_wrapped))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the records of a batch that is not followed by an optimizer step."""
        self._add_records()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the metrics of the step."""
        if self.records is None:
            return
        self._add_records()
        own = self.statistics
        self._stop()
        # As objects: with layer dropout, the processes may have different blocks.
        total: dict[tuple[str, str], Statistics] = {}
        for key, each in gather_object(list(own.items())):
            total.setdefault(key, Statistics()).merge(each)
        if not total:
            return  # no adapter is active, or all layers were dropped
        should_log = control.should_log
        self.trainer.log(utilization([each.result(*key) for key, each in total.items()]))
        control.should_log = should_log  # `log` has reset it

    def _add_records(self) -> None:
        for record in self.records or ():
            self.statistics.setdefault((record.block, record.adapter), Statistics()).update(record)
        if self.records:
            self.records.clear()

    def _stop(self) -> None:
        self.recording.close()
        self.records, self.statistics = None, {}


def utilization(blocks: list[BlockReport]) -> dict[str, float]:
    """Make a log entry of how the experts are used.

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
