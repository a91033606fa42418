"""The page of a study, made from its records and its notes alone."""

import pytest
from conftest import needs_results
from made_up_runs import made_up

from examples.method_comparison import records
from examples.method_comparison.methods import LORA, SINGLE, SOFT
from examples.method_comparison.pages import PUBLISHED, epochs_to, page, rows_of, write_page
from examples.method_comparison.run import RESULTS
from examples.method_comparison.studies import STUDIES, Study

STUDY = Study("A study", [(LORA, {}), (SINGLE, {}), (SOFT, {})], reference=1)
COMMITTED = [path.parent for path in sorted(RESULTS.glob("*/runs.jsonl")) if path.parent.name in STUDIES]


def trace(step, load):
    return {"step": step, "largest_load": [load, load], "effective_experts": [6.0, 5.0]} | {
        "tokens_read": [25.0, 25.0],
        "tokens": [100.0, 100.0],
    }


def runs():
    """Soft-MoA is 10 points ahead, but for noise of one; LoRA has one fold."""
    found = [made_up(LORA, test=0.7)]
    for fold, noise in (("1", 0.0), ("2", 0.01), ("3", -0.01)):
        found += [made_up(SINGLE, fold, test=0.8)]
        found += [made_up(SOFT, fold, test=0.9 + noise, routing=[trace(0, 0.2), trace(9, 0.5)])]
    return found


def test_the_tables():
    text = page(runs(), STUDY, "What I see.\n", None, True)
    lines = text.splitlines()
    assert text.startswith("# A study\n") and text.index("What I see.") < text.index("## Results")
    assert "| single adapter | 78 | 0.01 | 80.0 | reference | 3 |" in lines
    # t = 4.303 of two degrees of freedom, s = 1, and as many folds tested as trained on.
    assert "| Soft-MoA | 78 | 0.01 | 90.0 ± 5.0 | +10.0 ± 5.0 | 3 |" in lines
    assert "| LoRA | 78 | 0.01 | 70.0 | -10.0 | 1 |" in lines
    assert "| Soft-MoA, rate=0.01 | 0 | 1.40 | 5.50 | 7 | 25 | 3 |" in lines
    assert "| Soft-MoA, rate=0.01 | 9 | 3.50 | 5.50 | 7 | 25 | 3 |" in lines
    # (4.303 + 1.061) · √(1/3 + 1)
    assert "deviate by 1.0 points" in text and "is 6.2 points with 3 folds" in text
    assert "a processor, 1 thread on 2 cores, torch 2, transformers 5, peft 0, 2 runs at a time" in text
    assert "![results](results.png)" in text and "Published" not in text


def test_the_use_of_experts_is_told_of_rates_that_were_not_chosen():
    rates = {"rates": {SOFT: [0.01, 0.02]}}
    made = [(0.01, 0.6, 0.2), (0.02, 0.4, 0.5)]
    found = [
        made_up(SOFT, rate=rate, validation=value, settings=rates, routing=[trace(0, load)])
        for rate, value, load in made
    ]
    lines = page(found, STUDY, "", None, False).splitlines()
    assert "| Soft-MoA | 78 | 0.01 | 50.0 | — | 1 |" in lines
    assert "| Soft-MoA, rate=0.01 | 0 | 1.40 | 5.50 | 7 | 25 | 1 |" in lines
    assert "| Soft-MoA, rate=0.02 | 0 | 3.50 | 5.50 | 7 | 25 | 1 |" in lines


def test_the_published_table_is_named_as_theirs():
    found = [made_up(SOFT, settings={"data": "esc50"})]
    text = page(found, STUDY, "", None, False)
    assert "theirs" in text and "| bottleneck adapter | 249K | 88.38 | 91.33 |" in text.splitlines()
    assert all(len(row) == 4 for row in PUBLISHED) and "results.png" not in text


def test_rows_are_compared_at_the_same_point_of_the_axis():
    study = Study("A study", [(m, {"speakers": n}) for n in (2, 4) for m in (SINGLE, SOFT)], axis="speakers")
    found = [
        made_up(method, fold, test=accuracy, options={"speakers": number})
        for fold in "12"
        for number, accuracies in ((2, (0.5, 0.6)), (4, (0.7, 0.9)))
        for method, accuracy in zip((SINGLE, SOFT), accuracies)
    ]
    text = page(found, study, "", None, False)
    assert "| Soft-MoA, speakers=2 | 78 | 0.01 | 60.0 | +10.0 | 2 |" in text
    assert "| Soft-MoA, speakers=4 | 78 | 0.01 | 90.0 | +20.0 | 2 |" in text


def test_runs_have_the_rate_that_was_chosen():
    rates = {"rates": {SOFT: [0.01, 0.02], LORA: [0.01, 0.02]}}
    found = [made_up(SOFT, rate=0.01, validation=0.4, settings=rates)]
    assert rows_of(found, STUDY) == [] and "no table" in page(found, STUDY, "", None, False)
    found += [made_up(SOFT, rate=0.02, validation=0.6, settings=rates)]
    found += [made_up(SOFT, "2", rate=0.02, settings=rates), made_up(SOFT, "3", rate=0.01, settings=rates)]
    (row,) = rows_of(found, STUDY)
    assert [(key, record["settings"]["rate"]) for key, record in row.runs.items()] == [
        (("1", 0), 0.02),
        (("2", 0), 0.02),
    ]


def test_epochs_until_nearly_the_end():
    record = made_up(SOFT, validation=0.5)
    assert epochs_to(record) == (2, 4.0)
    record["progress"]["validation"] = [0.48, 0.5]
    assert epochs_to(record) == (1, 2.0)
    # Of words that are wrong, it is the right ones.
    record = made_up(SOFT, settings={"metric": "wer"})
    record["progress"]["validation"] = [0.1, 0.08]
    assert epochs_to(record) == (1, 2.0)
    record["progress"]["validation"] = [0.6, 0.5]
    assert epochs_to(record) == (2, 4.0)


@pytest.mark.parametrize("axis", [None, "speakers"])
def test_a_page_comes_again_byte_for_byte(tmp_path, axis):
    found = [{**each, "settings": {**each["settings"], "options": {"speakers": 2} if axis else {}}} for each in runs()]
    variants = [(method, {"speakers": 2} if axis else {}) for method in (LORA, SINGLE, SOFT)]
    study = Study("A study", variants, reference=1, axis=axis)
    (tmp_path / "notes.md").write_text("Mine.\n")
    records.write(tmp_path / "runs.jsonl", found)
    write_page(records.load(tmp_path / "runs.jsonl"), study, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before["results.png"].startswith(b"\x89PNG") and b"\n\nMine.\n\n" in before["RESULTS.md"]
    write_page(records.load(tmp_path / "runs.jsonl"), study, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@needs_results
@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_pages_are_those_of_the_committed_runs(folder, tmp_path):
    for name in ("runs.jsonl", "notes.md", "times.json"):
        if (folder / name).exists():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    written = write_page(records.load(tmp_path / "runs.jsonl"), STUDIES[folder.name], tmp_path)
    assert written.read_text() == (folder / "RESULTS.md").read_text()
    assert "notes.md" in {path.name for path in folder.iterdir()}
