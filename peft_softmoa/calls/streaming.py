"""Streams: models that are fed by piece, in which routing goes on from one piece to the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Optional, Union

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..method.past import Past
from .forward_pass import find_passes
from .stream_state import StreamState

Rows = Union[Tensor, Iterable[int]]


class RoutingStream:
    """What the mixtures of a model keep of a stream, or of a batch of streams, from one piece to the next.

    It begins empty. Nothing in it has a gradient.
    """

    def __init__(self) -> None:
        self._states: list[StreamState] = []

    def reset(self, rows: Optional[Rows] = None) -> None:
        """Begin anew.

        Args:
            rows (Tensor or iterable of int, optional): indices of the streams of the batch that do, or a boolean for
                each. Default: all, and the next piece may have another number of them.
        """
        if rows is None:
            for state in self._states:
                state.reset()
        else:
            for past in self._all():
                past.reset(_indices(rows))

    def select(self, rows: Rows) -> None:
        """Go on with some streams of the batch, in another order, also several times.

        Args:
            rows (Tensor or iterable of int): their indices.
        """
        for past in self._all():
            past.select(_indices(rows))

    def to(self, device: Any) -> RoutingStream:
        """Move it to a device."""
        for past in self._all():
            past.to(device)
        return self

    def copy(self) -> RoutingStream:
        """Another stream in the same state; each then goes on alone."""
        other = RoutingStream()
        other._states = [state.copy() for state in self._states]
        return other

    def _all(self) -> Iterator[Past]:
        return (past for state in self._states for past in state.pasts.values())


@contextmanager
def stream_routing(model: nn.Module, stream: Optional[RoutingStream] = None) -> Iterator[RoutingStream]:
    """A context in which each call of a model goes on from the one before: its inputs are pieces of streams.

        with stream_routing(model) as stream, torch.no_grad():
            for piece in pieces:
                logits = model(piece).logits

    Slots go on with their averages, and convolutions with the tokens before. So the mixtures give for the pieces what
    they give for the whole, as long as the base model does. Padding before or after the tokens of a piece is no part of
    its stream: streams of one batch may begin and end apart. The context is of its thread: what another thread calls is
    no part of the stream. A model that goes on from a cache, as in `generate()`, needs no context: the cache holds what
    belongs to its tokens.

    Args:
        model (nn.Module): a model with adapters, in evaluation mode.
        stream (RoutingStream, optional): a stream to go on with. Default: a new one.

    Yields:
        RoutingStream: the stream, which can be reset, and gone on with later.

    Raises:
        ValueError: if the model has no adapter. In the context, if an adapter reads whole clips or misses a piece.
    """
    found = find_passes(model)
    if not found:
        raise ValueError(
            f"`stream_routing` is for models with a Soft-MoA adapter, but {type(model).__name__} has none."
        )
    stream = RoutingStream() if stream is None else stream
    stream._states += [StreamState() for _ in found[len(stream._states) :]]
    with ExitStack() as stack:
        for passes, state in zip(found, stream._states):
            stack.enter_context(passes.streaming(state))
        yield stream


def reads_streams(model: nn.Module) -> bool:
    """Whether the active mixtures of a model can go on from piece to piece, and what they add depends on it.

    Args:
        model (nn.Module): a model, with or without adapters.

    Returns:
        bool: true if some read the tokens in order of time, and none reads whole clips.
    """
    mixing = [
        mixture
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for adapter, mixture in getattr(module, "softmoa_mixture", nn.ModuleDict()).items()
        if adapter in module.active_adapters and mixture.mixes_tokens
    ]
    return bool(mixing) and all(mixture.causal for mixture in mixing)


def _indices(rows: Rows) -> Tensor:
    indices = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows))
    return indices.nonzero().flatten() if indices.dtype == torch.bool else indices.long()
