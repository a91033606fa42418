"""Labels of clips: what rows say, losses with weights, over the batches of a step and of mixed clips."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from peft_softmoa.commands.train import FLAGS
from peft_softmoa.training.losses import compute_loss
from peft_softmoa.training.options import name_flags
from peft_softmoa.training.rows import DatasetSummary
from peft_softmoa.training.tasks import (
    CTC,
    Clip,
    FrameClassification,
    MultiLabel,
    Regression,
    SingleLabel,
    SpeechSeq2Seq,
    make_task,
)

CLIP = Clip(0.0, 16_000, 16_000)
LOGITS = torch.zeros(1, 3)


def read(task, **values):
    return task.parse(values, "data.csv")


@pytest.mark.parametrize(
    "given, expected",
    [("dog, rain", ["dog", "rain"]), ("", []), (" dog ,, dog", ["dog"]), (["dog", "rain"], ["dog", "rain"]), ([], []),
     (None, []), (math.nan, []), (3, ["3"])],
)  # fmt: skip
def test_several_labels_of_one_column(given, expected):
    assert read(MultiLabel(), label=given) == expected


def test_other_separators_and_columns():
    assert read(MultiLabel(separator=";"), label="dog;a, b") == ["dog", "a, b"]
    assert read(MultiLabel(), dog="1", rain=0, bell=True, cat="0.0") == ["dog", "bell"]
    task = MultiLabel(declared={"dog": None, "rain": None}).with_labels(None)
    assert task.label_names == ["dog", "rain"]
    assert task.encode(["rain"], "x", CLIP).tolist() == [0, 1]
    assert read(MultiLabel(declared={"label": ["dog", "rain"]}), label=[1, 0]) == ["rain", "dog"]


WRONG = [
    (SingleLabel(), {"label": 0.5}, "label 0.5 is a float, .*--label_column_name.*--problem_type"),
    (SingleLabel(), {"label": None}, "data.csv: a row has no label"),
    (SingleLabel(), {"label": ["a"]}, "is a list, .*--problem_type"),
    (MultiLabel(), {"label": 0.5}, "label 0.5 is a float, .*--problem_type"),
    (MultiLabel(), {"label": [0.5]}, "label 0.5 is a float, .*--problem_type"),
    (MultiLabel(), {"label": "['dog', 'rain']"}, "column 'label' says .*a list as text.*dog,rain"),
    (MultiLabel(), {"label": {"dog": 1}}, "column 'label' says .*several labels are a list"),
    (MultiLabel(), {"dog": 2, "rain": 0}, "column 'dog' says 2, but it must be 1.*--label_column_name"),
    (MultiLabel(), {"dog": "yes", "rain": 0}, "column 'dog' says 'yes', but it must be 1"),
    (Regression(), {"age": "old"}, "data.csv: column 'age' says 'old', but regression.*--problem_type"),
    (Regression(), {"age": None}, "column 'age' says None"),
    (Regression(), {"age": math.inf}, "column 'age' says inf"),
    (Regression(), {"age": -100}, "column 'age' says -100, which transformers takes"),
    (Regression(declared={"label": ["a", "b"]}), {"label": 1}, "column 'label' has the classes a, b.*--problem_type"),
    (FrameClassification(), {"events": "dog"}, "column 'events' must be a list of events.*got 'dog'"),
    (FrameClassification(), {"events": 3}, "must be a list of events.*got '3'"),
    (FrameClassification(), {"events": [["dog", 0, 1]]}, "must be a list of events.*got"),
    (FrameClassification(), {"events": [{"start": 0, "label": "dog"}]}, "must be a list of events.*got"),
    (FrameClassification(), {"events": [{"start": -1, "end": 1, "label": "dog"}]}, "begins at -1.0 s and ends at 1.0"),
    (FrameClassification(), {"events": [{"start": 2, "end": 1, "label": "dog"}]}, "begins at 2.0 s .*must begin at 0"),
    (FrameClassification(), {"events": [{"start": 0, "end": 1, "label": None}]}, "has no label"),
    (FrameClassification(), {"start": 0, "end": 1}, "--label_column_name must be one column with events"),
    (CTC(), {"text": None}, "data.csv: a row has no label"),
]  # fmt: skip


@pytest.mark.parametrize("task, values, message", WRONG, ids=[f"{type(each).__name__} {of}" for each, of, _ in WRONG])
def test_rows_of_another_kind(task, values, message):
    with pytest.raises(ValueError, match=message) as raised, name_flags(FLAGS):
        read(task, **values)
    assert "\n" not in str(raised.value)


def test_numbers_as_text_are_no_classes():
    """A CSV file has text only."""
    with (
        pytest.raises(ValueError, match=r"The labels are the numbers 0.5, 1, of which .*--problem_type"),
        name_flags(FLAGS),
    ):
        SingleLabel().with_labels(None, DatasetSummary(2, ("0.5", "1")))
    assert SingleLabel().with_labels(None, DatasetSummary(2, ("0", "1"))).label_names == ["0", "1"]
    assert SingleLabel().with_labels(["0.5", "1"]).label_names == ["0.5", "1"]
    assert read(Regression(), age="0.5", height=" 2e1 ") == {"age": 0.5, "height": 20.0}


def test_labels_that_are_none_of_the_classes():
    for task in (SingleLabel(["a"]), MultiLabel(["a"])):
        with pytest.raises(ValueError, match="x.wav: label 'b' is none of the classes a"):
            task.encode(read(task, label="b"), "x.wav", CLIP)
        with pytest.raises(ValueError, match="data has labels that are none of the classes a: b"):
            task.check_known(["a", "b"], "data")


def weighted(kind, weights, counts=None, num_rows=10):
    summary = DatasetSummary(num_rows, ("a", "b", "c"), None, counts)
    return kind(class_weights=weights).with_labels(["a", "b", "c"], summary)


def test_weights_by_frequency():
    counts = {"a": 5, "b": 4, "c": 1}
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 0, 1])
    weights = [10 / (3 * count) for count in (5, 4, 1)]
    expected = sum(weights[y] * -z.log_softmax(0)[y] for z, y in zip(logits, labels)) / 6
    task = weighted(SingleLabel, "balanced", counts)
    torch.testing.assert_close(task.loss(logits, labels), expected)
    torch.testing.assert_close(weighted(SingleLabel, weights).loss(logits, labels), expected)
    # Over the rows, the classes weigh the same.
    assert [weight * count for weight, count in zip(weights, (5, 4, 1))] == pytest.approx([10 / 3] * 3)
    several = (torch.randn(6, 3) > 0).float()
    positive = torch.tensor([1.0, 1.5, 9.0])
    losses = -(positive * several * logits.sigmoid().log() + (1 - several) * (-logits).sigmoid().log())
    torch.testing.assert_close(weighted(MultiLabel, "balanced", counts).loss(logits, several), losses.mean())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SingleLabel(class_weights="even"), "'balanced', or a positive number"),
        (lambda: SingleLabel(class_weights=[1.0, 0.0]), "a positive number for each class, got"),
        (lambda: SingleLabel(class_weights=[1.0, math.nan]), "a positive number"),
        (lambda: weighted(SingleLabel, [1.0, 2.0]), "has 2 weights for 3 classes"),
        (lambda: weighted(SingleLabel, "balanced").loss(LOGITS, torch.tensor([0])), "without reading its audio"),
        (
            lambda: weighted(SingleLabel, "balanced", {"a": 1, "b": 1}).loss(LOGITS, torch.tensor([0])),
            "no row .* has c",
        ),
        (
            lambda: weighted(MultiLabel, "balanced", {"a": 1, "b": 1, "c": 10}).loss(LOGITS, LOGITS),
            "every row .* has c",
        ),
        (lambda: FrameClassification(class_weights="balanced"), "how many frames .* is not counted"),
        (
            lambda: make_task("audio-classification", problem_type="regression", class_weights="balanced"),
            "`class_weights` does not go with `problem_type=regression`",
        ),
        (lambda: make_task("ctc", class_weights="balanced"), "`class_weights` does not go with `task=ctc`"),
        (lambda: make_task("ctc", problem_type="regression"), "`problem_type` must be left out for `task=ctc`"),
        (lambda: make_task("audio-classification", problem_type="other"), "must be one of single_label_classification"),
        (lambda: make_task("speech"), "`task` must be one of audio-classification"),
    ],
)
def test_options_that_do_not_go_together(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TASKS = {
    "single": (SingleLabel(["a", "b", "c"]), torch.randn(8, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])),
    "weights": (weighted(SingleLabel, [1.0, 2.0, 5.0]), torch.randn(8, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])),
    "several": (MultiLabel(["a", "b", "c"]), torch.randn(8, 3), (torch.randn(8, 3) > 0).float()),
    "numbers": (Regression(["a", "b"]), torch.randn(8, 2), torch.randn(8, 2)),
    "frames": (FrameClassification(["a", "b"]), torch.randn(8, 5, 2), (torch.randn(8, 5, 2) > 0).float()),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_losses_of_the_batches_of_a_step_sum_up_to_the_step(name):
    task, logits, labels = TASKS[name]
    if name == "frames":
        labels = labels.clone()
        labels[5, 2:] = -100
    whole = task.loss(logits, labels)
    num_items = labels.ne(-100).sum()  # as the Trainer counts
    torch.testing.assert_close(task.loss(logits, labels, num_items), whole)
    parts = [task.loss(logits[part], labels[part], num_items) for part in (slice(5), slice(5, 8))]
    torch.testing.assert_close(sum(parts), whole)


def test_each_loss_is_the_formula():
    for name, expected in {
        "single": functional.cross_entropy(*TASKS["single"][1:]),
        "several": functional.binary_cross_entropy_with_logits(*TASKS["several"][1:]),
        "numbers": functional.mse_loss(*TASKS["numbers"][1:]),
        "frames": functional.binary_cross_entropy_with_logits(*TASKS["frames"][1:]),
    }.items():
        task, logits, labels = TASKS[name]
        torch.testing.assert_close(task.loss(logits, labels), expected)
        torch.testing.assert_close(task.loss(logits.half(), labels), expected, rtol=1e-2, atol=1e-2)


def test_labels_of_frames_are_padded_and_the_padding_does_not_count():
    task = FrameClassification(["a"])
    labels = task.batch_labels([np.ones((2, 1), np.float32), np.zeros((4, 1), np.float32)])
    assert labels.tolist() == [[[1], [1], [-100], [-100]], [[0], [0], [0], [0]]]
    logits = torch.randn(2, 4, 1)
    expected = functional.binary_cross_entropy_with_logits(
        torch.cat([logits[0, :2], logits[1]]), torch.cat([labels[0, :2], labels[1]])
    )
    torch.testing.assert_close(task.loss(logits, labels), expected)
    with pytest.raises(ValueError, match=r"\(2, 3, 1\) logits .* for \(2, 4, 1\) labels"):
        task.loss(logits[:, :3], labels)


def test_compute_loss_of_a_loop(tiny_ast, spectrograms):
    labels = torch.tensor([0, 3, 1])
    inputs = {"input_values": spectrograms, "labels": labels}
    names = [str(index) for index in range(5)]
    expected = functional.cross_entropy(tiny_ast(spectrograms).logits, labels)
    torch.testing.assert_close(compute_loss(tiny_ast, inputs, SingleLabel(names)), expected)
    weighted = SingleLabel(names, class_weights=[1.0] * 5)
    torch.testing.assert_close(compute_loss(tiny_ast, inputs, weighted), expected)
    mixed = {**inputs, "labels": functional.one_hot(labels, 5).float()}
    torch.testing.assert_close(compute_loss(tiny_ast, mixed, SingleLabel(names)), expected)


@pytest.mark.parametrize("task", [CTC(), SpeechSeq2Seq()])
def test_texts_are_not_mixed(task):
    with pytest.raises(ValueError, match=f"`mixup_alpha` mixes .* `task={task.name}` are not"):
        task.mixable(torch.zeros(2, 3, dtype=torch.long))
