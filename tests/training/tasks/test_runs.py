"""Each task through the command: train, evaluate, save, and the same again in a new process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from huggingface_hub import ModelCard
from made_tasks import (
    WHISPER_TOKENS,
    WORDS,
    make_base,
    options,
    predict,
    tone,
    whisper_tokenizer,
    word_tokenizer,
    write_clips,
)
from transformers import pipeline

from peft_softmoa.commands.classify import main as classify
from peft_softmoa.commands.inspect import main as inspect
from peft_softmoa.commands.train import main as train
from peft_softmoa.saving.card import METRICS
from peft_softmoa.training.tasks.text import make_tokenizer

SEVERAL = {"low": ["dog", "rain"], "middle": ["rain"], "high": []}
EVENTS = {
    "low": [{"start": 0.0, "end": 0.2, "label": "dog"}, {"start": 0.1, "end": 0.15, "label": "bell"}],
    "middle": [{"start": 0.05, "end": 0.3, "label": "rain"}],
    "high": [],
}
MULTI = {"problem_type": "multi_label_classification"}
NUMBERS = {"problem_type": "regression"}
FRAMES = {"task": "audio-frame-classification"}
TEXTS = {"task": "ctc"}
# One epoch, and one evaluation after it.
ONE_EPOCH = {"learning_rate": 0.02, "num_train_epochs": 1, "save_strategy": "no", "eval_strategy": "steps"}
# Options of `train` that `evaluate` takes too.
SHARED = ("label_column_name", "label_separator", "text_case", "normalize_text", "metrics", "max_length_seconds")
LIST = Features({"file_name": Value("string"), "fold": Value("int64"), "label": List(Value("string"))})
CLASSES = Features({**LIST, "label": List(ClassLabel(names=["dog", "rain"]))})


def parquet(folder, values, features):
    """The same rows as a Parquet file with the audio in it."""
    source = write_clips(folder / "clips", "label", values)
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    rows = [
        {**row, "audio": {"bytes": (source / row["file_name"]).read_bytes(), "path": row["file_name"]}} for row in rows
    ]
    audio = {"audio": {"bytes": Value("binary"), "path": Value("string")}}
    (folder / "rows").mkdir()
    Dataset.from_list(rows, features=Features({**features, **audio})).to_parquet(folder / "rows" / "train.parquet")
    return folder / "rows"


def ctc_base(folder, family):
    """A checkpoint for CTC with a tokenizer of its own, whose blank is not the first of its tokens."""
    tokens = ["|", "A", "B", "C", "[UNK]", "[PAD]"]
    return make_base(folder, family, "ForCTC", make_tokenizer(tokens), vocab_size=len(tokens), pad_token_id=5)


# By name: the base model, the dataset, and options.
CASES = {
    "single, AST": ("AST", lambda to: write_clips(to, "label", {"low": "a", "high": "b"}), {}),
    "single, wav2vec 2.0": ("Wav2Vec2", lambda to: write_clips(to, "label", {"low": 1, "high": 0}), {}),
    "several as text, AST": (
        "AST",
        lambda to: write_clips(to, "label", {key: "; ".join(value) for key, value in SEVERAL.items()}),
        {**MULTI, "label_separator": ";"},
    ),
    "several as lists, wav2vec 2.0": ("Wav2Vec2", lambda to: write_clips(to, "label", SEVERAL), MULTI),
    "several as lists in Parquet, AST": ("AST", lambda to: parquet(to, SEVERAL, LIST), MULTI),
    "several declared in Parquet, wav2vec 2.0": ("Wav2Vec2", lambda to: parquet(to, SEVERAL, CLASSES), MULTI),
    "a column for each class, AST": (
        "AST",
        lambda to: write_clips(to, "rain,dog", {"low": (1, 1), "middle": ("1", "0"), "high": (0, False)}),
        {**MULTI, "label_column_name": "rain,dog"},
    ),
    "a number, AST": (
        "AST", lambda to: write_clips(to, "age", {"low": "0.5", "high": 2}), {**NUMBERS, "label_column_name": "age"}
    ),
    "numbers, wav2vec 2.0": (
        "Wav2Vec2",
        lambda to: write_clips(to, "valence,arousal", {"low": (0.1, -1), "middle": (0.4, 1.5), "high": (1, 3)}),
        {**NUMBERS, "label_column_name": "valence,arousal"},
    ),
    "frames, wav2vec 2.0": (
        "Wav2Vec2 frames", lambda to: write_clips(to, "events", EVENTS), {**FRAMES, "max_length_seconds": 0.45}
    ),
    "frames as JSON, Wav2Vec2-BERT": (
        "Wav2Vec2Bert frames",
        lambda to: write_clips(to, "events", {key: json.dumps(value) for key, value in EVENTS.items()}),
        FRAMES,
    ),
    "frames, WavLM": ("WavLM frames", lambda to: write_clips(to, "events", EVENTS), FRAMES),
    "CTC with a new vocabulary, wav2vec 2.0": ("Wav2Vec2 backbone", lambda to: write_clips(to, "text", WORDS), TEXTS),
    "CTC with a new vocabulary, Wav2Vec2-BERT": (
        "Wav2Vec2Bert backbone", lambda to: write_clips(to, "text", WORDS), TEXTS
    ),
    "CTC with its vocabulary, wav2vec 2.0": (
        "Wav2Vec2 CTC", lambda to: write_clips(to, "text", WORDS), {**TEXTS, "text_case": "upper"}
    ),
    "CTC with its vocabulary, HuBERT": (
        "Hubert CTC",
        lambda to: write_clips(to, "sentence", WORDS),
        {**TEXTS, "text_case": "upper", "label_column_name": "sentence", "metrics": ["cer"]},
    ),
    "a decoder, Whisper": ("Whisper", lambda to: write_clips(to, "text", WORDS), {"task": "speech-seq2seq"}),
    "a decoder, Speech2Text": ("Speech2Text", lambda to: write_clips(to, "text", WORDS), {"task": "speech-seq2seq"}),
    "a decoder, Moonshine": ("Moonshine", lambda to: write_clips(to, "text", WORDS), {"task": "speech-seq2seq"}),
}  # fmt: skip
RECOGNIZER = "automatic-speech-recognition"
RECOGNITION = [name for name in CASES if "CTC" in name or "decoder" in name]
MULTI_LABEL = [name for name in CASES if "several" in name or "column" in name]

NEW_PROCESS = """
import json, sys
import numpy as np
from peft_softmoa.commands.evaluate import main as evaluate
from peft_softmoa.inference.loading import load_adapter
from made_tasks import predict

for adapter, words, output in json.load(sys.stdin):
    evaluate([adapter, *words, "--output", output])
    np.save(output + ".npy", predict(*load_adapter(adapter)))
"""


def make_model(folder, kind):
    family, _, use = kind.partition(" ")
    if use == "CTC":
        return ctc_base(folder, family)
    if family == "Whisper":
        return make_base(folder, family, "ForConditionalGeneration", whisper_tokenizer(), **WHISPER_TOKENS)
    if family in ("Speech2Text", "Moonshine"):
        return make_base(folder, family, "ForConditionalGeneration", word_tokenizer())
    classifier = "ForAudioClassification" if family == "AST" else "ForSequenceClassification"
    return make_base(
        folder, family, {"frames": "ForAudioFrameClassification", "backbone": "Model"}.get(use, classifier)
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    found, jobs = {}, []
    for index, (name, (kind, write, arguments)) in enumerate(CASES.items()):
        base, data, output = (folder / str(index) / each for each in ("base", "data", "adapter"))
        make_model(base, kind)
        dataset = write(data)
        trainer = train(options(base, dataset, output, **ONE_EPOCH, **arguments))
        found[name] = trainer, output, dataset
        shared = {key: value for key, value in arguments.items() if key in SHARED}
        words = options(base, dataset, output, **shared)
        start = words.index("--output_dir")
        words = [
            "--dataset_name",
            str(dataset),
            "--split",
            "train",
            "--rows",
            "fold=2",
            "--batch_size",
            "4",
            *words[start + 2 :],
        ]
        jobs.append((str(output), words, str(folder / f"{index}.json")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS], input=json.dumps(jobs), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (*run, jobs[index][2]) for index, (name, run) in enumerate(found.items())}


@pytest.mark.parametrize("name", CASES)
def test_a_new_process_gives_the_same(name, runs):
    trainer, folder, _, output = runs[name]
    trained = trainer.state.log_history[-1]
    with open(output) as file:
        evaluated = json.load(file)
    assert evaluated.pop("num_clips") == trainer.eval_dataset.summary.num_rows
    assert {f"eval_{key}" for key in evaluated} == {
        key for key in trained if key.startswith("eval_") and "second" not in key and "runtime" not in key
    }
    for key, value in evaluated.items():
        assert value == pytest.approx(trained[f"eval_{key}"], rel=1e-4), key
    assert np.isfinite(list(evaluated.values())).all()
    assert np.load(f"{output}.npy") == pytest.approx(predict(trainer.model, trainer.processing_class), abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_card(name, runs):
    """The Hub's task, and the metrics of the evaluation."""
    trainer, folder, _, _ = runs[name]
    card = ModelCard.load(folder / "README.md")
    expected = None if "frames" in name else RECOGNIZER if name in RECOGNITION else "audio-classification"
    assert card.data.pipeline_tag == expected
    assert ("pipeline(" in card.text) == (expected is not None and "wav2vec 2.0" not in name)
    trained = trainer.state.log_history[-1]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {
        METRICS[key.removeprefix("eval_")][0]: round(value, 4)
        for key, value in trained.items()
        if key.removeprefix("eval_") in METRICS
    }
    assert found and {result.task_type for result in card.data.eval_results} == {expected or "audio-classification"}


@pytest.mark.parametrize("name", MULTI_LABEL)
def test_several_labels_have_sigmoid_scores(name, runs):
    trainer, folder, _, _ = runs[name]
    # transformers' own `load_adapter` of wav2vec 2.0 refuses the folder.
    extras = {"feature_extractor": trainer.processing_class}
    classifier = pipeline("audio-classification", model=str(folder) if "AST" in name else trainer.model, **extras)
    scores = {each["label"]: each["score"] for each in classifier(tone(500, 8000))}
    logits = torch.as_tensor(predict(trainer.model, trainer.processing_class))[0]
    names = trainer.train_dataset.label_names
    assert scores == pytest.approx(dict(zip(names, torch.sigmoid(logits).tolist())), abs=1e-5)
    assert set(names) == {"dog", "rain"}


@pytest.mark.parametrize("name", RECOGNITION)
def test_recognition_through_the_pipeline_is_text(name, runs):
    trainer, folder, _, _ = runs[name]
    task, model = trainer.task, trainer.model
    ids = predict(model, trainer.processing_class)
    expected = task._texts(ids.argmax(-1)) if "CTC" in name else task._texts(ids, skip_special_tokens=True)
    options = {} if "CTC" in name else {"generate_kwargs": {"max_new_tokens": 8, "num_beams": 1}}
    # transformers' own `load_adapter` of wav2vec 2.0 refuses the folder.
    files = dict.fromkeys(("model", "tokenizer", "feature_extractor"), str(folder))
    from_folder = None if "wav2vec 2.0" in name else pipeline(RECOGNIZER, **files)
    extras = {"tokenizer": task.tokenizer, "feature_extractor": trainer.processing_class}
    # It takes any other PeftModel for one that does CTC.
    model = model if "CTC" in name or "Whisper" in name else model.get_base_model()
    from_model = pipeline(RECOGNIZER, model=model, **extras)
    for recognizer in filter(None, (from_folder, from_model)):
        assert recognizer(tone(500, 8000), **options)["text"].strip() == expected[0]


INSPECTED = ["several as lists, wav2vec 2.0", "numbers, wav2vec 2.0", "CTC with a new vocabulary, wav2vec 2.0"]


@pytest.mark.parametrize("name", [*INSPECTED, "a decoder, Whisper", "single, AST"])
def test_inspect(name, runs, tmp_path):
    """Labels that are not one class a clip are not used, and the report says so."""
    _, folder, dataset, _ = runs[name]
    inspect([str(folder), "--dataset", str(dataset), "--output_dir", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    reason = "There is nothing about classes: the adapter was not trained for one class a clip."
    assert (reason in report["left_out"]) == (name != "single, AST")
    assert report["label_names"] == (["a", "b"] if name == "single, AST" else None)


def test_classify_several_labels(runs, capsys):
    trainer, folder, dataset, _ = runs["several as text, AST"]
    classify([str(folder), str(dataset / "1-low-0.wav"), "--format", "json"])
    [line] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    clip, _ = soundfile.read(dataset / "1-low-0.wav", dtype="float32")
    inputs = trainer.processing_class(clip, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = torch.sigmoid(trainer.model.eval()(**inputs).logits)[0].tolist()
    scores = {each["label"]: each["score"] for each in line["scores"]}
    assert scores == pytest.approx(dict(zip(["dog", "rain"], expected)), abs=1e-3)
