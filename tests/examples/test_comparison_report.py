"""What the report of a comparison says, and the committed results."""

import re

import matplotlib.image
import pytest
from conftest import needs_results
from documents import DOCS, README
from made_up_runs import experts_of, made_up

from examples.method_comparison import records
from examples.method_comparison.ablations import variants
from examples.method_comparison.comparison import Comparison, estimate, paired
from examples.method_comparison.intervals import Estimate
from examples.method_comparison.pictures import draw
from examples.method_comparison.report import results
from examples.method_comparison.run import HERE
from examples.method_comparison.training import METHODS, SINGLE, SOFT
from examples.method_comparison.wording import difference_in_words, show

COMMITTED = HERE / "results"


@pytest.mark.parametrize(
    "number, expected",
    [
        (Estimate(2.0, 1.0), "A beats B by 2.0 ± 1.0 points: the interval excludes zero"),
        (Estimate(-2.0, 1.0), "A is behind B by 2.0 ± 1.0 points: the interval excludes zero"),
        (Estimate(0.5, 1.0), "+0.5 ± 1.0 points: the interval includes zero, so this table does not show a difference"),
        (
            Estimate(0.5, None),
            "in one fold or in all folds alike, which gives no interval: this table does not show a difference",
        ),
        (None, "no runs yet"),
    ],
)
def test_differences_in_words(number, expected):
    assert expected in difference_in_words("A", "B", number)


def test_what_does_not_hold_is_said():
    def write(soft, dense_seconds, gain_of_experts):
        experts = experts_of(1)
        runs = []
        for fold, noise in (("1", 0.0), ("2", 0.001), ("3", -0.001)):
            runs += [made_up(SINGLE, fold, test=0.8 + noise)]
            runs += [made_up(SOFT, fold, test=soft - noise, experts=experts)]
            runs += [made_up("Dense-MoA", fold, test=0.8, step_seconds=dense_seconds, experts=experts)]
            for number, times in ((2, 0), (4, 0.2), (16, 1), (32, 1.1)):
                accuracy = soft - noise * times + gain_of_experts * times
                runs += [made_up(SOFT, fold, test=accuracy, options={"num_experts": number})]
        text = results(runs)
        table = dict(
            line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ") and " here | " in line
        )
        return {
            name[2:].split(",")[0].split(" with")[0].split(" (")[0]: verdict for name, verdict in table.items()
        }, text

    verdicts, text = write(0.7, 0.12, -0.02)
    assert verdicts["Beats the single adapter"] == "does not hold here"
    assert verdicts["Matches Dense-MoA"] == "does not hold here"
    assert verdicts["Trains more than 3 times as fast as Dense-MoA"] == "does not hold here"
    assert verdicts["Gains from more"] == "does not hold here"
    assert verdicts["No expert is left unused"] == "does not hold here"
    assert "Soft-MoA is behind the single adapter by 10.0 ± " in text
    verdicts, text = write(0.9, 0.35, 0.02)
    assert verdicts["Beats the single adapter"] == "holds here"
    assert verdicts["Trains more than 3 times as fast as Dense-MoA"] == "holds here"
    assert verdicts["Gains from more"] == "holds here"
    assert "The mean of 16 and 32 minus that of 2 and 4 is +1.9 ± " in text and "so more is gained there" in text
    verdicts, text = write(0.8, 0.35, 0.0)
    assert verdicts["Beats the single adapter"] == verdicts["Gains from more"] == "is not shown here"
    assert "so no difference is shown" in text and "includes zero, so this table does not show a difference" in text


def test_what_was_tried_is_said():
    def write(gain, soft=0.8, folds="123", with_ablations="123"):
        runs = []
        for fold in folds:
            noise = 0.001 * int(fold)
            runs += [made_up(SINGLE, fold, test=0.8), made_up(SOFT, fold, test=soft + noise)]
            if fold in with_ablations:
                runs += [made_up(SOFT, fold, test=soft + noise / 2, options={"scaling": 4.0})]
                runs += [made_up(SOFT, fold, test=soft + gain + noise, options={"num_experts": 2})]
        for record in runs:
            record["experts"] = experts_of(1)
        return results(runs)

    text = write(-0.1, soft=0.79)
    assert "Of the 2 changes to Soft-MoA under Ablations, with seed 0, none is shown to beat the single adapter" in text
    assert (
        "No interval of a difference to 1 excludes zero. Of those to the single adapter, those of 1 and 4 do." in text
    )
    assert "The best mean is that of scaling: 4 (-0.9 ± 0.2 points)" in text
    assert "Behind the single adapter are experts N: 2 (-10.8 ± 0.5 points) and scaling: 4 (-0.9 ± 0.2 points);" in text
    assert "The single adapter is without the change, and has an accuracy of 80.0% with that seed, of 80.0%" in text
    assert "| 2 | 3 | 78 | 69.2 ± 0.5 | -10.0 | -10.8 ± 0.5 | 3 |" in text
    text = write(0.1, soft=0.79)
    assert (
        "these beat the single adapter, which was not given the same change: experts N: 2 (+9.2 ± 0.5 points)" in text
    )
    assert "no ablations with all folds" in write(0.1, soft=0.79, with_ablations="12")
    # Nothing is asked where Soft-MoA is ahead, nor where there is no interval.
    for text in (write(0.1, soft=0.9), write(0.1, soft=0.79, folds="1")):
        assert "under Ablations" not in text and "no ablations with all folds" not in text
    assert "Without two folds there are no intervals" in text


def test_the_learning_rate_may_be_why_experts_are_idle():
    runs = [made_up(SOFT, rate=rate, experts=experts_of(idle)) for rate, idle in ((0.01, 1), (0.02, 2))]
    for record in runs:
        record["settings"]["rates"] = [0.01, 0.02]
    expected = "With the rates 0.01 / 0.02 in all folds, chosen or not, and seed 0, 14.3% / 28.6% of the experts"
    assert expected in results(runs)


def test_times_are_compared_within_folds():
    runs = []
    for fold, step, forward, times_step, times_forward in (("1", 0.1, 0.01, 2, 1), ("2", 0.2, 0.02, 3, 3)):
        runs += [made_up(SINGLE, fold, step_seconds=step, forward_1_seconds=forward)]
        times = {"step_seconds": times_step * step, "forward_1_seconds": times_forward * forward}
        runs += [made_up(SOFT, fold, experts=experts_of(0), **times)]
    # Ratios of 2 and 3, and of 1 and 3: t(0.975, 1) · s / √2, without regard to clips in common.
    expected = "| Soft-MoA | 400 (200–600) | 2.50 ± 6.35 | 1.0 | 35.0 (10.0–60.0) | 2.00 ± 12.71 |"
    assert expected in results(runs)


def test_times_of_several_machines_are_said_to_be_mixed():
    runs = [made_up(SINGLE, "1"), made_up(SINGLE, "2")]
    runs[1]["environment"] |= {"commit": "0123456789", "uncommitted changes": False}
    text = results(runs)
    assert "the table mixes" not in text
    assert (
        "a processor, 1 thread on 2 cores, torch 2, transformers 5, peft 0, 2 runs at a time, commit 0123456." in text
    )
    runs[1]["environment"]["torch"] = "3"
    assert "more than one machine or version of a library, whose times the table mixes" in results(runs)


def test_parts_of_the_runs_are_said_to_be_parts():
    runs = [made_up(SINGLE, "1"), made_up(SINGLE, "2"), made_up(SINGLE, "2", seed=1)]
    text = results(runs)
    # Ten methods, three folds, one rate and two more seeds.
    assert "\n3 of the 90 runs of a whole comparison are there" in text and "3 of them are in the tables" in text
    assert "| single adapter | 78 | 50.0 | — | 3 of 9 |" in text
    # With two rates, nothing is chosen before both are there.
    for record in runs:
        record["settings"]["rates"] = [0.01, 0.02]
    text = results(runs)
    assert "there is no table yet" in text and "| method |" not in text


@needs_results
@pytest.mark.parametrize("part", [".", "finer-rates", "longer"])
def test_committed_results_are_those_of_the_committed_runs(part, tmp_path):
    folder = COMMITTED / part
    found = records.load(folder / "runs.jsonl")
    text, pictures = (folder / "RESULTS.md").read_text(), draw(found, tmp_path)
    assert text == results(found, pictures)
    assert sorted(pictures) == sorted(path.name for path in folder.glob("*.png"))
    assert all(f"({name})" in text for name in pictures)
    expected = re.search(r"^matplotlib==([\d.]+)", (HERE.parents[1] / "constraints.txt").read_text(), re.MULTILINE)[1]
    if matplotlib.__version__ != expected:
        pytest.skip(f"the pictures are of matplotlib {expected}, and other versions draw otherwise")
    for name in pictures:
        drawn, committed = (matplotlib.image.imread(each / name) for each in (tmp_path, folder))
        assert drawn.shape == committed.shape and abs(drawn - committed).max() < 0.05


@needs_results
def test_the_whole_table_was_run():
    text = (COMMITTED / "RESULTS.md").read_text()
    assert "\nAll 300 runs of a whole comparison are there" in text and text.count(" | 15 of 15 |") == len(METHODS)
    assert f"Beside them there are {5 * len(variants())} runs of ablations." in text
    table = text.partition("## Accuracy\n\n")[2].partition("\n\n")[0]
    assert table.count("\n") == len(METHODS) + 1 and table in (DOCS / "evidence.md").read_text()
    # The README quotes some of its rows, without two columns.
    accuracies = {" | ".join(cells[:1] + cells[2:4]) for cells in (row.split(" | ") for row in table.splitlines())}
    quoted = README.partition("<!-- evidence")[2].partition("<!-- end of evidence -->")[0]
    rows = [row.removesuffix(" |") for row in quoted.splitlines() if row.startswith("| ") and "---" not in row]
    assert len(rows) > 1 and set(rows) <= accuracies


@needs_results
def test_what_was_tried_besides_is_as_its_results_say():
    text = (COMMITTED / "README.md").read_text()
    for part in (".", "finer-rates", "longer"):
        here = Comparison(
            [each for each in records.load(COMMITTED / part / "runs.jsonl") if each["settings"]["seed"] == 0]
        )
        single, soft = (here.methods[method] for method in (SINGLE, SOFT))
        cells = [show(estimate(single)), show(estimate(soft)), show(paired(soft, single), "+.1f")]
        (line,) = (line for line in text.splitlines() if line.startswith("| ") and f"({part}/RESULTS.md)" in line)
        assert line.endswith(f"| {' | '.join(cells)} |")
