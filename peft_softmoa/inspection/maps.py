"""Where in a clip the slots read: from weights of tokens to time and frequency.

Letters of all shapes: B batch, T tokens, N experts, P slots per expert.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import PatchGrid
from .records import Record


class ReadingMap(NamedTuple):
    """Where the slots of one block read one clip."""

    block: str  # name of the block in the base model
    adapter: str
    # Shares of what each slot reads, in float64: (N, P, bins, frames) of the spectrogram, or (N, P, 1, T) where tokens
    # follow each other in time.
    shares: Tensor
    elsewhere: Tensor  # (N, P): the share of tokens that lie nowhere, such as class tokens


def reading_map(record: Record, grid: Optional[PatchGrid] = None) -> ReadingMap:
    """Find where in a clip the slots of a block read.

    A patch spreads its weight evenly over the bins and frames that it covers, and where patches overlap their shares
    add up:

        shares[f, t] = Σ_{patches that cover f, t} dispatch[patch] / patch_size²

    Args:
        record (Record): one call of the block with a single clip, B = 1.
        grid (PatchGrid, optional): how its tokens lie in time and frequency. Default: they follow each other in time.

    Returns:
        ReadingMap: the map; together with what is elsewhere, each slot's shares have the sum one.

    Raises:
        ValueError: if the record has more than one sample, as that of a block that attends in windows.
    """
    if len(record.dispatch) != 1:
        raise ValueError(
            f"The block '{record.block}' takes the clip in {len(record.dispatch)} parts, such as windows, whose place "
            "in the clip is not known."
        )
    real = record.mask[0]
    weights = record.dispatch[0].cpu().to(torch.float64).masked_fill(~real.cpu()[:, None, None], 0.0).movedim(0, -1)
    patches = None if grid is None else grid.height * grid.width
    if grid is None or patches is None or weights.shape[-1] != grid.class_tokens + patches:
        shares = weights[..., real.cpu()]
        return ReadingMap(record.block, record.adapter, shares.unsqueeze(-2), shares.new_zeros(shares.shape[:-1]))
    elsewhere, on_grid = weights.split([grid.class_tokens, patches], dim=-1)
    kernel = on_grid.new_full((1, 1, grid.patch_size, grid.patch_size), grid.patch_size**-2)
    stride = (grid.frequency_stride, grid.time_stride)
    spread = F.conv_transpose2d(on_grid.reshape(-1, 1, grid.height, grid.width), kernel, stride=stride)
    shares = spread.squeeze(1).unflatten(0, on_grid.shape[:2])
    return ReadingMap(record.block, record.adapter, shares, elsewhere.sum(-1))
