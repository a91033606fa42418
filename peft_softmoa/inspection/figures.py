"""Parts that all pictures share; only the modules of pictures load matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

try:
    import PIL.Image
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("Plots need matplotlib: pip install 'peft-softmoa[plot]'") from error

# With what the other modules of pictures need of matplotlib, so that one place says what to install.
__all__ = [
    "BESIDE",
    "BLANK",
    "CENTRED",
    "GREY",
    "LARGE",
    "LITERAL",
    "MEDIUM",
    "PIL",
    "SMALL",
    "Axes",
    "Figure",
    "MaxNLocator",
    "colormaps",
    "label_bar",
    "matrix",
    "new_figure",
    "png",
    "scale",
    "shorten",
    "slot_names",
]

# Pixels per inch of the PNG files.
DPI = 150
# Where there is nothing to show, which is not the same as zero.
BLANK: dict[str, Any] = {"facecolor": "0.94", "edgecolor": "0.78", "hatch": "////", "linewidth": 0}
# Names of classes and files are no formulas, even with dollar signs in them.
LITERAL: dict[str, Any] = {"parse_math": False}
CENTRED: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
BESIDE: dict[str, Any] = {"location": "right", "aspect": 25}
BELOW: dict[str, Any] = {"location": "bottom", "aspect": 40}
GREY = "0.35"
# Text, in points.
LARGE, MEDIUM, SMALL = 9, 8, 7
# Longest name in a picture, in characters.
MAX_CHARACTERS = 28


def png(figure: Figure) -> bytes:
    """Write a figure as a PNG file, with the same bytes for the same figure.

    Args:
        figure (Figure): the figure.

    Returns:
        bytes: the file, with 150 pixels per inch.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def matrix(
    values: np.ma.MaskedArray,
    names: Sequence[str],
    *,
    row_label: str,
    unit: str,
    title: str,
    equal: float,
    mark: Optional[float] = None,
) -> Figure:
    """Draw a heat map in % with a column for each expert, and with numbers where there is room.

    Args:
        values (MaskedArray): `(rows, N)`; masked cells are blank.
        names (Sequence[str]): names of the rows.
        row_label (str): label of the rows.
        unit (str): label of the colours.
        title (str): title of the picture.
        equal (float): value of a cell if all experts have the same share.
        mark (float, optional): value that the scale marks with a line. Default: none.

    Returns:
        Figure: the picture.
    """
    num_rows, num_columns = values.shape
    names = [shorten(name, MAX_CHARACTERS + 12) for name in names]
    # Sizes of a cell in inches: small enough for a page, large enough for numbers.
    width = max(min(max(7 / num_columns, 0.13), 0.75, 8.3 / num_columns), 2.6 / num_columns)
    height = min(max(9 / num_rows, 0.15), 0.34, 14 / num_rows)
    is_low = num_rows * height < 2  # too low for a scale at the side
    margin = 1.1 + 0.068 * max(map(len, names))
    figure = new_figure(
        num_columns * width + margin + (0 if is_low else 0.8), num_rows * height + (1.6 if is_low else 0.9)
    )
    axes = figure.add_subplot()
    axes.patch.set(**BLANK)
    norm = scale(float(values.max() or 0), equal, most=100)
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
        for row, column in np.argwhere(~np.ma.getmaskarray(values)):
            value = values[row, column]
            color = _readable_on(image.cmap(norm(value)))
            text = axes.text(column, row, f"{value:.{digits}f}", fontsize=size, color=color, **CENTRED)
            text.set_in_layout(False)  # it is inside, and there are many
    bar = figure.colorbar(image, ax=axes, pad=0.015, **BELOW if is_low else BESIDE)
    label_bar(bar, unit, norm, mark)
    return figure


def scale(top: float, equal: float, most: float = math.inf) -> Normalize:
    """Make a scale of colours from zero to the greatest value.

    It never ends near the equal value, so that small differences do not stand out. If the greatest value is far above
    the equal value, the scale is a power law with the equal value at a quarter.

    Args:
        top (float): greatest value.
        equal (float): value of equal shares.
        most (float): greatest possible value. Default: there is none.

    Returns:
        Normalize: from values to 0, …, 1.
    """
    top = max(top, min(2 * equal, most))
    gamma = math.log(4) / math.log(max(top / equal, 4))
    return PowerNorm(gamma, 0, top) if gamma < 1 else Normalize(0, top)


def label_bar(bar: Colorbar, label: str, norm: Optional[Normalize] = None, mark: Optional[float] = None) -> None:
    """Label the bar that explains the colours.

    Args:
        bar (Colorbar): the bar.
        label (str): the label.
        norm (Normalize, optional): the scale; a power law gets round ticks. Default: matplotlib chooses the ticks.
        mark (float, optional): value that a line marks. Default: none.
    """
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


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure.

    Args:
        width (float): width in inches.
        height (float): height in inches.

    Returns:
        Figure: the figure.
    """
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def slot_names(num_experts: int, num_slots: int) -> list[str]:
    """Name the slots of a mixture.

    Args:
        num_experts (int): N.
        num_slots (int): P, per expert.

    Returns:
        list[str]: S names.
    """
    if num_slots == 1:
        return [f"expert {expert}" for expert in range(num_experts)]
    return [f"expert {expert}, slot {slot}" for expert in range(num_experts) for slot in range(num_slots)]


def _readable_on(color: Sequence[float]) -> str:
    """Black or white, whichever has more contrast (WCAG 2.2, relative luminance)."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color[:3]]
    luminance = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def _plain(text: str) -> str:
    """One line of printable characters, without line breaks and lone surrogates."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def shorten(name: str, longest: int = MAX_CHARACTERS) -> str:
    """Shorten a name to one printable line.

    Args:
        name (str): the name.
        longest (int): greatest number of characters. Default: 28.

    Returns:
        str: the name; an ellipsis replaces its end if it is longer.
    """
    name = _plain(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"
