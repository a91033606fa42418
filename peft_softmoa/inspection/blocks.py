"""The metrics of one adapter in one block, and the sums from which they follow.

Letters of all shapes: B batch, T tokens, N experts, P slots per expert, S = N·P slots, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from . import metrics
from .records import Record

# Two experts are similar from this cosine of their dispatch weights on.
SIMILAR = 0.95
# A slot reads uniformly if its effective number of tokens is at least this share of the tokens.
UNIFORM = 0.9
# Samples with fewer tokens say nothing about how slots choose among them.
MIN_TOKENS = 8


@dataclass(frozen=True)
class BlockReport:
    """The metrics of one adapter in one block; `metrics.py` defines them.

    Args:
        block (str): name of the block in the base model.
        adapter (str): name of the adapter.
        num_tokens (float): mean number of real tokens of a sample.
        load (Tensor): `(N,)`, `expert_load`.
        output_share (Tensor): `(N,)`, `output_share`.
        effective_tokens (Tensor): `(N, P)`, `effective_tokens`.
        expert_similarity (Tensor): `(N, N)`, `slot_similarity` of the sums of each expert's slots.
        slot_similarity (Tensor): `(S, S)`, `slot_similarity`.
        combine_similarity (float): `combine_similarity`.
        has_slots (bool): whether experts read averages of tokens, as in soft routing, or tokens themselves.
        class_loads (Tensor, optional): `(C, N)`, `expert_load` in each class; zero for classes without a clip.
        class_clips (Tensor, optional): `(C,)` int64, number of clips of each class.
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
        """N, the number of experts."""
        return len(self.load)

    @property
    def idle(self) -> list[int]:
        """Experts from which tokens read next to nothing."""
        return metrics.idle_experts(self.load)

    @property
    def silent(self) -> list[int]:
        """Experts that are not idle, but add next to nothing to any token."""
        return [n for n in metrics.idle_experts(self.output_share) if n not in self.idle]

    @property
    def uniform(self) -> list[int]:
        """Experts that are not idle, and whose slots all read nearly all tokens alike."""
        # Experts without slots may well weigh all tokens alike.
        if not self.has_slots or self.num_tokens < MIN_TOKENS:
            return []
        shares = self.effective_tokens / self.num_tokens
        return [n for n in range(self.num_experts) if n not in self.idle and bool((shares[n] >= UNIFORM).all())]

    @property
    def similar(self) -> list[tuple[int, ...]]:
        """Groups of experts that read the same tokens, and are neither idle nor uniform."""
        if self.num_tokens < MIN_TOKENS:
            return []
        others = [n for n in range(self.num_experts) if n not in self.idle and n not in self.uniform]
        groups: list[list[int]] = []
        for expert in others:
            # Similar to all in the group: a chain of neighbours is no group.
            group = next((each for each in groups if (self.expert_similarity[expert, each] >= SIMILAR).all()), None)
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


class Statistics:
    """Sums from which the metrics of one adapter in one block follow, in constant memory.

    Args:
        num_classes (int, optional): C. Default: there are no classes.
    """

    def __init__(self, num_classes: Optional[int] = None) -> None:
        self.num_classes = num_classes
        self.has_slots = True
        self.sums: dict[str, Tensor] = {}

    def merge(self, other: Statistics) -> None:
        """Add the sums of other statistics.

        Args:
            other (Statistics): statistics of the same adapter and block, such as those of another process.
        """
        self.has_slots = other.has_slots
        self._add(other.sums)

    def _add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def update(self, record: Record, labels: Optional[Tensor] = None) -> None:
        """Add one call.

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
            by_sample = by_sample.reshape(len(labels), -1, by_sample.shape[1]).sum(1).cpu()
            by_class = by_sample.new_zeros(self.num_classes, by_sample.shape[1]).index_add_(0, labels.cpu(), by_sample)
            self._add({"class_loads": by_class, "class_clips": labels.cpu().bincount(minlength=self.num_classes)})

    def _add_mean(self, name: str, value: Tensor, weight: Tensor) -> None:
        self._add({name: (value * weight).cpu(), f"{name}.weight": weight.cpu().to(torch.float64)})

    def result(self, block: str, adapter: str) -> BlockReport:
        """Compute the metrics.

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


def _mean_of_pairs(similarity: Tensor) -> float:
    """Mean of a symmetric matrix without its diagonal; NaN for a single row."""
    count = len(similarity) * (len(similarity) - 1)
    return (similarity.sum() - similarity.diagonal().sum()).item() / count if count else math.nan
