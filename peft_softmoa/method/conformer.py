"""Experts with a Conformer's convolution module in their bottleneck.

Letters of all shapes: B batch, T tokens, D hidden size of the input and D' of the output, N experts, R bottleneck. L is
the length of what an expert reads: its P slots, or all T tokens.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import ConvolutionExperts, PatchGrid
from .experts import uniform_
from .past import Past

# ε beside the mean square of the R channels. A convolution of unit tokens has a mean square around 0.03 at the start.
EPSILON = 0.01


class ConformerExperts(ConvolutionExperts):
    """N Conformer adapters: a gate, a depthwise convolution over time, and two normalisations.

        [a, b]      = down_n(LayerNorm(z))                                     D → 2R
        c           = conv_n(a · sigmoid(b))                                   R
        expert_n(z) = up_n(dropout(SiLU(γ_n · c / √(mean_R(c²) + ε) + β_n)))   R → D'

    The LayerNorm in front is computed once for all experts: its scale and shift would be factors of `down_n` and terms
    of its bias, so that it has none. Because of it, `down` is not all that comes before an average over tokens, and
    there is no causal soft routing of such experts.

    The paper normalises c by a BatchNorm, which counts padding and other clips. Here each token and expert has its own
    root mean square, over the R channels: nothing else can change it, neither neighbours in time nor the batch, in
    training nor later. No mean is subtracted, and ε is not tiny: with R = 1, a LayerNorm would give zero for anything,
    and c / |c| the sign alone, both without a gradient; c / √(c² + ε) is a smooth curve through zero.

    The convolution is that of `ConvolutionExperts`, but over a patch grid its kernel is 1 × K, along time: K × K
    weights of 31 would be more than the rest of the expert.

    Args:
        num_experts (int): N.
        in_features (int): D.
        r (int): R.
        out_features (int): D'.
        kernel_size (int): K, odd; in tokens, or in patches along time. Default: 31.
        patch_grid (PatchGrid, optional): the grid of the tokens. Default: none, they are a sequence.
        causal (bool): whether all neighbours of a token are before it, and the kernel's last weight is its own; slots
            have no order. Not with a patch grid. Default: False.
        dropout (float): probability of dropping an activation. Default: 0.0.

    Source: arXiv 2312.03694, whose code drops the LayerNorm's result; arXiv 2005.08100 (Conformer); arXiv 1910.07467
    (root mean square).
    """

    mixes_frequencies = False
    down_multiple = 2
    begins_linearly = False

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        r: int,
        out_features: int,
        *,
        kernel_size: int = 31,
        patch_grid: Optional[PatchGrid] = None,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            num_experts,
            in_features,
            r,
            out_features,
            kernel_size=kernel_size,
            patch_grid=patch_grid,
            causal=causal,
            activation="silu",
            dropout=dropout,
        )
        self.norm_weight = nn.Parameter(torch.empty(num_experts, r))
        self.norm_bias = nn.Parameter(torch.empty(num_experts, r))
        self._reset_norm(identity=True)

    def reset_parameters(self, identity: bool = True) -> None:
        """Draw fresh weights: γ is one and β zero, the others are as in `ConvolutionExperts`.

        Args:
            identity (bool): if false, γ, β, `up` and the biases are drawn too. Default: True.
        """
        super().reset_parameters(identity)
        self._reset_norm(identity)

    def _reset_norm(self, identity: bool) -> None:
        if identity:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)
        else:
            nn.init.uniform_(self.norm_weight, 0.5, 1.5)
            uniform_(self.norm_bias, fan_in=self.norm_bias.shape[1])

    def _prepare(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:])

    def _hidden(
        self,
        projected: Tensor,
        mask: Optional[Tensor] = None,
        past: Optional[Past] = None,
        *,
        over_slots: bool = False,
    ) -> Tensor:
        mixed = self._convolve(F.glu(projected, dim=-1), mask, past, over_slots)
        scale = (mixed.square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt()
        weight, bias = self.norm_weight.to(mixed.dtype), self.norm_bias.to(mixed.dtype)
        return self.activation(torch.addcmul(bias, mixed * scale, weight))
