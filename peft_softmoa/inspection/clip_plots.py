"""Pictures of where in a clip the slots read.

Letters of all shapes: T tokens, N experts, P slots per expert.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import numpy as np

from .figures import (
    BESIDE,
    BLANK,
    CENTRED,
    GREY,
    LARGE,
    LITERAL,
    MEDIUM,
    SMALL,
    Axes,
    Figure,
    MaxNLocator,
    label_bar,
    new_figure,
    scale,
    shorten,
    slot_names,
)
from .maps import ReadingMap

READING = "reading (× a uniform reading, the line)"
KILOHERTZ = (0.25, 0.5, 1, 2, 4, 8, 16)


class Clip(NamedTuple):
    """A clip as a model reads it."""

    name: str
    samples: np.ndarray  # (samples,) float32
    sampling_rate: int  # in Hz
    spectrogram: Optional[np.ndarray]  # (bins, frames): what a model of patches reads; others need none
    seconds: float  # what the model's input spans in time, with its padding
    frequencies: Optional[np.ndarray] = None  # (bins,), the centre of each bin in Hz, increasing


def plot_reading(
    reading: ReadingMap, clip: Clip, title: str, *, expert: Optional[int] = None, width: float = 9.2
) -> Figure:
    """Draw where in a clip the slots of a block read, as a multiple of a uniform reading.

        map[f, t] = shares[f, t] / what a slot that reads all tokens alike has at f, t

    which is one everywhere for such a slot, although overlapping patches cover some places more often than others.

    Args:
        reading (ReadingMap): what `reading_map` gives.
        clip (Clip): the clip.
        title (str): what the picture shows, such as the block's name.
        expert (int, optional): the one expert whose slots are drawn, in the colours that they have among all. Default:
            all of them.
        width (float): width in inches, of which margins take 1.5. Default: 9.2.

    Returns:
        Figure: for patches the spectrogram, and below it a map for each slot, blank where no patch reaches; else the
        waveform, and below it a map with a row for each slot.

    Raises:
        ValueError: if tokens are patches, and the clip has no spectrogram, or if there is no such expert.
    """
    num_experts, num_slots = reading.shares.shape[:2]
    if expert is not None and not 0 <= expert < num_experts:
        raise ValueError(f"`expert` must be from 0 to {num_experts - 1}, got {expert}.")
    shown = slice(None) if expert is None else slice(expert * num_slots, (expert + 1) * num_slots)
    if reading.shares.shape[2] == 1:
        return _plot_sequence(reading, clip, title, shown, width)
    if clip.spectrogram is None:
        raise ValueError(f"The block '{reading.block}' reads patches: their picture needs the spectrogram of the clip.")
    return _plot_patches(reading, clip, clip.spectrogram, title, shown, width)


def _plot_patches(
    reading: ReadingMap, clip: Clip, spectrogram: np.ndarray, title: str, shown: slice, full_width: float
) -> Figure:
    bins, frames = spectrogram.shape
    uniform = reading.uniform.numpy()
    shares = reading.shares.flatten(0, 1).numpy()
    maps = np.ma.masked_invalid(np.divide(shares, uniform, out=np.full_like(shares, np.nan), where=uniform > 0))
    norm = scale(float(maps.max()), 1)
    maps, shares, names = maps[shown], shares[shown], slot_names(*reading.shares.shape[:2])[shown]
    elsewhere = reading.elsewhere.flatten()[shown].tolist()
    columns = next((count for count, most in ((1, 1), (2, 8), (3, 18), (4, 32)) if len(maps) <= most), 5)
    rows = math.ceil(len(maps) / columns)
    height = {1: 1.5, 2: 1.2, 3: 1.05, 4: 0.95, 5: 0.8}[columns]
    # Positions are in inches: the automatic layout of matplotlib takes many seconds for tens of panels.
    left, right, gap, heading = 0.62, full_width - 0.85, 0.14, 0.24 if columns < 4 else 0.21
    width = (right - left - gap * (columns - 1)) / columns
    total = 2.35 + rows * (height + heading) + 0.42
    figure = Figure(figsize=(full_width, total), facecolor="white")

    def place(x: float, y: float, width: float, height: float) -> Axes:
        return figure.add_axes((x / full_width, 1 - (y + height) / total, width / full_width, height / total))

    extent = (0, clip.seconds, -0.5, bins - 0.5)
    second = clip.seconds / frames
    reached = (0, maps.shape[2] * second, -0.5, maps.shape[1] - 0.5)
    figure.text(0.1 / full_width, 1 - 0.1 / total, shorten(title, 100), fontsize=LARGE + 1, va="top", **LITERAL)
    top = place(left, 0.58, right - left, 1.4)
    picture = top.imshow(spectrogram, cmap="gray", aspect="auto", origin="lower", extent=extent)
    top.set_title(f"{shorten(clip.name, 60)}: spectrogram", fontsize=LARGE, loc="left", pad=4, **LITERAL)
    top.set_xlabel("time (s)", fontsize=MEDIUM, labelpad=1)
    _frequency_axis(top, clip.frequencies, bins)
    end = len(clip.samples) / clip.sampling_rate
    if end < 0.995 * clip.seconds:
        top.axvline(end, color="white", linewidth=1.2, linestyle="--")
        top.text(end, bins - 1, " end of the clip", fontsize=SMALL, color="black", va="top")
    bar = figure.colorbar(picture, cax=place(right + 0.12, 0.58, 0.13, 1.4))
    label_bar(bar, "level (no unit)")
    for index, (values, name) in enumerate(zip(maps, names)):
        row, column = divmod(index, columns)
        axes = place(left + column * (width + gap), 2.35 + heading + row * (height + heading), width, height)
        axes.patch.set(**BLANK)
        image = axes.imshow(values, norm=norm, cmap="viridis", aspect="auto", origin="lower", extent=reached)
        if end < 0.995 * clip.seconds:
            axes.axvline(end, color="white", linewidth=1, linestyle="--")
        axes.set(xlim=extent[:2], ylim=extent[2:])  # beyond the patches, too
        note = "reads nothing"
        if shares[index].any() or elsewhere[index]:
            note = f"{100 * elsewhere[index]:.0f}% elsewhere" if max(elsewhere) > 0 else ""
        axes.set_title(name, fontsize=MEDIUM if columns < 4 else SMALL, loc="left", pad=3)
        axes.set_title(note, fontsize=SMALL - (columns == 5) * 0.5, loc="right", color=GREY, pad=3)
        _frequency_axis(axes, clip.frequencies, bins, is_small=columns > 3, is_labelled=column == 0)
        is_last = index + columns >= len(maps)
        axes.tick_params(labelbottom=is_last)
        axes.set_xlabel("time (s)" if is_last else "", fontsize=MEDIUM, labelpad=1)
    bar = figure.colorbar(image, cax=place(right + 0.12, 2.35 + heading, 0.13, rows * (height + heading) - heading))
    label_bar(bar, READING, norm, 1)
    return figure


def _plot_sequence(reading: ReadingMap, clip: Clip, title: str, shown: slice, width: float) -> Figure:
    shares = reading.shares.flatten(0, 1).squeeze(1).numpy()
    # Means of neighbours, if there are more tokens than pixels: smoothing by matplotlib would mix slots.
    num_tokens = shares.shape[1]
    size = math.ceil(num_tokens / 1000)
    starts = np.arange(0, num_tokens, size)
    equal = np.add.reduceat(reading.uniform.numpy(), starts, axis=1)
    sums = np.add.reduceat(shares, starts, axis=1)
    maps = np.ma.masked_invalid(np.divide(sums, equal, out=np.full_like(sums, np.nan), where=equal > 0))
    norm = scale(float(maps.max()), 1)
    maps, names = maps[shown], slot_names(*reading.shares.shape[:2])[shown]
    height = min(max(9 / len(maps), 0.14), 0.3)
    lower = max(height * len(maps), 1.2)
    figure = new_figure(width, 2.6 + lower)
    top, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, lower])
    times, low, high = _envelope(clip.samples, clip.sampling_rate)
    top.fill_between(times, low, high, color="0.25", linewidth=0.3)
    end = len(clip.samples) / clip.sampling_rate
    if end < 0.995 * clip.seconds:
        top.axvspan(end, clip.seconds, **BLANK)
        box = {"facecolor": "white", "edgecolor": "none"}
        top.text((end + clip.seconds) / 2, 0, "padding", bbox=box, fontsize=SMALL, color=GREY, **CENTRED)
        axes.axvline(end, color="white", linewidth=1, linestyle="--")
    top.set_ylabel("amplitude\n(full scale 1)", fontsize=MEDIUM)
    top.set_title(f"{shorten(clip.name, 60)}: waveform", fontsize=LARGE, loc="left", **LITERAL)
    extent = (0, clip.seconds * len(starts) * size / num_tokens, len(maps) - 0.5, -0.5)
    image = axes.imshow(maps, norm=norm, cmap="viridis", aspect="auto", extent=extent, interpolation="nearest")
    axes.set_yticks(range(len(maps)), names)
    axes.set_xlabel("time (s)", fontsize=MEDIUM)
    axes.set_xlim(0, clip.seconds)
    for each in (top, axes):
        each.tick_params(labelsize=SMALL, length=2)
    label_bar(figure.colorbar(image, ax=axes, pad=0.015, **BESIDE), READING.replace(" (", "\n("), norm, 1)
    figure.suptitle(shorten(title, 100), fontsize=LARGE + 1, x=0.01, ha="left", **LITERAL)
    return figure


def _frequency_axis(
    axes: Axes, frequencies: Optional[np.ndarray], bins: int, is_small: bool = False, is_labelled: bool = True
) -> None:
    """Set ticks at round frequencies that the bins cover."""
    if frequencies is None:
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        label = "bin"
    else:
        marks = [mark for mark in KILOHERTZ if frequencies[0] <= 1000 * mark <= frequencies[-1]]
        marks = marks[::2] if is_small else marks
        places = np.interp([1000 * mark for mark in marks], frequencies, range(bins))
        axes.set_yticks(places, [f"{mark:g}" for mark in marks])
        label = "kHz" if is_small else "frequency (kHz)"
    axes.set_ylabel(label if is_labelled else "", fontsize=MEDIUM if not is_small else SMALL)
    axes.tick_params(labelsize=SMALL, length=2, labelleft=is_labelled)


def _envelope(samples: np.ndarray, sampling_rate: int, places: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times, with the least and greatest amplitude at each: all that a picture can show of a waveform."""
    size = max(1, math.ceil(len(samples) / places))
    starts = np.arange(0, len(samples), size)
    low, high = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
    return (starts + size / 2) / sampling_rate, low, high
