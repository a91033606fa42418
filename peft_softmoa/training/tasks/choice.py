"""From the name of a task to the task, and from an adapter to its task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Optional, Union

from peft import PeftConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from .base import Task
from .frames import FrameClassification
from .labels import MultiLabel, Regression, SingleLabel
from .text import CTC, SpeechSeq2Seq

CLASSIFICATION: tuple[type[Any], ...] = (SingleLabel, MultiLabel, Regression)
# By name; where several have one, the problem type chooses, and the first is the default.
TASKS: dict[str, tuple[type[Task], ...]] = {
    "audio-classification": CLASSIFICATION,
    "audio-frame-classification": (FrameClassification,),
    "ctc": (CTC,),
    "speech-seq2seq": (SpeechSeq2Seq,),
}
# The classes of models, by the name of the task.
MODELS = {
    "audio-classification": MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "audio-frame-classification": MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES,
    "ctc": MODEL_FOR_CTC_MAPPING_NAMES,
    "speech-seq2seq": MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}


def make_task(name: str, *, problem_type: Optional[str] = None, **options: Any) -> Task:
    """Make a task.

    Args:
        name (str): one of `TASKS`.
        problem_type (str, optional): of audio classification: `"single_label_classification"`,
            `"multi_label_classification"` or `"regression"`. Default: the first.
        options (Any): the task's own, such as `class_weights`. Those that are None are left out.

    Returns:
        Task: the task, without classes.

    Raises:
        ValueError: if there is no such task, or an option is of another one.
    """
    if name not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got '{name}'.")
    kinds = {getattr(each, "problem_type", None): each for each in TASKS[name]}
    if problem_type not in (None, *kinds):
        possible = ", ".join(str(each) for each in kinds if each)
        raise ValueError(
            f"`problem_type` must be {f'one of {possible}' if possible else 'left out'} for `task={name}`, got "
            f"'{problem_type}'."
        )
    kind = kinds[problem_type] if problem_type else TASKS[name][0]
    given = {option: value for option, value in options.items() if value not in (None, False)}
    known = {entry.name for entry in fields(kind) if not entry.name.startswith("_")}
    for option in given.keys() - known:
        others = [
            each
            for each, other in kinds.items()
            if option in {entry.name for entry in fields(other)} and each != problem_type
        ]
        chosen = f"`problem_type={problem_type or next(iter(kinds))}`" if others else f"`task={name}`"
        instead = f": leave it out, or give `problem_type={others[0]}`" if others else ": leave it out"
        raise ValueError(f"`{option}` does not go with {chosen}{instead}.")
    return kind(**given)


def parse_weights(words: Union[str, Sequence[Any], None]) -> Any:
    """The weights of classes from the words of a command line.

    Args:
        words (str or sequence, optional): `balanced`, or numbers.

    Returns:
        Any: `"balanced"`, a list of numbers, or None.

    Raises:
        ValueError: if they are neither.
    """
    if words in (None, "balanced"):
        return words
    if list(words or ()) == ["balanced"]:
        return "balanced"
    try:
        return [float(word) for word in words or ()]
    except ValueError:
        given = words if isinstance(words, str) else " ".join(map(str, words or ()))
        raise ValueError(f"`class_weights` must be balanced, or a number for each class, got {given}.") from None


def find_task(config: PeftConfig, model: Any, **options: Any) -> Task:
    """Find out what an adapter was trained for.

    Args:
        config (PeftConfig): the adapter's config, which names the class of the model, the classes and the loss.
        model (nn.Module): the model, if the config does not name its class.
        options (Any): as for `make_task`.

    Returns:
        Task: the task, with the adapter's classes.

    Raises:
        ValueError: if the model is for none of the tasks.
    """
    base = (config.auto_mapping or {}).get("base_model_class") or type(model).__name__
    for name, models in MODELS.items():
        if base in models.values():
            problem = getattr(config, "problem_type", None) if name == "audio-classification" else None
            task = make_task(name, problem_type=problem, **options)
            names = getattr(config, "label_names", None)
            return task.with_labels(names) if names else task
    raise ValueError(f"The adapter is for a {base}, which is trained for none of the tasks {', '.join(TASKS)}.")
