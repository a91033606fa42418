"""Which tokens are real: nothing else reads attention masks.

Attention blocks are called with a mask, in one of many forms. Feed-forward blocks never are: their mask is that of
the attention or of the layer around them. Letters: B batch, T tokens, H heads, W windows, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# Arguments with masks of tokens, and with the cumulative lengths of samples that are packed one after another.
MASKS = ("attention_mask", "attn_mask", "mask", "conv_attention_mask", "input_features_mask")
# This one is true for padding, Gemma 3n's.
PADDING_MASKS = ("audio_mel_mask",)
CUMULATIVE_LENGTHS = ("cu_seqlens", "cu_seq_lens_q")

# These belong to other tokens, or to heads.
OTHER_MASKS = ("encoder_attention_mask", "head_mask", "layer_head_mask", "cross_attn_head_mask")

# An additive mask takes at least this much from the logits of a padded token: its weight is then below 1e-43.
MASKED = -100.0


class Mask(NamedTuple):
    """A mask, or cumulative lengths, as a module is called with it."""

    name: str  # of the argument
    value: Any
    past: int = 0  # in a mask of blocks, how many tokens before its own a block sees


def find_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a block is called with as its tokens.

    Args:
        args (tuple): the arguments by position.
        kwargs (mapping): the arguments by name.

    Returns:
        Any: the first positional argument, or `hidden_states` or `input`; None if there is none of them.
    """
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module, in the order in which they are given by position."""
    return tuple(inspect.signature(module.forward).parameters)


def is_mask(name: str) -> bool:
    """Whether an argument is a mask of tokens, or has the cumulative lengths of packed samples, by its name."""
    return name in CUMULATIVE_LENGTHS or (name.endswith("mask") and name not in OTHER_MASKS)


def takes_mask(module: nn.Module) -> bool:
    """Whether a module can be called with a mask, also if it only passes it on."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(is_mask(parameter.name) or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def past_horizon(module: nn.Module) -> int:
    """How many tokens before a block an attention in blocks sees, which its mask does not show.

    Args:
        module (nn.Module): the attention, or a module around it.

    Returns:
        int: what it says, as Gemma 4's does; 0 if it says nothing.
    """
    horizons = (getattr(each, "max_past_horizon", None) for each in module.modules())
    return next((horizon for horizon in horizons if isinstance(horizon, int)), 0)


def find_mask(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], past: int = 0
) -> Optional[Mask]:
    """The mask that a module is called with, also one of an unknown name, which `token_mask` refuses.

    Args:
        names (tuple[str, ...]): names of the arguments by position.
        args (tuple): positional arguments of the call.
        kwargs (mapping): arguments by name.
        past (int): as from `past_horizon`. Default: 0.

    Returns:
        Mask, optional: the mask in the form in which it is given, or None.
    """
    given = {**dict(zip(names, args)), **kwargs}
    known = MASKS + PADDING_MASKS + CUMULATIVE_LENGTHS
    for name in (*(name for name in given if is_mask(name) and name not in known), *known):
        if given.get(name) is not None:
            return Mask(name, given[name], past)
    return None


def unpack(cumulative_lengths: Tensor, *packed: Tensor) -> tuple[Tensor, ...]:
    """Make padded batches from samples that are packed one after another.

    Args:
        cumulative_lengths (Tensor): c, `(B + 1,)` integer, from 0 to L: sample b has the tokens from c[b] to c[b + 1].
        packed (Tensor): any number of `(L, D)`, with the number L of all tokens.

    Returns:
        tuple[Tensor, ...]: the mask `(B, T)`, true for real tokens, and for each input `(B, T, D)`, zero where it is
        padded; `x[mask]` packs x again.

    Raises:
        ValueError: if the lengths do not fit the tokens.
    """
    given = cumulative_lengths
    lengths = given.diff()
    on_host = lengths.tolist()
    if given.ndim != 1 or given.is_floating_point() or any(sum(on_host) != len(tokens) for tokens in packed):
        raise ValueError(
            f"The cumulative lengths of its packed samples, {given.tolist()}, do not fit {len(packed[0])} tokens."
        )
    padded = [pad_sequence(tokens.split(on_host), batch_first=True) for tokens in packed]
    return torch.arange(padded[0].shape[1], device=given.device) < lengths[:, None], *padded


def token_mask(mask: Optional[Mask], batch: int, num_tokens: int, cached: Optional[int] = None) -> Optional[Tensor]:
    """Read which tokens are real from a mask in the form that an attention takes.

        2-D   (B, T)                      boolean or integer, nonzero for real tokens, as for flash attention
        3-D   (B, T, T) or (W, T, T)      with one mask for each window, the same for all samples
        4-D   (B or 1, H or 1, T or 1, T) boolean or integer, nonzero where a token is seen, or additive
        5-D   (B, 1, blocks, C, tokens)   the same for blocks of C tokens, which see some before and after them
        flex attention's block mask

    A mask of more than two dimensions says which tokens each token sees. A token is real if it sees itself: under
    padding, windows, chunks and order in time alike. With a cache, the last dimension has the tokens in it, too.

    Args:
        mask (Mask, optional): the mask; None if there is none.
        batch (int): B, number of samples or of windows.
        num_tokens (int): T.
        cached (int, optional): number of tokens before these in a cache. Default: there is no cache.

    Returns:
        Tensor, optional: `(B, T)` boolean, true for real tokens; None if there is no mask.

    Raises:
        ValueError: for any other form.
    """
    if mask is None:
        return None
    value = mask.value
    if hasattr(value, "mask_mod") and not cached:
        return _read_block_mask(value, batch, num_tokens)
    if not isinstance(value, Tensor) or mask.name not in MASKS + PADDING_MASKS:
        raise ValueError(_not_understood(mask, batch, num_tokens))
    real = value > MASKED if value.is_floating_point() else value != 0
    if mask.name in PADDING_MASKS:
        real = ~real
    if cached is not None and value.ndim in (2, 4) and real.shape[-1] > num_tokens:
        # Of a window that slides, the last tokens are these; of a cache of fixed size, those after the ones in it.
        real = real.narrow(-1, min(cached, real.shape[-1] - num_tokens), num_tokens)
    if value.ndim == 5:
        real = real[:, 0].diagonal(mask.past, dim1=-2, dim2=-1).flatten(1)[:, :num_tokens]
    if value.ndim == 4:
        real = real[:, 0]
    if value.ndim in (3, 4) and real.shape[-2] == real.shape[-1]:
        real = real.diagonal(dim1=-2, dim2=-1)
    elif value.ndim in (3, 4) and real.shape[-2] == 1:
        real = real[:, 0]
    windows = value.ndim == 3 and 0 < real.shape[0] < batch and batch % real.shape[0] == 0
    if windows:
        real = real.repeat(batch // real.shape[0], 1)
    elif value.ndim == 4 and real.shape[0] == 1:
        real = real.expand(batch, -1)
    # In two dimensions a float may be a weight or an addend.
    if real.shape != (batch, num_tokens) or (value.ndim == 2 and value.is_floating_point()):
        raise ValueError(_not_understood(mask, batch, num_tokens))
    return real


def _read_block_mask(mask: Any, batch: int, num_tokens: int) -> Tensor:
    device = mask.kv_num_blocks.device
    samples = torch.arange(batch, device=device)[:, None]
    tokens = torch.arange(num_tokens, device=device)[None]
    real = mask.mask_mod(samples, torch.zeros_like(tokens), tokens, tokens)
    return real.to(torch.bool).expand(batch, num_tokens)


def _not_understood(mask: Mask, batch: int, num_tokens: int) -> str:
    given = type(mask.value).__name__
    if isinstance(mask.value, Tensor):
        given += f" {mask.value.dtype} of shape {tuple(mask.value.shape)}"
    return (
        f"Its attention mask `{mask.name}`, a {given}, is not understood for {batch} samples of {num_tokens} tokens. "
        f"A mask is called {', '.join(MASKS)}, and may be ({batch}, {num_tokens}), boolean or integer; ({batch}, "
        f"heads, {num_tokens}, {num_tokens}), boolean, integer or additive; or flex attention's block mask. With "
        "routing='dense' and bottleneck experts no mask is needed."
    )
