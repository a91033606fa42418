import copy

import pytest
import torch
from conftest import tiny_ast_config
from families import FAMILIES, build
from peft import get_peft_model
from transformers import ASTForAudioClassification

from peft_softmoa import SoftMoAConfig, SoftMoALayer, describe_targets


@pytest.mark.parametrize("placement", ["attention", "ffn", "both"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_tells_what_is_then_adapted(name, placement):
    model_class, config = FAMILIES[name].config()
    with torch.device("meta"):
        empty = model_class._from_config(config)
    description = describe_targets(empty, SoftMoAConfig(placement=placement))
    model = get_peft_model(build(name), SoftMoAConfig(placement=placement))
    layers = {layer.name: layer for layer in model.modules() if isinstance(layer, SoftMoALayer)}
    assert [target.name for target in description.targets] == list(layers)
    for target, parameters in zip(description.targets, description.parameters_by_block):
        layer = layers[target.name]
        assert target == layer.softmoa_targets["default"]
        assert parameters == sum(
            parameter.numel() for key, parameter in layer.named_parameters() if key.startswith("softmoa_")
        )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert description.parameters == sum(description.parameters_by_layer.values()) == trained


def test_table():
    with torch.device("meta"):
        model = ASTForAudioClassification(tiny_ast_config())
    config = SoftMoAConfig(placement="both", num_experts=2, r=3, modules_to_save=["classifier"])
    before = copy.deepcopy(config)
    assert (
        str(describe_targets(model, config))
        == """\
adapted block                                     reads  adds  parameters
audio_spectrogram_transformer.layers.0.attention     32    32         518
audio_spectrogram_transformer.layers.0.mlp           32    32         518
audio_spectrogram_transformer.layers.1.attention     32    32         518
audio_spectrogram_transformer.layers.1.mlp           32    32         518
in layer
audio_spectrogram_transformer.layers.0                              1,036
audio_spectrogram_transformer.layers.1                              1,036
trained whole
classifier                                                            229
in all                                                              2,301"""
    )
    assert config == before


def test_a_block_that_ends_in_another_module():
    description = describe_targets(build("Whisper, classification"), SoftMoAConfig(placement="ffn"))
    assert "\nencoder.layers.0.fc1 -> fc2 " in str(description)


def test_a_model_that_has_an_adapter(tiny_ast):
    config = SoftMoAConfig(placement="ffn")
    wanted = describe_targets(tiny_ast, config)
    assert describe_targets(get_peft_model(tiny_ast, SoftMoAConfig()), config) == wanted


def test_nothing_to_adapt(tiny_ast):
    with pytest.raises(ValueError, match=r"`target_modules=\{'self_attn'\}` matches no module of ASTForAudioClass"):
        describe_targets(tiny_ast, SoftMoAConfig(target_modules=["self_attn"]))
