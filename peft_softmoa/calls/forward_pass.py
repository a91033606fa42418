"""What belongs to one forward pass of a model, and not to the model.

A thread has its own passes, the innermost last: a call of the model within a call is a pass of its own. Hooks open and
close them (`hooks.py`), adapted blocks read them. Nothing of a call lies on a module.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional
from weakref import WeakSet

import torch
from torch import nn

from .caches import LayerCache
from .channels import Channels, only_channels
from .masks import Mask
from .mixed_batch import MixedBatch
from .one_pass import MODEL, CallKey, ForwardPass, LayerCall, Recorder, RouterLoss
from .stream_state import StreamState


class ForwardPasses(threading.local):
    """The forward passes of one model, each thread's own; copies of the model begin without any.

    Args:
        kept_channels (WeakSet): the channels of passes whose graphs are still there, the same for all threads: a
            backward pass has threads of its own.
    """

    def __init__(self, kept_channels: WeakSet[Channels]) -> None:
        self.kept_channels = kept_channels
        self.open: list[ForwardPass] = []
        self.recorders: tuple[Recorder, ...] = ()
        self.router_loss = RouterLoss()
        self.stream: Optional[StreamState] = None  # what mixtures keep from one pass to the next
        # A mixed batch is for passes that are not within another one: how many were open when it began.
        self._mixed_batch: Optional[MixedBatch] = None
        self._depth = 0
        # What modules tell that gradient checkpointing runs again in the backward pass, when no call is open.
        self._recomputed: dict[CallKey, LayerCall] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return make_passes, ()

    @property
    def current(self) -> ForwardPass:
        """The innermost pass; a new one that nobody keeps if there is none."""
        return self.open[-1] if self.open else self._new()

    def enter(self, key: CallKey) -> bool:
        """Note that the model or a layer is called.

        Args:
            key (CallKey): by which adapter's hook, and which layer.

        Returns:
            bool: whether a pass begins with it.
        """
        is_model = key.layer == MODEL
        if is_model:
            self._recomputed.clear()
        calls = self.open[-1].calls if self.open else None
        # Else it is another adapter's hook of the same call, or a layer in it.
        begins = calls is None or key in calls or (is_model and any(each.layer != MODEL for each in calls))
        if begins:
            self.open.append(self._new())
        self.open[-1].calls[key] = LayerCall()
        return begins

    def leave(self, key: CallKey) -> Optional[ForwardPass]:
        """Note that a call has returned or failed.

        Args:
            key (CallKey): as for `enter`.

        Returns:
            ForwardPass, optional: the pass, if it ends with it.
        """
        if not self.open or key not in self.open[-1].calls:
            return None
        del self.open[-1].calls[key]
        return None if self.open[-1].calls else self.open.pop()

    def tell_tokens(self, key: CallKey, module: str, tokens: Any) -> None:
        """Keep what a module is called with in which a block begins.

        Args:
            key (CallKey): the adapter, and the layer around the block.
            module (str): name of the module.
            tokens (Any): its tokens.
        """
        call = self._find(key)
        if call is None or (module in call.tokens and self._is_recomputed(key, call)):
            call = self._recomputed[key] = LayerCall()
        call.tokens[module] = tokens

    def tell_mask(self, key: CallKey, module: str, mask: Optional[Mask]) -> None:
        """Keep the mask that a module is called with; the last one counts.

        Args:
            key (CallKey): the adapter, and the layer.
            module (str): name of the module.
            mask (Mask, optional): the mask.
        """
        call = self._find(key)
        if call is None or (module in call.mask_sources and self._is_recomputed(key, call)):
            call = self._recomputed[key] = LayerCall()
        call.mask = mask
        call.mask_sources.add(module)

    def tell_cache(self, key: CallKey, cache: Optional[LayerCache]) -> None:
        """Note with which cache a layer is called.

        Args:
            key (CallKey): the adapter, and the layer.
            cache (LayerCache, optional): the cache.
        """
        call = self._find(key)
        if call is not None:
            call.cache = cache

    def find_cache(self, key: CallKey) -> Optional[LayerCache]:
        """The cache with which a layer is called.

        Args:
            key (CallKey): the adapter, and the layer.

        Returns:
            LayerCache, optional: None if there is none.
        """
        call = self._find(key)
        return None if call is None else call.cache

    def take_tokens(self, key: CallKey, module: str) -> Any:
        """The tokens of a block that begins in another module, once.

        Args:
            key (CallKey): the adapter, and the layer around the block.
            module (str): name of the module in which it begins.

        Returns:
            Any: its tokens; None if it was not called.
        """
        call = self._find(key)
        return None if call is None else call.tokens.pop(module, None)

    def read_mask(self, key: CallKey, block: str) -> Optional[Mask]:
        """The mask of a block that is not called with one itself.

        Args:
            key (CallKey): the adapter, and the layer around the block.
            block (str): name of the block.

        Returns:
            Mask, optional: the mask in the form in which it is given, or None.

        Raises:
            ValueError: if gradient checkpointing runs a block again that comes before the layer's attention.
        """
        call = self._find(key)
        is_read = call is not None and block in call.mask_readers and self._is_recomputed(key, call)
        if call is None or not call.mask_sources or is_read:
            if in_backward():
                raise ValueError(
                    "Under gradient checkpointing, its mask is not known when the backward pass runs it again, because "
                    "it comes before the self-attention of its layer. Adapt a block after it, use routing='dense', or "
                    "train without gradient checkpointing."
                )
            return None
        call.mask_readers.add(block)
        return call.mask

    def find_channels(self) -> Optional[Channels]:
        """The channels of the clips of the current pass, also if gradient checkpointing runs it again.

        Returns:
            Channels, optional: None if the clips have none, or nothing is known of them.

        Raises:
            ValueError: if it is not known which pass is run again.
        """
        if in_backward():
            return only_channels(self.kept_channels)
        folded = self.current.folded
        return None if folded is None else folded.channels

    @contextmanager
    def mixing(self, batch: MixedBatch) -> Iterator[None]:
        """A context in which the passes of this thread mix adapters; a call within one of them does not.

        Args:
            batch (MixedBatch): the adapter of each sample.
        """
        before = self._mixed_batch, self._depth
        self._mixed_batch, self._depth = batch, len(self.open)
        try:
            yield
        finally:
            del self.open[self._depth :]  # left behind if somebody has interrupted the program
            self._mixed_batch, self._depth = before

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """A context in which a function is told what the mixtures read in this thread.

        Args:
            recorder (Recorder): is called with an adapted block, an adapter's name, and what its mixture is called
                with. It is not called when a backward pass runs a block again.
        """
        before = self.recorders
        self.recorders = (*before, recorder)
        try:
            yield
        finally:
            self.recorders = before

    @contextmanager
    def streaming(self, stream: StreamState) -> Iterator[None]:
        """A context in which the passes of this thread go on from one another.

        Args:
            stream (StreamState): what mixtures keep.
        """
        before = self.stream
        self.stream = stream
        try:
            yield
        finally:
            self.stream = before

    def _new(self) -> ForwardPass:
        return ForwardPass(self._mixed_batch if len(self.open) == self._depth else None)

    def _find(self, key: CallKey) -> Optional[LayerCall]:
        # A backward pass may run within a call, too.
        if self.open and key in self.open[-1].calls and not in_backward():
            return self.open[-1].calls[key]
        return self._recomputed.get(key)

    def _is_recomputed(self, key: CallKey, call: LayerCall) -> bool:
        return call is self._recomputed.get(key)


def make_passes() -> ForwardPasses:
    """The forward passes of a model that has not been called."""
    return ForwardPasses(WeakSet())


def find_passes(model: nn.Module) -> list[ForwardPasses]:
    """The passes of the adapted models in a model.

    Args:
        model (nn.Module): a model with adapters, or one that wraps it.

    Returns:
        list[ForwardPasses]: one for each model that has adapters.
    """
    found = (getattr(module, "forward_passes", None) for module in model.modules())
    return list({id(each): each for each in found if isinstance(each, ForwardPasses)}.values())


def in_backward() -> bool:
    """Whether a backward pass runs, in which gradient checkpointing runs blocks again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
