import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_ast_config
from transformers import ASTForAudioClassification, BertConfig

from peft_softmoa import SoftMoAConfig, describe_targets
from peft_softmoa.cli import main
from peft_softmoa.commands.targets import empty_model


@pytest.fixture
def config_folder(tmp_path):
    """A model of which only the config is there."""
    config = tiny_ast_config()
    config.architectures = ["ASTForAudioClassification"]
    config.save_pretrained(tmp_path)
    return tmp_path


def test_targets(config_folder, capsys):
    options = ["--placement", "ffn", "--routing", "dense", "--num_experts", "3", "--modules_to_save", "classifier"]
    main(["targets", str(config_folder), *options, "--layers_to_transform", "1"])
    with torch.device("meta"):
        model = ASTForAudioClassification(tiny_ast_config())
    config = SoftMoAConfig(
        placement="ffn", routing="dense", num_experts=3, modules_to_save=["classifier"], layers_to_transform=[1]
    )
    assert capsys.readouterr().out == f"{describe_targets(model, config)}\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["mlp"], ["mlp"]),
        (["layers.0.mlp", "layers.1.attention"], ["layers.0.mlp", "layers.1.attention"]),
        (["all-linear"], "all-linear"),
        ([r".*layers\.(0|1)\.mlp"], r".*layers\.(0|1)\.mlp"),
    ],
)
def test_forms_of_target_modules(config_folder, capsys, words, wanted):
    main(["targets", str(config_folder), "--routing", "dense", "--target_modules", *words])
    description = describe_targets(
        empty_model(str(config_folder)), SoftMoAConfig(routing="dense", target_modules=wanted)
    )
    assert capsys.readouterr().out == f"{description}\n"


def test_classes_of_an_own_head(config_folder, capsys):
    main(["targets", str(config_folder), "--modules_to_save", "classifier", "--label_names", "a", "b", "c"])
    config = SoftMoAConfig(modules_to_save=["classifier"], label_names=["a", "b", "c"])
    assert capsys.readouterr().out == f"{describe_targets(empty_model(str(config_folder)), config)}\n"


def test_a_budget_and_lora_beside_it(config_folder, capsys):
    main(["targets", str(config_folder), "--budget", "3000", "--compare", "lora", "--json"])
    told = json.loads(capsys.readouterr().out)
    model = empty_model(str(config_folder))
    config = SoftMoAConfig.for_budget(model, 3000)
    assert told["r"] == config.r and told["parameters"] == describe_targets(model, config).parameters <= 3000
    assert describe_targets(model, replace(config, r=config.r + 1)).parameters > 3000
    # Four linear layers of width 32 in each of two attentions.
    assert told["lora"]["parameters"] == 8 * config.r * 64 and len(told["lora"]["linear_layers"]) == 8
    assert [block["parameters"] for block in told["blocks"]] == [told["parameters"] // 2] * 2
    main(["targets", str(config_folder), "--budget", "3000", "--compare", "lora"])
    lines = capsys.readouterr().out.splitlines()
    assert f"r={config.r} is the largest within 3,000 parameters" in lines
    assert (
        f"LoRA of rank {config.r} on the 8 linear layers in these blocks trains {512 * config.r:,} parameters," in lines
    )
    with pytest.raises(SystemExit, match="targets: --budget must be at least 1,806"):
        main(["targets", str(config_folder), "--budget", "3"])
    with pytest.raises(SystemExit, match="targets: --budget finds r: leave out --r, got 3"):
        main(["targets", str(config_folder), "--budget", "3000", "--r", "3"])


def test_it_is_installed_as_a_command(config_folder):
    command = Path(sys.executable).with_name("peft-softmoa")
    done = subprocess.run([command, "targets", config_folder], capture_output=True, text=True, check=True)
    assert "audio_spectrogram_transformer.layers.0-1" in done.stdout


def test_the_model_has_no_weights(config_folder):
    model = empty_model(str(config_folder))
    assert isinstance(model, ASTForAudioClassification) and {weight.device.type for weight in model.parameters()} == {
        "meta"
    }


@pytest.mark.parametrize("architectures", [None, ["AutoModel"], ["Unknown"]])
def test_a_config_that_names_no_class(tmp_path, architectures):
    config = tiny_ast_config()
    config.architectures = architectures
    config.save_pretrained(tmp_path)
    assert type(empty_model(str(tmp_path))).__name__ == "ASTModel"


def test_errors_are_one_message(tmp_path):
    BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32).save_pretrained(
        tmp_path
    )
    with pytest.raises(SystemExit, match="peft-softmoa targets: --placement looks for the audio encoder of a model"):
        main(["targets", str(tmp_path)])
    with pytest.raises(SystemExit, match="targets: --num_experts must be an integer from 1 to 65536, got 0"):
        main(["targets", str(tmp_path), "--num_experts", "0"])
    with pytest.raises(SystemExit, match="peft-softmoa targets: "):
        main(["targets", str(tmp_path / "missing")])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing", "model"], "peft-softmoa: there is no command nothing."),
        (["target", "model"], "peft-softmoa: there is no command target. Do you mean targets?"),
        (["targets"], "peft-softmoa targets: the following arguments are required: model"),
        (["targets", "model", "--rooting", "soft"], "targets: there is no option --rooting. Do you mean --routing?"),
        (["targets", "model", "--num_experts=x"], "targets: argument --num_experts/--num-experts: invalid int value"),
        (["targets", "model", "--num_exp", "3"], "targets: there is no option --num_exp. Do you mean --num_experts?"),
        (["recipes", "esc50", "more"], "peft-softmoa recipes: unrecognized arguments: more"),
    ],
)
def test_words_that_are_not_understood(words, says, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    first, pointer = capsys.readouterr().err.splitlines()
    assert says in first and pointer.endswith("--help`.")
