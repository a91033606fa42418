"""Inputs in the form in which a model reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


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
