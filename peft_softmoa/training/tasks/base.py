"""What a task is to the rest of the training half: everything that depends on what a model learns from a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from ..metrics import Form, compute_metrics
from ..rows import DatasetSummary, name_some

if TYPE_CHECKING:
    from typing_extensions import Self

IGNORED = -100  # a label that does not count, as in transformers


class Clip(NamedTuple):
    """The part of a recording that a model reads.

    Args:
        start (float): where it begins in the recording, in seconds.
        num_samples (int): its length.
        sampling_rate (int): in Hz.
    """

    start: float
    num_samples: int
    sampling_rate: int


@dataclass
class Task(ABC):
    """What a model learns from a row: its target, the batch of targets, the head, the loss and the metrics.

    A task is made without classes and gets them from the training data, by `with_labels`. Streams, Trainers and loops
    call these methods and know no task by name.

    Args:
        label_names (list[str]): the classes, in the order of the model's outputs. Default: those of the training data.
        declared (mapping): the label columns, with the names of the classes if the dataset declares them: the labels
            there are indices.
        metrics (sequence of str, optional): names of metrics, as for `compute_metrics`. Default: `default_metrics`.
    """

    label_names: list[str] = field(default_factory=list)
    declared: Mapping[str, Optional[Sequence[str]]] = field(default_factory=dict)
    metrics: Optional[Sequence[str]] = None

    name: ClassVar[str]  # as `--task` and the Hub name it
    model_class: ClassVar[Any]  # of transformers, which loads the model
    label_column: ClassVar[str] = "label"
    default_metrics: ClassVar[tuple[str, ...]]
    # Whether a part of a clip has the clip's target, so that long clips may be cut.
    can_crop: ClassVar[bool] = True
    # Whether the classes that a dataset declares are the model's classes.
    takes_declared: ClassVar[bool] = True
    # Whether labels are numbers of classes, or have a column for each class.
    has_classes: ClassVar[bool] = False
    # Whether the Trainer generates for the metrics.
    generates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._indices = {name: index for index, name in enumerate(self.label_names)}

    @property
    def has_loss(self) -> bool:
        """Whether the loss is computed here, and not by the model."""
        return False

    @property
    def can_smooth(self) -> bool:
        """Whether the loss with the Trainer's label smoothing is this loss, but for the smoothing."""
        return False

    @abstractmethod
    def parse(self, values: Mapping[str, Any], where: str) -> Any:
        """Read what a row says, in the form in which `labels_in` and `encode` take it.

        Args:
            values (mapping): the row's label columns, by name.
            where (str): what has them, for errors.

        Returns:
            Any: the target as the dataset has it, such as the name of a class.

        Raises:
            ValueError: if it is missing or of another form.
        """

    @abstractmethod
    def encode(self, target: Any, where: str, clip: Clip) -> Any:
        """Make the labels of a sample.

        Args:
            target (Any): from `parse`.
            where (str): what has it, for errors.
            clip (Clip): the part of the recording that the model reads.

        Returns:
            Any: a number or an array.

        Raises:
            ValueError: if a label is none of the classes.
        """

    @abstractmethod
    def forms(self, prediction: EvalPrediction) -> dict[Form, tuple[Any, Any]]:
        """What metrics read.

        Args:
            prediction (EvalPrediction): outputs of the model and labels.

        Returns:
            dict: predictions and references, by their form. The first form is that of other metrics.
        """

    def labels_in(self, target: Any) -> Iterable[str]:
        """The labels in a target, of which the training data's are the classes; none by default."""
        return ()

    def with_labels(self, names: Optional[Sequence[str]], summary: Optional[DatasetSummary] = None) -> Self:
        """The task with its classes.

        Args:
            names (sequence of str, optional): the classes, in order. Default: those that the rows have.
            summary (DatasetSummary, optional): what the rows have. Default: not known.

        Returns:
            Task: a copy.
        """
        return replace(self, label_names=list(names or (summary.labels if summary else ())))

    def check_known(self, labels: Iterable[str], where: str) -> None:
        """Check that all labels of some rows are among the classes.

        Args:
            labels (iterable of str): what `labels_in` finds in the rows.
            where (str): what the rows are, for errors.

        Raises:
            ValueError: if one is not.
        """
        unknown = sorted(set(labels) - set(self.label_names))
        if unknown:
            raise ValueError(
                f"{where} has labels that are none of the classes {name_some(self.label_names)}: {name_some(unknown)}."
            )

    def batch_labels(self, labels: Sequence[Any]) -> Tensor:
        """Make a batch of the labels of samples; those of different lengths are padded with -100.

        Args:
            labels (sequence): from `encode`.

        Returns:
            Tensor: `(B, ...)`.
        """
        arrays = [torch.as_tensor(np.asarray(each)) for each in labels]
        if not arrays[0].ndim:
            return torch.stack(arrays)
        return nn.utils.rnn.pad_sequence(arrays, batch_first=True, padding_value=IGNORED)

    def loss(self, logits: Tensor, labels: Tensor, num_items: Optional[Tensor | int] = None) -> Tensor:
        """The loss, where `has_loss`, or where clips were mixed.

        Args:
            logits (Tensor): of the model.
            labels (Tensor): from `batch_labels`.
            num_items (Tensor or int, optional): number of labels in all batches of an optimizer step; the sum of the
                batches' losses is then the step's. Default: the mean over this batch.

        Returns:
            Tensor: scalar.
        """
        raise NotImplementedError

    def counted(self, labels: Tensor) -> Tensor:
        """The labels as the Trainer has counted them; those of a batch that was mixed may have another shape.

        Args:
            labels (Tensor): of a batch.

        Returns:
            Tensor: as many that are not -100 as the batch had before.
        """
        return labels

    def mixable(self, labels: Tensor) -> Tensor:
        """Labels as numbers `(B, C)` that `mixup` can mix.

        Args:
            labels (Tensor): of a batch.

        Raises:
            ValueError: if this task has no such labels.
        """
        raise ValueError(
            f"`mixup_alpha` mixes classes and numbers, which the labels of `task={self.name}` are not: leave it out."
        )

    def mirrored(self, labels: Tensor, mirror: Mapping[str, str]) -> Tensor:
        """The labels of clips whose channels come in reverse order.

        Args:
            labels (Tensor): of a batch.
            mirror (mapping): the class that takes the place of a class, in both directions; others stay.

        Returns:
            Tensor: of the same shape.

        Raises:
            ValueError: if a class is unknown, or this task has no classes.
        """
        if not self.has_classes:
            raise ValueError(
                f"`mirror_labels` are classes, which the labels of {type(self).__name__} are not: leave it out."
            )
        unknown = sorted(set(mirror) - set(self.label_names))
        if unknown:
            raise ValueError(
                f"`mirror_labels` has {name_some(unknown)}, none of the classes {name_some(self.label_names)}."
            )
        order = [self._indices[mirror.get(name, name)] for name in self.label_names]
        others = torch.tensor(order, device=labels.device)
        # A number for each clip, or a column for each class.
        return labels[..., others] if labels.is_floating_point() else others[labels]

    def reduce_outputs(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """What of a batch's outputs the metrics need, which the Trainer keeps of the whole evaluation.

        Args:
            outputs (Tensor or tuple): logits, or a tuple that begins with them.
            inputs (mapping): the batch.

        Returns:
            Tensor: it.
        """
        logits: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return logits

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the metrics, as the Trainer's `compute_metrics`.

        Args:
            prediction (EvalPrediction): outputs of the model and labels.

        Returns:
            dict[str, float]: the metrics by name.
        """
        return compute_metrics(self.metrics or self.default_metrics, self.forms(prediction))

    def config_fields(self) -> dict[str, Any]:
        """The fields of `SoftMoAConfig` that depend on the task: `modules_to_save`, `label_names`, `problem_type`."""
        return {}

    def prepare(self, model: nn.Module, feature_extractor: Any) -> None:  # noqa: B027 - most tasks need none
        """Learn what the targets need to know of the model, and tell the model what it needs to know; nothing here.

        Args:
            model (nn.Module): the model, with or without an adapter.
            feature_extractor (SequenceFeatureExtractor): its feature extractor.
        """

    def save(self, folder: str) -> None:  # noqa: B027 - most tasks need none
        """Save what turns outputs into results, apart from the model, such as a tokenizer; nothing here.

        Args:
            folder (str): the adapter's folder.
        """

    def _check_class(self, label: str, where: str) -> int:
        if label not in self._indices:
            raise ValueError(f"{where}: label '{label}' is none of the classes {name_some(self.label_names)}.")
        return self._indices[label]
