"""Mixed batches: an adapter for each sample, in one pass through the base model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .masking import argument_names
from .shapes import find_tokens

# In place of an adapter's name: the base model alone.
BASE = "__base__"


class MixedBatch(NamedTuple):
    """The adapters of a batch, one for each sample."""

    adapter_names: Sequence[str]
    beams: int  # how many rows each sample has in a decoder that searches
    rows_by_module: dict[int, int]  # how many rows a layer was called with first

    def check_rows(self, rows: int) -> None:
        """Check that a module is called with one row for each sample, or for each beam of it.

        Args:
            rows (int): with how many it is called.

        Raises:
            ValueError: if they cannot be told apart by sample.
        """
        samples = len(self.adapter_names)
        if rows not in (samples, samples * self.beams):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {samples} and {rows} "
                "respectively. Clips that a model packs or cuts into chunks do not mix: run each adapter apart."
            )

    def rows_of(self, adapter_name: str, rows: int, device: torch.device) -> Tensor:
        """Find the rows that belong to an adapter.

        Args:
            adapter_name (str): its name.
            rows (int): number of all rows; those of a sample, its beams or windows, follow one another.
            device (torch.device): where they are.

        Returns:
            Tensor: the indices of its rows.
        """
        own = [index for index, name in enumerate(self.adapter_names) if name == adapter_name]
        return torch.arange(rows, device=device).view(len(self.adapter_names), -1)[own].flatten()


def make_mixed_batch(
    model: nn.Module, adapter_names: Any, known: Collection[str], options: dict[str, Any]
) -> MixedBatch:
    """Check the adapters of a mixed batch.

    Args:
        model (nn.Module): the base model.
        adapter_names: one name for each sample, `"__base__"` for the base model alone.
        known (collection of str): names of the model's adapters.
        options (dict): other arguments of the call; `generate` may have `num_beams` and `num_return_sequences`, or a
            `generation_config` with them.

    Returns:
        MixedBatch: the batch.

    Raises:
        ValueError: for anything but names of adapters, or if the model's prompts may have any number of clips.
    """
    is_list = isinstance(adapter_names, (list, tuple)) and len(adapter_names) > 0
    if not is_list or not all(isinstance(name, str) for name in adapter_names):
        raise ValueError(f"`adapter_names` must be a list with the name of an adapter for each sample: {adapter_names}")
    unknown = sorted({name for name in adapter_names if name != BASE and name not in known})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    arguments = argument_names(model)
    has_clips = any(name.endswith(("input_features", "input_values")) for name in arguments)
    if hasattr(model, "prepare_inputs_for_generation") and "input_ids" in arguments and has_clips:
        raise ValueError(
            f"`adapter_names` does not say which prompt a clip belongs to, and a prompt of {type(model).__name__} may "
            "have any number of clips: run each adapter apart."
        )
    defaults = options.get("generation_config") or getattr(model, "generation_config", None)
    names = ("num_beams", "num_return_sequences")
    beams = max(options.get(name) or getattr(defaults, name, None) or 1 for name in names)
    return MixedBatch(adapter_names, beams, {})


def check_call(batch: MixedBatch, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """A pre-forward hook of a layer with adapted blocks: check that its rows are those of the samples.

    Args:
        batch (MixedBatch): the batch.
        module: the layer.
        args, kwargs: what it is called with.
    """
    tokens = find_tokens(args, kwargs)
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"{type(module).__name__} is called in a way that does not show the samples of `adapter_names`."
        )
    batch.check_rows(len(tokens))
    if batch.rows_by_module.setdefault(id(module), len(tokens)) != len(tokens):
        raise ValueError(
            "Some samples are finished before others, and which ones does not show: run each adapter of "
            "`adapter_names` apart."
        )


def run_by_sample(batch: MixedBatch, wrapper: ModulesToSaveWrapper, *args: Any, **kwargs: Any) -> Tensor:
    """Run a module of `modules_to_save`, for each sample that of its own adapter.

    Args:
        batch (MixedBatch): the adapters of the samples.
        wrapper (ModulesToSaveWrapper): the module, and its copies by the adapter's name.
        args, kwargs: what the module is called with; the first tensor has the rows of the batch, and what has as many
            is taken apart with it.

    Returns:
        Tensor: what the modules return, in the order of the samples.

    Raises:
        ValueError: if the rows are not those of the samples, or the modules do not return tensors of one shape for
            each, as heads for different numbers of classes.
    """
    if wrapper.disable_adapters:
        return wrapper.original_module(*args, **kwargs)
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), torch.empty(0))
    batch.check_rows(len(first))
    copies = dict(wrapper.modules_to_save.items())
    outputs, indices = [], []
    for name in dict.fromkeys(batch.adapter_names):
        rows = batch.rows_of(name, len(first), first.device)
        own_args = [_select(value, rows, len(first)) for value in args]
        own_kwargs = {key: _select(value, rows, len(first)) for key, value in kwargs.items()}
        outputs.append(copies.get(name, wrapper.original_module)(*own_args, **own_kwargs))
        indices.append(rows)
    shapes = {
        tuple(output.shape[1:]) if isinstance(output, Tensor) and len(output) == len(rows) else None
        for output, rows in zip(outputs, indices)
    }
    if len(shapes) > 1 or None in shapes:
        raise ValueError(
            f"The modules of adapters {sorted(set(batch.adapter_names))} for {type(wrapper.original_module).__name__} "
            f"do not return tensors of one shape for each sample, but {sorted(shapes, key=str)}. Run them apart."
        )
    return torch.cat(outputs)[torch.cat(indices).argsort()]


def _select(value: Any, rows: Tensor, batch: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value
