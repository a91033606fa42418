import dataclasses
import itertools

import pytest
import torch
from conftest import tiny_ast_config
from peft import get_peft_model
from torch import nn
from transformers import ASTConfig, ASTForAudioClassification, ASTModel

from peft_softmoa import SoftMoAConfig, count_parameters

ROUTINGS = [
    {},
    {"num_slots": 3, "normalize": True},
    {"routing": "dense"},
    {"routing": "dense", "num_experts": 1},
    {"routing": "top_k", "top_k": 1},
    {"routing": "expert_choice"},
]
EXPERTS = [
    {},
    {"expert_type": "convolution", "kernel_size": 5},
    {"expert_type": "convolution", "patch_grid": True},
    {"expert_type": "conformer"},
    {"expert_type": "conformer", "patch_grid": True, "kernel_size": 5},
]
PLACEMENTS = [
    {"placement": "attention"},
    {"placement": "both", "layers_to_transform": [1]},
    {"target_modules": ["fc1", "v_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": ["mlp"], "exclude_modules": ["layers.0.mlp"]},
]
WHOLE_MODULES = [
    {},
    {"train_norms": True},
    {"modules_to_save": ["classifier"], "label_names": ["a", "b"]},
    {"modules_to_save": ["classifier.dense", "audio_spectrogram_transformer.layernorm"]},
]


@pytest.fixture(scope="module")
def ast_base():
    """AST-base, without weights."""
    with torch.device("meta"):
        return ASTModel(ASTConfig())


def tiny_model():
    with torch.device("meta"):
        return ASTForAudioClassification(tiny_ast_config())


def trained(model, config):
    return get_peft_model(model, config).get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_predicted_and_built_counts_agree(routing):
    for expert, placement, whole in itertools.product(EXPERTS, PLACEMENTS, WHOLE_MODULES):
        if expert.get("patch_grid") and "routing" not in routing:
            continue  # slots have no grid
        if whole.get("train_norms") and "target_modules" in placement and placement["target_modules"] != ["mlp"]:
            continue  # some of those layers have no norm in front
        options = {"num_experts": 4, "r": 3, **routing, **expert, **placement, **whole}
        predicted = count_parameters(tiny_model(), SoftMoAConfig(**options))
        assert predicted == trained(tiny_model(), SoftMoAConfig(**options)), options


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
def test_what_peft_adds_for_a_task_counts(task_type):
    options = {"task_type": task_type, "num_experts": 2}
    config = SoftMoAConfig(**options)
    assert count_parameters(tiny_model(), config) == trained(tiny_model(), config)
    config = SoftMoAConfig.for_budget(tiny_model(), 6400, **options)
    assert 6000 < trained(tiny_model(), config) <= 6400


def test_parameters_that_modules_share_are_copied_with_each():
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    model["two"].weight = model["one"].weight
    config = SoftMoAConfig(target_modules=["linear"], modules_to_save=["one", "two"])
    assert count_parameters(model, config) == trained(model, config)


def test_nothing_is_built_or_changed():
    torch.manual_seed(0)
    model = ASTForAudioClassification(tiny_ast_config())
    config = SoftMoAConfig(modules_to_save=["classifier"], train_norms=True, layers_to_transform=[0])
    before, fields = [id(module) for module in model.modules()], dataclasses.asdict(config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert count_parameters(model, config) > 0
    assert dataclasses.asdict(config) == fields
    assert [id(module) for module in model.modules()] == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_has_an_adapter():
    model = get_peft_model(tiny_model(), SoftMoAConfig(modules_to_save=["classifier"], train_norms=True))
    second = SoftMoAConfig(routing="dense", modules_to_save=["classifier"], label_names=["a"], train_norms=True)
    assert count_parameters(model, second) == count_parameters(tiny_model(), second)
    by_expression = SoftMoAConfig(target_modules=r"audio_spectrogram_transformer\.layers\.0\.mlp")
    assert count_parameters(model, by_expression) == count_parameters(tiny_model(), by_expression)
    model.add_adapter("second", second)
    model.set_adapter("second")
    assert model.get_nb_trainable_parameters()[0] == count_parameters(tiny_model(), second)


def test_a_model_that_is_not_from_transformers():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    config = SoftMoAConfig(target_modules=["0", "2"], num_experts=2, r=1)
    assert count_parameters(model, config) == trained(model, config)


def test_targets_that_do_not_exist():
    with pytest.raises(ValueError, match="nowhere.*matches no module of ASTForAudioClassification"):
        count_parameters(tiny_model(), SoftMoAConfig(target_modules=["nowhere"]))


def test_the_papers_budget_gives_the_papers_bottleneck(ast_base):
    config = SoftMoAConfig.for_budget(ast_base, 905_000)
    assert (config.num_experts, config.r) == (7, 6)
    assert count_parameters(ast_base, config) == 903_672


@pytest.mark.parametrize(
    "routing, num_experts",
    [
        *itertools.product(["soft", "dense"], [1, 7, 15, 24]),
        *itertools.product(["top_k", "expert_choice"], [2, 7, 15, 24]),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"expert_type": "convolution"}, {"placement": "ffn", "train_norms": True}], ids=str
)
def test_budgets_are_used_up_and_not_exceeded(ast_base, num_experts, routing, options):
    config = SoftMoAConfig.for_budget(ast_base, 905_000, num_experts=num_experts, routing=routing, **options)
    assert config.num_experts == num_experts and config.routing == routing
    assert count_parameters(ast_base, config) <= 905_000
    assert count_parameters(ast_base, dataclasses.replace(config, r=config.r + 1)) > 905_000


def test_the_largest_number_of_experts_that_fits(ast_base):
    """N·(D + D + 1 + D + D) · 12 layers ≤ 905,000 for N experts with one slot and r=1."""
    largest = 905_000 // (12 * (4 * 768 + 1))
    assert SoftMoAConfig.for_budget(ast_base, 905_000, num_experts=largest).r == 1
    with pytest.raises(ValueError, match=r"`parameters` must be at least 9\d\d,\d\d\d.*num_experts=25.*got 905,000"):
        SoftMoAConfig.for_budget(ast_base, 905_000, num_experts=largest + 1)


@pytest.mark.parametrize(
    "parameters, options, message",
    [
        (0, {}, "`parameters` must be a positive integer, got 0"),
        (9e5, {}, r"`parameters` must be a positive integer, got 900000\.0"),
        (905_000, {"r": 3}, "`r` must be left out of `for_budget`, which finds it, got 3"),
        (905_000, {"top_k": 2}, "`top_k` must be left out"),
    ],
)
def test_bad_budgets(ast_base, parameters, options, message):
    with pytest.raises(ValueError, match=message):
        SoftMoAConfig.for_budget(ast_base, parameters, **options)
