import pytest
import torch
from conftest import tiny_ast_config
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ASTForAudioClassification

from peft_softmoa import SoftMoAConfig

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


@pytest.mark.parametrize("modules_to_save", [["layernorm"], ["nowhere"]])
def test_names_without_a_head(tiny_ast, modules_to_save):
    with pytest.raises(
        ValueError, match=r"`label_names` gives 2 classes, but what `modules_to_save` matches.*no classification head"
    ):
        get_peft_model(tiny_ast, SoftMoAConfig(modules_to_save=modules_to_save, label_names=["a", "b"]))
