"""Batches in the form in which a model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..calls.masks import is_mask
from .tasks import Task


class Collate:
    """Make a batch of samples: pad their features as the feature extractor does, and their labels as the task does.

    Samples of several channels have a `channel_mask`, and so has the batch. Missing channels are zero; an attention
    mask holds for all channels of a clip.

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
            dict[str, Tensor]: `(B, ...)` or `(B, C, ...)` each.
        """
        inputs = [{name: value for name, value in sample.items() if name != "labels"} for sample in samples]
        has_channels = "channel_mask" in inputs[0]
        batch = self._pad_channels(inputs) if has_channels else self._pad(inputs)
        if self.task is not None:
            batch["labels"] = self.task.batch_labels([sample["labels"] for sample in samples])
        return batch

    def _pad(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return dict(self.feature_extractor.pad(inputs, padding=True, return_tensors="pt"))

    def _pad_channels(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        counts = torch.tensor([int(sample["channel_mask"].sum()) for sample in inputs])
        names = [name for name in inputs[0] if name != "channel_mask"]
        rows = self._pad(
            [
                {name: sample[name][channel] for name in names}
                for sample, count in zip(inputs, counts)
                for channel in range(count)
            ]
        )
        channels = torch.arange(max(len(sample["channel_mask"]) for sample in inputs))
        mask = channels < counts[:, None]
        # The row of each channel; of a missing one, that of the last.
        index = counts.cumsum(0)[:, None] - counts[:, None] + channels.minimum(counts[:, None] - 1)
        batch = {name: value[index] for name, value in rows.items()}
        for name, value in batch.items():
            if value.is_floating_point():
                batch[name] = value.masked_fill(~mask.view(*mask.shape, *[1] * (value.ndim - 2)), 0.0)
        # All channels of a clip are equally long: one mask of tokens holds for them.
        batch = {name: value[:, 0] if is_mask(name) else value for name, value in batch.items()}
        return {**batch, "channel_mask": mask}


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
