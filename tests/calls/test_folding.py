"""What belongs to a call with clips of several channels: adapters in use, recomputation, threads, copies, records."""

import copy
import gc
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_channels import HEADS, adapt, assert_same, gradients, inputs_of, outputs, with_head
from torch.utils.flop_counter import FlopCounterMode

from peft_softmoa import SoftMoAConfig, SoftMoALayer, count_parameters, describe_targets
from peft_softmoa.inspection import record_routing
from peft_softmoa.method import Mixture

PRESENT = torch.tensor([[True, False, True], [True, True, True]])
OTHER = torch.tensor([[True, True, True], [False, True, True]])
LABELS = torch.tensor([3, 1])


# Nothing at random, in training too.
STILL = dict.fromkeys(
    ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "hidden_dropout_prob", "feat_proj_dropout")
    + ("activation_dropout", "final_dropout", "mask_time_prob"),
    0.0,
)


def made(name="AST", **options):
    return adapt(with_head(name, **STILL), init_weights=False, **{"scaling": 4.0, **options})


def add(model, name, seed=1, channels=3, **options):
    torch.manual_seed(seed)
    config = SoftMoAConfig(**{"num_experts": 3, "r": 2, "init_weights": False, "scaling": 4.0, **options})
    config.num_channels = channels
    model.add_adapter(name, config)


@pytest.mark.parametrize("name", ["AST", "wav2vec 2.0, CTC"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_mixed_batch(name, missing):
    """All channels of a clip have its adapter; each adapter's head makes the logits of its clips."""
    head = "classifier" if name == "AST" else "lm_head"
    model = made(name, modules_to_save=[head])
    add(model, "other", modules_to_save=[head], placement="ffn")
    with torch.no_grad():
        for parameter in getattr(model.get_base_model(), head).modules_to_save["other"].parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    batch = inputs_of(HEADS[name][2], batch=4)
    if missing:
        batch["channel_mask"] = torch.cat([PRESENT, OTHER])
    names = ["other", "default", "__base__", "default"]
    mixed = outputs(model, {**batch, "adapter_names": names}).logits
    for index, adapter in enumerate(names):
        if adapter != "__base__":
            model.set_adapter(adapter)
            wanted = outputs(model, batch).logits[index]
            torch.testing.assert_close(mixed[index], wanted, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        flat = {key: value.flatten(0, 1) for key, value in batch.items() if key != "channel_mask"}
        frozen = outputs(model, flat).logits.unflatten(0, (4, 3))[2]
    present = batch.get("channel_mask", torch.ones(4, 3, dtype=torch.bool))[2]
    torch.testing.assert_close(mixed[2], frozen[present].mean(dim=0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(**batch, adapter_names=names[:3])


def test_adapters_with_and_without_channels():
    model = made()
    add(model, "mono", channels=None)
    batch = inputs_of("AST")
    for name in (["default", "mono"], ["mono", "default"]):
        with pytest.raises(ValueError, match="with and without `num_channels` are not used together"):
            model(**batch, adapter_names=name)
    model.base_model.set_adapter(["default", "mono"])
    with pytest.raises(ValueError, match="with and without `num_channels` are not used together"):
        model(**batch)
    model.set_adapter("mono")
    assert outputs(model, {"input_values": batch["input_values"][:, 0]}).logits.shape == (2, 5)
    model.set_adapter("default")
    with model.disable_adapter():
        assert outputs(model, {"input_values": batch["input_values"][:, 0]}).logits.shape == (2, 5)
    wanted = outputs(model, batch).logits
    model.delete_adapter("mono")
    assert torch.equal(outputs(model, batch).logits, wanted)


def test_several_adapters_with_channels_add_up():
    model, batch = made(), inputs_of("AST")
    add(model, "other", placement="ffn")
    alone = outputs(model, batch).logits
    model.base_model.set_adapter(["default", "other"])
    both = outputs(model, batch).logits
    assert both.shape == alone.shape and not torch.equal(both, alone)
    add(model, "two", channels=2)
    model.base_model.set_adapter(["default", "two"])
    with pytest.raises(ValueError, match="embeddings for 2 channels, got 3"):
        model(**batch)


def test_unloading_leaves_nothing_behind():
    base = with_head("AST")
    before = [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in base.modules()]
    model = adapt(base, init_weights=False, modules_to_save=["classifier"])
    copied, batch = copy.deepcopy(model), inputs_of("AST")
    wanted = outputs(model, batch).logits
    assert model.unload() is base
    assert [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in base.modules()] == before
    assert outputs(base, {"input_values": batch["input_values"][:, 0]}).logits.shape == (2, 5)
    assert torch.equal(outputs(copied, batch).logits, wanted)


@pytest.mark.parametrize("channel_embedding", [False, True])
def test_saving_and_loading(channel_embedding, tmp_path):
    model, batch = made(channel_embedding=channel_embedding, modules_to_save=["classifier"]), inputs_of("AST")
    config = model.peft_config["default"]
    assert count_parameters(with_head("AST"), config) == sum(
        each.numel() for each in model.parameters() if each.requires_grad
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(with_head("AST"), tmp_path).eval()
    assert torch.equal(outputs(loaded, batch).logits, outputs(model, batch).logits)
    again = with_head("AST")
    again.load_adapter(str(tmp_path))
    assert torch.equal(outputs(again, batch).logits, outputs(model, batch).logits)
    card = (tmp_path / "README.md").read_text()
    assert f"the {3 if channel_embedding else 'any number of'} channels of a clip meet in the experts" in card
    assert "pipeline" not in card
    described = describe_targets(with_head("AST"), config)
    assert described.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    if channel_embedding:
        mono = describe_targets(with_head("AST"), SoftMoAConfig(num_experts=3, r=2, modules_to_save=["classifier"]))
        assert described.parameters - mono.parameters == 2 * 3 * 16
        config = tmp_path / "adapter_config.json"
        config.write_text(config.read_text().replace('"num_channels": 3', '"num_channels": 2'))
        with pytest.raises(ValueError, match="channel_embedding"):
            PeftModel.from_pretrained(with_head("AST"), tmp_path)


CHECKPOINTS = [{"use_reentrant": False}, {"use_reentrant": True}]


def checkpointed(name, options, **config):
    model = made(name, **config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


@pytest.mark.parametrize("options", CHECKPOINTS, ids=str)
@pytest.mark.parametrize("channel_embedding", [False, True])
@pytest.mark.parametrize("present", [None, PRESENT])
@pytest.mark.parametrize("name", ["AST", "wav2vec 2.0, frames"])
def test_gradient_checkpointing(name, present, channel_embedding, options):
    config = {"channel_embedding": channel_embedding, "placement": "attention"}
    batch, labels = inputs_of(HEADS[name][2]), LABELS
    plain, model = made(name, **config).double(), checkpointed(name, options, **config).double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    if name != "AST":
        frames = plain(**batch).logits.shape[1]
        labels = torch.nn.functional.one_hot(torch.arange(frames) % 5, 5).double().expand(2, -1, -1)
    plain.train()
    given = {**batch, "channel_mask": present, "labels": labels}
    ran = []
    handle = next(each for each in model.modules() if isinstance(each, Mixture)).register_forward_hook(
        lambda *_: ran.append(None)
    )
    for _ in range(2):  # the second one beside the outputs of the first
        output = model(**given)
        found = gradients(model, output.loss)
    assert len(ran) == 4
    handle.remove()
    assert_same(found, gradients(plain, plain(**given).loss), 1e-10)


@pytest.mark.parametrize("options", CHECKPOINTS, ids=str)
def test_gradient_checkpointing_does_not_mistake_channels(options):
    model, batch = checkpointed("AST", options), {**inputs_of("AST"), "labels": LABELS}
    first, second = (model(**batch, channel_mask=mask).loss for mask in (PRESENT, OTHER))
    with pytest.raises(ValueError, match="not known with which channels"):
        (first + second).backward()
    del second
    gc.collect()
    second = model(**batch, channel_mask=OTHER).loss
    with pytest.raises(ValueError, match="not known with which channels"):
        second.backward()
    del first, second
    gc.collect()
    model(**batch, channel_mask=OTHER).loss.backward()


def test_gradient_checkpointing_of_passes_with_the_same_channels():
    model, batch = checkpointed("AST", {"use_reentrant": False}), {**inputs_of("AST"), "labels": LABELS}
    one = gradients(model, model(**batch, channel_mask=PRESENT).loss)
    two = gradients(model, sum(model(**batch, channel_mask=mask).loss for mask in (PRESENT, PRESENT.clone())))
    assert_same({name: value / 2 for name, value in two.items()}, one)


def test_a_backward_pass_in_another_thread():
    """As autograd runs that of a GPU."""
    model, batch = checkpointed("AST", {"use_reentrant": False}), {**inputs_of("AST"), "labels": LABELS}
    loss = model(**batch, channel_mask=PRESENT).loss
    errors = []

    def run():
        try:
            loss.backward()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors and all(each.grad is not None for each in model.parameters() if each.requires_grad)


def test_nothing_is_kept_of_a_pass():
    model, batch = made(), inputs_of("AST")
    passes = next(each for each in model.modules() if isinstance(each, SoftMoALayer)).forward_passes
    output = model(**batch, labels=LABELS)
    assert len(passes.kept_channels) == 1
    output.loss.backward()
    del output
    gc.collect()
    assert not passes.kept_channels and not passes.open


@pytest.mark.parametrize("options", [{}, {"routing": "dense"}, {"routing": "expert_choice"}], ids=str)
def test_recording(options):
    model, batch = made(**options), {**inputs_of("AST"), "channel_mask": PRESENT}
    wanted = outputs(model, batch).logits
    with record_routing(model) as records:
        assert torch.equal(outputs(model, batch).logits, wanted)
    for record in records:
        assert record.channels == 3 and record.dispatch.shape[:2] == (2, 36) == record.mask.shape
        assert torch.equal(record.mask.unflatten(1, (3, 12)).all(dim=2), PRESENT)
        sums = record.dispatch.sum(dim=1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert not record.dispatch[~record.mask].any()


@pytest.mark.parametrize("options", [{}, {"routing": "top_k"}], ids=str)
@pytest.mark.parametrize("missing", [False, True])
def test_compiled(options, missing):
    model = made(**options).get_base_model()
    batch = {**inputs_of("AST"), **({"channel_mask": PRESENT} if missing else {}), "labels": LABELS}
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    for run in (compiled, model):
        run(**batch).loss.backward()
    for one, other in zip(compiled.parameters(), model.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_autocast():
    model, batch = made(), {**inputs_of("AST"), "channel_mask": PRESENT}
    with torch.autocast("cpu", torch.bfloat16):
        given = outputs(model, batch).logits
    wanted = outputs(model, batch).logits
    assert given.dtype == torch.bfloat16
    assert (given.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_a_call_that_fails_leaves_no_channels():
    model, batch = made(), inputs_of("AST")
    wanted = outputs(model, batch).logits
    block = next(each for each in model.modules() if isinstance(each, SoftMoALayer))
    handle = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    assert not block.forward_passes.open
    assert torch.equal(outputs(model, batch).logits, wanted)


def test_a_copy_of_the_head_does_not_average():
    """An adapter that is added later copies the head, with the hook that is on it."""
    model, batch = made(), inputs_of("AST")
    wanted = outputs(model, batch).logits
    add(model, "other", modules_to_save=["classifier"])
    assert torch.equal(outputs(model, batch).logits, wanted)
    model.set_adapter("other")
    assert outputs(model, batch).logits.shape == (2, 5)
    model.delete_adapter("default")
    assert outputs(model, batch).logits.shape == (2, 5)


def test_averaging_adapters():
    model, batch = made(), inputs_of("AST")
    model.average_adapters(["default"], new_name="average")
    wanted = outputs(model, batch).logits
    model.set_adapter("average")
    torch.testing.assert_close(outputs(model, batch).logits, wanted)


def test_the_trainer_finds_the_adapter_in_peft_models():
    """PEFT's class for sequence classification gives arguments of models of text, most of them None."""
    torch.manual_seed(0)
    config = SoftMoAConfig(num_channels=3, num_experts=3, r=2, task_type="FEATURE_EXTRACTION")
    model = get_peft_model(with_head("AST"), config).eval()
    batch = inputs_of("AST")
    assert outputs(model.base_model, batch).logits.shape == (2, 5)


class Saved:
    """How many bytes a forward pass keeps for the backward pass; each piece of memory counts once."""

    def __init__(self):
        self.storages = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    def measure(self, run):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            output = run()
        own = sum(size for tensor, size in self.storages.values() if not isinstance(tensor, torch.nn.Parameter))
        return own, output


@pytest.mark.parametrize(
    "options", [{}, {"routing": "dense"}, {"causal": True}, {"num_slots": 2, "normalize": True}], ids=str
)
def test_channels_cost_as_much_as_samples(options):
    """In products and in what is kept for the backward pass, a step of B clips of C channels is one of B·C clips."""
    name = "AST" if "causal" not in options else "wav2vec 2.0"
    batch, found = inputs_of(HEADS[name][2], batch=4, channels=2), {}
    batch.pop("attention_mask", None)
    for channels in (None, 2):
        model = adapt(with_head(name, **STILL), channels, **options).train()
        flat = {key: value if channels else value.flatten(0, 1) for key, value in batch.items()}
        labels = LABELS.repeat(2 if channels else 4)
        saved, output = Saved().measure(lambda run=model, given=flat, labels=labels: run(**given, labels=labels))
        with FlopCounterMode(display=False) as counter:
            model(**flat, labels=labels).loss.backward()
        found[channels] = saved, counter.get_total_flops()
        del output
    assert found[2][0] <= 1.03 * found[None][0]
    # The first block has a gradient for its embedding, too.
    assert found[2][1] <= 1.03 * found[None][1]
