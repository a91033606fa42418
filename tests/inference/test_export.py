"""Adapters as ONNX files, and as programs of torch.export."""

import importlib.util
import json
import os

import onnxruntime
import pytest
import torch
from conftest import tiny_ast_config
from export_onnx import main as run_example
from families import FAMILIES, MASKED_WAVE, WHISPER
from peft import get_peft_model
from transformers import (
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoConfig,
    AutoFeatureExtractor,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

from peft_softmoa import SoftMoAConfig
from peft_softmoa.cli import main
from peft_softmoa.inference.export import describe_rest, export_adapter
from peft_softmoa.inference.loading import load_tokenizer
from peft_softmoa.inference.tracing import PACKAGES, ExportError, compare, make_batches

LABELS = ["cat", "dog", "owl"]
WAVE_HEAD = ["projector", "classifier"]
MODELS = {
    "AST": (ASTForAudioClassification, tiny_ast_config, lambda: ASTFeatureExtractor(max_length=64), ["classifier"]),
    **{
        name: (model_class, lambda: Wav2Vec2Config(**MASKED_WAVE), lambda: Wav2Vec2FeatureExtractor(
            return_attention_mask=True
        ), head)
        for name, model_class, head in (
            ("Wav2Vec2", Wav2Vec2ForSequenceClassification, WAVE_HEAD),
            ("frames", Wav2Vec2ForAudioFrameClassification, ["classifier"]),
            ("CTC", Wav2Vec2ForCTC, ["lm_head"]),
        )
    },
    **{
        name: (
            model_class, lambda: WhisperConfig(**WHISPER),
            lambda: WhisperFeatureExtractor(feature_size=8, chunk_length=2, hop_length=800), head,
        )
        for name, model_class, head in (
            ("Whisper", WhisperForAudioClassification, WAVE_HEAD),
            ("speech to text", WhisperForConditionalGeneration, None),
        )
    },
}  # fmt: skip


def save_adapter(folder, kind, half=False, **fields):
    """A base model and an adapter for it, with classes of its own, in folders."""
    model_class, make_config, make_extractor, head = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(make_config())
    (model.half() if half else model).save_pretrained(folder / "base")
    make_extractor().save_pretrained(folder / "base")
    model = model_class.from_pretrained(folder / "base", dtype="float32")
    classes = {} if kind in ("CTC", "speech to text") else {"label_names": LABELS}
    config = SoftMoAConfig(modules_to_save=head, init_weights=False, **classes, **fields)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:  # as if it were trained
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    return model.eval()


def batch(kind, size):
    if kind in ("Whisper", "speech to text"):
        return {"input_features": torch.randn(size, 8, 40)}
    if kind == "AST":
        return {"input_values": torch.randn(size, 64, 128)}
    lengths = [900 - 150 * index for index in range(size)]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).int()
    return {"input_values": torch.randn(size, max(lengths)) * mask, "attention_mask": mask}


def run(folder, inputs, output="logits"):
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    [found] = session.run([output], {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(found)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("AST", {}),
        ("AST", {"routing": "expert_choice", "placement": "ffn"}),
        ("Wav2Vec2", {"placement": "both", "problem_type": "multi_label_classification"}),
        ("Wav2Vec2", {"routing": "dense"}),
        ("AST", {"routing": "dense", "num_experts": 1, "expert_type": "conformer", "patch_grid": True}),
        (
            "Wav2Vec2",
            {
                **{"routing": "dense", "expert_type": "conformer", "num_experts_pattern": {".*0.*": 2}},
                **{"r_pattern": {".*0.*": 2}, "scaling_pattern": {".*1.*": 2.0}},
            },
        ),
        ("Whisper", {"half": True}),
        ("frames", {}),
        ("CTC", {}),
    ],
)
def test_the_file_says_what_pytorch_says(kind, fields, tmp_path, capsys):
    model = save_adapter(tmp_path, kind, **fields)
    folder = tmp_path / "onnx"
    main(["export", str(tmp_path / "adapter"), "--output_dir", str(folder)])
    printed = capsys.readouterr().out
    assert "greatest difference from PyTorch: " in printed
    report = json.loads((folder / "parity.json").read_text())
    assert [check["shape"][0] for check in report["batches"]] == [2, 1, 3]
    assert all(check["largest_difference"] <= 1e-4 for check in report["batches"])

    for size in (1, 4, 5):
        inputs = batch(kind, size)
        with torch.no_grad():
            expected = model(**inputs).logits
            with model.disable_adapter():
                assert not torch.allclose(model(**inputs).logits[..., : expected.shape[-1]], expected, atol=1e-3)
        torch.testing.assert_close(run(folder, inputs), expected, atol=1e-4, rtol=0)
    if "attention_mask" in inputs and kind != "frames":  # a padded clip says what it says alone
        length = int(inputs["attention_mask"][-1].sum())
        alone = run(folder, {name: tensor[-1:, :length] for name, tensor in inputs.items()})
        torch.testing.assert_close(alone, expected[-1:, : alone.shape[1]], atol=1e-4, rtol=0)

    # What is needed to run it.
    _, _, make_extractor, _ = MODELS[kind]
    assert AutoFeatureExtractor.from_pretrained(folder).to_dict() == make_extractor().to_dict()
    metadata = onnxruntime.InferenceSession(folder / "model.onnx").get_modelmeta().custom_metadata_map
    config = AutoConfig.from_pretrained(folder)
    if kind == "CTC":
        assert "labels" not in metadata
        assert "Neither the adapter nor its base model has a tokenizer" in printed
    else:
        assert json.loads(metadata["labels"]) == LABELS == list(config.id2label.values())
        sigmoid = fields.get("problem_type") == "multi_label_classification"
        assert metadata["scores"] == ("sigmoid" if sigmoid else "softmax")
        assert f"{metadata['scores']} makes scores of logits" in printed
        assert config.problem_type == fields.get("problem_type")


def test_of_a_model_that_writes_text_the_encoder_is_exported(tmp_path):
    model = save_adapter(tmp_path, "speech to text", placement="both", half=True)
    written = export_adapter(tmp_path / "adapter", tmp_path / "onnx", show_progress=False)
    assert written.part == "WhisperEncoder" and written.labels is None
    [note] = written.notes
    assert note == (
        "The file holds the audio encoder alone; the rest of WhisperForConditionalGeneration is not in it, which the "
        "adapter leaves as it is."
    )
    inputs = batch("Whisper", 4)
    with torch.no_grad():
        output = model(**inputs, decoder_input_ids=torch.ones(4, 2, dtype=torch.long))
    found = run(tmp_path / "onnx", inputs, "last_hidden_state")
    torch.testing.assert_close(found, output.encoder_last_hidden_state, atol=1e-4, rtol=0)


@pytest.mark.real_audio
def test_whisper_as_it_is_stored(tmp_path):
    """In half precision, for spectrograms of 30 seconds."""
    folder = os.environ.get("SOFTMOA_WHISPER")
    if not folder:
        pytest.skip("needs a real Whisper: set SOFTMOA_WHISPER to a folder with whisper-tiny.en as it is published")
    model = WhisperForAudioClassification.from_pretrained(folder)
    config = SoftMoAConfig(modules_to_save=WAVE_HEAD, label_names=LABELS, init_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    written = export_adapter(tmp_path / "adapter", tmp_path / "onnx", show_progress=False)
    assert written.inputs == {"input_features": ["batch", 80, 3000]} and written.largest_difference <= 1e-4


def test_a_note_names_what_of_the_adapter_is_not_in_the_file():
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**WHISPER))
    targets = ["model.encoder.layers.0.fc2", "model.decoder.layers.1.fc2"]
    base = get_peft_model(model, SoftMoAConfig(routing="dense", target_modules=targets)).get_base_model()
    [note] = describe_rest(base, base.get_encoder())
    assert note.endswith("what the adapter changes there neither: model.decoder.layers.1.fc2.")


def test_clips_of_a_fixed_length_and_a_tokenizer(tmp_path):
    save_adapter(tmp_path, "CTC")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefg"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(tmp_path / "vocab.json").save_pretrained(tmp_path / "adapter")
    written = export_adapter(tmp_path / "adapter", tmp_path / "onnx", seconds=0.25, show_progress=False)
    assert written.inputs == {"input_values": ["batch", 4000], "attention_mask": ["batch", 4000]}
    assert written.notes == [] and json.loads((tmp_path / "onnx" / "vocab.json").read_text()) == vocabulary
    with pytest.raises(ValueError, match="`seconds` must be positive, got 0"):
        make_batches(Wav2Vec2FeatureExtractor(), seconds=0)


@pytest.mark.parametrize("moved", [False, True])
def test_a_tokenizer_of_the_base_model_is_of_its_revision(tmp_path, monkeypatch, moved):
    save_adapter(tmp_path, "CTC")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "revision": "one"}))
    asked = []

    def from_pretrained(name, revision):
        asked.append((str(name), revision))
        raise OSError("there is none")

    monkeypatch.setattr("peft_softmoa.inference.loading.AutoTokenizer.from_pretrained", from_pretrained)
    base = str(tmp_path / "base") if moved else None
    assert load_tokenizer(str(tmp_path / "adapter"), "other", base) is None
    assert asked == [(str(tmp_path / "adapter"), "other"), (str(tmp_path / "base"), None if moved else "one")]


def test_what_makes_scores_of_one_output(tmp_path):
    model = ASTForAudioClassification(tiny_ast_config(num_labels=1))
    model.save_pretrained(tmp_path / "base")
    ASTFeatureExtractor(max_length=64).save_pretrained(tmp_path / "base")
    model = get_peft_model(ASTForAudioClassification.from_pretrained(tmp_path / "base"), SoftMoAConfig())
    model.save_pretrained(tmp_path / "adapter")
    written = export_adapter(tmp_path / "adapter", tmp_path / "onnx", show_progress=False)
    assert written.scores == "none" and "the logits are the values" in str(written)


def test_the_example_and_another_base_model(tmp_path, capsys):
    """The base model has moved since the adapter was saved."""
    save_adapter(tmp_path, "AST")
    (tmp_path / "base").rename(tmp_path / "moved")
    run_example(
        [str(tmp_path / "adapter"), "--base_model", str(tmp_path / "moved"), "--output_dir", str(tmp_path / "onnx")]
    )
    assert "of 3 classes" in capsys.readouterr().out


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

    def differ(part, path, batches):
        part.classifier.dense.bias.fill_(float("nan"))
        return compare(part, path, batches)

    monkeypatch.setattr("peft_softmoa.inference.export.compare", differ)
    with pytest.raises(ExportError, match="differs from PyTorch by nan"):
        export_adapter(tmp_path / "adapter", tmp_path / "onnx", show_progress=False)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "peft_softmoa.inference.tracing.find_spec", lambda name: None if name in PACKAGES else find_spec(name)
    )
    with pytest.raises(SystemExit, match=r'needs onnx, onnxscript, onnxruntime: pip install "peft-softmoa\[export\]"'):
        main(["export", str(tmp_path / "adapter")])
