"""Where in the past the slots read, over the time of a stream.

Letters of all shapes: B streams, T tokens, N experts, P slots per expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .records import Record


class StreamReading(NamedTuple):
    """Where in the past the slots of one block read, at each token of a stream or of a batch of streams.

    With the dispatch weights w[t, u] of what the token t reads, over all tokens u of the stream so far:
    """

    block: str  # name of the block in the base model
    adapter: str
    age: Tensor  # (B, T, N, P): Σ_u w[t, u] · (t - u), in tokens; below zero ahead of the token, in its chunk
    effective_tokens: Tensor  # (B, T, N, P): 1 / Σ_u w[t, u]², from 1 for a single token
    mask: Tensor  # (B, T) boolean, true for real tokens; of the others nothing in here has a meaning


def stream_reading(records: Iterable[Record]) -> list[StreamReading]:
    """Put the pieces of a stream together, and say where in the past the slots of each block read.

        with record_routing(model) as records, stream_routing(model), torch.no_grad():
            for piece in pieces:
                model(piece)
        readings = stream_reading(records)

    A whole clip is a stream of one piece. Where a stream of the batch is reset, its ages begin anew.

    Args:
        records (iterable of Record): of one call for each piece, in their order. Those of blocks whose routing is not
            soft and in order of time are left out.

    Returns:
        list[StreamReading]: one for each adapter of each block that reads in order of time, in the order in which they
        run.

    Raises:
        ValueError: if none of them does, if a stream has tokens that were not recorded, or if the pieces are not of as
            many streams.
    """
    pieces: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.is_causal:
            pieces.setdefault((record.block, record.adapter), []).append(record)
    if not pieces:
        raise ValueError(
            "No block of the records reads slots in order of time: record a model whose adapter has soft routing that "
            "is causal, such as with `causal=True`."
        )
    return [_join(*key, found) for key, found in pieces.items()]


def _join(block: str, adapter: str, pieces: list[Record]) -> StreamReading:
    ages, effective = [], []
    for piece in pieces:
        if piece.channels != 1:
            raise ValueError(f"What slots read over time is known for one channel, but clips have {piece.channels}.")
        if piece.age is None or piece.effective_tokens is None:
            raise ValueError(
                f"The stream in the block '{block}' has tokens that were not recorded: record it from its first piece "
                "on, or reset it."
            )
        ages.append(piece.age)
        effective.append(piece.effective_tokens)
    numbers = sorted({len(age) for age in ages})
    if len(numbers) > 1:
        raise ValueError(
            f"The pieces in the block '{block}' are of {' and '.join(map(str, numbers))} streams: empty the records "
            "before another number goes on."
        )
    masks = torch.cat([piece.mask for piece in pieces], dim=1)
    return StreamReading(block, adapter, torch.cat(ages, dim=1), torch.cat(effective, dim=1), masks)
