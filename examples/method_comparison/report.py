"""RESULTS.md: tables of the records, and under each what it shows, chosen by the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

from report import machine, markdown, times

from .ablations import AXES, Axis
from .intervals import Estimate, interval
from .records import CHOICE_SEED, Record, choose_rate, common_settings, of
from .training import DENSE, METHODS, SINGLE, SOFT, UNBUDGETED

SEEDS = 3  # of the whole table, at least
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
        self.seeds = max(SEEDS, len({record["settings"]["seed"] for record in found}))
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
    return interval(by_fold({key: value(record) for key, record in runs.items()}), overlap_of(runs))


def overlap_of(runs: Runs) -> float:
    """How many clips are tested for each that is trained on: one fold, and all but two."""
    return 1 / (len(next(iter(runs.values()))["settings"]["folds"]) - 2)


def paired(
    one: Runs,
    other: Runs,
    value: Callable[[Record], float] = final_accuracy,
    compare: Callable[[float, float], float] = lambda one, other: one - other,
    overlap: Optional[float] = None,
) -> Optional[Estimate]:
    """Mean and interval of the comparison of runs with the same fold and seed.

    Args:
        one (Runs): the runs of a method.
        other (Runs): those of another one.
        value (callable): from a record to a number. Default: its accuracy.
        compare (callable): from two numbers to one. Default: their difference.
        overlap (float, optional): how many clips are tested for each that is trained on. Default: that of the runs.

    Returns:
        Estimate, optional: None if no two runs belong together.
    """
    values = {key: compare(value(record), value(other[key])) for key, record in one.items() if key in other}
    return interval(by_fold(values), overlap_of(one) if overlap is None else overlap) if values else None


def contrast(some: Sequence[Runs], others: Sequence[Runs]) -> Optional[Estimate]:
    """The mean accuracy of some variants minus that of others, in folds with runs of all of them.

    Args:
        some (sequence of Runs): variants.
        others (sequence of Runs): those that they are compared with.

    Returns:
        Estimate, optional: points; None if no fold has them all.
    """
    keys = set.intersection(*(set(runs) for runs in (*some, *others))) if some and others else set()
    if not keys:
        return None

    def mean(variants: Sequence[Runs], key: tuple[str, int]) -> float:
        return statistics.fmean(final_accuracy(runs[key]) for runs in variants)

    differences = {key: mean(some, key) - mean(others, key) for key in sorted(keys)}
    return interval(by_fold(differences), overlap_of(some[0]))


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
            f"{name} differs from {other} by {number.mean:+.1f} points, in one fold or in all folds alike, which gives "
            "no interval: this table does not show a difference."
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
    whole = len(METHODS) * folds * (rates + here.seeds - 1)
    main = [record for record in here.records if not record["settings"]["options"]]
    table = sum(map(len, here.methods.values()))
    lines = ["# Comparison of methods", "Written by `examples/compare_methods.py` from the files in `runs/`."]
    state = "All" if len(main) >= whole else f"{len(main)} of the"
    lines.append(
        f"{state} {whole} runs of a whole comparison are there: {len(METHODS)} methods, {folds} folds, {rates} "
        f"learning rates with the first of {here.seeds} seeds, and the others with the rate chosen. "
        f"{table} of them are in the tables. Beside them there are {len(here.records) - len(main)} runs of ablations."
    )
    lines.append(
        f"**Data and model.** {given['data']}: {given['clips']} clips of {given['classes']} classes in {folds} folds. "
        f"{given['model']}: {given['model_parameters']:,} parameters. All methods start from the same weights and the "
        "same head, which reads the mean of all tokens and is trained in all."
        + (
            " How long that model was pretrained was chosen by a probe on ESC-10, all folds of it: see "
            "`examples/backbone/ast-small/README.md`."
            if given["model"] == "ast-small"
            else ""
        )
    )
    lines.append(
        "**Methods.** BitFit trains all biases. LoRA is on q_proj and v_proj, with alpha equal to its rank; IA³ on "
        "k_proj, v_proj and fc2. The single adapter and the mixtures are beside every self-attention; a mixture has 7 "
        "experts, of which top-k takes 2 for each token, with a load-balancing loss of weight 0.01, and expert choice "
        "as many tokens for each expert as an equal share; Soft-MoA has one slot for each expert and no normalisation. "
        "Norms are frozen but in full fine-tuning and, their biases, in BitFit; the paper trains some."
    )
    overlap_in_words = f"1 / {folds - 2}"
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
        "loss there. The tested fold chooses nothing, and what counts is its accuracy after the last epoch. What "
        "the script does unless it is told otherwise (epochs, size of batches, grid, weight decay) was settled on "
        "earlier runs of some methods on ESC-10, which are not among these."
    )
    lines.append(
        "**Intervals** are of 95%. Runs are averaged within their fold, and the means of the K folds give mean ± "
        f"t(0.975, K - 1) · s · √(1 / K + {overlap_in_words}), in which the second term makes up for the folds' "
        "training sets having clips in common (Nadeau and Bengio, 2003). Differences are taken between runs with the "
        "same fold and seed first. No interval tells of what another split of the clips into folds would give."
    )
    code = (f"{place}, commit {listed(commits)}" if commits else place for place, commits in places(here).items())
    lines.append(
        f"**Hardware and code.** {'; '.join(code)}. Each run had one thread. Its times are processor time, or on an "
        "accelerator by the clock: the median of all steps, with least and greatest run in brackets."
    )
    return lines


def places(here: Comparison) -> dict[str, list[str]]:
    """Where the runs were made and with what versions, with the commits of each."""
    found: dict[str, list[str]] = {}
    for record in here.records:
        where = record["environment"]
        commits = found.setdefault(f"{machine({'environment': where})}, {where['processes']} runs at a time", [])
        if where.get("commit") is not None:
            commit = where["commit"][:7] + (" with changes" if where["uncommitted changes"] else "")
            if commit not in commits:
                commits.append(commit)
    return found


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
                f"{len(runs)} of {len(here.folds) * here.seeds}",
            ]
        )
    words = []
    if SOFT in here.methods:
        words.append(difference_in_words(SOFT, f"the {SINGLE}", differences[SOFT]))
    for sign, what in ((1, "better"), (-1, "worse")):
        some = [method for method, each in differences.items() if each and each.sign == sign and method != SOFT]
        if some:
            words.append(f"Of the others, {listed(some)} {'are' if len(some) > 1 else 'is'} {what} than the {SINGLE}.")
    words.append(several_intervals([each for each in differences.values() if each]))
    words.append(
        "The table does not show the best that each method can do, for the grid of learning rates is coarse (see "
        "below), and says nothing of other data, larger models or longer training."
    )
    return ["## Accuracy", markdown(table), " ".join(filter(None, words)), "![accuracy](accuracy.png)"]


def several_intervals(numbers: Sequence[Estimate]) -> str:
    """What to remember of many intervals; nothing if there are few."""
    number = sum(each.half is not None for each in numbers)
    return f"Of {number} intervals of 95%, {number / 20:.1f} miss the truth on average." if number > 1 else ""


def rates_section(here: Comparison) -> list[str]:
    """Which learning rates were chosen."""
    rates = here.protocol["rates"]
    table = [["method", *(f"fold {fold}" for fold in here.folds), "accuracy with each rate on the validation folds, %"]]
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
    ends = {
        method: sum(rate in (rates[0], rates[-1]) for rate in here.rates[method].values()) for method in here.methods
    }
    some = [f"{method} (in {count} of {len(here.rates[method])} folds)" for method, count in ends.items() if count]
    words = (
        f"The least or the greatest rate was chosen for {listed(some)}: a wider grid might give them more."
        if some
        else "No method chose the least or the greatest rate: a wider grid is not likely to change much."
    )
    if len(rates) > 1:
        step = max(greater / less for less, greater in zip(rates, rates[1:]))
        words += (
            f" Neighbours in the grid differ by a factor of {step:g}: a method whose best rate is between two of them "
            "might gain from a finer grid."
        )
    return ["## Learning rates", markdown(table), words]


def cost_section(here: Comparison) -> list[str]:
    """Time and memory."""
    table = [
        ["method", f"step of {here.protocol['batch_size']}, ms", f"of {SINGLE}", "kept, MiB", "forward of 1, ms"]
        + [f"of {SINGLE}"]
    ]
    single = here.methods.get(SINGLE, {})
    for method, runs in here.methods.items():
        each = list(runs.values())
        table.append(
            [
                method,
                times([record["step_seconds"] for record in each]),
                show(time_ratio(runs, single, "step_seconds"), ".2f"),
                f"{statistics.median(map(kept_bytes, each)) / 2**20:,.1f}",
                times([record["forward_1_seconds"] for record in each]),
                show(time_ratio(runs, single, "forward_1_seconds"), ".2f"),
            ]
        )
    words = (
        "What is kept is the memory that training adds to the model, with its peak behind the forward pass: what "
        "autograd holds of a batch, and gradient and two moments of AdamW for each trained parameter. Passing results "
        "of single operations are not in it. Times of runs side by side share caches and memory with each other, so "
        "small differences mean nothing; `examples/benchmark/` measures in turn."
    )
    if len(places(here)) > 1:
        words += " These runs are of more than one machine or version of a library, whose times the table mixes."
    faster = time_ratio(here.methods.get(DENSE, {}), here.methods.get(SOFT, {}), "step_seconds")
    if faster is not None:
        words = f"A step of {DENSE} takes {show(faster, '.2f')} times as long as one of {SOFT}. {words}"
    return ["## Cost", markdown(table), words, "![accuracy and time of a step](step-time.png)"]


def kept_bytes(record: Record) -> int:
    """What autograd keeps, and three float32 numbers for each trained parameter."""
    return record["memory_bytes"] + 12 * (record["parameters"] + record["head_parameters"])


def time_ratio(one: Runs, other: Runs, name: str) -> Optional[Estimate]:
    """A time as a multiple of another method's in the run with the same fold and seed."""
    # Folds have clips in common, but times have nothing to do with them.
    return paired(one, other, lambda record: record[name], lambda one, other: one / other, overlap=0)


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
        "Accuracy on the validation fold, which is read after every epoch, and has chosen the learning rate, "
        "so it can be greater than on the tested one. A method that ends low is soon at 95% of it, so the table does "
        "not show which one is the fastest to a given accuracy; the picture has the means of all folds by epoch."
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
    words = f"There are idle experts in {listed(with_idle)}." if with_idle else "No expert of any method is idle."
    if SOFT in with_idle and len(here.protocol["rates"]) > 1:
        shares = idle_by_rate(record for record in of(here.records, SOFT) if record["settings"]["seed"] == CHOICE_SEED)
        words += (
            f" With the rates {' / '.join(f'{rate:g}' for rate in shares)} in all folds, chosen or not, and seed "
            f"{CHOICE_SEED}, {' / '.join(f'{share:.1%}' for share in shares.values())} of the experts of {SOFT} are "
            "idle."
        )
    words += (
        " The numbers are means of all blocks, on the tested folds. An expert's load is its share of the weights with "
        "which tokens take answers. It is idle below a tenth of an equal share; the effective number is e to the power "
        "of the load's entropy, which is normalized by that of equal loads; class information is what an expert, drawn "
        "by its load, tells of the clip's class. Even use does not show that experts do different things, nor that it "
        "helps accuracy; `peft-softmoa inspect` looks at what they read."
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


def idle_by_rate(found: Iterable[Record]) -> dict[float, float]:
    """The mean share of idle experts with each learning rate, from the least one on."""
    shares: dict[float, list[float]] = {}
    for record in found:
        shares.setdefault(record["settings"]["rate"], []).append(idle_share(record))
    return {rate: statistics.fmean(shares[rate]) for rate in sorted(shares)}


def ablation_sections(here: Comparison) -> list[str]:
    """One table for each thing that was varied."""
    parts: list[str] = []
    differences: list[Estimate] = []
    single = here.methods.get(SINGLE, {})
    for axis, values in ablations(here):
        reference = values[axis.reference]
        table = [[axis.title, "R", "trained besides the head", "accuracy, %", f"minus {axis.reference}, points"]]
        table[0] += [f"minus {SINGLE}, points", "folds"]
        shown, to_single_shown, compared = [], [], []
        for label, runs in values.items():
            record = next(iter(runs.values()))
            difference = None if label == axis.reference else paired(runs, reference)
            to_single = paired(runs, single)
            if label != axis.reference:
                compared += [each for each in (difference, to_single) if each is not None]
            if to_single is not None and to_single.sign:
                to_single_shown.append(label)
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
                    show(to_single, "+.1f"),
                    str(len({fold for fold, _ in runs})),
                ]
            )
        words = (
            f"{'; '.join(shown)}: these intervals exclude zero."
            if shown
            else f"No interval of a difference to {axis.reference} excludes zero."
            if any(each.half is not None for each in compared)
            else "Without two folds there are no intervals."
        )
        if to_single_shown:
            that, does = ("those", "do") if len(to_single_shown) > 1 else ("that", "does")
            words += f" Of those to the {SINGLE}, {that} of {listed(to_single_shown)} {does}."
        elif not shown:
            words += " This table shows no difference."
        number = contrast_of(here, axis)
        if number is not None:
            words += f" {contrast_in_words(axis, number)}"
            compared.append(number)
        differences += compared
        parts += [f"### {axis.title[0].upper()}{axis.title[1:]}", markdown(table), words]
    if not parts:
        return []
    first = (
        f"{SOFT} with one thing changed, at the same budget, with seed {CHOICE_SEED} and the rate that {SOFT} has "
        "chosen for the fold. That rate was not chosen for the variants, so what they lose may be due to it. "
    )
    if single:
        first_seed = {key: record for key, record in single.items() if key[1] == CHOICE_SEED}
        first += (
            f"The {SINGLE} is without the change, and has an accuracy of {show(estimate(first_seed))}% with that seed, "
            f"of {show(estimate(single))}% with all. "
        )
    first += several_intervals(differences)
    return ["## Ablations", first.rstrip(), *parts, "![ablations](ablations.png)"]


def ablations(here: Comparison) -> list[tuple[Axis, dict[str, Runs]]]:
    """What was varied, with the runs of each value: the reference and others."""
    values = [(axis, ablation(here, axis)) for axis in AXES]
    return [(axis, each) for axis, each in values if len(each) > 1 and axis.reference in each]


def ablation(here: Comparison, axis: Axis) -> dict[str, Runs]:
    """The runs of the choosing seed for each value that has any, by its label."""
    values = {}
    for label, options in axis.values.items():
        runs = {key: record for key, record in here.runs(SOFT, **options).items() if key[1] == CHOICE_SEED}
        if runs:
            values[label] = runs
    return values


def contrast_of(here: Comparison, axis: Axis) -> Optional[Estimate]:
    """Accuracy of the values of an axis that the paper finds better minus that of the others that it speaks of."""
    values = ablation(here, axis)
    if axis.claim is None or not {*axis.claim.better, *axis.claim.worse} <= values.keys():
        return None
    better, worse = ([values[label] for label in labels] for labels in (axis.claim.better, axis.claim.worse))
    return contrast(better, worse)


def contrast_in_words(axis: Axis, number: Estimate) -> str:
    """A sentence on what the paper says of the values."""
    better, worse = listed(axis.claim.better), listed(axis.claim.worse)
    meaning = {1: "so more is gained there", -1: "so less is gained there", 0: "so no difference is shown"}[number.sign]
    return f"The mean of {better} minus that of {worse} is {show(number, '+.1f')} points, {meaning}."


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
    faster = time_ratio(dense, soft, "step_seconds")
    if faster is not None:
        # Without an interval the mean itself decides.
        low, high = (faster.mean, faster.mean) if faster.half is None else (faster.low, faster.high)
        verdict = "holds here" if low >= SEVERAL else "does not hold here" if high < SEVERAL else "is not shown here"
        text = (
            f"a step of {DENSE} takes {show(faster, '.2f')} times as long. Here it is two products of matrices; the "
            "paper's code loops over the experts"
        )
        claims.append((f"Trains more than {SEVERAL:g} times as fast as {DENSE}", verdict, text))
    for axis in AXES:
        number = contrast_of(here, axis)
        if number is not None:
            verdict = {1: "holds here", -1: "does not hold here", 0: "is not shown here"}[number.sign]
            text = f"{listed(axis.claim.better)} minus {listed(axis.claim.worse)}: {show(number, '+.1f')} points"
            claims.append((axis.claim.text, verdict, text))
    if soft:
        idle = statistics.fmean(idle_share(record) for record in soft.values())
        number = estimate(soft, lambda record: mean_of(record, "effective_number"))
        text = f"{idle:.1%} of its experts are idle"
        shares = idle_by_rate(soft.values())
        if len(shares) > 1:
            text += f" ({listed(f'{share:.1%} with the rate {rate:g}' for rate, share in shares.items())})"
        text += f", and their effective number is {show(number, '.2f')}"
        claims.append(
            (
                "No expert is left unused (by our measure: less than a tenth of an equal share of the load)",
                "holds here" if idle == 0 else "does not hold here",
                text,
            )
        )
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
    if gain is not None and gain.half is not None and gain.sign <= 0:
        words.append(tried(here))
    words.append(
        "The paper trains AST-base, pretrained on recordings, on more clips and for longer: what does not hold here "
        "may hold there."
    )
    return ["## What the paper says", markdown(table), " ".join(words)]


def tried(here: Comparison) -> str:
    """What was changed of a Soft-MoA that is not ahead of the single adapter, and what came of it."""
    single = here.methods[SINGLE]
    gains: dict[str, Estimate] = {}
    for axis, values in ablations(here):
        for label, runs in values.items():
            gain = paired(runs, single) if label != axis.reference and len(runs) == len(here.folds) else None
            if gain is not None and gain.half is not None:
                gains[f"{axis.title}: {label}"] = gain
    if not gains:
        return f"What would bring {SOFT} ahead, these runs do not tell: there are no ablations with all folds."
    words = f"Of the {len(gains)} changes to {SOFT} under Ablations, with seed {CHOICE_SEED}, "
    ahead, behind = (
        [f"{name} ({show(gain, '+.1f')} points)" for name, gain in gains.items() if gain.sign == sign]
        for sign in (1, -1)
    )
    if ahead:
        return (
            f"{words}these beat the {SINGLE}, which was not given the same change: {'; '.join(ahead)}. The more that "
            "are tried, the more are ahead by chance."
        )
    name, best = max(gains.items(), key=lambda item: item[1].mean)
    return (
        f"{words}none is shown to beat the {SINGLE}. The best mean is that of {name} ({show(best, '+.1f')} points), "
        "and the best of so many is so by chance, too."
        + (
            f" Behind the {SINGLE} {'are' if len(behind) > 1 else 'is'} {listed(behind)}; one in twenty intervals "
            "excludes zero by chance, and the learning rate was not chosen for the change."
            if behind
            else ""
        )
    )


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
    path.write_text(results(found, pictures), encoding="utf-8", newline="\n")
