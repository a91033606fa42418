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
    chunk_ends,
    dense_routing,
    expert_choice_routing,
    in_full_precision,
    load_balancing_loss,
    soft_logits,
    soft_routing,
    soft_weights,
    top_k_routing,
)
from .scan import running_average

# λ of a fresh router: the weight of a token has halved after 69 tokens.
RATE = 0.01


class SoftRouter(nn.Module):
    """The slot parameters Φ of one mixture and, if it normalizes, the scale of its logits.

    Args:
        in_features (int): D.
        num_experts (int): N.
        num_slots (int): P, per expert. Default: 1.
        normalize (bool): whether the logits are scaled cosines. Default: False.

    Source: arXiv 2308.00951, section 2.1.
    """

    mixes_tokens = True

    def __init__(self, in_features: int, num_experts: int, *, num_slots: int = 1, normalize: bool = False) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.empty(in_features, num_experts * num_slots))
        self.scale = nn.Parameter(torch.empty(1)) if normalize else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Φ with standard deviation D^-0.5, which gives unit logits for unit tokens; the scale starts at one."""
        nn.init.normal_(self.slots, std=1 / math.sqrt(self.slots.shape[0]))
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return f"in_features={self.slots.shape[0]}, slots={self.slots.shape[1]}, normalize={self.scale is not None}"

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
            slots, _, combine = read_slots(tokens, self.slots, mask)
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
        return soft_routing(in_full_precision(tokens), self.slots, mask, self.scale)


class CausalSoftRouter(SoftRouter):
    """Soft routing in order of time: each token reads slots of the tokens so far, or up to the end of its chunk.

    A slot's average is not made of tokens, but of what the experts' `down` makes of them: as `down` is linear and the
    weights sum to one, that is the same, and R numbers are averaged instead of D.

        L            = x Φ                                                                  (B, T, S)
        read[t, s]   = Σ_{u ≤ end(t)} e^(L[u, s] - λ[s]·(t - u)) g[u, ⌊s/P⌋] / Σ_{u ≤ end(t)} e^(L[u, s] - λ[s]·(t - u))
        combine      = softmax over S of L

    The last token gets what `SoftRouter` gives it, and with chunks as long as the clip, all tokens do.

    Args:
        in_features (int): D.
        num_experts (int): N.
        num_slots (int): P, per expert. Default: 1.
        normalize (bool): whether the logits are scaled cosines. Default: False.
        chunk_size (int, optional): number of tokens that see up to the last one of them. Default: each only itself and
            what was before.
        forgetting (bool): whether the weights of tokens fall with their age, at a rate λ = e^ρ / 100 that each slot
            learns. Default: False, λ = 0.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_slots: int = 1,
        normalize: bool = False,
        chunk_size: Optional[int] = None,
        forgetting: bool = False,
    ) -> None:
        super().__init__(in_features, num_experts, num_slots=num_slots, normalize=normalize)
        self.chunk_size = chunk_size
        self.forgetting = nn.Parameter(torch.zeros(num_experts * num_slots)) if forgetting else None

    def reset_parameters(self) -> None:
        """Draw Φ as `SoftRouter` does; ρ starts at zero."""
        super().reset_parameters()
        rates: Optional[nn.Parameter] = getattr(self, "forgetting", None)
        if rates is not None:
            nn.init.zeros_(rates)

    def extra_repr(self) -> str:
        """Sizes and choices, for `print`."""
        return f"{super().extra_repr()}, chunk_size={self.chunk_size}, forgetting={self.forgetting is not None}"

    def logits(self, tokens: Tensor) -> Tensor:
        """L of tokens `(B, T, D)`, `(B, T, S)` in float32 or float64."""
        return soft_logits(tokens, self.slots, self.scale)

    def read(self, logits: Tensor, projected: Tensor, mask: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """Average, for each token and slot, what an expert's `down` makes of the tokens that it sees.

        Args:
            logits (Tensor): L, `(B, T, S)`.
            projected (Tensor): g, what `down` makes of them, `(B, T, N, R)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

        Returns:
            tuple[Tensor, Tensor]: the averages, `(B, T, S, R)`, zero where no real token is seen, and the combine
            weights, `(B, T, S)`.
        """
        read = running_average(projected, logits, mask, self._rates(logits))
        if self.chunk_size is not None and self.chunk_size > 1:
            ends = chunk_ends(self.chunk_size, logits.shape[1], mask).to(read.device)
            read = read.gather(1, ends[:, :, None, None].expand_as(read))
        return read, logits.softmax(dim=-1)

    def weights(self, tokens: Tensor, mask: Optional[Tensor] = None, channels: int = 1) -> tuple[Tensor, Tensor]:
        """Dispatch weights of what the last token reads, and combine weights.

        Args:
            tokens (Tensor): x, `(B, T, D)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
            channels (int): number of channels, one after the other, in which the tokens have their places in time.
                Default: 1.

        Returns:
            tuple[Tensor, Tensor]: both `(B, T, S)`, in float32 or float64.
        """
        logits = self.logits(tokens)
        combine = logits.softmax(dim=-1)
        rates = self._rates(logits)
        if rates is not None:
            times = tokens.shape[1] // channels
            ages = torch.arange(times - 1, -1, -1, device=logits.device, dtype=logits.dtype).repeat(channels)
            logits = logits - ages.unsqueeze(-1) * rates
        return soft_weights(logits.mT, mask)[0].mT, combine

    def _rates(self, logits: Tensor) -> Optional[Tensor]:
        return None if self.forgetting is None else RATE * self.forgetting.to(logits.dtype).exp()


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
