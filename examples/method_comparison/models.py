"""Pretrained models with a head, cut to the length of the clips, and what they learn: classes or texts."""

from __future__ import annotations

import copy
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, AutoTokenizer, EvalPrediction
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_softmoa import fit_feature_extractor
from peft_softmoa.quiet import quiet_loading
from peft_softmoa.targets.clip_length import fit_length
from peft_softmoa.training import SpeechSeq2Seq
from peft_softmoa.training.tasks.base import Clip

from .methods import HEAD

EVALUATION_BATCH = 40
# Whether more is better.
METRICS = {"accuracy": True, "wer": False}


def load_extractor(model: str, seconds: Optional[float]) -> Any:
    """The feature extractor of a model, for clips of a length."""
    with quiet_loading():
        extractor = AutoFeatureExtractor.from_pretrained(model)
    return extractor if seconds is None else fit_feature_extractor(extractor, seconds)


class Classes:
    """Classification: the model's own head, and cross-entropy.

    Args:
        model (str): folder or id.
        label_names (list[str]): the classes.
        seconds (float, optional): the length of the clips. Default: the model's own.
    """

    metric = "accuracy"

    def __init__(self, model: str, label_names: list[str], seconds: Optional[float] = None) -> None:
        self.name, self.label_names, self.seconds = model, label_names, seconds
        self.predicted = torch.empty(0, dtype=torch.long)  # by the last evaluation

    def load(self) -> nn.Module:
        """The pretrained model in float32 with a fresh head, which is drawn from torch's generator."""
        labels = dict(enumerate(self.label_names))
        with quiet_loading(HEAD):
            model = AutoModelForAudioClassification.from_pretrained(
                self.name,
                dtype=torch.float32,
                id2label=labels,
                label2id={name: index for index, name in labels.items()},
                ignore_mismatched_sizes=True,
            )
        fit_length(model, self.seconds)
        return model

    def targets(self, labels: Tensor) -> Tensor:
        """What the model's loss takes, `(B,)` int64."""
        return labels

    def loss(self, logits: Tensor, targets: Tensor) -> float:
        """The loss without what regularises it."""
        return cross_entropy(logits, targets).item()

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """The metric and the loss on some clips."""
        model.eval()
        device = next(model.parameters()).device
        logits = torch.cat([model(batch.to(device)).logits.cpu() for batch in inputs.split(EVALUATION_BATCH)])
        self.predicted = logits.argmax(1)
        return (self.predicted == labels).double().mean().item(), cross_entropy(logits, labels).item()

    def group_accuracy(self, labels: Tensor, groups: dict[str, str]) -> float:
        """How often the group of the label is right in the last evaluation, among clips with labels of a group."""
        names = [groups.get(name) for name in self.label_names]
        pairs = [(names[label], names[guess]) for label, guess in zip(labels, self.predicted, strict=True)]
        right = [group == guessed for group, guessed in pairs if group is not None]
        return sum(right) / len(right)


class Texts(Classes):
    """Recognition: the decoder writes the text, and words that are wrong are counted."""

    metric = "wer"

    def __init__(self, model: str, label_names: list[str], seconds: Optional[float] = None) -> None:
        super().__init__(model, label_names, seconds)
        self.task = SpeechSeq2Seq(tokenizer=AutoTokenizer.from_pretrained(model), metrics=("wer",))
        self.table: Optional[Tensor] = None

    def load(self) -> nn.Module:
        """The pretrained model in float32."""
        with quiet_loading():
            model = self.task.model_class.from_pretrained(self.name, dtype=torch.float32)
            self.task.prepare(model, load_extractor(self.name, self.seconds))
        fit_length(model, self.seconds)
        clip = Clip(0.0, 0, 16_000)
        self.table = self.task.batch_labels([self.task.encode(name, name, clip) for name in self.label_names])
        return model

    def targets(self, labels: Tensor) -> Tensor:
        """Token ids, `(B, length)` int64, padded with -100."""
        return self.table[labels]

    def loss(self, logits: Tensor, targets: Tensor) -> float:
        """The loss without what regularises it."""
        return cross_entropy(logits.flatten(0, 1), targets.flatten()).item()

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """The word error rate of what is generated, and the loss."""
        model.eval()
        device, losses, recognised = next(model.parameters()).device, [], []
        for batch, targets in zip(inputs.split(EVALUATION_BATCH), self.targets(labels).split(EVALUATION_BATCH)):
            batch = batch.to(device)
            losses.append(len(batch) * model(batch, labels=targets.to(device)).loss.item())
            # The prompt and the end count, too.
            recognised += list(model.generate(batch, max_new_tokens=targets.shape[1] + 4).cpu())
        predicted = np.asarray(self.task.batch_labels(recognised))
        scores = self.task.score(EvalPrediction(predicted, np.asarray(self.targets(labels))))
        return scores["wer"], sum(losses) / len(labels)


TASKS = {"audio-classification": Classes, "speech-seq2seq": Texts}


@torch.no_grad()
def pooled_outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """What the head of a classifier reads, as a mean over tokens: the head's first layer is linear.

    Args:
        model (nn.Module): a classifier.
        inputs (Tensor): `(clips, ...)`.

    Returns:
        Tensor: `(clips, D)`.
    """
    kept: list[Tensor] = []
    hook = head_of(model)[0].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        model.eval()
        for batch in inputs.split(EVALUATION_BATCH):
            model(batch)
    finally:
        hook.remove()
    return torch.cat([each.mean(1) if each.ndim == 3 else each for each in kept])


def backbone_of(model: nn.Module) -> nn.Module:
    """A model without its head, which is drawn anew at each load. Some classifiers have no module of that kind."""
    base: nn.Module = model.base_model
    if base is not model:
        return base
    return nn.ModuleDict({name: module for name, module in model.named_children() if name not in HEAD})


def head_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a classifier's head, in their order."""
    return [getattr(model, name) for name in HEAD if hasattr(model, name)]


class Head(nn.Module):
    """The head of a classifier alone, on what `pooled_outputs` gives.

    Args:
        model (nn.Module): the classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name in HEAD:
            if hasattr(model, name):
                self.add_module(name, copy.deepcopy(getattr(model, name)))

    def forward(self, pooled: Tensor, labels: Optional[Tensor] = None) -> Any:
        """Logits, `(B, classes)`, and with labels the loss."""
        logits = pooled
        for module in self.children():
            logits = module(logits)
        return _output(logits, labels)


def _output(logits: Tensor, labels: Optional[Tensor]) -> SequenceClassifierOutput:
    return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


class Apart(nn.Module):
    """Reads the channels of a clip as samples, and takes the mean of their logits.

    Args:
        model (nn.Module): a classifier of mono clips.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Optional[Tensor] = None) -> Any:
        """Logits, `(B, classes)`, of inputs `(B, C, ...)`, and with labels the loss."""
        output = self.model(inputs.flatten(0, 1))
        logits = output.logits.unflatten(0, inputs.shape[:2]).mean(1)
        return _output(logits, labels)
