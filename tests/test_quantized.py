"""Adapters on base models whose linear layers are quantised, by bitsandbytes and torchao."""

import copy

import pytest
import torch
from conftest import tiny_ast_config
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    ASTForAudioClassification,
    AutoModelForAudioClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
)

from peft_softmoa import SoftMoAConfig, describe_targets

WHY = "needs {}: pip install 'peft-softmoa[quantization]'"
bitsandbytes = pytest.importorskip("bitsandbytes", reason=WHY.format("bitsandbytes"))
torchao = pytest.importorskip("torchao.quantization", reason=WHY.format("torchao"))

# A head that is quantised could not be trained.
HEAD = ["classifier"]
METHODS = {
    "bitsandbytes, 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEAD),
    "bitsandbytes, 4 bit": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=HEAD
    ),
    "torchao, int8 weights": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=HEAD),
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A model as wide as one block of weights that bitsandbytes quantises together."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    ASTForAudioClassification(tiny_ast_config(hidden_size=64, intermediate_size=128)).save_pretrained(folder)
    return folder


def load(base_folder, method, device):
    return AutoModelForAudioClassification.from_pretrained(
        base_folder, quantization_config=METHODS[method](), device_map=device
    ).eval()


def weight_of(model):
    return model.audio_spectrogram_transformer.layers[0].mlp.fc1.weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fields", [{"placement": "both"}, {"target_modules": ["q_proj"], "routing": "dense"}], ids=str)
def test_trains_on_quantised_layers(wide_folder, spectrograms, tmp_path, method, device, fields):
    inputs = spectrograms.to(device)
    model = load(wide_folder, method, device)
    weight = weight_of(model)
    assert type(weight) is not torch.nn.Parameter or weight.dtype in (torch.int8, torch.uint8)
    whole = AutoModelForAudioClassification.from_pretrained(wide_folder)
    config = SoftMoAConfig(modules_to_save=HEAD, **fields)
    blocks = [target[:4] for target in describe_targets(whole, config).targets]
    assert [target[:4] for target in describe_targets(model, config).targets] == blocks

    # Of their own, for bitsandbytes packs 4-bit weights on a CPU when they are first used, and trains on them no more.
    plain = load(wide_folder, method, device)
    with torch.no_grad():
        before = plain(inputs).logits
        assert torch.equal(get_peft_model(plain, copy.deepcopy(config)).eval()(inputs).logits, before)

    model = get_peft_model(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), config)
    frozen = {name: copy.deepcopy(each) for name, each in model.named_parameters() if not each.requires_grad}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(6):
        loss = model(inputs, labels=torch.tensor([0, 1, 2], device=device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        if ".softmoa_" in name:
            assert parameter.dtype == torch.float32 and parameter.requires_grad
        elif name in frozen:
            assert torch.equal(_plain(parameter), _plain(frozen[name])), name

    with torch.no_grad():
        trained = model.eval()(inputs).logits
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(wide_folder, method, device), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(inputs).logits, trained)


def _plain(parameter):
    return (
        parameter.dequantize() if hasattr(parameter, "dequantize") and parameter.dtype.is_floating_point else parameter
    )
