"""Batches in the form in which a model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from torch import Tensor, nn

from .tasks import Task


class Collate:
    """Make a batch of samples: pad their features as the feature extractor does, and their labels as the task does.

    Args:
        feature_extractor (SequenceFeatureExtractor): the model's feature extractor.
        task (Task, optional): what the labels are. Default: there are none.
    """

    def __init__(self, feature_extractor: Any, task: Optional[Task] = None) -> None:
        self.feature_extractor = feature_extractor
        self.task = task

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            samples (sequence of mapping): the inputs of each sample by name, with `labels`.

        Returns:
            dict[str, Tensor]: `(B, ...)` each.
        """
        inputs = [{name: value for name, value in sample.items() if name != "labels"} for sample in samples]
        batch: dict[str, Tensor] = dict(self.feature_extractor.pad(inputs, padding=True, return_tensors="pt"))
        if self.task is not None:
            batch["labels"] = self.task.batch_labels([sample["labels"] for sample in samples])
        return batch


def cast_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Cast inputs of a floating dtype to the dtype in which a model reads them.

    That is the dtype of the base model's first floating parameter. Feature extractors make float32, while many base
    models are stored in half precision.

    Args:
        model (nn.Module): the model, with or without an adapter.
        inputs (mapping): its inputs by name; what is no floating tensor stays as it is, and so do labels.

    Returns:
        dict[str, Any]: the inputs.
    """
    dtypes = (
        parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and ".softmoa_" not in name
    )
    dtype = next(dtypes, None)
    cast = dict(inputs)
    for name, value in inputs.items():
        # Losses take float32 labels beside logits of any dtype, and rounded ones would be others.
        if dtype and name != "labels" and isinstance(value, Tensor) and value.is_floating_point():
            cast[name] = value.to(dtype)
    return cast
