"""Experts: stacked parameters, and one batched forward for all of them.

Letters of all shapes: B batch, T tokens, D hidden size of the input and D' of the output, N experts, P slots per
expert, S = N·P slots, R bottleneck. L is the length of what an expert reads: its P slots, or all T tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN


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
        hidden = self._hidden(hidden.unflatten(1, (batch, num_slots)).permute(1, 2, 0, 3))
        hidden = self.dropout(hidden) if dropout else hidden
        hidden = hidden.permute(2, 0, 1, 3).flatten(1, 2)
        outputs = torch.baddbmm(self.up_bias.to(dtype).unsqueeze(1), hidden, self.up_weight.to(dtype))
        return outputs.unflatten(1, (batch, num_slots)).transpose(0, 1).flatten(1, 2)

    def add_weighted(self, added_to: Tensor, tokens: Tensor, weights: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Apply every expert to every token, and add the weighted sum of the expert outputs to a block's output.

            output[t] = added_to[t] + Σ_n weights[t, n] · expert_n(tokens)[t]

        Args:
            added_to (Tensor): `(B, T, D')`.
            tokens (Tensor): `(B, T, D)`.
            weights (Tensor): `(B, T, N)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens; it matters to experts that read
                neighbours. Default: all are real.

        Returns:
            Tensor: `(B, T, D')`, in the dtype of `added_to`.
        """
        # The experts side by side, D -> N·R -> D', with the weights in between: nothing of size T·N·D'.
        hidden = self.dropout(self._all_hidden(tokens, mask)) * weights.unsqueeze(-1)
        # The biases of `up` are one more input for each expert.
        left = torch.cat([hidden.flatten(2), weights], dim=-1).flatten(0, 1).to(added_to.dtype)
        right = torch.cat([self.up_weight.flatten(0, 1), self.up_bias]).to(added_to.dtype)
        return torch.addmm(added_to.flatten(0, -2), left, right).unflatten(0, tokens.shape[:2])

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        num_experts, in_features, r = self.down_weight.shape
        return f"num_experts={num_experts}, {in_features}→{r}→{self.up_weight.shape[-1]}"

    def norms(self, tokens: Tensor, weights: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """The norms over D' of what each expert adds to each token, without dropout.

            norms[t, n] = ‖weights[t, n] · expert_n(x)[t]‖

        Args:
            tokens (Tensor): x, `(B, T, D)`.
            weights (Tensor): `(B, T, N)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

        Returns:
            Tensor: `(B, T, N)`.
        """
        hidden = self._all_hidden(tokens, mask) * weights.unsqueeze(-1)
        given = torch.cat([hidden, weights.unsqueeze(-1)], dim=-1)
        up = torch.cat([self.up_weight, self.up_bias.unsqueeze(1)], dim=1).to(given.dtype)
        # By the products of its rows, as everywhere here: nothing of size T·N·D'.
        squares = torch.einsum("btnr,nrs,btns->btn", given, up @ up.mT, given)
        return squares.clamp_min(0).sqrt()

    def _all_hidden(self, tokens: Tensor, mask: Optional[Tensor]) -> Tensor:
        """The input of every expert's `up` for every token, before dropout: `(B, T, N, R)`."""
        num_experts, _, r = self.down_weight.shape
        down_weight = self.down_weight.to(tokens.dtype).mT.flatten(0, 1)
        projected = F.linear(tokens, down_weight, self.down_bias.to(tokens.dtype).flatten())
        return self._hidden(projected.unflatten(-1, (num_experts, r)), mask)

    def _hidden(self, projected: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """From the output of `down` to the input of dropout and `up`, both `(B, L, N, R)`."""
        return self.activation(projected)


class PatchGrid(NamedTuple):
    """How a sequence of tokens lies in time and frequency: class tokens first, then the patches row by row."""

    class_tokens: int  # tokens before the patches
    height: int  # patches in frequency
    width: int  # patches in time
    patch_size: int = 1  # of a square patch, in bins and frames of the spectrogram; with smaller strides they overlap
    frequency_stride: int = 1  # bins from one patch to the next
    time_stride: int = 1  # frames from one patch to the next


class ConvolutionExperts(BottleneckExperts):
    """N adapters with a depthwise convolution in their bottleneck.

        expert_n(z) = up_n(dropout(act(conv_n(act(down_n(z)))))),   D → R → R → D'

    The convolution runs over neighbouring tokens, or over the slots of an expert, with zeros beyond the ends. With a
    patch grid it has two dimensions, frequency and time. Masked tokens are zero for their neighbours. What has no
    neighbours, class tokens beside a grid or a single slot, meets the centre of the kernel only. So class tokens are
    no part of the grid, and yet a last layer of which only they are read trains its convolution.

    Args:
        num_experts (int): N.
        in_features (int): D.
        r (int): R.
        out_features (int): D'.
        kernel_size (int): K, odd; K tokens, or K × K patches. Default: 3.
        patch_grid (PatchGrid, optional): the grid of the tokens. Default: none, they are a sequence.
        activation (str): name of the activation in transformers. Default: `"gelu"`.
        dropout (float): probability of dropping an activation. Default: 0.0.

    Source: arXiv 2402.00828, whose code drops the convolution's result; arXiv 2207.07039 (Convpass).
    """

    mixes_tokens = True

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        r: int,
        out_features: int,
        *,
        kernel_size: int = 3,
        patch_grid: Optional[PatchGrid] = None,
        activation: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_experts, in_features, r, out_features, activation=activation, dropout=dropout)
        self.patch_grid = patch_grid
        kernel = (kernel_size,) if patch_grid is None else (kernel_size, kernel_size)
        self.conv_weight = nn.Parameter(torch.empty(num_experts, r, *kernel))
        self.conv_bias = nn.Parameter(torch.empty(num_experts, r))
        self._reset_convolution(identity=True)

    def reset_parameters(self, identity: bool = True) -> None:
        """Draw fresh weights: the convolution as `nn.Conv1d` does, the projections as in `BottleneckExperts`.

        Args:
            identity (bool): if false, `up` and the biases are drawn too. Default: True.
        """
        super().reset_parameters(identity)
        self._reset_convolution(identity)

    def _reset_convolution(self, identity: bool) -> None:
        kernel = self.conv_weight.shape[2:].numel()
        uniform_(self.conv_weight, fan_in=kernel)
        if identity:
            nn.init.zeros_(self.conv_bias)
        else:
            uniform_(self.conv_bias, fan_in=kernel)

    def extra_repr(self) -> str:
        """Sizes, kernel and patch grid, for `print`."""
        grid = self.patch_grid and f"{self.patch_grid.height}x{self.patch_grid.width}"
        return f"{super().extra_repr()}, kernel_size={self.conv_weight.shape[-1]}, patch_grid={grid}"

    def _hidden(self, projected: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        hidden = self.activation(projected)
        if mask is not None:
            hidden = hidden.masked_fill(~mask[:, :, None, None], 0.0)
        num_experts, r = hidden.shape[2:]
        channels = self._convolve(hidden.flatten(2).mT).mT
        return self.activation(channels.unflatten(-1, (num_experts, r)))

    def _convolve(self, channels: Tensor) -> Tensor:
        """Convolve `(B, N·R, L)`, each channel with its own kernel."""
        weight = self.conv_weight.to(channels.dtype).flatten(0, 1).unsqueeze(1)
        bias = self.conv_bias.to(channels.dtype).flatten()
        options = {"padding": self.conv_weight.shape[-1] // 2, "groups": channels.shape[1]}
        grid = self.patch_grid
        if grid is None:
            return F.conv1d(channels, weight, bias, **options)
        length = grid.class_tokens + grid.height * grid.width
        if channels.shape[-1] != length:
            raise ValueError(
                f"`patch_grid` takes {length} tokens, {grid.class_tokens} class tokens and {grid.height} x "
                f"{grid.width} patches (frequency x time), got {channels.shape[-1]}."
            )
        class_tokens, patches = channels.split([grid.class_tokens, grid.height * grid.width], dim=-1)
        centre = self.conv_weight.shape[-1] // 2
        class_tokens = class_tokens * weight[:, :, centre, centre] + bias.unsqueeze(-1)
        patches = F.conv2d(patches.unflatten(-1, (grid.height, grid.width)), weight, bias, **options)
        return torch.cat([class_tokens, patches.flatten(-2)], dim=-1)


def uniform_(parameter: nn.Parameter, fan_in: int) -> None:
    """Draw from U(-1/√fan_in, 1/√fan_in), as `nn.Linear` does."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound)
