"""RESULTS.md: tables of the records, and under each what it shows, chosen by the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from ..benchmark.report import markdown, times
from .claims import ablation_sections, claims_section
from .comparison import (
    Comparison,
    epochs_to,
    estimate,
    idle_by_rate,
    idle_share,
    kept_bytes,
    mean_of,
    paired,
    places,
    seconds_to,
    time_ratio,
)
from .records import CHOICE_SEED, Record, of
from .training import DENSE, METHODS, SINGLE, SOFT, UNBUDGETED
from .wording import difference_in_words, listed, several_intervals, show


def heading(here: Comparison) -> list[str]:
    """What was run, and how much of it."""
    given = here.protocol
    folds, rates = len(here.folds), len(given["rates"])
    whole = len(METHODS) * folds * (rates + here.seeds - 1)
    main = [record for record in here.records if not record["settings"]["options"]]
    table = sum(map(len, here.methods.values()))
    lines = ["# Comparison of methods", "Written by `python -m examples.method_comparison` from `runs.jsonl`."]
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
            "`peft_softmoa/demo/ast-small/README.md`."
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
        "which tokens take expert outputs. It is idle below a tenth of an equal share; the effective number is e to "
        "the power of the load's entropy, which is normalized by that of equal loads; class information is what an "
        "expert, drawn by its load, tells of the clip's class. Even use does not show that experts do different "
        "things, nor that it helps accuracy; `peft-softmoa inspect` looks at what they read."
    )
    return ["## Use of the experts", markdown(table), words]


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
