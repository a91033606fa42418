"""The metrics of a model's mixtures over a dataset, and what they mean in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from .blocks import BlockReport, Statistics
from .confusion import Confusion, Predictions
from .findings import Finding, find_preferences, find_problems
from .records import record_routing


@dataclass(frozen=True)
class ExpertReport:
    """What the experts of a model do over a dataset.

    Args:
        blocks (tuple[BlockReport, ...]): one for each adapter of each block, in the order in which they run.
        num_clips (int): number of clips.
        label_names (tuple[str, ...], optional): names of the classes.
        no_classes_reason (str, optional): why there is nothing about classes. Default: there is.
        confusion (Confusion, optional): which class the model takes clips for.
        no_confusion_reason (str, optional): why there are classes and no such numbers. Default: there are.
    """

    blocks: tuple[BlockReport, ...]
    num_clips: int
    label_names: Optional[tuple[str, ...]] = None
    no_classes_reason: Optional[str] = None
    confusion: Optional[Confusion] = None
    no_confusion_reason: Optional[str] = None

    @property
    def names(self) -> dict[tuple[str, str], str]:
        """Short names of the blocks, by block and adapter."""
        short = short_names([block.block for block in self.blocks])
        several = len({block.adapter for block in self.blocks}) > 1
        return {
            (each.block, each.adapter): short[each.block] + (f" ({each.adapter})" if several else "")
            for each in self.blocks
        }

    @property
    def findings(self) -> list[Finding]:
        """Notable facts: the problems of all blocks, then the classes that experts prefer, strongest first."""
        return self.problems + find_preferences(self.blocks, self.names, self.label_names or ())

    @property
    def problems(self) -> list[Finding]:
        """Experts of little use, in the order of the blocks."""
        names = self.names
        return [finding for block in self.blocks for finding in find_problems(block, names[block.block, block.adapter])]

    @property
    def summary(self) -> str:
        """The result in one or two sentences."""
        count = len(self.blocks)
        if all(block.num_experts == 1 for block in self.blocks):
            return "Each block has one expert, which reads all tokens."
        numbers = [block.scalars["effective_number"] / block.num_experts for block in self.blocks]
        problems = {(each.block, each.kind) for each in self.problems}
        over = "one clip" if self.num_clips == 1 else f"{self.num_clips} clips"
        text = (
            f"Over {over}, the load is spread as it would be over {sum(numbers) / count:.0%} of the experts, all equal "
            f"(mean of {count} block{'s' if count > 1 else ''})."
        )
        if not problems:
            return f"{text} No expert is idle or silent, and no two read the same tokens."
        parts = {
            "silent": "with experts that add nothing",
            "idle": "with idle experts",
            "similar": "with experts that read the same tokens",
            "uniform": "with experts that read all tokens alike",
        }
        found = [(sum(kind == each for _, each in problems), text) for kind, text in parts.items()]
        return f"{text} Blocks {', '.join(f'{text}: {number}' for number, text in found if number)}."

    def to_dict(self) -> dict[str, Any]:
        """All numbers, in types that JSON has."""
        return {
            "num_clips": self.num_clips,
            "label_names": self.label_names,
            "no_classes_reason": self.no_classes_reason,
            "summary": self.summary,
            "accuracy": None if self.confusion is None else self.confusion.accuracy,
            "confusion": None if self.confusion is None else self.confusion.counts.tolist(),
            "output_names": None if self.confusion is None else self.confusion.output_names,
            "no_confusion_reason": self.no_confusion_reason,
            "findings": [finding._asdict() for finding in self.findings],
            "blocks": [
                {
                    "block": block.block,
                    "adapter": block.adapter,
                    "num_tokens": block.num_tokens,
                    **{name: value if math.isfinite(value) else None for name, value in block.scalars.items()},
                    "load": block.load.tolist(),
                    "output_share": block.output_share.tolist(),
                    "idle": block.idle,
                    "silent": block.silent,
                    "similar": block.similar,
                    "uniform": block.uniform,
                    "effective_tokens_by_slot": block.effective_tokens.tolist(),
                    "expert_similarity": block.expert_similarity.tolist(),
                    "slot_similarity_by_pair": block.slot_similarity.tolist(),
                    "class_loads": None if block.class_loads is None else block.class_loads.tolist(),
                    "class_clips": None if block.class_clips is None else block.class_clips.tolist(),
                }
                for block in self.blocks
            ],
        }


def expert_report(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    label_names: Optional[Sequence[str]] = None,
    show_progress: bool = True,
) -> ExpertReport:
    """Report what the experts of a model do over a dataset, in one pass and constant memory.

    Args:
        model (nn.Module): a model with Soft-MoA adapters; it is evaluated, without gradients.
        dataloader (iterable of mappings): batches of the model's inputs. With `labels`, `(B,)` integer, the report
            says which experts the classes use and, of a model of these classes, which class it takes clips for.
        label_names (sequence of str, optional): names of the classes. Default: those of the model's config.
        show_progress (bool): whether to show a progress bar. Default: True.

    Returns:
        ExpertReport: the metrics, and notable facts in words.

    Raises:
        ValueError: if the model has no Soft-MoA adapter, or gives numbers that are not finite, there is no batch, a
            batch is no mapping, or a label is none of the classes.
    """
    if label_names is None:
        id2label = getattr(getattr(model, "config", None), "id2label", None) or {}
        label_names = [id2label[index] for index in sorted(id2label)]
    device = next(model.parameters()).device
    statistics: dict[tuple[str, str], Statistics] = {}
    predictions = Predictions(model, label_names)
    no_classes_reason = None
    num_clips = 0
    was_training = model.training
    model.eval()
    try:
        with record_routing(model) as records, torch.no_grad():
            for batch in tqdm(
                dataloader, desc="Recording experts", unit=" batches", disable=None if show_progress else True
            ):
                if not isinstance(batch, Mapping):
                    raise ValueError(
                        f"A batch must be a dict of the model's inputs, got {type(batch).__name__}. Use the Trainer's "
                        "data collator, or one like it."
                    )
                labels = batch.get("labels")
                no_classes_reason = no_classes_reason or _why_no_classes(labels, len(label_names))
                # The model must not see labels of other classes than its own: they would be an error.
                unused = () if no_classes_reason else ("labels",)
                labels = None if no_classes_reason else labels
                inputs = {name: value for name, value in batch.items() if name not in unused}
                output = model(**send_to_device(inputs, device))
                if labels is not None:
                    predictions.update(output, labels)
                num_clips += len(next(value for value in batch.values() if isinstance(value, Tensor)))
                for record in records:
                    key = (record.block, record.adapter)
                    statistics.setdefault(key, Statistics(len(label_names))).update(record, labels)
                records.clear()
    finally:
        model.train(was_training)
    if not statistics:
        raise ValueError("There is nothing to report: the dataset has no batch, or no adapter of the model is active.")
    if no_classes_reason:
        for each in statistics.values():
            each.sums.pop("class_loads", None), each.sums.pop("class_clips", None)
    blocks = tuple(each.result(*key) for key, each in statistics.items())
    for block in blocks:
        if not (block.load.isfinite().all() and block.output_share.isfinite().all()):
            raise ValueError(
                f"In the block '{block.block}' the adapter '{block.adapter}' gives numbers that are not finite: it has "
                "diverged, or its base model has. Train it again with a smaller learning rate."
            )
    return ExpertReport(
        blocks,
        num_clips,
        None if no_classes_reason else tuple(label_names),
        no_classes_reason,
        None if no_classes_reason else predictions.result(),
        None if no_classes_reason else predictions.why_none,
    )


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Shorten names of modules by the prefix that all share, such as to `layers.0.attention`.

    Args:
        names (sequence of str): names of modules.

    Returns:
        dict[str, str]: the short names.
    """
    parts = [name.split(".") for name in names]
    # A name keeps its first number, and the word before the number.
    numbers = [next((index for index, part in enumerate(each) if part.isdigit()), len(each)) for each in parts]
    common = 0
    while all(len(each) > common + 1 and each[common] == parts[0][common] for each in parts) and (
        common < min(numbers, default=0) - 1
    ):
        common += 1
    return {name: ".".join(part[common:]) for name, part in zip(names, parts)}


def _why_no_classes(labels: Any, num_classes: int) -> Optional[str]:
    if labels is None:
        return "the dataset has no labels"
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return "the labels are not one class for each clip"
    if not num_classes:
        return "the names of the classes are not known"
    wrong = [label for label in labels.tolist() if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(
            f"A clip's label {wrong[0]} is none of the {num_classes} classes of the model. Give the names of the "
            "dataset's classes as `label_names`."
        )
    return None
