"""The mixture: a router and its experts.

One adapter trains both in every block that it adapts. They are two modules, not one that holds the other, because
PEFT names what it saves `<container>.<adapter>.<parameter>`, as in `lora_A.default.weight`: no deeper.

Letters of all shapes: B batch, T tokens, D hidden size of the input and D' of the output, N experts, P slots per
expert, S = N·P slots.
"""

from __future__ import annotations

import contextlib
import math
from typing import Optional

import torch
from torch import Tensor, nn

from .experts import BottleneckExperts
from .routing import soft_routing


class SoftRouter(nn.Module):
    """The slot parameters Φ of one mixture and, if it normalizes, the scale of its logits.

    Args:
        in_features (int): D.
        num_experts (int): N.
        num_slots (int): P, per expert. Default: 1.
        normalize (bool): whether the logits are scaled cosines. Default: False.

    Source: arXiv 2308.00951, section 2.1.
    """

    def __init__(self, in_features: int, num_experts: int, num_slots: int = 1, *, normalize: bool = False) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.empty(in_features, num_experts * num_slots))
        self.scale = nn.Parameter(torch.empty(1)) if normalize else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Φ with standard deviation D^-0.5, which gives unit logits for unit tokens; the scale starts at one."""
        nn.init.normal_(self.slots, std=1 / math.sqrt(self.slots.shape[0]))
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def forward(self, tokens: Tensor, mask: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """Weights between tokens and slots, see `soft_routing`.

        Args:
            tokens (Tensor): `(B, T, D)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

        Returns:
            tuple[Tensor, Tensor]: dispatch and combine weights, `(B, T, S)` each, in the dtype of the tokens.
        """
        return soft_routing(tokens, self.slots, mask, self.scale)


def soft_mixture(
    tokens: Tensor, router: SoftRouter, experts: BottleneckExperts, mask: Optional[Tensor] = None
) -> Tensor:
    """What the experts add to the output of the block that reads the same tokens.

        X̃ = dispatchᵀ x                  (B, S, D)
        Ỹ[s] = expert_{⌊s/P⌋}(X̃[s])      (B, S, D')
        mixture = combine Ỹ              (B, T, D')

    It is computed in float32, or in float64 if the tokens are, and not under autocast: half-precision logits would
    overflow for large tokens.

    Args:
        tokens (Tensor): x, `(B, T, D)`.
        router (SoftRouter): gives dispatch and combine.
        experts (BottleneckExperts): N experts for the router's N·P slots.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        Tensor: `(B, T, D')` in float32, or float64.

    Source: arXiv 2402.00828; arXiv 2308.00951, section 2.1.
    """
    with _without_autocast(tokens.device.type):
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        dispatch, combine = router(tokens, mask)
        return combine @ experts(dispatch.mT @ tokens)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
