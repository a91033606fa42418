"""The modules that an adapter brings with it, above all its classification head.

PEFT saves a trained head as it is, but on loading it expects the base model to have one of the same size, which a
checkpoint with other classes does not. Each adapter that names its classes gets a head of its own size here; the
base model's head stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, Optional, cast

from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..config import SoftMoAConfig
from .choice import Target
from .layers import whole_shape
from .probes import norms_before

# They hold modules, and have no forward pass of their own.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

# Attribute of the model that keeps the label maps of its config while an adapter's are in their place.
BASE_LABELS = "_softmoa_base_labels"


def find_saved(config: SoftMoAConfig, model: nn.Module, targets: Iterable[Target]) -> dict[str, nn.Module]:
    """Find the modules that an adapter brings with it, and check that it can.

    Args:
        config (SoftMoAConfig): says which; the norms of `train_norms` are added to its `modules_to_save`.
        model (nn.Module): the base model, with or without adapters.
        targets (iterable of Target): the adapted blocks.

    Returns:
        dict[str, nn.Module]: the base model's own modules by name.

    Raises:
        ValueError: if a norm is not found, or a module would not be trained where it is used.
    """
    if config.train_norms:
        widths = {target.entry or target.name: target.in_features for target in targets}
        norms = list(norms_before(model, widths).values())
        others = _matching(model, norms).keys() - set(norms)
        if others:
            raise ValueError(
                f"`train_norms` would also train {sorted(others)}, whose names end like those of the norms in front of "
                f"the adapted blocks, {norms}. Set it to False, and adapt the model under a name of its own."
            )
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *norms]))
    # PEFT adds these for the task type when it wraps the model.
    head = SEQ_CLS_HEAD_NAMES if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) else []
    saved = _matching(model, [*(config.modules_to_save or []), *head])
    _check_saved(saved, [target.name for target in targets], not config.inference_mode)
    return saved


def count_saved(model: nn.Module, modules: Iterable[nn.Module], label_names: Optional[list[str]] = None) -> int:
    """Number of parameters in the modules that an adapter brings with it.

    Args:
        model (nn.Module): the base model, with or without adapters.
        modules (iterable of nn.Module): the base model's own modules, each of which the adapter copies.
        label_names (list[str], optional): the adapter's classes. Default: those of the base model.

    Returns:
        int: the parameters of all of them together.
    """
    total = 0
    for module in modules:
        shapes = saved_shapes(model, module, label_names)
        total += sum(prod(shapes[name]) for name, _ in module.named_parameters())
    return total


def saved_shapes(
    model: nn.Module, module: nn.Module, label_names: Optional[list[str]] = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a module that an adapter brings with it.

    Args:
        model (nn.Module): the base model, with or without adapters.
        module (nn.Module): the base model's own module, which the adapter copies.
        label_names (list[str], optional): the adapter's classes. Default: those of the base model.

    Returns:
        dict[str, tuple[int, ...]]: the shapes, by the tensors' names in the module.
    """
    base_labels = _base_labels(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes.update((name, whole_shape(parameter)) for name, parameter in module.named_parameters())
    if label_names is not None and list(base_labels.values()) != label_names:
        for path in _classifiers(module, len(base_labels)):
            for name in ("weight", "bias"):
                key = f"{path}.{name}".lstrip(".")
                if key in shapes:
                    shapes[key] = (len(label_names), *shapes[key][1:])
    return shapes


def check_head(model: nn.Module, saved: dict[str, nn.Module], label_names: list[str]) -> None:
    """Check that an adapter which names its classes can have its own head.

    Args:
        model (nn.Module): the base model.
        saved (dict[str, nn.Module]): the modules that are trained whole, by name.
        label_names (list[str]): the adapter's classes.

    Raises:
        ValueError: if none of the modules holds the model's classification head.
    """
    if not any(_classifiers(module, len(_base_labels(model))) for module in saved.values()):
        raise ValueError(
            f"`label_names` gives {len(label_names)} classes, but what `modules_to_save` matches, {sorted(saved)}, "
            f"has no classification head of {type(model).__name__}, that is, no linear layer with "
            f"{len(_base_labels(model))} outputs."
        )


def fit_heads(model: nn.Module, adapter_name: str, label_names: list[str]) -> None:
    """Give an adapter a fresh head of its own size, unless the base model's head has the same classes.

    Args:
        model (nn.Module): the model, with the adapter.
        adapter_name (str): name of the adapter.
        label_names (list[str]): its classes.
    """
    base_labels = _base_labels(model)
    if list(base_labels.values()) == label_names:
        return
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            for path in _classifiers(wrapper.modules_to_save[adapter_name], len(base_labels)):
                name = f"{adapter_name}.{path}".rstrip(".")
                old = cast(nn.Linear, wrapper.modules_to_save.get_submodule(name))
                new = nn.Linear(
                    old.in_features,
                    len(label_names),
                    bias=old.bias is not None,
                    device=old.weight.device,
                    dtype=old.weight.dtype,
                )
                parent, _, child = name.rpartition(".")
                setattr(wrapper.modules_to_save.get_submodule(parent), child, new)
                new.requires_grad_(old.weight.requires_grad)


def name_labels(model: nn.Module, label_names: Optional[list[str]]) -> None:
    """Make the model's config name an adapter's classes, or its own again.

    Args:
        model (nn.Module): the model; nothing happens if it has no config with labels.
        label_names (list[str], optional): the classes of the active adapter. Default: the base model's own.
    """
    config: Any = getattr(model, "config", None)
    if label_names is None:
        if hasattr(model, BASE_LABELS):
            _set_labels(config, getattr(model, BASE_LABELS))
            delattr(model, BASE_LABELS)
        return
    if not hasattr(model, BASE_LABELS):
        setattr(model, BASE_LABELS, dict(config.id2label))
    _set_labels(config, dict(enumerate(label_names)))


def _set_labels(config: Any, id2label: dict[int, str]) -> None:
    config.id2label = id2label
    config.label2id = {label: index for index, label in id2label.items()}


def _base_labels(model: nn.Module) -> dict[int, str]:
    default = getattr(getattr(model, "config", None), "id2label", None)
    return getattr(model, BASE_LABELS, default) or {}


def _classifiers(module: nn.Module, num_labels: int) -> list[str]:
    """Paths of the linear layers that give one output per class."""
    return [
        path
        for path, child in module.named_modules()
        if isinstance(child, nn.Linear) and child.out_features == num_labels
    ]


def _matching(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The base model's own modules that PEFT copies for those names, or endings of names; parts of another one too."""
    modules = dict(model.named_modules())
    inside = tuple(
        f"{name}." for name, module in modules.items() if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
    )
    return {
        name: module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        for name, module in modules.items()
        if name.endswith(tuple(names)) and not name.startswith(inside)
    }


def _check_saved(saved: dict[str, nn.Module], targets: list[str], is_trained: bool) -> None:
    """Check that every module that an adapter brings with it would be trained where it is used.

    PEFT would train a copy that nothing uses of a module inside another one, and none of a module inside an adapted
    one.
    """
    for name, module in saved.items():
        if isinstance(module, CONTAINERS):
            raise ValueError(
                f"`modules_to_save` matches '{name}', a {type(module).__name__}, which is never called. Name the "
                "modules in it."
            )
        outer = next((other for other in saved if name.startswith(f"{other}.")), None)
        if outer is not None and is_trained:  # such adapters of the first version still load
            raise ValueError(
                f"`modules_to_save` matches '{outer}' and also '{name}', which is a part of it. Write out the names of "
                f"the modules that are meant, but not '{name}': it is trained with '{outer}'."
            )
        target = next((other for other in targets if name.startswith(f"{other}.")), None)
        if target is not None:
            raise ValueError(
                f"'{name}' cannot be trained whole for `modules_to_save` or `train_norms`: it is a part of '{target}', "
                "which is adapted. Leave it out, or adapt another module."
            )
