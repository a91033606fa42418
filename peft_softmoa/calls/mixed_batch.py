"""Mixed batches: an adapter for each sample, in one pass through the base model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .masks import argument_names

# In place of an adapter's name: the base model alone.
BASE = "__base__"


class MixedBatch(NamedTuple):
    """The adapters of a batch, one for each sample."""

    adapter_names: Sequence[str]
    beams: int  # how many rows each sample has in a decoder that searches
    rows_by_layer: dict[str, int]  # how many rows a layer was called with first

    def check_call(self, layer: str, tokens: Any) -> None:
        """Check that the rows that a layer is called with are those of the samples.

        In a layer the rows of a block may be windows; what the layer is called with are samples.

        Args:
            layer (str): name of the layer.
            tokens (Any): what it is called with.

        Raises:
            ValueError: if they cannot be told apart by sample.
        """
        if not isinstance(tokens, Tensor):
            raise ValueError(f"'{layer}' is called in a way that does not show the samples of `adapter_names`.")
        self.check_rows(len(tokens))
        if self.rows_by_layer.setdefault(layer, len(tokens)) != len(tokens):
            raise ValueError(
                "Some samples are finished before others, and which ones does not show: run each adapter of "
                "`adapter_names` apart."
            )

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
        samples = torch.arange(rows, device=device).view(len(self.adapter_names), -1)
        return samples[self.samples_of(adapter_name)].flatten()

    def samples_of(self, adapter_name: str) -> list[int]:
        """The indices of the samples that belong to an adapter."""
        return [index for index, name in enumerate(self.adapter_names) if name == adapter_name]


def make_mixed_batch(
    model: nn.Module, adapter_names: Any, known: Collection[str], options: Mapping[str, Any]
) -> MixedBatch:
    """Check the adapters of a mixed batch.

    Args:
        model (nn.Module): the base model.
        adapter_names (Any): one name for each sample, `"__base__"` for the base model alone.
        known (collection of str): names of the model's adapters.
        options (mapping): other arguments of the call; `generate` may have `num_beams` and `num_return_sequences`, or a
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


def run_by_sample(
    batch: MixedBatch, wrapper: ModulesToSaveWrapper, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Run a module of `modules_to_save`, for each sample that of its own adapter.

    Args:
        batch (MixedBatch): the adapters of the samples.
        wrapper (ModulesToSaveWrapper): the module, and its copies by the adapter's name.
        args (tuple): what the module is called with by position; the first tensor has the rows of the batch, and what
            has as many is taken apart with it.
        kwargs (dict): what it is called with by name.

    Returns:
        Tensor: what the modules return, in the order of the samples.

    Raises:
        ValueError: if the rows are not those of the samples, or the modules do not return tensors of one shape for
            each, as heads for different numbers of classes.
    """
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
