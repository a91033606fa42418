"""The sections on the ablations and on what the paper says."""

from __future__ import annotations

import statistics

from ..benchmark.report import markdown
from .ablations import AXES, Axis
from .comparison import (
    Comparison,
    ablations,
    contrast_of,
    estimate,
    idle_by_rate,
    idle_share,
    mean_of,
    paired,
    time_ratio,
)
from .intervals import Estimate
from .records import CHOICE_SEED
from .training import DENSE, SINGLE, SOFT
from .wording import listed, several_intervals, show

# From which factor on a method is several times faster: the paper says more than three.
SEVERAL = 3.0
# The paper's largest gain over the single adapter, in points.
LARGEST_GAIN = 2.5


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


def contrast_in_words(axis: Axis, number: Estimate) -> str:
    """A sentence on what the paper says of the values."""
    better, worse = listed(axis.claim.better), listed(axis.claim.worse)
    meaning = {1: "so more is gained there", -1: "so less is gained there", 0: "so no difference is shown"}[number.sign]
    return f"The mean of {better} minus that of {worse} is {show(number, '+.1f')} points, {meaning}."


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
