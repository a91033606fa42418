"""Values of r, experts and scaling for single blocks."""

import dataclasses
import itertools
import json
import time

import pytest
import torch
from conftest import tiny_ast_config
from families import build
from peft import PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from test_expressions import BOMBS
from transformers import ASTConfig, ASTForAudioClassification, ASTModel

from peft_softmoa import SoftMoAConfig, check_adapter, count_parameters, describe_targets
from peft_softmoa.cli import main
from peft_softmoa.layer import is_adapted
from peft_softmoa.targets.patterns import block_configs, name_patterns

PLACE = "audio_spectrogram_transformer.layers"


def tiny_model(**options):
    return ASTForAudioClassification(tiny_ast_config(**options))


def layers(model):
    return {module.name: module for module in model.modules() if is_adapted(module)}


def sizes(model, adapter="default"):
    """N, R and scaling of each block."""
    found = {}
    for name, layer in layers(model).items():
        experts = layer.softmoa_mixture[adapter].experts
        found[name.removeprefix(f"{PLACE}.")] = (*experts.up_weight.shape[:2], layer.scaling[adapter])
    return found


def test_each_block_gets_its_own():
    config = SoftMoAConfig(
        placement="both", num_experts=3, r=4, scaling=2.0,
        r_pattern={"layers.0.attention": 1, r".*\.mlp": 5},
        num_experts_pattern={"1.mlp": 2},
        scaling_pattern={"^audio.*attention": 0.5, "layers.1.mlp": -1.0},
    )  # fmt: skip
    model = get_peft_model(tiny_model(), config)
    assert sizes(model) == {
        "0.attention": (3, 1, 0.5), "0.mlp": (3, 5, 2.0), "1.attention": (3, 4, 0.5), "1.mlp": (2, 5, -1.0)
    }  # fmt: skip
    assert model.get_nb_trainable_parameters()[0] == count_parameters(tiny_model(), config)
    told = describe_targets(tiny_model(), config)
    built = [sum(each.numel() for each in layer.softmoa_mixture.parameters()) for layer in layers(model).values()]
    assert list(told.parameters_by_block) == built


@pytest.mark.parametrize(
    "pattern",
    ["attention", "layers.1.attention", "1.attention", r".*1.*", r"layers\.\d+\.attention", "^audio.*", "^layers.*",
     "tion", r"(?x) layers \. 1 .* # a comment", "mlp|attention", r"(.)y\1*ers.*"],
)  # fmt: skip
def test_patterns_match_as_in_peft(pattern):
    names = [f"{PLACE}.{index}.{part}" for index in range(2) for part in ("attention", "mlp")]
    own = block_configs(SoftMoAConfig(r_pattern={pattern: 3}), names, must_match=False)
    peft = pattern if "#" not in pattern else r"layers\.1.*"
    assert [each.r == 3 for each in own.values()] == [get_pattern_key([peft], name) == peft for name in names]


def test_a_name_is_no_expression():
    """Its dots are dots."""
    names = ["a.layers.1", "a.layersx1"]
    assert [each.r for each in block_configs(SoftMoAConfig(r_pattern={"layers.1": 3}), names).values()] == [3, 6]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r_pattern": {"layers.2.attention": 3}}, "`r_pattern` gives 'layers.2.attention' the value 3, but that "
         "matches none of the adapted blocks, 'audio_spectrogram_transformer.layers.0.attention'"),
        ({"scaling_pattern": {".*mlp": 0.5}}, "`scaling_pattern` gives '.*mlp' the value 0.5, but that matches none"),
        ({"num_experts_pattern": {".*0.*": 2, "layers.0.attention": 3}}, "`num_experts_pattern` has two patterns for "
         "'audio_.*layers.0.attention': 'layers.0.attention', which gives 3, and '.*0.*', which gives 2. Keep one"),
        ({"r_pattern": {".*": 2, "attention": 2}}, "`r_pattern` has two patterns for"),
        ({"r_pattern": {"((.|[a-z])+)+[A-Z]": 2}}, "`r_pattern=.*` takes too long to match"),
    ],
)  # fmt: skip
def test_patterns_that_match_nothing_or_two_ways(options, message, tmp_path):
    model = tiny_model()
    for run in (get_peft_model, describe_targets):
        with pytest.raises(ValueError, match=message):
            run(model, SoftMoAConfig(**options))
    assert not layers(model)
    # The same holds for files.
    get_peft_model(tiny_model(), SoftMoAConfig()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    for load in (lambda: PeftModel.from_pretrained(tiny_model(), tmp_path), lambda: check_adapter(tmp_path)):
        with pytest.raises(ValueError, match=message):
            load()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r_pattern": {"a": 0}}, "^`r_pattern` must give 'a' an integer from 1 to 65536, got 0"),
        ({"r_pattern": {"a": 1, "b": True}}, "^`r_pattern` must give 'b' an integer from 1 to 65536, got True"),
        ({"r_pattern": {"a": 2.0}}, "^`r_pattern` must give 'a' an integer from 1 to 65536, got 2.0"),
        ({"num_experts_pattern": {".*b": "3"}}, "^`num_experts_pattern` must give '.*b' an integer .*, got '3'"),
        ({"scaling_pattern": {"a": float("inf")}}, "^`scaling_pattern` must give 'a' a finite number, got inf"),
        ({"routing": "top_k", "num_experts_pattern": {"a": 1}}, "^`num_experts_pattern` must give 'a' a number of "
         "experts that fits the other fields, got 1: `num_experts` must be at least 2 with routing='top_k'"),
        ({"routing": "top_k", "top_k": 4, "num_experts_pattern": {"a": 3}}, "got 3: `top_k` must be an integer from 1"),
        ({"routing": "expert_choice", "capacity_factor": 4, "num_experts_pattern": {"a": 3}}, "got 3: `capacity_fac"),
        ({"r_pattern": ["a"]}, "^`r_pattern` must be None, or values by names of blocks, .*, got \\['a'\\]"),
        ({"r_pattern": {"(": 1}}, "^`r_pattern` must be None, or values by names"),
        ({"r_pattern": {"": 1}}, None),
        ({"r_pattern": {3: 1}}, "^`r_pattern` must be None, or values by names"),
        ({"r_pattern": {f"a{index}": 1 for index in range(5001)}}, "^`r_pattern` must be None, or values by names"),
        ({"r_pattern": {"a*" * 500: 1, "b*" * 501: 1}}, "^`r_pattern` must be None, or values by names"),
        ({"r_pattern": {"(a*){11}" + "b" * 900: 1, "(a*){12}" + "b" * 900: 1}}, "^`r_pattern` must be None, or values"),
    ],
)  # fmt: skip
def test_values_and_patterns_that_are_not_allowed(options, message):
    if message is None:
        with pytest.raises(ValueError, match="`r_pattern` gives '' the value 1, but that matches none"):
            describe_targets(tiny_model(), SoftMoAConfig(**options))
        return
    with pytest.raises(ValueError, match=message):
        SoftMoAConfig(**options)


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_expressions_take_no_time(name):
    """All fields with expressions at once, with names of blocks as long as a file may have them."""
    names = ["a." * 50 + "b", *(f"encoder.layers.{index}.attention.output.dense" for index in range(48))]
    began = time.process_time()
    fields = {field: {BOMBS[name]: 2} for field in ("r_pattern", "num_experts_pattern", "scaling_pattern")}
    try:
        config = SoftMoAConfig(**fields)
        block_configs(config, names, must_match=False)
    except ValueError as error:
        assert any(f"`{field}" in str(error) for field in fields)
    assert time.process_time() - began < 2


def test_very_many_names_take_no_time():
    names = [f"layers.{index}.attention" for index in range(5000)]
    began = time.process_time()
    own = block_configs(SoftMoAConfig(r_pattern=dict.fromkeys(names[1:], 2)), names)
    assert [each.r for each in own.values()] == [6] + 4999 * [2]
    assert time.process_time() - began < 2
    block_configs(SoftMoAConfig(r_pattern={"x": 2}), ["a." * 100_000 + "x"])
    assert time.process_time() - began < 2


def test_the_command_line_takes_json(tmp_path, capsys, monkeypatch):
    tiny_model().config.save_pretrained(tmp_path)
    main(["targets", str(tmp_path), "--r_pattern", '{"layers.0.attention": 2}', "--json"])
    told = json.loads(capsys.readouterr().out)
    config = SoftMoAConfig(r_pattern={"layers.0.attention": 2})
    with torch.device("meta"):
        expected = count_parameters(ASTForAudioClassification(tiny_ast_config()), config)
    assert told["parameters"] == expected
    with pytest.raises(SystemExit, match="--r_pattern must be JSON, as in .*, got 'layers.0=2'"):
        main(["targets", str(tmp_path), "--r_pattern", "layers.0=2"])
    with pytest.raises(SystemExit, match="leave out --r_pattern, got"):
        main(["targets", str(tmp_path), "--r_pattern", '{"layers.0.attention": 2}', "--budget", "3000"])


def test_survives_saving(tmp_path):
    patterns = {"r_pattern": {"a": 2, ".*b": 3}, "num_experts_pattern": {"c": 2}, "scaling_pattern": {"d": 0.5}}
    config = SoftMoAConfig(**patterns)
    config.save_pretrained(tmp_path)
    loaded = SoftMoAConfig.from_pretrained(tmp_path)
    assert loaded == config and loaded.r_pattern == patterns["r_pattern"]
    assert name_patterns(vars(config)) == "r 2 for 'a', r 3 for '.*b', num_experts 2 for 'c', scaling 0.5 for 'd'"
    many = {"r_pattern": {str(index): 1 for index in range(9)}}
    assert name_patterns(many).endswith("r 1 for '3', r for 5 more") and name_patterns({}) == ""


def test_a_config_without_patterns_is_as_before(tmp_path):
    """What earlier versions wrote has no such fields."""
    SoftMoAConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: value for name, value in fields.items() if "pattern" not in name or "layers" in name})
    )
    assert SoftMoAConfig.from_pretrained(tmp_path) == SoftMoAConfig()


def test_check_adapter_knows_them(tmp_path):
    patterns = {"r_pattern": {"layers.0.attention": 2}, "num_experts_pattern": {".*1.attention": 3}}
    config = SoftMoAConfig(**patterns)
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    told = describe_targets(tiny_model(), config)
    assert list(check_adapter(tmp_path).blocks.values()) == list(told.parameters_by_block)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r_pattern": {"layers.0.attention": 3}}))
    with pytest.raises(ValueError, match="does not fit its config: '.*layers.0.attention' has a mixture of shapes"):
        check_adapter(tmp_path)
    with pytest.raises(ValueError, match="does not fit its config"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_averages_need_the_same_patterns():
    model = get_peft_model(tiny_model(), SoftMoAConfig(r_pattern={"layers.0.attention": 2}), "one")
    model.add_adapter("two", SoftMoAConfig(r_pattern={"layers.0.attention": 2}))
    model.add_adapter("three", SoftMoAConfig())
    model.base_model.average_adapters(["one", "two"], new_name="both")
    assert sizes(model, "both") == sizes(model, "one")
    with pytest.raises(ValueError, match=r"they differ in \['r_pattern'\]"):
        model.base_model.average_adapters(["one", "three"])


@pytest.fixture(scope="module")
def ast_base():
    """AST-base, without weights."""
    with torch.device("meta"):
        return ASTModel(ASTConfig())


def by_layer(model, config):
    own = block_configs(config, [target.name for target in describe_targets(model, config).targets])
    return [each.r for each in own.values()]


EXPERTS = [
    {},
    {"routing": "dense", "num_experts": 1},
    {"routing": "dense", "expert_type": "conformer", "num_experts": 2},
]


@pytest.mark.parametrize("options", EXPERTS, ids=str)
@pytest.mark.parametrize("budget", [400_000, 905_000, 3_000_001])
def test_allocations(ast_base, options, budget):
    uniform = SoftMoAConfig.for_budget(ast_base, budget, **options)
    assert uniform == SoftMoAConfig.for_budget(ast_base, budget, allocate="uniform", **options)
    assert uniform.r_pattern is None
    late, middle = (SoftMoAConfig.for_budget(ast_base, budget, allocate=how, **options) for how in ("late", "middle"))
    for config in (late, middle):
        assert config.r == uniform.r
        assert 0.9 * budget < count_parameters(ast_base, config) <= budget
    rising, hill = by_layer(ast_base, late), by_layer(ast_base, middle)
    assert rising == sorted(rising) and rising[-1] > uniform.r > rising[0]
    assert hill == hill[::-1] and hill[:6] == sorted(hill[:6]) and hill[5] > uniform.r > hill[0]
    # In proportion to the depth, but for rounding and the least of 1.
    steps = [(index + 0.5) / 12 for index in range(12)]
    scale = rising[-1] / steps[-1]
    assert all(abs(r - max(1, scale * step)) <= 1.1 for r, step in zip(rising, steps))


def test_allocations_go_by_layers():
    model = build("Wav2Vec2")
    config = SoftMoAConfig.for_budget(model, 12_000, allocate="late", placement="both", num_experts=2)
    found = by_layer(model, config)
    assert found[0] == found[1] < found[2] == found[3]
    built = get_peft_model(model, config)
    assert built.get_nb_trainable_parameters()[0] == count_parameters(build("Wav2Vec2"), config) <= 12_000


def test_allocations_name_blocks_whose_names_end_alike():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(4, 4)})

    config = SoftMoAConfig.for_budget(Both(), 2000, allocate="late", routing="dense", target_modules=["lm_head"])
    assert set(config.r_pattern) == {"^lm_head", "inner.lm_head"}
    assert get_peft_model(Both(), config).get_nb_trainable_parameters()[0] <= 2000


@pytest.mark.parametrize(
    "parameters, options, message",
    [
        (905_000, {"allocate": "early"}, "`allocate` must be one of uniform, middle, late, got 'early'"),
        (905_000, {"r_pattern": {"attention": 3}}, "`r_pattern` must be left out of `for_budget`, which finds it"),
        (100, {"allocate": "late"}, "`parameters` must be at least"),
    ],
)
def test_bad_allocations(ast_base, parameters, options, message):
    with pytest.raises(ValueError, match=message):
        SoftMoAConfig.for_budget(ast_base, parameters, **options)


def test_counts_agree_over_a_grid():
    choices = itertools.product(
        [{}, {"routing": "dense"}, {"routing": "top_k"}],
        [{}, {"expert_type": "convolution"}, {"expert_type": "conformer"}],
        [{"r_pattern": {".*0.*": 1}}, {"num_experts_pattern": {"layers.1.mlp": 2}, "r_pattern": {".*mlp": 9}}],
    )
    for choice in choices:
        options = {"placement": "both", "num_experts": 3, "r": 2, **choice[0], **choice[1], **choice[2]}
        config = SoftMoAConfig(**options)
        model = get_peft_model(tiny_model(), dataclasses.replace(config))
        assert model.get_nb_trainable_parameters()[0] == count_parameters(tiny_model(), config), options
