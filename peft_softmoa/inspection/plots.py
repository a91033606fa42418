"""Pictures of what the experts do; only this module loads matplotlib.

Letters of all shapes: B batch, T tokens, N experts, P slots per expert, S = N·P slots, C classes.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from .maps import ReadingMap
from .report import BlockReport, ExpertReport, short_names

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("Plots need matplotlib: pip install 'peft-softmoa[plot]'") from error

# Pixels per inch of the PNG files.
DPI = 150
# What is blank: there is nothing to show, which is not the same as zero.
BLANK: dict[str, Any] = {"facecolor": "0.94", "edgecolor": "0.78", "hatch": "////", "linewidth": 0}
# Names of classes and files are no formulas, even with dollar signs in them.
LITERAL: dict[str, Any] = {"parse_math": False}
CENTRED: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
BESIDE: dict[str, Any] = {"location": "right", "aspect": 25}
BELOW: dict[str, Any] = {"location": "bottom", "aspect": 40}
GREY = "0.35"
READING = "reading (× a uniform reading, the line)"
KILOHERTZ = (0.25, 0.5, 1, 2, 4, 8, 16)
# Text, in points.
LARGE, MEDIUM, SMALL = 9, 8, 7
# Longest name in a picture, in characters.
LONGEST = 28

# Metrics that a Trainer's log may have, with their units.
UNITS = {
    "normalized_entropy": "normalized entropy of the load (0 one expert, 1 all equal)",
    "effective_number": "effective number of experts",
    "coefficient_of_variation": "coefficient of variation of the load (0 all equal)",
    "idle_experts": "number of idle experts",
    "effective_tokens": "effective number of tokens that a slot reads",
    "slot_similarity": "similarity of slots (cosine)",
    "combine_similarity": "similarity of tokens' combine weights (cosine)",
    "class_information": "information about the class (bits)",
}


class Clip(NamedTuple):
    """A clip as a model reads it."""

    name: str
    samples: np.ndarray  # (samples,) float32
    sampling_rate: int  # in Hz
    spectrogram: Optional[np.ndarray]  # (bins, frames) that a model of patches reads, or none
    seconds: float  # what the model's input spans in time, with its padding
    frequencies: Optional[np.ndarray] = None  # (bins,), the centre of each bin in Hz, increasing


def plot_load(report: ExpertReport) -> Figure:
    """Draw the load of each expert in each block, in %.

    Args:
        report (ExpertReport): the metrics of the blocks. Where blocks have fewer experts than others, cells are blank.

    Returns:
        Figure: a row for each block, in the order in which they run, and a column for each expert.
    """
    sizes = sorted({block.num_experts for block in report.blocks})
    values = np.ma.masked_all((len(report.blocks), sizes[-1]))
    for row, block in enumerate(report.blocks):
        values[row, : block.num_experts] = 100 * block.load.numpy()
    equal = [100 / size for size in sizes]
    if len(sizes) == 1:
        note = f"equal share: {equal[0]:.3g}%, the line on the scale"
    else:
        shares = [f"{share:.3g}% among {size}" for share, size in zip(equal, sizes)]
        note = f"equal share: {', '.join(shares)} experts"
    names = report.names
    return _matrix(
        values,
        [names[block.block, block.adapter] for block in report.blocks],
        row_label="block, first to last" if len(report.blocks) > 1 else "block",
        unit="load (% of the combine weights)",
        title=note,
        equal=equal[0],
        mark=equal[0] if len(sizes) == 1 else None,
    )


def plot_classes(report: ExpertReport, block: BlockReport) -> Figure:
    """Draw the load of each expert in each class, in %: each row has the sum 100%.

    Args:
        report (ExpertReport): names the classes and the blocks.
        block (BlockReport): one of its blocks.

    Returns:
        Figure: a row for each class, blank for those without a clip, and a column for each expert.

    Raises:
        ValueError: if the report says nothing about classes.
    """
    if block.class_loads is None or report.label_names is None:
        raise ValueError(f"The report has nothing about classes, because {report.without_classes}.")
    loads = 100 * block.class_loads.numpy()
    absent = loads.sum(1) == 0
    values = np.ma.masked_array(loads, np.broadcast_to(absent[:, None], loads.shape))
    names = [
        f"{_shorten(name)} (no clips)" if is_absent else _shorten(name)
        for name, is_absent in zip(report.label_names, absent)
    ]
    return _matrix(
        values,
        names,
        row_label="class",
        unit="load within the class (% of its combine weights)",
        title=report.names[block.block, block.adapter],
        equal=100 / block.num_experts,
    )


def plot_reading(reading: ReadingMap, clip: Clip, title: str) -> Figure:
    """Draw where in a clip the slots of a block read, as a multiple of a uniform reading.

        map[f, t] = shares[f, t] / what a slot that reads all tokens alike has at f, t

    which is one everywhere for such a slot, although overlapping patches cover some places more often than others.

    Args:
        reading (ReadingMap): what `reading_map` gives.
        clip (Clip): the clip.
        title (str): what the picture shows, such as the block's name.

    Returns:
        Figure: for patches the spectrogram, and below it a map for each slot, blank where no patch reaches; else the
        waveform, and below it a map with a row for each slot.

    Raises:
        ValueError: if tokens are patches, and the clip has no spectrogram.
    """
    if reading.shares.shape[2] == 1:
        return _plot_sequence(reading, clip, title)
    if clip.spectrogram is None:
        raise ValueError(f"The block '{reading.block}' reads patches: their picture needs the spectrogram of the clip.")
    return _plot_patches(reading, clip, clip.spectrogram, title)


def plot_history(log_history: Sequence[Mapping[str, Any]], metric: str = "effective_number") -> Figure:
    """Draw a metric of all blocks over training.

    Args:
        log_history (sequence of mappings): `trainer.state.log_history` of a training with
            `ExpertUtilizationCallback`.
        metric (str): the metric. Default: `"effective_number"`.

    Returns:
        Figure: a thin line for each block and a thick one for their mean.

    Raises:
        ValueError: if the log does not have the metric.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    available = set()
    for entry in log_history:
        for key, value in entry.items():
            parts = key.split("/")
            if parts[0] != "experts" or len(parts) < 2:
                continue
            available.add(parts[-1])
            if parts[-1] == metric:
                lines.setdefault("/".join(parts[1:-1]), []).append(
                    (entry["step"], math.nan if value is None else value)
                )
    if not lines:
        raise ValueError(
            f"The log has no metric '{metric}' of the experts, only {', '.join(sorted(available))}."
            if available
            else "The log has no metrics of the experts. Train with `trainer.add_callback(ExpertUtilizationCallback("
            "trainer))`."
        )
    mean = lines.pop("", None)
    names = short_names(list(lines)) if lines else {}
    columns = math.ceil((len(lines) + 1) / 22)
    longest = max((len(_shorten(name)) for name in names.values()), default=0)
    figure = _figure(6 + columns * (0.6 + 0.056 * max(longest, 18)), 3.8)
    axes = figure.add_subplot()
    # The light end of the map is too faint for thin lines on white.
    colors = colormaps["viridis"](np.linspace(0, 0.85, max(1, len(lines))))
    patterns = itertools.cycle(["-", "--", "-.", ":"])
    few = max(len(points) for points in [mean or [], *lines.values()]) <= 12
    marker = "o" if few else None
    for (name, points), color, pattern in zip(lines.items(), colors, patterns):
        style = {"color": color, "linestyle": pattern, "linewidth": 1.1, "marker": marker, "markersize": 2.5}
        axes.plot(*zip(*points), label=_shorten(names[name]), **style)
    if mean is not None:
        label = "mean of all blocks"
        axes.plot(*zip(*mean), label=label, color="black", linewidth=2.8, marker=marker, markersize=5, zorder=5)
    axes.set_xlabel("training step", fontsize=LARGE)
    axes.set_ylabel(UNITS.get(metric, metric.replace("_", " ")), fontsize=LARGE, **LITERAL)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.tick_params(labelsize=MEDIUM)
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    # Blocks run from first to last, from top to bottom; so the mean comes first.
    handles, labels = axes.get_legend_handles_labels()
    if mean is not None:
        handles, labels = [handles[-1], *handles[:-1]], [labels[-1], *labels[:-1]]
    legend = figure.legend(
        handles, labels, loc="outside right upper", ncols=columns, fontsize=SMALL, frameon=False, handlelength=3.2
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as a PNG file: the same bytes for the same figure.

    Args:
        figure (Figure): the figure.

    Returns:
        bytes: the file, with 150 pixels per inch.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _matrix(
    values: np.ma.MaskedArray,
    names: Sequence[str],
    *,
    row_label: str,
    unit: str,
    title: str,
    equal: float,
    mark: Optional[float] = None,
) -> Figure:
    """A heat map in % with a column for each expert, with numbers where there is room."""
    num_rows, num_columns = values.shape
    names = [_shorten(name, LONGEST + 12) for name in names]
    # Sizes of a cell in inches: small enough for a page, large enough for numbers.
    width = max(min(max(7 / num_columns, 0.13), 0.75, 8.3 / num_columns), 2.6 / num_columns)
    height = min(max(9 / num_rows, 0.15), 0.34, 14 / num_rows)
    is_low = num_rows * height < 2  # too low for a scale at the side
    margin = 1.1 + 0.068 * max(map(len, names))
    figure = _figure(
        num_columns * width + margin + (0 if is_low else 0.8), num_rows * height + (1.6 if is_low else 0.9)
    )
    axes = figure.add_subplot()
    axes.patch.set(**BLANK)
    norm = _scale(float(values.max() or 0), equal, most=100)
    image = axes.imshow(values, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
    every = max(1, math.ceil(0.13 / height))
    axes.set_yticks(range(0, num_rows, every), names[::every], fontsize=MEDIUM if height >= 0.17 else SMALL, **LITERAL)
    axes.set_xticks(range(0, num_columns, max(1, math.ceil(0.24 / width))))
    axes.tick_params(axis="x", labelsize=MEDIUM)
    axes.tick_params(length=2)
    axes.set_xlabel("expert", fontsize=LARGE)
    axes.set_ylabel(row_label, fontsize=LARGE)
    axes.set_title(title, fontsize=LARGE, loc="left", color=GREY, **LITERAL)
    axes.spines[:].set_visible(False)
    if min(width, height) >= 0.14:  # white gaps between cells that are large enough
        axes.set_xticks(np.arange(num_columns - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(num_rows - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    if width >= 0.24 and height >= 0.145:
        digits = 1 if width >= 0.4 else 0
        size = MEDIUM if height >= 0.2 else SMALL - 0.5
        for (row, column), value in np.ma.ndenumerate(values):
            color = _readable_on(image.cmap(norm(value)))
            text = axes.text(column, row, f"{value:.{digits}f}", fontsize=size, color=color, **CENTRED)
            text.set_in_layout(False)  # it is inside, and there are many
    bar = figure.colorbar(image, ax=axes, pad=0.015, **BELOW if is_low else BESIDE)
    _label_bar(bar, unit, norm, mark)
    return figure


def _plot_patches(reading: ReadingMap, clip: Clip, spectrogram: np.ndarray, title: str) -> Figure:
    bins, frames = spectrogram.shape
    uniform = reading.uniform.numpy()
    shares = reading.shares.flatten(0, 1).numpy()
    maps = np.ma.masked_invalid(np.divide(shares, uniform, out=np.full_like(shares, np.nan), where=uniform > 0))
    names, elsewhere = _slot_names(reading), reading.elsewhere.flatten().tolist()
    columns = next((count for count, most in ((1, 1), (2, 8), (3, 18), (4, 32)) if len(maps) <= most), 5)
    rows = math.ceil(len(maps) / columns)
    height = {1: 1.5, 2: 1.2, 3: 1.05, 4: 0.95, 5: 0.8}[columns]
    # Places are in inches: matplotlib's own layout takes many seconds for tens of panels.
    left, right, gap, heading = 0.62, 8.35, 0.14, 0.24 if columns < 4 else 0.21
    width = (right - left - gap * (columns - 1)) / columns
    total = 2.35 + rows * (height + heading) + 0.42
    figure = Figure(figsize=(9.2, total), facecolor="white")

    def place(x: float, y: float, width: float, height: float) -> Axes:
        return figure.add_axes((x / 9.2, 1 - (y + height) / total, width / 9.2, height / total))

    extent = (0, clip.seconds, -0.5, bins - 0.5)
    second = clip.seconds / frames
    reached = (0, maps.shape[2] * second, -0.5, maps.shape[1] - 0.5)
    figure.text(0.1 / 9.2, 1 - 0.1 / total, _shorten(title, 100), fontsize=LARGE + 1, va="top", **LITERAL)
    top = place(left, 0.58, right - left, 1.4)
    picture = top.imshow(spectrogram, cmap="gray", aspect="auto", origin="lower", extent=extent)
    top.set_title(f"{_shorten(clip.name, 60)}: spectrogram", fontsize=LARGE, loc="left", pad=4, **LITERAL)
    top.set_xlabel("time (s)", fontsize=MEDIUM, labelpad=1)
    _frequency_axis(top, clip.frequencies, bins)
    end = len(clip.samples) / clip.sampling_rate
    if end < 0.995 * clip.seconds:
        top.axvline(end, color="white", linewidth=1.2, linestyle="--")
        top.text(end, bins - 1, " end of the clip", fontsize=SMALL, color="black", va="top")
    bar = figure.colorbar(picture, cax=place(right + 0.12, 0.58, 0.13, 1.4))
    _label_bar(bar, "level (no unit)")
    norm = _scale(float(maps.max()), 1)
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
    _label_bar(bar, READING, norm, 1)
    return figure


def _plot_sequence(reading: ReadingMap, clip: Clip, title: str) -> Figure:
    shares = reading.shares.flatten(0, 1).squeeze(1).numpy()
    # Means of neighbours where there are more than the picture has places; its own smoothing would mix slots.
    num_tokens = shares.shape[1]
    size = math.ceil(num_tokens / 1000)
    starts = np.arange(0, num_tokens, size)
    equal = np.add.reduceat(reading.uniform.numpy(), starts, axis=1)
    sums = np.add.reduceat(shares, starts, axis=1)
    maps = np.ma.masked_invalid(np.divide(sums, equal, out=np.full_like(sums, np.nan), where=equal > 0))
    names = _slot_names(reading)
    height = min(max(9 / len(maps), 0.14), 0.3)
    lower = max(height * len(maps), 1.2)
    figure = _figure(9.2, 2.6 + lower)
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
    top.set_title(f"{_shorten(clip.name, 60)}: waveform", fontsize=LARGE, loc="left", **LITERAL)
    norm = _scale(float(maps.max()), 1)
    extent = (0, clip.seconds * len(starts) * size / num_tokens, len(maps) - 0.5, -0.5)
    image = axes.imshow(maps, norm=norm, cmap="viridis", aspect="auto", extent=extent, interpolation="nearest")
    axes.set_yticks(range(len(maps)), names)
    axes.set_xlabel("time (s)", fontsize=MEDIUM)
    axes.set_xlim(0, clip.seconds)
    for each in (top, axes):
        each.tick_params(labelsize=SMALL, length=2)
    _label_bar(figure.colorbar(image, ax=axes, pad=0.015, **BESIDE), READING.replace(" (", "\n("), norm, 1)
    figure.suptitle(_shorten(title, 100), fontsize=LARGE + 1, x=0.01, ha="left", **LITERAL)
    return figure


def _scale(top: float, equal: float, most: float = math.inf) -> Normalize:
    """From zero to the greatest value, but not so near to the equal one that differences without weight stand out.

    Where the greatest value is far away, the scale is that of a root, with the equal one at a quarter of it.
    """
    top = max(top, min(2 * equal, most))
    gamma = math.log(4) / math.log(max(top / equal, 4))
    return PowerNorm(gamma, 0, top) if gamma < 1 else Normalize(0, top)


def _label_bar(bar: Colorbar, label: str, norm: Optional[Normalize] = None, mark: Optional[float] = None) -> None:
    if isinstance(norm, PowerNorm):
        rounds = [digit * 10.0**power for power in range(4, -3, -1) for digit in (5, 2, 1)]
        ticks = [0.0, float(norm.vmax or 0)]
        for tick in rounds:
            if tick < ticks[1] and min(abs(float(norm(each)) - float(norm(tick))) for each in ticks) >= 0.08:
                ticks.append(tick)
        ticks.remove(float(norm.vmax or 0))
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
    bar.set_label(label, fontsize=MEDIUM)
    bar.ax.tick_params(labelsize=SMALL, length=2)
    bar.outline.set_visible(False)
    if mark is not None:
        for color, width in (("white", 3.5), ("black", 1.5)):
            (bar.ax.axvline if bar.orientation == "horizontal" else bar.ax.axhline)(mark, color=color, linewidth=width)


def _slot_names(reading: ReadingMap) -> list[str]:
    num_experts, num_slots = reading.shares.shape[:2]
    if num_slots == 1:
        return [f"expert {expert}" for expert in range(num_experts)]
    return [f"expert {expert}, slot {slot}" for expert in range(num_experts) for slot in range(num_slots)]


def _frequency_axis(
    axes: Axes, frequencies: Optional[np.ndarray], bins: int, is_small: bool = False, is_labelled: bool = True
) -> None:
    """Ticks at round frequencies, wherever the bins have them."""
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
    """Times, and the least and greatest amplitude there: all that a picture can show of a waveform."""
    size = max(1, math.ceil(len(samples) / places))
    starts = np.arange(0, len(samples), size)
    low, high = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
    return (starts + size / 2) / sampling_rate, low, high


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _readable_on(color: Sequence[float]) -> str:
    """Black or white, whichever has more contrast (WCAG 2.2, relative luminance)."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color[:3]]
    luminance = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def _plain(text: str) -> str:
    """One line without characters that fonts do not have, such as line breaks and halves of surrogate pairs."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _shorten(name: str, longest: int = LONGEST) -> str:
    name = _plain(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"
