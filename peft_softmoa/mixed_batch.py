"""Mixed batches: an adapter for each sample, in one pass through the base model."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

# In place of an adapter's name: the base model alone.
BASE = "__base__"


def check_adapter_names(adapter_names: Any, known: Container[str], inputs: Iterable[Any]) -> None:
    """Check the adapters of a mixed batch against the model and its inputs.

    Args:
        adapter_names: one name for each sample, `"__base__"` for the base model alone.
        known (container of str): names of the model's adapters.
        inputs (iterable): what the model is called with; all tensors of two or more dimensions begin with the batch.

    Raises:
        ValueError: for anything but names of adapters, one for each sample.
    """
    if not (isinstance(adapter_names, (list, tuple)) and all(isinstance(name, str) for name in adapter_names)):
        raise ValueError(f"`adapter_names` must be a list with the name of an adapter for each sample: {adapter_names}")
    unknown = sorted({name for name in adapter_names if name != BASE and name not in known})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    for value in inputs:
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(value)} respectively."
            )


def rows_of(adapter_name: str, adapter_names: Sequence[str], rows: int, device: torch.device) -> Tensor:
    """Find the rows of a batch that belong to an adapter.

    Args:
        adapter_name (str): its name.
        adapter_names (sequence of str): the name for each of B samples.
        rows (int): number of rows, a multiple of B: the windows or beams of a sample follow one another.
        device (torch.device): where the batch is.

    Returns:
        Tensor: the indices of its rows.

    Raises:
        ValueError: if the rows cannot be told apart by sample.
    """
    samples = len(adapter_names)
    if rows % samples:
        raise ValueError(f"`adapter_names` has {samples} names, which do not fit {rows} rows of tokens.")
    own = [index for index, name in enumerate(adapter_names) if name == adapter_name]
    return torch.arange(rows, device=device).view(samples, -1)[own].flatten()


def run_by_sample(wrapper: ModulesToSaveWrapper, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    """Run a module of `modules_to_save`, for each sample that of its own adapter.

    Args:
        wrapper (ModulesToSaveWrapper): the module, and its copies by the adapter's name.
        adapter_names (sequence of str): the name for each of B samples.
        args, kwargs: what the module is called with; the first tensor begins with the batch, and what has as many rows
            is taken apart with it.

    Returns:
        Tensor: what the modules return, in the order of the samples.

    Raises:
        ValueError: if the modules do not return tensors of one shape by sample, such as heads for different classes.
    """
    if wrapper.disable_adapters:
        return wrapper.original_module(*args, **kwargs)
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    copies = dict(wrapper.modules_to_save.items())
    outputs, indices = [], []
    for name in dict.fromkeys(adapter_names):
        rows = rows_of(name, adapter_names, len(first), first.device)
        module = copies.get(name, wrapper.original_module)
        outputs.append(
            module(
                *(_select(value, rows, len(first)) for value in args),
                **{key: _select(value, rows, len(first)) for key, value in kwargs.items()},
            )
        )
        indices.append(rows)
    shapes = {tuple(output.shape[1:]) if isinstance(output, Tensor) else None for output in outputs}
    if len(shapes) > 1 or None in shapes:
        raise ValueError(
            f"The modules of adapters {sorted(set(adapter_names))} for {type(wrapper.original_module).__name__} do not "
            f"return tensors of one shape for each sample, but {sorted(shapes, key=str)}. Run these adapters apart."
        )
    return torch.cat(outputs)[torch.cat(indices).argsort()]


def _select(value: Any, rows: Tensor, batch: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value
