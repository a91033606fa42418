"""The picture of a study, in colours that colour-blind readers can tell apart, with markers for print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, Optional

from .intervals import Estimate

# Of Okabe and Ito.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000")
MARKERS = "osD^v<>PX*"
LINES = ("-", "--", ":")
# What is drawn over the steps, from an entry of a trace and the number of experts, as means of all blocks.
USE: dict[str, Callable[[dict[str, Any], int], float]] = {
    "largest load, of an equal share": lambda entry, experts: experts * fmean(entry["largest_load"]),
    "tokens that a slot reads, % of all": lambda entry, _: 100 * fmean(entry["tokens_read"]) / fmean(entry["tokens"]),
}


def draw(numbers: list[tuple[Any, Estimate]], axis: Optional[str], metric: str, traces: list[Any], path: Path) -> None:
    """Draw the metric of each row with its interval and, if it was traced, the use of experts over the steps.

    Args:
        numbers (list of pairs): rows and what they have.
        axis (str, optional): the option that goes along; a line is drawn for all rows that have the others in common.
        metric (str): its name.
        traces (list): from `pages.traces_of`; those with one step are not drawn.
        path (Path): of the PNG.
    """
    from matplotlib.figure import Figure

    traces = [row for row in traces if all(len(each["routing"]) > 1 for each in row.runs.values())]
    panels = 1 + (len(USE) if traces else 0)
    height = 4.5 if axis else max(3.5, 0.4 * len(numbers) + 1)
    figure = Figure(figsize=(6.5 + 4.5 * (panels - 1), height), layout="constrained")
    first, *others = figure.subplots(1, panels, squeeze=False)[0]
    label = f"{'word error rate' if metric == 'wer' else metric}, % (mean with 95% interval)"
    if axis is None:
        for index, (row, (mean, half)) in enumerate(numbers):
            first.errorbar(mean, index, xerr=half, capsize=4, color=COLORS[0], marker="o")
            for fold in {fold for fold, _ in row.runs}:
                part = fmean(100 * record["test"] for (each, _), record in row.runs.items() if each == fold)
                first.plot(part, index + 0.25, "|", color="0.45", markersize=6)
        first.set_yticks(range(len(numbers)), [row.label for row, _ in numbers])
        first.set_ylim(len(numbers) - 0.4, -0.6)
        first.set_xlabel(label)
    else:
        lines: dict[str, list[tuple[float, Estimate]]] = {}
        for row, number in numbers:
            rest = {name: value for name, value in row.options.items() if name != axis}
            lines.setdefault(row._replace(options=rest).label, []).append((row.options.get(axis, 0), number))
        for index, (name, points) in enumerate(lines.items()):
            style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
            # Beside each other, where they would lie on each other.
            places = [place * (1 + 0.02 * index) for place, _ in points]
            halves = [number.half or 0 for _, number in points]
            first.errorbar(places, [each.mean for _, each in points], yerr=halves, capsize=3, label=name, **style)
        ticks = sorted({place for points in lines.values() for place, _ in points})
        if min(ticks) > 0:
            first.set_xscale("log", base=2)
            first.minorticks_off()
        first.set_xticks(ticks, [f"{each:g}" for each in ticks])
        first.set_xlabel(axis.replace("_", " "))
        first.set_ylabel(label)
        first.legend(fontsize=8)
    first.grid(alpha=0.3)
    if traces:
        _draw_traces(traces, others)
    # Neither date nor version, so that the same numbers give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _draw_traces(traces: list[Any], panels: list[Any]) -> None:
    """Draw what the experts do over the steps: a colour for each method, a kind of line for each learning rate."""
    names = list(dict.fromkeys(without_rate(row) for row in traces))
    rates = sorted({row.options["rate"] for row in traces})
    for panel, (label, use) in zip(panels, USE.items(), strict=True):
        for row in traces:
            index, kind = names.index(without_rate(row)), LINES[rates.index(row.options["rate"]) % len(LINES)]
            style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
            experts = row.options.get("num_experts", 7)
            # For each step, the entries of all runs.
            entries = list(zip(*(record["routing"] for record in row.runs.values()), strict=True))
            values = [fmean(use(entry, experts) for entry in each) for each in entries]
            panel.plot([each[0]["step"] for each in entries], values, kind, label=row.label, linewidth=1, **style)
        panel.set_xscale("symlog", linthresh=5)
        panel.set_xlabel("step")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


def without_rate(row: Any) -> str:
    """The label of a row, whatever its learning rate."""
    return row._replace(options={name: value for name, value in row.options.items() if name != "rate"}).label
