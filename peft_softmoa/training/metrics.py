"""Classification metrics behind evaluate's interface; `evaluate.load` would download their scripts."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


class _ClassMetric(evaluate.Metric):
    """A metric of predicted and true class indices."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions, references: class indices.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )


class Accuracy(_ClassMetric):
    """Share of correct predictions: `(1/n) Σ_i [p_i = y_i]`.

    `compute(predictions=..., references=...)` takes class indices and returns `{"accuracy": float}`.
    """

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MacroF1(_ClassMetric):
    """Mean of the classes' F1 scores, over the C classes that occur: `(1/C) Σ_c 2·TP_c / (2·TP_c + FP_c + FN_c)`.

    `compute(predictions=..., references=...)` takes class indices and returns `{"f1_macro": float}`.
    """

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        scores = []
        for label in np.union1d(predicted, true):
            hits = np.sum((predicted == label) & (true == label))
            # 2·TP + FP + FN: each side counts its hits once.
            scores.append(2 * hits / (np.sum(predicted == label) + np.sum(true == label)))
        return {"f1_macro": float(np.mean(scores))}


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro F1 of logits, for the Trainer's `compute_metrics`.

    Args:
        prediction (EvalPrediction): logits `(n, C)` and class indices `(n,)`.

    Returns:
        dict[str, float]: `accuracy` and `f1_macro`.
    """
    metrics = evaluate.combine([Accuracy(), MacroF1()])
    predicted = np.argmax(prediction.predictions, axis=-1)
    values: dict[str, float] = metrics.compute(predictions=predicted, references=prediction.label_ids)
    return values
