"""Several channels of a clip in one mixture: which token is of which channel.

Letters of all shapes: B batch, C channels, T tokens of a channel, D hidden size, N experts, S slots, R bottleneck. The
tokens of a clip lie channel by channel, `(B, C·T, …)`.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .causal import CausalSoftRouter
from .past import Past
from .routing import chunk_ends
from .scan import running_average

# The standard deviation of a fresh channel embedding: that of what a fresh layer norm puts out.
STANDARD_DEVIATION = 1.0


def embed_channels(tokens: Tensor, embedding: Optional[Tensor], channels: int) -> Tensor:
    """Add to each token the embedding of its channel.

        output[c, t] = x[c, t] + e[c]

    Args:
        tokens (Tensor): x, `(B, C·T, D)`.
        embedding (Tensor, optional): e, `(C, D)`. Default: the channels are not told apart.
        channels (int): C.

    Returns:
        Tensor: `(B, C·T, D)`, in the dtype of the tokens.

    Raises:
        ValueError: if there are not as many channels as embeddings.
    """
    if embedding is None:
        return tokens
    if len(embedding) != channels:
        raise ValueError(
            f"The adapter has embeddings for {len(embedding)} channels, got {channels}. An adapter with "
            "channel_embedding=False takes any number of channels."
        )
    by_channel = tokens.unflatten(1, (channels, -1))
    return (by_channel + embedding.to(tokens.dtype).unsqueeze(1)).flatten(1, 2)


def apart(tokens: Tensor, channels: int) -> Tensor:
    """The channels of each clip as samples: `(B·C, T, …)` from `(B, C·T, …)`."""
    return tokens if channels == 1 else tokens.unflatten(1, (channels, -1)).flatten(0, 1)


def together(tokens: Tensor, channels: int) -> Tensor:
    """The opposite of `apart`: `(B, C·T, …)` from `(B·C, T, …)`."""
    return tokens if channels == 1 else tokens.unflatten(0, (-1, channels)).flatten(1, 2)


def read_in_time(
    router: CausalSoftRouter,
    logits: Tensor,
    projected: Tensor,
    mask: Optional[Tensor],
    channels: int,
    past: Optional[Past] = None,
) -> tuple[Tensor, Tensor]:
    """What each token reads by causal soft routing, if it sees all channels up to its own time.

        read[c, t, s] = Σ_{d, u ≤ end(t)} w[d, u, s] g[d, u, ⌊s/P⌋],    w[d, u, s] ∝ e^(L[d, u, s] - λ[s]·(end(t) - u))

    The tokens of one time are a chunk that sees itself whole; ages and `chunk_size` count times, not tokens. Chunks
    begin with the first time at which a channel has a real token.

    Args:
        router (CausalSoftRouter): the router.
        logits (Tensor): L, `(B, C·T, S)`.
        projected (Tensor): g, what `down` makes of the tokens, `(B, C·T, N, R)`.
        mask (Tensor, optional): `(B, C·T)` boolean, true for real tokens. Default: all are real.
        channels (int): C. With one it is what `CausalSoftRouter.read` gives.
        past (Past, optional): what came before these tokens; it goes on with them. Default: nothing.

    Returns:
        tuple[Tensor, Tensor]: the averages, `(B, C·T, S, R)`, and the combine weights, `(B, C·T, S)`.
    """
    if channels == 1:
        return router.read(logits, projected, mask, past)
    values, in_time = _time_by_time(projected, channels), _time_by_time(logits, channels)
    real = None if mask is None else _time_by_time(mask, channels)
    rates = router._rates(logits)
    if rates is not None:
        # From one token to the next a C-th of a time passes; all tokens of a time are as old as its last one.
        rates = rates / channels
        lead = torch.arange(channels - 1, -1, -1, device=logits.device, dtype=logits.dtype)
        in_time = in_time + (lead.unsqueeze(1) * rates).repeat(logits.shape[1] // channels, 1)
    is_real = None if real is None else real.unflatten(1, (-1, channels)).any(dim=2)
    before = None
    if past is not None:
        first, last = past.ends(logits.unflatten(1, (channels, -1))[:, 0], is_real)
        if router.chunk_size is not None:
            past.check_chunks(router.chunk_size, first, last)
        first, last = first * channels, (last + 1) * channels - 1
        before = past.running(first, rates)
    averages = running_average(values, in_time, real, rates, before)
    if past is not None:
        past.keep_averages(averages, last)
    read = averages.average
    ends = chunk_ends(router.chunk_size or 1, logits.shape[1] // channels, is_real).to(read.device)
    ends = (ends * channels + channels - 1).repeat_interleave(channels, dim=1)
    read = read.gather(1, ends[:, :, None, None].expand_as(read))
    return read.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1, 2), logits.softmax(dim=-1)


def _time_by_time(tokens: Tensor, channels: int) -> Tensor:
    """`(B, T·C, …)` from `(B, C·T, …)`."""
    return tokens.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1, 2)
