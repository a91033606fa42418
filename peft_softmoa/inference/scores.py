"""What makes scores of the logits of a classifier."""

from __future__ import annotations

from typing import Any, Literal

Scores = Literal["softmax", "sigmoid", "none"]


def scores_of(config: Any) -> Scores:
    """What makes scores of a classifier's logits, as transformers chooses the loss.

    Args:
        config (PretrainedConfig): config of the model, with its `problem_type` and its classes.

    Returns:
        str: `"sigmoid"` for several classes a clip, `"none"` for regression, else `"softmax"`; without a
            `problem_type`, `"none"` for one output, and `"softmax"` for several.
    """
    problem_type = getattr(config, "problem_type", None)
    if problem_type is None:
        return "softmax" if config.num_labels > 1 else "none"
    known: dict[str, Scores] = {"multi_label_classification": "sigmoid", "regression": "none"}
    return known.get(problem_type, "softmax")
