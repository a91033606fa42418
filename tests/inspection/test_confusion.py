"""Accuracy and confusion of what `expert_report` goes through."""

from types import SimpleNamespace

import pytest
import torch
from conftest import FRAMES, MEL_BINS, tiny_ast_config
from peft import get_peft_model
from transformers import ASTForAudioClassification

from peft_softmoa import SoftMoAConfig
from peft_softmoa.inspection import Confusion, expert_report
from peft_softmoa.inspection.confusion import Predictions

NAMES = ("dog", "rain", "hum", "bell", "siren")


def classifier(**fields):
    torch.manual_seed(0)
    config = tiny_ast_config(id2label=dict(enumerate(NAMES)), label2id={name: n for n, name in enumerate(NAMES)})
    config.update(fields)
    return get_peft_model(ASTForAudioClassification(config), SoftMoAConfig(num_experts=2, init_weights=False)).eval()


def test_counts_are_those_of_the_predictions():
    model = classifier()
    inputs, labels = 4 * torch.randn(12, FRAMES, MEL_BINS), torch.arange(12) % 3
    with torch.no_grad():
        taken = model(inputs).logits.argmax(-1)
    # The dataset has fewer classes than the model, in another order.
    order = ["hum", "dog", "rain"]
    batches = [
        {"input_values": inputs[:5], "labels": labels[:5]},
        {"input_values": inputs[5:], "labels": labels[5:]},
    ]
    report = expert_report(model, batches, label_names=order, show_progress=False)
    wanted = torch.zeros(3, 5, dtype=torch.int64)
    for label, prediction in zip(labels, taken):
        wanted[label, prediction] += 1
    assert torch.equal(report.confusion.counts, wanted) and report.no_confusion_reason is None
    right = sum(order[label] == NAMES[prediction] for label, prediction in zip(labels, taken))
    assert report.confusion.accuracy == right / 12
    found = report.to_dict()
    assert found["confusion"] == wanted.tolist() and found["accuracy"] == right / 12
    assert found["output_names"] == NAMES and tuple(found["label_names"]) == tuple(order)


def test_mistakes_come_by_their_number():
    confusion = Confusion(torch.tensor([[3, 1, 0], [0, 2, 0], [4, 1, 0]]), ("a", "b", "c"), ("b", "a", "c"))
    assert confusion.correct.tolist() == [1, 0, 0] and confusion.accuracy == pytest.approx(1 / 11)
    assert confusion.mistakes[:2] == [("c", "b", 4, 5), ("a", "b", 3, 4)]
    assert [count for *_, count, _ in confusion.mistakes] == [4, 3, 2, 1]


def test_a_model_without_names_has_those_of_the_dataset():
    config = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
    predictions = Predictions(SimpleNamespace(config=config), ["low", "high"])
    predictions.update(SimpleNamespace(logits=torch.tensor([[0.0, 1.0], [2.0, 1.0]])), torch.tensor([1, 1]))
    assert predictions.result().accuracy == 0.5 and predictions.result().output_names == ("low", "high")


@pytest.mark.parametrize(
    ("config", "output", "why"),
    [
        ({"id2label": {0: "a", 1: "c"}}, {}, "the model has no class 'b'"),
        ({"id2label": {0: "a"}}, {}, "the model has no class 'b'"),
        ({"id2label": {0: "a", 1: "b"}, "problem_type": "multi_label_classification"}, {}, "not for one class a clip"),
        ({"id2label": {0: "a", 1: "b"}}, {}, "does not give a score of each class for each clip"),
        ({"id2label": {0: "a", 1: "b"}}, {"logits": torch.zeros(2, 9, 2)}, "does not give a score of each class"),
    ],
)
def test_what_has_no_accuracy_says_why(config, output, why):
    predictions = Predictions(SimpleNamespace(config=SimpleNamespace(**config)), ["a", "b"])
    predictions.update(SimpleNamespace(**output), torch.tensor([0, 1]))
    assert predictions.result() is None and why in predictions.why_none


def test_without_classes_there_is_neither_confusion_nor_its_reason():
    report = expert_report(classifier(), [{"input_values": torch.randn(2, FRAMES, MEL_BINS)}], show_progress=False)
    assert report.confusion is None and report.no_confusion_reason is None and report.to_dict()["accuracy"] is None
