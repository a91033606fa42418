"""Whether a layer goes on from what it has kept of earlier calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# Arguments in which layers keep what they have read: keys and values, or the states of recurrent layers.
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "past_kv", "cache")

CANNOT_CONTINUE = (
    "It reads in order of time, all tokens from the first on, but the model goes on from a cache of earlier ones, of "
    "which the adapter keeps nothing: its slots would silently start anew. Call the model with all tokens and without "
    "a cache (`generate(..., use_cache=False)`), or use routing='dense' or 'top_k' with bottleneck experts."
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


def continues(index: int, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a layer is called with a cache that has something of this layer in it.

    Args:
        index (int): of the layer; those before it have written to the cache in this very call.
        names (tuple[str, ...]): names of its arguments by position.
        args (tuple): positional arguments of the call.
        kwargs (mapping): arguments by name.

    Returns:
        bool: whether there are tokens before those of this call.
    """
    given = {**dict(zip(names, args)), **kwargs}
    caches = [given[name] for name in CACHES if given.get(name) is not None]
    return any(_has_tokens(cache, index) for cache in caches)


def _has_tokens(cache: Any, index: int) -> bool:
    if isinstance(cache, (tuple, list)):  # keys and values of the layer
        return any(isinstance(each, Tensor) and each.numel() > 0 for each in cache)
    for ask in ("get_seq_length", "has_previous_state"):
        try:
            if bool(getattr(cache, ask)(index)):
                return True
        except (AttributeError, TypeError, ValueError):
            continue  # a cache, or a layer of it, has one of the two
    return False
