"""Routing: from tokens to mixing weights. Pure functions, tensors in and out.

Letters of all shapes: B batch, T tokens, D hidden size, N experts, P slots per expert, S = N·P slots.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Smallest norm that is divided by, as in torch.nn.functional.normalize.
EPS = 1e-12


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
    dtype = tokens.dtype
    tokens = tokens.to(torch.promote_types(dtype, torch.float32))
    slots = slots.to(tokens.dtype)
    if scale is None:
        logits = tokens @ slots
    else:
        norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp_min(EPS)
        logits = scale.to(tokens.dtype) * (tokens @ F.normalize(slots, dim=0, eps=EPS)) / norms
    combine = logits.softmax(dim=-1).to(dtype)
    if mask is None:
        return logits.softmax(dim=-2).to(dtype), combine
    padding = ~mask.unsqueeze(-1)
    # A large negative number instead of -inf: a sample without tokens must not give NaN.
    dispatch = logits.masked_fill(padding, torch.finfo(logits.dtype).min).softmax(dim=-2)
    return dispatch.masked_fill(padding, 0.0).to(dtype), combine
