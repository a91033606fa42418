"""Which class a model takes clips for.

Letters of all shapes: B batch, C classes of the dataset, K classes of the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

# What transformers calls the classes of a model that has no names for them.
GENERIC = re.compile(r"LABEL_\d+")


class Confusion(NamedTuple):
    """How many clips of each class a model takes for each class."""

    counts: Tensor  # (C, K) int64
    label_names: tuple[str, ...]  # of the C classes of the dataset
    output_names: tuple[str, ...]  # of the K classes of the model, which has all of the dataset's

    @property
    def correct(self) -> Tensor:
        """`(C,)` int64, number of clips of each class that are taken for what they are."""
        columns = torch.tensor([self.output_names.index(name) for name in self.label_names])
        return self.counts.gather(1, columns[:, None]).squeeze(1)

    @property
    def accuracy(self) -> float:
        """Share of the clips that are taken for what they are."""
        return self.correct.sum().item() / max(1, int(self.counts.sum()))

    @property
    def mistakes(self) -> list[tuple[str, str, int, int]]:
        """Class, what its clips are taken for, how often, and of how many clips; the most frequent first."""
        return sorted(
            (
                (true, taken, int(count), int(row.sum()))
                for true, row in zip(self.label_names, self.counts)
                for taken, count in zip(self.output_names, row)
                if count and true != taken
            ),
            key=lambda mistake: -mistake[2],
        )


class Predictions:
    """Counts the predictions of a classifier.

    Args:
        model (nn.Module): the model, with its config.
        label_names (sequence of str): names of the classes of the dataset.
    """

    def __init__(self, model: nn.Module, label_names: Sequence[str]) -> None:
        config: Any = getattr(model, "config", None)
        id2label = getattr(config, "id2label", None) or {}
        names = tuple(id2label[index] for index in sorted(id2label))
        if len(names) == len(label_names) and all(map(GENERIC.fullmatch, names)):
            names = tuple(label_names)
        self.label_names, self.output_names = tuple(label_names), names
        self.counts = torch.zeros(len(label_names), len(names), dtype=torch.int64)
        self.why_none: Optional[str] = None
        missing = [name for name in label_names if name not in names]
        if missing:
            self.why_none = f"the model has no class '{missing[0]}'"
        elif len(names) == 1 or getattr(config, "problem_type", None) not in (None, "single_label_classification"):
            self.why_none = "the model is not for one class a clip"

    def update(self, output: Any, labels: Tensor) -> None:
        """Add a batch.

        Args:
            output (ModelOutput): what the model returns.
            labels (Tensor): `(B,)` integer, from 0, the classes of the clips.
        """
        if self.why_none is not None:
            return
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.shape == (len(labels), len(self.output_names)):
            pairs = labels.cpu() * len(self.output_names) + logits.argmax(-1).cpu()
            self.counts += pairs.bincount(minlength=self.counts.numel()).view_as(self.counts)
        else:
            self.why_none = "the model does not give a score of each class for each clip"

    def result(self) -> Optional[Confusion]:
        """Give the counts.

        Returns:
            Confusion, optional: the counts, or none; `why_none` says why.
        """
        return Confusion(self.counts, self.label_names, self.output_names) if self.why_none is None else None
