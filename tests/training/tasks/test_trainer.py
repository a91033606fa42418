"""Tasks in the Trainer and the plain loop: steps of several batches, mixup, best checkpoints, interrupted runs."""

import numpy as np
import pytest
import torch
import train_audio_classification
import train_no_trainer
from made_tasks import WORDS, make_base, options, tone, write_clips
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoFeatureExtractor,
    EvalPrediction,
    Seq2SeqTrainingArguments,
    Wav2Vec2ForSequenceClassification,
)

from peft_softmoa import SoftMoAConfig
from peft_softmoa.commands.cross_validate import main as cross_validate
from peft_softmoa.commands.train import main as train
from peft_softmoa.commands.train import parse
from peft_softmoa.training import AudioTrainer, DataOptions, augment, load_stream, mixup
from peft_softmoa.training.rows import DatasetSummary
from peft_softmoa.training.tasks import MultiLabel, Regression, SingleLabel
from peft_softmoa.training.tasks.text import make_tokenizer

EVENTS = {"low": [{"start": 0, "end": 0.2, "label": "a"}], "high": [{"start": 0.1, "end": 0.5, "label": "b"}]}
MULTI = {"problem_type": "multi_label_classification"}
# By name: the dataset's column and values, and options.
KINDS = {
    "single": ("label", {"low": "a", "high": "b"}, {}),
    "weights": ("label", {"low": "a", "high": "b"}, {"class_weights": ["1", "4"]}),
    "several": ("label", {"low": "a,b", "high": "b"}, MULTI),
    "numbers": ("label", {"low": 1.0, "high": 2.5}, {"problem_type": "regression"}),
    "frames": ("events", EVENTS, {"task": "audio-frame-classification"}),
    "ctc": ("text", {"low": "ab", "high": "ba"}, {"task": "ctc"}),
}
ONE_STEP = {
    "num_train_epochs": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "weight_decay": 0,
    "lr_scheduler_type": "constant", "save_strategy": "no", "eval_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    quiet = {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation", "feat_proj", "final")}
    make_base(folder / "frames", "Wav2Vec2", "ForAudioFrameClassification", **quiet)
    tokens = make_tokenizer(["[PAD]", "[UNK]", "|", "a", "b", "c"])
    make_base(folder / "ctc", "Wav2Vec2", "ForCTC", tokens, vocab_size=6, pad_token_id=0, **quiet)
    make_base(folder / "clips", "Wav2Vec2", "ForSequenceClassification", **quiet)
    return folder


def base_of(bases, kind):
    return bases / (kind if kind in ("frames", "ctc") else "clips")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("routing", ["soft", "top_k"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_several_batches_is_a_step_of_one(kind, routing, bases, tmp_path):
    """Also where a model takes the number of labels of a step without dividing by it, as wav2vec 2.0's do.

    The clips are of unequal lengths, but for the models' own losses, of which a step has the mean over its batches. The
    balance of the routers is of a batch, so that it is the same only if the batches are.
    """
    column, values, arguments = KINDS[kind]
    folder = write_clips(tmp_path / "data", column, values, count=2)
    given = {**arguments, **ONE_STEP, "routing": routing, "shuffle_buffer_size": 0}
    if routing == "top_k":
        given["router_aux_loss_coef"] = 0.5
        import soundfile

        for path in folder.glob("*.wav"):
            soundfile.write(path, tone(500, 8000), 16_000)
        rows = (folder / "metadata.jsonl").read_text().splitlines()
        (folder / "metadata.jsonl").write_text("\n".join(sorted(rows, key=lambda row: "high" in row)) + "\n")
        (folder / "metadata.jsonl").write_text("\n".join([rows[0], rows[1], rows[0], rows[1]]) + "\n")
    for name, size, steps in (("one", 4, 1), ("several", 2, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        train(options(base_of(bases, kind), folder, tmp_path / name, **given, **sizes))
    one, several = weights(tmp_path / "one"), weights(tmp_path / "several")
    assert one.keys() == several.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor, rtol=1e-3, atol=2e-5)


def test_balanced_weights_lift_the_recall_of_a_rare_class():
    """A logistic regression on the spectra of tones, of which 1 of 50 is of the rare class, and the pitches overlap."""
    generator = np.random.default_rng(0)

    def clips(often, rare):
        pitches = [*generator.normal(400, 50, often), *generator.normal(500, 50, rare)]
        spectra = np.abs([np.fft.rfft(tone(pitch, 1600))[20:80] for pitch in pitches])
        labels = torch.tensor([0] * often + [1] * rare)
        return torch.tensor(spectra / spectra.max(), dtype=torch.float32), labels

    (spectra, labels), (test_spectra, test_labels) = clips(500, 10), clips(200, 200)
    summary = DatasetSummary(510, ("often", "rare"), None, {"often": 500, "rare": 10})
    found = {}
    for weights in (None, "balanced"):
        task = SingleLabel(class_weights=weights, metrics=["unweighted_average_recall"]).with_labels(None, summary)
        torch.manual_seed(0)
        head = torch.nn.Linear(60, 2)
        optimizer = torch.optim.AdamW(head.parameters(), 0.05)
        for _ in range(200):
            optimizer.zero_grad()
            task.loss(head(spectra), labels).backward()
            optimizer.step()
        prediction = EvalPrediction(head(test_spectra).detach().numpy(), test_labels.numpy())
        found[weights] = task.score(prediction)["unweighted_average_recall"]
    assert found["balanced"] > found[None] + 0.1, found


def test_mixup_by_hand(monkeypatch):
    inputs = {"input_values": torch.randn(3, 8), "attention_mask": torch.tensor([[1] * 8, [1] * 4 + [0] * 4, [1] * 8])}
    labels = torch.eye(3)
    order = torch.tensor([1, 2, 0])
    monkeypatch.setattr(augment.torch, "randperm", lambda size: order)
    shares = torch.tensor([1.0, 0.25, 0.5])
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: shares)
    mixed = mixup(inputs, labels, 0.3)
    values = inputs["input_values"]
    expected = torch.stack([values[0], 0.25 * values[1] + 0.75 * values[2], 0.5 * values[2] + 0.5 * values[0]])
    torch.testing.assert_close(mixed["input_values"], expected)
    assert mixed["labels"].tolist() == [[1, 0, 0], [0, 0.25, 0.75], [0.5, 0, 0.5]]
    assert mixed["attention_mask"].sum(dim=1).tolist() == [8, 8, 8]
    shares[:] = 1.0
    same = mixup(inputs, labels, 0.3)
    assert torch.equal(same["input_values"], values) and torch.equal(same["labels"], labels)
    # Labels of frames: padding stays padding, and is nobody's label.
    shares[:] = 0.5
    frames = torch.tensor([[[1.0], [1.0], [0.0]], [[1.0], [-100.0], [-100.0]], [[0.0], [0.0], [-100.0]]])
    mixed = mixup({"input_values": values}, frames, 0.3)["labels"]
    assert mixed[..., 0].tolist() == [[1.0, 0.5, 0.0], [0.5, -100, -100], [0.5, 0.5, -100]]
    with pytest.raises(ValueError, match="`mixup_alpha` must be positive"):
        mixup(inputs, labels, -1.0)


@pytest.mark.parametrize("kind", ["single", "several", "numbers", "frames"])
def test_mixup_trains_and_resumes(kind, bases, tmp_path, monkeypatch):
    """The shares come from the generator that a checkpoint keeps."""
    column, values, arguments = KINDS[kind]
    folder = write_clips(tmp_path / "data", column, values)
    given = {**arguments, "mixup_alpha": 0.4, "per_device_train_batch_size": 2, "eval_strategy": "no"}
    train(options(base_of(bases, kind), folder, tmp_path / "whole", **given))
    mixed, count = augment.mixup, []

    def cut_off(*args):
        count.append(args)
        if len(count) == 4:
            raise KeyboardInterrupt
        return mixed(*args)

    monkeypatch.setattr("peft_softmoa.training.trainer.mixup", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(options(base_of(bases, kind), folder, tmp_path / "cut", **given))
    train(options(base_of(bases, kind), folder, tmp_path / "cut", **given))
    assert len(count) == 6
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


def test_an_interrupted_run_with_texts_resumes_to_the_same_bits(tmp_path, monkeypatch):
    make_base(tmp_path / "base", "Wav2Vec2", "Model")
    folder = write_clips(tmp_path / "data", "text", WORDS)
    given = {"task": "ctc", "per_device_train_batch_size": 2}
    whole = train(options(tmp_path / "base", folder, tmp_path / "whole", **given))
    step, count = AudioTrainer.training_step, []

    def cut_off(*args, **kwargs):
        count.append(args)
        if len(count) == 5:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(AudioTrainer, "training_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path / "base", folder, tmp_path / "cut", **given))
    monkeypatch.undo()
    cut = train(options(tmp_path / "base", folder, tmp_path / "cut", **given))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert cut.state.log_history[-1]["eval_wer"] == whole.state.log_history[-1]["eval_wer"]
    with pytest.raises(ValueError, match="text_case was .*None.* and is .*upper"):
        train(options(tmp_path / "base", folder, tmp_path / "cut", **given, text_case="upper"))


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        ("ctc", {"mixup_alpha": 0.2}, "--mixup_alpha mixes classes and numbers, which the labels of .*ctc are not"),
        ("single", {"mixup_alpha": -0.2}, "--mixup_alpha must be positive"),
        ("single", {"class_weights": ["1", "2", "3"]}, "--class_weights has 3 weights for 2 classes"),
        ("single", {"class_weights": ["x"]}, "--class_weights must be balanced, or a number for each class, got x"),
        ("weights", {"label_smoothing_factor": 0.1}, "--label_smoothing_factor is for .*class weights: leave it out"),
        ("single", {"label_smoothing_factor": 0.1, "mixup_alpha": 0.2}, "--label_smoothing_factor is for .*mixup"),
        ("several", {"label_smoothing_factor": 0.1}, "--label_smoothing_factor is for .*MultiLabel"),
        ("ctc", {"label_smoothing_factor": 0.1}, "--label_smoothing_factor is for .*CTC"),
        ("numbers", {"problem_type": "single_label_classification"}, "label 1.0 is a float, .*--problem_type"),
        ("single", {"problem_type": "regression"}, "column 'label' says 'a', .*--label_column_name or --problem_type"),
        (
            "numbers",
            {"metric_for_best_model": "mae", "greater_is_better": True},
            "--metric_for_best_model mae is the better the lower",
        ),
    ],
)
def test_what_does_not_go_together(kind, arguments, message, bases, tmp_path):
    column, values, given = KINDS[kind]
    folder = write_clips(tmp_path / "data", column, values)
    with pytest.raises(ValueError, match=message) as raised:
        train(options(base_of(bases, kind), folder, tmp_path / "out", **{**given, **arguments}))
    assert "\n" not in str(raised.value)


def test_label_smoothing_of_one_label(bases, tmp_path):
    folder = write_clips(tmp_path / "data", *KINDS["single"][:2])
    train(options(bases / "clips", folder, tmp_path / "out", label_smoothing_factor=0.1, num_train_epochs=1))


def test_the_best_error_rate_is_the_lowest(bases, tmp_path):
    words = options("x", "y", "z", task="ctc", metric_for_best_model="wer")
    assert parse(words).training.greater_is_better is False
    assert parse([*words, "--greater_is_better", "True"]).training.greater_is_better is True
    assert parse(options("x", "y", "z", metric_for_best_model="eval_mae")).training.greater_is_better is False
    assert parse(options("x", "y", "z", metric_for_best_model="accuracy")).training.greater_is_better is True
    assert parse(options("x", "y", "z")).training.greater_is_better is None


def test_streams_of_two_tasks(bases, tmp_path):
    extract = AutoFeatureExtractor.from_pretrained(bases / "clips")
    folder = str(write_clips(tmp_path / "data", "a,b", {"low": (0, 1), "high": (1, 0)}))
    columns = DataOptions(label_column="a,b")
    one, other = (load_stream(folder, "train", extract, columns, task=task) for task in (MultiLabel(), Regression()))
    base = Wav2Vec2ForSequenceClassification.from_pretrained(bases / "clips")
    model = get_peft_model(base, SoftMoAConfig(label_names=["a", "b"], modules_to_save=["classifier"]))
    arguments = Seq2SeqTrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True, max_steps=1)
    trainer = AudioTrainer(model, arguments, train_dataset=one, eval_dataset=other)
    with pytest.raises(ValueError, match="was loaded for Regression, but the Trainer's first stream is for MultiLabel"):
        trainer.evaluate()
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("kind", ["several", "ctc"])
def test_the_plain_loop(kind, bases, tmp_path):
    """As the Trainer does it, in fewer than 200 lines."""
    column, values, arguments = KINDS[kind]
    folder = write_clips(tmp_path / "data", column, values)
    given = options(base_of(bases, kind), folder, tmp_path / "loop", **arguments)
    words, skip = [], {"--report_to", "--disable_tqdm", "--per_device_eval_batch_size"}
    for name, value in zip(given[::2], given[1::2]):
        words += [] if name in skip else [name, value]
    metrics = train_no_trainer.main(words)
    trainer = train(options(base_of(bases, kind), folder, tmp_path / "trainer", **arguments))
    last = trainer.state.log_history[-1]
    assert metrics == pytest.approx({name: last[f"eval_{name}"] for name in metrics})
    one, other = weights(tmp_path / "loop"), weights(tmp_path / "trainer")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)
    with open(train_no_trainer.__file__) as file:
        assert len(file.readlines()) < 200


def test_mixup_in_the_plain_loop(bases, tmp_path):
    folder = write_clips(tmp_path / "data", *KINDS["single"][:2])
    words = ["--model_name_or_path", bases / "clips", "--dataset_name", folder, "--output_dir", tmp_path / "out"]
    words += ["--train_rows", "fold=1", "--eval_split_name", "train", "--eval_rows", "fold=2"]
    metrics = train_no_trainer.main([*map(str, words), "--mixup_alpha", "0.3", "--num_train_epochs", "1"])
    assert 0 <= metrics["accuracy"] <= 1


def test_the_script_to_copy(bases, tmp_path):
    column, values, arguments = KINDS["numbers"]
    folder = write_clips(tmp_path / "data", column, values)
    metrics = train_audio_classification.main(options(bases / "clips", folder, tmp_path / "out", **arguments))
    assert np.isfinite([metrics["eval_mae"], metrics["eval_loss"]]).all()


def test_cross_validation_of_numbers(bases, tmp_path):
    folder = write_clips(tmp_path / "data", "age", {"low": 1, "high": 2.5})
    arguments = {"problem_type": "regression", "label_column_name": "age", "num_folds": 2, "num_train_epochs": 1}
    words = options(bases / "clips", folder, tmp_path / "out", **arguments)
    for name in ("--train_rows", "--eval_rows", "--eval_split_name"):
        index = words.index(name)
        words = words[:index] + words[index + 2 :]
    found = cross_validate(words)
    assert set(found["mean"]) == {"mae", "pearson"} and set(found["folds"]) == {"1", "2"}
