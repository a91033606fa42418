"""Metrics behind evaluate's interface, computed by scikit-learn and jiwer; `evaluate.load` would download its scripts.

Each of them is an `evaluate.EvaluationModule`: `compute(predictions=..., references=...)`, or `add_batch` and then
`compute()`. Those that read the same form may be combined with `evaluate.combine`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import datasets
import evaluate
import numpy as np
from datasets import Features, Value
from transformers import EvalPrediction

from .network import retry

# What a metric reads: class indices, or for each class whether a sample has it; scores of the classes; numbers; texts.
Form = Literal["labels", "scores", "values", "texts"]

ONE, SEVERAL = Value("int64"), datasets.Sequence(Value("int64"))
NUMBERS = datasets.Sequence(Value("float64"))
# Predictions and references of each form; where there are two, for one label a sample and for several.
FEATURES: dict[Form, list[Features]] = {
    "labels": [Features({"predictions": each, "references": each}) for each in (SEVERAL, ONE)],
    "scores": [Features({"predictions": NUMBERS, "references": each}) for each in (SEVERAL, ONE)],
    "values": [Features({"predictions": NUMBERS, "references": NUMBERS})],
    "texts": [Features({"predictions": Value("string"), "references": Value("string")})],
}


class _Metric(evaluate.Metric):
    """A metric with what the task has to know of it."""

    form: ClassVar[Form]
    greater_is_better: ClassVar[bool] = True

    def _info(self) -> evaluate.MetricInfo:
        features = FEATURES[self.form]
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=f"predictions, references: {self.form}",
            features=features if len(features) > 1 else features[0],
        )


class Accuracy(_Metric):
    """Share of correct predictions: `(1/n) Σ_i [p_i = y_i]`; with several labels a sample, all have to be correct.

    `compute(predictions=..., references=...)` takes labels and returns `{"accuracy": float}`.
    """

    form = "labels"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(np.asarray(references), np.asarray(predictions)))}


class MacroF1(_Metric):
    """Mean of the classes' F1 scores, over the C classes that occur: `(1/C) Σ_c 2·TP_c / (2·TP_c + FP_c + FN_c)`.

    `compute(predictions=..., references=...)` takes labels and returns `{"f1_macro": float}`.
    """

    form = "labels"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import f1_score

        true, predicted = np.asarray(references), np.asarray(predictions)
        if true.ndim > 1:
            occurs = (true + predicted).any(axis=0)
            true, predicted = true[:, occurs], predicted[:, occurs]
        if not true.size:
            return {"f1_macro": float("nan")}
        return {"f1_macro": float(f1_score(true, predicted, average="macro", zero_division=0.0))}


class UnweightedAverageRecall(_Metric):
    """Mean of the recalls of the C classes that samples have: `(1/C) Σ_c TP_c / (TP_c + FN_c)`.

    `compute(predictions=..., references=...)` takes labels, one for each sample, and returns
    `{"unweighted_average_recall": float}`.
    """

    form = "labels"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import recall_score

        true, predicted = np.asarray(references), np.asarray(predictions)
        if true.ndim > 1:
            occurs = true.any(axis=0)
            if not occurs.any():
                return {"unweighted_average_recall": float("nan")}
            recall = recall_score(true[:, occurs], predicted[:, occurs], average="macro")
        else:
            recall = recall_score(true, predicted, labels=np.unique(true), average="macro")
        return {"unweighted_average_recall": float(recall)}


class MeanAveragePrecision(_Metric):
    """Mean over the C classes that samples have of the average precision: `(1/C) Σ_c Σ_n (R_n - R_{n-1}) P_n`.

    `compute(predictions=..., references=...)` takes scores of all classes, and labels; it returns
    `{"mean_average_precision": float}`.
    """

    form = "scores"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import average_precision_score

        scores, true = np.asarray(predictions), np.asarray(references)
        if true.ndim == 1:
            true = np.eye(scores.shape[1], dtype=np.int64)[true]
        occurs = true.any(axis=0)
        values = [average_precision_score(true[:, each], scores[:, each]) for each in np.flatnonzero(occurs)]
        return {"mean_average_precision": float(np.mean(values)) if values else float("nan")}


class MeanAbsoluteError(_Metric):
    """Mean absolute error: `(1/n) Σ_i |p_i - y_i|`, over all numbers of all samples.

    `compute(predictions=..., references=...)` takes numbers and returns `{"mae": float}`.
    """

    form = "values"
    greater_is_better = False

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import mean_absolute_error

        return {"mae": float(mean_absolute_error(np.asarray(references), np.asarray(predictions)))}


class PearsonCorrelation(_Metric):
    """Pearson's correlation `cov(p, y) / (σ_p σ_y)`, as a mean over the columns of the numbers.

    It is not a number where predictions or references are all the same. `compute(predictions=..., references=...)`
    takes numbers and returns `{"pearson": float}`.
    """

    form = "values"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        given, true = (np.asarray(each, np.float64) for each in (predictions, references))
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # with a single sample
            values = [np.corrcoef(given[:, each], true[:, each])[0, 1] for each in range(true.shape[1])]
        return {"pearson": float(np.mean(values))}


class WordErrorRate(_Metric):
    """Word error rate: words that are substituted, deleted and inserted, as a share of the words of the references.

    `compute(predictions=..., references=...)` takes texts and returns `{"wer": float}`.
    """

    form = "texts"
    greater_is_better = False

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        import jiwer

        return {"wer": float(jiwer.wer(reference=list(references), hypothesis=list(predictions)))}


class CharacterErrorRate(_Metric):
    """Character error rate: the same of characters.

    `compute(predictions=..., references=...)` takes texts and returns `{"cer": float}`.
    """

    form = "texts"
    greater_is_better = False

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        import jiwer

        return {"cer": float(jiwer.cer(reference=list(references), hypothesis=list(predictions)))}


METRICS: dict[str, type[_Metric]] = {
    "accuracy": Accuracy,
    "f1_macro": MacroF1,
    "unweighted_average_recall": UnweightedAverageRecall,
    "mean_average_precision": MeanAveragePrecision,
    "mae": MeanAbsoluteError,
    "pearson": PearsonCorrelation,
    "wer": WordErrorRate,
    "cer": CharacterErrorRate,
}
LOWER_IS_BETTER = {name for name, metric in METRICS.items() if not metric.greater_is_better}


def compute_metrics(names: Sequence[str], forms: Mapping[Form, tuple[Any, Any]]) -> dict[str, float]:
    """Compute metrics by name.

    Args:
        names (sequence of str): names in `METRICS`, or ids that `evaluate.load` knows, which read the first form.
        forms (mapping): predictions and references, by their form.

    Returns:
        dict[str, float]: what the metrics return.

    Raises:
        ValueError: if a metric reads a form that there is not.
        ImportError: if scikit-learn or jiwer is missing.
    """
    values: dict[str, float] = {}
    for name in [names] if isinstance(names, str) else names:
        module = METRICS[name]() if name in METRICS else retry(evaluate.load, name)
        form: Form = module.form if isinstance(module, _Metric) else next(iter(forms))
        if form not in forms:
            possible = [each for each, metric in METRICS.items() if metric.form in forms]
            raise ValueError(f"`metrics`: '{name}' reads {form}, which this task does not give. Choose {possible}.")
        predictions, references = forms[form]
        # Straight, not through files: frames are many.
        compute = module._compute if isinstance(module, _Metric) else module.compute
        values.update(compute(predictions=predictions, references=references))
    return values


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro F1 of logits, for the Trainer's `compute_metrics`.

    Args:
        prediction (EvalPrediction): logits `(n, C)` and class indices `(n,)`.

    Returns:
        dict[str, float]: `accuracy` and `f1_macro`.
    """
    labels = np.argmax(prediction.predictions, axis=-1), prediction.label_ids
    return compute_metrics(("accuracy", "f1_macro"), {"labels": labels})
