"""Experts with a convolution in their bottleneck.

Letters of all shapes: B batch, T tokens, D hidden size of the input and D' of the output, N experts, R bottleneck. L is
the length of what an expert reads: its P slots, or all T tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import BottleneckExperts, uniform_
from .past import Past


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
        causal (bool): whether all neighbours of a token are before it, and the kernel's last weight is its own; slots
            have no order. Not with a patch grid. Default: False.
        activation (str): name of the activation in transformers. Default: `"gelu"`.
        dropout (float): probability of dropping an activation. Default: 0.0.

    Source: arXiv 2402.00828, whose code drops the convolution's result; arXiv 2207.07039 (Convpass).
    """

    mixes_tokens = True
    mixes_frequencies = True  # whether the kernel over a patch grid is K × K, or 1 × K along time

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        r: int,
        out_features: int,
        *,
        kernel_size: int = 3,
        patch_grid: Optional[PatchGrid] = None,
        causal: bool = False,
        activation: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_experts, in_features, r, out_features, activation=activation, dropout=dropout)
        self.causal = causal
        self.patch_grid = patch_grid
        kernel = (kernel_size,) if patch_grid is None else (kernel_size if self.mixes_frequencies else 1, kernel_size)
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

    def _hidden(
        self,
        projected: Tensor,
        mask: Optional[Tensor] = None,
        past: Optional[Past] = None,
        *,
        over_slots: bool = False,
    ) -> Tensor:
        return self.activation(self._convolve(self.activation(projected), mask, past, over_slots))

    def _convolve(self, hidden: Tensor, mask: Optional[Tensor], past: Optional[Past], over_slots: bool) -> Tensor:
        """Convolve `(B, L, N, R)` over L, each channel with its own kernel; masked tokens count as zero."""
        if mask is not None:
            hidden = hidden.masked_fill(~mask[:, :, None, None], 0.0)
        channels, reach = hidden.flatten(2), self.conv_weight.shape[-1] - 1
        causal = self.causal and not over_slots
        if causal and past is not None:
            channels = past.before(channels, reach, *past.ends(hidden, mask))
        elif causal:
            channels = F.pad(channels, (0, 0, reach, 0))
        return self._convolve_channels(channels.mT, causal).mT.unflatten(-1, hidden.shape[2:])

    def _convolve_channels(self, channels: Tensor, causal: bool) -> Tensor:
        """The same for `(B, N·R, L)` without a mask; if causal, with the K - 1 before the first."""
        weight = self.conv_weight.to(channels.dtype).flatten(0, 1).unsqueeze(1)
        bias = self.conv_bias.to(channels.dtype).flatten()
        centre = [size // 2 for size in self.conv_weight.shape[2:]]
        groups, grid = channels.shape[1], self.patch_grid
        if causal:
            return F.conv1d(channels, weight, bias, groups=groups)
        if grid is None:
            return F.conv1d(channels, weight, bias, padding=centre, groups=groups)
        length = grid.class_tokens + grid.height * grid.width
        if channels.shape[-1] != length:
            raise ValueError(
                f"`patch_grid` takes {length} tokens, {grid.class_tokens} class tokens and {grid.height} x "
                f"{grid.width} patches (frequency x time), got {channels.shape[-1]}."
            )
        class_tokens, patches = channels.split([grid.class_tokens, grid.height * grid.width], dim=-1)
        class_tokens = class_tokens * weight[:, :, centre[0], centre[1]] + bias.unsqueeze(-1)
        patches = patches.unflatten(-1, (grid.height, grid.width))
        patches = F.conv2d(patches, weight, bias, padding=centre, groups=groups)
        return torch.cat([class_tokens, patches.flatten(-2)], dim=-1)
