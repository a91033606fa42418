"""Base models that are stored in half precision, as most large ones are."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import train_no_trainer
from conftest import FRAMES, MEL_BINS, tiny_ast_config, training_options
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoModelForAudioClassification,
    TrainingArguments,
)

from peft_softmoa import SoftMoAConfig
from peft_softmoa.commands.train import main
from peft_softmoa.inference.export import export_adapter
from peft_softmoa.inspection.inspect_adapter import inspect_adapter
from peft_softmoa.training import AudioTrainer, DataOptions, classification_metrics, load_stream

HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", params=HALF, ids=str)
def half_folder(request, tmp_path_factory):
    """A base model that is stored in half precision."""
    folder = tmp_path_factory.mktemp("half")
    torch.manual_seed(0)
    ASTForAudioClassification(tiny_ast_config()).to(request.param).save_pretrained(folder)
    ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS).save_pretrained(folder)
    assert AutoModelForAudioClassification.from_pretrained(folder).dtype == request.param
    return folder


def dtypes(folder):
    return {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()}


def accuracy(folder):
    return json.loads((folder / "eval_results.json").read_text())["eval_accuracy"]


def test_the_script_trains_in_float32(half_folder, tones_folder, tmp_path):
    trainer = main(training_options(half_folder, tones_folder, tmp_path / "out", num_train_epochs=20))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert dtypes(tmp_path / "out") == {torch.float32} and accuracy(tmp_path / "out") == 1.0


def test_the_script_trains_in_the_dtype_that_is_stored(half_folder, tones_folder, tmp_path):
    options = training_options(half_folder, tones_folder, tmp_path / "out", dtype="auto", max_grad_norm=1.0)
    trainer = main([*options, "--optim", "sgd", "--learning_rate", "0.1"])
    base = trainer.model.get_base_model()
    assert base.dtype in HALF
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values())
    with pytest.raises(ValueError, match="dtype was 'auto' and is 'float32'"):
        main(training_options(half_folder, tones_folder, tmp_path / "out"))


def test_the_plain_loop(half_folder, tones_folder, tmp_path):
    for dtype in ("float32", "auto"):
        options = training_options(half_folder, tones_folder, tmp_path / dtype, dtype=dtype, learning_rate=1e-3)
        index = options.index("--report_to")
        metrics = train_no_trainer.main(options[:index] + options[index + 2 :])
        assert 0 <= metrics["accuracy"] <= 1
        weights = load_file(tmp_path / dtype / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_the_trainer_takes_a_model_as_it_is_stored(half_folder, tones_folder, tmp_path):
    """With all that calls the model: training, evaluation and prediction."""
    extractor = ASTFeatureExtractor.from_pretrained(half_folder)
    stream = load_stream(str(tones_folder), "train", extractor, DataOptions(), rows="fold=1")
    base = AutoModelForAudioClassification.from_pretrained(half_folder)
    model = get_peft_model(base, SoftMoAConfig(modules_to_save=["classifier"], label_names=stream.label_names))
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, learning_rate=1e-3)
    trainer = AudioTrainer(
        model, arguments, train_dataset=stream, eval_dataset=stream, compute_metrics=classification_metrics
    )
    assert np.isfinite(trainer.train().training_loss)
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert trainer.predict(stream).predictions.shape == (8, 2)


def test_inspection_and_export_of_an_adapter(half_folder, tones_folder, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'peft-softmoa[export]'")
    main(training_options(half_folder, tones_folder, tmp_path / "out", max_steps=1, eval_strategy="no"))
    page = inspect_adapter(
        str(tmp_path / "out"),
        tmp_path / "inspection",
        audio=str(tones_folder / "1-low-0.wav"),
        dataset=str(tones_folder),
        max_clips=4,
    )
    assert page.is_file()
    assert export_adapter(tmp_path / "out", tmp_path / "onnx").largest_difference <= 1e-4


@pytest.fixture(scope="session")
def whisper_folder():
    folder = os.environ.get("SOFTMOA_WHISPER")
    if not folder:
        pytest.skip("needs a real Whisper: set SOFTMOA_WHISPER to a folder with whisper-tiny.en as it is published")
    return Path(folder)


@pytest.mark.real_audio
def test_whisper_as_it_is_stored_trains_on_real_sounds(whisper_folder, esc10_folder, tmp_path):
    stored = {tensor.dtype for tensor in load_file(whisper_folder / "model.safetensors").values()}
    assert stored == {torch.float16}
    options = training_options(
        whisper_folder,
        esc10_folder,
        tmp_path / "out",
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        eval_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer = main(options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and np.isfinite(losses).all()
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    # Experts begin as zero functions: those of every layer have moved.
    outputs = [tensor for name, tensor in weights.items() if name.endswith("experts.up_weight")]
    assert len(outputs) == trainer.model.config.encoder_layers and all(tensor.abs().sum() > 0 for tensor in outputs)
    # Whisper has no head for classes: what the checkpoint lacks comes with the adapter.
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForAudioClassification.from_pretrained(whisper_folder, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, tmp_path / "out")
        features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits.append(loaded(features).logits)
    assert torch.equal(*logits)
