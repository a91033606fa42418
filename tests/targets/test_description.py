import copy

import pytest
import torch
from conftest import tiny_ast_config
from families import FAMILIES, build
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ASTForAudioClassification

from peft_softmoa import SoftMoAConfig, SoftMoALayer, describe_targets
from peft_softmoa.targets.sizes import compare_lora


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
adapted block                                       reads  adds  parameters
audio_spectrogram_transformer.layers.0-1.attention     32    32     2 x 518
audio_spectrogram_transformer.layers.0-1.mlp           32    32     2 x 518
in layer
audio_spectrogram_transformer.layers.0-1                          2 x 1,036
trained whole
classifier                                                              229
in all                                                                2,301
8.60% of the model's 26,757 parameters; a file of 12,772 bytes"""
    )
    assert config == before


def test_a_block_that_ends_in_another_module():
    description = describe_targets(build("Whisper, classification"), SoftMoAConfig(placement="ffn"))
    assert "\nencoder.layers.0-1.fc1 -> fc2 " in str(description)


def test_a_model_that_has_an_adapter(tiny_ast):
    config = SoftMoAConfig(placement="ffn")
    wanted = describe_targets(tiny_ast, config)
    assert describe_targets(get_peft_model(tiny_ast, SoftMoAConfig()), config) == wanted


def test_nothing_to_adapt(tiny_ast):
    with pytest.raises(ValueError, match=r"`target_modules=\{'self_attn'\}` matches no module of ASTForAudioClass"):
        describe_targets(tiny_ast, SoftMoAConfig(target_modules=["self_attn"]))


def test_layers_that_are_not_alike_are_not_joined():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(width, width) for width in (8, 8, 6, 8, 8))})
    lines = str(describe_targets(model, SoftMoAConfig(target_modules=r"layers\.\d", num_experts=1, r=1))).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["layers.0-1,3-4", "layers.2"]
    assert lines[1].split()[1:] == ["8", "8", "4", "x", "33"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AST", {"modules_to_save": ["classifier"], "label_names": list("abc"), "normalize": True}),
        ("Whisper, classification", {"placement": "both", "routing": "dense", "expert_type": "convolution"}),
        ("Wav2Vec2", {"train_norms": True}),
        ("Wav2Vec2", {"routing": "dense", "expert_type": "conformer", "r_pattern": {".*0.*": 2}}),
        ("Wav2Vec2-Conformer", {"modules_to_save": ["batch_norm"]}),
    ],
)
def test_size_of_the_file(name, options, tmp_path):
    described = describe_targets(build(name), SoftMoAConfig(**options))
    model = get_peft_model(build(name), SoftMoAConfig(**options))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == described.file_bytes
    base = sum(parameter.numel() for parameter in build(name).parameters())
    assert described.model_parameters == base
    assert describe_targets(model, SoftMoAConfig(**options)).model_parameters == base
    assert described.share == described.parameters / base


@pytest.mark.parametrize("placement", ["attention", "ffn", "both"])
@pytest.mark.parametrize("name", ["AST", "Whisper, classification", "Wav2Vec2"])
def test_beside_lora(name, placement):
    config = SoftMoAConfig(placement=placement, r=3)
    found = describe_targets(build(name), config)
    lora = compare_lora(build(name), found.targets, found.parameters, 3)
    model = get_peft_model(build(name), LoraConfig(r=3, target_modules=list(lora.linear_layers)))
    assert model.get_nb_trainable_parameters()[0] == lora.parameters
    assert len(lora.linear_layers) == len(found.targets) * {"attention": 4, "ffn": 2, "both": 3}[placement]
    assert lora.equal_rank * lora.parameters == pytest.approx(3 * found.parameters)
