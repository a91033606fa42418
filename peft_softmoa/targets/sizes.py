"""How large an adapter is: its file, and beside LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from .choice import Target
from .layers import is_linear, without_adapters

# Of the tensors that adapters hold, as safetensors writes them.
DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


@dataclass(frozen=True)
class LoraComparison:
    """What LoRA would train in the same blocks, without modules that are trained whole.

    Args:
        linear_layers (tuple[str, ...]): the linear layers in the adapted blocks, each with a LoRA.
        rank (int): its rank, the adapter's R.
        parameters (int): Σ rank·(D + D') over the linear layers.
        mixture_parameters (int): parameters of the mixtures.
        equal_rank (float): the rank at which LoRA trains as many parameters as the mixtures.
    """

    linear_layers: tuple[str, ...]
    rank: int
    parameters: int
    mixture_parameters: int
    equal_rank: float

    def __str__(self) -> str:
        return (
            f"LoRA of rank {self.rank} on the {len(self.linear_layers)} linear layers in these blocks trains "
            f"{self.parameters:,} parameters,\nthe mixtures {self.mixture_parameters:,}, as many as a LoRA of rank "
            f"{self.equal_rank:.1f} would. Both without what is trained whole."
        )


def compare_lora(model: nn.Module, targets: Iterable[Target], mixture_parameters: int, rank: int) -> LoraComparison:
    """Count what LoRA would train in the adapted blocks.

    Args:
        model (nn.Module): the base model.
        targets (iterable of Target): the adapted blocks. Of a block that begins in one module and ends in another,
            those two and all between them count.
        mixture_parameters (int): parameters of the mixtures.
        rank (int): rank of the LoRA.

    Returns:
        LoraComparison: the numbers.

    Raises:
        ValueError: if there is no linear layer in the blocks.
    """
    modules = {name: without_adapters(module) for name, module in model.named_modules()}
    linear = {name: module for name, module in modules.items() if is_linear(module)}
    order = {name: position for position, name in enumerate(modules)}
    found: dict[str, int] = {}
    for target in targets:
        for name, module in linear.items():
            begins = order[target.entry or target.name] <= order[name]
            ends = name == target.name or name.startswith(f"{target.name}.") or order[name] < order[target.name]
            if begins and ends:
                found[name] = int(module.in_features) + int(module.out_features)  # type: ignore[arg-type]
    if not found:
        raise ValueError("There is no linear layer in the adapted blocks, and LoRA would have nothing to adapt there.")
    total = sum(found.values())
    return LoraComparison(tuple(found), rank, rank * total, mixture_parameters, mixture_parameters / total)


def file_bytes(shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, torch.dtype]) -> int:
    """The size of a safetensors file as PEFT writes it.

    Args:
        shapes (mapping): shapes of the tensors by their names in the file.
        others (mapping): dtypes of those that are not in float32.

    Returns:
        int: the size in bytes.
    """
    dtypes = {name: others.get(name, torch.float32) for name in shapes}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name)):
        begin, end = end, end + prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {"dtype": DTYPES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    written = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-written // 8) * 8 + end
