"""Pictures of where in the past the slots read, over the time of a stream.

Letters of all shapes: B streams, T tokens, N experts, P slots per expert.
"""

from __future__ import annotations

import math
from typing import Optional

import numpy as np

from .figures import BESIDE, BLANK, LARGE, LITERAL, MEDIUM, SMALL, Figure, label_bar, new_figure, shorten, slot_names
from .streams import StreamReading


def plot_stream(reading: StreamReading, title: str, *, row: int = 0, token_seconds: Optional[float] = None) -> Figure:
    """Draw where in the past the slots of a block read, over the time of a stream.

    Args:
        reading (StreamReading): what `stream_reading` gives.
        title (str): what the picture shows, such as the block's name.
        row (int): which stream of the batch. Default: the first.
        token_seconds (float, optional): time from one token to the next, in seconds. Default: time is in tokens.

    Returns:
        Figure: above, the mean age of what each slot reads, and below, the effective number of tokens that it is of; a
        row for each slot. Padding is left out.

    Raises:
        ValueError: if the stream has no real token.
    """
    real = reading.mask[row].cpu().numpy()
    if not real.any():
        raise ValueError(f"The stream {row} of the block '{reading.block}' has no real token.")
    scale, unit = (1.0, "tokens") if token_seconds is None else (token_seconds, "s")
    names = slot_names(*reading.age.shape[2:])
    height = min(max(9 / len(names), 0.14), 0.3)
    figure = new_figure(9.2, 1.4 + 2 * max(height * len(names), 1.1))
    panels = (
        (reading.age, scale, f"mean age ({unit})"),
        (reading.effective_tokens, 1.0, "effective number\nof tokens"),
    )
    for axes, (values, factor, label) in zip(figure.subplots(2, 1, sharex=True), panels):
        over_time = factor * values[row].flatten(1).double().cpu().numpy()[real].T
        # Means of neighbours, if there are more tokens than pixels.
        size = math.ceil(over_time.shape[1] / 1000)
        starts = np.arange(0, over_time.shape[1], size)
        counts = np.diff(np.append(starts, over_time.shape[1]))
        means = np.add.reduceat(over_time, starts, axis=1) / counts
        axes.patch.set(**BLANK)
        extent = (0, scale * len(starts) * size, len(names) - 0.5, -0.5)
        image = axes.imshow(
            means, cmap="viridis", aspect="auto", extent=extent, interpolation="nearest", vmin=min(0.0, means.min())
        )
        axes.set_xlim(0, scale * over_time.shape[1])
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelsize=SMALL, length=2)
        label_bar(figure.colorbar(image, ax=axes, pad=0.015, **BESIDE), label)
    axes.set_xlabel(f"time ({unit})", fontsize=MEDIUM)
    figure.suptitle(shorten(title, 100), fontsize=LARGE + 1, x=0.01, ha="left", **LITERAL)
    return figure
