"""Metrics of routing. Pure functions, tensors in and out; padded tokens count nowhere.

Letters of all shapes: B batch, T tokens, N experts, P slots per expert, S = N·P slots, C classes. Where experts have no
slots, as in dense routing, P is one.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# An expert is idle if its load is below this share of an equal load.
IDLE = 0.1


def expert_load(combine: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Share of each expert in what all tokens read.

        load[n] = Σ_{b,t} Σ_p combine[b, t, n, p] / Σ_{b,t} Σ_{n,p} combine[b, t, n, p]

    Args:
        combine (Tensor): `(B, T, N, P)`, combine weights.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        Tensor: `(N,)`, in float64, with sum one; all zero if no token is real or none reads an expert.
    """
    return _shares(masked(combine, mask).sum((0, 1, 3)))


def output_share(norms: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Share of each expert in the size of the mixture's output.

        share[n] = Σ_{b,t} ‖y[b, t, n]‖ / Σ_{b,t} Σ_n ‖y[b, t, n]‖

    where `y[b, t, n]` is what expert n adds to token t, its weights included.

    Args:
        norms (Tensor): `(B, T, N)`, the norms of `y` over D.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        Tensor: `(N,)`, in float64, with sum one; all zero if nothing is added.
    """
    return _shares(masked(norms, mask).sum((0, 1)))


def normalized_entropy(load: Tensor) -> Tensor:
    """How evenly a load is spread: `-Σ_n load[n] log load[n] / log N`, from 0 for one expert alone to 1 for equal ones.

    Args:
        load (Tensor): `(..., N)`, shares with sum one.

    Returns:
        Tensor: `(...)`; 1 for a single expert.
    """
    return torch.ones_like(load[..., 0]) if load.shape[-1] == 1 else _entropy(load) / math.log(load.shape[-1])


def effective_number(load: Tensor) -> Tensor:
    """Number of equal experts that would be as diverse: `exp(-Σ_n load[n] log load[n])`, from 1 to N.

    Args:
        load (Tensor): `(..., N)`, shares with sum one.

    Returns:
        Tensor: `(...)`; 0 if there is no load.
    """
    return _entropy(load).exp() * (load.sum(-1) > 0)


def coefficient_of_variation(load: Tensor) -> Tensor:
    """Standard deviation of a load over its mean: 0 for equal experts, `sqrt(N - 1)` for one alone.

    Args:
        load (Tensor): `(..., N)`, shares with sum one.

    Returns:
        Tensor: `(...)`; the standard deviation is the population's; 0 if there is no load.
    """
    return load.std(-1, correction=0) / load.mean(-1).clamp_min(torch.finfo(load.dtype).tiny)


def idle_experts(load: Tensor, threshold: float = IDLE) -> list[int]:
    """Find the experts from which tokens read next to nothing: `load[n] < threshold / N`.

    Args:
        load (Tensor): `(N,)`, shares with sum one.
        threshold (float): as a share of an equal load. Default: 0.1.

    Returns:
        list[int]: their indices.
    """
    return torch.nonzero(load < threshold / len(load)).flatten().tolist()


def effective_tokens(dispatch: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Number of tokens that each slot reads, as a mean over samples.

        number = exp(-Σ_t d[t] log d[t]),  d[t] = dispatch[t] / Σ_u dispatch[u]

    Args:
        dispatch (Tensor): `(B, T, N, P)`, dispatch weights.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        Tensor: `(N, P)`, in float64, from 1 to the number of real tokens; over the samples in which a slot reads any,
        and zero if there is none.
    """
    weights = masked(dispatch, mask)
    shares = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    reads = reading_slots(dispatch, mask)
    return (_entropy(shares.movedim(1, -1)).exp() * reads).sum(0) / reads.sum(0).clamp_min(1)


def reading_slots(dispatch: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Find the samples in which each slot reads any token.

    Args:
        dispatch (Tensor): `(B, T, N, P)`, dispatch weights.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        Tensor: `(B, N, P)`, in float64, one where it does.
    """
    weights = masked(dispatch, mask)
    return weights.any(1).to(weights.dtype)


def slot_similarity(dispatch: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Similarity of slots: the cosine of their dispatch weights over tokens, mean over samples.

    Args:
        dispatch (Tensor): `(B, T, N, P)`, dispatch weights.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        Tensor: `(S, S)`, in float64, from 0 for slots that share no token to 1 for twins; over the samples in which
        both read any, and zero if there is none.
    """
    slots = F.normalize(masked(dispatch, mask).flatten(2), dim=1)
    reads = reading_slots(dispatch, mask).flatten(1)
    return (slots.mT @ slots).sum(0) / (reads.mT @ reads).clamp_min(1)


def combine_similarity(combine: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Similarity of the tokens of a sample: the mean cosine of the combine weights of two, over all pairs and samples.

    Args:
        combine (Tensor): `(B, T, N, P)`, combine weights.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        Tensor: a scalar in float64: 1 if all tokens read the same; not a number if no sample has two real tokens.
    """
    tokens = F.normalize(masked(combine, mask).flatten(2), dim=2)
    # The square of the sum has each pair twice, and each token with itself.
    total = (tokens.sum(1).square().sum(1) - tokens.square().sum((1, 2))).sum() / 2
    pairs = reading_pairs(combine, mask)
    return torch.where(pairs > 0, total / pairs, torch.nan)


def reading_pairs(combine: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Number of pairs over which `combine_similarity` is a mean: pairs of tokens of one sample that read anything.

    Args:
        combine (Tensor): `(B, T, N, P)`, combine weights.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        Tensor: a scalar in float64.
    """
    weights = masked(combine, mask)
    numbers = weights.flatten(2).any(2).sum(1).to(weights.dtype)
    return (numbers * (numbers - 1)).sum() / 2


def class_information(loads: Tensor) -> Tensor:
    """Mutual information of the expert that a token reads and the class, in bits.

        I = Σ_{c,n} q[c, n] log2(q[c, n] / (q[c] q[n])),  q[c, n] = loads[c, n] / C,  each class counting the same

    Args:
        loads (Tensor): `(C, N)`, the experts' load in each class.

    Returns:
        Tensor: a scalar, from 0 to `log2 min(C, N)`; classes without load do not count.
    """
    loads = loads[loads.sum(1) > 0]
    joint = loads / loads.sum().clamp_min(torch.finfo(loads.dtype).tiny)
    return (_entropy(joint.sum(0)) + _entropy(joint.sum(1)) - _entropy(joint.flatten())) / math.log(2)


def masked(values: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Values `(B, T, ...)` in float64, zero for tokens that are not real."""
    if values.device.type == "mps":  # has no float64
        values, mask = values.cpu(), None if mask is None else mask.cpu()
    values = values.to(torch.float64)
    if mask is None:
        return values
    return values.masked_fill(~mask.bool().view(*mask.shape, *[1] * (values.ndim - 2)), 0.0)


def _shares(values: Tensor) -> Tensor:
    return values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)


def _entropy(shares: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy
