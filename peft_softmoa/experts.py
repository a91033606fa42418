"""Experts: stacked parameters, and one batched forward for all of them.

Letters of all shapes: B batch, D hidden size of the input and D' of the output, N experts, P slots per expert,
S = N·P slots, R bottleneck.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


class BottleneckExperts(nn.Module):
    """N bottleneck adapters, each with its own slots and without a residual of its own.

        expert_n(z) = up_n(dropout(act(down_n(z)))),   D → R → D'

    Args:
        num_experts (int): N.
        in_features (int): D.
        r (int): R.
        out_features (int): D'.
        activation (str): name of the activation in transformers. Default: `"gelu"`.
        dropout (float): probability of dropping an activation. Default: 0.0.

    Source: arXiv 2402.00828.
    """

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
        self.reset_parameters()

    def reset_parameters(self, identity: bool = True) -> None:
        """Draw fresh weights: `down` as `nn.Linear` does, and `up` at zero, so that the experts give zero.

        Both at zero, as in the paper's code, would be a dead point: neither would ever get a gradient.

        Args:
            identity (bool): if false, `up` and the biases are drawn too. Default: True.
        """
        _uniform_(self.down_weight, fan_in=self.down_weight.shape[1])
        if identity:
            for parameter in (self.down_bias, self.up_weight, self.up_bias):
                nn.init.zeros_(parameter)
        else:
            _uniform_(self.down_bias, fan_in=self.down_weight.shape[1])
            _uniform_(self.up_weight, fan_in=self.up_weight.shape[1])
            _uniform_(self.up_bias, fan_in=self.up_weight.shape[1])

    def forward(self, slots: Tensor) -> Tensor:
        """Apply expert ⌊s / P⌋ to slot s.

        Args:
            slots (Tensor): `(B, S, D)`.

        Returns:
            Tensor: `(B, S, D')`, in the dtype of the slots.
        """
        num_experts, dtype = self.down_weight.shape[0], slots.dtype
        batch, num_slots = slots.shape[0], slots.shape[1] // num_experts
        # (B, N·P, D) -> (N, B·P, D): one product per projection for all experts.
        by_expert = slots.unflatten(1, (num_experts, num_slots)).transpose(0, 1).flatten(1, 2)
        hidden = torch.baddbmm(self.down_bias.to(dtype).unsqueeze(1), by_expert, self.down_weight.to(dtype))
        hidden = self.dropout(self.activation(hidden))
        outputs = torch.baddbmm(self.up_bias.to(dtype).unsqueeze(1), hidden, self.up_weight.to(dtype))
        return outputs.unflatten(1, (batch, num_slots)).transpose(0, 1).flatten(1, 2)


def _uniform_(parameter: nn.Parameter, fan_in: int) -> None:
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound)
