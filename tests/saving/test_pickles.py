"""Pickled weights are neither read nor written, by any way that runs through this package, unless asked for."""

import json

import pytest
import torch
from conftest import tiny_ast_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import ASTForAudioClassification, Trainer, TrainingArguments

from peft_softmoa import SoftMoAConfig

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def make(config=None):
    torch.manual_seed(0)
    return get_peft_model(ASTForAudioClassification(tiny_ast_config()), config or SoftMoAConfig(init_weights=False))


@pytest.fixture(params=["with its config", "with no config"])
def pickled(tmp_path, request):
    """A folder with an adapter whose weights are a pickle."""
    make().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / PICKLE)
    (tmp_path / WEIGHTS).unlink()
    if request.param == "with no config":
        (tmp_path / "adapter_config.json").unlink()
    return tmp_path


def load_with_config(folder):
    model = ASTForAudioClassification(tiny_ast_config())
    return PeftModel.from_pretrained(model, folder, config=SoftMoAConfig(target_modules=["attention"]))


def load_over(folder):
    model = make(SoftMoAConfig())
    model.load_adapter(folder, "default")
    return model


@pytest.mark.parametrize("load", [load_with_config, load_over])
def test_no_way_of_loading_reads_a_pickle(pickled, monkeypatch, load):
    def read(*args, **kwargs):
        raise AssertionError("it was read")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", read)
        with pytest.raises(ValueError, match=f"in '{PICKLE}' only. That is a pickle.*SOFTMOA_ALLOW_PICKLE=1"):
            load(pickled)
    monkeypatch.setenv("SOFTMOA_ALLOW_PICKLE", "1")
    loaded, expected = load(pickled).state_dict(), make().state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected if "softmoa_" in name)


def test_whole_weights_load_over_an_adapter(tmp_path):
    make().save_pretrained(tmp_path)
    loaded, expected = load_over(tmp_path).state_dict(), make().state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected if "softmoa_" in name)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{WEIGHTS}' is damaged"):
        load_over(tmp_path)


def test_pickles_of_other_methods_are_pefts_matter(tmp_path):
    config = LoraConfig(target_modules=["q_proj"])
    make(config).save_pretrained(tmp_path, safe_serialization=False)
    model = make(LoraConfig(target_modules=["q_proj"]))
    model.load_adapter(tmp_path, "default")
    PeftModel.from_pretrained(ASTForAudioClassification(tiny_ast_config()), tmp_path)


@pytest.mark.parametrize("saved_before", [False, True])
def test_what_is_not_read_is_not_written(tmp_path, saved_before):
    model, folder = make(), tmp_path / "adapter"
    if saved_before:
        model.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("adapter_*")}
    with pytest.raises(ValueError, match="`safe_serialization` must be True.*pickle.*Leave it out.*ALLOW_PICKLE=1"):
        model.save_pretrained(folder, safe_serialization=False)
    assert {path.name: path.read_bytes() for path in folder.glob("adapter_*")} == before
    assert (folder / "README.md").exists() == saved_before
    assert not model.peft_config["default"].inference_mode  # PEFT had changed it while it was saving
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", WEIGHTS, "README.md"}


def test_an_adapter_in_a_subfolder_is_not_written_either(tmp_path):
    model = make()
    model.add_adapter("second", SoftMoAConfig())
    with pytest.raises(ValueError, match="`safe_serialization` must be True"):
        model.save_pretrained(tmp_path, selected_adapters=["second"], safe_serialization=False)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("adapter_config.json"))


def test_a_pickle_is_written_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTMOA_ALLOW_PICKLE", "1")
    make().save_pretrained(tmp_path, safe_serialization=False)
    loaded, expected = load_over(tmp_path).state_dict(), make().state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected if "softmoa_" in name)


def test_a_pickle_that_was_there_before_stays(pickled):
    make().save_pretrained(pickled)
    assert (pickled / PICKLE).exists() and (pickled / WEIGHTS).exists()
    SoftMoAConfig().save_pretrained(pickled)


def test_transformers_and_its_trainer_write_safetensors(tmp_path):
    model = ASTForAudioClassification(tiny_ast_config())
    model.add_adapter(SoftMoAConfig())
    model.save_pretrained(tmp_path / "model", safe_serialization=False)
    arguments = TrainingArguments(output_dir=tmp_path / "trainer", report_to="none")
    Trainer(make(), arguments).save_model()
    for folder in ("model", "trainer"):
        assert (tmp_path / folder / WEIGHTS).exists() and not list((tmp_path / folder).glob("adapter*.bin"))
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["peft_type"] == "SOFTMOA"
