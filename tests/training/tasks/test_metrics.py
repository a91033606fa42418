"""Metrics against cases that are computed by hand."""

import math

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from peft_softmoa.training.metrics import METRICS, compute_metrics
from peft_softmoa.training.tasks import CTC, MultiLabel, Regression, SingleLabel
from peft_softmoa.training.tasks.text import make_tokenizer

# Three clips of class 0, of which two are right, and one of class 1, which is right; class 2 is only predicted.
LABELS = [0, 2, 0, 1], [0, 0, 0, 1]
# Classes 0, 1 and 2: recalls 1/2, 1 and none; class 3 occurs nowhere.
SEVERAL = [[1, 0, 1, 0], [0, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 0, 0]]
SCORES = [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]
CASES = [
    ("accuracy", *LABELS, 3 / 4),
    ("accuracy", *SEVERAL, 0),
    ("accuracy", [[1, 0], [0, 0]], [[1, 0], [0, 1]], 1 / 2),
    ("f1_macro", *LABELS, (4 / 5 + 1 + 0) / 3),
    ("f1_macro", *SEVERAL, (2 / 3 + 1 + 0) / 3),
    ("unweighted_average_recall", *LABELS, (2 / 3 + 1) / 2),
    ("unweighted_average_recall", *SEVERAL, (1 / 2 + 1) / 2),
    # Class 0 ranks 1, 3, 2, 4: hits at 1 and 3. Class 1 ranks 4, 2, 3, 1: hits at 1 and 2.
    ("mean_average_precision", SCORES, [0, 1, 1, 1], (1 + 1) / 2),
    ("mean_average_precision", SCORES, [0, 0, 1, 1], ((1 + 2 / 3) / 2 + (1 + 2 / 3) / 2) / 2),
    ("mean_average_precision", SCORES, [[1, 0], [1, 0], [0, 0], [0, 0]], (1 + 2 / 3) / 2),
    ("mean_average_precision", SCORES, [0, 0, 0, 0], 1),
    ("mae", [[1.0, 2.0], [3.0, 4.0]], [[0.0, 2.0], [3.0, 7.0]], (1 + 0 + 0 + 3) / 4),
    ("pearson", [[1.0], [2.0], [3.0]], [[2.0], [2.0], [5.0]], math.sqrt(3) / 2),
    ("pearson", [[1.0, 1.0], [2.0, 2.0]], [[0.0, 9.0], [3.0, 4.0]], 0),
    ("wer", ["a b c", "d"], ["a x c", "d e"], (1 + 1) / 5),
    ("wer", ["", "d"], ["a b", "d"], 2 / 3),
    ("wer", ["a b"], [""], 2),
    ("cer", ["abc", "d"], ["axc", "de"], (1 + 1) / 5),
    ("cer", [""], ["abc"], 1),
]


@pytest.mark.parametrize("name, predictions, references, expected", CASES)
def test_by_hand(name, predictions, references, expected):
    assert METRICS[name]().compute(predictions=predictions, references=references) == {name: pytest.approx(expected)}
    arrays = [np.array(each) for each in (predictions, references)] if not name.endswith("er") else None
    if arrays:
        assert METRICS[name]().compute(predictions=arrays[0], references=arrays[1])[name] == pytest.approx(expected)
    # Row by row.
    metric = METRICS[name]()
    for row in zip(predictions, references):
        metric.add_batch(predictions=[row[0]], references=[row[1]])
    assert metric.compute()[name] == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, predictions, references",
    [
        ("f1_macro", [[0, 0]], [[0, 0]]),
        ("unweighted_average_recall", [[1, 0]], [[0, 0]]),
        ("mean_average_precision", [[0.5, 0.5]], [[0, 0]]),
        ("pearson", [[1.0], [2.0]], [[3.0], [3.0]]),
        ("pearson", [[1.0]], [[3.0]]),
    ],
)
def test_what_is_not_defined_is_no_number(name, predictions, references):
    assert math.isnan(METRICS[name]().compute(predictions=predictions, references=references)[name])


def test_combined():
    names = ["accuracy", "f1_macro", "unweighted_average_recall"]
    combined = evaluate.combine([METRICS[name]() for name in names])
    expected = {name: value for name, given, true, value in CASES if name in names and given is LABELS[0]}
    assert combined.compute(predictions=LABELS[0], references=LABELS[1]) == pytest.approx(expected)
    for given, true in zip(*LABELS):
        combined.add_batch(predictions=[given], references=[true])
    assert combined.compute() == pytest.approx(expected)


def test_forms_that_a_task_does_not_give():
    with pytest.raises(
        ValueError, match=r"`metrics`: 'wer' reads texts, which this task does not give. Choose .*'accuracy'"
    ):
        compute_metrics(["wer"], {"labels": LABELS})


def test_scores_of_the_tasks():
    logits = np.log(np.array(SCORES))
    task = SingleLabel(["a", "b"], metrics=["accuracy", "mean_average_precision"])
    assert task.score(EvalPrediction(logits, np.array([0, 0, 1, 1]))) == pytest.approx(
        {"accuracy": 3 / 4, "mean_average_precision": 5 / 6}
    )
    task = MultiLabel(["a", "b"])
    several = np.array([[1, 0], [1, 0], [0, 0], [0, 0]])
    found = task.score(EvalPrediction(np.array(SCORES) - 0.5, several.astype("f4")))
    # Class 0 is predicted for three, of which two are right; class 1 for one that does not have it.
    assert found == pytest.approx({"mean_average_precision": 5 / 6, "f1_macro": (4 / 5 + 0) / 2})
    task = Regression(["x"])
    assert task.score(EvalPrediction(np.array([[1.0], [2.0]]), np.array([[3.0], [5.0]]))) == pytest.approx(
        {"mae": 2.5, "pearson": 1}
    )


def test_texts_of_ctc():
    """Repeated characters are one, but not in the labels; blanks and padding are none."""
    tokens = ["[PAD]", "[UNK]", "|", "a", "b"]
    task = CTC(tokens, tokenizer=make_tokenizer(tokens))
    labels = task.batch_labels([task.encode("aa b", "x", None), task.encode("b", "x", None)])
    assert labels.tolist() == [[3, 3, 2, 4], [4, -100, -100, -100]]
    predictions = np.array([[3, 3, 0, 3, 2, 4], [4, 4, 0, 4, -100, -100]])
    assert task.forms(EvalPrediction(predictions, labels.numpy())) == {"texts": (["aa b", "bb"], ["aa b", "b"])}
    assert task.score(EvalPrediction(predictions, labels.numpy())) == pytest.approx({"wer": 1 / 3, "cer": 1 / 5})
    task = CTC(tokens, tokenizer=make_tokenizer(tokens), normalize_text=True)
    assert task.score(EvalPrediction(predictions[:1, :0], labels.numpy()[:1])) == {"wer": 1.0, "cer": 1.0}
