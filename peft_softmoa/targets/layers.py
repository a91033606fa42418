"""Where the self-attention and the feed-forward of a transformer's layers are, by its structure.

What counts is what the linear layers read and write, not what anything is called. Letters: D width of a layer's tokens,
F width inside of its feed-forward, H width of all heads of its attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# What layers lie in, one after the other.
LISTS = (nn.ModuleList, nn.Sequential)


class Block(NamedTuple):
    """Where a mixture reads and where it adds: names of modules in the model."""

    entry: str  # the mixture reads what this one is called with
    exit: str  # and adds to what this one returns; for most blocks it is the same one
    module: str  # the block as a whole, or its exit if it is not one module
    reads: int  # width of the tokens that it reads; all write D


class Layer(NamedTuple):
    """One layer of a transformer."""

    name: str
    width: int  # D
    attentions: tuple[Block, ...]  # the self-attention, and after it a decoder's cross-attention
    ffns: tuple[Block, ...]  # a Conformer has two half-steps


class Linear(NamedTuple):
    """A linear layer: its name, and the widths that it reads and writes."""

    name: str
    reads: int
    writes: int


def find_layers(model: nn.Module) -> list[list[Layer]]:
    """Find the stacks of layers: lists of modules with a self-attention in each.

    A module in a layer is

        a feed-forward   if all but one of its linear layers widen tokens, D → F, or D → 2F if one does so for two, and
                         the other one narrows them, F → D, with F >= D; two modules with one linear layer each are
                         one too, with F > D; a convolution beside them makes them something else
        an attention     if three or more of its four or more linear layers read the same, or if they write three times
                         what the last one reads (fused queries, keys and values), H → D

    Anything else is searched inside.

    Args:
        model (nn.Module): the model, with or without adapters and weights.

    Returns:
        list[list[Layer]]: the layers of each stack.
    """
    stacks = []
    for name, module in model.named_modules():
        if isinstance(module, LISTS):
            layers = [_find_layer(f"{name}.{index}", layer) for index, layer in module.named_children()]
            if layers and all(layer.attentions for layer in layers):
                stacks.append(layers)
    return stacks


def is_repeated(module: nn.Module) -> bool:
    """Whether a module is a list of modules of one class, each of which has parts of its own."""
    children = list(module.children())
    return (
        isinstance(module, LISTS)
        and len({type(child) for child in children}) == 1
        and all(any(True for _ in child.children()) for child in children)
    )


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The base model's own module of a name, also if it or one around it has adapters.

    Args:
        model (nn.Module): the model.
        name (str): name of the module in the model without adapters; the empty name is the model.

    Returns:
        nn.Module: the module.

    Raises:
        AttributeError: if there is none.
    """
    module = without_adapters(model)
    for part in filter(None, name.split(".")):
        module = without_adapters(getattr(module, part))
    return module


def without_adapters(module: nn.Module) -> nn.Module:
    """The base model's own module in a module that may have adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of a parameter or buffer, also where DeepSpeed's ZeRO-3 has left each process a part of it, or nothing.

    Args:
        tensor (Tensor): the parameter or buffer.

    Returns:
        tuple[int, ...]: the shape of all parts together.
    """
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised or not."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes tokens: LayerNorm, RMSNorm and the like, but not BatchNorm1d."""
    return type(module).__name__.lower().endswith("norm") and any(True for _ in module.parameters(recurse=False))


def _find_layer(name: str, layer: nn.Module) -> Layer:
    layer = without_adapters(layer)
    sizes = Counter(size for linear in _linears(layer, name) for size in (linear.reads, linear.writes))
    width = max(sizes, key=lambda size: sizes[size], default=0)
    blocks: dict[str, list[Block]] = {"attention": [], "ffn": []}
    for kind, block in _find_blocks(layer, name, width):
        blocks[kind].append(block)
    return Layer(name, width, tuple(blocks["attention"]), tuple(blocks["ffn"]))


def _find_blocks(module: nn.Module, name: str, width: int, pairs: bool = True) -> Iterator[tuple[str, Block]]:
    """The blocks in a module, in the order in which they are defined; with or without those that are a pair in it."""
    widening: list[Linear] = []
    for child_name, child in module.named_children():
        path, child = f"{name}.{child_name}", without_adapters(child)
        if is_repeated(child):
            continue  # a stack of its own
        linears = list(_linears(child, path))
        path, child = _without_wrapping(child, path, linears)
        if _is_ffn(linears, width) and not any(isinstance(part, CONVOLUTIONS) for part in child.modules()):
            yield "ffn", _ffn_block(child, path, linears, width)
        elif _is_attention(child, path, linears, width):
            yield "attention", _attention_block(child, path, linears, width)
        elif len(linears) == 1 and pairs:
            widening += linears if linears[0].reads == width < linears[0].writes else ()
            if widening and linears[0] not in widening and _is_ffn([*widening, *linears], width):
                yield "ffn", Block(widening[0].name, linears[0].name, linears[0].name, width)
                widening = []
        elif len(linears) > 1:
            pairs_in_it = not any(isinstance(part, CONVOLUTIONS) for part in child.children())
            yield from _find_blocks(child, path, width, pairs_in_it)


def _without_wrapping(module: nn.Module, name: str, linears: list[Linear]) -> tuple[str, nn.Module]:
    """The smallest module with all the linear layers of another one: T5 wraps norm and residual around its blocks."""
    for child_name, child in module.named_children():
        path, child = f"{name}.{child_name}", without_adapters(child)
        if len(linears) > 1 and list(_linears(child, path)) == linears:
            return _without_wrapping(child, path, linears)
    return name, module


def _linears(module: nn.Module, name: str) -> Iterator[Linear]:
    module = without_adapters(module)
    if is_linear(module):
        yield Linear(name, int(module.in_features), int(module.out_features))  # type: ignore[arg-type]
    elif isinstance(module, Conv1D):
        yield Linear(name, *whole_shape(module.weight))
    else:
        for child_name, child in module.named_children():
            yield from _linears(child, f"{name}.{child_name}")


def _is_ffn(linears: list[Linear], width: int) -> bool:
    if len(linears) not in (2, 3):
        return False
    *widening, narrowing = sorted(linears, key=lambda linear: linear.writes == width and linear.reads != width)
    inner = narrowing.reads
    return (
        narrowing.writes == width
        and all(linear.reads == width for linear in widening)
        # Three linear layers of one width are rather queries, keys and values.
        and (inner > width or inner == width and len(linears) == 2)
        and [linear.writes for linear in widening] in ([inner], [2 * inner], [inner, inner])
    )


def _is_attention(module: nn.Module, name: str, linears: list[Linear], width: int) -> bool:
    # The first layer may read something narrower or wider than what it writes.
    separate = len(linears) >= 4 and max(Counter(linear.reads for linear in linears).values()) >= 3
    # Queries, keys and values from one or two linear layers, and the last one, which reads all heads.
    fused = len(linears) in (2, 3) and linears[-1].writes == width
    fused = fused and sum(linear.writes for linear in linears[:-1] if linear.reads == width) == 3 * linears[-1].reads
    if not (separate or fused):
        return False
    parts = [(f"{name}.{path}", part) for path, part in module.named_modules() if path]
    return not any(_is_ffn(list(_linears(part, path)), width) for path, part in parts)


def _ffn_block(module: nn.Module, name: str, linears: list[Linear], width: int) -> Block:
    # What comes after the last linear layer, such as dropout, comes after the mixture too.
    if any(isinstance(part, nn.Dropout) or is_norm(part) for part in module.modules()):
        exit = [linear for linear in linears if linear.reads == max(each.reads for each in linears)][-1]
        return Block(next(linear.name for linear in linears if linear != exit), exit.name, name, width)
    return Block(name, name, name, width)


def _attention_block(module: nn.Module, name: str, linears: list[Linear], width: int) -> Block:
    entry = exit = name
    for path, part in module.named_modules():
        inside = list(_linears(part, f"{name}.{path}"))
        after = [child for child in part.children() if isinstance(child, nn.Dropout) or is_norm(child)]
        # As in BERT: the last linear layer in a module with dropout and normalization.
        if path and len(inside) == 1 and after and inside[0].writes == width:
            exit = inside[0].name
    [(reads, _)] = Counter(linear.reads for linear in linears).most_common(1)
    # Queries, keys and values are side by side; there may be projections of positions, too.
    readers = [linear.name for linear in linears if linear.reads == reads]
    [(parent, _)] = Counter(reader.rpartition(".")[0] for reader in readers).most_common(1)
    first = next(reader for reader in readers if reader.rpartition(".")[0] == parent)
    for path, part in module.named_modules():
        if f"{name}.{path}" == first:
            break
        if is_norm(part) and any(whole_shape(parameter) == (width,) for parameter in part.parameters()):
            entry = first  # normalized inside of the block
    return Block(entry, exit, name, reads)
