"""Classes of streams and models are compared: a label is only a number."""

from types import SimpleNamespace

import pytest
import torch
import train_no_trainer
from conftest import tiny_ast_config, training_options
from peft import PeftModel, get_peft_model
from transformers import ASTForAudioClassification, AutoFeatureExtractor, TrainingArguments

from peft_softmoa import SoftMoAConfig
from peft_softmoa.training import (
    AudioTrainer,
    DataOptions,
    SingleLabel,
    check_classes,
    classification_metrics,
    load_stream,
    run,
)


@pytest.fixture
def streams(base_folder, tones_folder):
    """Streams of the tones, by the classes that they count with."""

    def load(*label_names, rows="fold=2", **options):
        extractor = AutoFeatureExtractor.from_pretrained(base_folder)
        data = DataOptions(**options)
        names = label_names or None
        return load_stream(
            str(tones_folder),
            "train",
            extractor,
            data,
            rows=rows,
            label_names=names,
            training=False,
            needs_length=False,
        )

    return load


def adapted(*label_names, base_labels=2):
    torch.manual_seed(0)
    model = ASTForAudioClassification(tiny_ast_config(num_labels=base_labels))
    return get_peft_model(model, SoftMoAConfig(modules_to_save=["classifier"], label_names=list(label_names) or None))


def trainer_of(model, folder, **datasets):
    arguments = TrainingArguments(str(folder), max_steps=1, report_to="none", use_cpu=True)
    return AudioTrainer(model, arguments, compute_metrics=classification_metrics, **datasets)


def test_an_evaluation_stream_that_lacks_a_class(streams, tmp_path):
    """Its only class would be number 0, which is another one in training."""
    low = streams(rows="label=low")
    assert low.label_names == ["low"]
    message = "The evaluation stream has other classes than the training stream: it lacks 'high'. Load it with"
    with pytest.raises(ValueError, match=message):
        trainer_of(adapted("high", "low"), tmp_path, train_dataset=streams(), eval_dataset=low)
    trainer = trainer_of(adapted("high", "low"), tmp_path, train_dataset=streams())
    for use in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="stream has other classes than the training stream: it lacks 'high'"):
            use(low)
    with pytest.raises(ValueError, match="The dogs stream has other classes than the training stream: it lacks 'high'"):
        trainer_of(
            adapted("high", "low"), tmp_path, train_dataset=streams(), eval_dataset={"all": streams(), "dogs": low}
        )
    with pytest.raises(ValueError, match="it lacks 'high'"):
        trainer.evaluate({"all": streams(), "dogs": low})


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("low", "high"), "class 0 is 'high' and not 'low'"),
        (("high", "low", "noise"), "it lacks 'noise'"),
        (("high",), "it has 'low' besides"),
        (
            ("a", "b", "c", "d", "e", "f", "g"),
            "it lacks 'a', 'b', 'c', 'd', 'e' and 2 more, it has 'high', 'low' besides",
        ),
    ],
)
def test_the_model(streams, tmp_path, classes, message):
    for dataset in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"stream has other classes than the model: {message}. Give the adapter"):
            trainer_of(adapted(*classes), tmp_path, **{dataset: streams("high", "low")})


def test_a_model_without_names_is_compared_by_number(streams, tmp_path):
    trainer_of(adapted(), tmp_path, train_dataset=streams())
    with pytest.raises(ValueError, match="other classes than the model: the model has 5, the stream 2"):
        trainer_of(adapted(base_labels=5), tmp_path, train_dataset=streams())


def test_the_active_adapter_counts(streams, tmp_path):
    model = adapted("high", "low")
    assert isinstance(model, PeftModel)
    model.add_adapter("other", SoftMoAConfig(modules_to_save=["classifier"], label_names=["low", "high"]))
    trainer = trainer_of(model, tmp_path, train_dataset=streams(), eval_dataset=streams())
    trainer.evaluate()
    model.set_adapter("other")
    for use in (trainer.train, trainer.evaluate, lambda: trainer.predict(streams())):
        with pytest.raises(ValueError, match="other classes than the model: class 0 is 'high' and not 'low'"):
            use()


def test_the_same_classes_pass(streams, tmp_path):
    datasets = {"first": streams(), "second": streams("high", "low", rows="label=low")}
    trainer = trainer_of(adapted("high", "low"), tmp_path, train_dataset=streams(), eval_dataset=datasets)
    metrics = trainer.evaluate()
    assert {"eval_first_accuracy", "eval_second_accuracy"} <= set(metrics)
    assert trainer.predict(datasets["second"]).predictions.shape == (8, 2)
    # Without labels there is nothing to compare, nor in data of another kind.
    check_classes({"training": streams(label_column=None, rows=None), "evaluation": [1, 2]}, adapted("a", "b"))


def test_the_plain_loop_compares_too(base_folder, tones_folder, tmp_path, monkeypatch):
    load = run.load_stream

    def load_low(*args, **options):
        if options["task"].label_names:
            options.update(rows="label=low", task=SingleLabel())
        return load(*args, **options)

    monkeypatch.setattr(run, "load_stream", load_low)
    options = training_options(base_folder, tones_folder, tmp_path / "out")
    index = options.index("--report_to")
    with pytest.raises(ValueError, match="The evaluation stream has other classes .* it lacks 'high'"):
        train_no_trainer.main(options[:index] + options[index + 2 :])


def test_a_head_that_the_config_does_not_know(streams):
    """A model of one's own may have the config of its encoder, with the two classes that transformers puts there."""

    class Own(torch.nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.config = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
            self.head = torch.nn.Linear(4, outputs)

    stream = streams("high", "low", "middle")
    check_classes({"training": stream}, Own(3))
    with pytest.raises(ValueError, match="the model has 2, the stream 3"):
        check_classes({"training": stream}, Own(2))
