import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from peft_softmoa.training import Accuracy, MacroF1, classification_metrics


def test_accuracy():
    assert Accuracy().compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}


@pytest.mark.parametrize(
    "predictions, references, expected",
    [
        ([0, 0, 1, 1], [0, 1, 1, 1], (2 / 3 + 4 / 5) / 2),  # class 0: 1 hit, 1 false; class 1: 2 hits, 1 missed
        ([0, 1], [0, 1], 1.0),
        ([2, 2], [0, 0], 0.0),  # class 1 does not occur and does not count
        ([0, 0, 2], [0, 0, 1], 1 / 3),
    ],
)
def test_macro_f1(predictions, references, expected):
    assert MacroF1().compute(predictions=predictions, references=references)["f1_macro"] == pytest.approx(expected)


def test_metrics_are_evaluates_modules():
    for metric in (Accuracy(), MacroF1()):
        assert isinstance(metric, evaluate.Metric) and metric.description
        metric.add_batch(predictions=[0, 1], references=[0, 1])
        metric.add_batch(predictions=[1], references=[1])
        assert list(metric.compute().values()) == [1.0]


def test_classification_metrics_of_logits():
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.5], [0.2, 0.1]])
    metrics = classification_metrics(EvalPrediction(predictions=logits, label_ids=np.array([0, 1, 1, 0])))
    assert metrics == {"accuracy": 0.75, "f1_macro": pytest.approx((4 / 5 + 2 / 3) / 2)}
