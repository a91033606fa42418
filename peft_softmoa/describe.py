"""What an adapter would adapt in a model, before it exists."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .head import count_saved, find_saved
from .mixture import parameter_shapes
from .placement import Target, choose_targets, find_patch_grid, find_targets


@dataclass(frozen=True)
class Description:
    """What an adapter adapts; as a string, a table.

    Args:
        targets (tuple[Target, ...]): the adapted blocks: `name` of the module to whose output a mixture adds, `entry`,
            the module whose tokens it reads, if that is another one, `in_features` D, `out_features` D', and `layer`,
            the layer around it, if there is one.
        parameters_by_block (tuple[int, ...]): parameters of the mixture of each block.
        saved (dict[str, int]): parameters of each module that is trained and saved with the adapter, by its name.
        parameters (int): all parameters that are trained.
    """

    targets: tuple[Target, ...]
    parameters_by_block: tuple[int, ...]
    saved: dict[str, int]
    parameters: int

    @property
    def parameters_by_layer(self) -> dict[str, int]:
        """Parameters of the mixtures in each layer, by the layer's name; of a block in no layer, by its own."""
        total: Counter[str] = Counter()
        for target, parameters in zip(self.targets, self.parameters_by_block):
            total[target.layer or target.name] += parameters
        return dict(total)

    def __str__(self) -> str:
        blocks = [
            (_written(target), target.in_features, target.out_features, parameters)
            for target, parameters in zip(self.targets, self.parameters_by_block)
        ]
        rows = [("adapted block", "reads", "adds", "parameters")]
        rows += [(name, str(reads), str(adds), f"{parameters:,}") for name, reads, adds, parameters in blocks]
        rows += [("in layer", "", "", "")]
        rows += [(name, "", "", f"{parameters:,}") for name, parameters in self.parameters_by_layer.items()]
        if self.saved:
            rows += [("trained whole", "", "", "")]
            rows += [(name, "", "", f"{parameters:,}") for name, parameters in self.saved.items()]
        rows += [("in all", "", "", f"{self.parameters:,}")]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def _written(target: Target) -> str:
    if target.entry is None:
        return target.name
    return f"{target.entry} -> {target.name.removeprefix(f'{target.layer}.')}"


def describe_targets(model: nn.Module, config: Any) -> Description:
    """Tell what `get_peft_model(model, config)` would adapt and train, without building anything.

    Per adapted block of widths D and D', with N experts, P slots each and bottleneck R, the parameters are

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
        Description: the adapted blocks, their sizes and parameters; `print` shows a table.

    Raises:
        ValueError: if the config does not fit the model.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    config = copy.deepcopy(config)
    choose_targets(config, model)
    targets = find_targets(config, model)
    if not targets:
        raise ValueError(f"`target_modules={config.target_modules}` matches no module of {type(model).__name__}.")
    patch_grid = find_patch_grid(BaseTuner.get_model_config(model)) if config.patch_grid else None
    widths = [(target.in_features, target.out_features) for target in targets.values()]
    by_block = tuple(sum(map(prod, shapes.values())) for shapes in parameter_shapes(config, widths, patch_grid))
    modules = find_saved(config, model, targets.values())
    saved = {name: count_saved(model, [module], config.label_names) for name, module in modules.items()}
    return Description(tuple(targets.values()), by_block, saved, sum(by_block) + sum(saved.values()))
