"""The hooks that open and close forward passes, and tell them what modules are called with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from .caches import cache_index, find_cache
from .forward_pass import ForwardPasses
from .masks import argument_names, find_mask, find_tokens, past_horizon
from .mixed_batch import run_by_sample
from .one_pass import MODEL, CallKey
from .router_losses import add_router_losses, begin_router_losses


@dataclass
class Sources:
    """What the adapted blocks in a layer read that they are not called with, by the modules' names.

    Args:
        layer (nn.Module): the layer, or the model.
        entries (dict[str, nn.Module]): the modules in which blocks begin that end in another one.
        masks (dict[str, nn.Module]): modules that are called with the mask of the tokens.
        in_time (bool): whether a block in it reads the tokens in order of time.
    """

    layer: nn.Module
    entries: dict[str, nn.Module] = field(default_factory=dict)
    masks: dict[str, nn.Module] = field(default_factory=dict)
    in_time: bool = False


def follow_calls(
    model: nn.Module,
    passes: ForwardPasses,
    adapter_name: str,
    layers: Mapping[str, Sources],
    wrappers: Iterable[ModulesToSaveWrapper],
) -> list[RemovableHandle]:
    """Let the blocks of an adapter know what belongs to each call of a model.

    Args:
        model (nn.Module): the base model, with the adapter.
        passes (ForwardPasses): its passes, which the adapter's blocks read.
        adapter_name (str): name of the adapter.
        layers (mapping): what its blocks read, by the name of the layer around them.
        wrappers (iterable of ModulesToSaveWrapper): the modules that it brings with it, such as heads.

    Returns:
        list[RemovableHandle]: they remove the hooks.
    """
    key = CallKey(adapter_name, MODEL)
    handles = [
        model.register_forward_pre_hook(partial(_enter_model, passes, key), prepend=True),
        model.register_forward_hook(partial(_leave_model, passes, key), with_kwargs=True, always_call=True),
    ]
    for name, sources in layers.items():
        key = CallKey(adapter_name, name)
        if name != MODEL:
            handles += [
                sources.layer.register_forward_pre_hook(partial(_enter_layer, passes, key), with_kwargs=True),
                sources.layer.register_forward_hook(partial(_leave_layer, passes, key), always_call=True),
            ]
        if sources.in_time:
            tell = partial(_tell_cache, passes, key, cache_index(sources.layer, name), argument_names(sources.layer))
            handles.append(sources.layer.register_forward_pre_hook(tell, with_kwargs=True))
        for path, module in sources.entries.items():
            tell = partial(_tell_tokens, passes, key, path)
            handles.append(module.register_forward_pre_hook(tell, with_kwargs=True))
        for path, module in sources.masks.items():
            tell = partial(_tell_mask, passes, key, path, argument_names(module), past_horizon(module))
            handles.append(module.register_forward_pre_hook(tell, with_kwargs=True))
    for wrapper in wrappers:
        handles.append(wrapper.register_forward_hook(partial(_run_by_sample, passes, adapter_name), with_kwargs=True))
    return handles


def _enter_model(passes: ForwardPasses, key: CallKey, model: nn.Module, args: tuple[Any, ...]) -> None:
    if passes.enter(key):
        begin_router_losses(passes, model)


def _leave_model(
    passes: ForwardPasses,
    key: CallKey,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    ended = passes.leave(key)
    return output if ended is None else add_router_losses(passes, ended, kwargs, output)


def _enter_layer(
    passes: ForwardPasses, key: CallKey, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    passes.enter(key)
    if passes.current.mixed_batch is not None:
        passes.current.mixed_batch.check_call(key.layer, find_tokens(args, kwargs))


def _tell_cache(
    passes: ForwardPasses,
    key: CallKey,
    index: int,
    arguments: tuple[str, ...],
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    passes.tell_cache(key, find_cache(index, arguments, args, kwargs))


def _leave_layer(passes: ForwardPasses, key: CallKey, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    cache = passes.find_cache(key)
    if cache is not None:
        cache.keep()
    passes.leave(key)


def _tell_tokens(
    passes: ForwardPasses,
    key: CallKey,
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    passes.tell_tokens(key, name, find_tokens(args, kwargs))


def _tell_mask(
    passes: ForwardPasses,
    key: CallKey,
    name: str,
    arguments: tuple[str, ...],
    past: int,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    passes.tell_mask(key, name, find_mask(arguments, args, kwargs, past))


def _run_by_sample(
    passes: ForwardPasses,
    adapter_name: str,
    wrapper: ModulesToSaveWrapper,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Optional[Any]:
    batch = passes.current.mixed_batch
    # Each adapter has this hook on the wrapper, and the first one's does it.
    if batch is None or wrapper.disable_adapters or adapter_name != next(iter(wrapper.modules_to_save)):
        return output
    return run_by_sample(batch, wrapper, args, kwargs)
