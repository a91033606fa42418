import pytest
import torch
import torch.distributed as dist
from conftest import tiny_ast_config
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import ASTForAudioClassification

from peft_softmoa import SoftMoAConfig
from peft_softmoa.calls.forward_pass import find_passes
from peft_softmoa.inspection import find_layers, record_routing

ROUTINGS = {
    "soft": {},
    "slots": {"num_slots": 2},
    "normalized": {"normalize": True},
    "dense": {"routing": "dense"},
    "top_k": {"routing": "top_k", "top_k": 2},
    "expert_choice": {"routing": "expert_choice"},
    "single": {"routing": "dense", "num_experts": 1},
    "convolution": {"routing": "dense", "expert_type": "convolution"},
    "conformer": {"routing": "dense", "expert_type": "conformer"},
    "conformer over slots": {"num_slots": 3, "expert_type": "conformer"},
    "convolution over slots": {"num_slots": 3, "expert_type": "convolution"},
}


def adapted(base, **choices):
    torch.manual_seed(0)
    config = SoftMoAConfig(**{"num_experts": 3, "r": 4, "init_weights": False, "scaling": 2.0, **choices})
    return get_peft_model(base, config).eval()


def masked_wave(**choices):
    make, config = FAMILIES["Wav2Vec2"].config()
    torch.manual_seed(0)
    return adapted(make(config), **choices)


def hooks(model):
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


@pytest.mark.parametrize("choices", ROUTINGS.values(), ids=ROUTINGS)
def test_a_record_is_what_the_mixture_does(tiny_ast, spectrograms, choices):
    model = adapted(tiny_ast, **choices)
    blocks, seen = list(find_layers(model)), {}
    for block in blocks:
        block.base_layer.register_forward_pre_hook(lambda module, args, block=block: seen.update({block.name: args[0]}))
    with record_routing(model) as records, torch.no_grad():
        model(spectrograms)
    assert [record.block for record in records] == [block.name for block in blocks]
    for block, record in zip(blocks, records):
        mixture = block.softmoa_mixture["default"]
        experts = mixture.experts
        tokens = seen[block.name]
        batch, length, width = tokens.shape
        number, slots = choices.get("num_experts", 3), choices.get("num_slots", 1)
        assert record.adapter == "default" and record.mask.all() and record.mask.shape == (batch, length)
        assert record.dispatch.shape == record.combine.shape == (batch, length, number, slots)
        torch.testing.assert_close(record.dispatch.sum(1), torch.ones(batch, number, slots))
        if choices.get("routing") != "expert_choice":  # where a token may be taken by any number of experts
            torch.testing.assert_close(record.combine.sum((2, 3)), torch.ones(batch, length))
        # Each expert by itself adds what the norms say.
        up = [experts.up_weight.clone(), experts.up_bias.clone()]
        for expert in range(number):
            with torch.no_grad():
                for parameter, value in zip((experts.up_weight, experts.up_bias), up):
                    parameter.zero_()
                    parameter[expert] = value[expert]
                alone, _ = mixture(tokens, added_to=torch.zeros(batch, length, width), scaling=2.0)
            torch.testing.assert_close(record.norms[..., expert], alone.norm(dim=-1), rtol=1e-4, atol=1e-5)
        if choices.get("routing") is None and "expert_type" not in choices:
            with torch.no_grad():
                experts.up_weight.copy_(up[0]), experts.up_bias.copy_(up[1])
                read = torch.einsum("btnp,btd->bnpd", record.dispatch, tokens).flatten(1, 2)
                added = 2.0 * torch.einsum("bts,bsd->btd", record.combine.flatten(2), experts(read))
                whole, _ = mixture(tokens, added_to=torch.zeros(batch, length, width), scaling=2.0)
            torch.testing.assert_close(added, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choices", [{}, {"routing": "dense"}], ids=["soft", "dense"])
def test_recording_never_switches_a_module_to_evaluation(spectrograms, choices, monkeypatch):
    """Another thread may train the same modules; what is recorded has no dropout all the same."""
    model = adapted(ASTForAudioClassification(tiny_ast_config()), dropout=0.9, **choices).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p != 0.9:
            module.p = 0.0  # of the base model
    monkeypatch.setattr(torch.nn.Module, "train", lambda *args: pytest.fail("a module was switched"))
    with record_routing(model) as records, torch.no_grad():
        model(spectrograms)
        model(spectrograms)
    first, again = records[0], records[2]
    assert first.block == again.block and torch.equal(first.norms, again.norms)


@pytest.mark.parametrize("choices", [{}, {"routing": "top_k", "top_k": 2}], ids=["soft", "top_k"])
def test_recording_changes_nothing_of_a_training_step(spectrograms, choices):
    def train(record):
        torch.manual_seed(0)
        model = adapted(ASTForAudioClassification(tiny_ast_config()), dropout=0.5, **choices).train()
        torch.manual_seed(1)
        if record:
            with record_routing(model) as records:
                loss = model(spectrograms, labels=torch.tensor([0, 1, 2])).loss
                loss.backward()
            assert len(records) == 2 and not any(tensor.requires_grad for each in records for tensor in each[2:5])
        else:
            loss = model(spectrograms, labels=torch.tensor([0, 1, 2])).loss
            loss.backward()
        return [loss.detach(), torch.rand(1), *(each.grad for each in model.parameters() if each.grad is not None)]

    plain, recorded = train(False), train(True)
    assert len(plain) > 10 and all(map(torch.equal, plain, recorded))


@pytest.mark.parametrize("placement", ["attention", "ffn"])
@pytest.mark.parametrize("choices", ROUTINGS.values(), ids=ROUTINGS)
def test_padded_tokens_are_known_under_every_routing(placement, choices):
    model = masked_wave(placement=placement, **choices)
    batch = FAMILIES["Wav2Vec2"].inputs([204, 400])
    before = hooks(model)
    with record_routing(model) as records, torch.no_grad():
        model(**batch)
    lengths = model.get_base_model()._get_feat_extract_output_lengths(torch.tensor([204, 400])).tolist()
    assert len(records) == 2
    for record in records:
        assert record.mask.sum(1).tolist() == lengths and lengths[0] < record.mask.shape[1]
        assert record.dispatch[0, lengths[0] :].eq(0).all()
    assert hooks(model) == before and not any(passes.recorders for passes in find_passes(model))


def test_an_error_leaves_nothing_behind():
    model = masked_wave(placement="ffn", routing="dense")
    before = hooks(model)
    with pytest.raises(RuntimeError, match="on purpose"), record_routing(model):
        raise RuntimeError("on purpose")
    assert hooks(model) == before and not any(passes.recorders for passes in find_passes(model))
    with record_routing(model) as records, torch.no_grad():
        model(**FAMILIES["Wav2Vec2"].inputs([204, 400]))
    assert len(records) == 2


def test_samples_with_adapters_of_their_own(tiny_ast, spectrograms):
    model = adapted(tiny_ast)
    model.add_adapter("other", SoftMoAConfig(num_experts=5, r=2))
    with record_routing(model) as records, torch.no_grad():
        model(spectrograms, adapter_names=["other", "__base__", "other"])
    assert [(each.adapter, len(each.dispatch), each.dispatch.shape[2]) for each in records] == [("other", 2, 5)] * 2


def test_several_active_adapters(tiny_ast, spectrograms):
    model = adapted(tiny_ast)
    model.add_adapter("other", SoftMoAConfig(num_experts=5, r=2))
    model.base_model.set_adapter(["default", "other"])
    with record_routing(model) as records, torch.no_grad():
        model(spectrograms)
    assert [record.adapter for record in records] == ["default", "other"] * 2
    with record_routing(model) as records, torch.no_grad(), model.disable_adapter():
        model(spectrograms)
    assert records == []


def test_a_compiled_model_runs_eagerly_and_says_so(tiny_ast, spectrograms):
    model = adapted(tiny_ast)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="compiled model runs eagerly"), record_routing(compiled) as records:
            recorded = compiled(spectrograms).logits
        assert len(records) == 2 and not graphs
        plain = compiled(spectrograms).logits
    assert graphs and torch.equal(recorded, plain)
    # Compiled in place, and with records of the blocks in the right base model.
    model.compile(backend=backend)
    with pytest.warns(UserWarning, match="compiled model runs eagerly"), record_routing(model):
        pass


def test_autocast(tiny_ast, spectrograms):
    model = adapted(tiny_ast)
    with record_routing(model) as records, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(spectrograms)
    assert {tensor.dtype for record in records for tensor in record[2:5]} == {torch.float32}
    torch.testing.assert_close(records[0].combine.sum((2, 3)), torch.ones(records[0].mask.shape))


def test_gradient_checkpointing_is_recorded_once():
    for choices in ({}, {"routing": "dense", "placement": "ffn"}):
        model = masked_wave(**choices).train()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        with record_routing(model) as records:
            model(**FAMILIES["Wav2Vec2"].inputs([204, 400])).last_hidden_state.sum().backward()
        assert [record.block for record in records] == [layer.name for layer in find_layers(model)]
        assert all(not record.mask.all() for record in records)


def test_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = masked_wave(placement="ffn", routing="dense")
        with record_routing(DistributedDataParallel(model)) as records, torch.no_grad():
            model(**FAMILIES["Wav2Vec2"].inputs([204, 400]))
        assert len(records) == 2 and not records[0].mask.all()
    finally:
        dist.destroy_process_group()


def test_what_cannot_be_recorded(tiny_ast):
    with pytest.raises(ValueError, match="ASTForAudioClassification has no Soft-MoA adapter.*get_peft_model"):
        record_routing(tiny_ast).__enter__()
    lora = get_peft_model(tiny_ast, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has no Soft-MoA adapter"):
        record_routing(lora).__enter__()


def test_recording_within_recording(tiny_ast, spectrograms):
    model = adapted(tiny_ast)
    with record_routing(model) as outer, torch.no_grad():
        model(spectrograms)
        with record_routing(model) as inner:
            model(spectrograms)
        model(spectrograms)
    assert len(outer) == 6 and len(inner) == 2 and torch.equal(outer[2].combine, inner[0].combine)
    assert not any(passes.recorders for passes in find_passes(model))
