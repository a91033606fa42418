"""Which tokens are real: nothing else reads attention masks.

Attention blocks are called with a mask, in one of many forms. Feed-forward blocks never are, and some blocks begin in
one module and end in another: then hooks keep what the layer around them is called with. Letters: B batch, T tokens,
H heads, W windows, D width.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from .shapes import find_tokens

# What masks of tokens are called, and what the limits of samples that are packed one after another.
MASKS = ("attention_mask", "attn_mask", "mask", "conv_attention_mask", "input_features_mask")
LIMITS = ("cu_seqlens", "cu_seq_lens_q")

# These belong to other tokens, or to heads.
OTHER_MASKS = ("encoder_attention_mask", "head_mask", "layer_head_mask", "cross_attn_head_mask")

# An additive mask takes at least this much from the logits of a padded token: its weight is then below 1e-43.
MASKED = -100.0


class Mask(NamedTuple):
    """A mask, or limits, as a module is called with it."""

    name: str  # of the argument
    value: Any


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module, in the order in which they are given by position."""
    return tuple(inspect.signature(module.forward).parameters)


def is_mask(name: str) -> bool:
    """Whether an argument is a mask of tokens, or has the limits of packed samples, by its name."""
    return name in LIMITS or (name.endswith("mask") and name not in OTHER_MASKS)


def takes_mask(module: nn.Module) -> bool:
    """Whether a module can be called with a mask, also if it only passes it on."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(is_mask(parameter.name) or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def find_mask(names: tuple[str, ...], args: tuple, kwargs: Mapping[str, Any]) -> Optional[Mask]:
    """The mask that a module is called with, also one of an unknown name, which `token_mask` refuses.

    Args:
        names (tuple[str, ...]): names of the arguments by position.
        args, kwargs: the arguments of the call.

    Returns:
        Mask, optional: the mask in the form in which it is given, or None.
    """
    given = {**dict(zip(names, args)), **kwargs}
    others = [name for name in given if is_mask(name) and name not in MASKS + LIMITS]
    for name in (*others, *MASKS, *LIMITS):
        if given.get(name) is not None:
            return Mask(name, given[name])
    return None


def unpack(limits: Tensor, *packed: Tensor) -> tuple[Tensor, ...]:
    """Make padded batches from samples that are packed one after another.

    Args:
        limits (Tensor): `(B + 1,)` integer, from 0 to L: sample b has the tokens from `limits[b]` to `limits[b + 1]`.
        packed (Tensor): any number of `(L, D)`, with the number L of all tokens.

    Returns:
        tuple[Tensor, ...]: the mask `(B, T)`, true for real tokens, and for each input `(B, T, D)`, zero where it is
        padded; `x[mask]` packs x again.

    Raises:
        ValueError: if the limits do not fit the tokens.
    """
    lengths = limits.diff()
    on_host = lengths.tolist()
    if limits.ndim != 1 or limits.is_floating_point() or any(sum(on_host) != len(tokens) for tokens in packed):
        raise ValueError(f"Its limits of packed samples, {limits.tolist()}, do not fit {len(packed[0])} tokens.")
    padded = [pad_sequence(tokens.split(on_host), batch_first=True) for tokens in packed]
    return torch.arange(padded[0].shape[1], device=limits.device) < lengths[:, None], *padded


def token_mask(mask: Optional[Mask], batch: int, num_tokens: int) -> Optional[Tensor]:
    """Read which tokens are real from a mask in the form that an attention takes.

        2-D   (B, T)                      boolean or integer, nonzero for real tokens, as for flash attention
        3-D   (B, T, T) or (W, T, T)      with one mask for each window, the same for all samples
        4-D   (B or 1, H or 1, T or 1, T) boolean or integer, nonzero where a token is seen, or additive
        flex attention's block mask

    A mask of more than two dimensions says which tokens each token sees. A token is real if it sees itself: under
    padding, windows, chunks and order in time alike.

    Args:
        mask (Mask, optional): the mask; None if there is none.
        batch (int): B, number of samples or of windows.
        num_tokens (int): T.

    Returns:
        Tensor, optional: `(B, T)` boolean, true for real tokens; None if there is no mask.

    Raises:
        ValueError: for any other form.
    """
    if mask is None:
        return None
    value = mask.value
    if hasattr(value, "mask_mod"):
        return _read_block_mask(value, batch, num_tokens)
    if not isinstance(value, Tensor) or mask.name not in MASKS:
        raise ValueError(_not_understood(mask, batch, num_tokens))
    real = value > MASKED if value.is_floating_point() else value != 0
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


def in_backward() -> bool:
    """Whether a backward pass runs, in which gradient checkpointing runs blocks again."""
    return torch._C._current_graph_task_id() != -1


class LayerCall:
    """What one call of a transformer's layer passes to an adapted block in it that does not get it itself.

    Hooks keep it, and drop it after the call. Gradient checkpointing may run a layer's forward again without the
    layer's own hooks; those of the modules inside of it run then too, so the mask is taken from the attention as well.

    Args:
        mixes_tokens (bool): whether the mixture's output for a token depends on others, so that it needs the mask.
        balances (bool): whether it has a load-balancing loss, which needs the mask in training.
    """

    def __init__(self, mixes_tokens: bool, balances: bool) -> None:
        self.mixes_tokens = mixes_tokens
        self.reads_mask = mixes_tokens or balances
        self.tokens: Optional[Tensor] = None
        self.mask: Optional[Mask] = None
        self.has_seen_mask = False
        self.has_hooks = False
        self.keeps_mask = False
        self.is_open = False

    def __getstate__(self) -> dict[str, Any]:
        # Copies keep the hooks, but nothing of a call that an error has left open.
        return {**self.__dict__, "tokens": None, "mask": None, "has_seen_mask": False, "is_open": False}

    def hook(
        self, entry: Optional[nn.Module], masked: Sequence[nn.Module], layer: Optional[nn.Module]
    ) -> list[RemovableHandle]:
        """Add the hooks that a block needs.

        Args:
            entry (nn.Module, optional): the module where the block begins, if it is another one than where it ends.
            masked (sequence of nn.Module): modules that are called with its tokens' mask, if it is not.
            layer (nn.Module, optional): the layer around the block, after which everything is dropped.

        Returns:
            list[RemovableHandle]: they remove the hooks.
        """
        handles = []
        if entry is not None:
            handles.append(entry.register_forward_pre_hook(self._keep_tokens, with_kwargs=True))
        for module in masked:
            keep = partial(self._keep_mask, argument_names(module))
            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        if handles and layer is not None:
            handles.append(layer.register_forward_pre_hook(self._open))
            handles.append(layer.register_forward_hook(self._close, always_call=True))
        self.keeps_mask, self.has_hooks = bool(masked), bool(handles)
        return handles

    @contextlib.contextmanager
    def keeping_mask(self, masked: Sequence[nn.Module], layer: Optional[nn.Module]) -> Iterator[None]:
        """A context in which the mask is kept, also if the mixture needs none.

        Args:
            masked (sequence of nn.Module): as for `hook`.
            layer (nn.Module, optional): as for `hook`.
        """
        if self.keeps_mask or not masked:
            yield
            return
        had_hooks = self.has_hooks
        handles = self.hook(None, masked, layer)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.keeps_mask, self.has_hooks = False, had_hooks
            self.mask, self.has_seen_mask, self.is_open = None, False, False

    def take_tokens(self) -> Optional[Tensor]:
        """The tokens that are kept, once; None if there are none."""
        tokens, self.tokens = self.tokens, None
        return tokens

    def take_mask(self) -> Optional[Mask]:
        """The mask that is kept.

        Returns:
            Mask, optional: the mask in the form in which it is given, or None.

        Raises:
            ValueError: if gradient checkpointing runs a block again that comes before the layer's attention.
        """
        if self.keeps_mask and not self.has_seen_mask and in_backward():
            raise ValueError(
                "Under gradient checkpointing, its mask is not known when the backward pass runs it again, because "
                "it comes before the self-attention of its layer. Adapt a block after it, use routing='dense', or "
                "train without gradient checkpointing."
            )
        mask = self.mask
        if not self.is_open:
            self.mask, self.has_seen_mask = None, False
        return mask

    def _keep_tokens(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.tokens = find_tokens(args, kwargs)

    def _keep_mask(self, names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.mask, self.has_seen_mask = find_mask(names, args, kwargs), True

    def _open(self, layer: nn.Module, args: tuple) -> None:
        self.is_open = True

    def _close(self, layer: nn.Module, args: tuple, output: Any) -> None:
        self.tokens, self.mask, self.has_seen_mask, self.is_open = None, None, False, False
