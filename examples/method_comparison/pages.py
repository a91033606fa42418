"""RESULTS.md of a study: what somebody has written in notes.md, tables of the records, and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ..benchmark.report import machine, markdown, times
from .intervals import Estimate, by_fold, interval, paired, smallest_difference
from .pictures import draw
from .records import Record, chosen_rate, of
from .studies import Options, Study, label
from .timing import TIMES, timing_table
from .training import Run

NOTES, PAGE, PICTURE = "notes.md", "RESULTS.md", "results.png"
# arXiv 2312.03694v4, Table 1: AST, Pfeiffer adapters; accuracy in %, of ESC-50 and Speech Commands v2.
PUBLISHED = [
    ["method", "parameters", "ESC-50", "Speech Commands v2"],
    ["full fine-tuning", "85M", "87.48", "97.31"],
    ["linear probe", "9–40K", "75.85", "41.78"],
    ["BitFit", "102K", "86.05", "85.51"],
    ["LoRA", "221K", "86.45", "93.61"],
    ["bottleneck adapter", "249K", "88.38", "91.33"],
    ["Conformer adapter", "271K", "88.30", "96.28"],
]
Key = tuple[str, int]


class Row(NamedTuple):
    """A method with its options, and its runs with the rates chosen, by fold and seed."""

    method: str
    options: Options
    runs: dict[Key, Record]

    @property
    def label(self) -> str:
        """Its name with its options."""
        return label(self.method, self.options)

    def values(self, value: Callable[[Record], float]) -> dict[Key, float]:
        """A number of each run."""
        return {key: value(record) for key, record in self.runs.items()}


def rows_of(found: list[Record], study: Study) -> list[Row]:
    """The rows of the tables: those of the study in its order, then others.

    Args:
        found (list[Record]): the records of one study.
        study (Study): what is compared.

    Returns:
        list[Row]: those with any run whose rate has been chosen.
    """
    protocol, rows = found[0]["settings"], []
    variants = [*study.variants, *((each["settings"]["method"], each["settings"]["options"]) for each in found)]
    for index, (method, options) in enumerate(variants):
        if (method, options) in variants[:index]:
            continue
        runs = {}
        for record in found:
            given = record["settings"]
            if given["method"] == method and given["options"] == options:
                run = Run(method, given["fold"], None, given["seed"], tuple(options.items()))
                if given["rate"] == chosen_rate(found, protocol, run):
                    runs[given["fold"], given["seed"]] = record
        if runs:
            rows.append(Row(method, options, dict(sorted(runs.items()))))
    return rows


def traces_of(found: list[Record], rows: list[Row]) -> list[Row]:
    """The rows whose use of experts was traced and, after each, its runs with rates that were not chosen.

    Args:
        found (list[Record]): the records of one study.
        rows (list[Row]): from `rows_of`.

    Returns:
        list[Row]: rows whose options have the rate, if there are several.
    """
    traced = []
    for row in rows:
        rates: dict[float, dict[Key, Record]] = {}
        for record in of(found, row.method, row.options):
            if record.get("routing"):
                given = record["settings"]
                rates.setdefault(given["rate"], {})[given["fold"], given["seed"]] = record
        for rate, runs in sorted(rates.items()):
            traced.append(row._replace(options=row.options | {"rate": rate}, runs=runs))
    return traced


def reference_of(row: Row, rows: list[Row], study: Study) -> Optional[Row]:
    """The row that a row is compared with: the reference of the study, at the same point of its axis."""
    method, options = study.variants[study.reference]
    wanted = options if study.axis is None else {**options, **{study.axis: row.options.get(study.axis)}}
    # Where options of the command have changed the variants, with the same ones.
    return next((each for given in (wanted, row.options) for each in rows if each[:2] == (method, given)), None)


def percent(record: Record) -> float:
    """The metric on the tested fold after the last epoch, in percent."""
    return 100 * record["test"]


def overlap_of(protocol: dict[str, Any]) -> float:
    """How many folds are tested for each that is trained on: one, and all but two."""
    return 1 / (len(protocol["folds"]) - 2)


def group_percent(record: Record) -> float:
    """How often the group of the label is right, in percent."""
    return 100 * record["test_group"]


def difference(row: Row, reference: Row, value: Callable[[Record], float] = percent) -> list[float]:
    """The metric minus that of the reference in runs with the same fold and seed, as means of folds."""
    return by_fold(paired(row.values(value), reference.values(value)))


def epochs_to(record: Record, share: float = 0.95) -> tuple[int, float]:
    """Epochs and seconds of training until the validation fold first has a share of its last accuracy."""
    progress = record["progress"]
    right = [1 - each if record["settings"]["metric"] == "wer" else each for each in progress["validation"]]
    index = next(index for index, each in enumerate(right) if each >= share * right[-1])
    return progress["epoch"][index], progress["seconds"][index]


def show(number: Optional[Estimate], form: str = ".1f") -> str:
    """Mean ± half width."""
    if number is None:
        return "—"
    return f"{number.mean:{form}}" + ("" if number.half is None else f" ± {number.half:{form.lstrip('+')}}")


def main_table(
    rows: list[Row],
    study: Study,
    protocol: dict[str, Any],
    value: Callable[[Record], float] = percent,
    metric: Optional[str] = None,
) -> str:
    """The metric of each row, or another number, and its difference from the reference."""
    metric = metric or ("word error rate" if protocol["metric"] == "wer" else "accuracy")
    table = [["method", "trained besides the head", "rate", f"{metric}, %", "minus reference, points", "runs"]]
    overlap = overlap_of(protocol)
    for row in rows:
        reference, first = reference_of(row, rows, study), next(iter(row.runs.values()))
        compared = None if reference in (None, row) else difference(row, reference, value)
        rates = sorted({each["settings"]["rate"] for each in row.runs.values()})
        table.append(
            [
                row.label,
                f"{first['parameters']:,}",
                " / ".join(f"{rate:g}" for rate in rates),
                show(interval(by_fold(row.values(value)), overlap)),
                "reference" if reference is row else show(interval(compared, overlap) if compared else None, "+.1f"),
                str(len(row.runs)),
            ]
        )
    return markdown(table)


def cost_table(rows: list[Row]) -> str:
    """What training and using costs, as medians of the runs, and how soon a method is near its end."""
    heading = ["method", "epochs to 95%", "seconds until then", "step, ms", "forward of 1, ms", "kept, MiB"]
    table = [heading]
    for row in rows:
        records = list(row.runs.values())
        ends = [epochs_to(record) for record in records]
        kept = [each["memory_bytes"] + 12 * (each["parameters"] + each["head_parameters"]) for each in records]
        table.append(
            [
                row.label,
                f"{statistics.median(epoch for epoch, _ in ends):g}",
                f"{statistics.median(seconds for _, seconds in ends):.1f}",
                times([each["step_seconds"] for each in records]),
                times([each["forward_1_seconds"] for each in records]),
                f"{statistics.median(kept) / 2**20:.1f}",
            ]
        )
    return markdown(table)


def routing_table(rows: list[Row]) -> str:
    """How experts are used at each step that was traced and at the end: means of all blocks and runs."""
    heading = ["method", "step", "largest load, of an equal share", "experts, effective", "of"]
    table = [[*heading, "tokens a slot reads, %", "runs"]]
    for row in rows:
        traces = [record["routing"] for record in row.runs.values()]
        for index in range(len(traces[0])):
            entries = [trace[index] for trace in traces]
            means = {
                name: statistics.fmean(sum((each[name] for each in entries), []))
                for name in entries[0]
                if name != "step"
            }
            number = row.options.get("num_experts", 7)
            table.append(
                [
                    row.label,
                    str(entries[0]["step"]),
                    f"{number * means['largest_load']:.2f}",
                    f"{means['effective_experts']:.2f}",
                    str(number),
                    f"{100 * means['tokens_read'] / means['tokens']:.0f}",
                    str(len(traces)),
                ]
            )
    return markdown(table)


def sensitivity(rows: list[Row], study: Study, protocol: dict[str, Any]) -> Optional[str]:
    """The smallest difference that the study would show, by the median deviation of the differences."""
    deviations, folds = [], []
    for row in rows:
        reference = reference_of(row, rows, study)
        compared = difference(row, reference) if reference not in (None, row) else []
        if len(compared) > 1:
            deviations.append(statistics.stdev(compared))
            folds.append(len(compared))
    if not deviations:
        return None
    deviation, overlap = statistics.median(deviations), overlap_of(protocol)
    numbers = sorted({min(folds), len(protocol["folds"])})
    shown = " and ".join(f"{smallest_difference(deviation, each, overlap):.1f} points with {each}" for each in numbers)
    return (
        f"**Sensitivity.** Differences deviate by {deviation:.1f} points between folds (median of the rows), so the "
        f"smallest difference that is shown with a probability of 0.8 is {shown} folds."
    )


def protocol_text(protocol: dict[str, Any], study: Study) -> str:
    """What all runs have in common."""
    clips = "" if protocol["clips_per_class"] is None else f" with {protocol['clips_per_class']} clips of a class"
    others = "".join(f", {name} {each}" for name, each in protocol["epochs_of"].items())
    if protocol.get("head_epochs"):
        others += (
            f". Before, for all but the linear probe, the head alone learns for {protocol['head_epochs']} epochs with "
            f"a rate of {protocol['head_rate']:g} from what the pretrained model gives"
        )
    seconds = "" if protocol["seconds"] is None else f", cut to {protocol['seconds']:g} s"
    method, options = study.variants[study.reference]
    given = protocol
    at = f" at the same {study.axis}" if study.axis else ""
    what = "texts" if given["metric"] == "wer" else "classes"
    return (
        f"**Protocol.** {given['model']} ({given['model_parameters']:,} parameters, sha256 {given['model_sha256']}) on "
        f"{given['data']}: {given['clips']} clips of {given['classes']} {what}, {len(given['folds'])} folds{seconds}. "
        f"A fold tests, the next one validates, the others train{clips}, in batches of {given['batch_size']}; epochs: "
        f"{given['epochs']}{others}. {given['optimizer']} as in the paper, {given['schedule']}; augmentation: "
        f"{given['augmentation']}; {given['precision']}. Where a method has a choice, it trains at most "
        f"{given['budget']:,} parameters besides the head, unless its row says otherwise. Learning rates are chosen "
        f"for each row with seed 0, on the validation fold of the tested fold {', '.join(given['rate_folds'])}; the "
        "other folds take that of the first. Intervals are of 95%: means of folds, Student's t with the correction of "
        f"Nadeau and Bengio (2003). Differences are paired by fold and seed; the reference is "
        f"{label(method, options)}{at}."
    )


def places(found: list[Record]) -> str:
    """Where the runs were made, with what versions and commits."""
    commits: dict[str, list[str]] = {}
    for record in found:
        where = record["environment"]
        seen = commits.setdefault(f"{machine({'environment': where})}, {where['processes']} runs at a time", [])
        if where.get("commit") is not None:
            commit = where["commit"][:7] + (" with changes" if where["uncommitted changes"] else "")
            if commit not in seen:
                seen.append(commit)
    parts = [f"{place}; commits {', '.join(each)}" if each else place for place, each in commits.items()]
    hours = sum(record["run_seconds"] for record in found) / 3600
    return f"**Runs.** {len(found)}, which took {hours:.1f} hours in sum: {'. '.join(parts)}."


def page(found: list[Record], study: Study, notes: str, timing: Optional[dict[str, Any]], picture: bool) -> str:
    """RESULTS.md.

    Args:
        found (list[Record]): the records of one study.
        study (Study): what is compared.
        notes (str): what somebody has written of it; may be empty.
        timing (dict, optional): what `timing.measure` wrote.
        picture (bool): whether there is a picture.

    Returns:
        str: Markdown.
    """
    protocol, rows = found[0]["settings"], rows_of(found, study)
    parts: list[Optional[str]] = [
        f"# {study.title}",
        f"Written by `python -m examples.method_comparison {protocol['study']} --report_only`.",
        notes.strip() or None,
    ]
    if rows:
        parts += ["## Results", main_table(rows, study, protocol), sensitivity(rows, study, protocol)]
        if protocol["groups"]:
            groups = f"accuracy of {' or '.join(dict.fromkeys(protocol['groups'].values()))}"
            parts.append(main_table(rows, study, protocol, group_percent, groups))
        parts += [f"![results]({PICTURE})" if picture else None]
        if protocol["metric"] == "accuracy" and protocol["data"] in ("esc50", "arabic-speech-commands"):
            text = "Published by Cappellazzo et al. (arXiv 2312.03694, Table 1), theirs, on AST with more training:"
            parts += [text, markdown(PUBLISHED)]
        if traced := traces_of(found, rows):
            parts += ["## Use of the experts", routing_table(traced)]
        parts += ["## Cost", cost_table(rows)]
    else:
        parts += ["No learning rate has been chosen yet, so there is no table."]
    if timing is not None:
        parts += ["In turn, round by round, on one machine:", timing_table(timing), f"{machine(timing)}."]
    parts += ["## How it was run", protocol_text(protocol, study), places(found)]
    return "\n\n".join(each for each in parts if each) + "\n"


def write_page(found: list[Record], study: Study, folder: Path) -> Path:
    """Write RESULTS.md and its picture, from what lies in the folder.

    Args:
        found (list[Record]): the records of one study.
        study (Study): what is compared.
        folder (Path): with notes.md and times.json, where there are any.

    Returns:
        Path: of the page.
    """
    notes = (folder / NOTES).read_text(encoding="utf-8") if (folder / NOTES).exists() else ""
    timing = json.loads((folder / TIMES).read_text()) if (folder / TIMES).exists() else None
    rows = rows_of(found, study)
    if rows:
        overlap = overlap_of(found[0]["settings"])
        numbers = [(row, interval(by_fold(row.values(percent)), overlap)) for row in rows]
        draw(numbers, study.axis, found[0]["settings"]["metric"], traces_of(found, rows), folder / PICTURE)
    path = folder / PAGE
    path.write_text(page(found, study, notes, timing, bool(rows)), encoding="utf-8", newline="\n")
    return path
