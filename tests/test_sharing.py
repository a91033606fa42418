"""An adapter is saved here and loaded in a new process, by each of the ways that users have."""

import json
import os
import subprocess
import sys

import pytest
import torch
from loopback_hub import loopback_hub
from peft import get_peft_model
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from peft_softmoa import SoftMoAConfig

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

base, adapter, data, ways = sys.argv[1:]
inputs, expected = torch.load(data, weights_only=True)
torch.set_grad_enabled(False)
for name, way in json.loads(ways).items():
    logits = eval(way).eval()(inputs).logits
    assert torch.equal(logits, expected), (name, (logits - expected).abs().max())
print("all equal")
"""


def make_adapter(base_folder, **options):
    model = AutoModelForAudioClassification.from_pretrained(base_folder)
    options = {"modules_to_save": ["classifier"], "label_names": ["cat", "dog", "owl"], **options}
    model = get_peft_model(model, SoftMoAConfig(init_weights=False, **options)).eval()
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:  # as if it were trained
            torch.nn.init.normal_(parameter)
    return model


def load_in_a_new_process(base, adapter, model, spectrograms, folder, ways=WAYS, **environment):
    with torch.no_grad():
        torch.save((spectrograms, model(spectrograms).logits), folder / "data.pt")
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(base), str(adapter), str(folder / "data.pt"), json.dumps(ways)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"placement": "both", "normalize": True, "num_slots": 2, "scaling": 0.5}, {"label_names": None}],
    ids=["default", "all options", "head of the base's size"],
)
def test_loads_equal_in_a_new_process(base_folder, spectrograms, tmp_path, options):
    model = make_adapter(base_folder, **options)
    model.save_pretrained(tmp_path / "adapter")
    AutoFeatureExtractor.from_pretrained(base_folder).save_pretrained(tmp_path / "adapter")
    result = load_in_a_new_process(base_folder, tmp_path / "adapter", model, spectrograms, tmp_path)
    assert "all equal" in result.stdout, result.stderr


def test_the_folder_holds_safetensors_config_and_card(base_folder, tmp_path):
    make_adapter(base_folder).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }


def test_adapters_of_transformers_own_interface(base_folder, spectrograms, tmp_path):
    model = AutoModelForAudioClassification.from_pretrained(base_folder)
    model.add_adapter(SoftMoAConfig(init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    ways = {name: way for name, way in WAYS.items() if name in ("PeftModel", "AutoModel", "load_adapter")}
    result = load_in_a_new_process(base_folder, tmp_path / "adapter", model.eval(), spectrograms, tmp_path, ways)
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
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
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
        result = load_in_a_new_process(base_folder, "user/birds", model, spectrograms, tmp_path, ways, **environment)
    assert "all equal" in result.stdout, result.stderr
