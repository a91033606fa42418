import warnings

import pytest
import torch
from conftest import tiny_ast_config
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ASTFeatureExtractor, ASTForAudioClassification, ASTModel, AutoFeatureExtractor

from peft_softmoa import SoftMoAConfig
from peft_softmoa.inference.loading import load_adapter
from peft_softmoa.quiet import quiet_loading


@pytest.fixture
def backbone(tmp_path):
    """A checkpoint without a head."""
    torch.manual_seed(0)
    ASTModel(tiny_ast_config()).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def reports(caplog):
    return [record.getMessage() for record in caplog.records if "LOAD REPORT" in record.getMessage()]


@pytest.mark.parametrize("new", [["classifier"], ["classifier.dense", "classifier.layernorm"], {"other", "classifier"}])
@pytest.mark.parametrize("in_colour", [False, True])
def test_a_new_head_is_not_reported(backbone, caplog, new, in_colour, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: in_colour, raising=False)
    with quiet_loading(new):
        ASTForAudioClassification.from_pretrained(backbone)
    assert not caplog.records
    # Without it, it is: what is silenced here is still there.
    ASTForAudioClassification.from_pretrained(backbone)
    assert len(reports(caplog)) == 1 and "classifier.dense.weight" in reports(caplog)[0]
    assert ("\x1b[31mMISSING" in reports(caplog)[0]) == in_colour


@pytest.mark.parametrize("new", [(), None, ["dense"], ["classifier.dense"], ["class"]])
def test_what_is_not_meant_to_be_new_is_reported(backbone, caplog, new):
    with quiet_loading(new):
        ASTForAudioClassification.from_pretrained(backbone)
    assert len(reports(caplog)) == 1 and "classifier.layernorm.bias" in reports(caplog)[0]


@pytest.mark.parametrize("change", ["missing", "unexpected", "size"])
def test_other_weights_are_reported_with_the_head(backbone, caplog, change):
    path = backbone / "model.safetensors"
    weights = load_file(path)
    name = "encoder.layer.1.attention.attention.query.weight"
    tensor = weights.pop(name)
    if change == "unexpected":
        weights |= {name: tensor, name.replace("layer.1", "layer.2"): tensor.clone()}
    elif change == "size":
        weights[name] = tensor[:3].clone()
    save_file(weights, path, {"format": "pt"})
    with quiet_loading(["classifier"]):
        ASTForAudioClassification.from_pretrained(backbone, ignore_mismatched_sizes=True)
    [report] = reports(caplog)
    assert f"layers.{2 if change == 'unexpected' else 1}.attention.q_proj.weight" in report


def test_a_head_of_another_size_is_not_reported(tmp_path, caplog):
    ASTForAudioClassification(tiny_ast_config()).save_pretrained(tmp_path)
    with quiet_loading(["classifier"]):
        ASTForAudioClassification.from_pretrained(
            tmp_path, config=tiny_ast_config(num_labels=9), ignore_mismatched_sizes=True
        )
    assert not caplog.records


def test_mel_filters_of_saved_feature_extractors(tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ASTFeatureExtractor(num_mel_bins=128).save_pretrained(tmp_path)
        assert [str(each.message)[:26] for each in seen] == ["At least one mel filter ha"]
        seen.clear()
        with quiet_loading():
            AutoFeatureExtractor.from_pretrained(tmp_path)
            warnings.warn("something else", stacklevel=1)
        assert [str(each.message) for each in seen] == ["something else"]


def test_loading_an_adapter_is_quiet(backbone, tmp_path, caplog):
    ASTFeatureExtractor(num_mel_bins=128).save_pretrained(backbone)
    config = SoftMoAConfig(modules_to_save=["classifier"], label_names=["a", "b"])
    model = get_peft_model(ASTForAudioClassification.from_pretrained(backbone), config)
    model.save_pretrained(tmp_path / "adapter")
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(str(tmp_path / "adapter"))
    assert not reports(caplog)
