"""Caches: how a layer goes on from what it has kept of earlier calls, and its mixtures with it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..method.past import Past

# Arguments in which layers keep what they have read: keys and values, or the states of recurrent layers.
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "past_kv", "cache")

# Of which adapter in which block something is kept: the names of the block and of the adapter.
BlockKey = tuple[str, str]

CANNOT_CONTINUE = (
    "It reads in order of time, all tokens from the first on, but the model goes on from a cache of earlier ones with "
    "which this adapter was not called, or which cannot hold its state: its slots would silently start anew. Fill one "
    "of transformers' own caches with the same adapter from the first token on, or call the model with all tokens and "
    "without a cache (`generate(..., use_cache=False)`)."
)


def cache_index(layer: nn.Module, name: str) -> int:
    """The index of a layer in the caches of its model.

    Args:
        layer (nn.Module): the layer.
        name (str): its name in the model.

    Returns:
        int: what the layer says or, if it says nothing, its place in the list of layers.
    """
    indices = (getattr(module, "layer_idx", None) for module in layer.modules())
    places = [int(part) for part in name.split(".") if part.isdigit()]
    return next((index for index in indices if isinstance(index, int)), places[-1] if places else 0)


class LayerCache:
    """The cache with which a layer is called.

    What mixtures keep lies in the layer's own part of it. So it is copied with the cache, reordered with its beams,
    and cropped with its tokens.

    Args:
        cache (Any): the cache.
        index (int): of the layer; those before it have written to the cache in this very call.
    """

    def __init__(self, cache: Any, index: int) -> None:
        self._cache, self._index = getattr(cache, "self_attention_cache", cache), index
        self._begun: dict[BlockKey, Past] = {}
        self.num_tokens = _count_tokens(self._cache, index)

    def past(self, key: BlockKey) -> Past:
        """What a mixture keeps of the tokens in the cache.

        Args:
            key (BlockKey): the block and the adapter.

        Returns:
            Past: to be read and gone on with.

        Raises:
            ValueError: if there are tokens in the cache with which the mixture was not called.
        """
        if self.num_tokens == 0:
            layer = self._part or getattr(self._cache, "layer_class_to_replicate", None)
            is_cut = not hasattr(layer, "crop") or getattr(layer, "is_sliding", True)
            return self._begun.setdefault(key, Past(skips_padding=False, history=not is_cut))
        past: Optional[Past] = getattr(self._part, "softmoa_pasts", {}).get(key)
        if past is None or past.num_tokens != (self.num_tokens or past.num_tokens):
            raise ValueError(CANNOT_CONTINUE)
        return past

    def keep(self) -> None:
        """Put what mixtures have begun to keep into the cache, where the layer has made its part of it by now."""
        part = self._part
        if self._begun and part is not None:
            if not hasattr(part, "softmoa_pasts"):
                kind: Any = type(part)
                part.__class__ = _followed(kind)
                part.softmoa_pasts = {}
            part.softmoa_pasts.update(self._begun)

    @property
    def _part(self) -> Any:
        layers = getattr(self._cache, "layers", ())
        return layers[self._index] if self._index < len(layers) else None


def find_cache(
    index: int, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Optional[LayerCache]:
    """The cache with which a layer is called.

    Args:
        index (int): of the layer.
        names (tuple[str, ...]): names of its arguments by position.
        args (tuple): positional arguments of the call.
        kwargs (mapping): arguments by name.

    Returns:
        LayerCache, optional: None if there is none.
    """
    given = {**dict(zip(names, args)), **kwargs}
    return next((LayerCache(given[name], index) for name in CACHES if given.get(name) is not None), None)


def find_past(
    mixture: Any,
    key: BlockKey,
    stream: Any,
    piece: Any,
    cache: Optional[LayerCache],
    is_packed: bool,
    training: bool,
) -> Optional[Past]:
    """What a mixture keeps of the tokens before those of a call, in the cache of the call or in a stream.

    Args:
        mixture (Mixture): the mixture.
        key (BlockKey): its block and its adapter.
        stream (StreamState, optional): the stream.
        piece (ForwardPass, optional): the pass of the model as a whole, as for `StreamState.past`.
        cache (LayerCache, optional): the cache with which the layer around the mixture is called.
        is_packed (bool): whether the samples are packed one after another: they cannot be gone on with.
        training (bool): whether the block is in training.

    Returns:
        Past, optional: to be read and gone on with; None if there is neither, or no token depends on earlier ones.

    Raises:
        ValueError: if the cache has tokens with which the mixture was not called, or a stream is packed, is to train,
            has a cache besides or has missed a piece, or if the mixture reads whole clips.
    """
    if not mixture.reads_in_time:
        if stream is not None and mixture.mixes_tokens:
            raise ValueError(
                f"The mixture of adapter '{key[1]}' reads whole clips, so that each piece of a stream would be a clip "
                "of its own. Train an adapter with `causal=True` for streams."
            )
        return None
    if is_packed:
        if stream is not None or (cache is not None and cache.num_tokens != 0):
            raise ValueError("Packed samples are whole, and cannot go on from what came before. Give a padded batch.")
        return None
    if stream is None:
        return None if cache is None else cache.past(key)
    if cache is not None:
        raise ValueError(
            "In a stream, it is called with a cache, which is new for each piece or holds a state of its own. Call the "
            "model with `use_cache=False`, or with its cache outside of `stream_routing`."
        )
    if training:
        raise ValueError("Streams are not for training, in which blocks may run again. Call `eval()` first.")
    past: Past = stream.past(key, piece)
    return past


def _count_tokens(cache: Any, index: int) -> Optional[int]:
    """How many tokens a cache has of a layer; None if it may have some, and does not tell how many."""
    if isinstance(cache, (tuple, list)):  # keys and values of the layer
        return None if any(isinstance(each, Tensor) and each.numel() > 0 for each in cache) else 0
    for ask in ("get_seq_length", "has_previous_state"):
        try:
            found = getattr(cache, ask)(index)
        except (AttributeError, TypeError, ValueError):
            continue  # a cache, or a layer of it, has one of the two
        if ask == "get_seq_length":
            return int(found)
        return None if found else 0
    return None


def _new_followed(kind: Any) -> Any:
    return object.__new__(_followed(kind))


@cache
def _followed(kind: type) -> type:
    """The class of parts of caches of a kind in which lies what mixtures keep: the same is done to both."""

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        kind.reorder_cache(self, beam_idx)  # type: ignore[attr-defined]
        for past in self.softmoa_pasts.values():
            past.select(beam_idx)

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        before = self.get_seq_length()
        kind.crop(self, *args, **kwargs)  # type: ignore[attr-defined]
        for past in self.softmoa_pasts.values():
            past.crop(before - self.get_seq_length())

    def reset(self: Any) -> None:
        kind.reset(self)  # type: ignore[attr-defined]
        self.softmoa_pasts.clear()

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        kind.batch_repeat_interleave(self, repeats)  # type: ignore[attr-defined]
        for past in self.softmoa_pasts.values():
            past.select(torch.arange(past.batch or 0).repeat_interleave(repeats))

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        kind.batch_select_indices(self, indices)  # type: ignore[attr-defined]
        for past in self.softmoa_pasts.values():
            past.select(torch.arange(past.batch or 0)[indices.cpu()])

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _new_followed, (kind,), vars(self)

    methods = (reorder_cache, crop, reset, batch_repeat_interleave, batch_select_indices, __reduce_ex__)
    own = {method.__name__: method for method in methods if hasattr(kind, method.__name__)}
    # Without `_layer_type`, or transformers would make such parts for every cache of that type.
    return type(kind.__name__, (kind,), {**own, "_layer_type": None})
