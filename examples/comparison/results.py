"""RESULTS.md: tables of the records, and under each what it shows, chosen by the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

from report import machine, markdown, times

from .ablations import AXES, EXPERTS, SLOTS, Axis
from .intervals import Estimate, interval
from .records import CHOICE_SEED, Record, choose_rate, common_settings, of
from .training import DENSE, METHODS, SINGLE, SOFT, UNBUDGETED

SEEDS = 3  # of the whole table
# By fold and seed.
Runs = dict[tuple[str, int], Record]
# From which factor on a method is several times faster: the paper says more than three.
SEVERAL = 3.0
# The paper's largest gain over the single adapter, in points.
LARGEST_GAIN = 2.5


class Comparison:
    """What the records say, with the learning rates that they choose.

    Args:
        found (list[Record]): the records of one comparison.
    """

    def __init__(self, found: list[Record]) -> None:
        self.records = found
        self.protocol = common_settings(found[0])
        self.folds: list[str] = self.protocol["folds"]
        self.rates = {
            method: {
                fold: rate
                for fold in self.folds
                if (rate := choose_rate(found, method, fold, self.protocol["rates"])) is not None
            }
            for method in METHODS
        }
        self.methods = {method: runs for method in METHODS if (runs := self.runs(method))}

    def runs(self, method: str, **options: Any) -> Runs:
        """The runs of a method with the rates that it has chosen, by fold and seed.

        Args:
            method (str): which method.
            options: of an ablation.

        Returns:
            Runs: the records.
        """
        rates = self.rates[method]
        return {
            (fold, record["settings"]["seed"]): record
            for fold in self.folds
            for record in of(self.records, method, fold, **options)
            if record["settings"]["rate"] == rates.get(fold)
        }


def final_accuracy(record: Record) -> float:
    """Accuracy on the tested fold after the last epoch, in percent."""
    return 100 * record["test_accuracy"]


def by_fold(values: dict[tuple[str, int], float]) -> list[float]:
    """The mean of each fold, in the order of the folds."""
    folds: dict[str, list[float]] = {}
    for (fold, _), value in values.items():
        folds.setdefault(fold, []).append(value)
    return [statistics.fmean(each) for each in folds.values()]


def estimate(runs: Runs, value: Callable[[Record], float] = final_accuracy) -> Estimate:
    """Mean and interval of a number of each run."""
    return interval(by_fold({key: value(record) for key, record in runs.items()}))


def paired(
    one: Runs,
    other: Runs,
    value: Callable[[Record], float] = final_accuracy,
    compare: Callable[[float, float], float] = lambda one, other: one - other,
) -> Optional[Estimate]:
    """Mean and interval of the comparison of runs with the same fold and seed.

    Args:
        one (Runs): the runs of a method.
        other (Runs): those of another one.
        value (callable): from a record to a number. Default: its accuracy.
        compare (callable): from two numbers to one. Default: their difference.

    Returns:
        Estimate, optional: None if no two runs belong together.
    """
    values = {key: compare(value(record), value(other[key])) for key, record in one.items() if key in other}
    return interval(by_fold(values)) if values else None


def slope(variants: Sequence[tuple[float, Runs]]) -> Optional[Estimate]:
    """The slope of a line through accuracy over some quantity: of each fold by least squares, then as an interval.

    Args:
        variants (sequence): the quantity and the runs at it.

    Returns:
        Estimate, optional: points for each unit of the quantity; None if there are less than two quantities.
    """
    folds = set.intersection(*({fold for fold, _ in runs} for _, runs in variants)) if variants else set()
    if len(variants) < 2 or not folds:
        return None
    middle = statistics.fmean(quantity for quantity, _ in variants)
    slopes = []
    for fold in sorted(folds):
        accuracies = [
            statistics.fmean(final_accuracy(record) for (each, _), record in runs.items() if each == fold)
            for _, runs in variants
        ]
        mean = statistics.fmean(accuracies)
        products = sum((x - middle) * (y - mean) for (x, _), y in zip(variants, accuracies, strict=True))
        slopes.append(products / sum((x - middle) ** 2 for x, _ in variants))
    return interval(slopes)


def epochs_to(record: Record, share: float = 0.95) -> int:
    """The first epoch, from 1, after which the accuracy on the validation fold has reached a share of its last one."""
    accuracies = record["epochs"]["validation_accuracy"]
    return next(index + 1 for index, each in enumerate(accuracies) if each >= share * accuracies[-1])


def seconds_to(record: Record) -> float:
    """The processor time of training until then."""
    return sum(record["epochs"]["seconds"][: epochs_to(record)])


# --- numbers and words --------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Such as `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def show(number: Optional[Estimate], form: str = ".1f") -> str:
    """Mean ± half width."""
    if number is None:
        return "—"
    return f"{number.mean:{form}}" + ("" if number.half is None else f" ± {number.half:{form.lstrip('+')}}")


def listed(words: Iterable[str]) -> str:
    """Such as `one, two and three`."""
    *some, last = words
    return f"{', '.join(some)} and {last}" if some else last


def difference_in_words(name: str, other: str, number: Optional[Estimate]) -> str:
    """What a difference of accuracies shows.

    Args:
        name (str): of the first method.
        other (str): of the second one.
        number (Estimate, optional): first minus second, in points.

    Returns:
        str: a sentence.
    """
    if number is None:
        return f"There are no runs yet by which {name} and {other} can be compared."
    if number.half is None:
        return (
            f"{name} differs from {other} by {number.mean:+.1f} points in one fold, which gives no interval: this "
            "table does not show a difference."
        )
    if number.sign:
        word = "beats" if number.sign > 0 else "is behind"
        return (
            f"{name} {word} {other} by {abs(number.mean):.1f} ± {number.half:.1f} points: the interval excludes zero."
        )
    return (
        f"{name} differs from {other} by {number.mean:+.1f} ± {number.half:.1f} points: the interval includes zero, so "
        "this table does not show a difference."
    )


# --- sections -----------------------------------------------------------------------------------------------------


def heading(here: Comparison) -> list[str]:
    """What was run, and how much of it."""
    given = here.protocol
    folds, rates = len(here.folds), len(given["rates"])
    whole = len(METHODS) * folds * (rates + SEEDS - 1)
    main = [record for record in here.records if not record["settings"]["options"]]
    table = sum(map(len, here.methods.values()))
    lines = ["# Comparison of methods", "Written by `examples/compare_methods.py` from the files in `runs/`."]
    state = "All" if len(main) >= whole else f"So far, {len(main)} of the"
    lines.append(
        f"{state} {whole} runs of the main table are there: {len(METHODS)} methods, {folds} folds, {rates} learning "
        f"rates with the first of {SEEDS} seeds, and the others with the rate chosen. "
        f"{table} of them are in the table. Beside them there are {len(here.records) - len(main)} runs of ablations."
    )
    lines.append(
        f"**Data and model.** {given['data']}: {given['clips']} clips of {given['classes']} classes in {folds} folds. "
        f"{given['model']}: {given['model_parameters']:,} parameters. All methods start from the same weights and the "
        "same head, which reads the mean of all tokens and is trained in all."
    )
    betas = ", ".join(f"{each:g}" for each in given["betas"])
    lines.append(
        f"**Training.** Epochs: {given['epochs']}, in batches of {given['batch_size']}, in the same order for all "
        f"methods; {given['optimizer']} (betas {betas}, eps {given['eps']:g}), weight decay {given['weight_decay']:g}, "
        f"but none of biases, norms and the factors of IA³; {given['schedule']}; {given['precision']}; augmentation: "
        f"{given['augmentation']}. Methods with a budget train the most parameters within {given['budget']:,}, "
        f"{given['budget'] / given['model_parameters']:.1%} of the model's, besides the head. "
        f"The others have the number that they have: {listed(UNBUDGETED)}."
    )
    lines.append(
        "**Protocol.** Each fold is tested once; the next one validates, the others train. For each method and tested "
        f"fold, the learning rate is that of {listed(f'{rate:g}' for rate in given['rates'])} with the best accuracy "
        f"on the validation fold after the last epoch, with seed {CHOICE_SEED}; among equals, the one with the least "
        "loss there. The tested fold chooses nothing, and what counts is its accuracy after the last epoch."
    )
    lines.append(
        "**Intervals** are of 95%. Runs are averaged within their fold, and the means of the K folds give mean ± "
        "t(0.975, K - 1) · s / √K. Differences are taken between runs with the same fold and seed first. As the folds' "
        "training sets overlap, such intervals tend to be too narrow."
    )
    places = []
    for record in here.records:
        where = record["environment"]
        place = f"{machine({'environment': where})}, {where['processes']} runs at a time"
        if place not in places:
            places.append(place)
    lines.append(
        f"**Hardware.** {'; '.join(places)}. Each run had one thread; its times are processor time, median of all "
        "steps, with least and greatest run in brackets."
    )
    return lines


def accuracy_section(here: Comparison) -> list[str]:
    """The main table."""
    single = here.methods.get(SINGLE, {})
    differences = {method: paired(runs, single) for method, runs in here.methods.items() if method != SINGLE}
    table = [["method", "trained besides the head", "accuracy, %", "minus single adapter, points", "runs"]]
    for method, runs in here.methods.items():
        record = next(iter(runs.values()))
        table.append(
            [
                method,
                f"{record['parameters']:,}",
                show(estimate(runs)),
                show(differences.get(method), "+.1f"),
                f"{len(runs)} of {len(here.folds) * SEEDS}",
            ]
        )
    words = []
    if SOFT in here.methods:
        words.append(difference_in_words(SOFT, f"the {SINGLE}", differences[SOFT]))
    for sign, what in ((1, "better"), (-1, "worse")):
        some = [method for method, each in differences.items() if each and each.sign == sign and method != SOFT]
        if some:
            words.append(f"Of the others, {listed(some)} {'are' if len(some) > 1 else 'is'} {what} than the {SINGLE}.")
    compared = sum(each is not None and each.half is not None for each in differences.values())
    if compared > 1:
        words.append(
            f"Of {compared} intervals of 95%, one may well miss the truth. The table says nothing of other data, "
            "larger models or longer training."
        )
    return ["## Accuracy", markdown(table), " ".join(words), "![accuracy](accuracy.png)"]


def rates_section(here: Comparison) -> list[str]:
    """Which learning rates were chosen."""
    rates = here.protocol["rates"]
    table = [["method", *(f"fold {fold}" for fold in here.folds), "accuracy with each rate on the validation folds, %"]]
    edges = {}
    for method in here.methods:
        chosen = here.rates[method]
        means = []
        for rate in rates:
            accuracies = [
                record["epochs"]["validation_accuracy"][-1]
                for record in of(here.records, method)
                if record["settings"]["rate"] == rate
                and record["settings"]["seed"] == CHOICE_SEED
                and record["settings"]["fold"] in chosen
            ]
            means.append(f"{100 * statistics.fmean(accuracies):.1f}")
        cells = [f"{chosen[fold]:g}" if fold in chosen else "—" for fold in here.folds]
        table.append([method, *cells, " / ".join(means)])
        edges[method] = sum(rate in (rates[0], rates[-1]) for rate in chosen.values())
    at_edge = [f"{method} (in {count} of {len(here.rates[method])} folds)" for method, count in edges.items() if count]
    words = (
        f"The least or the greatest rate was chosen for {listed(at_edge)}: a wider grid might give them "
        "more, so the table does not show the best that they can do."
        if at_edge
        else "No method chose the least or the greatest rate: a wider grid is not likely to change much."
    )
    return ["## Learning rates", markdown(table), words]


def cost_section(here: Comparison) -> list[str]:
    """Time and memory."""
    table = [
        ["method", f"step of {here.protocol['batch_size']}, ms", f"of {SINGLE}", "memory, MiB", "forward of 1, ms"]
        + ["run, s"]
    ]
    single = here.methods.get(SINGLE, {})
    for method, runs in here.methods.items():
        each = list(runs.values())
        table.append(
            [
                method,
                times([record["step_seconds"] for record in each]),
                show(step_ratio(runs, single), ".2f"),
                f"{statistics.median(record['memory_bytes'] for record in each) / 2**20:,.0f}",
                times([record["forward_1_seconds"] for record in each]),
                f"{statistics.median(record['run_seconds'] for record in each):.0f}",
            ]
        )
    words = (
        "Memory is what autograd keeps of a batch for the backward pass. Times of runs side by side share caches and "
        "memory with each other, so small differences mean nothing; `examples/benchmark/` measures in turn."
    )
    faster = step_ratio(here.methods.get(DENSE, {}), here.methods.get(SOFT, {}))
    if faster is not None:
        words = f"A step of {DENSE} takes {show(faster, '.2f')} times as long as one of {SOFT}. {words}"
    return ["## Cost", markdown(table), words, "![accuracy and time of a step](step-time.png)"]


def step_ratio(one: Runs, other: Runs) -> Optional[Estimate]:
    """The time of a step as a multiple of another method's in the run with the same fold and seed."""
    return paired(one, other, lambda record: record["step_seconds"], lambda one, other: one / other)


def convergence_section(here: Comparison) -> list[str]:
    """How soon the final accuracy is nearly there."""
    table = [["method", "epochs to 95% of the final accuracy", "seconds until then", "final training loss"]]
    for method, runs in here.methods.items():
        losses = [record["epochs"]["loss"][-1] for record in runs.values()]
        finite = [loss for loss in losses if loss is not None]
        table.append(
            [
                method,
                show(estimate(runs, epochs_to)),
                show(estimate(runs, seconds_to)),
                f"{statistics.fmean(finite):.3f}" if len(finite) == len(losses) else "not finite",
            ]
        )
    words = (
        "Accuracy on the validation fold, which is read after every epoch. A method that ends low is soon at 95% of "
        "it, so this does not show which one is the fastest to a given accuracy; the picture does."
    )
    if {SOFT, SINGLE} <= here.methods.keys():
        sooner = paired(here.methods[SOFT], here.methods[SINGLE], epochs_to)
        if sooner is not None:
            meaning = {
                1: "it takes longer",
                -1: "it is there sooner",
                0: "no difference is shown",
            }[sooner.sign]
            words = f"{SOFT} minus {SINGLE}: {show(sooner, '+.1f')} epochs, so {meaning}. {words}"
    return ["## Convergence", markdown(table), words, "![accuracy over epochs](epochs.png)"]


def utilization_section(here: Comparison) -> list[str]:
    """How evenly experts are used."""
    mixtures = {method: runs for method, runs in here.methods.items() if "experts" in next(iter(runs.values()))}
    if not mixtures:
        return []
    table = [["method", "experts", "effective number", "normalized entropy", "idle, of all", "class information, bits"]]
    idle = {}
    for method, runs in mixtures.items():
        each = list(runs.values())
        idle[method] = 100 * statistics.fmean(map(idle_share, each))
        table.append(
            [
                method,
                str(each[0]["experts"][0]["experts"]),
                show(estimate(runs, lambda record: mean_of(record, "effective_number")), ".2f"),
                show(estimate(runs, lambda record: mean_of(record, "normalized_entropy")), ".3f"),
                f"{idle[method]:.1f}%",
                show(estimate(runs, lambda record: mean_of(record, "class_information")), ".3f"),
            ]
        )
    with_idle = [method for method, share in idle.items() if share > 0]
    words = (
        f"{f'There are idle experts in {listed(with_idle)}.' if with_idle else 'No expert of any method is idle.'} The "
        "numbers are means of all blocks, on the tested folds. Even use does not show that experts do different "
        "things, nor that it helps accuracy; `peft-softmoa inspect` looks at what they read."
    )
    return ["## Use of the experts", markdown(table), words]


def mean_of(record: Record, name: str) -> float:
    """A metric as a mean of all blocks."""
    values = [block[name] for block in record["experts"] if block.get(name) is not None]
    return statistics.fmean(values) if values else math.nan


def idle_share(record: Record) -> float:
    """The share of idle experts among those of all blocks."""
    blocks = record["experts"]
    return sum(block["idle_experts"] for block in blocks) / sum(block["experts"] for block in blocks)


def ablation_sections(here: Comparison) -> list[str]:
    """One table for each thing that was varied."""
    parts = []
    for axis in AXES:
        values = ablation(here, axis)
        if len(values) < 2 or axis.reference not in values:
            continue
        reference = values[axis.reference]
        table = [
            [axis.title, "R", "trained besides the head", "accuracy, %", f"minus {axis.reference}, points", "folds"]
        ]
        table[0].append("step, ms")
        shown = []
        for label, runs in values.items():
            record = next(iter(runs.values()))
            difference = None if label == axis.reference else paired(runs, reference)
            if difference is not None and difference.sign:
                word = "better" if difference.sign > 0 else "worse"
                shown.append(
                    f"{label} is {word} than {axis.reference} by {show(difference._replace(mean=abs(difference.mean)))}"
                )
            table.append(
                [
                    label,
                    str(record["r"]),
                    f"{record['parameters']:,}",
                    show(estimate(runs)),
                    show(difference, "+.1f"),
                    str(len({fold for fold, _ in runs})),
                    times([each["step_seconds"] for each in runs.values()]),
                ]
            )
        words = (
            f"{'; '.join(shown)}: these intervals exclude zero."
            if shown
            else f"No interval of a difference to {axis.reference} excludes zero: this table shows no difference."
        )
        trend = trend_of(here, axis)
        if trend is not None:
            words += f" {trend}"
        parts += [f"### {axis.title[0].upper()}{axis.title[1:]}", markdown(table), words]
    if not parts:
        return []
    first = (
        f"{SOFT} with one thing changed, at the same budget, with seed {CHOICE_SEED} and the rate that {SOFT} has "
        "chosen for the fold. That rate was not chosen for the variants, so what they lose may be due to it."
    )
    return ["## Ablations", first, *parts, "![ablations](ablations.png)"]


def ablation(here: Comparison, axis: Axis) -> dict[str, Runs]:
    """The runs of the choosing seed for each value that has any, by its label."""
    values = {}
    for label, options in axis.values.items():
        runs = {key: record for key, record in here.runs(SOFT, **options).items() if key[1] == CHOICE_SEED}
        if runs:
            values[label] = runs
    return values


def slope_of(here: Comparison, axis: Axis) -> Optional[Estimate]:
    """Points for each doubling of N, or for each further slot."""
    values = ablation(here, axis).items()
    scale = math.log2 if axis is EXPERTS else float
    return slope([(scale(int(label)), runs) for label, runs in values])


def trend_of(here: Comparison, axis: Axis) -> Optional[str]:
    """A sentence on the line through all values, for numbers."""
    if axis not in (EXPERTS, SLOTS):
        return None
    number = slope_of(here, axis)
    if number is None:
        return None
    unit = "doubling of N" if axis is EXPERTS else "further slot"
    meaning = {1: "accuracy rises", -1: "accuracy falls", 0: "no trend is shown"}[number.sign]
    return f"A line through all of them: {show(number, '+.2f')} points for each {unit}, so {meaning}."


# --- claims -------------------------------------------------------------------------------------------------------


def claims_section(here: Comparison) -> list[str]:
    """What the paper says, and whether it holds here."""
    soft, dense, single = (here.methods.get(method, {}) for method in (SOFT, DENSE, SINGLE))
    claims = []
    gain = paired(soft, single)
    if gain is not None:
        verdict = {1: "holds here", -1: "does not hold here", 0: "is not shown here"}[gain.sign]
        text = f"{show(gain, '+.1f')} points"
        if gain.half is not None and gain.high < LARGEST_GAIN:
            text += f"; a gain of {LARGEST_GAIN} points is outside of the interval"
        claims.append((f"Beats the {SINGLE} with as many parameters, by up to {LARGEST_GAIN} points", verdict, text))
    behind = paired(soft, dense)
    if behind is not None:
        verdict = {1: "is exceeded here", -1: "does not hold here", 0: "is not contradicted here"}[behind.sign]
        text = f"{show(behind, '+.1f')} points"
        if not behind.sign and behind.half is not None:
            text += f"; differences from {behind.low:+.1f} to {behind.high:+.1f} are possible"
        claims.append((f"Matches {DENSE}", verdict, text))
    faster = step_ratio(dense, soft)
    if faster is not None:
        # Without an interval the mean itself decides.
        low, high = (faster.mean, faster.mean) if faster.half is None else (faster.low, faster.high)
        verdict = "holds here" if low >= SEVERAL else "does not hold here" if high < SEVERAL else "is not shown here"
        text = (
            f"a step of {DENSE} takes {show(faster, '.2f')} times as long. Here it is two products of matrices; the "
            "paper's code loops over the experts"
        )
        claims.append((f"Trains more than {SEVERAL:g} times as fast as {DENSE}", verdict, text))
    experts = slope_of(here, EXPERTS)
    if experts is not None:
        verdict = {1: "holds here", -1: "does not hold here", 0: "is not shown here"}[experts.sign]
        claims.append(
            ("Gains from more, smaller experts", verdict, f"{show(experts, '+.2f')} points for each doubling of N")
        )
    slots = slope_of(here, SLOTS)
    if slots is not None:
        verdict = {1: "does not hold here", -1: "holds here", 0: "is not shown here"}[slots.sign]
        claims.append(
            (
                "One or two slots for each expert are best",
                verdict,
                f"{show(slots, '+.2f')} points for each further slot",
            )
        )
    if soft:
        idle = statistics.fmean(idle_share(record) for record in soft.values())
        number = estimate(soft, lambda record: mean_of(record, "effective_number"))
        text = f"{idle:.1%} of its experts are idle, and their effective number is {show(number, '.2f')}"
        claims.append(("No expert is left unused", "holds here" if idle == 0 else "does not hold here", text))
    if not claims:
        return []
    table = [["the paper says of Soft-MoA", "verdict", "in numbers"], *map(list, claims)]
    failing = [claim for claim, verdict, _ in claims if verdict.startswith("does not hold")]
    open_claims = [claim for claim, verdict, _ in claims if verdict.startswith("is not shown")]
    words = []
    if failing:
        words.append(f"Not so here: {'; '.join(failing)}.")
    if open_claims:
        words.append(f"Left open by these runs: {'; '.join(open_claims)}.")
    words.append(
        "The paper trains AST-base, pretrained on recordings, on other data and for longer: what does not hold here "
        "may hold there."
    )
    return ["## What the paper says", markdown(table), " ".join(words)]


def results(found: list[Record], pictures: Sequence[str] = ()) -> str:
    """All of RESULTS.md.

    Args:
        found (list[Record]): the records of one comparison.
        pictures (sequence of str): names of the pictures that there are; others are left out.

    Returns:
        str: Markdown.
    """
    here = Comparison(found)
    parts = heading(here)
    if here.methods:
        for section in (
            accuracy_section,
            claims_section,
            rates_section,
            cost_section,
            convergence_section,
            utilization_section,
            ablation_sections,
        ):
            parts += section(here)
    else:
        parts.append("No method has all runs that choose its rate in any fold, so there is no table yet.")
    kept = [part for part in parts if not part.startswith("![") or part.rpartition("(")[2].rstrip(")") in pictures]
    return "\n\n".join(kept) + "\n"


def write_results(found: list[Record], path: Path, pictures: Sequence[str]) -> None:
    """Write RESULTS.md.

    Args:
        found (list[Record]): the records of one comparison.
        path (Path): the file.
        pictures (sequence of str): names of the pictures beside it.
    """
    path.write_text(results(found, pictures))
