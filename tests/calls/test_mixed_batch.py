import pytest
import torch
from conftest import tiny_ast_config
from families import FAMILIES, build
from peft import get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import ASTForAudioClassification, GenerationConfig

from peft_softmoa import SoftMoAConfig
from peft_softmoa.calls.mixed_batch import BASE, MixedBatch, run_by_sample

CONFIGS = {
    "slots": {},
    "dense": {"routing": "dense", "num_experts": 3, "placement": "ffn"},
    "expert choice": {"routing": "expert_choice", "placement": "both", "r": 2},
    "conformer": {"routing": "dense", "expert_type": "conformer", "r_pattern": {"layers.0.attention": 2}},
}
# A different one for each of 16 samples, and the base model.
NAMES = [*CONFIGS, BASE, "slots", "conformer", "expert choice"] * 2


def add_adapters(model, configs, **common):
    torch.manual_seed(0)
    for name, fields in configs.items():
        config = SoftMoAConfig(init_weights=False, **common, **fields)
        if name == next(iter(configs)):
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:  # as if it were trained
            nn.init.normal_(parameter)
    return model.eval()


@torch.no_grad()
def one_by_one(model, names, run):
    """The output for each sample alone, with its own adapter."""
    outputs = []
    for index, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                outputs.append(run(index))
        else:
            model.set_adapter(name)
            outputs.append(run(index))
    return torch.cat(outputs)


@pytest.mark.parametrize("common", [{}, {"modules_to_save": ["classifier"]}, {"train_norms": True}], ids=str)
def test_equals_one_by_one(tiny_ast, common):
    # In double precision, in which no choice of tokens is so close that the size of the batch could change it.
    model = add_adapters(tiny_ast.double(), CONFIGS, **common)
    spectrograms = torch.randn(16, 64, 128, dtype=torch.float64)
    expected = one_by_one(model, NAMES, lambda index: model(spectrograms[index : index + 1]).logits)
    calls = []
    handle = tiny_ast.register_forward_hook(lambda *args: calls.append(args))
    with torch.no_grad():
        mixed = model(spectrograms, adapter_names=NAMES).logits
    handle.remove()
    assert len(calls) == 1  # one pass through the base model
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=1e-6)
    # Nothing of it stays.
    model.set_adapter("slots")
    with torch.no_grad():
        together = model(spectrograms).logits
    torch.testing.assert_close(together[0], expected[0], atol=1e-6, rtol=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("routing", ["soft", "dense"])
@pytest.mark.parametrize("name", ["Wav2Vec2", "CLAP", "Parakeet-CTC"])
def test_masks_and_windows_go_with_their_samples(name, routing):
    """A block that begins in another module, one whose rows are windows, and one that is called with a mask."""
    family = FAMILIES[name]
    configs = {"one": {}, "two": {"num_experts": 3, "r": 2}}
    placement = "ffn" if name == "Wav2Vec2" else "attention"
    model = add_adapters(build(name).eval(), configs, placement=placement, routing=routing)
    inputs = family.inputs([*family.lengths, *family.lengths])
    names = ["one", BASE, "two", "one"]

    def encode(adapter_names=None):
        with torch.no_grad(), model.base_model._enable_peft_forward_hooks(adapter_names=adapter_names):
            return family.encode(model.base_model.model, inputs)

    mixed = encode(names)
    with model.disable_adapter():
        expected = {BASE: encode()}
    for adapter in configs:
        model.set_adapter(adapter)
        expected[adapter] = encode()
    for index, adapter in enumerate(names):
        torch.testing.assert_close(mixed[index], expected[adapter][index], atol=1e-6, rtol=1e-5)
        for other in expected.keys() - {adapter}:
            assert not torch.allclose(mixed[index], expected[other][index], atol=1e-4)


@pytest.mark.parametrize("routing", ["soft", "dense"])
@pytest.mark.parametrize("placement", ["attention", "ffn"])
def test_packed_clips_are_refused(placement, routing):
    """Their rows are chunks or tokens, of which each clip has another number."""
    family = FAMILIES["Qwen2.5-Omni"]
    model = add_adapters(build(family.name).eval(), {"one": {}}, placement=placement, routing=routing)
    mixed = model.base_model._enable_peft_forward_hooks(adapter_names=["one", BASE])
    with pytest.raises(ValueError, match="Clips that a model packs or cuts into chunks do not mix"), mixed:
        family.encode(model.base_model.model, family.inputs(list(family.lengths)))


def test_prompts_with_any_number_of_clips_are_refused():
    model = add_adapters(build("Qwen2-Audio").eval(), {"one": {}})
    with pytest.raises(ValueError, match="does not say which prompt a clip belongs to"):
        model(input_ids=torch.ones(2, 4).long(), adapter_names=["one", BASE])


def test_batches_that_shrink_are_refused():
    """As in the transcription of long clips, some of which end before others."""
    batch = MixedBatch(["a", "b"], 2, {})
    batch.check_call("layers.0", torch.ones(4, 3))
    batch.check_call("layers.0", torch.ones(4, 3))
    batch.check_call("layers.1", torch.ones(2, 3))
    with pytest.raises(ValueError, match="Some samples are finished before others"):
        batch.check_call("layers.0", torch.ones(2, 3))
    with pytest.raises(ValueError, match="does not show the samples"):
        batch.check_call("layers.0", None)


@pytest.mark.parametrize("place", ["call", "generation config", "model"])
def test_generation_with_beams(place):
    """The encoder has a row for each sample, the decoder one for each beam."""
    family = FAMILIES["Whisper, speech to text"]
    targets = {"target_modules": ["self_attn"], "routing": "dense"}  # of the encoder and the decoder
    model = add_adapters(build(family.name).eval(), {"one": targets, "two": targets | {"num_experts": 3}})
    features = {"input_features": family.inputs([40, 30, 20])["input_features"]}
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    if place == "generation config":
        options = {"generation_config": GenerationConfig.from_model_config(model.config)}
        options["generation_config"].update(max_new_tokens=6, num_beams=3)
    elif place == "model":
        model.get_base_model().generation_config.update(**options)
        options = {}
    names = ["two", BASE, "one"]
    mixed = model.generate(**features, adapter_names=names, **options)
    expected = []
    for index, name in enumerate(names):
        sample = {"input_features": features["input_features"][index : index + 1]}
        if name == BASE:
            with model.disable_adapter():
                expected.append(model.generate(**sample, **options))
        else:
            model.set_adapter(name)
            expected.append(model.generate(**sample, **options))
    for given, alone in zip(mixed, expected):
        assert torch.equal(given[: alone.shape[1]], alone[0])


@pytest.mark.parametrize(
    "names, message",
    [
        (["slots", "slotz", BASE], "non-existing adapter.*slotz"),
        (["slots"] * 2, "Length of `adapter_names`.*2 and 3"),
        ("slots", "must be a list with the name of an adapter for each sample"),
        (["slots", None, BASE], "must be a list"),
        ([], "must be a list"),
    ],
)
def test_names_that_do_not_fit(tiny_ast, spectrograms, names, message):
    model = add_adapters(tiny_ast, {"slots": {}})
    with pytest.raises(ValueError, match=message):
        model(spectrograms, adapter_names=names)
    with torch.no_grad():
        assert model(spectrograms, adapter_names=["slots"] * 3).logits.shape == (3, 5)


def test_only_for_inference_and_disabling_comes_first(tiny_ast, spectrograms):
    model = add_adapters(tiny_ast, {"slots": {}}, modules_to_save=["classifier"])
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(spectrograms, adapter_names=["slots"] * 3)
    model.eval()
    model.base_model.disable_adapter_layers()
    with torch.no_grad():
        expected = model(spectrograms).logits
        assert torch.equal(model(spectrograms, adapter_names=["slots"] * 3).logits, expected)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_the_number_of_samples_is_checked_for_every_kind_of_model(tiny_ast, task):
    model = add_adapters(tiny_ast, {"slots": {}}, task_type=task)
    with pytest.raises(ValueError, match="Length of `adapter_names`.*2 and 4"):
        model(input_values=torch.randn(4, 64, 128), adapter_names=["slots", BASE])


def test_an_error_leaves_no_mixed_batch_behind(tiny_ast, spectrograms):
    model = add_adapters(tiny_ast, {"slots": {}}, modules_to_save=["classifier"])
    with torch.no_grad():
        expected = model(spectrograms).logits
        with pytest.raises(ValueError, match="Input"):
            handle = model.register_forward_hook(lambda *args: None)
            stop = tiny_ast.classifier.original_module.register_forward_pre_hook(_raise)
            model(spectrograms, adapter_names=[BASE] * 3)
        handle.remove()
        stop.remove()
        assert torch.equal(model(spectrograms).logits, expected)


def _raise(module, args):
    raise ValueError("Input")


def test_heads_for_different_classes_do_not_mix(spectrograms):
    torch.manual_seed(0)
    model = ASTForAudioClassification(tiny_ast_config())
    labels = {"one": {"label_names": ["a", "b"]}, "two": {"label_names": ["a", "b", "c"]}}
    model = add_adapters(model, labels, modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"ASTMLPHead do not return tensors of one shape.*\(2,\).*\(3,\)"):
        model(spectrograms, adapter_names=["one", "two", "one"])


def test_rows_of_windows_and_beams():
    batch = MixedBatch(["a", "b", "a"], 2, {})
    assert batch.rows_of("a", 6, torch.device("cpu")).tolist() == [0, 1, 4, 5]
    assert batch.rows_of("c", 6, torch.device("cpu")).tolist() == []
    batch.check_rows(3)
    batch.check_rows(6)
    for rows in (4, 9):
        with pytest.raises(ValueError, match=f"but got 3 and {rows} respectively"):
            batch.check_rows(rows)


def test_a_module_that_does_not_read_the_batch_is_refused():
    """Such as embeddings of positions."""
    wrapper = ModulesToSaveWrapper(nn.Embedding(8, 2), "a")
    with pytest.raises(ValueError, match="but got 2 and 8 respectively"):
        run_by_sample(MixedBatch(["a", BASE], 1, {}), wrapper, (torch.arange(8),), {})


def test_a_forward_of_its_own_comes_back(tiny_ast, spectrograms):
    """accelerate puts one on modules that it moves between devices."""
    model = add_adapters(tiny_ast, {"slots": {}}, modules_to_save=["classifier"])
    wrapper = tiny_ast.classifier
    wrapper.forward = forward = wrapper.forward
    with torch.no_grad():
        model(spectrograms, adapter_names=[BASE] * 3)
    assert vars(wrapper)["forward"] is forward


def test_every_tensor_of_a_batch_is_taken_apart():
    class Weighted(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, tokens, weights=None, bias=None):
            return self.scale * tokens * weights[:, None] + bias

    wrapper = ModulesToSaveWrapper(Weighted(1.0), "a")
    wrapper.modules_to_save["a"].scale = 10.0
    tokens, weights, bias = torch.ones(4, 2), torch.arange(4.0), torch.tensor([0.5, 0.25])
    batch = MixedBatch(["a", BASE, "a", "no adapter of it"], 1, {})
    output = run_by_sample(batch, wrapper, (tokens,), {"weights": weights, "bias": bias})
    assert torch.equal(output, torch.tensor([0.0, 1.0, 20.0, 3.0])[:, None] + bias)
