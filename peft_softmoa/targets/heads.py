"""The classification head that an adapter brings with it, and what the base model says about its classes.

PEFT saves a trained head as it is, but on loading it expects the base model to have one of the same size, which a
checkpoint with other classes does not. Each adapter that names its classes gets a head of its own size here; the
base model's head stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Optional, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

from ..config import SoftMoAConfig
from ..fields import ProblemType

# Attribute of the model that keeps what it says about its classes while an adapter's are in their place.
BASE_CLASSES = "_softmoa_base_classes"


class Head(NamedTuple):
    """A fresh head of an adapter."""

    path: str  # of the linear layer with one output per class, in the base model
    num_labels: int


@dataclass
class Classes:
    """What a model says about its classes.

    Args:
        id2label (dict): their names, by the index of the output.
        label2id (dict): the opposite.
        problem_type (str, optional): the loss. None: the labels decide.
        repeating (tuple): the modules that repeat the number of classes, for their loss.
        vocab_size (int, optional): number of outputs, if the model is for CTC and its classes are a vocabulary.
        blank (int, optional): index of the blank in it.
    """

    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: Optional[ProblemType]
    repeating: tuple[nn.Module, ...]
    vocab_size: Optional[int] = None
    blank: Optional[int] = None

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the head."""
        return len(self.id2label) if self.vocab_size is None else self.vocab_size


def base_classes(model: nn.Module) -> Classes:
    """What the base model itself says about its classes.

    Args:
        model (nn.Module): the base model, with or without adapters.

    Returns:
        Classes: without any, if it has no config with labels.
    """
    kept: Optional[Classes] = getattr(model, BASE_CLASSES, None)
    if kept is not None:
        return kept
    config = getattr(model, "config", None)
    id2label = dict(getattr(config, "id2label", None) or {})
    # What has parameters of its own, such as a loss with a weight for each class, has their size.
    repeating = tuple(
        module
        for module in model.modules()
        if vars(module).get("num_labels") == len(id2label) and not any(True for _ in module.parameters(recurse=False))
    )
    label2id = dict(getattr(config, "label2id", None) or {})
    vocabulary: tuple[Any, ...] = ()
    if type(model).__name__ in MODEL_FOR_CTC_MAPPING_NAMES.values():
        vocabulary = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    return Classes(id2label, label2id, getattr(config, "problem_type", None), repeating, *vocabulary)


def find_head(model: nn.Module, saved: Mapping[str, nn.Module], label_names: Optional[list[str]]) -> Optional[Head]:
    """Find the classification head that an adapter replaces, because it names other classes than the base model.

    Args:
        model (nn.Module): the base model, with or without adapters.
        saved (mapping): the modules that the adapter brings with it, by name.
        label_names (list[str], optional): the adapter's classes.

    Returns:
        Head, optional: None if the base model's head is kept.

    Raises:
        ValueError: if classes are named and there is no head, or it is not clear which module it is.
    """
    if label_names is None:
        return None
    base = base_classes(model)
    names, num_outputs = list(base.id2label.values()), base.num_outputs
    found = list(
        dict.fromkeys(
            f"{name}.{path}".rstrip(".")
            for name, module in saved.items()
            for path, child in module.named_modules()
            if isinstance(child, nn.Linear) and child.out_features == num_outputs
        )
    )
    # Another layer may happen to be as wide.
    named = [path for path in found if _is_named_head(path)]
    elsewhere = [
        name
        for name, module in model.named_modules()
        if not named and isinstance(module, nn.Linear) and module.out_features == num_outputs and _is_named_head(name)
    ]
    found = [] if elsewhere else found
    found = named if len(found) > 1 and named else found
    problem = (
        f"`label_names` gives {len(label_names)} classes, but what `modules_to_save` matches, {sorted(saved)}, has"
    )
    if not found:
        raise ValueError(
            f"{problem} no classification head of {type(model).__name__}, that is, no linear layer with {num_outputs} "
            "outputs."
        )
    if len(found) > 1:
        raise ValueError(
            f"{problem} several linear layers with {num_outputs} outputs, {found}, any of which may be the "
            f"classification head of {type(model).__name__}. Name only the head."
        )
    return None if names == label_names else Head(found[0], len(label_names))


def _is_named_head(path: str) -> bool:
    return not set(SEQ_CLS_HEAD_NAMES).isdisjoint(path.split("."))


def fit_head(model: nn.Module, adapter_name: str, head: Head) -> None:
    """Give an adapter a fresh head of its own size.

    Args:
        model (nn.Module): the model, with the adapter.
        adapter_name (str): name of the adapter.
        head (Head): where the head is, and its size.
    """
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and f"{head.path}.".startswith(f"{name}."):
            path = f"{adapter_name}.{head.path[len(name) + 1 :]}".rstrip(".")
            old = cast(nn.Linear, wrapper.modules_to_save.get_submodule(path))
            new = nn.Linear(
                old.in_features,
                head.num_labels,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
            parent, _, child = path.rpartition(".")
            setattr(wrapper.modules_to_save.get_submodule(parent), child, new)
            new.requires_grad_(old.weight.requires_grad)


def keep_problem_type(model: nn.Module, block: BaseTunerLayer, adapter_name: str, config: SoftMoAConfig) -> list[Any]:
    """Let an adapter's config say what transformers finds from the labels of its first loss.

    Args:
        model (nn.Module): the base model.
        block (BaseTunerLayer): a block that the adapter adapts.
        adapter_name (str): its name.
        config (SoftMoAConfig): its config.

    Returns:
        list[RemovableHandle]: removes the hook that does it; empty if the base model or the adapter says it already.
    """
    if config.problem_type is not None or base_classes(model).problem_type is not None:
        return []
    return [model.register_forward_hook(partial(_keep_problem_type, block, adapter_name, config))]


def _keep_problem_type(
    block: BaseTunerLayer,
    adapter_name: str,
    config: SoftMoAConfig,
    model: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> None:
    if config.problem_type is not None or torch.compiler.is_compiling():
        return
    found = getattr(getattr(model, "config", None), "problem_type", None)
    if found is not None and adapter_name in block.active_adapters and not block.disable_adapters:
        config.problem_type = found
        setattr(model, BASE_CLASSES, replace(base_classes(model), problem_type=None))


def note_problem_type(model: Any, config: SoftMoAConfig) -> None:
    """The same when an adapter is saved: a compiled model does not run the hook.

    Args:
        model (nn.Module): the model that is saved; nothing happens if it is no `PeftModel`, or the adapter not active.
        config (SoftMoAConfig): the adapter's config.
    """
    if isinstance(model, PeftModel) and config.modules_to_save and config.problem_type is None:
        configs: Any = model.peft_config
        if any(configs[name] is config for name in model.active_adapters):
            config.problem_type = getattr(getattr(model.get_base_model(), "config", None), "problem_type", None)


def name_classes(model: nn.Module, label_names: Optional[list[str]], problem_type: Optional[str]) -> None:
    """Make a model say an adapter's classes, or its own again.

    Args:
        model (nn.Module): the base model; nothing happens if it has no config with labels.
        label_names (list[str], optional): the classes of the active adapter. Default: the base model's own.
        problem_type (str, optional): its loss. Default: the base model's own.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "id2label", None):
        return
    base = base_classes(model)
    if label_names is None and problem_type is None:
        if not hasattr(model, BASE_CLASSES):
            return
        delattr(model, BASE_CLASSES)
    else:
        setattr(model, BASE_CLASSES, base)
    own = dict(enumerate(label_names or ()))
    config.id2label = own or dict(base.id2label)
    config.label2id = {name: index for index, name in own.items()} or dict(base.label2id)
    # transformers keeps here what it has guessed from the labels of the latest adapter.
    config.problem_type = problem_type or base.problem_type
    if base.vocab_size is not None:
        config.vocab_size, config.pad_token_id = (len(own), 0) if own else (base.vocab_size, base.blank)
    for module in base.repeating:
        module.num_labels = len(config.id2label)  # type: ignore[assignment]
