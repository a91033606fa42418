"""Tables and pictures of a run's results.

    python -m examples.benchmark.report examples/benchmark/results/amd-epyc-2-threads.json --page docs/costs.md

Writes the tables beside the file, as Markdown, draws the pictures into a folder of its name, and puts the main tables
into a page.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import ratio
from .methods import FLOOR, MODELS, PROBE

# The swept value of each point, by the beginning of the sweep's name.
AXES = {"experts": "num_experts", "slots": "num_slots", "tokens": "num_tokens", "batch": "batch_size"}
BEGIN, END = "<!-- benchmark: written by python -m examples.benchmark.report -->\n", "<!-- end of benchmark -->\n"
# Colours that colour-blind readers can tell apart (Okabe and Ito), and a marker for each.
STYLES = {
    "Soft-MoA": ("#0072B2", "o", "-"),
    "Soft-MoA, plain": ("#009E73", "D", ":"),
    "Soft-MoA, literal": ("#56B4E9", "s", "--"),
    "Dense-MoA": ("#D55E00", "^", "-"),
    "Dense-MoA, literal": ("#E69F00", "v", "--"),
}


def times(seconds: Sequence[float]) -> str:
    """Median, and least and greatest in brackets, in milliseconds with three digits at least."""
    milliseconds = [1000 * number for number in (statistics.median(seconds), min(seconds), max(seconds))]
    digits = max(0, 2 - math.floor(math.log10(milliseconds[0])))
    middle, least, greatest = (f"{number:,.{digits}f}" for number in milliseconds)
    return f"{middle} ({least}–{greatest})"


def model_table(part: dict[str, Any]) -> str:
    """One model in one setting: a row for each method.

    Args:
        part (dict): what `run.measure_models` gives.

    Returns:
        str: a Markdown table.
    """
    rows = {row["method"]: row for row in part["rows"]}
    sizes = [key for key in rows[PROBE] if key.startswith("forward_")]
    heading = ["method", "trained", f"step of {part['batch_size']}, ms", "of floor", "of LoRA"]
    for key in sizes:
        heading += [f"forward of {key.split('_')[1]}, ms", "of frozen"]
    has_memory = "memory_bytes" in rows[FLOOR]
    if has_memory:
        heading += ["memory, MiB", "of floor", "GFLOP a sample"]
    table = [heading]
    for method, row in rows.items():
        cells = [method, "0" if method == FLOOR else f"{row['trainable_parameters']:,}", times(row["step_seconds"])]
        for reference in (FLOOR, "LoRA"):
            cells.append(f"{ratio(row['step_seconds'], rows[reference]['step_seconds']):.2f}")
        for key in sizes:
            cells += [times(row[key]), f"{ratio(row[key], rows[PROBE][key]):.2f}"]
        if has_memory:
            memory = row["memory_bytes"]
            cells += [f"{memory / 2**20:,.0f}", f"{memory / rows[FLOOR]['memory_bytes']:.2f}"]
            cells.append(f"{row['flops'] / 1e9:.1f}")
        table.append(cells)
    return markdown(table)


def deployment_table(rows: list[dict[str, Any]]) -> str:
    """Forward passes in several runtimes: a row for each.

    Args:
        rows (list[dict]): what `run.measure_deployment` gives.

    Returns:
        str: a Markdown table.
    """
    sizes = [key for key in rows[0] if key.startswith("forward_")]
    by_runtime: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_runtime.setdefault(row["runtime"], {})[row["method"]] = row
    table = [["runtime"]]
    for key in sizes:
        size = key.split("_")[1]
        table[0] += [f"frozen, {size}, ms", f"Soft-MoA, {size}, ms", "of frozen", "of PyTorch"]
    for runtime, methods in by_runtime.items():
        frozen, soft, plain = methods[PROBE], methods["Soft-MoA"], by_runtime["PyTorch"]["Soft-MoA"]
        cells = [runtime]
        for key in sizes:
            cells += [times(frozen[key]), times(soft[key])]
            cells += [f"{ratio(soft[key], frozen[key]):.2f}", f"{ratio(soft[key], plain[key]):.2f}"]
        table.append(cells)
    return markdown(table)


def mixed_table(rows: list[dict[str, Any]]) -> str:
    """A mixed batch beside the ways without it: a row for each model.

    Args:
        rows (list[dict]): what `run.measure_mixed_batches` gives.

    Returns:
        str: a Markdown table.
    """
    table = [["model", *(f"{way}, ms" for way in rows[0]["seconds"])]]
    others = [way for way in rows[0]["seconds"] if way != "mixed batch"]
    table[0] += [f"mixed, of {way}" for way in others] + ["greatest difference of logits"]
    for row in rows:
        mixed = row["seconds"]["mixed batch"]
        cells = [row["model"], *map(times, row["seconds"].values())]
        cells += [f"{ratio(mixed, row['seconds'][way]):.2f}" for way in others]
        table.append([*cells, f"{max(row['difference'].values()):.1e}"])
    return markdown(table)


def input_table(rows: list[dict[str, Any]]) -> str:
    """Samples in a second that the input pipeline gives, and that a training step takes.

    Args:
        rows (list[dict]): what `run.measure_input` gives.

    Returns:
        str: a Markdown table.
    """
    table = [["", "ms", "samples in a second"]]
    for row in rows:
        rate = row["samples"] / statistics.median(row["seconds"])
        table.append([f"{row['what']}, {row['samples']} samples", times(row["seconds"]), f"{rate:,.1f}"])
    return markdown(table)


def recording_table(rows: list[dict[str, Any]]) -> str:
    """What it costs to log how experts are used.

    Args:
        rows (list[dict]): what `run.measure_recording` gives.

    Returns:
        str: a Markdown table.
    """
    table = [["method", "training step, ms", "recorded, ms", "of a plain one", "every 100th step, of all steps"]]
    for row in rows:
        multiple = ratio(row["recorded"], row["plain"])
        cells = [times(row["plain"]), times(row["recorded"]), f"{multiple:.2f}", f"{(multiple - 1) / 100:+.2%}"]
        table.append([row["method"], *cells])
    return markdown(table)


def lengths_table(rows: list[dict[str, Any]]) -> str:
    """Training steps on short clips beside the full length: a row for each model and length.

    Args:
        rows (list[dict]): what `run.measure_lengths` gives.

    Returns:
        str: a Markdown table.
    """
    table = [["model", "clips, s", "step, ms", "full length takes, times"]]
    for row in rows:
        *_, full = row["seconds"].values()
        for length, seconds in row["seconds"].items():
            table.append([row["model"], length, times(seconds), f"{ratio(full, seconds):.2f}"])
    return markdown(table)


def layer_table(name: str, rows: list[dict[str, Any]], dtype: str) -> str:
    """One sweep of the layer alone: a row for each point.

    Args:
        name (str): of the sweep.
        rows (list[dict]): what `run.measure_layer` gives, for all points.
        dtype (str): which of them to show.

    Returns:
        str: a Markdown table.
    """
    axis = next(key for beginning, key in AXES.items() if name.startswith(beginning))
    rows = [row for row in rows if row["dtype"] == dtype]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = [[name.partition(" at ")[0], *(["R"] if len({row["r"] for row in rows}) > 1 else [])]]
    first = next(row for row in rows if row["method"] == "Soft-MoA")
    table[0] += [f"{method}, ms" for method in methods]
    table[0] += [f"Soft-MoA, of that at {first[axis]:,}", "literal, of Soft-MoA", "memory of Soft-MoA, MiB"]
    for value in dict.fromkeys(row[axis] for row in rows):
        here = {row["method"]: row for row in rows if row[axis] == value}
        soft, literal = here["Soft-MoA"], here["Soft-MoA, literal"]
        cells = [f"{value:,}", *([str(soft["r"])] if "R" in table[0] else [])]
        cells += [times(here[method]["seconds"]) if method in here else "—" for method in methods]
        cells += [
            f"{ratio(soft['seconds'], first['seconds']):.2f}",
            f"{ratio(literal['seconds'], soft['seconds']):.2f}",
        ]
        table.append([*cells, f"{soft['memory_bytes'] / 2**20:,.1f}"])
    return markdown(table)


def order_table(rows: list[dict[str, Any]]) -> str:
    """Mixtures with and without order in time: a row for each size and length.

    Args:
        rows (list[dict]): what `streaming.measure_order` gives.

    Returns:
        str: a Markdown table.
    """
    by_point: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        point = tuple(row[name] for name in ("num_experts", "r", "batch_size", "num_tokens"))
        by_point.setdefault(point, {})[row["method"]] = row
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = [["N", "R", "clips", "tokens", *(f"{method}, ms" for method in methods)]]
    table[0] += [f"{what} of causal, of {other}" for what in ("time", "memory") for other in methods[:2]]
    for point, here in by_point.items():
        causal = here["causal Soft-MoA"]
        cells = [f"{number:,}" for number in point] + [times(here[method]["seconds"]) for method in methods]
        cells += [f"{ratio(causal['seconds'], here[other]['seconds']):.2f}" for other in methods[:2]]
        cells += [f"{causal['memory_bytes'] / here[other]['memory_bytes']:.2f}" for other in methods[:2]]
        table.append(cells)
    return markdown(table)


def stream_table(rows: list[dict[str, Any]]) -> str:
    """One token of a stream: a row for each mixture.

    Args:
        rows (list[dict]): what `streaming.measure_stream` gives.

    Returns:
        str: a Markdown table.
    """
    positions = list(rows[0]["seconds"])
    table = [["method", "N", "R", "numbers in the state", *(f"after {int(each):,}, ms" for each in positions)]]
    table[0].append("last, of first")
    for row in rows:
        cells = [row["method"], str(row["num_experts"]), str(row["r"]), f"{row['state_numbers']:,}"]
        cells += [times(row["seconds"][position]) for position in positions]
        table.append([*cells, f"{ratio(row['seconds'][positions[-1]], row['seconds'][positions[0]]):.2f}"])
    return markdown(table)


def audio_table(rows: list[dict[str, Any]]) -> str:
    """Clips that one core reads in a second: a row for each format.

    Args:
        rows (list[dict]): what `audio.measure_formats` gives.

    Returns:
        str: a Markdown table.
    """
    ours, plain = rows[0]["processor_seconds"]
    table = [["clips", "format", f"{ours}, clips a second and core", plain, "of that"]]
    for row in rows:
        seconds = row["processor_seconds"]
        table.append(
            [
                row["kind"],
                row["format"],
                *(rates(row["clips"], seconds[way]) for way in (ours, plain)),
                f"{1 / ratio(seconds[ours], seconds[plain]):.2f}",
            ]
        )
    return markdown(table)


def epochs_table(rows: list[dict[str, Any]]) -> str:
    """Epochs with and without streaming: a row for each feature extractor and way.

    Args:
        rows (list[dict]): what `audio.measure_epochs` gives.

    Returns:
        str: a Markdown table.
    """
    table = [["extractor", "clips", "epoch", "clips a second", "clips a second and core", "of streamed", "MB on disk"]]
    for row in rows:
        processor = row["processor_seconds"]
        for what in processor:
            table.append(
                [
                    row["extractor"],
                    f"{row['clips']:,}",
                    what,
                    rates(row["clips"], row["seconds"][what]),
                    rates(row["clips"], processor[what]),
                    f"{1 / ratio(processor[what], processor['streamed']):.2f}",
                    "0" if what == "streamed" else f"{row['cache_bytes'] / 1e6:,.0f}",
                ]
            )
    return markdown(table)


def rates(count: int, seconds: Sequence[float]) -> str:
    """How many in a second: median, and least and greatest in brackets."""
    middle, least, greatest = (count / number for number in (statistics.median(seconds), max(seconds), min(seconds)))
    digits = 0 if middle >= 100 else 1
    return f"{middle:,.{digits}f} ({least:,.{digits}f}–{greatest:,.{digits}f})"


def markdown(table: list[list[str]]) -> str:
    """Rows of cells as a Markdown table; the first row is the heading."""
    rows = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def machine(results: dict[str, Any]) -> str:
    """On what a run was made, in a line."""
    given = results["environment"]
    versions = ", ".join(f"{name} {given[name]}" for name in ("torch", "transformers", "peft"))
    threads = f"{given['threads']} thread{'' if given['threads'] == 1 else 's'}"
    return f"{given['device']}, {threads} on {given['cores']} cores, {versions}"


def tables(results: dict[str, Any]) -> str:
    """All tables of a run.

    Args:
        results (dict): what a run writes.

    Returns:
        str: Markdown.
    """
    parts = [machine(results)]
    for part in results["models"]:
        mode = "compiled" if part["compiled"] else "eager"
        parts += [f"{part['model']}, {part['layers']} layers, {part['dtype']}, {mode}:", model_table(part)]
    for name, rows in results["layer"].items():
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            parts += [f"One layer, {dtype}, {name}:", layer_table(name, rows, dtype)]
    if "deployment" in results:
        parts += [f"Forward passes of {next(iter(MODELS))}, float32:", deployment_table(results["deployment"])]
    if "mixed_batches" in results:
        parts += ["16 samples with three adapters and the base model, float32:", mixed_table(results["mixed_batches"])]
    if "input" in results:
        parts += [f"Clips of 5 s from files, for {next(iter(MODELS))}:", input_table(results["input"])]
    if "audio" in results:
        parts += ["Waveforms at 16 kHz from files at 44.1 kHz:", audio_table(results["audio"])]
    if "epochs" in results:
        parts += ["Features from files, with and without streaming:", epochs_table(results["epochs"])]
    if "recording" in results:
        parts += [f"Recording of {next(iter(MODELS))}, float32:", recording_table(results["recording"])]
    if "lengths" in results:
        title = f"Training steps of {results['lengths_batch_size']} with `max_length_seconds`, float32:"
        parts += [title, lengths_table(results["lengths"])]
    if "order" in results:
        parts += [
            "One layer alone, forward and backward, float32, with and without order in time:",
            order_table(results["order"]),
        ]
    if "stream" in results:
        parts += ["One token of a stream, by the tokens before it, float32:", stream_table(results["stream"])]
    if "import_seconds" in results:
        parts.append(f"`import peft_softmoa` after `import peft`: {times(results['import_seconds'])} ms")
    return "\n\n".join(parts) + "\n"


def for_page(results: dict[str, Any]) -> str:
    """The main tables of a run.

    Args:
        results (dict): what a run writes.

    Returns:
        str: Markdown.
    """
    part = results["models"][0]
    name, rows = next(iter(results["layer"].items()))
    rounds, layer_rounds = len(part["rows"][0]["step_seconds"]), len(rows[0]["seconds"])
    return "\n\n".join(
        [
            f"{machine(results)}, float32, eager.",
            f"{part['model']}, {part['layers']} layers, {rounds} rounds:",
            model_table(part),
            f"One layer alone on tokens (8, 590, 768), forward and backward, {name}, {layer_rounds} rounds:",
            layer_table(name, rows, "float32"),
            "",
        ]
    )


def write_into(page: Path, results: dict[str, Any]) -> None:
    """Put the main tables of a run into a file.

    Args:
        page (Path): the file, with a place for them.
        results (dict): what a run writes.

    Raises:
        ValueError: if the file has no place for them.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no place for the tables: it needs the lines {BEGIN!r} and {END!r}.")
    page.write_text(before + BEGIN + for_page(results) + END + after)


def draw_sweeps(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the sweeps of the layer in float32: time above, memory below.

    Args:
        results (dict): what a run writes.
        folder (Path): where to; it is made.

    Returns:
        list[Path]: one PNG for each sweep.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in results["layer"].items():
        axis = next(key for beginning, key in AXES.items() if name.startswith(beginning))
        rows = [row for row in rows if row["dtype"] == "float32"]
        figure = Figure(figsize=(6, 6.5), layout="constrained")
        time, memory = figure.subplots(2, 1, sharex=True)
        for method, (color, marker, line) in STYLES.items():
            points = [row for row in rows if row["method"] == method]
            if not points:
                continue
            values = [row[axis] for row in points]
            milliseconds = [[1000 * second for second in row["seconds"]] for row in points]
            medians = [statistics.median(each) for each in milliseconds]
            spread = [
                [middle - min(each) for middle, each in zip(medians, milliseconds, strict=True)],
                [max(each) - middle for middle, each in zip(medians, milliseconds, strict=True)],
            ]
            style = {"color": color, "marker": marker, "linestyle": line, "label": method}
            time.errorbar(values, medians, yerr=spread, capsize=2, **style)
            memory.plot(values, [row["memory_bytes"] / 2**20 for row in points], **style)
        for axes, label in ((time, "forward and backward, ms"), (memory, "memory, MiB")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
        memory.set_xticks(ticks := sorted({row[axis] for row in rows}), [f"{tick:,}" for tick in ticks])
        memory.minorticks_off()
        memory.set_xlabel(name)
        time.set_title(machine(results), fontsize=8)
        time.legend()
        paths.append(folder / f"{name.replace(',', '').replace('=', '-').replace(' ', '-')}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, help="a file with a place for the main tables")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    arguments.results.with_suffix(".md").write_text(tables(results))
    draw_sweeps(results, arguments.results.with_suffix(""))
    if arguments.page:
        write_into(arguments.page, results)


if __name__ == "__main__":
    main()
