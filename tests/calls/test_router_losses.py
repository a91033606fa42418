import copy
import pickle
import warnings

import pytest
import torch
from conftest import tiny_ast_config
from peft import get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import ASTForAudioClassification, Trainer, TrainingArguments

from peft_softmoa import SoftMoAConfig, SoftMoALayer, router_aux_loss
from peft_softmoa.calls.forward_pass import find_passes
from peft_softmoa.method.routing import dense_routing, top_k_routing
from peft_softmoa.training import LogRouterLoss

LABELS = torch.tensor([0, 1, 2])


def make(routing="top_k", **options):
    torch.manual_seed(0)
    model = ASTForAudioClassification(tiny_ast_config())
    torch.manual_seed(1)
    return get_peft_model(model, SoftMoAConfig(routing=routing, init_weights=False, **options)).train()


def routers(model, adapter_name="default"):
    return [
        module.softmoa_mixture[adapter_name].router for module in model.modules() if isinstance(module, SoftMoALayer)
    ]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def losses(model, spectrograms, **kwargs):
    """What the model returns, what it would without the load-balancing loss, and that loss."""
    with_loss = model(spectrograms, labels=LABELS, **kwargs).loss
    part = router_aux_loss(model)
    for router in routers(model):
        router.router_aux_loss_coef = 0.0
    without = model(spectrograms, labels=LABELS, **kwargs).loss
    for router in routers(model):
        router.router_aux_loss_coef = 0.01
    return with_loss, without, part


def test_the_models_loss_has_it_once_for_each_block_in_training(spectrograms):
    model = make(placement="both")
    with_loss, without, part = losses(model, spectrograms)
    torch.testing.assert_close(with_loss, without + part)
    assert 4 * 0.01 * 0.9 < part < 4 * 0.01 * 2 and not part.requires_grad
    assert len(routers(model)) == 4


def test_it_is_in_tuples_too(spectrograms):
    model = make()
    as_dict = model(spectrograms, labels=LABELS)
    as_tuple = model(spectrograms, labels=LABELS, return_dict=False)
    assert torch.equal(as_tuple[0], as_dict.loss) and torch.equal(as_tuple[1], as_dict.logits)


def test_it_is_absent_in_evaluation(spectrograms):
    model = make().eval()
    with_loss, without, part = losses(model, spectrograms)
    assert torch.equal(with_loss, without) and part is None


def test_it_is_absent_from_a_model_in_evaluation_whose_new_layers_are_not(tiny_ast, spectrograms):
    model = get_peft_model(tiny_ast, SoftMoAConfig(routing="top_k"))
    assert routers(model)[0].training and not model.get_base_model().training
    model(spectrograms, labels=LABELS)
    assert router_aux_loss(model) is None


def test_it_is_absent_while_the_adapter_is_off(spectrograms):
    model = make()
    model(spectrograms, labels=LABELS)
    with model.disable_adapter():
        model(spectrograms, labels=LABELS)
        assert router_aux_loss(model) is None


@pytest.mark.parametrize("routing", ["soft", "dense", "expert_choice"])
def test_other_routers_have_none(spectrograms, routing):
    model = make(routing)
    model(spectrograms, labels=LABELS)
    assert router_aux_loss(model) is None and find_passes(model)[0].router_loss.value is None


def test_checkpointing_counts_it_once(spectrograms):
    expected = make()
    expected_loss = expected(spectrograms, labels=LABELS).loss
    expected_loss.backward()
    model = make()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(2):  # what a backward pass computes again must not be counted in the next pass
        model.zero_grad()
        loss = model(spectrograms, labels=LABELS).loss
        loss.backward()
        assert torch.equal(loss, expected_loss)
        assert find_passes(model)[0].open == []
        for name, gradient in gradients(expected).items():
            torch.testing.assert_close(gradients(model)[name], gradient)


@pytest.mark.parametrize("targets", [None, ["attention", "classifier.dense"]])
def test_reentrant_checkpointing_is_refused(spectrograms, targets):
    """Also if one router is outside of what is checkpointed."""
    model = make(target_modules=targets)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        model(spectrograms, labels=LABELS)


def test_the_share_of_a_batch_in_its_step(spectrograms):
    """The Trainer gives the number of labels in all batches of a step; the losses of the batches then add up."""
    model = make()
    whole, without, part = losses(model, spectrograms, num_items_in_batch=torch.tensor(12))
    torch.testing.assert_close(whole, without + part * 3 / 12)


def test_labels_that_are_left_out_do_not_count_for_the_share(spectrograms):
    model = make()
    model(spectrograms)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    whole = router_aux_loss(model)
    torch.testing.assert_close(router_aux_loss(model, labels, 12), whole * 3 / 12)
    assert torch.equal(router_aux_loss(model, labels), whole)


def test_a_loss_that_is_computed_outside(spectrograms):
    model = make()
    logits = model(spectrograms).logits
    part = router_aux_loss(model)
    loss = nn.functional.cross_entropy(logits, LABELS) + part
    loss.backward()
    other = make()
    other(spectrograms, labels=LABELS).loss.backward()
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradients(model)[name], gradient)


def test_a_loss_that_nobody_uses_is_warned_of(spectrograms):
    model = make()
    model(spectrograms)
    with pytest.warns(UserWarning, match="latest training pass was not used.*router_aux_loss"):
        model(spectrograms, return_dict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert router_aux_loss(model).requires_grad
        model(spectrograms, labels=LABELS)
        model(spectrograms, labels=LABELS)
        model.eval()(spectrograms)


def test_a_pass_that_fails_leaves_nothing_behind(spectrograms):
    model = make()
    expected = model.eval()(spectrograms, labels=LABELS).loss
    with pytest.raises(IndexError):
        model.train()(spectrograms, labels=torch.tensor([0, 1, 99]))
    copy.deepcopy(model)
    assert torch.equal(model.eval()(spectrograms, labels=LABELS).loss, expected)
    assert router_aux_loss(model) is None


@pytest.mark.filterwarnings("ignore:The load-balancing loss of the latest training pass")
def test_copies_of_the_model(spectrograms, tmp_path):
    model = make()
    model(spectrograms)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert router_aux_loss(twin) is None
        assert torch.equal(twin(spectrograms, labels=LABELS).loss, model(spectrograms, labels=LABELS).loss)
        assert router_aux_loss(twin) is not None


def test_two_adapters(spectrograms):
    model = make()
    model.add_adapter("second", SoftMoAConfig(routing="top_k", router_aux_loss_coef=0.5, placement="ffn"))
    model(spectrograms, labels=LABELS)
    first = router_aux_loss(model)
    model.base_model.set_adapter(["default", "second"])
    model(spectrograms, labels=LABELS)
    both = router_aux_loss(model)
    model.set_adapter("second")
    model(spectrograms, labels=LABELS)
    assert router_aux_loss(model) > 2 * 0.5 * 0.9 and both > router_aux_loss(model) > first
    model.set_adapter("default")
    model(spectrograms, labels=LABELS)
    torch.testing.assert_close(router_aux_loss(model), first)


def test_deleting_an_adapter_takes_its_hooks_back():
    model = make()
    model.add_adapter("soft", SoftMoAConfig())
    model.add_adapter("second", SoftMoAConfig(routing="top_k"))
    base = model.get_base_model()
    assert len(base._forward_hooks) == len(base._forward_pre_hooks) == 3
    model.delete_adapter("default")
    model.delete_adapter("second")
    assert len(base._forward_hooks) == len(base._forward_pre_hooks) == 1


def test_unload_takes_the_hooks_back(spectrograms):
    base = make().unload()
    assert not base._forward_hooks and not base._forward_pre_hooks and not base._forward_hooks_with_kwargs
    assert router_aux_loss(base) is None
    again = get_peft_model(base, SoftMoAConfig(routing="top_k"))
    again.train()(spectrograms, labels=LABELS)
    assert router_aux_loss(again) is not None


class Classifier(nn.Module):
    """Small, and with a loss of its own."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, tokens, labels):
        logits = self.head(self.block(tokens).mean(dim=1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore:The load-balancing loss of the latest training pass")
def test_a_compiled_model():
    torch.manual_seed(0)
    config = SoftMoAConfig(routing="top_k", target_modules=["block"], init_weights=False)
    model = get_peft_model(Classifier(), config).get_base_model().train()
    tokens = torch.randn(3, 7, 6)
    expected = model(tokens, LABELS)["loss"]
    part = router_aux_loss(model)
    given = torch.compile(model, backend="aot_eager")(tokens, LABELS)["loss"]
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(router_aux_loss(model), part)
    for one, other in zip(
        *(torch.autograd.grad(loss, list(routers(model)[0].parameters())) for loss in (given, expected))
    ):
        torch.testing.assert_close(one, other)


class Clips(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"input_values": torch.randn(64, 128, generator=generator), "labels": index % 5}


def train(folder, batch_size, accumulation, model=None, compute_loss_func=None, **options):
    """Train, by default for one step that changes nothing; give back the Trainer and the last losses that it logged."""
    model = model or make()
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **{"max_steps": 1, "logging_steps": 1, "learning_rate": 0.0, **options},
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=Clips(), compute_loss_func=compute_loss_func)
    trainer.add_callback(LogRouterLoss(trainer))
    trainer.train()
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    parts = [entry["router_aux_loss"] for entry in history if "router_aux_loss" in entry]
    return trainer, losses[-1] if losses else None, parts[-1] if parts else None


def shares_of_experts(model):
    """The share of each expert in all choices, by block."""
    batch = torch.stack([Clips()[i]["input_values"] for i in range(12)])
    shares, hooks = [], []
    for router in routers(model):

        def note(router, args, output):
            gates = dense_routing(args[0], router.weight, router.bias)
            chosen = top_k_routing(gates, router.top_k)[1]
            shares.append(torch.bincount(chosen.flatten(), minlength=gates.shape[-1]) / chosen.numel())

        hooks.append(router.register_forward_hook(note))
    with torch.no_grad():
        model.eval()(batch)
    for hook in hooks:
        hook.remove()
    return torch.stack(shares)


@pytest.mark.parametrize("router_aux_loss_coef, balanced", [(0.1, True), (1e-9, False)])
def test_it_balances_a_router_that_starts_collapsed(tmp_path, router_aux_loss_coef, balanced):
    model = make(num_experts=4, top_k=1, router_aux_loss_coef=router_aux_loss_coef)
    with torch.no_grad():
        for router in routers(model):
            router.bias.copy_(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    assert (shares_of_experts(model)[:, 0] > 0.95).all()
    train(tmp_path, 12, 1, model, max_steps=60, learning_rate=0.02, lr_scheduler_type="constant")
    shares = shares_of_experts(model)
    assert (shares.max() < 0.5 and shares.min() > 0.05) == balanced


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_counts_it_once_under_accumulation(tmp_path, checkpointing):
    """Without the load-balancing loss, the Trainer's loss of 12 clips is the same in one batch and in four."""
    whole, loss, part = train(tmp_path / "whole", 12, 1)
    torch.manual_seed(0)
    batch = torch.stack([Clips()[i]["input_values"] for i in range(12)])
    labels = torch.tensor([i % 5 for i in range(12)])
    expected = whole.model.eval()(batch, labels=labels).loss.item()
    assert loss == pytest.approx(expected + part, abs=1e-4) and 0.02 < part < 0.04

    _, loss_of_four, part_of_four = train(tmp_path / "four", 3, 4, gradient_checkpointing=checkpointing)
    assert loss_of_four == pytest.approx(expected + part_of_four, abs=1e-4)
    assert part_of_four == pytest.approx(part, rel=0.05)


def test_a_loss_function_given_to_the_trainer_counts_it_once_under_accumulation(tmp_path):
    losses = []
    for batch_size, accumulation in ((12, 1), (3, 4)):
        model = make(router_aux_loss_coef=1.0)

        def compute_loss(outputs, labels, num_items_in_batch=None, model=model):
            loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
            return loss + router_aux_loss(model, labels, num_items_in_batch)

        _, loss, part = train(tmp_path / str(accumulation), batch_size, accumulation, model, compute_loss)
        assert 2 < part < 3
        losses.append(loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_label_smoothing_in_the_trainer_logs_no_load_balancing_loss(tmp_path):
    """It computes the loss outside of the model, and has no place to add anything."""
    _, loss, part = train(tmp_path, 4, 1, make(router_aux_loss_coef=10.0), label_smoothing_factor=0.1)
    assert loss < 3 and part is None


def test_the_log_is_the_mean_since_the_last_one(tmp_path):
    trainer, _, _ = train(tmp_path, 4, 1, max_steps=4, logging_steps=1)
    parts = [entry["router_aux_loss"] for entry in trainer.state.log_history if "router_aux_loss" in entry]
    trainer, _, _ = train(tmp_path, 4, 1, max_steps=4, logging_steps=2)
    means = [entry["router_aux_loss"] for entry in trainer.state.log_history if "router_aux_loss" in entry]
    assert len(parts) == 4 and len(set(parts)) > 1
    assert means == pytest.approx([(parts[0] + parts[1]) / 2, (parts[2] + parts[3]) / 2], abs=1e-7)


def test_models_that_do_not_know_the_number_of_labels(tmp_path):
    model = make()
    model.get_base_model().accepts_loss_kwargs = False
    _, loss, part = train(tmp_path, 3, 4, model)
    batch = torch.stack([Clips()[i]["input_values"] for i in range(12)])
    labels = torch.tensor([i % 5 for i in range(12)])
    assert loss == pytest.approx(model.eval()(batch, labels=labels).loss.item() + part, abs=1e-4)


def test_the_trainer_logs_it_every_epoch(tmp_path):
    model = make()
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        logging_strategy="epoch",
        eval_strategy="epoch",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Clips(), eval_dataset=Clips())
    trainer.add_callback(LogRouterLoss(trainer))
    trainer.train()
    logged = [set(entry) & {"loss", "router_aux_loss", "eval_loss"} for entry in trainer.state.log_history]
    assert logged[:6] == [{"router_aux_loss"}, {"loss"}, {"eval_loss"}] * 2
    model.eval()
    batch = torch.stack([Clips()[i]["input_values"] for i in range(12)])
    labels = torch.tensor([i % 5 for i in range(12)])
    eval_loss = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert eval_loss == pytest.approx(model(batch, labels=labels).loss.item(), abs=1e-4)
