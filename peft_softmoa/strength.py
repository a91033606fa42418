"""The strength of adapters, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .layer import is_adapted


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """A context in which all adapters of a model are stronger or weaker: `F(x) + multiplier · scaling · mixture(x)`.

    It is `peft.helpers.rescale_adapter_scale`, which is for LoRA alone.

    Args:
        model (nn.Module): a model with adapters.
        multiplier (float): the factor.

    Raises:
        ValueError: if the model has no Soft-MoA adapter.
    """
    layers = [module for module in model.modules() if is_adapted(module)]
    if not layers:
        raise ValueError(f"The {type(model).__name__} has no Soft-MoA adapter whose strength could be changed.")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling = {name: multiplier * scaling for name, scaling in layer.scaling.items()}
        yield
    finally:
        for layer, scaling in zip(layers, before):
            layer.scaling = scaling
