"""The pictures of RESULTS.md, in colours that colour-blind readers can tell apart, with markers for print."""

from __future__ import annotations

import statistics
from pathlib import Path
from textwrap import fill
from typing import Any

from .ablations import EXPERTS
from .comparison import Comparison, ablations, estimate, paired
from .records import Record
from .training import METHODS, SINGLE, SOFT

# Of Okabe and Ito.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
MARKERS = "osD^v<>PX*"
HIGHLIGHT = {SOFT: COLORS[5], SINGLE: COLORS[4]}
# A style for each method: colours repeat, with other lines and markers.
STYLES = {
    method: {
        "color": HIGHLIGHT.get(method, [COLORS[each] for each in (0, 1, 2, 3, 6)][index % 5]),
        "marker": MARKERS[index],
        "linestyle": "-" if method in HIGHLIGHT or index < 5 else "--",
    }
    for index, method in enumerate(METHODS)
}


def draw(found: list[Record], folder: Path) -> list[str]:
    """Draw what there are runs for.

    Args:
        found (list[Record]): the records of one comparison.
        folder (Path): where to.

    Returns:
        list[str]: names of the PNGs.
    """
    here = Comparison(found)
    figures: dict[str, Any] = {}
    if here.methods:
        figures["accuracy.png"] = draw_accuracy(here)
        figures["epochs.png"] = draw_epochs(here)
        figures["step-time.png"] = draw_step_time(here)
    if ablations(here):
        figures["ablations.png"] = draw_ablations(here)
    for name, figure in figures.items():
        # Neither date nor version, so that the same numbers give the same file.
        figure.savefig(folder / name, dpi=150, metadata={"Software": None})
    return list(figures)


def draw_accuracy(here: Comparison) -> Any:
    """Accuracy of each method with its interval, and of each fold."""
    figure, axes = _figure(6.5, 4.2)
    for row, (method, runs) in enumerate(here.methods.items()):
        mean, half = estimate(runs)
        style = STYLES[method] | {"linestyle": "none"}
        axes.errorbar(mean, row, xerr=half, capsize=4, markersize=7, **style)
        for fold in here.folds:
            part = {key: record for key, record in runs.items() if key[0] == fold}
            if part:
                axes.plot(estimate(part).mean, row + 0.25, "|", color="0.45", markersize=6)
    axes.set_yticks(range(len(here.methods)), list(here.methods))
    axes.set_ylim(len(here.methods) - 0.4, -0.6)
    axes.set_xlim(right=min(100, axes.get_xlim()[1]))  # intervals know no limits, accuracy does
    axes.set_xlabel("accuracy, % (mean with 95% interval; strokes: folds)")
    return figure


def draw_epochs(here: Comparison) -> Any:
    """Accuracy on the validation folds after each epoch."""
    figure, axes = _figure(7.5, 4.6)
    epochs = range(1, here.protocol["epochs"] + 1)
    for method, runs in here.methods.items():
        accuracies = [
            estimate(runs, lambda record, epoch=epoch: 100 * record["epochs"]["validation_accuracy"][epoch - 1]).mean
            for epoch in epochs
        ]
        width = 2.4 if method in HIGHLIGHT else 1.2
        axes.plot(epochs, accuracies, label=method, linewidth=width, markersize=5, **STYLES[method])
    axes.set_xticks(list(epochs))
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy on the validation fold, % (mean)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def draw_step_time(here: Comparison) -> Any:
    """Accuracy and the time of a training step."""
    figure, axes = _figure(7.5, 4.6)
    for method, runs in here.methods.items():
        mean = estimate(runs).mean
        milliseconds = 1000 * statistics.median(record["step_seconds"] for record in runs.values())
        style = STYLES[method] | {"linestyle": "none"}
        axes.plot(milliseconds, mean, markersize=9, label=method, **style)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"training step of {here.protocol['batch_size']} clips on one thread, ms (median of the runs)")
    axes.set_ylabel("accuracy, % (mean)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def draw_ablations(here: Comparison) -> Any:
    """The difference that each value makes of what was varied."""
    from matplotlib.figure import Figure

    shown = ablations(here)
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(8, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, sharey=True, squeeze=False).flat
    for (axis, values), axes in zip(shown, panels):
        is_number = all(label.isdigit() for label in values)
        places = [int(label) for label in values] if is_number else list(range(len(values)))
        for place, runs in zip(places, values.values()):
            difference = paired(runs, values[axis.reference])
            if difference is not None:
                mean, half = difference
                axes.errorbar(place, mean, yerr=half, capsize=4, color=COLORS[5], marker="o")
        axes.axhline(0, color="0.45", linewidth=1, zorder=0)
        if axis is EXPERTS:
            axes.set_xscale("log", base=2)
            axes.minorticks_off()
        if not is_number:
            axes.set_xlim(-0.6, len(values) - 0.4)
        axes.set_xticks(places, [fill(label, 11) for label in values])
        axes.set_xlabel(axis.title)
        axes.grid(alpha=0.3)
    for axes in list(panels)[len(shown) :]:
        axes.set_visible(False)
    figure.supylabel("accuracy minus that of the reference, which is at 0, points (mean, 95% interval)", fontsize=10)
    return figure


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes
