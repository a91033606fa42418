"""Where in a clip the slots read, as the page shows it.

Letters of all shapes: N experts, P slots per expert.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import soundfile
import torch

from ..method import PatchGrid
from .clips import ClipReading
from .figures import PIL, slot_names
from .maps import ReadingMap
from .page import BlockMaps, ClipView, Image, SlotMap, Tick, data_url
from .report import ExpertReport
from .spectrograms import FRAME_SECONDS, WINDOW_SECONDS

# Greatest number of columns of a picture; neighbours are averaged.
MAX_COLUMNS = 1000
KILOHERTZ = (0.5, 1, 2, 4, 8, 16)
# Shares of the levels of a spectrogram below which all is blank, and above which all has the strongest shade.
LEVELS = (5.0, 99.8)


def clip_view(report: ExpertReport, reading: ClipReading) -> ClipView:
    """Make what the page shows of a clip.

    Args:
        report (ExpertReport): the report, which names the blocks.
        reading (ClipReading): what the blocks did with the clip.

    Returns:
        ClipView: the clip with a map for each slot of each block that has maps.
    """
    clip = reading.clip
    assert clip.spectrogram is not None and clip.frequencies is not None
    end = len(clip.samples) / clip.sampling_rate / clip.seconds
    bins, frames = clip.spectrogram.shape
    # Padding is not drawn: its level, that of silence or of zeros after a normalization, says nothing.
    drawn = min(max(1, math.ceil((end - WINDOW_SECONDS / clip.seconds) * frames)), frames) if end < 0.995 else frames
    picture = clip.spectrogram[:, :drawn]
    low, high = np.percentile(picture, LEVELS)
    levels = np.clip((picture - low) / max(float(high - low), 1e-9), 0, 1)
    text = (
        "A slot is a weighted average of tokens, and these maps show where its weights lie: as multiples of what a "
        "slot has there that reads all tokens alike."
    )
    if reading.grid:
        text += " Elsewhere are tokens without a place, such as class tokens."
    else:
        text += " Tokens are laid evenly over the time; what one of them has seen of its neighbours is not shown."
    marks = [mark for mark in KILOHERTZ if clip.frequencies[0] <= 1000 * mark <= clip.frequencies[-1]]
    places = np.interp([1000 * mark for mark in marks], clip.frequencies, np.arange(bins) + 0.5) / bins
    return ClipView(
        clip.name,
        f"The model says {reading.prediction}." if reading.prediction else "",
        _wav(reading),
        clip.seconds,
        100 * end if end < 0.995 else None,
        "What the model reads" if reading.reads_spectrogram else "Log-mel spectrogram",
        _image(_pool(levels, np.ones((1, drawn))), 100 * drawn / frames),
        time_ticks(clip.seconds),
        [Tick(100 * place, f"{mark:g} kHz") for mark, place in zip(marks, places.tolist())],
        bool(reading.grid),
        text,
        [
            _block_maps(report.names[record.block, record.adapter], found, reading, bins)
            for record, found in zip(reading.records, reading.maps)
            if found is not None
        ],
    )


def time_ticks(seconds: float) -> list[Tick]:
    """Choose ticks for a time axis: round numbers, of which there are few enough for a phone.

    Args:
        seconds (float): what the axis spans.

    Returns:
        list[Tick]: from zero on.
    """
    magnitude = 10.0 ** math.floor(math.log10(seconds / 6))
    step = next(each * magnitude for each in (1, 2, 5, 10) if seconds / (each * magnitude) <= 6)
    return [Tick(100 * n * step / seconds, f"{n * step:.10g}") for n in range(int(seconds / step + 1e-9) + 1)]


def _block_maps(name: str, found: ReadingMap, reading: ClipReading, spectrogram_bins: int) -> BlockMaps:
    experts, slots, bins, length = found.shares.shape
    uniform = found.uniform.numpy()
    rows, columns = (int(np.flatnonzero(uniform.any(axis))[-1]) + 1 for axis in (1, 0))
    if reading.grid is not None and bins > 1:
        width = 100 * columns * FRAME_SECONDS / reading.clip.seconds
        height = 100 * rows / spectrogram_bins
        across, up = _places(reading.grid)
    else:
        width, height, across, up = 100 * columns / length, 100.0, 1, 1
    shares = found.shares.flatten(0, 1).numpy()[:, :rows:up, :columns:across]
    maps = [_pool(each, uniform[:rows:up, :columns:across]) for each in shares]
    top = max(float(each.max()) for each in maps)
    # As in the pictures: equal readings have a quarter of the range at least.
    top = max(top, 2.0)
    gamma = min(1.0, math.log(4) / math.log(max(top, 4)))
    peaks = find_peaks(found, reading)
    elsewhere = found.elsewhere.flatten().tolist()
    return BlockMaps(
        name,
        [
            SlotMap(
                index // slots,
                label.capitalize(),
                _notes(float(values.max()), elsewhere[index]),
                _image((values / top) ** gamma, width, height),
                f"Reads most at {_describe(peak)}." if values.any() else "Reads nothing of the clip.",
            )
            for index, (label, values, peak) in enumerate(zip(slot_names(experts, slots), maps, peaks))
        ],
        [Tick(0, "0"), Tick(100 * top**-gamma, "1"), Tick(100, _number(top))],
    )


def _places(grid: PatchGrid) -> tuple[int, int]:
    """Frames and bins from one place to the next: between them the maps are the same everywhere."""
    return math.gcd(grid.patch_size, grid.time_stride), math.gcd(grid.patch_size, grid.frequency_stride)


def _pool(shares: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Multiples of a uniform reading, over groups of columns if there are many."""
    starts = np.arange(0, shares.shape[1], math.ceil(shares.shape[1] / MAX_COLUMNS))
    sums, equal = (np.add.reduceat(each, starts, axis=1) for each in (shares, uniform))
    return np.asarray(np.divide(sums, equal, out=np.zeros_like(sums), where=equal > 0))


def _image(shades: np.ndarray, width: float = 100.0, height: float = 100.0) -> Image:
    """A picture of shades from 0 to 1, the first row at the bottom."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.rint(255 * shades[::-1]).astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return Image(data_url("image/png", buffer.getvalue()), width, height)


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _notes(most: float, elsewhere: float) -> list[str]:
    notes = [f"up to {_number(most)} ×"] if most else []
    if elsewhere >= 0.005:
        notes.append(f"{elsewhere:.0%} elsewhere")
    return notes or ["reads nothing"]


def _wav(reading: ClipReading) -> bytes:
    file, clip = io.BytesIO(), reading.clip
    samples = clip.samples[: round(clip.seconds * clip.sampling_rate)]
    soundfile.write(file, samples, clip.sampling_rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def find_peaks(found: ReadingMap, reading: ClipReading) -> list[dict[str, Any]]:
    """Find where each slot reads most, as a multiple of a uniform reading.

    Args:
        found (ReadingMap): where the slots of a block read.
        reading (ClipReading): the clip.

    Returns:
        list[dict]: for each slot the `expert` and the `slot`, the `seconds` and, for patches, the `hertz` at the middle
        of what it reads most, and the share that it reads `elsewhere`.
    """
    peaks = []
    clip, (experts, slots, bins, length) = reading.clip, found.shares.shape
    step = FRAME_SECONDS if reading.grid and bins > 1 else clip.seconds / length
    # As in the pictures: a place does not count more because more patches cover it.
    multiples = (found.shares / found.uniform).nan_to_num(0.0, 0.0, 0.0)
    for expert in range(experts):
        for slot in range(slots):
            # The middle of the patch, or of the part that no other patch covers.
            best = torch.nonzero(multiples[expert, slot] >= multiples[expert, slot].max() * (1 - 1e-9)).double()
            place, time = best.median(0).values.tolist() if bins == 1 else best.mean(0).tolist()
            hertz = None
            if clip.frequencies is not None and bins > 1:
                hertz = float(np.interp(place, np.arange(len(clip.frequencies)), clip.frequencies))
            peaks.append(
                {
                    "expert": expert,
                    "slot": slot,
                    "seconds": (time + 0.5) * step,
                    "hertz": hertz,
                    "elsewhere": found.elsewhere[expert, slot].item(),
                }
            )
    return peaks


def _describe(peak: dict[str, Any]) -> str:
    return f"{peak['seconds']:.2f} s" + (f", {peak['hertz']:.0f} Hz" if peak["hertz"] is not None else "")
