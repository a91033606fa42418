"""How many parameters an adapter trains, before it exists."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .head import count_saved, find_saved
from .mixture import build_mixture
from .placement import choose_targets, find_patch_grid, find_targets


def count_parameters(model: nn.Module, config: Any) -> int:
    """Number of parameters that `get_peft_model(model, config)` makes trainable, without building anything.

    Per adapted block of widths D and D', with N experts, P slots each and bottleneck R, that is

        soft:            D·N·P, one more if it normalizes
        token-wise:      D·N + N for its router; none if N is 1
        experts:         N·(D·R + R + R·D' + D')
        convolution:     N·R·(K + 1) more, or N·R·(K² + 1) over a patch grid

    and besides, once, everything in `modules_to_save` and the norms of `train_norms`.

    Args:
        model (nn.Module): the base model, or a `PeftModel` of it; nothing in it changes, and it may be on the meta
            device.
        config (SoftMoAConfig): the adapter's config; nothing in it changes.

    Returns:
        int: the number of trainable parameters.

    Raises:
        ValueError: if the config does not fit the model.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    config = copy.deepcopy(config)
    model_config = BaseTuner.get_model_config(model)
    choose_targets(config, model)
    targets = find_targets(config, model)
    if not targets:
        raise ValueError(f"`target_modules={config.target_modules}` matches no module of {type(model).__name__}.")
    patch_grid = find_patch_grid(model_config) if config.patch_grid else None
    total = 0
    for widths, blocks in Counter((target.in_features, target.out_features) for target in targets.values()).items():
        with torch.device("meta"):
            parts = build_mixture(config, *widths, patch_grid)
        total += blocks * sum(parameter.numel() for part in parts for parameter in part.parameters())
    saved = find_saved(config, model, targets.values())
    return total + count_saved(model, saved.values(), config.label_names)


def largest_r(model: nn.Module, config: Any, parameters: int) -> int:
    """The largest bottleneck with which an adapter stays within a number of trainable parameters.

    Args:
        model (nn.Module): the base model.
        config (SoftMoAConfig): the adapter's config, apart from `r`.
        parameters (int): the most parameters that may be trained.

    Returns:
        int: `r`.

    Raises:
        ValueError: if even `r=1` needs more.
    """
    counts = []
    for r in (1, 2):
        config.r = r
        counts.append(count_parameters(model, config))
    if counts[0] > parameters:
        raise ValueError(
            f"`parameters` must be at least {counts[0]:,}, which is what num_experts={config.num_experts} trains with "
            f"r=1, got {parameters:,}. Give more, or choose fewer experts, slots or blocks."
        )
    # Every further unit of the bottleneck costs the same.
    return 1 + (parameters - counts[0]) // (counts[1] - counts[0])
