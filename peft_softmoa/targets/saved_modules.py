"""The modules apart from the mixtures that an adapter trains and brings with it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import Optional

from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..config import SoftMoAConfig
from .choice import Target
from .heads import Head
from .layers import whole_shape
from .probes import norms_before

# They hold modules, and have no forward pass of their own.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


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
        _add_names(config, norms)
    # PEFT adds these for the task type when it wraps the model.
    head = SEQ_CLS_HEAD_NAMES if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) else []
    names = [*(config.modules_to_save or []), *head]
    saved = _matching(model, names)
    fresh, parameters = find_fresh(model, [target.name for target in targets])
    fresh = {
        path: each for path, each in fresh.items() if not f"{path}.".startswith(tuple(f"{name}." for name in saved))
    }
    if config.loaded_from is None and not config.inference_mode:
        _check_names(model, [name for name in config.modules_to_save or () if name not in head])
        if parameters:
            raise ValueError(
                f"The checkpoint of the base model does not have {parameters}, which would be drawn at random, "
                "differently each time the model is loaded, and PEFT saves whole modules only. Load a checkpoint that "
                "has it, or leave out what it belongs to in the model's config."
            )
        adapted = [path for path in fresh if any(f"{target.name}.".startswith(f"{path}.") for target in targets)]
        if adapted:
            raise ValueError(
                f"`target_modules` matches parts of {adapted}, which the checkpoint of the base model does not have: "
                "they are drawn at random, differently each time, and have to be trained whole. Name them in "
                "`exclude_modules`; they are then trained and saved with the adapter."
            )
        _add_names(config, list(fresh))
        saved = {name: each for name, each in saved.items() if not name.startswith(tuple(f"{path}." for path in fresh))}
        saved |= fresh
    elif fresh or parameters:
        warnings.warn(
            f"The checkpoint of the base model does not have {[*fresh, *parameters]}, and the adapter does not bring "
            "them: they are drawn at random, differently each time. Adapters that are trained now bring them.",
            stacklevel=2,
        )
    _check_saved(saved, [target.name for target in targets])
    return saved


def find_fresh(model: nn.Module, targets: Collection[str]) -> tuple[dict[str, nn.Module], list[str]]:
    """Find what a checkpoint did not have from which a model was loaded, beside the loaded part that is adapted.

    transformers marks the parameters that it has loaded, and the modules whose missing ones it has drawn at random.
    Where there are no such marks, as in a copy of a model, nothing is found.

    Args:
        model (nn.Module): the base model, with or without adapters.
        targets (collection of str): names of the adapted blocks.

    Returns:
        tuple[dict[str, nn.Module], list[str]]: the modules, without what is inside others of them, and the names of
        parameters of the model that no module holds.
    """
    if not isinstance(model, PreTrainedModel):
        return {}, []
    own = _own_modules(model)
    loaded = {
        name.split(".")[0]
        for name, module in own.items()
        for parameter in module.parameters(recurse=False)
        if _is_loaded(parameter)
    }
    parts = loaded & {name.split(".")[0] for name in targets}
    if not parts:
        return {}, []
    fresh: dict[str, nn.Module] = {}
    for name, module in own.items():
        outside = name and name.split(".")[0] not in parts and not name.startswith(tuple(f"{path}." for path in fresh))
        if outside and not isinstance(module, CONTAINERS) and _is_fresh(module):
            fresh[name] = module
    alone = [name for name, parameter in model.named_parameters(recurse=False) if not _is_loaded(parameter)]
    return fresh, alone


def _is_fresh(module: nn.Module) -> bool:
    """Whether all of a module, or some of what it holds itself, was drawn at random by transformers."""
    owners = [each for each in module.modules() if any(True for _ in each.parameters(recurse=False))]
    is_whole = owners and not any(map(_is_loaded, module.parameters()))
    is_part = owners == [module] and not all(map(_is_loaded, module.parameters()))
    # A module that somebody has put in later has no mark.
    return bool(is_whole or is_part) and all(getattr(each, "_is_hf_initialized", False) for each in owners)


def _is_loaded(parameter: nn.Parameter) -> bool:
    # transformers marks what it has loaded.
    return bool(getattr(parameter, "_is_hf_initialized", False))


def saved_shapes(modules: Mapping[str, nn.Module], head: Optional[Head] = None) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that an adapter saves of the modules that it brings with it.

    Args:
        modules (mapping): the base model's own modules by name, each of which the adapter copies.
        head (Head, optional): the head that it replaces. Default: none.

    Returns:
        dict[str, tuple[int, ...]]: the shapes, by the tensors' names in the model.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in modules.items():
        shapes.update((f"{name}.{key}", tuple(tensor.shape)) for key, tensor in module.state_dict().items())
        shapes.update((f"{name}.{key}", whole_shape(parameter)) for key, parameter in module.named_parameters())
    for key in (f"{head.path}.weight", f"{head.path}.bias") if head else ():
        if head and key in shapes:
            shapes[key] = (head.num_labels, *shapes[key][1:])
    return shapes


def count_saved(modules: Mapping[str, nn.Module], head: Optional[Head] = None) -> int:
    """Number of parameters in the modules that an adapter brings with it.

    Args:
        modules (mapping): the base model's own modules by name.
        head (Head, optional): the head that it replaces. Default: none.

    Returns:
        int: the parameters of all of them together.
    """
    shapes = saved_shapes(modules, head)
    return sum(
        prod(shapes[f"{name}.{key}"]) for name, module in modules.items() for key, _ in module.named_parameters()
    )


def _own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base model's own modules by name, apart from those inside of adapted blocks."""
    modules = dict(model.named_modules())
    inside = tuple(
        f"{name}." for name, module in modules.items() if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
    )
    return {
        name: module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        for name, module in modules.items()
        if not name.startswith(inside)
    }


def _matching(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The base model's own modules that PEFT copies for those names, or endings of names; parts of another one too."""
    return {name: module for name, module in _own_modules(model).items() if name.endswith(tuple(names))}


def _add_names(config: SoftMoAConfig, names: list[str]) -> None:
    if names:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *names]))


def _check_names(model: nn.Module, names: list[str]) -> None:
    """Check that each of the modules to save exists."""
    unknown = [name for name in names if not _matching(model, [name])]
    if unknown:
        parameters = [name for name, _ in model.named_parameters() if name.endswith(tuple(unknown))]
        why = f"; {parameters} are parameters, and PEFT saves whole modules only" if parameters else ""
        raise ValueError(f"`modules_to_save` has names that match no module of the model: {unknown}{why}.")


def _check_saved(saved: dict[str, nn.Module], targets: list[str]) -> None:
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
        if outer is not None:
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
