"""The metrics of a model's mixtures over a dataset, and what they mean in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Optional

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from .blocks import BlockReport, Statistics
from .records import record_routing

# An expert prefers a class if its load there is this many times its mean load in other classes, over at least this many
# clips.
PREFERENCE, PREFERENCE_CLIPS = 2.0, 5


class Finding(NamedTuple):
    """A notable fact about one or more experts."""

    kind: Literal["silent", "idle", "similar", "uniform", "class"]
    block: str  # name of the block in the base model
    adapter: str
    experts: tuple[int, ...]  # from 0
    text: str


@dataclass(frozen=True)
class ExpertReport:
    """What the experts of a model do over a dataset.

    Args:
        blocks (tuple[BlockReport, ...]): one for each adapter of each block, in the order in which they run.
        num_clips (int): number of clips.
        label_names (tuple[str, ...], optional): names of the classes.
        no_classes_reason (str, optional): why there is nothing about classes. Default: there is.
    """

    blocks: tuple[BlockReport, ...]
    num_clips: int
    label_names: Optional[tuple[str, ...]] = None
    no_classes_reason: Optional[str] = None

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
        return [finding for block in self.blocks for finding in self._problems_of(block)] + self._preferences()

    @property
    def summary(self) -> str:
        """The result in one or two sentences."""
        count = len(self.blocks)
        if all(block.num_experts == 1 for block in self.blocks):
            return "Each block has one expert, which reads all tokens."
        numbers = [block.scalars["effective_number"] / block.num_experts for block in self.blocks]
        problems = {(each.block, each.kind) for block in self.blocks for each in self._problems_of(block)}
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

    def _problems_of(self, block: BlockReport) -> list[Finding]:
        name, number = self.names[block.block, block.adapter], block.num_experts
        if number == 1:
            return []
        found: list[Finding] = []

        def say(kind: Any, experts: Sequence[int], text: str) -> None:
            found.append(Finding(kind, block.block, block.adapter, tuple(experts), f"{name}: {text}"))

        if not block.output_share.any():
            say("silent", range(number), "no expert adds anything.")
            return found
        if block.silent:
            shares = ", ".join(f"{block.output_share[expert].item():.1%}" for expert in block.silent)
            say(
                "silent", block.silent, f"{_say(block.silent, 'adds', 'add')} next to nothing ({shares} of the output)."
            )
        if block.idle:
            shares = ", ".join(f"{block.load[expert].item():.1%}" for expert in block.idle)
            equal = f"equal were {1 / number:.1%}"
            say("idle", block.idle, f"{_say(block.idle, 'is', 'are')} idle ({shares} of the load; {equal}).")
        for group in block.similar:
            similarity = block.expert_similarity[list(group)][:, list(group)].min().item()
            same = "read the same tokens" if block.has_slots else "have the same weights for all tokens"
            say("similar", group, f"{_say(group, same, same)} (similarity {similarity:.2f}).")
        spare = len(block.idle) + sum(len(group) - 1 for group in block.similar)
        if spare:
            found[-1] = found[-1]._replace(text=f"{found[-1].text} {number - spare} of {number} would do.")
        if block.uniform:
            share = block.effective_tokens[block.uniform].mean().item() / block.num_tokens
            say(
                "uniform",
                block.uniform,
                f"{_say(block.uniform, 'reads', 'read')} all tokens nearly alike (as if {share:.0%} of them).",
            )
        return found

    def _preferences(self) -> list[Finding]:
        found = []
        for block in self.blocks:
            if block.class_loads is None or block.class_clips is None or self.label_names is None:
                continue
            present = torch.nonzero(block.class_clips).flatten().tolist()
            for expert in set(range(block.num_experts)) - set(block.idle):
                loads = block.class_loads[present, expert]
                if len(present) < 2:
                    continue
                label = present[int(loads.argmax())]
                load = loads.max().item()
                others = (loads.sum().item() - load) / (len(present) - 1)
                if block.class_clips[label] >= PREFERENCE_CLIPS and load >= PREFERENCE * others:
                    text = (
                        f"{self.names[block.block, block.adapter]}: expert {expert} prefers the class "
                        f"'{self.label_names[label]}', with {load:.0%} of the load in its {block.class_clips[label]} "
                        f"clips and {others:.0%} in those of other classes."
                    )
                    found.append((others / load, Finding("class", block.block, block.adapter, (expert,), text)))
        return [finding for _, finding in sorted(found, key=lambda pair: pair[0])]


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
            says which experts the classes use.
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
                model(**send_to_device(inputs, device))
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


def _say(experts: Sequence[int], singular: str, plural: str) -> str:
    """Experts as the subject of a verb."""
    if len(experts) == 1:
        return f"expert {experts[0]} {singular}"
    return f"experts {', '.join(map(str, experts[:-1]))} and {experts[-1]} {plural}"
