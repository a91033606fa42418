"""The hooks that an adapter needs on its base model."""

from __future__ import annotations

import re
from typing import Any, Optional

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .calls.checkpointing import require_input_gradients
from .calls.folding import average_logits, follow_channels
from .calls.hooks import Sources, follow_calls
from .calls.statistics import freeze_statistics
from .config import SoftMoAConfig
from .layer import SoftMoALayer, is_adapted
from .targets.architectures import channel_reader
from .targets.clip_length import hold_length
from .targets.heads import keep_problem_type
from .targets.layers import find_module


def add_hooks(model: nn.Module, adapter_name: str, config: SoftMoAConfig) -> None:
    """Add the hooks of an adapter; its blocks keep what removes them.

    Args:
        model (nn.Module): the base model, with the adapter.
        adapter_name (str): name of the adapter.
        config (SoftMoAConfig): its config.
    """
    blocks = [module for module in model.modules() if is_adapted(module) and adapter_name in module.softmoa_targets]
    if not blocks:
        return
    layers: dict[str, Sources] = {}
    encoders: dict[Optional[str], SoftMoALayer] = {}
    for block in blocks:
        target = block.softmoa_targets[adapter_name]
        # The outermost list around the block.
        encoders.setdefault(target.layer and re.split(r"\.?\b\d+\b", target.layer)[0], block)
        if target.layer is not None or target.entry is not None:
            sources = layers.setdefault(target.scope, Sources(find_module(model, target.scope)))
            mixture: Any = block.softmoa_mixture[adapter_name]
            sources.in_time = sources.in_time or mixture.reads_in_time
            if target.entry is not None:
                sources.entries[target.entry] = find_module(model, target.entry)
            if not block.takes_mask:
                sources.masks.update({name: find_module(model, name) for name in target.masks})
    for path, block in encoders.items():
        if path is not None:
            encoder = model.get_submodule(path.rpartition(".")[0])
            hooked = [encoder, *model.get_submodule(path).children()] if path else [encoder]
            block.softmoa_hooks[adapter_name] += map(require_input_gradients, hooked)
    wrappers = [
        module
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    ]
    handles = blocks[0].softmoa_hooks[adapter_name]
    passes, reader = blocks[0].forward_passes, None
    if config.num_channels is not None:
        num_channels = config.num_channels if config.channel_embedding else None
        reader = channel_reader(model, adapter_name, num_channels)
        handles += follow_channels(model, passes, blocks[0], reader)
    handles += follow_calls(model, passes, adapter_name, layers, wrappers)
    if reader is not None:
        handles += average_logits(model, passes, reader)
    handles += freeze_statistics(model)
    handles += hold_length(model, adapter_name)
    if wrappers:
        handles += keep_problem_type(model, blocks[0], adapter_name, config)
