"""Routing: from tokens to mixing weights. Pure functions, tensors in and out.

Letters of all shapes: B batch, T tokens, D hidden size, N experts, P slots per expert, S = N·P slots.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Smallest norm that is divided by, as in torch.nn.functional.normalize.
EPS = 1e-12


def in_full_precision(tensor: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def soft_routing(
    tokens: Tensor, slots: Tensor, mask: Optional[Tensor] = None, scale: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """Soft routing: every slot reads all tokens, every token reads all slots.

        L        = x Φ                              (B, T, S)
        dispatch = softmax over the valid T of L    each slot is a convex combination of the tokens
        combine  = softmax over S of L              each token is a convex combination of the slots

    Everything is computed in float32, or in float64 if the tokens are. With `scale`, the logits are the scaled
    cosines `scale · <x_t, Φ_s> / (‖x_t‖ ‖Φ_s‖)` instead. If a sample has no valid token, its dispatch weights are all
    zero.

    Args:
        tokens (Tensor): x, `(B, T, D)`.
        slots (Tensor): Φ, `(D, S)`.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
        scale (Tensor, optional): `(1,)`. Default: no normalization.

    Returns:
        tuple[Tensor, Tensor]: dispatch and combine weights, `(B, T, S)` each, in the dtype of the tokens.

    Source: arXiv 2402.00828; arXiv 2308.00951, section 2.1 and, for the normalization, 2.3.
    """
    dispatch, combine = soft_weights(soft_logits(tokens, slots, scale).mT, mask)
    return dispatch.mT.to(tokens.dtype), combine.mT.to(tokens.dtype)


def soft_logits(tokens: Tensor, slots: Tensor, scale: Optional[Tensor] = None) -> Tensor:
    """The logits of soft routing.

        L = x Φ    or, with a scale,    L[t, s] = scale · <x_t, Φ_s> / (‖x_t‖ ‖Φ_s‖)

    Args:
        tokens (Tensor): x, `(B, T, D)`.
        slots (Tensor): Φ, `(D, S)`.
        scale (Tensor, optional): `(1,)`. Default: no normalization.

    Returns:
        Tensor: L, `(B, T, S)`, in float32 or float64.

    Source: arXiv 2308.00951, sections 2.1 and 2.3.
    """
    tokens = in_full_precision(tokens)
    slots = slots.to(tokens.dtype)
    if scale is None:
        return tokens @ slots
    norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp_min(EPS)
    return scale.to(tokens.dtype) * (tokens @ F.normalize(slots, dim=0, eps=EPS)) / norms


def chunk_ends(chunk_size: int, num_tokens: int, mask: Optional[Tensor] = None) -> Tensor:
    """Up to which token each token sees, if it sees up to the end of its chunk.

        ends[t] = min(f + C·⌊(t - f) / C⌋ + C - 1, T - 1)    with the first real token f, where the chunks begin

    Args:
        chunk_size (int): C.
        num_tokens (int): T.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        Tensor: `(B, T)`, or `(1, T)` without a mask, indices of tokens.
    """
    places = torch.arange(num_tokens, device=None if mask is None else mask.device).unsqueeze(0)
    # Clips that are padded on the left have the chunks that they have alone.
    first = 0 if mask is None else mask.int().argmax(dim=1, keepdim=True)
    chunks = torch.div(places - first, chunk_size, rounding_mode="floor")
    return (first + (chunks + 1) * chunk_size - 1).clamp(0, num_tokens - 1)


def soft_weights(logits: Tensor, mask: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """The two softmaxes of soft routing.

        dispatch = softmax over the valid T of L
        combine  = softmax over S of L

    Args:
        logits (Tensor): L, `(B, S, T)`.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        tuple[Tensor, Tensor]: dispatch and combine weights, `(B, S, T)` each, in the dtype of the logits.

    Source: arXiv 2308.00951, section 2.1.
    """
    combine = logits.softmax(dim=1)
    if mask is None:
        return logits.softmax(dim=2), combine
    padding = ~mask.unsqueeze(1)
    # A large negative number instead of -inf: a sample without tokens must not give NaN.
    dispatch = logits.masked_fill(padding, torch.finfo(logits.dtype).min).softmax(dim=2)
    return dispatch.masked_fill(padding, 0.0), combine


def dense_routing(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Dense routing: how much each expert counts for each token.

        gates = softmax over the experts of x W + b         (B, T, N)

    Args:
        tokens (Tensor): x, `(B, T, D)`.
        weight (Tensor): W, `(D, N)`.
        bias (Tensor): b, `(N,)`.

    Returns:
        Tensor: gates, `(B, T, N)`, in the dtype of the tokens; computed in float32 or float64.

    Source: arXiv 2402.00828, Dense-MoA.
    """
    dtype = tokens.dtype
    tokens = in_full_precision(tokens)
    return (tokens @ weight.to(tokens.dtype) + bias.to(tokens.dtype)).softmax(dim=-1).to(dtype)


def top_k_routing(gates: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Top-k routing: only the k experts with the largest gates count for a token.

        weights[n] = gates[n] / Σ_{m chosen} gates[m]  if n is chosen, else 0

    With one expert per token its weight is always one: then only the load-balancing loss trains the router.

    Args:
        gates (Tensor): `(B, T, N)`, as from `dense_routing`.
        top_k (int): k, from 1 to N.

    Returns:
        tuple[Tensor, Tensor]: weights `(B, T, N)`, and the indices of the chosen experts `(B, T, k)`.

    Source: arXiv 1701.06538, section 2.1.
    """
    largest, chosen = gates.topk(top_k, dim=-1)
    return torch.zeros_like(gates).scatter(-1, chosen, largest / largest.sum(dim=-1, keepdim=True)), chosen


def load_balancing_loss(gates: Tensor, chosen: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Load-balancing loss of the Switch Transformer: one if all experts are used alike, N if always the same one.

        loss = N · Σ_n f_n · P_n

    f_n is the share of expert n in all choices of valid tokens, P_n the mean of its gates over them. Only P_n has a
    gradient.

    Args:
        gates (Tensor): `(B, T, N)`, before the choice.
        chosen (Tensor): indices of the chosen experts, `(B, T, k)`.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        Tensor: scalar; zero if no token is valid.

    Source: arXiv 2101.03961, equations 4 to 6, with k choices per token instead of one.
    """
    choices = torch.zeros_like(gates).scatter(-1, chosen, 1 / chosen.shape[-1])
    valid = gates.new_ones(*gates.shape[:2], 1) if mask is None else mask.unsqueeze(-1).to(gates.dtype)
    count = valid.sum().clamp_min(1)
    shares, means = (choices * valid).sum(dim=(0, 1)) / count, (gates * valid).sum(dim=(0, 1)) / count
    return gates.shape[-1] * (shares * means).sum()


def expert_choice_routing(gates: Tensor, capacity_factor: float, mask: Optional[Tensor] = None) -> Tensor:
    """Expert choice: every expert takes the tokens of each sample for which its gate is largest.

        C = ⌈capacity_factor · T / N⌉, at most T, with the number T of valid tokens in the sample
        weights[t, n] = gates[t, n]  if t is among the C tokens of expert n, else 0

    A token may be taken by any number of experts. The choice is made within each sample, so that a sample's output
    does not depend on the rest of its batch.

    Args:
        gates (Tensor): `(B, T, N)`, as from `dense_routing`.
        capacity_factor (float): share of the tokens that an expert takes, as a multiple of an equal share 1 / N, at
            most N. It is taken for the nearest fraction with a denominator up to 1000, so 0.6666666666666666 is 2 / 3.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        Tensor: weights `(B, T, N)`.

    Source: arXiv 2202.09368, section 3.1, which chooses within the whole batch.
    """
    num_tokens, num_experts = gates.shape[1:]
    # In integers: the capacity must not depend on how a device rounds.
    share = Fraction(capacity_factor).limit_denominator(1000) / num_experts
    capacity = -(-share.numerator * num_tokens // share.denominator)
    scores = gates.mT if mask is None else gates.mT.masked_fill(~mask.unsqueeze(1), -1.0)
    largest, taken = scores.topk(capacity, dim=-1)
    if mask is not None:
        capacities = -(-share.numerator * mask.sum(dim=1) // share.denominator)
        ranks = torch.arange(capacity, device=gates.device)
        largest = largest.masked_fill(ranks >= capacities[:, None, None], 0.0)
    return torch.zeros_like(scores).scatter(-1, taken, largest).mT
