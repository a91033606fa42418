"""Experts: stacked parameters, and one batched forward for all of them.

Letters of all shapes: B batch, T tokens, D hidden size of the input and D' of the output, N experts, P slots per
expert, S = N·P slots, R bottleneck. L is the length of what an expert reads: its P slots, or all T tokens.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .past import Past


class BottleneckExperts(nn.Module):
    """N bottleneck adapters, without a residual of their own.

        expert_n(z) = up_n(dropout(act(down_n(z)))),   D → R → D'

    They read slots, each expert its own, or all of them all tokens.

    Args:
        num_experts (int): N.
        in_features (int): D.
        r (int): R.
        out_features (int): D'.
        activation (str): name of the activation in transformers. Default: `"gelu"`.
        dropout (float): probability of dropping an activation. Default: 0.0.

    Source: arXiv 2402.00828.
    """

    mixes_tokens = False

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        r: int,
        out_features: int,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.down_weight = nn.Parameter(torch.empty(num_experts, in_features, r))
        self.down_bias = nn.Parameter(torch.empty(num_experts, r))
        self.up_weight = nn.Parameter(torch.empty(num_experts, r, out_features))
        self.up_bias = nn.Parameter(torch.empty(num_experts, out_features))
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        BottleneckExperts.reset_parameters(self)  # not a subclass's, which has no parameters of its own yet

    def reset_parameters(self, identity: bool = True) -> None:
        """Draw fresh weights: `down` as `nn.Linear` does, and `up` at zero, so that the experts give zero.

        Both at zero, as in the paper's code, would be a dead point: neither would ever get a gradient.

        Args:
            identity (bool): if false, `up` and the biases are drawn too. Default: True.
        """
        uniform_(self.down_weight, fan_in=self.down_weight.shape[1])
        if identity:
            for parameter in (self.down_bias, self.up_weight, self.up_bias):
                nn.init.zeros_(parameter)
        else:
            uniform_(self.down_bias, fan_in=self.down_weight.shape[1])
            uniform_(self.up_weight, fan_in=self.up_weight.shape[1])
            uniform_(self.up_bias, fan_in=self.up_weight.shape[1])

    def forward(self, slots: Tensor, *, dropout: bool = True) -> Tensor:
        """Apply expert ⌊s/P⌋ to slot s.

            output[s] = expert_{⌊s/P⌋}(slots[s])

        Args:
            slots (Tensor): `(B, S, D)`.
            dropout (bool): whether activations are dropped in training. Default: True.

        Returns:
            Tensor: expert outputs, `(B, S, D')`, in the dtype of the slots.
        """
        num_experts, dtype = self.down_weight.shape[0], slots.dtype
        batch, num_slots = slots.shape[0], slots.shape[1] // num_experts
        # (B, N·P, D) -> (N, B·P, D): one product per projection for all experts.
        by_expert = slots.unflatten(1, (num_experts, num_slots)).transpose(0, 1).flatten(1, 2)
        hidden = torch.baddbmm(self.down_bias.to(dtype).unsqueeze(1), by_expert, self.down_weight.to(dtype))
        hidden = self._hidden(hidden.unflatten(1, (batch, num_slots)).permute(1, 2, 0, 3), over_slots=True)
        hidden = self.dropout(hidden) if dropout else hidden
        hidden = hidden.permute(2, 0, 1, 3).flatten(1, 2)
        outputs = torch.baddbmm(self.up_bias.to(dtype).unsqueeze(1), hidden, self.up_weight.to(dtype))
        return outputs.unflatten(1, (batch, num_slots)).transpose(0, 1).flatten(1, 2)

    def add_weighted(
        self,
        added_to: Tensor,
        tokens: Tensor,
        weights: Tensor,
        mask: Optional[Tensor] = None,
        past: Optional[Past] = None,
    ) -> Tensor:
        """Apply every expert to every token, and add the weighted sum of the expert outputs to a block's output.

            output[t] = added_to[t] + Σ_n weights[t, n] · expert_n(tokens)[t]

        Args:
            added_to (Tensor): `(B, T, D')`.
            tokens (Tensor): `(B, T, D)`.
            weights (Tensor): `(B, T, N)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens; it matters to experts that read
                neighbours. Default: all are real.
            past (Past, optional): what came before these tokens; it goes on with them. Default: nothing.

        Returns:
            Tensor: `(B, T, D')`, in the dtype of `added_to`.
        """
        hidden = self.dropout(self._hidden(self.project(tokens), mask, past)) * weights.unsqueeze(-1)
        return self._add_up(added_to, hidden, weights)

    def add_read(self, added_to: Tensor, read: Tensor, combine: Tensor) -> Tensor:
        """Go on from what each token reads in the slots, and add the weighted sum of the expert outputs.

            output[t] = added_to[t] + Σ_s combine[t, s] · up_n(dropout(act(read[t, s]))),   n = ⌊s/P⌋

        Args:
            added_to (Tensor): `(B, T, D')`.
            read (Tensor): what `down` makes of each slot, for each token, `(B, T, S, R)`.
            combine (Tensor): `(B, T, S)`.

        Returns:
            Tensor: `(B, T, D')`, in the dtype of `added_to`.
        """
        hidden, weights = self._read_hidden(read, combine)
        return self._add_up(added_to, hidden, weights)

    def _read_hidden(self, read: Tensor, combine: Tensor, *, dropout: bool = True) -> tuple[Tensor, Tensor]:
        """The weighted input of `up`, `(B, T, N, R)`, and the weight of its bias, `(B, T, N)`, from what is read."""
        by_expert = (len(self.down_weight), -1)
        # (B, T, N·P, R) -> (B·T, P, N, R): the slots of an expert are its neighbours.
        hidden = self._hidden(read.unflatten(2, by_expert).transpose(2, 3).flatten(0, 1), over_slots=True)
        hidden = (self.dropout(hidden) if dropout else hidden).unflatten(0, read.shape[:2])
        weights = combine.unflatten(2, by_expert).transpose(2, 3)
        return (hidden * weights.unsqueeze(-1)).sum(dim=2), weights.sum(dim=2)

    def _add_up(self, added_to: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
        # The experts side by side, D -> N·R -> D', with the weights in between: nothing of size T·N·D'.
        # The biases of `up` are one more input for each expert.
        left = torch.cat([hidden.flatten(2), weights], dim=-1).flatten(0, 1).to(added_to.dtype)
        right = torch.cat([self.up_weight.flatten(0, 1), self.up_bias]).to(added_to.dtype)
        return torch.addmm(added_to.flatten(0, -2), left, right).unflatten(0, hidden.shape[:2])

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        num_experts, in_features, r = self.down_weight.shape
        return f"num_experts={num_experts}, {in_features}→{r}→{self.up_weight.shape[-1]}"

    def norms(
        self, tokens: Tensor, weights: Tensor, mask: Optional[Tensor] = None, past: Optional[Past] = None
    ) -> Tensor:
        """The norms over D' of what each expert adds to each token, without dropout.

            norms[t, n] = ‖weights[t, n] · expert_n(x)[t]‖

        Args:
            tokens (Tensor): x, `(B, T, D)`.
            weights (Tensor): `(B, T, N)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
            past (Past, optional): as for `add_weighted`. Default: nothing.

        Returns:
            Tensor: `(B, T, N)`.
        """
        return self._norms(self._hidden(self.project(tokens), mask, past) * weights.unsqueeze(-1), weights)

    def read_norms(self, read: Tensor, combine: Tensor) -> Tensor:
        """The norms over D' of what each expert adds to each token by `add_read`, without dropout.

            norms[t, n] = ‖Σ_p combine[t, n, p] · up_n(act(read[t, n, p]))‖

        Args:
            read (Tensor): `(B, T, S, R)`.
            combine (Tensor): `(B, T, S)`.

        Returns:
            Tensor: `(B, T, N)`.
        """
        return self._norms(*self._read_hidden(read, combine, dropout=False))

    def _norms(self, hidden: Tensor, weights: Tensor) -> Tensor:
        given = torch.cat([hidden, weights.unsqueeze(-1)], dim=-1)
        up = torch.cat([self.up_weight, self.up_bias.unsqueeze(1)], dim=1).to(given.dtype)
        # By the products of its rows, as everywhere here: nothing of size T·N·D'.
        squares = torch.einsum("btnr,nrs,btns->btn", given, up @ up.mT, given)
        return squares.clamp_min(0).sqrt()

    def project(self, tokens: Tensor) -> Tensor:
        """What every expert's `down` makes of every token.

        Args:
            tokens (Tensor): `(B, T, D)`.

        Returns:
            Tensor: `(B, T, N, R)`.
        """
        num_experts, _, r = self.down_weight.shape
        down_weight = self.down_weight.to(tokens.dtype).mT.flatten(0, 1)
        projected = F.linear(tokens, down_weight, self.down_bias.to(tokens.dtype).flatten())
        return projected.unflatten(-1, (num_experts, r))

    def project_beside(self, tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the logits of slots in the same product, which reads the tokens once.

        Args:
            tokens (Tensor): `(B, T, D)`.
            slots (Tensor): Φ, `(D, S)`.

        Returns:
            tuple[Tensor, Tensor]: `(B, T, N, R)` and x Φ, `(B, T, S)`.
        """
        num_experts, _, r = self.down_weight.shape
        bias = self.down_bias.to(tokens.dtype).flatten()
        weight = torch.cat([self.down_weight.mT.flatten(0, 1), slots.mT]).to(tokens.dtype)
        both = F.linear(tokens, weight, F.pad(bias, (0, slots.shape[1])))
        projected, logits = both.split([num_experts * r, slots.shape[1]], dim=-1)
        return projected.unflatten(-1, (num_experts, r)), logits

    def _hidden(
        self,
        projected: Tensor,
        mask: Optional[Tensor] = None,
        past: Optional[Past] = None,
        *,
        over_slots: bool = False,
    ) -> Tensor:
        """From the output of `down` to the input of dropout and `up`, both `(B, L, N, R)`; L are slots or tokens."""
        return self.activation(projected)


def uniform_(parameter: nn.Parameter, fan_in: int) -> None:
    """Draw from U(-1/√fan_in, 1/√fan_in), as `nn.Linear` does."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound)
