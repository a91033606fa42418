"""What an adapter would adapt in a model, and how many parameters it would train, before it exists."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..config import SoftMoAConfig
from ..method.mixture import parameter_shapes
from .architectures import find_patch_grid
from .choice import Target, find_targets
from .clip_length import fitted_length
from .heads import find_head
from .layers import whole_shape
from .placement import choose_targets
from .saved_modules import count_saved, find_saved, saved_shapes
from .sizes import file_bytes
from .table import Row, format_table, group_rows

# Names of the tensors in an adapter's file.
PREFIX, MIXTURE = "base_model.model.", "softmoa_mixture"


@dataclass(frozen=True)
class Description:
    """What an adapter adapts; as a string, a table.

    Args:
        targets (tuple[Target, ...]): the adapted blocks: `name` of the module to whose output a mixture adds, `entry`,
            the module whose tokens it reads, if that is another one, `in_features` D, `out_features` D', `layer`, the
            layer around it, if there is one, and `causal`, whether no token of its mixture sees those after it.
        parameters_by_block (tuple[int, ...]): parameters of the mixture of each block.
        saved (dict[str, int]): parameters of each module that is trained and saved with the adapter, by its name.
        parameters (int): all parameters that are trained.
        model_parameters (int): all parameters of the base model.
        file_bytes (int): size of the adapter's file, `adapter_model.safetensors`, in float32.
    """

    targets: tuple[Target, ...]
    parameters_by_block: tuple[int, ...]
    saved: dict[str, int]
    parameters: int
    model_parameters: int
    file_bytes: int

    @property
    def share(self) -> float:
        """The trained parameters as a share of the base model's."""
        return self.parameters / self.model_parameters

    @property
    def parameters_by_layer(self) -> dict[str, int]:
        """Parameters of the mixtures in each layer, by the layer's name; of a block in no layer, by its own."""
        total: Counter[str] = Counter()
        for target, parameters in zip(self.targets, self.parameters_by_block):
            total[target.layer or target.name] += parameters
        return dict(total)

    def __str__(self) -> str:
        blocks = [
            Row(target.layer, _rest(target), (str(target.in_features), str(target.out_features)), parameters)
            for target, parameters in zip(self.targets, self.parameters_by_block)
        ]
        layers = [Row(name, "", ("", ""), parameters) for name, parameters in self.parameters_by_layer.items()]
        rows = [("adapted block", "reads", "adds", "parameters"), *group_rows(blocks)]
        rows += [("in layer", "", "", ""), *group_rows(layers)]
        if self.saved:
            rows += [("trained whole", "", "", "")]
            rows += [(name, "", "", f"{parameters:,}") for name, parameters in self.saved.items()]
        rows += [("in all", "", "", f"{self.parameters:,}")]
        return (
            f"{format_table(rows)}\n{self.share:.2%} of the model's {self.model_parameters:,} parameters; "
            f"a file of {self.file_bytes:,} bytes"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON.

        Returns:
            dict[str, Any]: the fields by name, and `share`.
        """
        blocks = [
            {**target._asdict(), "parameters": parameters}
            for target, parameters in zip(self.targets, self.parameters_by_block)
        ]
        return {
            "blocks": [{name: value for name, value in block.items() if name != "masks"} for block in blocks],
            "saved": self.saved,
            "parameters": self.parameters,
            "model_parameters": self.model_parameters,
            "share": self.share,
            "file_bytes": self.file_bytes,
        }


def _rest(target: Target) -> str:
    """What follows the layer's name; the whole name of a block that is in no layer."""
    layer = f"{target.layer}" if target.layer else ""
    if target.entry is None:
        return target.name.removeprefix(layer)
    return f"{target.entry.removeprefix(layer)} -> {target.name.removeprefix(f'{layer}.')}"


def mixture_options(model: nn.Module, config: SoftMoAConfig) -> dict[str, Any]:
    """The arguments of `method.Mixture`, but for its widths and order in time, for an adapter of a model.

    Args:
        model (nn.Module): the base model.
        config (SoftMoAConfig): the adapter's config.

    Returns:
        dict[str, Any]: the arguments by name.

    Raises:
        ValueError: if the config asks for a patch grid that is not known.
    """
    options = config.mixture_options()
    if config.patch_grid:
        options["expert_options"]["patch_grid"] = find_patch_grid(BaseTuner.get_model_config(model))
    return options


def mixture_shapes(
    model: nn.Module, config: SoftMoAConfig, targets: Iterable[Target]
) -> list[dict[str, tuple[int, ...]]]:
    """The parameters of the mixtures that an adapter would have.

    Args:
        model (nn.Module): the base model.
        config (SoftMoAConfig): the adapter's config.
        targets (iterable of Target): the adapted blocks.

    Returns:
        list[dict[str, tuple[int, ...]]]: their shapes by name, for each block.
    """
    options = mixture_options(model, config)
    made: dict[tuple[int, int, bool], dict[str, tuple[int, ...]]] = {}
    kinds = [(target.in_features, target.out_features, target.causal) for target in targets]
    for kind in kinds:
        if kind not in made:
            made[kind] = parameter_shapes(*kind[:2], **options, causal=kind[2])
    return [made[kind] for kind in kinds]


def describe_targets(model: nn.Module, config: SoftMoAConfig) -> Description:
    """Tell what `get_peft_model(model, config)` would adapt and train, without building anything.

    Per adapted block of widths D and D', with N experts, P slots each and bottleneck R, the parameters are

        soft:            D·N·P, one more if it normalizes, and N·P more if it forgets
        token-wise:      D·N + N for its router; none if N is 1
        experts:         N·(D·R + R + R·D' + D')
        convolution:     N·R·(K + 1) more, or N·R·(K² + 1) over a patch grid
        channels:        C·D more, for their embedding

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
    with fitted_length(model, config.max_length_seconds):
        return _describe(model, config)


def _describe(model: nn.Module, config: SoftMoAConfig) -> Description:
    choose_targets(config, model)
    targets = find_targets(config, model)
    if not targets:
        raise ValueError(f"`target_modules={config.target_modules}` matches no module of {type(model).__name__}.")
    shapes = mixture_shapes(model, config, targets.values())
    by_block = tuple(sum(map(prod, each.values())) for each in shapes)
    modules = find_saved(config, model, targets.values())
    head = find_head(model, modules, config.label_names)
    saved = {name: count_saved({name: module}, head) for name, module in modules.items()}
    tensors = {
        f"{PREFIX}{target.name}.{MIXTURE}.{name}": shape
        for target, block in zip(targets.values(), shapes)
        for name, shape in block.items()
    }
    tensors |= {f"{PREFIX}{name}": shape for name, shape in saved_shapes(modules, head).items()}
    counters = {
        f"{PREFIX}{name}.{key}": tensor.dtype
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
        if not tensor.is_floating_point() and key not in dict(module.named_parameters())
    }
    return Description(
        targets=tuple(targets.values()),
        parameters_by_block=by_block,
        saved=saved,
        parameters=sum(by_block) + sum(saved.values()),
        model_parameters=count_base_parameters(model),
        file_bytes=file_bytes(tensors, counters),
    )


def count_base_parameters(model: nn.Module) -> int:
    """Number of parameters of a base model, without those of its mixtures and of copies in `modules_to_save`.

    Args:
        model (nn.Module): the base model, with or without adapters.

    Returns:
        int: the number; a tied parameter counts once.
    """
    return sum(
        prod(whole_shape(parameter))
        for name, parameter in model.named_parameters()
        if f".{MIXTURE}." not in name and ".modules_to_save." not in name
    )


def count_parameters(model: nn.Module, config: SoftMoAConfig) -> int:
    """Number of parameters that `get_peft_model(model, config)` makes trainable, without building anything.

    Args:
        model (nn.Module): the base model, or a `PeftModel` of it; nothing in it changes, and it may be on the meta
            device.
        config (SoftMoAConfig): the adapter's config; nothing in it changes.

    Returns:
        int: the number of trainable parameters; `describe_targets` tells where they are, and has the formula.

    Raises:
        ValueError: if the config does not fit the model.
    """
    return describe_targets(model, config).parameters


def largest_r(model: nn.Module, config: SoftMoAConfig, parameters: int) -> int:
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
    counts = [count_parameters(model, replace(config, r=r)) for r in (1, 2)]
    if counts[0] > parameters:
        raise ValueError(
            f"`parameters` must be at least {counts[0]:,}, which is what num_experts={config.num_experts} trains with "
            f"r=1, got {parameters:,}. Give more, or choose fewer experts, slots or blocks."
        )
    # Every further unit of the bottleneck costs the same.
    return 1 + (parameters - counts[0]) // (counts[1] - counts[0])
