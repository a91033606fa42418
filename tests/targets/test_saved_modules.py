import contextlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import tiny_ast_config
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    ASTForAudioClassification,
    Data2VecAudioForAudioFrameClassification,
    Data2VecAudioForSequenceClassification,
    HubertForSequenceClassification,
    UniSpeechSatForAudioFrameClassification,
    Wav2Vec2BertForAudioFrameClassification,
    Wav2Vec2Config,
    Wav2Vec2ConformerForAudioFrameClassification,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
    WavLMForAudioFrameClassification,
    WavLMForSequenceClassification,
    WhisperForAudioClassification,
)

from peft_softmoa import SoftMoAConfig
from peft_softmoa.targets.heads import find_head
from peft_softmoa.targets.saved_modules import find_fresh

BASE_LABELS = ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4"]


def config(*label_names, **options):
    return SoftMoAConfig(modules_to_save=["classifier"], label_names=list(label_names), **options)


def labels(model):
    return list(model.config.id2label.values())


def outputs(model, spectrograms):
    with torch.no_grad():
        return model(spectrograms).logits.shape[-1]


def test_the_adapter_brings_a_head_of_its_size(tiny_ast, spectrograms):
    state = {name: tensor.clone() for name, tensor in tiny_ast.state_dict().items()}
    model = get_peft_model(tiny_ast, config("cat", "dog", "owl"))
    assert outputs(model, spectrograms) == 3
    assert labels(model) == ["cat", "dog", "owl"] and model.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    head = tiny_ast.classifier.modules_to_save["default"]
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert torch.equal(tiny_ast.classifier.original_module.dense.weight, state["classifier.dense.weight"])
    model(spectrograms, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert head.dense.weight.grad is not None


def test_a_head_with_the_same_classes_is_kept(tiny_ast):
    weight = tiny_ast.classifier.dense.weight.clone()
    get_peft_model(tiny_ast, config(*BASE_LABELS))
    assert torch.equal(tiny_ast.classifier.modules_to_save["default"].dense.weight, weight)


def test_as_many_other_classes_get_a_fresh_head(tiny_ast):
    weight = tiny_ast.classifier.dense.weight.clone()
    model = get_peft_model(tiny_ast, config("a", "b", "c", "d", "e"))
    assert not torch.equal(tiny_ast.classifier.modules_to_save["default"].dense.weight, weight)
    assert labels(model) == ["a", "b", "c", "d", "e"]


def test_the_config_names_the_classes_of_the_head_in_use(tiny_ast, spectrograms):
    model = get_peft_model(tiny_ast, config("cat", "dog", "owl"))
    model.add_adapter("second", config("yes", "no"))
    assert (outputs(model, spectrograms), labels(model)) == (3, ["cat", "dog", "owl"])
    model.set_adapter("second")
    assert (outputs(model, spectrograms), labels(model)) == (2, ["yes", "no"])
    with model.disable_adapter():
        assert (outputs(model, spectrograms), labels(model)) == (5, BASE_LABELS)
    assert (outputs(model, spectrograms), labels(model)) == (2, ["yes", "no"])
    model.delete_adapter("second")
    assert (outputs(model, spectrograms), labels(model)) == (3, ["cat", "dog", "owl"])
    base = model.unload()
    assert (outputs(base, spectrograms), labels(base)) == (5, BASE_LABELS)


def test_adapters_without_names_leave_the_labels_alone(tiny_ast):
    model = get_peft_model(tiny_ast, SoftMoAConfig(modules_to_save=["classifier"]))
    assert labels(model) == BASE_LABELS


def test_loads_onto_models_with_other_and_with_the_same_classes(tiny_ast, spectrograms, tmp_path):
    model = get_peft_model(tiny_ast, config("cat", "dog", "owl", init_weights=False))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(spectrograms).logits
    backbone = model.unload().audio_spectrogram_transformer.state_dict()
    for num_labels in (3, 5, 527):
        base = ASTForAudioClassification(tiny_ast_config(num_labels=num_labels)).eval()
        base.audio_spectrogram_transformer.load_state_dict(backbone)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        with torch.no_grad():
            assert torch.equal(loaded(spectrograms).logits, expected)
        assert labels(loaded) == ["cat", "dog", "owl"]
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


class WithPlainHead(nn.Module):
    """The head is one linear layer, as in Wav2Vec2ForSequenceClassification."""

    def __init__(self):
        super().__init__()
        self.config = tiny_ast_config(num_labels=4)
        self.encoder = nn.Linear(6, 8)
        self.classifier = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.classifier(self.encoder(x))


def test_a_head_of_one_linear_layer():
    model = get_peft_model(WithPlainHead().to(torch.float64), config("a", "b", target_modules=["encoder"]))
    assert model(torch.randn(3, 6, dtype=torch.float64)).shape == (3, 2)
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.bias is None and head.weight.dtype == torch.float64 and head.weight.requires_grad


@pytest.mark.parametrize("modules_to_save", [["layernorm"], ["classifier.layernorm"]])
def test_names_without_a_head(tiny_ast, modules_to_save):
    with pytest.raises(
        ValueError, match=r"`label_names` gives 2 classes, but what `modules_to_save` matches.*no classification head"
    ):
        get_peft_model(tiny_ast, SoftMoAConfig(modules_to_save=modules_to_save, label_names=["a", "b"]))


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_kernel": (3, 3),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}
FRAME_CLASSIFIERS = {
    Wav2Vec2ForAudioFrameClassification: SMALL,
    Wav2Vec2ConformerForAudioFrameClassification: SMALL,
    Wav2Vec2BertForAudioFrameClassification: {**SMALL, "feature_projection_input_dim": 8},
    WavLMForAudioFrameClassification: SMALL,
    UniSpeechSatForAudioFrameClassification: SMALL,
    Data2VecAudioForAudioFrameClassification: {**SMALL, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
}


@pytest.mark.parametrize("model_class", FRAME_CLASSIFIERS, ids=lambda model_class: model_class.__name__)
def test_a_frame_classifier_counts_the_classes_of_the_adapter_in_use(model_class):
    """These models keep the number of classes from when they were built, and reshape labels by it."""
    base = model_class(model_class.config_class(**FRAME_CLASSIFIERS[model_class], num_labels=2)).eval()
    model = get_peft_model(base, config("a", "b", "c"))
    model.add_adapter("four", config("a", "b", "c", "d"))
    inputs = torch.randn(2, 20, 8) if "Bert" in model_class.__name__ else torch.randn(2, 400)
    for adapter, classes in (("default", 3), ("four", 4), (None, 2)):
        with model.disable_adapter() if adapter is None else contextlib.nullcontext():
            if adapter is not None:
                model.set_adapter(adapter)
            logits = model(inputs).logits
            assert logits.shape[-1] == classes
            targets = torch.randint(classes, logits.shape[:2])
            loss = model(inputs, labels=nn.functional.one_hot(targets, classes)).loss
            expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            torch.testing.assert_close(loss, expected)
    assert model.unload().num_labels == 2


def test_the_head_is_known_where_another_layer_is_as_wide():
    base = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SMALL, num_labels=8))
    model = get_peft_model(base, SoftMoAConfig(modules_to_save=["projector", "classifier"], label_names=["a", "b"]))
    assert model(torch.randn(2, 400)).logits.shape == (2, 2)
    assert base.projector.modules_to_save["default"].out_features == 8
    base = nn.Sequential(nn.Linear(8, 2), nn.Linear(8, 2))
    base.config = SimpleNamespace(id2label={0: "a", 1: "b"})
    with pytest.raises(ValueError, match=r"several linear layers with 2 outputs, \['0', '1'\]"):
        find_head(base, dict(base.named_children()), ["c"])


HEADLESS = {
    Wav2Vec2ForSequenceClassification: SMALL,
    HubertForSequenceClassification: SMALL,
    WavLMForSequenceClassification: SMALL,
    Data2VecAudioForSequenceClassification: {**SMALL, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
    WhisperForAudioClassification: {
        **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2},
        **{"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8},
        **{"max_source_positions": 20, "vocab_size": 8, "classifier_proj_size": 8},
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    },
}


@pytest.mark.parametrize("model_class", HEADLESS, ids=lambda model_class: model_class.__name__)
def test_fresh_modules_are_trained_and_saved(model_class, tmp_path):
    """What a headless checkpoint does not have is drawn at random, and differently each time it is loaded."""
    base_class = {"WhisperForAudioClassification": "WhisperModel"}.get(
        model_class.__name__, model_class.__name__.replace("ForSequenceClassification", "Model")
    )
    getattr(transformers, base_class)(model_class.config_class(**HEADLESS[model_class])).save_pretrained(
        tmp_path / "base"
    )
    inputs = torch.randn(2, 8, 40) if model_class is WhisperForAudioClassification else torch.randn(2, 400)
    model = get_peft_model(model_class.from_pretrained(tmp_path / "base"), config("a", "b", "c"))
    assert set(model.peft_config["default"].modules_to_save) == {"projector", "classifier"}
    assert model.base_model.model.projector.modules_to_save["default"].weight.requires_grad
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = model(inputs).logits
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded = PeftModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(loaded(inputs).logits, expected)
        # Models with adapters of languages have another method under the name that transformers calls.
        if model_class not in (Wav2Vec2ForSequenceClassification, WavLMForSequenceClassification):
            loaded = model_class.from_pretrained(tmp_path / "adapter").eval()
            assert torch.equal(loaded(inputs).logits, expected)


def test_fresh_parameters_that_cannot_be_saved_are_an_error(tmp_path):
    Wav2Vec2Model(Wav2Vec2Config(**SMALL)).save_pretrained(tmp_path)
    base = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path, use_weighted_layer_sum=True)
    with pytest.raises(ValueError, match=r"does not have \['layer_weights'\], which would be drawn at random"):
        get_peft_model(base, config("a", "b"))


def test_an_adapter_that_lacks_fresh_modules_is_warned_of(tmp_path):
    base = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SMALL))
    base.wav2vec2.save_pretrained(tmp_path / "headless")
    get_peft_model(base, SoftMoAConfig(modules_to_save=["classifier"])).save_pretrained(tmp_path / "adapter")
    base = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path / "headless")
    with pytest.warns(UserWarning, match=r"does not have \['projector'\], and the adapter does not bring them"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")


def test_the_kind_of_problem_goes_with_the_adapter(tiny_ast, base_folder, spectrograms, tmp_path):
    """It chooses the loss, and the scores of `pipeline()`; transformers keeps the last one that it has guessed."""
    model = get_peft_model(tiny_ast, config("a", "b", "c"))
    model.add_adapter("several", config("x", "y"))
    model.eval()
    model(spectrograms, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert model.peft_config["default"].problem_type == model.config.problem_type == "single_label_classification"
    model.set_adapter("several")
    labels = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    loss = model(spectrograms, labels=labels).loss
    logits = model(spectrograms).logits
    torch.testing.assert_close(loss, nn.functional.binary_cross_entropy_with_logits(logits, labels))
    with model.disable_adapter():
        assert model.config.problem_type is None
    model.save_pretrained(tmp_path)
    saved = SoftMoAConfig.from_pretrained(str(tmp_path / "several"))
    assert saved.problem_type == "multi_label_classification"
    loaded = PeftModel.from_pretrained(ASTForAudioClassification.from_pretrained(base_folder), tmp_path / "several")
    assert loaded.config.problem_type == "multi_label_classification"
    assert loaded.unload().config.problem_type is None


def test_the_kind_of_problem_of_a_regression(tiny_ast, spectrograms):
    tiny_ast.config.problem_type = "regression"
    model = get_peft_model(tiny_ast, config("valence", "arousal"))
    assert model.peft_config["default"].problem_type == "regression"
    labels = torch.randn(3, 2)
    loss = model(spectrograms, labels=labels).loss
    torch.testing.assert_close(loss, nn.functional.mse_loss(model(spectrograms).logits, labels))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"modules_to_save": ["classifier", "projectr"]}, r"`modules_to_save` .* match no module .*\['projectr'\]"),
        ({"modules_to_save": ["cls_token"]}, "'audio_spectrogram_transformer.embeddings.cls_token'.* are parameters"),
        ({"target_modules": ["q_proj", "v_prj"]}, r"`target_modules` .* match no module .*\['v_prj'\]"),
        ({"exclude_modules": ["layers.7"]}, r"`exclude_modules` .*\['layers.7'\]"),
        ({"exclude_modules": r".*layers\.7.*"}, "`exclude_modules` .*layers"),
        ({"layers_to_transform": [0, 99]}, "`layers_to_transform` has the index 99"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 99]}, "`layers_to_transform` has the index 99"),
    ],
)
def test_names_that_match_nothing(tiny_ast, fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_ast, SoftMoAConfig(**fields))


def test_only_what_transformers_has_drawn_is_fresh(tmp_path):
    """Not what somebody has put in later, nor what lies in the part that is adapted, nor other models."""
    Wav2Vec2Model(Wav2Vec2Config(**SMALL)).save_pretrained(tmp_path)
    base = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path)
    base.projector = nn.Linear(16, 8)
    base.wav2vec2.encoder.layers[0].attention.q_proj = nn.Linear(16, 16)
    assert set(find_fresh(base, ["wav2vec2.encoder.layers.0.attention"])[0]) == {"classifier"}
    both = nn.ModuleDict({"encoder": base.wav2vec2, "front": nn.Linear(4, 4)})
    assert find_fresh(both, ["encoder.encoder.layers.0.attention"]) == ({}, [])
    assert find_fresh(Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SMALL)), ["wav2vec2"]) == ({}, [])


def test_the_base_may_get_other_classes_between_adapters(tiny_ast):
    base = get_peft_model(tiny_ast, config("a", "b")).unload()
    base.classifier.dense = nn.Linear(32, 2)
    base.config.id2label, base.config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
    base.config.problem_type = "multi_label_classification"
    model = get_peft_model(base, SoftMoAConfig(modules_to_save=["classifier"]), "second")
    assert labels(model) == ["yes", "no"] and model.peft_config["second"].problem_type == "multi_label_classification"
    model.add_adapter("third", config("x", "y", "z"))
    model.set_adapter("third")
    assert labels(model) == ["x", "y", "z"]
    assert labels(model.unload()) == ["yes", "no"]


def test_the_kind_of_problem_of_a_compiled_model(tiny_ast, spectrograms, tmp_path):
    model = get_peft_model(tiny_ast, SoftMoAConfig(modules_to_save=["classifier"]))
    torch.compile(model, backend="eager")(spectrograms, labels=torch.rand(3, 5)).loss.backward()
    model.save_pretrained(tmp_path)
    assert SoftMoAConfig.from_pretrained(str(tmp_path)).problem_type == "multi_label_classification"


def test_another_layer_is_not_taken_for_a_head_that_is_not_saved():
    base = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SMALL, num_labels=8))
    with pytest.raises(ValueError, match="no classification head"):
        get_peft_model(base, SoftMoAConfig(modules_to_save=["projector"], label_names=["a", "b"]))


@pytest.mark.parametrize("targets", ["all-linear", ["attention", "projector"]])
def test_fresh_modules_are_not_adapted(targets, tmp_path):
    """Below the adapter they would stay as they were drawn, and be drawn anew at each load."""
    Wav2Vec2Model(Wav2Vec2Config(**SMALL)).save_pretrained(tmp_path)
    base = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="matches parts of .*'projector'.*Name them in `exclude_modules`"):
        get_peft_model(base, SoftMoAConfig(target_modules=targets, routing="dense"))
    fields = {"target_modules": targets, "exclude_modules": ["projector"] + ["classifier"] * (targets == "all-linear")}
    model = get_peft_model(base, SoftMoAConfig(routing="dense", **fields))
    assert set(model.peft_config["default"].modules_to_save) == {"projector", "classifier"}
