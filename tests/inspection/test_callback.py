import copy
import os

import pytest
import torch
from conftest import FRAMES, MEL_BINS, tiny_ast_config
from families import FAMILIES
from peft import get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import ASTForAudioClassification, Trainer, TrainingArguments

from peft_softmoa import SoftMoAConfig
from peft_softmoa.inspection import ExpertUtilizationCallback, expert_report, find_layers
from peft_softmoa.inspection import callback as callback_module
from peft_softmoa.inspection.callback import METRICS


def make_trainer(folder, **arguments):
    torch.manual_seed(0)
    model = ASTForAudioClassification(tiny_ast_config())
    model = get_peft_model(model, SoftMoAConfig(num_experts=3, r=2, init_weights=False))
    rows = [{"input_values": torch.randn(FRAMES, MEL_BINS), "labels": index % 5} for index in range(8)]
    options = {"max_steps": 5, "per_device_train_batch_size": 2, "logging_steps": 2, "save_strategy": "no",
               "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 1, **arguments}  # fmt: skip
    return Trainer(model, TrainingArguments(str(folder), **options), train_dataset=rows)


def entries(trainer):
    return {entry["step"]: entry for entry in trainer.state.log_history if "experts/effective_number" in entry}


def test_every_so_many_steps_of_training_are_in_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, report_to="tensorboard")
    trainer.add_callback(ExpertUtilizationCallback(trainer, every=2))
    trainer.train()
    logged = entries(trainer)
    assert list(logged) == [1, 3, 5]
    names = {f"experts/layers.{layer}.attention/{metric}" for layer in range(2) for metric in METRICS}
    names |= {f"experts/{metric}" for metric in METRICS}
    assert {name for name in logged[1] if name.startswith("experts/")} == names
    # The Trainer's own entries are there as ever.
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]

    [folder] = {root for root, _, files in os.walk(tmp_path / "events") if files}
    events = EventAccumulator(folder).Reload()
    for name in names:
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [1, 3, 5]
        assert [scalar.value for scalar in scalars] == pytest.approx([logged[step][name] for step in (1, 3, 5)])


def test_a_step_has_the_metrics_of_all_its_batches(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, learning_rate=0.0)
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.add_callback(ExpertUtilizationCallback(trainer, every=2))
    trainer.train()
    for step, batches in ((1, seen[:2]), (3, seen[4:6])):
        wanted = expert_report(trainer.model, list(batches), show_progress=False)
        for metric in METRICS:
            values = [block.scalars[metric] for block in wanted.blocks]
            assert entries(trainer)[step][f"experts/{metric}"] == pytest.approx(sum(values) / 2)
            assert entries(trainer)[step][f"experts/layers.1.attention/{metric}"] == pytest.approx(values[1])
    assert list(entries(trainer)) == [1, 3, 5] and len(seen) >= 10


def test_between_its_steps_nothing_is_recorded(tmp_path):
    trainer = make_trainer(tmp_path)
    layer = next(iter(find_layers(trainer.model)))
    recorded = []
    layer.register_forward_hook(lambda *args: recorded.append(bool(layer.forward_passes.recorders)))
    trainer.add_callback(ExpertUtilizationCallback(trainer, every=3))
    trainer.train()
    assert recorded == [True, False, False, True, False] and not layer.forward_passes.recorders


def test_the_losses_are_the_same_without_it(tmp_path):
    losses = []
    for watched in (False, True):
        trainer = make_trainer(tmp_path, logging_steps=1)
        if watched:
            trainer.add_callback(ExpertUtilizationCallback(trainer, every=1))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 5 and losses[0] == losses[1]


def test_a_run_after_one_that_an_error_has_ended(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(ExpertUtilizationCallback(trainer, every=2))
    handle = trainer.model.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    handle.remove()
    trainer.train()
    assert list(entries(trainer)) == [1, 3, 5]


def test_layers_that_are_dropped(tmp_path):
    make, config = FAMILIES["Wav2Vec2"].config()
    config.layerdrop = 1.0
    torch.manual_seed(0)
    model = get_peft_model(make(config), SoftMoAConfig())
    trainer = make_trainer(tmp_path)
    callback = ExpertUtilizationCallback(trainer)
    trainer.model_wrapped = model
    callback.on_step_begin(trainer.args, trainer.state, trainer.control)
    model.train()(**FAMILIES["Wav2Vec2"].inputs([204, 400]))
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert trainer.state.log_history == []


def test_what_other_processes_have_counts_too(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1)

    def gather(own):
        """As from a process with the first block only, whose experts have other loads."""
        key, statistics = own[0]
        other = copy.deepcopy(statistics)
        other.sums["load"] += torch.tensor([9.0, 0.0, 0.0]) * other.sums["load.weight"]
        other.sums["load.weight"] *= 10
        return [*own, (key, other)]

    monkeypatch.setattr(callback_module, "gather_object", gather)
    trainer.add_callback(ExpertUtilizationCallback(trainer))
    trainer.train()
    [entry] = entries(trainer).values()
    assert entry["experts/layers.0.attention/effective_number"] < 2
    assert entry["experts/layers.1.attention/effective_number"] > 2


def test_a_compiled_model_is_recorded_with_a_warning(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, torch_compile=True, torch_compile_backend="eager")
    trainer.add_callback(ExpertUtilizationCallback(trainer))
    with pytest.warns(UserWarning, match="compiled model runs eagerly"):
        trainer.train()
    assert list(entries(trainer)) == [1]


def test_it_needs_a_positive_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match="`every` must be a positive number of optimizer steps, got 0"):
        ExpertUtilizationCallback(make_trainer(tmp_path), every=0)
