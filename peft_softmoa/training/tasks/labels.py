"""Audio classification: one label a clip, several, or numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Optional, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForAudioClassification, EvalPrediction

from ..metrics import Form
from ..rows import DatasetSummary, label_name, name_some
from .base import IGNORED, Clip, Task

if TYPE_CHECKING:
    from typing_extensions import Self

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass
class _Classification(Task):
    """What tasks with classes have in common.

    Args:
        class_weights (str or sequence of float, optional): weights of the classes in the loss. `"balanced"` makes rare
            classes count as much as frequent ones, by how often they occur in the training data. Default: all the same.
    """

    class_weights: Optional[Union[str, Sequence[float]]] = None
    _counts: Optional[tuple[int, Mapping[str, int]]] = field(default=None, repr=False)

    name: ClassVar[str] = "audio-classification"
    model_class: ClassVar[Any] = AutoModelForAudioClassification
    problem_type: ClassVar[str]
    has_classes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.class_weights
        if given is None or given == "balanced":
            return
        if isinstance(given, str) or not all(math.isfinite(weight) and weight > 0 for weight in given):
            raise ValueError(f"`class_weights` must be 'balanced', or a positive number for each class, got {given!r}.")
        if self.label_names and len(given) != len(self.label_names):
            raise ValueError(
                f"`class_weights` has {len(given)} weights for {len(self.label_names)} classes: give one for each of "
                f"{name_some(self.label_names)}, in this order."
            )

    def with_labels(self, names: Optional[Sequence[str]], summary: Optional[DatasetSummary] = None) -> Self:
        task = super().with_labels(names, summary)
        if self._counts is None and summary is not None and summary.counts is not None:
            task = replace(task, _counts=(summary.num_rows, summary.counts))
        return task

    def config_fields(self) -> dict[str, Any]:
        fields = {"modules_to_save": ["classifier"], "problem_type": self.problem_type}
        return {**fields, "label_names": self.label_names} if self.label_names else fields

    def _weights(self, like: Tensor, balance: Any) -> Optional[Tensor]:
        if self.class_weights is None:
            return None
        weights: Any = self.class_weights
        if weights == "balanced":
            if self._counts is None:
                raise ValueError(
                    "`class_weights='balanced'` needs to know how often each class occurs, which the dataset does not "
                    "say without reading its audio. Give a number for each class."
                )
            num_rows, counts = self._counts
            missing = [label for label in self.label_names if not counts.get(label)]
            if missing:
                raise ValueError(
                    f"`class_weights='balanced'`: no row of the training data has {name_some(missing)}. Leave the "
                    "class out, or give a number for each class."
                )
            weights = [balance(num_rows, counts[label]) for label in self.label_names]
            always = [label for label, weight in zip(self.label_names, weights) if not weight]
            if always:
                raise ValueError(
                    f"`class_weights='balanced'`: every row of the training data has {name_some(always)}. Leave the "
                    "class out, or give a number for each class."
                )
        return torch.tensor(weights, dtype=torch.float32, device=like.device)


@dataclass
class SingleLabel(_Classification):
    """One label a clip, with the cross entropy `-(1/n) Σ_i w_{y_i} log softmax(z_i)_{y_i}`.

    `class_weights="balanced"` has `w_c = n / (C n_c)`, for C classes of which n_c of the n rows have class c.
    Several columns are one label together. The other arguments are those of `Task`.
    """

    problem_type: ClassVar[str] = "single_label_classification"
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1_macro")

    def with_labels(self, names: Optional[Sequence[str]], summary: Optional[DatasetSummary] = None) -> Self:
        task = super().with_labels(names, summary)
        if not names and all(map(NUMBER.fullmatch, task.label_names)) and any("." in each for each in task.label_names):
            raise ValueError(
                f"The labels are the numbers {name_some(task.label_names, 5)}, of which each would be a class. Give "
                "another `label_column`, or for regression another `problem_type`."
            )
        return task

    def parse(self, values: Mapping[str, Any], where: str) -> str:
        return " ".join(label_name(value, self.declared.get(column), where) for column, value in values.items())

    @property
    def has_loss(self) -> bool:
        return self.class_weights is not None

    @property
    def can_smooth(self) -> bool:
        return not self.has_loss

    def labels_in(self, target: str) -> Iterable[str]:
        return (target,)

    def encode(self, target: str, where: str, clip: Clip) -> int:
        return self._check_class(target, where)

    def loss(self, logits: Tensor, labels: Tensor, num_items: Optional[Tensor | int] = None) -> Tensor:
        weights = self._weights(logits, lambda num_rows, count: num_rows / (len(self.label_names) * count))
        # Labels of mixed clips are probabilities.
        total = functional.cross_entropy(logits.float(), labels, weights, reduction="sum", ignore_index=IGNORED)
        return total / (len(logits) if num_items is None else num_items)

    def mixable(self, labels: Tensor) -> Tensor:
        return functional.one_hot(labels, len(self.label_names)).float()

    def counted(self, labels: Tensor) -> Tensor:
        return labels if labels.ndim == 1 else labels[:, 0]

    def forms(self, prediction: EvalPrediction) -> dict[Form, tuple[Any, Any]]:
        logits: Any = prediction.predictions
        scores = torch.softmax(torch.as_tensor(logits).double(), dim=-1).numpy()
        return {
            "labels": (np.argmax(logits, axis=-1), prediction.label_ids),
            "scores": (scores, prediction.label_ids),
        }


@dataclass
class MultiLabel(_Classification):
    """Any number of labels a clip, with the mean of the binary cross entropies of sigmoids.

    A row's labels are a list, or a string with separators. With several columns each one is a class, and its value says
    whether the clip has it. `class_weights="balanced"` weights what has class c by `(n - n_c) / n_c`.

    Args:
        separator (str): what stands between the labels of a string. Default: `","`.
    """

    separator: str = ","

    problem_type: ClassVar[str] = "multi_label_classification"
    default_metrics: ClassVar[tuple[str, ...]] = ("mean_average_precision", "f1_macro")

    @property
    def has_loss(self) -> bool:
        return True  # not all models have it

    def with_labels(self, names: Optional[Sequence[str]], summary: Optional[DatasetSummary] = None) -> Self:
        return super().with_labels(names or (list(self.declared) if len(self.declared) > 1 else None), summary)

    def parse(self, values: Mapping[str, Any], where: str) -> list[str]:
        if len(values) > 1:
            return [column for column, value in values.items() if self._has(column, value, where)]
        [(column, given)] = values.items()
        if isinstance(given, str):
            if given.strip().startswith("["):  # as pandas writes lists into CSV
                raise ValueError(
                    f"{where}: column '{column}' says {given[:60]!r}, a list as text. Write labels with a separator "
                    f"between them, such as dog{self.separator}rain, or as lists into JSON Lines or Parquet."
                )
            given = [part for part in map(str.strip, given.split(self.separator)) if part]
        if given is None or isinstance(given, (int, float)):
            given = [] if given is None or given != given else [given]
        if not isinstance(given, (list, tuple, np.ndarray)):
            raise ValueError(
                f"{where}: column '{column}' says {str(given)[:60]!r}, but several labels are a list, or text with "
                f"'{self.separator}' between them."
            )
        names = self.declared.get(column)
        return list(dict.fromkeys(label_name(each, names, where) for each in given))

    def _has(self, column: str, value: Any, where: str) -> bool:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if number not in (0.0, 1.0):
            raise ValueError(
                f"{where}: column '{column}' says {value!r}, but it must be 1 if the clip has it, else 0. Correct it, "
                "or give another `label_column` or `problem_type`."
            )
        return bool(number)

    def labels_in(self, target: list[str]) -> Iterable[str]:
        return target

    def encode(self, target: list[str], where: str, clip: Clip) -> Any:
        labels = np.zeros(len(self.label_names), np.float32)
        labels[[self._check_class(label, where) for label in target]] = 1.0
        return labels

    def loss(self, logits: Tensor, labels: Tensor, num_items: Optional[Tensor | int] = None) -> Tensor:
        weights = self._weights(logits, lambda num_rows, count: (num_rows - count) / count)
        counts = labels != IGNORED
        losses = functional.binary_cross_entropy_with_logits(
            logits.float(), labels.float().clamp(min=0.0), pos_weight=weights, reduction="none"
        )
        return (losses * counts).sum() / (counts.sum() if num_items is None else num_items)

    def mixable(self, labels: Tensor) -> Tensor:
        return labels

    def forms(self, prediction: EvalPrediction) -> dict[Form, tuple[Any, Any]]:
        # Over all samples, or over all frames of all samples that count.
        labels = np.asarray(prediction.label_ids).reshape(-1, len(self.label_names))
        counts = (labels != IGNORED).all(axis=-1)
        logits = np.asarray(prediction.predictions).reshape(labels.shape)[counts]
        true = labels[counts].astype(np.int64)
        scores = torch.sigmoid(torch.as_tensor(logits).double()).numpy()
        return {"labels": ((logits > 0).astype(np.int64), true), "scores": (scores, true)}


@dataclass
class Regression(Task):
    """One or several numbers a clip, with the mean squared error. Each column is an output, by its name."""

    name: ClassVar[str] = "audio-classification"
    model_class: ClassVar[Any] = AutoModelForAudioClassification
    problem_type: ClassVar[str] = "regression"
    default_metrics: ClassVar[tuple[str, ...]] = ("mae", "pearson")

    @property
    def has_loss(self) -> bool:
        return True  # not all models have it

    def with_labels(self, names: Optional[Sequence[str]], summary: Optional[DatasetSummary] = None) -> Self:
        return super().with_labels(names or list(self.declared), summary)

    def parse(self, values: Mapping[str, Any], where: str) -> dict[str, float]:
        for column in values:
            if self.declared.get(column):
                raise ValueError(
                    f"{where}: column '{column}' has the classes {name_some(self.declared[column] or ())}, and no "
                    "numbers: give another `problem_type`."
                )
        return {column: self._number(column, value, where) for column, value in values.items()}

    def _number(self, column: str, value: Any, where: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"{where}: column '{column}' says {value!r}, but regression needs a number in each row. Correct it, or "
                "give another `label_column` or `problem_type`."
            )
        if number == IGNORED:
            raise ValueError(
                f"{where}: column '{column}' says {IGNORED}, which transformers takes for a label that does not count. "
                "Rescale the column."
            )
        return number

    def labels_in(self, target: dict[str, float]) -> Iterable[str]:
        return target

    def encode(self, target: dict[str, float], where: str, clip: Clip) -> Any:
        return np.array([target[column] for column in self.label_names], np.float32)

    def config_fields(self) -> dict[str, Any]:
        fields = {"modules_to_save": ["classifier"], "problem_type": self.problem_type}
        return {**fields, "label_names": self.label_names}

    def loss(self, logits: Tensor, labels: Tensor, num_items: Optional[Tensor | int] = None) -> Tensor:
        total = functional.mse_loss(logits.float(), labels.float(), reduction="sum")
        return total / (labels.numel() if num_items is None else num_items)

    def mixable(self, labels: Tensor) -> Tensor:
        return labels

    def forms(self, prediction: EvalPrediction) -> dict[Form, tuple[Any, Any]]:
        return {"values": (np.asarray(prediction.predictions), np.asarray(prediction.label_ids))}
