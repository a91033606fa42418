import dataclasses
import json
import re
import warnings

import pytest
from peft import PeftConfig, PeftType

from peft_softmoa import SoftMoAConfig

NO_LENGTHS = (0, -1, float("nan"), float("inf"), 1e9, 60.5, "5", True)


def test_defaults_are_the_papers():
    config = SoftMoAConfig()
    expected = {
        "routing": "soft",
        "expert_type": "bottleneck",
        "train_norms": False,
        "num_experts": 7,
        "num_slots": 1,
        "r": 6,
        "placement": "attention",
        "normalize": False,
        "unit_slots": False,
        "activation": "gelu",
        "dropout": 0.0,
        "scaling": 1.0,
        "init_weights": True,
    }
    assert {name: config.choices()[name] for name in expected} == expected
    assert config.peft_type is PeftType.SOFTMOA


def test_every_field_has_its_help():
    own = {field.name for field in dataclasses.fields(SoftMoAConfig)} - {
        field.name for field in dataclasses.fields(PeftConfig)
    }
    assert len(own) == 34
    for field in dataclasses.fields(SoftMoAConfig):
        assert field.metadata.get("help"), field.name


def test_survives_saving(tmp_path):
    config = SoftMoAConfig(
        num_experts=3,
        num_slots=2,
        r=4,
        placement="both",
        normalize=True,
        activation="relu",
        dropout=0.1,
        scaling=0.5,
        target_modules=["attention", "mlp"],
        exclude_modules=["layers.0.mlp"],
        modules_to_save=["classifier"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        label_names=["a", "b"],
        max_length_seconds=2.5,
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SOFTMOA"
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert SoftMoAConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("num_experts", 0, "an integer from 1 to 65536"),
        ("num_experts", True, "an integer from 1 to 65536"),
        ("num_channels", 0, "None or an integer from 1 to 1,024"),
        ("num_channels", 2.0, "None or an integer from 1 to 1,024"),
        ("channel_embedding", 1, "True or False"),
        ("channel_embedding", False, "True unless `num_channels` is given"),
        ("num_slots", -1, "an integer from 1 to 65536"),
        ("num_slots", 1.5, "an integer from 1 to 65536"),
        ("routing", "sparse", "one of soft, dense, top_k, expert_choice"),
        ("expert_type", "lora", "one of bottleneck, convolution"),
        ("train_norms", "yes", "True or False"),
        ("r", 0, "an integer from 1 to 65536"),
        ("r", "6", "an integer from 1 to 65536"),
        ("placement", "everywhere", "one of attention, ffn, both"),
        ("activation", "gulu", "one of gelu,"),
        ("activation", "prelu", "one of gelu,"),
        ("dropout", 1.0, "a number in [0, 1)"),
        ("dropout", -0.1, "a number in [0, 1)"),
        ("dropout", float("nan"), "a number in [0, 1)"),
        ("scaling", float("inf"), "a finite number"),
        ("scaling", "1", "a finite number"),
        ("normalize", 1, "True or False"),
        ("init_weights", "gaussian", "True or False"),
        ("label_names", [], "distinct class names"),
        ("label_names", ["a", "a"], "distinct class names"),
        ("label_names", "ab", "distinct class names"),
        ("target_modules", 5, "None, names, or a regular expression"),
        ("exclude_modules", 5.0, "None, names, or a regular expression"),
        ("modules_to_save", "classifier", "None or a list of at most 256 names"),
        ("layers_to_transform", "1", "an index or a list of indices"),
        *(("max_length_seconds", value, "a number of seconds above 0, at most 60") for value in NO_LENGTHS),
    ],
)
def test_bad_values_name_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f"`{field}` must be .*{re.escape(allowed)}.*got {re.escape(repr(value))}"):
        SoftMoAConfig(**{field: value})


TOP_K = {"routing": "top_k"}
CHOICE = {"routing": "expert_choice"}
CONVOLUTION = {"expert_type": "convolution"}


@pytest.mark.parametrize(
    "options, field, value, allowed",
    [
        (TOP_K, "top_k", 8, "an integer from 1 to `num_experts`, 7"),
        (TOP_K, "top_k", 0, "an integer from 1 to `num_experts`, 7"),
        (TOP_K, "top_k", 1.0, "an integer from 1 to `num_experts`, 7"),
        (TOP_K, "router_aux_loss_coef", -0.1, "a number from 0"),
        (TOP_K, "router_aux_loss_coef", float("nan"), "a number from 0"),
        (TOP_K | {"top_k": 1}, "router_aux_loss_coef", 0.0, "above 0 with top_k=1"),
        (TOP_K, "num_experts", 1, "at least 2 with routing='top_k'; a single adapter is routing='dense'"),
        (CHOICE, "num_experts", 1, "at least 2 with routing='expert_choice'"),
        (CHOICE, "capacity_factor", 0.0, "a number from 0.001 to `num_experts`, 7"),
        (CHOICE, "capacity_factor", 7.5, "a number from 0.001 to `num_experts`, 7"),
        (CHOICE, "capacity_factor", "1", "a number from 0.001 to `num_experts`, 7"),
        (CONVOLUTION, "kernel_size", 4, "odd and positive"),
        (CONVOLUTION, "kernel_size", -1, "odd and positive"),
        (CONVOLUTION, "kernel_size", 3.0, "odd and positive"),
        (CONVOLUTION, "patch_grid", True, "False with routing='soft'"),
        (CONVOLUTION | TOP_K, "patch_grid", 1, "True or False"),
        ({"routing": "dense"}, "num_slots", 1, "left out unless routing='soft' (here routing='dense')"),
        (TOP_K, "num_slots", 2, "left out unless routing='soft' (here routing='top_k')"),
        (CHOICE, "normalize", True, "left out unless routing='soft' (here routing='expert_choice')"),
        ({}, "top_k", 2, "left out unless routing='top_k' (here routing='soft')"),
        ({"routing": "dense"}, "router_aux_loss_coef", 0.01, "left out unless routing='top_k'"),
        (TOP_K, "capacity_factor", 1.0, "left out unless routing='expert_choice'"),
        ({}, "kernel_size", 3, "left out unless expert_type='convolution' or 'conformer' (here"),
        ({"routing": "dense"}, "num_slots", False, "left out unless routing='soft'"),
        ({"routing": "dense"}, "patch_grid", True, "left out unless expert_type='convolution'"),
    ],
)
def test_fields_that_belong_to_a_choice(options, field, value, allowed):
    with pytest.raises(ValueError, match=f"^`{field}` must be .*{re.escape(allowed)}.*got {re.escape(repr(value))}"):
        SoftMoAConfig(**{**options, field: value})


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"num_slots": 1}),
        ({"routing": "dense"}, {}),
        (TOP_K, {"top_k": 2, "router_aux_loss_coef": 0.01}),
        (CHOICE, {"capacity_factor": 1.0}),
        (CONVOLUTION, {"num_slots": 1, "kernel_size": 3}),
    ],
)
def test_defaults_of_fields_that_belong_to_a_choice(options, expected, tmp_path):
    config = SoftMoAConfig(**options)
    names = ("num_slots", "top_k", "router_aux_loss_coef", "capacity_factor", "kernel_size")
    assert all(getattr(config, name) is None for name in names if name not in options)
    assert {name: config.choices()[name] for name in names} == {name: expected.get(name) for name in names}
    config.save_pretrained(tmp_path)
    assert SoftMoAConfig.from_pretrained(tmp_path) == config


def test_another_choice_leaves_nothing_of_the_one_before():
    """The defaults of a choice are put in when an adapter is built, so that a config can be changed by a field."""
    config = SoftMoAConfig()
    for routing in ("dense", "top_k", "expert_choice", "soft"):
        config = dataclasses.replace(config, routing=routing)
        assert config.mixture_options()["routing"] == routing
    with pytest.raises(ValueError, match="`num_slots` must be left out unless routing='soft'"):
        dataclasses.replace(SoftMoAConfig(num_slots=2), routing="dense")


def test_a_convolution_over_one_slot_is_warned_of():
    with pytest.warns(UserWarning, match="num_slots=1 a convolution has no neighbours"):
        SoftMoAConfig(expert_type="convolution")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SoftMoAConfig(expert_type="convolution", num_slots=2)
        SoftMoAConfig(expert_type="convolution", routing="dense")


def test_one_field_changes_the_routing_and_one_the_experts():
    for routing in ("soft", "dense", "top_k", "expert_choice"):
        for expert_type in ("bottleneck", "convolution", "conformer"):
            SoftMoAConfig(routing=routing, expert_type=expert_type)


@pytest.mark.parametrize(
    "options, field",
    [
        ({"target_modules": ".*attention", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ".*attention", "layers_pattern": "layers"}, "layers_pattern"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"label_names": ["a", "b"]}, "modules_to_save"),
    ],
)
def test_fields_that_do_not_go_together(options, field):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        SoftMoAConfig(**options)


def test_names_of_modules_become_sets_as_in_peft():
    config = SoftMoAConfig(target_modules=["a", "b"], exclude_modules=("c",))
    assert config.target_modules == {"a", "b"} and config.exclude_modules == {"c"}
    assert SoftMoAConfig(target_modules=".*a").target_modules == ".*a"
