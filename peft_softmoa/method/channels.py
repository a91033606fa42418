"""Several channels of a clip in one mixture: which token is of which channel.

Letters of all shapes: B batch, C channels, T tokens of a channel, D hidden size. The tokens of a clip lie channel by
channel, `(B, C·T, …)`.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

# The standard deviation of a fresh channel embedding: that of what a fresh layer norm puts out.
STANDARD_DEVIATION = 1.0


def embed_channels(tokens: Tensor, embedding: Optional[Tensor], channels: int) -> Tensor:
    """Add to each token the embedding of its channel.

        output[c, t] = x[c, t] + e[c]

    Args:
        tokens (Tensor): x, `(B, C·T, D)`.
        embedding (Tensor, optional): e, `(C, D)`. Default: the channels are not told apart.
        channels (int): C.

    Returns:
        Tensor: `(B, C·T, D)`, in the dtype of the tokens.

    Raises:
        ValueError: if there are not as many channels as embeddings.
    """
    if embedding is None:
        return tokens
    if len(embedding) != channels:
        raise ValueError(
            f"The adapter has embeddings for {len(embedding)} channels, got {channels}. An adapter with "
            "channel_embedding=False takes any number of channels."
        )
    by_channel = tokens.unflatten(1, (channels, -1))
    return (by_channel + embedding.to(tokens.dtype).unsqueeze(1)).flatten(1, 2)


def apart(tokens: Tensor, channels: int) -> Tensor:
    """The channels of each clip as samples: `(B·C, T, …)` from `(B, C·T, …)`."""
    return tokens if channels == 1 else tokens.unflatten(1, (channels, -1)).flatten(0, 1)


def together(tokens: Tensor, channels: int) -> Tensor:
    """The opposite of `apart`: `(B, C·T, …)` from `(B·C, T, …)`."""
    return tokens if channels == 1 else tokens.unflatten(0, (-1, channels)).flatten(1, 2)
