"""The metrics of a model's mixtures over a dataset, and what they say in words.

Letters of all shapes: B batch, T tokens, N experts, P slots per expert, S = N·P slots, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Optional

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import metrics
from .records import Record, record_routing

# Cosine of their dispatch weights from which two experts are said to read the same.
TWINS = 0.95
# Share of the tokens from which a slot is said to read them all alike, by its effective number.
BROAD = 0.9
# How many times its mean load in the others an expert has to have in a class to be said to prefer it, and in how many
# clips at least.
PREFERENCE, PREFERENCE_CLIPS = 2.0, 5
# As many tokens a sample has at least for anything to be said of how slots choose among them.
FEW_TOKENS = 8


class Finding(NamedTuple):
    """Something that stands out."""

    kind: Literal["silent", "idle", "twins", "broad", "class"]
    block: str  # name of the block in the base model
    adapter: str
    experts: tuple[int, ...]  # from 0
    text: str


@dataclass(frozen=True)
class BlockReport:
    """The metrics of one adapter in one block; `metrics.py` defines them.

    Args:
        block (str): name of the block in the base model.
        adapter (str): name of the adapter.
        num_tokens (float): how many real tokens a sample has, as a mean.
        load (Tensor): `(N,)`, `expert_load`.
        output_share (Tensor): `(N,)`, `output_share`.
        effective_tokens (Tensor): `(N, P)`, `effective_tokens`.
        expert_similarity (Tensor): `(N, N)`, `slot_similarity` of the sums of each expert's slots.
        slot_similarity (Tensor): `(S, S)`, `slot_similarity`.
        combine_similarity (float): `combine_similarity`.
        has_slots (bool): whether experts read averages of tokens, as in soft routing, or tokens themselves.
        class_loads (Tensor, optional): `(C, N)`, `expert_load` in each class; zero for classes without a clip.
        class_clips (Tensor, optional): `(C,)`, how many clips each class has.
    """

    block: str
    adapter: str
    num_tokens: float
    load: Tensor
    output_share: Tensor
    effective_tokens: Tensor
    expert_similarity: Tensor
    slot_similarity: Tensor
    combine_similarity: float
    has_slots: bool = True
    class_loads: Optional[Tensor] = None
    class_clips: Optional[Tensor] = None

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.load)

    @property
    def idle(self) -> list[int]:
        """Experts that hardly any token reads."""
        return metrics.idle_experts(self.load)

    @property
    def silent(self) -> list[int]:
        """Experts that are not idle, but add next to nothing to any token."""
        return [n for n in metrics.idle_experts(self.output_share) if n not in self.idle]

    @property
    def broad(self) -> list[int]:
        """Experts that are not idle and all of whose slots read nearly all tokens alike."""
        # Without slots, to weigh all tokens alike is as good a choice as any.
        if not self.has_slots or self.num_tokens < FEW_TOKENS:
            return []
        shares = self.effective_tokens / self.num_tokens
        return [n for n in range(self.num_experts) if n not in self.idle and bool((shares[n] >= BROAD).all())]

    @property
    def twins(self) -> list[tuple[int, ...]]:
        """Groups of experts that are neither idle nor broad, and read the same tokens."""
        if self.num_tokens < FEW_TOKENS:
            return []
        others = [n for n in range(self.num_experts) if n not in self.idle and n not in self.broad]
        groups: list[list[int]] = []
        for expert in others:
            # With all in a group, not with one of them: a chain of neighbours is no group.
            group = next((each for each in groups if (self.expert_similarity[expert, each] >= TWINS).all()), None)
            if group is None:
                groups.append([expert])
            else:
                group.append(expert)
        return [tuple(group) for group in groups if len(group) > 1]

    @property
    def scalars(self) -> dict[str, float]:
        """The metrics that are one number, by name."""
        values = {
            "normalized_entropy": metrics.normalized_entropy(self.load).item(),
            "effective_number": metrics.effective_number(self.load).item(),
            "coefficient_of_variation": metrics.coefficient_of_variation(self.load).item(),
            "effective_number_by_output": metrics.effective_number(self.output_share).item(),
            "idle_experts": float(len(self.idle)),
            "effective_tokens": self.effective_tokens.mean().item(),
            "slot_similarity": _mean_of_pairs(self.slot_similarity),
            "combine_similarity": self.combine_similarity,
        }
        if self.class_loads is not None:
            values["class_information"] = metrics.class_information(self.class_loads).item()
        return values


@dataclass(frozen=True)
class ExpertReport:
    """What the experts of a model do over a dataset.

    Args:
        blocks (tuple[BlockReport, ...]): one for each adapter of each block, in the order in which they run.
        num_clips (int): number of clips.
        label_names (tuple[str, ...], optional): names of the classes.
        without_classes (str, optional): why there is nothing about classes, if there is not.
    """

    blocks: tuple[BlockReport, ...]
    num_clips: int
    label_names: Optional[tuple[str, ...]] = None
    without_classes: Optional[str] = None

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
        """What stands out: in all blocks what is of little use, then the classes that experts prefer, most first."""
        return [finding for block in self.blocks for finding in self._faults_of(block)] + self._preferences()

    @property
    def summary(self) -> str:
        """The whole in one or two sentences."""
        count = len(self.blocks)
        if all(block.num_experts == 1 for block in self.blocks):
            return "Each block has one expert, which reads all tokens."
        numbers = [block.scalars["effective_number"] / block.num_experts for block in self.blocks]
        problems = {(each.block, each.kind) for block in self.blocks for each in self._faults_of(block)}
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
            "twins": "with experts that read the same tokens",
            "broad": "with experts that read all tokens alike",
        }
        found = [(sum(kind == each for _, each in problems), text) for kind, text in parts.items()]
        return f"{text} Blocks {', '.join(f'{text}: {number}' for number, text in found if number)}."

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        return {
            "num_clips": self.num_clips,
            "label_names": self.label_names,
            "without_classes": self.without_classes,
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
                    "twins": block.twins,
                    "broad": block.broad,
                    "effective_tokens_by_slot": block.effective_tokens.tolist(),
                    "expert_similarity": block.expert_similarity.tolist(),
                    "slot_similarity_by_pair": block.slot_similarity.tolist(),
                    "class_loads": None if block.class_loads is None else block.class_loads.tolist(),
                    "class_clips": None if block.class_clips is None else block.class_clips.tolist(),
                }
                for block in self.blocks
            ],
        }

    def _faults_of(self, block: BlockReport) -> list[Finding]:
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
        for group in block.twins:
            similarity = block.expert_similarity[list(group)][:, list(group)].min().item()
            same = "read the same tokens" if block.has_slots else "have the same weights for all tokens"
            say("twins", group, f"{_say(group, same, same)} (similarity {similarity:.2f}).")
        spare = len(block.idle) + sum(len(group) - 1 for group in block.twins)
        if spare:
            found[-1] = found[-1]._replace(text=f"{found[-1].text} {number - spare} of {number} would do.")
        if block.broad:
            share = block.effective_tokens[block.broad].mean().item() / block.num_tokens
            say(
                "broad",
                block.broad,
                f"{_say(block.broad, 'reads', 'read')} all tokens nearly alike (as if {share:.0%} of them).",
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


class Statistics:
    """Sums from which the metrics of one adapter in one block follow, at any time, in constant memory.

    Args:
        num_classes (int, optional): C. Default: there are no classes.
    """

    def __init__(self, num_classes: Optional[int] = None) -> None:
        self.num_classes = num_classes
        self.has_slots = True
        self.sums: dict[str, Tensor] = {}

    def merge(self, other: Statistics) -> None:
        """Add what another has added up.

        Args:
            other (Statistics): of the same adapter and block, as in another process.
        """
        self.has_slots = other.has_slots
        self._add(other.sums)

    def _add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def update(self, record: Record, labels: Optional[Tensor] = None) -> None:
        """Add what one call did.

        Args:
            record (Record): the call.
            labels (Tensor, optional): `(B,)` integer, from 0, the class of each clip; a clip may be several of the
                record's samples, as in windows.
        """
        dispatch, combine, norms, mask = record[2:6]
        self.has_slots = record.has_slots
        samples = mask.any(1).sum()
        self._add_mean("num_tokens", mask.sum() / samples.clamp_min(1), samples)
        self._add_mean("load", metrics.expert_load(combine, mask), metrics.masked(combine, mask).sum())
        self._add_mean("output_share", metrics.output_share(norms, mask), metrics.masked(norms, mask).sum())
        reads = metrics.reading_slots(dispatch, mask)
        self._add_mean("effective_tokens", metrics.effective_tokens(dispatch, mask), reads.sum(0))
        for name, slots in (("expert_similarity", dispatch.sum(3, keepdim=True)), ("slot_similarity", dispatch)):
            reads = metrics.reading_slots(slots, mask).flatten(1)
            self._add_mean(name, metrics.slot_similarity(slots, mask), reads.mT @ reads)
        similarity, pairs = metrics.combine_similarity(combine, mask), metrics.reading_pairs(combine, mask)
        self._add_mean("combine_similarity", similarity.nan_to_num(), pairs)
        if labels is not None and self.num_classes:
            by_sample = metrics.masked(combine, mask).sum((1, 3))
            if len(by_sample) % len(labels):
                raise ValueError(
                    f"The block '{record.block}' takes {len(labels)} clips in {len(by_sample)} parts, so that it is "
                    "not known which class they are of. Leave out the labels, or give all clips one adapter."
                )
            by_sample = by_sample.unflatten(0, (len(labels), -1)).sum(1).cpu()
            by_class = by_sample.new_zeros(self.num_classes, by_sample.shape[1]).index_add_(0, labels.cpu(), by_sample)
            self._add({"class_loads": by_class, "class_clips": labels.cpu().bincount(minlength=self.num_classes)})

    def _add_mean(self, name: str, value: Tensor, weight: Tensor) -> None:
        self._add({name: (value * weight).cpu(), f"{name}.weight": weight.cpu().to(torch.float64)})

    def result(self, block: str, adapter: str) -> BlockReport:
        """The metrics.

        Args:
            block (str): name of the block.
            adapter (str): name of the adapter.

        Returns:
            BlockReport: the metrics.
        """
        sums = dict(self.sums)
        loads, clips = sums.pop("class_loads", None), sums.pop("class_clips", None)
        means = {
            name: value / sums[f"{name}.weight"].clamp_min(torch.finfo(torch.float64).tiny)
            for name, value in sums.items()
            if not name.endswith(".weight")
        }
        similarity = means.pop("combine_similarity").item() if sums["combine_similarity.weight"] > 0 else math.nan
        if loads is not None:
            loads = loads / loads.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        return BlockReport(
            block,
            adapter,
            num_tokens=means.pop("num_tokens").item(),
            combine_similarity=similarity,
            has_slots=self.has_slots,
            class_loads=loads,
            class_clips=clips,
            **{name: value for name, value in means.items() if name != "combine_similarity"},
        )


def expert_report(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    label_names: Optional[Sequence[str]] = None,
    show_progress: bool = True,
) -> ExpertReport:
    """See what the experts of a model do over a dataset: one pass, in memory that does not grow with it.

    Args:
        model (nn.Module): a model with Soft-MoA adapters; it is evaluated, without gradients.
        dataloader (iterable of mappings): batches of the model's inputs. With `labels`, `(B,)` integer, the report
            says how experts and classes go together.
        label_names (sequence of str, optional): names of the classes. Default: those of the model's config.
        show_progress (bool): whether to show a progress bar. Default: True.

    Returns:
        ExpertReport: the metrics, and what stands out in words.

    Raises:
        ValueError: if the model has no Soft-MoA adapter, or gives numbers that are not finite, there is no batch, a
            batch is no mapping, or a label is none of the classes.
    """
    if label_names is None:
        id2label = getattr(getattr(model, "config", None), "id2label", None) or {}
        label_names = [id2label[index] for index in sorted(id2label)]
    device = next(model.parameters()).device
    statistics: dict[tuple[str, str], Statistics] = {}
    without_classes = None
    num_clips = 0
    was_training = model.training
    model.eval()
    try:
        with record_routing(model) as records, torch.no_grad():
            for batch in tqdm(dataloader, desc="Recording experts", unit=" batches", disable=not show_progress):
                if not isinstance(batch, Mapping):
                    raise ValueError(
                        f"A batch must be a dict of the model's inputs, got {type(batch).__name__}. Use the Trainer's "
                        "data collator, or one like it."
                    )
                labels = batch.get("labels")
                without_classes = without_classes or _why_no_classes(labels, len(label_names))
                # The classes of the dataset may be others than the model's, of which it would make an error.
                unused = () if without_classes else ("labels",)
                labels = None if without_classes else labels
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
    if without_classes:
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
        None if without_classes else tuple(label_names),
        without_classes,
    )


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names of modules without what is common to all before their numbers, such as `layers.0.attention`.

    Args:
        names (sequence of str): names of modules.

    Returns:
        dict[str, str]: the short names.
    """
    parts = [name.split(".") for name in names]
    # A name keeps its first number, and what is numbered.
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
    """Experts with a verb."""
    if len(experts) == 1:
        return f"expert {experts[0]} {singular}"
    return f"experts {', '.join(map(str, experts[:-1]))} and {experts[-1]} {plural}"


def _mean_of_pairs(similarity: Tensor) -> float:
    """Mean of a symmetric matrix beside its diagonal; not a number if there is nothing."""
    count = len(similarity) * (len(similarity) - 1)
    return (similarity.sum() - similarity.diagonal().sum()).item() / count if count else math.nan
