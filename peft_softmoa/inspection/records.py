"""Records: what the mixtures of a model read, and what they add, while it runs.

Letters of all shapes: B batch, T tokens, D hidden size, N experts, P slots per expert.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..calls.forward_pass import find_passes
from ..calls.one_pass import Call
from ..layer import SoftMoALayer, is_adapted
from ..method.causal import CausalSoftRouter
from ..method.routers import SoftRouter


class Record(NamedTuple):
    """What one call of an adapted block did with one adapter. The tensors are detached, in float32 or float64.

    B is the number of what the block takes for samples: for attention in windows, the windows of all samples.
    """

    block: str  # name of the block in the base model
    adapter: str
    # (B, T, N, P): the share of each token in what each slot reads; in order of time, in what the last token reads
    dispatch: Tensor
    combine: Tensor  # (B, T, N, P): the weight of each slot in what each token gets
    norms: Tensor  # (B, T, N): the norm of what each expert adds to each token
    mask: Tensor  # (B, T) boolean, true for real tokens; of the others nothing in here has a meaning
    has_slots: bool = True  # whether experts read averages of tokens, as in soft routing, or tokens themselves
    is_causal: bool = False  # whether slots are averages of the tokens so far
    # Of what each token reads in each slot, the mean age in tokens and the effective number of tokens, (B, T, N, P);
    # none if there were tokens before the call that were not recorded
    age: Optional[Tensor] = None
    effective_tokens: Optional[Tensor] = None
    channels: int = 1  # C; if the clips have several, the T tokens of a sample are those of one after the other


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Record]]:
    """Record what the mixtures of a model do.

        with record_routing(model) as records:
            model(**inputs)

    Everything is computed beside the model's own pass, whose output, gradients and random numbers stay what they are;
    outside the context it costs nothing. Routers whose experts read tokens themselves, such as `routing="dense"`, have
    one slot per expert, P = 1; their dispatch weights are the combine weights, divided by their sum over the tokens.
    With gradient checkpointing, only the first pass is recorded. Pieces of streams are recorded one by one, with what
    came before them; `stream_reading` puts them together.

    Args:
        model (nn.Module): a model with adapters, or one that wraps it, such as `DistributedDataParallel`. A compiled
            model runs eagerly in the context, with a warning.

    Yields:
        list[Record]: one for each active adapter of each block, in the order in which they run; it may be emptied
        between passes.

    Raises:
        ValueError: if the model has no Soft-MoA adapter or, while it runs, a mask of tokens in a form that is not
            understood.
    """
    find_layers(model)  # there have to be some
    if any(isinstance(each, torch._dynamo.OptimizedModule) or each._compiled_call_impl for each in model.modules()):
        warnings.warn("The compiled model runs eagerly while its routing is recorded.", stacklevel=3)
    records: list[Record] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for passes in find_passes(model):
            stack.enter_context(passes.recording(partial(_record, records)))
        yield records


def find_layers(model: nn.Module) -> dict[SoftMoALayer, nn.Module]:
    """Find the adapted blocks of a model, each with the base model that it belongs to.

    Args:
        model (nn.Module): a model with adapters, or one that wraps it.

    Returns:
        dict[SoftMoALayer, nn.Module]: the blocks, in the order of the model.

    Raises:
        ValueError: if there is none.
    """
    layers = {
        module: model.get_submodule(path.removesuffix(module.name).rstrip("."))
        for path, module in model.named_modules()
        if is_adapted(module)
    }
    if not layers:
        raise ValueError(
            f"The {type(model).__name__} has no Soft-MoA adapter. Give it one with `get_peft_model(model, "
            "SoftMoAConfig(...))`, or load one with `PeftModel.from_pretrained`."
        )
    return layers


@torch.no_grad()
def _record(records: list[Record], layer: SoftMoALayer, adapter: str, call: Call) -> None:
    mixture: Any = layer.softmoa_mixture[adapter]
    tokens, mask = call.tokens.detach(), call.mask
    # Without dropout, which would draw random numbers that the model's own pass then misses.
    channels = layer.forward_passes.find_channels()
    count = 1 if channels is None else channels.count
    dispatch, combine, norms = mixture.record(tokens, mask, layer.scaling[adapter], call.past, count)
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    has_slots, is_causal = (isinstance(mixture.router, kind) for kind in (SoftRouter, CausalSoftRouter))
    age, effective = call.reading or (None, None)
    weights = dispatch, combine, norms, mask
    records.append(Record(layer.name, adapter, *weights, has_slots, is_causal, age, effective, count))
