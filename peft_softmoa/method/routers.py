"""Routers: which tokens an expert reads, and how much each token takes of its output.

Letters of all shapes: B batch, T tokens, D hidden size of the input, N experts, P slots per expert, S = N·P slots.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor, nn

from .experts import uniform_
from .kernels import read_slots
from .routing import (
    dense_routing,
    expert_choice_routing,
    in_full_precision,
    load_balancing_loss,
    soft_routing,
    top_k_routing,
)


class SoftRouter(nn.Module):
    """The slot parameters of one mixture and, if it normalizes, the scale of its logits.

    The slot parameters give Φ, of which the logits are made:

        Φ = slots           drawn with standard deviation D^-0.5    or, with `unit_slots`,
        Φ = slots / √D      drawn with standard deviation 1

    Both begin alike. A step of Adam, whose size does not depend on that of a parameter, changes the second Φ √D times
    less. Scaled cosines begin with a scale of one or, with `unit_slots`, √D.

    Args:
        in_features (int): D.
        num_experts (int): N.
        num_slots (int): P, per expert. Default: 1.
        normalize (bool): whether the logits are scaled cosines. Default: False.
        unit_slots (bool): whether the slot parameters have unit variance. Default: False.

    Source: arXiv 2308.00951, section 2.1.
    """

    mixes_tokens = True

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_slots: int = 1,
        normalize: bool = False,
        unit_slots: bool = False,
    ) -> None:
        super().__init__()
        self.unit_slots = unit_slots
        self.slots = nn.Parameter(torch.empty(in_features, num_experts * num_slots))
        self.scale = nn.Parameter(torch.empty(1)) if normalize else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Φ with standard deviation D^-0.5, which gives unit logits for unit tokens; the scale starts at one."""
        nn.init.normal_(self.slots, std=1.0 if self.unit_slots else 1 / self.root)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def extra_repr(self) -> str:
        """Sizes and choices, for `print`."""
        return (
            f"in_features={self.slots.shape[0]}, slots={self.slots.shape[1]}, normalize={self.scale is not None}, "
            f"unit_slots={self.unit_slots}"
        )

    @property
    def root(self) -> float:
        """√D."""
        return math.sqrt(self.slots.shape[0])

    @property
    def phi(self) -> Tensor:
        """Φ, `(D, S)`."""
        return self.slots / self.root if self.unit_slots else self.slots

    @property
    def logit_scale(self) -> Optional[Tensor]:
        """By what cosines are multiplied, `(1,)`; None if the logits are no cosines."""
        return self.scale if self.scale is None or not self.unit_slots else self.scale * self.root

    def forward(self, tokens: Tensor, mask: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """Average the tokens for each slot, and weigh the slots for each token.

            X̃ = dispatchᵀ x                               (B, S, D)

        Args:
            tokens (Tensor): x, `(B, T, D)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

        Returns:
            tuple[Tensor, Tensor]: X̃, `(B, S, D)`, and the combine weights, `(B, S, T)`, in float32 or float64.
        """
        if self.scale is None:
            slots, _, combine = read_slots(tokens, self.phi, mask)
            return slots, combine
        dispatch, combine = self.weights(tokens, mask)
        return dispatch.mT @ in_full_precision(tokens), combine.mT

    def weights(self, tokens: Tensor, mask: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """Dispatch and combine weights.

        Args:
            tokens (Tensor): x, `(B, T, D)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

        Returns:
            tuple[Tensor, Tensor]: both `(B, T, S)`, in float32 or float64.
        """
        return soft_routing(in_full_precision(tokens), self.phi, mask, self.logit_scale)


class DenseRouter(nn.Module):
    """A router of tokens: every expert reads every token, weighted by a softmax. One expert needs no router.

    Args:
        in_features (int): D.
        num_experts (int): N.

    Source: arXiv 2402.00828, Dense-MoA.
    """

    mixes_tokens = False

    def __init__(self, in_features: int, num_experts: int) -> None:
        super().__init__()
        self.in_features, self.num_experts = in_features, num_experts
        self.weight = nn.Parameter(torch.empty(in_features, num_experts)) if num_experts > 1 else None
        self.bias = nn.Parameter(torch.empty(num_experts)) if num_experts > 1 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Linear` does."""
        if self.weight is not None and self.bias is not None:
            uniform_(self.weight, fan_in=self.in_features)
            uniform_(self.bias, fan_in=self.in_features)

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return f"in_features={self.in_features}, num_experts={self.num_experts}"

    def forward(self, tokens: Tensor, mask: Optional[Tensor] = None) -> tuple[Tensor, Optional[Tensor]]:
        """Weigh the experts for each token.

            gates = softmax over the experts of x W + b         (B, T, N)

        Args:
            tokens (Tensor): x, `(B, T, D)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

        Returns:
            tuple[Tensor, Optional[Tensor]]: the weights, `(B, T, N)`, in float32 or float64, and the loss that balances
            the experts, a scalar, or None.
        """
        tokens = in_full_precision(tokens)
        if self.weight is None or self.bias is None:
            return tokens.new_ones(*tokens.shape[:2], 1), None
        return self._choose(dense_routing(tokens, self.weight, self.bias), mask)

    def _choose(self, gates: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
        """From the gates to the weights of the experts, both `(B, T, N)`, and the loss."""
        return gates, None


class TopKRouter(DenseRouter):
    """A router of tokens that counts only the best experts of each.

    Args:
        in_features (int): D.
        num_experts (int): N.
        top_k (int): k, how many experts count.
        router_aux_loss_coef (float): weight of the load-balancing loss, which exists in training only.

    Source: arXiv 1701.06538, section 2.1; the loss arXiv 2101.03961.
    """

    def __init__(self, in_features: int, num_experts: int, *, top_k: int, router_aux_loss_coef: float) -> None:
        super().__init__(in_features, num_experts)
        self.top_k = top_k
        self.router_aux_loss_coef = router_aux_loss_coef

    def extra_repr(self) -> str:
        """Sizes and choices, for `print`."""
        return f"{super().extra_repr()}, top_k={self.top_k}, router_aux_loss_coef={self.router_aux_loss_coef}"

    def _choose(self, gates: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
        weights, chosen = top_k_routing(gates, self.top_k)
        is_trained = self.training and any(parameter.requires_grad for parameter in self.parameters())
        if not (is_trained and self.router_aux_loss_coef):
            return weights, None
        return weights, self.router_aux_loss_coef * load_balancing_loss(gates, chosen, mask)


class ExpertChoiceRouter(DenseRouter):
    """A router of tokens in which each expert chooses its tokens.

    Args:
        in_features (int): D.
        num_experts (int): N.
        capacity_factor (float): how many tokens an expert takes, as a multiple of an equal share.

    Source: arXiv 2202.09368.
    """

    mixes_tokens = True  # its capacity depends on their number, and a token on which others are taken

    def __init__(self, in_features: int, num_experts: int, *, capacity_factor: float) -> None:
        super().__init__(in_features, num_experts)
        self.capacity_factor = capacity_factor

    def extra_repr(self) -> str:
        """Sizes and choices, for `print`."""
        return f"{super().extra_repr()}, capacity_factor={self.capacity_factor}"

    def _choose(self, gates: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
        return expert_choice_routing(gates, self.capacity_factor, mask), None
