"""Models with adapters outside of Python: torch.export, ONNX and ONNX Runtime."""

import json

import onnxruntime
import pytest
import torch
from conftest import tiny_ast_config
from export_onnx import compare, main
from families import FAMILIES, MASKED_WAVE
from peft import get_peft_model
from transformers import (
    ASTFeatureExtractor,
    ASTForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from peft_softmoa import SoftMoAConfig

LABELS = ["cat", "dog", "owl"]


def save_adapter(folder, kind, **fields):
    """A base model and an adapter for it, with classes of its own, in folders."""
    torch.manual_seed(0)
    if kind == "AST":
        model = ASTForAudioClassification(tiny_ast_config())
        extractor = ASTFeatureExtractor(max_length=64)
        head = ["classifier"]
    else:
        model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**MASKED_WAVE))
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
        head = ["projector", "classifier"]
    model.save_pretrained(folder / "base")
    extractor.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base")
    model = get_peft_model(model, SoftMoAConfig(modules_to_save=head, label_names=LABELS, init_weights=False, **fields))
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:  # as if it were trained
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    return model.eval()


def batch(kind, size):
    if kind == "AST":
        return {"input_values": torch.randn(size, 64, 128)}
    lengths = [900 - 150 * index for index in range(size)]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).int()
    return {"input_values": torch.randn(size, max(lengths)) * mask, "attention_mask": mask}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("AST", {}),
        ("AST", {"routing": "expert_choice", "placement": "ffn"}),
        ("Wav2Vec2", {"placement": "both"}),
        ("Wav2Vec2", {"routing": "dense"}),
    ],
)
def test_the_script_writes_what_pytorch_says(kind, fields, tmp_path, capsys):
    model = save_adapter(tmp_path, kind, **fields)
    report = main([str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "onnx")])
    assert "away from PyTorch" in capsys.readouterr().out
    assert json.loads((tmp_path / "onnx" / "parity.json").read_text()) == report
    assert [check["shape"][0] for check in report["batches"]] == [2, 1, 3]
    assert json.loads((tmp_path / "onnx" / "labels.json").read_text()) == LABELS

    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == LABELS
    for size in (1, 4, 5):
        inputs = batch(kind, size)
        with torch.no_grad():
            expected = model(**inputs).logits
            with model.disable_adapter():
                assert not torch.allclose(model(**inputs).logits[:, : len(LABELS)], expected, atol=1e-2)
        [logits] = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=0)
    if kind == "Wav2Vec2":  # a padded clip says what it says alone
        length = int(inputs["attention_mask"][-1].sum())
        alone = {name: tensor[-1:, :length].numpy() for name, tensor in inputs.items()}
        [again] = session.run(["logits"], alone)
        torch.testing.assert_close(torch.from_numpy(again), torch.from_numpy(logits[-1:]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("routing", ["soft", "dense", "top_k", "expert_choice"])
@pytest.mark.parametrize("name", ["AST", "Wav2Vec2", "Whisper, classification"])
def test_exported_programs(name, routing):
    """torch.export, with the batch axis free."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model_class, config = family.config()
    config = SoftMoAConfig(routing=routing, placement="both", init_weights=False)
    model = get_peft_model(model_class(family.config()[1]), config).eval().get_base_model()
    inputs = family.inputs([family.lengths[0]] * 3)
    batch_axis = {key: {0: torch.export.Dim.DYNAMIC} for key in inputs}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=batch_axis).module()
        for size in (2, 5):
            inputs = family.inputs([family.lengths[0]] * size)
            given, expected = program(**inputs), model(**inputs)
            for key in ("logits", "last_hidden_state"):
                if key in expected:
                    torch.testing.assert_close(given[key], expected[key], atol=1e-5, rtol=1e-5)


def test_a_difference_is_an_error(tmp_path, monkeypatch):
    save_adapter(tmp_path, "AST")

    def differ(*args):
        return [*compare(*args), {"shape": [1], "largest_difference": float("nan")}]

    monkeypatch.setattr("export_onnx.compare", differ)
    with pytest.raises(SystemExit, match="differs from PyTorch by nan, and 0.0001 is allowed"):
        main([str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "onnx")])
