"""An adapter is saved here and loaded in a new process, by each of the ways that users have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_ast_config
from hub import loopback_hub
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import ASTForAudioClassification, AutoFeatureExtractor, AutoModelForAudioClassification

from peft_softmoa import SoftMoAConfig
from peft_softmoa.registration import name_since_0_2

WAYS = {
    "PeftModel": "PeftModel.from_pretrained(AutoModelForAudioClassification.from_pretrained(base), adapter)",
    "low memory": "PeftModel.from_pretrained("
    "AutoModelForAudioClassification.from_pretrained(base), adapter, low_cpu_mem_usage=True)",
    "AutoPeftModel": "AutoPeftModel.from_pretrained(adapter)",
    "AutoModel": "AutoModelForAudioClassification.from_pretrained(adapter)",
    "load_adapter": "load_adapter(AutoModelForAudioClassification.from_pretrained(base), adapter)",
    "pipeline": "pipeline('audio-classification', model=adapter).model",
}
SCRIPT = """
import json, sys
import torch
import peft_softmoa
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForAudioClassification, pipeline

def load_adapter(model, adapter):
    model.load_adapter(adapter)
    return model

base, data, ways, *adapters = sys.argv[1:]
torch.set_grad_enabled(False)
inputs, expected = torch.load(data, weights_only=True)
for adapter in adapters:
    for name, way in json.loads(ways).items():
        logits = eval(way).eval()(inputs).logits
        assert torch.equal(logits, expected[adapter]), (adapter, name, (logits - expected[adapter]).abs().max())
print("all equal")
"""

DATA = Path(__file__).parent / "data"
VERSION_0_1 = sorted((DATA / "version_0_1").iterdir())


def make_adapter(base_folder, **options):
    model = AutoModelForAudioClassification.from_pretrained(base_folder)
    options = {"modules_to_save": ["classifier"], "label_names": ["cat", "dog", "owl"], **options}
    model = get_peft_model(model, SoftMoAConfig(init_weights=False, **options)).eval()
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:  # as if it were trained
            torch.nn.init.normal_(parameter)
    return model


def load_in_a_new_process(base, models, spectrograms, folder, ways=WAYS, **environment):
    """Load adapters, given with the models that they belong to, and compare the models' logits."""
    with torch.no_grad():
        expected = {str(adapter): model(spectrograms).logits for adapter, model in models.items()}
    torch.save((spectrograms, expected), folder / "data.pt")
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(base), str(folder / "data.pt"), json.dumps(ways), *expected],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


CHOICES = {
    "default": {},
    "all options": {"placement": "both", "normalize": True, "num_slots": 2, "scaling": 0.5, "train_norms": True},
    "head of the base's size": {"label_names": None},
    "soft convolution": {"num_slots": 3, "expert_type": "convolution"},
    "dense": {"routing": "dense"},
    "single adapter": {"routing": "dense", "num_experts": 1, "train_norms": True},
    "dense convolution": {"routing": "dense", "expert_type": "convolution", "kernel_size": 5},
    "single conformer": {"routing": "dense", "num_experts": 1, "expert_type": "conformer"},
    "conformer patch grid": {"routing": "top_k", "expert_type": "conformer", "patch_grid": True},
    "soft conformer": {"num_slots": 3, "expert_type": "conformer", "kernel_size": 5},
    "patterns": {
        "placement": "both",
        "r_pattern": {"layers.0.attention": 2, r".*\.mlp": 3},
        "num_experts_pattern": {"^.*1.attention": 2},
        "scaling_pattern": {"layers.1.mlp": 0.5},
    },
    "top k": {"routing": "top_k", "router_aux_loss_coef": 0.1},
    "top k patch grid": {"routing": "top_k", "expert_type": "convolution", "patch_grid": True},
    "expert choice": {"routing": "expert_choice", "capacity_factor": 1.5},
    "expert choice convolution": {"routing": "expert_choice", "expert_type": "convolution"},
}


def test_loads_equal_in_a_new_process(base_folder, spectrograms, tmp_path):
    models = {}
    for name, options in CHOICES.items():
        model = models[tmp_path / name] = make_adapter(base_folder, **options)
        model.save_pretrained(tmp_path / name)
        AutoFeatureExtractor.from_pretrained(base_folder).save_pretrained(tmp_path / name)
    result = load_in_a_new_process(base_folder, models, spectrograms, tmp_path)
    assert "all equal" in result.stdout, result.stderr


def known_model(**config):
    """A model whose weights follow from a formula, with logits of two known inputs."""
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, **config}
    model = ASTForAudioClassification(tiny_ast_config(**config)).eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * torch.sin(torch.arange(parameter.numel()) + index).view_as(parameter))
    return model


@torch.no_grad()
def known_logits(model):
    return model(torch.sin(torch.arange(2 * 64 * 128)).view(2, 64, 128)).logits


def load_by_peft(model, folder):
    return PeftModel.from_pretrained(model, folder)


def load_by_transformers(model, folder):
    model.load_adapter(folder)
    return model


@pytest.mark.parametrize("load", [load_by_peft, load_by_transformers])
@pytest.mark.parametrize("folder", [DATA / "first_version", *VERSION_0_1], ids=lambda path: path.name)
def test_adapters_of_earlier_versions_still_load(folder, load):
    """The first one was written when there was no routing, expert type and the like to choose."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        saved = {name_since_0_2(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    model = load(known_model(), folder)
    assert list(model.config.id2label.values()) == ["cat", "dog", "owl"]
    loaded = get_peft_model_state_dict(model, adapter_name="default")
    loaded = {f"base_model.model.{name.removeprefix('base_model.model.')}": each for name, each in loaded.items()}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    expected = torch.from_numpy(np.load(folder / "logits.npy"))
    torch.testing.assert_close(known_logits(model), expected, rtol=1e-5, atol=1e-6)


def test_there_are_adapters_of_every_kind():
    assert len(VERSION_0_1) == 16


def test_the_folder_holds_safetensors_config_and_card(base_folder, tmp_path):
    make_adapter(base_folder).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }


def test_adapters_of_transformers_own_interface(base_folder, spectrograms, tmp_path):
    model = AutoModelForAudioClassification.from_pretrained(base_folder)
    model.add_adapter(SoftMoAConfig(init_weights=False, routing="top_k", train_norms=True))
    model.save_pretrained(tmp_path / "adapter")
    ways = {name: way for name, way in WAYS.items() if name in ("PeftModel", "AutoModel", "load_adapter")}
    result = load_in_a_new_process(base_folder, {tmp_path / "adapter": model.eval()}, spectrograms, tmp_path, ways)
    assert "all equal" in result.stdout, result.stderr


def test_push_and_load_by_id(base_folder, spectrograms, tmp_path):
    model = make_adapter(base_folder)
    push = """
import sys, torch
import peft_softmoa
from peft import PeftModel
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForAudioClassification.from_pretrained(base), adapter)
model.push_to_hub("user/birds", token="hf_x")
AutoFeatureExtractor.from_pretrained(base).push_to_hub("user/birds", token="hf_x")
"""
    model.save_pretrained(tmp_path / "adapter")
    with loopback_hub() as hub:
        environment = hub.environment(tmp_path / "cache")
        subprocess.run(
            [sys.executable, "-c", push, str(base_folder), str(tmp_path / "adapter")],
            check=True,
            env={**os.environ, **environment},
        )
        files = hub.repos["user/birds"]
        assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "preprocessor_config.json"} <= set(
            files
        )
        ways = {name: way for name, way in WAYS.items() if name in ("PeftModel", "AutoModel", "pipeline")}
        result = load_in_a_new_process(base_folder, {"user/birds": model}, spectrograms, tmp_path, ways, **environment)
    assert "all equal" in result.stdout, result.stderr
