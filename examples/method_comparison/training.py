"""One run of a study, from its settings to its record: train on all folds but two, validate, test."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup as cosine

from peft_softmoa.quiet import quiet_loading

from .data import Data
from .measures import autocast, costs, now, one_thread, use_of_experts
from .methods import HEAD, METHODS, MIXTURES, PROBE, is_slots
from .models import TASKS, Apart, Classes, Head

# The paper's, but for the learning rate, which is chosen.
OPTIMIZER = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
# Options of a run that are not its method's.
DATA_OPTIONS = ("clips_per_class", "speakers", "channels")
OPTIMIZER_OPTIONS = ("slots_rate", "decays_slots")
CHANNELS = ("mono", "apart", "joined")
TRACED_CLIPS = 40
# With which a head is trained alone.
HEAD_RATE = 1e-3


@dataclass(frozen=True)
class Run:
    """What is trained.

    Args:
        method (str): one of METHODS.
        fold (str): the fold that is tested.
        rate (float, optional): learning rate; None stands for the one that is chosen on the validation fold.
        seed (int): of the head, the adapter, the order of the clips and which of them are drawn.
        options (tuple of pairs): what differs from the method's own settings, see `Study`.
    """

    method: str
    fold: str
    rate: Optional[float]
    seed: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """What identifies it."""
        options = "".join(f"_{slug(name)}-{slug(str(value))}" for name, value in self.options)
        return f"{slug(self.method)}{options}_fold-{slug(self.fold)}_rate-{self.rate or 0:g}_seed-{self.seed}"


def slug(text: str) -> str:
    """A text as a part of a name."""
    kept = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in text.lower())
    return "-".join(filter(None, kept.split("-")))


def method_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a run that its method takes."""
    own = {name: value for name, value in options.items() if name not in (*DATA_OPTIONS, *OPTIMIZER_OPTIONS, "budget")}
    return own | ({"num_channels": 2} if options.get("channels") == "joined" else {})


def prepare(
    run: Run, protocol: dict[str, Any], task: Classes, first: Callable[[nn.Module], None] = lambda model: None
) -> nn.Module:
    """The pretrained model, ready to train with a method, in which all but this is the same for all methods.

    Args:
        run (Run): the method, its options and the seed of the head and the adapter.
        protocol (dict): `budget` and `seconds` are read from it.
        task (Classes): loads the model.
        first (callable): what is done to the pretrained model before the method changes it. Default: nothing.

    Returns:
        nn.Module: the model, on the CPU.

    Raises:
        ValueError: for an option that the method does not take.
    """
    options = dict(run.options)
    channels, own = options.get("channels"), method_options(options)
    if channels not in (None, *CHANNELS) or channels == "joined" and run.method not in MIXTURES:
        raise ValueError(f"{run.method} does not read channels as {channels!r}.")
    if (own or any(name in options for name in OPTIMIZER_OPTIONS)) and run.method not in MIXTURES:
        raise ValueError(f"{run.method} has no options, got {', '.join(own or options)}.")
    torch.manual_seed(run.seed)
    model = task.load()
    first(model)
    if run.method in MIXTURES:
        own["max_length_seconds"] = task.seconds
    with quiet_loading():
        model = METHODS[run.method](model, options.get("budget", protocol["budget"]), **own)
    return Apart(model) if channels == "apart" else model


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the classification head."""
    return any(part in HEAD for part in name.split(".")[:2])


def decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has weight decay: not biases and norms, as in the Trainer."""
    return parameter.ndim > 1 and not name.endswith("bias")


def make_optimizer(model: nn.Module, rate: float, slots_rate: float = 1.0, decays_slots: bool = True) -> Any:
    """AdamW for what is trained of a model.

    Args:
        model (nn.Module): the model.
        rate (float): learning rate.
        slots_rate (float): that of slot parameters, in multiples of it. Default: 1.
        decays_slots (bool): whether these have weight decay. Default: True.

    Returns:
        torch.optim.AdamW: the optimizer.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, each in model.named_parameters():
        if each.requires_grad:
            decaying = decays(name, each) and (decays_slots or not is_slots(name))
            groups.setdefault((decaying, slots_rate if is_slots(name) else 1.0), []).append(each)
    return torch.optim.AdamW(
        [
            {"params": each, "lr": rate * factor, **({} if decaying else {"weight_decay": 0.0})}
            for (decaying, factor), each in groups.items()
        ],
        lr=rate,
        **OPTIMIZER,
    )


def fit_head(model: nn.Module, pooled: Tensor, labels: Tensor, size: int, epochs: int, seed: int) -> None:
    """Train the head of a model alone, on what it reads of each clip.

    Args:
        model (nn.Module): the model, whose head is changed.
        pooled (Tensor): `(clips, D)`.
        labels (Tensor): `(clips,)` int64.
        size (int): clips in a batch.
        epochs (int): passes over the clips.
        seed (int): of the order of the clips.
    """
    head, order = Head(model), torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(head, HEAD_RATE)
    schedule = cosine(optimizer, 0, num_training_steps=epochs * math.ceil(len(labels) / size))
    for _ in range(epochs):
        for clips in torch.randperm(len(labels), generator=order).split(size):
            head(pooled[clips], labels=labels[clips]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    for name, module in head.named_children():
        getattr(model, name).load_state_dict(module.state_dict())


def train(run: Run, protocol: dict[str, Any], data: Data, pooled: Optional[Tensor] = None) -> dict[str, Any]:
    """Train, validate from time to time, and test after the last epoch.

    On the CPU, all of it but times follows from the arguments: the same runs give the same records. The clips and their
    order are those of the seed and fold, whatever the method.

    Args:
        run (Run): what is trained, with its rate.
        protocol (dict): what all runs have in common, see `run.protocol_of`.
        data (Data): all clips.
        pooled (Tensor, optional): `(clips, D)`, what the head reads, which is all that a linear probe needs, and a head
            that is trained alone first.

    Returns:
        dict[str, Any]: the record, which JSON takes: `settings`, `parameters` and `head_parameters`, `progress`, lists
        with one value for each validation, `test` and `test_loss`, times in seconds, see `now`, `memory_bytes`,
        `run_seconds` by the clock and, of mixtures, `routing`, one entry for each step that is traced and the end.
    """
    started = time.perf_counter()
    device, options = protocol.get("device", "cpu"), dict(run.options)
    training, validation, test = data.split(run.fold)
    per_class = options.get("clips_per_class", protocol["clips_per_class"])
    training = data.draw(training, per_class, options.get("speakers"), run.seed)
    # The same for all seeds.
    validation = data.draw(validation, protocol["validation_per_class"], None, 0)
    test = data.draw(test, protocol["test_per_class"], None, 0)
    torch.backends.cudnn.allow_tf32 = False  # float32 is what all else has
    with one_thread(), torch.random.fork_rng(devices=[]):
        task = TASKS[protocol["task"]](protocol["model_path"], data.label_names, protocol["seconds"])
        size, head_epochs = protocol["batch_size"], protocol.get("head_epochs", 0)

        def first(model: nn.Module) -> None:
            if head_epochs and run.method != PROBE:
                fit_head(model, pooled[training], data.labels[training], size, head_epochs, run.seed)

        model = prepare(run, protocol, task, first)
        uses_pooled = run.method == PROBE and pooled is not None
        inputs = pooled if uses_pooled else channels_of(data.inputs, options.get("channels"))
        trained_model = (Head(model) if uses_pooled else model).to(device)
        own = {name: options[name] for name in OPTIMIZER_OPTIONS if name in options}
        optimizer = make_optimizer(trained_model, run.rate, **own)
        epochs = protocol["epochs_of"].get(run.method, protocol["epochs"])
        schedule = cosine(optimizer, 0, num_training_steps=epochs * math.ceil(len(training) / size))
        order = torch.Generator().manual_seed(run.seed)
        trained = {name: each.numel() for name, each in trained_model.named_parameters() if each.requires_grad}
        head_parameters = sum(count for name, count in trained.items() if is_head(name))
        routing, traced = [], validation[:: max(1, len(validation) // TRACED_CLIPS)][:TRACED_CLIPS]

        def trace(step: int) -> None:
            if run.method in MIXTURES and MIXTURES[run.method]["num_experts"] > 1:
                with autocast(protocol):
                    routing.append({"step": step, **use_of_experts(trained_model, inputs[traced])})

        def step(clips: Tensor) -> float:
            targets = task.targets(data.labels[clips]).to(device)
            with autocast(protocol):
                output = trained_model(inputs[clips].to(device), labels=targets)
            output.loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            # Without the load-balancing loss of top-k, so that all methods give the same.
            return task.loss(output.logits.detach().float(), targets)

        def evaluate(clips: Tensor) -> tuple[float, float]:
            with autocast(protocol):
                return task.evaluate(trained_model, inputs[clips], data.labels[clips])

        progress: dict[str, list[Any]] = {}
        seconds: list[float] = []
        for epoch in range(1, epochs + 1):
            trained_model.train()
            losses = []
            for clips in training[torch.randperm(len(training), generator=order)].split(size):
                if len(seconds) in protocol["trace"]:
                    trace(len(seconds))
                    trained_model.train()
                began = now(device)
                losses.append(step(clips) * len(clips))
                seconds.append(now(device) - began)
            if epoch % protocol["validate_every"] == 0 or epoch == epochs:
                value, loss = evaluate(validation)
                entry = {"epoch": epoch, "seconds": sum(seconds), "loss": _finite(sum(losses) / len(training))}
                for name, each in {**entry, "validation": value, "validation_loss": _finite(loss)}.items():
                    progress.setdefault(name, []).append(each)
        trace(len(seconds))
        value, loss = evaluate(test)
        with autocast(protocol):
            cost = costs(trained_model, inputs[training[:size]], task.targets(data.labels[training[:size]]))
        record = {
            "settings": {
                # Where the model lies is no setting.
                **{name: value for name, value in protocol.items() if name != "model_path"},
                **{name: getattr(run, name) for name in ("method", "fold", "rate", "seed")},
                "options": options,
            },
            "parameters": sum(trained.values()) - head_parameters,
            "head_parameters": head_parameters,
            "training_clips": len(training),
            "progress": progress,
            "test": value,
            "test_loss": _finite(loss),
            # The last batch of an epoch may be smaller, and the first step warms up.
            "step_seconds": statistics.median(seconds),
            **cost,
        }
        if protocol["groups"]:
            record["test_group"] = task.group_accuracy(data.labels[test], protocol["groups"])
        if routing:
            record["routing"] = routing
    record["run_seconds"] = time.perf_counter() - started
    return record


def channels_of(inputs: Tensor, channels: Optional[str]) -> Tensor:
    """What a model reads of recordings with several channels: their mean is the last one of the stored."""
    if channels is None:
        return inputs
    return inputs[:, -1] if channels == "mono" else inputs[:, :-1]


def _finite(value: float) -> Optional[float]:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None
