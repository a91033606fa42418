import copy
import io
import pickle
import shutil

import pytest
import torch
from conftest import tiny_ast_config
from families import FAMILIES, build
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import ASTConfig, ASTForAudioClassification, ASTModel, Wav2Vec2Model

from peft_softmoa import SoftMoAConfig, SoftMoALayer
from peft_softmoa import model as model_module
from peft_softmoa.calls.forward_pass import find_passes


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, SoftMoALayer)]


def adapter_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".softmoa_" in name}


@torch.no_grad()
def logits(model, inputs):
    return model(inputs).logits


@pytest.mark.parametrize("placement, factor", [("attention", 1), ("ffn", 1), ("both", 2)])
def test_parameter_count_of_the_paper(placement, factor):
    with torch.device("meta"):
        model = ASTModel(ASTConfig())
    model = get_peft_model(model, SoftMoAConfig(placement=placement))
    assert model.get_nb_trainable_parameters()[0] == factor * 903_672


@pytest.mark.parametrize(
    "placement, blocks", [("attention", ["attention"]), ("ffn", ["mlp"]), ("both", ["attention", "mlp"])]
)
def test_placement_chooses_and_the_config_says_what(tiny_ast, placement, blocks):
    config = SoftMoAConfig(placement=placement)
    model = get_peft_model(tiny_ast, config)
    prefix = "audio_spectrogram_transformer.layers"
    assert adapted(model.get_base_model()) == [f"{prefix}.{layer}.{block}" for layer in range(2) for block in blocks]
    assert config.target_modules == set(blocks)


ROUTINGS = [
    {},
    {"normalize": True, "num_slots": 2},
    {"unit_slots": True},
    {"routing": "dense"},
    {"routing": "dense", "num_experts": 1},
    {"routing": "top_k"},
    {"routing": "top_k", "top_k": 1},
    {"routing": "expert_choice"},
]
CONVOLUTION = {"expert_type": "convolution"}
CONFORMER = {"expert_type": "conformer"}


@pytest.mark.parametrize(
    "options",
    [
        *ROUTINGS,
        *(routing | CONVOLUTION for routing in ROUTINGS),
        {"routing": "dense", "patch_grid": True} | CONVOLUTION,
        *(routing | CONFORMER | {"kernel_size": 3} for routing in ROUTINGS),
        {"routing": "dense", "r": 1} | CONFORMER,
        {"routing": "dense", "patch_grid": True} | CONFORMER,
        {"r_pattern": {"layers.0.attention": 1}, "num_experts_pattern": {".*1.attention": 2}},
        {"placement": "both"},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "routing": "top_k"},
    ],
    ids=str,
)
def test_starts_as_a_no_op_and_trains_every_adapter_tensor_and_nothing_else(tiny_ast, spectrograms, options):
    before = logits(tiny_ast, spectrograms)
    model = get_peft_model(tiny_ast, SoftMoAConfig(**options))
    assert torch.equal(logits(model, spectrograms), before)

    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(4):  # the expert that the few class tokens of the last layer choose may change
        optimizer.zero_grad()
        model(spectrograms, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) != (".softmoa_" in name), name
    assert not torch.equal(logits(model.eval(), spectrograms), before)


def test_layers_to_transform(tiny_ast):
    model = get_peft_model(tiny_ast, SoftMoAConfig(placement="both", layers_to_transform=[1]))
    assert len(adapted(model)) == 2 and all(".layers.1." in name for name in adapted(model))


def test_layers_to_transform_at_the_top_of_the_model():
    model = get_peft_model(ASTModel(tiny_ast_config()), SoftMoAConfig(placement="both", layers_to_transform=[1]))
    assert len(adapted(model)) == 2 and all(".layers.1." in name for name in adapted(model))


def test_exclude_modules(tiny_ast):
    model = get_peft_model(tiny_ast, SoftMoAConfig(placement="both", exclude_modules=["layers.0.mlp"]))
    assert [name.split("layers.")[1] for name in adapted(model)] == ["0.attention", "1.attention", "1.mlp"]


@pytest.mark.parametrize(
    "target_modules, count",
    [(["q_proj", "v_proj"], 4), (r".*layers\.0\.(mlp|attention)", 2), (["layers.1.mlp.fc2"], 1), ("all-linear", 13)],
)
def test_named_targets(tiny_ast, spectrograms, target_modules, count):
    before = logits(tiny_ast, spectrograms)
    model = get_peft_model(tiny_ast, SoftMoAConfig(target_modules=target_modules, init_weights=False))
    assert len(adapted(model)) == count
    assert not torch.equal(logits(model, spectrograms), before)


def test_tokens_of_two_dimensions():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model = get_peft_model(mlp, SoftMoAConfig(target_modules=["0", "2"], init_weights=False))
    assert len(adapted(model)) == 2
    assert model(torch.randn(5, 4)).shape == (5, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["nowhere"]}, "nowhere.*not found"),
        ({"target_modules": ["attention", "projection"]}, "'.*projection', a Conv2d, which cannot be adapted"),
        ({"target_modules": ["mlp", "fc2"]}, "'.*0.mlp.fc2' and also '.*0.mlp', which contains it"),
        ({"label_names": ["a", "b"], "modules_to_save": ["layernorm"]}, "no classification head.*5 outputs"),
    ],
)
def test_what_cannot_be_adapted_leaves_the_model_as_it_was(tiny_ast, spectrograms, options, message):
    before, names = logits(tiny_ast, spectrograms), list(tiny_ast.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_ast, SoftMoAConfig(**options))
    assert list(tiny_ast.state_dict()) == names and not hasattr(tiny_ast, "peft_config")
    assert torch.equal(logits(tiny_ast, spectrograms), before)
    assert all(parameter.requires_grad for parameter in tiny_ast.parameters())


@pytest.mark.parametrize("first, second", [(["q_proj"], ["attention"]), (["fc1"], ["mlp"])])
def test_a_block_around_an_adapted_layer_is_refused(tiny_ast, spectrograms, first, second):
    """Its adapter would move to other names, and would neither load nor unload."""
    model = get_peft_model(tiny_ast, SoftMoAConfig(target_modules=first, init_weights=False))
    before, names = logits(model, spectrograms), list(model.state_dict())
    with pytest.raises(ValueError, match=f"'.*{second[0]}', but '.*{first[0]}' in it has an adapter already"):
        model.add_adapter("second", SoftMoAConfig(target_modules=second))
    assert list(model.state_dict()) == names and torch.equal(logits(model, spectrograms), before)


def test_a_layer_with_an_adapter_of_another_method_is_refused(tiny_ast):
    tiny_ast.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    for target in ("q_proj", "attention"):
        with pytest.raises(ValueError, match="has an adapter already"):
            tiny_ast.add_adapter(SoftMoAConfig(target_modules=[target]), f"mixture on {target}")


@pytest.mark.parametrize("target_modules", [["embeddings"], ["patch_embeddings"], ["layers"]])
def test_blocks_that_do_not_read_tokens(tiny_ast, target_modules):
    with pytest.raises(ValueError, match="cannot be adapted"):
        get_peft_model(tiny_ast, SoftMoAConfig(target_modules=target_modules))


def test_flex_attention_finds_the_widths():
    model = ASTModel._from_config(tiny_ast_config(), attn_implementation="flex_attention")
    model = get_peft_model(model, SoftMoAConfig())
    layers = [module for module in model.modules() if isinstance(module, SoftMoALayer)]
    targets = [layer.softmoa_targets["default"] for layer in layers]
    assert [(target.in_features, target.out_features) for target in targets] == [(32, 32), (32, 32)]


def test_empty_batches():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), SoftMoAConfig(target_modules=["0"], init_weights=False))
    assert model(torch.randn(0, 4)).shape == (0, 6) and model(torch.randn(0, 3, 4)).shape == (0, 3, 6)


def test_embeddings_cannot_be_adapted():
    model = nn.ModuleDict({"words": nn.Embedding(5, 4), "linear": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="'words', a Embedding, which cannot be adapted"):
        get_peft_model(model, SoftMoAConfig(target_modules=["linear", "words"]))
    assert not adapted(model)


def test_whole_modules_as_targets(tiny_wav2vec2):
    model = tiny_wav2vec2(pre_norm=False)
    model = get_peft_model(model, SoftMoAConfig(target_modules=["attention", "feed_forward"]))
    assert len(adapted(model)) == 4
    assert model(torch.randn(2, 800)).last_hidden_state.isfinite().all()


def test_merging_is_refused_and_changes_nothing(tiny_ast, spectrograms):
    model = get_peft_model(tiny_ast, SoftMoAConfig(init_weights=False))
    before, names = logits(model, spectrograms), list(model.state_dict())
    for method in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(ValueError, match="cannot be merged.*depends on the input"):
            method()
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model, spectrograms), before)
    assert not model.supports_lora_conversion()


def test_unload_gives_the_base_model_back(tiny_ast, spectrograms):
    state, before = copy.deepcopy(tiny_ast.state_dict()), logits(tiny_ast, spectrograms)
    kinds = [type(module) for module in tiny_ast.modules()]
    model = get_peft_model(
        tiny_ast,
        SoftMoAConfig(placement="both", init_weights=False, modules_to_save=["classifier"], label_names=["a", "b"]),
    )
    assert logits(model, spectrograms).shape == (3, 2)
    base = model.unload()
    assert base is tiny_ast
    assert [type(module) for module in base.modules()] == kinds
    assert list(base.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert base.config.num_labels == 5
    assert torch.equal(logits(base, spectrograms), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    again = get_peft_model(base, SoftMoAConfig())
    assert torch.equal(logits(again, spectrograms), before)


def test_disable_adapter(tiny_ast, spectrograms):
    before = logits(tiny_ast, spectrograms)
    model = get_peft_model(tiny_ast, SoftMoAConfig(init_weights=False, modules_to_save=["classifier"]))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].dense.bias.add_(1)
    changed = logits(model, spectrograms)
    assert not torch.equal(changed, before)
    with model.disable_adapter():
        assert torch.equal(logits(model, spectrograms), before)
    assert torch.equal(logits(model, spectrograms), changed)


def test_adapter_weights_follow_pefts_dtype_rules(tiny_ast, spectrograms):
    base = tiny_ast.to(torch.bfloat16)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(copy.deepcopy(base), SoftMoAConfig(init_weights=False), autocast_adapter_dtype=autocast)
        assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {dtype}
        output = logits(model, spectrograms.to(torch.bfloat16))
        assert output.dtype == torch.bfloat16 and output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(tiny_ast, spectrograms, dtype):
    model = get_peft_model(tiny_ast, SoftMoAConfig(placement="both", init_weights=False))
    with torch.autocast("cpu", dtype=dtype):
        loss = model(spectrograms, labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter_parameters(model).values())


def test_adapters_of_different_routing(tiny_ast, spectrograms):
    choices = {
        "soft": {"num_slots": 2},
        "dense": {"routing": "dense", "expert_type": "convolution", "patch_grid": True, "placement": "both"},
        "single": {"routing": "dense", "num_experts": 1, "placement": "ffn", "train_norms": True},
        "top_k": {"routing": "top_k"},
        "expert_choice": {"routing": "expert_choice", "placement": "both"},
        "conformer": {"routing": "dense", "expert_type": "conformer", "r_pattern": {"layers.1.attention": 3}},
    }
    alone = {}
    for name, options in choices.items():
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(tiny_ast), SoftMoAConfig(init_weights=False, **options), name)
        alone[name] = logits(model, spectrograms)
    torch.manual_seed(0)
    model = get_peft_model(tiny_ast, SoftMoAConfig(init_weights=False, **choices["soft"]), "soft")
    for name, options in list(choices.items())[1:]:
        torch.manual_seed(0)
        model.add_adapter(name, SoftMoAConfig(init_weights=False, **options))
    for name in [*choices, "soft"]:
        model.set_adapter(name)
        assert torch.equal(logits(model, spectrograms), alone[name]), name
    model.base_model.set_adapter(["soft", "top_k", "expert_choice"])
    together = logits(model, spectrograms)
    assert all(not torch.equal(together, logits) for logits in alone.values())
    model.delete_adapter("top_k")
    model.set_adapter("single")
    assert torch.equal(logits(model, spectrograms), alone["single"])


def test_patch_grid_needs_a_known_architecture(tiny_wav2vec2):
    model = tiny_wav2vec2(pre_norm=False)
    config = SoftMoAConfig(
        routing="dense", expert_type="convolution", patch_grid=True, target_modules=["attention", "feed_forward"]
    )
    with pytest.raises(ValueError, match="`patch_grid` is known for .* not for 'wav2vec2'"):
        get_peft_model(model, config)
    assert not adapted(model)


def run(model, inputs):
    with torch.no_grad():
        output = model(inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("kind", ["pre-norm AST", "pre-norm wav2vec 2.0", "post-norm wav2vec 2.0"])
def test_norms_are_trained_saved_and_given_back(kind, tiny_ast, spectrograms, tiny_wav2vec2, tmp_path):
    if kind == "pre-norm AST":
        base, inputs, options = tiny_ast, spectrograms, {}
        expected = {f"audio_spectrogram_transformer.layers.{layer}.layernorm_before" for layer in range(2)}
    else:
        base, inputs, options = tiny_wav2vec2("pre" in kind), torch.randn(2, 800), {"target_modules": ["attention"]}
        expected = {f"encoder.layers.{layer}.layer_norm" for layer in range(2)}
        if "post" in kind:
            expected = {"encoder.layer_norm", "encoder.layers.0.final_layer_norm"}
    state, before = copy.deepcopy(base.state_dict()), run(base, inputs)
    fresh = copy.deepcopy(base)
    config = SoftMoAConfig(train_norms=True, **options)
    model = get_peft_model(base, config)
    assert set(config.modules_to_save) == expected
    assert torch.equal(run(model, inputs), before)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if ".softmoa_" not in name} == {
        f"base_model.model.{name}.modules_to_save.default.{part}" for name in expected for part in ("weight", "bias")
    }
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        output = model(inputs)
        (output.logits if hasattr(output, "logits") else output.last_hidden_state).pow(2).sum().backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]) != (name in trainable), name

    trained = run(model, inputs)
    assert not torch.equal(trained, before)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(fresh, tmp_path), inputs), trained)
    given_back = model.unload()
    assert list(given_back.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in given_back.state_dict().items())
    assert torch.equal(run(given_back, inputs), before)


def test_norms_come_besides_the_modules_to_save(tiny_ast):
    config = SoftMoAConfig(train_norms=True, modules_to_save=["classifier"], layers_to_transform=[1], placement="both")
    get_peft_model(tiny_ast, config)
    layer = "audio_spectrogram_transformer.layers.1"
    assert config.modules_to_save == ["classifier", f"{layer}.layernorm_before", f"{layer}.layernorm_after"]


@pytest.mark.parametrize(
    "options, inner",
    [
        ({"modules_to_save": ["layers.0.attention.q_proj"]}, "layers.0.attention.q_proj"),
        ({"train_norms": True}, "layers.0.layernorm_after"),
    ],
)
def test_a_module_to_save_in_an_adapted_block_is_refused(options, inner):
    """PEFT would not find it there after the block is replaced, and train nothing."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
            self.mlp, self.layernorm_after = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, hidden_states):
            hidden_states = hidden_states + self.attention["q_proj"](hidden_states)
            return self.layernorm_after(hidden_states + self.mlp(hidden_states))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layers = nn.LayerNorm(8), nn.ModuleList([Layer(), Layer()])

        def forward(self, hidden_states):
            hidden_states = self.norm(hidden_states)
            for layer in self.layers:
                hidden_states = layer(hidden_states)
            return hidden_states

    model = Model()
    config = SoftMoAConfig(target_modules=["layers.0", "layers.1"], **options)
    with pytest.raises(ValueError, match=f"'{inner}' cannot be trained whole .* part of 'layers.0'"):
        get_peft_model(model, config)
    assert not adapted(model)


def test_norms_with_names_that_end_alike_are_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.block, self.post_norm = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, hidden_states):
            return self.post_norm(self.block(self.norm(hidden_states)))

    with pytest.raises(ValueError, match=r"`train_norms` would also train \['post_norm'\].*in front.*\['norm'\]"):
        get_peft_model(Model(), SoftMoAConfig(target_modules=["block"], train_norms=True))


def test_batch_norm_is_no_norm_in_front_of_a_block():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="does not find a normalization layer"):
        get_peft_model(model, SoftMoAConfig(target_modules=["1"], train_norms=True))


def test_a_module_in_a_module_to_save_is_refused(tiny_ast, spectrograms):
    """PEFT would train a copy of the inner one that nothing uses, and freeze the one that is used."""
    with pytest.raises(ValueError, match="'classifier' and also 'classifier.layernorm', which is a part of it"):
        get_peft_model(tiny_ast, SoftMoAConfig(modules_to_save=["classifier", "layernorm"]))
    assert not adapted(tiny_ast)
    names = ["classifier", "audio_spectrogram_transformer.layernorm"]
    model = get_peft_model(tiny_ast, SoftMoAConfig(modules_to_save=names))
    model(spectrograms, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def state_of(model):
    """All that adding an adapter changes in a base model, apart from values."""
    modules = {name: (type(module), len(module._forward_hooks)) for name, module in model.named_modules()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = {name: getattr(model.config, name) for name in ("id2label", "label2id", "problem_type")}
    attributes = sorted(vars(model).keys() - {"_hf_peft_config_loaded"})
    return modules, gradients, config, attributes, list(getattr(model, "peft_config", ()))


@pytest.mark.parametrize("adapters", [0, 1])
def test_an_adapter_that_fails_while_it_is_added_leaves_nothing(tiny_ast, adapters, spectrograms, monkeypatch):
    if adapters:
        model = get_peft_model(tiny_ast, SoftMoAConfig(modules_to_save=["classifier"], label_names=["a", "b"]), "first")
        output = model.eval()(spectrograms).logits
    before = state_of(tiny_ast)
    monkeypatch.setattr(model_module, "add_hooks", lambda *args: 1 / 0)
    config = SoftMoAConfig(modules_to_save=["classifier"], label_names=["c"], placement="both", train_norms=True)
    with pytest.raises(ZeroDivisionError):
        model.add_adapter("second", config) if adapters else get_peft_model(tiny_ast, config)
    assert state_of(tiny_ast) == before
    if adapters:
        assert model.active_adapters == ["first"] and list(model.peft_config) == ["first"]
        assert torch.equal(model(spectrograms).logits, output)


@pytest.mark.parametrize("adapters", [0, 1])
@pytest.mark.parametrize("given", ["another size", "overlapping modules"])
def test_an_adapter_that_cannot_be_loaded_leaves_nothing(tiny_ast, base_folder, adapters, given, tmp_path):
    saved = get_peft_model(ASTForAudioClassification.from_pretrained(base_folder), SoftMoAConfig(r=3))
    saved.save_pretrained(tmp_path)
    config = {
        "another size": SoftMoAConfig(r=2, inference_mode=True),
        "overlapping modules": SoftMoAConfig(r=3, modules_to_save=["classifier", "layernorm"], inference_mode=True),
    }[given]
    if adapters:
        model = get_peft_model(tiny_ast, SoftMoAConfig(), "first")
        config.save_pretrained(tmp_path)
    before = state_of(tiny_ast)
    with pytest.raises(ValueError):
        model.load_adapter(tmp_path, "second") if adapters else PeftModel.from_pretrained(
            tiny_ast, tmp_path, config=config
        )
    assert state_of(tiny_ast) == before


def test_several_adapters(tiny_ast, spectrograms):
    model = get_peft_model(tiny_ast, SoftMoAConfig(init_weights=False))
    first = logits(model, spectrograms)
    model.add_adapter("second", SoftMoAConfig(num_experts=2, r=3, placement="both", init_weights=False))
    assert torch.equal(logits(model, spectrograms), first)
    model.set_adapter("second")
    second = logits(model, spectrograms)
    assert not torch.equal(second, first)
    assert all(parameter.requires_grad == (".second." in name) for name, parameter in adapter_parameters(model).items())
    model.set_adapter("default")
    assert torch.equal(logits(model, spectrograms), first)
    model.delete_adapter("default")
    assert model.active_adapter == "second"
    assert torch.equal(logits(model, spectrograms), second)
    assert all(".second." in name for name in adapter_parameters(model))


def test_status_of_layers_and_model(tiny_ast):
    model = get_peft_model(tiny_ast, SoftMoAConfig())
    status = model.get_model_status()
    assert status.peft_types == {"default": "SOFTMOA"} and status.num_adapter_layers == 2
    assert status.trainable_params == sum(parameter.numel() for parameter in adapter_parameters(model).values())
    layer = model.get_layer_status()[0]
    assert layer.module_type == "softmoa.SoftMoALayer" and layer.devices == {"default": ["cpu"]}


def test_injection_without_a_peft_model(tiny_ast, spectrograms):
    before = logits(tiny_ast, spectrograms)
    model = inject_adapter_in_model(SoftMoAConfig(), tiny_ast)
    assert model is tiny_ast and len(adapted(model)) == 2
    assert torch.equal(logits(model, spectrograms), before)


def saved_adapter(tiny_ast, folder):
    model = get_peft_model(copy.deepcopy(tiny_ast), SoftMoAConfig(init_weights=False))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"num_experts": 6},
            r"lacks '.*experts.down_weight' of shape \(6, 32, 6\).* has '.*router.slots' of shape \(32, 7\)",
        ),
        (
            {"r": 7},
            r"lacks '.*experts.down_weight' of shape \(7, 32, 7\).* has '.*experts.up_weight' of shape \(7, 6, 32\)",
        ),
        ({"normalize": True}, "lacks .*softmoa_mixture.router.scale"),
        ({"placement": "both", "target_modules": None}, "lacks .*mlp.softmoa_mixture"),
        ({"layers_to_transform": [0]}, "has .*layers.1.attention"),
    ],
)
def test_tensors_that_do_not_fit_the_config(tiny_ast, tmp_path, change, message):
    saved_adapter(tiny_ast, tmp_path)
    config = SoftMoAConfig.from_pretrained(tmp_path)
    for name, value in change.items():
        setattr(config, name, value)
    state = copy.deepcopy(tiny_ast.state_dict())
    with pytest.raises(ValueError, match=f"The adapter does not fit its config: .*{message}"):
        PeftModel.from_pretrained(tiny_ast, tmp_path, config=config)
    for name, tensor in tiny_ast.state_dict().items():
        if ".softmoa_" not in name:
            assert torch.equal(tensor, state[name.replace(".base_layer", "")])


def test_loading_onto_another_adapter_name(tiny_ast, spectrograms, tmp_path):
    expected = logits(saved_adapter(tiny_ast, tmp_path), spectrograms)
    model = PeftModel.from_pretrained(tiny_ast, tmp_path, adapter_name="other")
    assert torch.equal(logits(model, spectrograms), expected)


# A block that is one module, one that begins in another module, and one in windows.
HOOKED = ["Parakeet-CTC", "Wav2Vec2", "CLAP"]


def outputs(name, model):
    family = FAMILIES[name]
    model = model.base_model.model if isinstance(model, PeftModel) else model
    with torch.no_grad():
        return family.encode(model.eval(), family.inputs(list(family.lengths)))


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "deepcopy") for name in HOOKED),
        # Not wav2vec 2.0, whose weight normalization torch does not pickle.
        *((name, way) for name in ("Whisper, classification", "CLAP") for way in ("pickle", "torch.save")),
    ],
)
def test_copies_work_apart_from_each_other(name, way):
    base = build(name)
    before, hooks_before = outputs(name, base), count_hooks(base)
    model = get_peft_model(base, SoftMoAConfig(placement="both", init_weights=False))
    wanted = outputs(name, model)
    if way == "torch.save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(outputs(name, twin), wanted)
    assert count_hooks(twin) == count_hooks(model) > hooks_before
    with torch.no_grad():
        for parameter in adapter_parameters(twin).values():
            parameter.add_(0.1)
    assert not torch.equal(outputs(name, twin), wanted) and torch.equal(outputs(name, model), wanted)
    unloaded = twin.unload()
    assert torch.equal(outputs(name, unloaded), before) and count_hooks(unloaded) == hooks_before
    assert torch.equal(outputs(name, model), wanted)


@pytest.mark.parametrize("name", HOOKED)
def test_a_second_adapter_with_another_placement(name):
    """Each does what it does alone, both together add up in every block, and deleting them takes every hook back."""
    placements = {"first": "attention", "second": "ffn", "third": "both"}
    base = build(name)
    before, hooks_before = outputs(name, base), count_hooks(base)
    wanted = {}
    for seed, (adapter_name, placement) in enumerate(placements.items()):
        fresh = build(name)
        torch.manual_seed(seed)
        config = SoftMoAConfig(placement=placement, init_weights=False)
        wanted[adapter_name] = outputs(name, get_peft_model(fresh, config))
    for seed, (adapter_name, placement) in enumerate(placements.items()):
        torch.manual_seed(seed)
        config = SoftMoAConfig(placement=placement, init_weights=False)
        if seed == 0:
            model = get_peft_model(base, config, adapter_name)
        else:
            model.add_adapter(adapter_name, config)
    for adapter_name in placements:
        model.set_adapter(adapter_name)
        assert torch.equal(outputs(name, model), wanted[adapter_name])
    model.base_model.set_adapter(["first", "second"])
    both = outputs(name, model)
    assert not any(torch.equal(both, alone) for alone in wanted.values())
    with model.disable_adapter():
        assert torch.equal(outputs(name, model), before)
    for adapter_name in ("third", "first"):
        model.delete_adapter(adapter_name)
    assert torch.equal(outputs(name, model), wanted["second"])
    model.delete_adapter("second")
    assert torch.equal(outputs(name, model), before) and count_hooks(model) == hooks_before


@pytest.mark.parametrize("routing", ["soft", "top_k"])
def test_deleting_without_a_peft_model_takes_every_hook_back(routing):
    """As transformers itself does it."""
    model = build("Wav2Vec2")
    before, hooks_before = outputs("Wav2Vec2", model), count_hooks(model)
    model.add_adapter(SoftMoAConfig(placement="both", routing=routing, init_weights=False))
    assert not torch.equal(outputs("Wav2Vec2", model), before) and count_hooks(model) > hooks_before
    model.delete_adapter("default")
    assert torch.equal(outputs("Wav2Vec2", model), before) and count_hooks(model) == hooks_before


def test_an_error_in_a_pass_leaves_nothing_behind():
    """Neither its mask nor its tokens reach the next pass."""
    model = get_peft_model(build("Wav2Vec2"), SoftMoAConfig(placement="ffn", init_weights=False)).eval()
    wanted = outputs("Wav2Vec2", model)
    dense = model.get_base_model().encoder.layers[0].feed_forward.intermediate_act_fn
    model.get_base_model().encoder.layers[0].feed_forward.intermediate_act_fn = None
    with pytest.raises(TypeError):
        outputs("Wav2Vec2", model)
    [passes] = find_passes(model)
    assert passes.open == []
    model.get_base_model().encoder.layers[0].feed_forward.intermediate_act_fn = dense
    assert torch.equal(outputs("Wav2Vec2", model), wanted)


COMPILED_CONFORMER = {"routing": "dense", "expert_type": "conformer", "num_experts_pattern": {".*1.attention": 3}}


@pytest.mark.parametrize(
    "name, backend, options",
    [
        ("AST", "aot_eager", {}),
        pytest.param(
            "AST", "inductor", {}, marks=pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
        ),
        ("Wav2Vec2", "aot_eager", {}),
        ("Wav2Vec2", "aot_eager", COMPILED_CONFORMER),
        ("WavLM", "aot_eager", {}),
        ("CLAP", "aot_eager", {}),
    ],
)
def test_compiled(name, backend, options):
    """In one graph for inference and one for training, with the mask, and the same numbers for every batch."""
    family = FAMILIES[name]
    batch = family.inputs(list(family.lengths))
    batches = [batch, {key: value.roll(1, dims=0) for key, value in batch.items()}]
    try:
        family.encode(torch.compile(build(name), backend="eager", fullgraph=True), batch)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"this torch and transformers do not compile {name} itself in one graph: {error.args[0][:99]}")
    model = get_peft_model(build(name), SoftMoAConfig(placement="both", init_weights=False, **options)).eval()
    outputs(name, model)  # transformers installs hooks in the first call
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base = model.get_base_model()
    compiled = torch.compile(base, backend=backend, fullgraph=True)
    for each in batches:
        with torch.no_grad():
            torch.testing.assert_close(family.encode(compiled, each), family.encode(base, each), rtol=0, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for each in batches:
        gradients = []
        for run in (base, compiled):
            model.zero_grad()
            output = family.encode(run, each)
            output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(0)))
            gradients.append([parameter.grad for parameter in adapter_parameters(model).values()])
        for given, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def with_adapters(model, *names, **fields):
    torch.manual_seed(3)
    config = SoftMoAConfig(init_weights=False, modules_to_save=["classifier"], **fields)
    model = get_peft_model(model, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:  # as if it were trained
            nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("weights, shares", [(None, (0.5, 0.5)), ([3, 1], (0.75, 0.25)), ([0.0, 2.0], (0.0, 1.0))])
def test_average_of_adapters(tiny_ast, spectrograms, tmp_path, weights, shares):
    model = with_adapters(tiny_ast, "one", "two")
    before = logits(model, spectrograms)
    model.average_adapters(["one", "two"], weights, "mean")
    assert model.active_adapters == ["one"] and torch.equal(logits(model, spectrograms), before)
    state = model.state_dict()
    averaged = [name for name in state if ".mean." in name]
    assert len(averaged) == 2 * 5 + 4
    for name in averaged:
        one, two = (state[name.replace(".mean.", f".{other}.")] for other in ("one", "two"))
        torch.testing.assert_close(state[name], shares[0] * one + shares[1] * two)
    model.set_adapter("mean")
    expected = logits(model, spectrograms)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "mean")
    torch.testing.assert_close(logits(loaded, spectrograms), expected)


def test_the_average_is_as_precise_and_as_still_as_the_adapters(spectrograms):
    torch.manual_seed(0)
    model = ASTForAudioClassification(tiny_ast_config()).to(torch.bfloat16)
    model = with_adapters(model, "one", "two", dropout=0.5)
    model.average_adapters(["one", "two"])
    for name, parameter in model.named_parameters():
        if ".average." in name:
            assert parameter.dtype == (torch.float32 if "softmoa" in name else torch.bfloat16)
            assert not parameter.requires_grad
    assert not any(module.training for module in model.modules())
    model.set_adapter("average")
    inputs = spectrograms.to(torch.bfloat16)
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    assert all(p.requires_grad for name, p in model.named_parameters() if ".average." in name)


def test_average_of_equal_adapters_is_the_same_adapter(tiny_ast, spectrograms):
    model = with_adapters(tiny_ast, "one")
    model.average_adapters(["one", "one", "one"])
    expected = logits(model, spectrograms)
    model.set_adapter("average")
    torch.testing.assert_close(logits(model, spectrograms), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["one", "three"],), "`adapter_names` must be names of adapters"),
        (([],), "`adapter_names` must be names of adapters"),
        ((["one", "two"], [1.0]), "`weights` must be 2 numbers from 0"),
        ((["one", "two"], [1.0, -1.0]), "`weights` must be 2 numbers from 0"),
        ((["one", "two"], ["1", 1.0]), "`weights` must be 2 numbers from 0"),
        ((["one", "two"], [0.0, 0.0]), "`weights` must be 2 numbers from 0, not all of them 0"),
        ((["one", "two"], [1.0, float("nan")]), "`weights` must be 2 numbers from 0"),
        ((["one", "two"], None, "two"), "`new_name` must be a name without dots that no adapter has, got 'two'"),
        ((["one", "two"], None, "a.b"), "`new_name` must be a name without dots that no adapter has, got 'a.b'"),
        (
            (["one", "other"],),
            r"'one' and 'other' have no average: they differ in \['modules_to_save', 'num_experts'\]",
        ),
    ],
)
def test_adapters_without_an_average(tiny_ast, arguments, message):
    model = with_adapters(tiny_ast, "one", "two")
    model.add_adapter("other", SoftMoAConfig(num_experts=2))
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.average_adapters(*arguments)
    assert list(model.state_dict()) == names and list(model.peft_config) == ["one", "two", "other"]


@torch.no_grad()
def test_beside_lora(tiny_ast, spectrograms, tmp_path):
    """Two methods on one base model, in different blocks, through transformers' own interface."""
    base = logits(tiny_ast, spectrograms)
    torch.manual_seed(1)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    outputs = {}
    for name, config in (("lora", lora), ("mixture", SoftMoAConfig(placement="ffn", init_weights=False))):
        tiny_ast.add_adapter(config, name)
        outputs[name] = logits(tiny_ast.eval(), spectrograms)
        tiny_ast.save_pretrained(tmp_path / name)
    tiny_ast.set_adapter(["lora", "mixture"])
    both = logits(tiny_ast, spectrograms)
    for one in (base, *outputs.values()):
        assert not torch.allclose(both, one, atol=1e-4)
    # Each is saved alone, and loads onto the plain model and beside the other, in any order.
    for names in (["lora"], ["mixture"], ["lora", "mixture"], ["mixture", "lora"]):
        torch.manual_seed(0)
        model = ASTForAudioClassification(tiny_ast_config()).eval()
        for name in names:
            model.load_adapter(tmp_path / name, name)
        model.set_adapter(names)
        expected = both if len(names) == 2 else outputs[names[0]]
        torch.testing.assert_close(logits(model, spectrograms), expected, atol=1e-6, rtol=1e-5)
    tiny_ast.disable_adapters()
    assert torch.equal(logits(tiny_ast, spectrograms), base)


@torch.no_grad()
def test_beside_lora_in_the_same_attention(tiny_ast, spectrograms):
    """A block from its first linear layer to its last reads and adds what the attention as a whole does."""
    whole = get_peft_model(copy.deepcopy(tiny_ast), SoftMoAConfig(init_weights=False)).eval()
    tiny_ast.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), "lora")
    with_lora = logits(tiny_ast.eval(), spectrograms)
    tiny_ast.add_adapter(SoftMoAConfig(target_modules=["q_proj->o_proj"], init_weights=False), "mixture")
    source = adapter_parameters(whole)
    for name, parameter in adapter_parameters(tiny_ast).items():
        name = name.replace(".o_proj.", ".").replace(".mixture.", ".default.")
        parameter.copy_(source[f"base_model.model.{name}"])
    torch.testing.assert_close(logits(tiny_ast.eval(), spectrograms), logits(whole, spectrograms))
    tiny_ast.set_adapter(["lora", "mixture"])
    both = logits(tiny_ast, spectrograms)
    assert not torch.allclose(both, with_lora, atol=1e-4)
    tiny_ast.set_adapter(["mixture", "lora"])
    torch.testing.assert_close(logits(tiny_ast, spectrograms), both)
    tiny_ast.delete_adapter("mixture")
    tiny_ast.set_adapter("lora")
    torch.testing.assert_close(logits(tiny_ast, spectrograms), with_lora)


def test_on_a_merged_lora(tiny_ast, spectrograms):
    model = get_peft_model(tiny_ast, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with_lora = logits(model.eval(), spectrograms)
    model = get_peft_model(model.merge_and_unload(), SoftMoAConfig()).eval()
    torch.testing.assert_close(logits(model, spectrograms), with_lora)
    assert len(adapted(model)) == 2


def test_on_a_model_with_adapters_of_its_own():
    """The layers of multilingual wav2vec 2.0 end in small adapters, and another one follows the encoder."""
    config = copy.deepcopy(FAMILIES["Wav2Vec2"].config()[1])
    config.adapter_attn_dim, config.add_adapter, config.do_stable_layer_norm = 4, True, True
    torch.manual_seed(0)
    model = Wav2Vec2Model(config).eval()
    waves = torch.randn(2, 400)
    with torch.no_grad():
        before = model(waves).last_hidden_state
    for placement, block in (("attention", "attention"), ("ffn", "feed_forward.output_dense")):
        moa = get_peft_model(copy.deepcopy(model), SoftMoAConfig(placement=placement))
        names = adapted(moa.base_model.model)
        assert names == [f"encoder.layers.{layer}.{block}" for layer in range(config.num_hidden_layers)]
        with torch.no_grad():
            assert torch.equal(moa(waves).last_hidden_state, before)


def test_mixed_models_are_refused(tiny_ast):
    """PEFT's mixed models take a fixed list of methods."""
    before = list(tiny_ast.state_dict())
    with pytest.raises(ValueError, match="'SOFTMOA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_ast, SoftMoAConfig(), mixed=True)
    assert list(tiny_ast.state_dict()) == before
    model = get_peft_model(tiny_ast, LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ValueError, match="SOFTMOA.*not compatible"):
        model.add_adapter("mixture", SoftMoAConfig(placement="ffn"))


def test_combining_adapters_as_lora_does_says_what_it_is_called_here(tiny_ast):
    model = get_peft_model(tiny_ast, SoftMoAConfig())
    with pytest.raises(ValueError, match="average_adapters"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_a_load_that_fails_leaves_the_adapters_that_were_there(tiny_ast, base_folder, spectrograms, tmp_path):
    for r in (2, 3):
        saved = get_peft_model(
            ASTForAudioClassification.from_pretrained(base_folder), SoftMoAConfig(r=r, init_weights=False)
        )
        saved.save_pretrained(tmp_path / str(r))
    model = PeftModel.from_pretrained(tiny_ast, tmp_path / "2")
    model.load_adapter(tmp_path / "2", "second")
    base = ASTForAudioClassification.from_pretrained(base_folder)
    never_loaded = copy.deepcopy(get_peft_model(base, SoftMoAConfig(inference_mode=True)))
    with pytest.raises(ValueError, match="does not fit its config"):
        never_loaded.load_adapter(tmp_path / "3", "default")
    expected = model(spectrograms).logits
    for name in ("default", "second"):
        with pytest.raises(ValueError, match="does not fit its config"):
            model.load_adapter(tmp_path / "3", name)
    assert list(model.peft_config) == ["default", "second"]
    assert torch.equal(model(spectrograms).logits, expected)
    model.set_adapter("second")
    assert torch.equal(model(spectrograms).logits, expected)


def test_a_config_may_serve_two_adapters(tiny_ast, spectrograms):
    config = SoftMoAConfig(modules_to_save=["classifier"])
    model = get_peft_model(tiny_ast, config).eval()
    model.add_adapter("multi", config)
    model(spectrograms, labels=torch.tensor([0, 1, 2]))
    model.set_adapter("multi")
    model(spectrograms, labels=torch.rand(3, 5))
    assert [each.problem_type for each in model.peft_config.values()] == [
        "single_label_classification",
        "multi_label_classification",
    ]


def test_what_is_excluded_may_lie_in_an_adapted_block(tiny_ast):
    config = SoftMoAConfig(target_modules=["attention"], exclude_modules=["layers.1.attention"])
    model = get_peft_model(tiny_ast, config)
    model.add_adapter("second", SoftMoAConfig(target_modules=["attention"], exclude_modules=["attention.q_proj"]))
    assert "second" in model.peft_config
