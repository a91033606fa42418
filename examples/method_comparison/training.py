"""One run of the comparison, from its settings to its record: train on all folds but two, validate, test."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from peft import IA3Config, LoraConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import ASTForAudioClassification, ASTModel, AutoConfig, AutoFeatureExtractor
from transformers import get_cosine_schedule_with_warmup as cosine
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_softmoa import SoftMoAConfig
from peft_softmoa.inspection import expert_report
from peft_softmoa.training import DataOptions, ExtractFeatures, class_names, load_rows
from peft_softmoa.training.rows import label_name
from peft_softmoa.training.tasks import SingleLabel

from ..benchmark.measure import memory_of, synchronize
from ..benchmark.methods import train_adapter, train_all, train_head

PROBE, SINGLE, DENSE, SOFT = "linear probe", "single adapter", "Dense-MoA", "Soft-MoA"
# The paper's, but for the learning rate, which is chosen.
OPTIMIZER = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
EVALUATION_BATCH = 40
# What is kept of an expert report, for each block.
UTILIZATION = ("block", "num_tokens", "effective_number", "normalized_entropy", "idle_experts", "class_information")


# --- data ---------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """A dataset as the model reads it.

    Args:
        inputs (Tensor): `(clips, frames, bins)`; None on the way to another process, which reads them from their file.
        labels (Tensor): `(clips,)` int64.
        folds (list[str]): the fold of each clip.
        label_names (list[str]): the classes.
        digest (str): of all that it was made from.
    """

    inputs: Optional[Tensor]
    labels: Tensor
    folds: list[str]
    label_names: list[str]
    digest: str

    @property
    def fold_names(self) -> list[str]:
        """The folds in their order: numbers by their value."""
        return sorted(set(self.folds), key=lambda fold: (len(fold), fold))

    def clips(self, folds: list[str]) -> Tensor:
        """Indices of the clips of some folds, in the order of the dataset."""
        return torch.tensor([index for index, fold in enumerate(self.folds) if fold in folds])

    def batch(self, clips: Tensor, device: str | torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and labels of some clips on a device."""
        return self.inputs[clips].to(device), self.labels[clips].to(device)


def load_data(
    name: str,
    model: Path,
    cache: Path,
    *,
    split: str = "train",
    config_name: Optional[str] = None,
    audio_column: str = "audio",
    label_column: str = "label",
    fold_column: str = "fold",
) -> Data:
    """Decode a dataset and extract its features, or take them from the cache.

    Args:
        name (str): id on the Hub, or local folder with a metadata.csv.
        model (Path): folder with the feature extractor.
        cache (Path): folder for the features; it is made. Their file is named by a digest of the clips' content, labels
            and folds and of the extractor's settings.
        split (str): which split. Default: `"train"`.
        config_name (str, optional): configuration of the dataset.
        audio_column (str): name of the column with the audio. Default: `"audio"`.
        label_column (str): name of the column with the labels. Default: `"label"`.
        fold_column (str): name of the column with the folds. Default: `"fold"`.

    Returns:
        Data: all clips.

    Raises:
        AudioError: for a clip that cannot be used.
        ValueError: if a column is missing, or there are fewer than three folds.
    """
    columns = [audio_column, label_column, fold_column]
    options = DataOptions(
        audio_column=audio_column, label_column=label_column, config_name=config_name, on_bad_audio="raise"
    )
    stream = load_rows(name, split, options, columns=columns)
    names = {column: class_names(stream, column) for column in columns[1:]}
    rows = list(tqdm(stream, desc=f"Reading {name}", unit=" rows", leave=False))
    labels, folds = ([label_name(row[column], names[column], name) for row in rows] for column in columns[1:])
    if len(set(folds)) < 3:
        raise ValueError(f"{name} has the folds {sorted(set(folds))}; training, validation and test need three.")
    extractor = AutoFeatureExtractor.from_pretrained(model)
    digest = hashlib.sha256(extractor.to_json_string().encode())
    for row, label, fold in zip(rows, labels, folds, strict=True):
        audio = row[audio_column]
        content = Path(audio["path"]).read_bytes() if audio["bytes"] is None else audio["bytes"]
        digest.update(hashlib.sha256(content).digest() + json.dumps([label, fold]).encode())
    label_names = sorted(set(labels))
    path = features_path(cache, digest.hexdigest()[:16])
    if not path.exists():
        extract = ExtractFeatures(extractor, SingleLabel(label_names, {label_column: names[label_column]}), options)
        parts = [
            extract({column: [row[column]] for column in columns[:2]})["input_values"][0]
            for row in tqdm(rows, desc="Extracting features", unit=" clips", leave=False)
        ]
        cache.mkdir(parents=True, exist_ok=True)
        (cache / ".gitignore").write_text("*\n")
        temporary = path.with_suffix(".part")
        torch.save(torch.from_numpy(np.stack(parts)), temporary)
        temporary.replace(path)
    indices = torch.tensor([label_names.index(label) for label in labels])
    return Data(load_features(cache, path.stem), indices, folds, label_names, path.stem)


def features_path(cache: Path, digest: str) -> Path:
    """The file with the features of a dataset."""
    return cache / f"{digest}.pt"


def load_features(cache: Path, digest: str) -> Tensor:
    """Read the features of a dataset, `(clips, frames, bins)`, from memory that all processes share."""
    return torch.load(features_path(cache, digest), weights_only=True, mmap=True)


# --- methods ------------------------------------------------------------------------------------------------------


class Classifier(ASTForAudioClassification):
    """An AST whose logits are read from the mean of all tokens, as in the paper."""

    def forward(self, input_values: Tensor, labels: Optional[Tensor] = None) -> SequenceClassifierOutput:
        """Classify.

        Args:
            input_values (Tensor): `(B, frames, bins)`.
            labels (Tensor, optional): `(B,)` int64.

        Returns:
            SequenceClassifierOutput: `logits`, `(B, classes)`, and with labels the loss.
        """
        tokens = self.audio_spectrogram_transformer(input_values).last_hidden_state
        logits = self.classifier(tokens.mean(1))
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_model(folder: Path, num_labels: int) -> Classifier:
    """The pretrained transformer with a fresh head, which is drawn from torch's generator."""
    model = Classifier(AutoConfig.from_pretrained(folder, num_labels=num_labels))
    model.audio_spectrogram_transformer.load_state_dict(ASTModel.from_pretrained(folder).state_dict())
    return model


def train_biases(model: nn.Module, budget: int) -> nn.Module:
    """BitFit: all biases, and the head."""
    train_head(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.requires_grad_(True)
    return model


def train_lora(model: nn.Module, budget: int) -> nn.Module:
    """LoRA with the largest rank within the budget, on the modules that it usually adapts."""
    targets = ["q_proj", "v_proj"]
    adapted = [module for name, module in model.named_modules() if name.rpartition(".")[2] in targets]
    rank = budget // sum(module.in_features + module.out_features for module in adapted)
    return train_adapter(lambda model: LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)


def train_ia3(model: nn.Module, budget: int) -> nn.Module:
    """IA³: factors on keys, values and the inner activations of the feed-forward; few, whatever the budget."""
    targets = ["k_proj", "v_proj", "fc2"]
    return train_adapter(lambda model: IA3Config(target_modules=targets, feedforward_modules=["fc2"]), model)


def train_mixture(
    model: nn.Module, budget: int, init: str = "up at zero", slot_std: float = 1.0, **options: Any
) -> nn.Module:
    """A mixture with the largest bottleneck within the budget.

    Args:
        model (nn.Module): the model.
        budget (int): the most parameters that may be trained apart from the head.
        init (str): `"up at zero"`, the package's own; `"down and up at zero"`, that of the paper's public code; or
            `"nothing at zero"`. Default: `"up at zero"`.
        slot_std (float): initial standard deviation of the slot parameters, in multiples of the package's own. Default:
            1.
        options: fields of SoftMoAConfig.

    Returns:
        nn.Module: the model.
    """
    options["init_weights"] = init != "nothing at zero"
    model = train_adapter(lambda model: SoftMoAConfig.for_budget(model, budget, **options), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if init == "down and up at zero" and name.endswith("down_weight"):
                parameter.zero_()
            elif is_slots(name):
                parameter *= slot_std
    return model


def decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has weight decay: not biases and norms, as in the Trainer, nor IA³'s factors, which start at
    one.
    """
    return parameter.ndim > 1 and not name.endswith("bias") and "ia3" not in name


def is_slots(name: str) -> bool:
    """Whether a parameter is the slot parameters of a Soft-MoA."""
    return name.endswith(".slots")


def _without_budget(prepare: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module, int], nn.Module]:
    return lambda model, budget: prepare(model)


# What prepares a model for training within a budget, by name; each changes the model that it is given.
METHODS: dict[str, Callable[..., nn.Module]] = {
    PROBE: _without_budget(train_head),
    "full fine-tuning": _without_budget(train_all),
    "BitFit": train_biases,
    "LoRA": train_lora,
    "IA³": train_ia3,
    SINGLE: partial(train_mixture, routing="dense", num_experts=1),
    DENSE: partial(train_mixture, routing="dense", num_experts=7),
    SOFT: partial(train_mixture, routing="soft", num_experts=7),
    "top-k": partial(train_mixture, routing="top_k", num_experts=7),
    "expert choice": partial(train_mixture, routing="expert_choice", num_experts=7),
}
# These have their own number of parameters; the others, the most within the budget.
UNBUDGETED = (PROBE, "full fine-tuning", "BitFit", "IA³")


# --- one run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What is trained.

    Args:
        method (str): one of METHODS.
        fold (str): the fold that is tested.
        rate (float, optional): learning rate; None stands for the one that is chosen on the validation fold.
        seed (int): of the head, the adapter and the order of the clips.
        options (tuple of pairs): of an ablation: what differs from the method's own settings.
    """

    method: str
    fold: str
    rate: Optional[float]
    seed: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Name of its file, without the ending."""
        options = "".join(f"_{slug(name)}-{slug(str(value))}" for name, value in self.options)
        return f"{slug(self.method)}{options}_fold-{slug(self.fold)}_rate-{self.rate:g}_seed-{self.seed}"


def slug(text: str) -> str:
    """A text as a part of a file's name."""
    plain = text.lower().replace("³", "3")
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in plain)


def validation_fold(fold: str, folds: list[str]) -> str:
    """The fold after the tested one, in a circle."""
    return folds[(folds.index(fold) + 1) % len(folds)]


def train(run: Run, protocol: dict[str, Any], model_folder: Path, data: Data) -> dict[str, Any]:
    """Train, validate after every epoch, and test after the last one.

    On the CPU, all of it but times follows from the arguments: the same runs give the same records. The order of the
    clips is that of the seed and fold, whatever the method.

    Args:
        run (Run): what is trained, with its rate.
        protocol (dict): what all runs have in common: `epochs`, `batch_size` and `budget` are read from it, and
            `device`, where it is not the CPU.
        model_folder (Path): the pretrained transformer.
        data (Data): all clips.

    Returns:
        dict[str, Any]: the record, which JSON takes: `settings`, `parameters` and `head_parameters`, lists with one
        value for each epoch, `test_accuracy`, `test_loss`, `test_clips` and `test_predictions` (indices), times in
        seconds, see `now`, `memory_bytes`, `run_seconds` by the clock and, of mixtures, `experts`, with one
        entry for each block.
    """
    started = time.perf_counter()
    device = protocol.get("device", "cpu")
    held_out = validation_fold(run.fold, data.fold_names)
    training, validation, test = (
        data.clips(folds)
        for folds in (
            [fold for fold in data.fold_names if fold not in (run.fold, held_out)],
            [held_out],
            [run.fold],
        )
    )
    torch.backends.cudnn.allow_tf32 = False  # float32 is what all else has
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = load_model(model_folder, len(data.label_names))
        options = dict(run.options)
        decays_slots = options.pop("decays_slots", True)
        model = METHODS[run.method](model, protocol["budget"], **options).to(device)
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        spared = {name for name in trained if not decays(name, trained[name]) or is_slots(name) and not decays_slots}
        groups = [
            {"params": [each for name, each in trained.items() if name not in spared]},
            {"params": [trained[name] for name in sorted(spared)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=run.rate, **OPTIMIZER)
        size = protocol["batch_size"]
        steps = protocol["epochs"] * math.ceil(len(training) / size)
        schedule = cosine(optimizer, num_warmup_steps=0, num_training_steps=steps)
        order = torch.Generator().manual_seed(run.seed)

        def step(clips: Tensor) -> float:
            inputs, labels = data.batch(clips, device)
            output = model(inputs, labels=labels)
            output.loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            # Without the load-balancing loss of top-k, so that all methods give the same.
            return cross_entropy(output.logits.detach(), labels).item()

        record: dict[str, Any] = {
            "settings": {
                **protocol,
                "method": run.method,
                "options": dict(run.options),
                "fold": run.fold,
                "validation_fold": held_out,
                "rate": run.rate,
                "seed": run.seed,
            },
            "parameters": sum(each.numel() for name, each in trained.items() if not name.startswith("classifier.")),
            "head_parameters": sum(each.numel() for name, each in trained.items() if name.startswith("classifier.")),
            "r": next((each.shape[-1] for name, each in trained.items() if "down_weight" in name), None),
        }
        progress: dict[str, list[Optional[float]]] = {}
        step_seconds = []
        for _ in range(protocol["epochs"]):
            model.train()
            losses = []
            for clips in training[torch.randperm(len(training), generator=order)].split(size):
                began = now(device)
                losses.append(step(clips) * len(clips))
                step_seconds.append(now(device) - began)
            predicted, loss = predict(model, data, validation)
            epoch = {
                "seconds": sum(step_seconds[-len(losses) :]),
                "loss": _finite(sum(losses) / len(training)),
                "validation_loss": _finite(loss),
                "validation_accuracy": accuracy(predicted, data.labels[validation]),
            }
            for name, value in epoch.items():
                progress.setdefault(name, []).append(value)
        record["epochs"] = progress
        predicted, loss = predict(model, data, test)
        record["test_accuracy"], record["test_loss"] = accuracy(predicted, data.labels[test]), _finite(loss)
        record["test_clips"], record["test_predictions"] = test.tolist(), predicted.tolist()
        # The last batch of an epoch may be smaller, and the first step warms up.
        record["step_seconds"] = statistics.median(step_seconds)
        record["forward_1_seconds"] = latency(model, data.inputs[:1])
        model.train()
        inputs, labels = data.batch(training[:size], device)
        forward = partial(model, inputs, labels=labels)
        # What autograd keeps, on any device.
        record["memory_bytes"] = memory_of(lambda: forward().loss, lambda: None, model, "cpu")
        if run.method in (DENSE, SOFT, "top-k", "expert choice"):
            batches = (
                dict(zip(("input_values", "labels"), data.batch(clips, device), strict=True))
                for clips in test.split(EVALUATION_BATCH)
            )
            report = expert_report(model, batches, label_names=data.label_names, show_progress=False).to_dict()
            record["experts"] = [
                {"experts": len(block["load"])} | {name: block[name] for name in UTILIZATION if name in block}
                for block in report["blocks"]
            ]
    record["run_seconds"] = time.perf_counter() - started
    return record


@torch.inference_mode()
def predict(model: nn.Module, data: Data, clips: Tensor) -> tuple[Tensor, float]:
    """The classes of some clips, `(clips,)` int64, and the mean loss."""
    model.eval()
    batches = (data.batch(batch, model.device)[0] for batch in clips.split(EVALUATION_BATCH))
    logits = torch.cat([model(inputs).logits.cpu() for inputs in batches])
    return logits.argmax(1), cross_entropy(logits, data.labels[clips]).item()


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of classes that are right."""
    return (predicted == labels).double().mean().item()


@torch.inference_mode()
def latency(model: nn.Module, clip: Tensor, times: int = 15) -> float:
    """The median seconds of a forward pass of one clip."""
    model.eval()
    clip, seconds = clip.to(model.device), []
    for _ in range(times):
        began = now(model.device.type)
        model(clip)
        seconds.append(now(model.device.type) - began)
    return statistics.median(seconds)


def now(device: str) -> float:
    """Seconds: of this process's time on the CPU, or by the clock once another device has done what it was told to."""
    synchronize(device)
    return time.process_time() if device == "cpu" else time.perf_counter()


@contextmanager
def one_thread():
    """Let torch compute on one thread, on which sums have one order and processor time is the time that it takes.

    Numbers too small for a normal float are zero here: in attention that is all but saturated, as with too high a
    learning rate, they would more than double the time of a step.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def _finite(value: float) -> Optional[float]:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None
