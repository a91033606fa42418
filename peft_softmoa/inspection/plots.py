"""Pictures of how the experts are used, over blocks, classes and training.

Letters of all shapes: N experts, C classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .blocks import BlockReport
from .clip_plots import Clip, plot_reading
from .figures import LARGE, LITERAL, MEDIUM, SMALL, Figure, MaxNLocator, colormaps, matrix, new_figure, png, shorten
from .report import ExpertReport, short_names
from .stream_plots import plot_stream

__all__ = ["Clip", "plot_classes", "plot_history", "plot_load", "plot_reading", "plot_stream", "png"]

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


def plot_load(report: ExpertReport) -> Figure:
    """Draw the load of each expert in each block, in %.

    Args:
        report (ExpertReport): the metrics of the blocks. Where blocks have fewer experts than others, cells are blank.

    Returns:
        Figure: a row for each block, in the order in which they run, and a column for each expert.
    """
    sizes = sorted({block.num_experts for block in report.blocks})
    values = np.ma.MaskedArray(np.zeros((len(report.blocks), sizes[-1])), mask=True)
    for row, block in enumerate(report.blocks):
        values[row, : block.num_experts] = 100 * block.load.numpy()
    equal = [100 / size for size in sizes]
    if len(sizes) == 1:
        note = f"equal share: {equal[0]:.3g}%, the line on the scale"
    else:
        shares = [f"{share:.3g}% among {size}" for share, size in zip(equal, sizes)]
        note = f"equal share: {', '.join(shares)} experts"
    names = report.names
    return matrix(
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
        raise ValueError(f"The report has nothing about classes, because {report.no_classes_reason}.")
    loads = 100 * block.class_loads.numpy()
    absent = loads.sum(1) == 0
    values = np.ma.masked_array(loads, np.broadcast_to(absent[:, None], loads.shape))
    names = [
        f"{shorten(name)} (no clips)" if is_absent else shorten(name)
        for name, is_absent in zip(report.label_names, absent)
    ]
    return matrix(
        values,
        names,
        row_label="class",
        unit="load within the class (% of its combine weights)",
        title=report.names[block.block, block.adapter],
        equal=100 / block.num_experts,
    )


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
    longest = max((len(shorten(name)) for name in names.values()), default=0)
    figure = new_figure(6 + columns * (0.6 + 0.056 * max(longest, 18)), 3.8)
    axes = figure.add_subplot()
    # The light end of the map is too faint for thin lines on white.
    colors = colormaps["viridis"](np.linspace(0, 0.85, max(1, len(lines))))
    patterns = itertools.cycle(["-", "--", "-.", ":"])
    few = max(len(points) for points in [mean or [], *lines.values()]) <= 12
    marker = "o" if few else None
    for (name, points), color, pattern in zip(lines.items(), colors, patterns):
        style = {"color": color, "linestyle": pattern, "linewidth": 1.1, "marker": marker, "markersize": 2.5}
        axes.plot(*zip(*points), label=shorten(names[name]), **style)
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
