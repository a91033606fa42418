"""Where in a clip the slots read: from weights of tokens to time and frequency.

Letters of all shapes: B batch, T tokens, N experts, P slots per expert.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import PatchGrid
from .records import Record


class ReadingMap(NamedTuple):
    """Where the slots of one block read one clip. Everything is in float64."""

    block: str  # name of the block in the base model
    adapter: str
    # Shares of what each slot reads: (N, P, bins, frames) of the spectrogram, as far as patches reach, or (N, P, 1, T)
    # where tokens follow each other in time.
    shares: Tensor
    elsewhere: Tensor  # (N, P): the share of tokens without a place, such as class tokens
    uniform: Tensor  # (bins, frames) or (1, T): the shares of a slot that reads all real tokens alike


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
        ValueError: if the record has more than one sample, as that of a block that attends in windows, or the clip
            several channels.
    """
    if record.channels != 1:
        raise ValueError(f"The clip has {record.channels} channels, and a map is of one.")
    if len(record.dispatch) != 1:
        raise ValueError(
            f"The block '{record.block}' takes the clip in {len(record.dispatch)} parts, such as windows, whose place "
            "in the clip is not known."
        )
    real = record.mask[0].cpu().to(torch.float64)
    weights = record.dispatch[0].cpu().to(torch.float64).movedim(0, -1) * real
    experts, slots, num_tokens = weights.shape
    # With one more map: of a slot that reads all tokens alike.
    maps = torch.cat([weights.flatten(0, 1), (real / real.sum().clamp_min(1)).unsqueeze(0)])
    elsewhere = maps.new_zeros(len(maps))
    if grid is not None and num_tokens == grid.class_tokens + grid.height * grid.width:
        elsewhere = maps[:, : grid.class_tokens].sum(-1)
        on_grid = maps[:, grid.class_tokens :].reshape(-1, 1, grid.height, grid.width)
        kernel = maps.new_full((1, 1, grid.patch_size, grid.patch_size), grid.patch_size**-2)
        maps = F.conv_transpose2d(on_grid, kernel, stride=(grid.frequency_stride, grid.time_stride)).squeeze(1)
    else:
        maps = maps.unsqueeze(1)
    return ReadingMap(
        record.block,
        record.adapter,
        maps[:-1].reshape(experts, slots, *maps.shape[1:]),
        elsewhere[:-1].reshape(experts, slots),
        maps[-1],
    )
