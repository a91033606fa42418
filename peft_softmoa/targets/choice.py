"""The choice of blocks: which modules a config matches, and whether each can be adapted."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterable
from itertools import takewhile
from typing import Any, NamedTuple, Optional

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn

from ..calls.masks import takes_mask
from ..calls.one_pass import MODEL
from ..config import SoftMoAConfig
from ..method.choices import mixes_tokens
from .layers import Layer, find_layers, find_module, is_linear, is_repeated
from .order import is_causal
from .patterns import LONGEST_EXPRESSION_SEARCH, matches
from .probes import block_widths

# Between the two modules of a block that begins in one and ends in another, as in target_modules=["fc1->fc2"].
ARROW = "->"

# Seconds that matching names with all names may take.
LONGEST_SEARCH = 1.0


class Target(NamedTuple):
    """A block that is adapted."""

    name: str  # the module to whose output the mixture adds
    entry: Optional[str]  # the module whose tokens it reads; None: its own
    in_features: int  # D
    out_features: int  # D'
    layer: Optional[str] = None  # the layer around it
    masks: tuple[str, ...] = ()  # modules that are called with its tokens' mask, if it is not
    causal: bool = False  # whether no token of its mixture sees those after it

    @property
    def scope(self) -> str:
        """The layer around it or, if it is in none, what is around both its modules; `MODEL` for all of the model."""
        if self.layer is not None or self.entry is None:
            return self.layer or MODEL
        parts = zip(self.name.split(".")[:-1], self.entry.split(".")[:-1])
        return ".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], parts))


def is_target(config: SoftMoAConfig, name: str) -> Any:
    """Whether an adapter adapts a module: PEFT's `check_target_module_exists`, for the end of a block that has two."""
    config = copy.copy(config)
    for field in ("target_modules", "exclude_modules"):
        names = getattr(config, field)
        if isinstance(names, set):
            setattr(config, field, {each.rpartition(ARROW)[2] for each in names})
        elif isinstance(names, str):
            setattr(config, field, {name} if matches(field, names, name) else set())
    return check_target_module_exists(config, name)


def _find_entry(config: SoftMoAConfig, name: str) -> Optional[str]:
    """The module where a matched block begins, if it is another one than where it ends."""
    entries = set()
    for target in config.target_modules if isinstance(config.target_modules, set) else ():
        entry, _, exit = target.rpartition(ARROW)
        if f".{name}".endswith(f".{exit}"):
            entries.add(name[: len(name) - len(exit)] + entry if entry else name)
    if len(entries) > 1:
        raise ValueError(f"`target_modules` matches '{name}' as the end of several blocks: {sorted(entries)}.")
    return next(iter(entries - {name}), None)


def find_matches(config: SoftMoAConfig, names: list[str]) -> list[str]:
    """Find the names that a config matches.

    Args:
        config (SoftMoAConfig): its `target_modules` are given.
        names (list[str]): names of modules.

    Returns:
        list[str]: those of modules that would be adapted.

    Raises:
        ValueError: if it takes too long.
    """
    by_expression = isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str)
    longest = LONGEST_EXPRESSION_SEARCH if by_expression else LONGEST_SEARCH
    found = []
    started = time.thread_time()
    for name in names:
        if is_target(config, name):
            found.append(name)
        if time.thread_time() - started > longest:
            raise ValueError(
                f"`target_modules` or `exclude_modules` take more than {longest} seconds to match against "
                f"{len(names)} names of modules. Give fewer names, or a simpler expression."
            )
    return found


def is_matched_by_peft(config: SoftMoAConfig, model: nn.Module) -> bool:
    """Whether PEFT matches a config's expression itself, without limits: when it saves a model with text embeddings."""
    parts = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return isinstance(config.target_modules, str) and not parts.isdisjoint(EMBEDDING_LAYER_NAMES)


def name_targets(config: SoftMoAConfig, model: nn.Module, targets: Iterable[str]) -> None:
    """Write the names of the adapted modules in the place of an expression that PEFT would match.

    Args:
        config (SoftMoAConfig): the config; nothing happens if it has no such expression, or that matches nothing.
        model (nn.Module): the model.
        targets (iterable of str): the modules that it matches.

    Raises:
        ValueError: if the names would match other modules, too.
    """
    names = set(targets)
    if not (names and is_matched_by_peft(config, model)):
        return
    expression, config.target_modules = config.target_modules, names
    others = [name for name, _ in model.named_modules() if name not in names and is_target(config, name)]
    if others:
        name = next(name for name in names if others[0].endswith(f".{name}"))
        raise ValueError(
            f"`target_modules={expression!r}` matches '{name}', but not '{others[0]}', whose name ends alike. Name the "
            "latter in `exclude_modules`, or let the expression match both."
        )


def find_targets(config: SoftMoAConfig, model: nn.Module) -> dict[str, Target]:
    """Find the modules that an adapter adapts, and check that it can adapt all of them.

    Args:
        config (SoftMoAConfig): says which; `"all-linear"` is replaced in it by the names.
        model (nn.Module): the model; its own adapters may be on the same modules.

    Returns:
        dict[str, Target]: the blocks by the name of the module where they end.

    Raises:
        ValueError: if one of them cannot be adapted.
    """
    layers = [layer for stack in find_layers(model) for layer in stack]
    if config.target_modules == "all-linear":
        _maybe_include_all_linear_layers(config, model)
        config.target_modules = {name for name in config.target_modules if not _crosses(layers, name)}
    modules = dict(model.named_modules())
    adapted = [name for name, module in modules.items() if isinstance(module, BaseTunerLayer)]
    inside_adapted = tuple(f"{name}." for name in adapted)
    names = find_matches(config, [name for name in modules if name and not name.startswith(inside_adapted)])
    if config.loaded_from is None:
        _check_all_match(config, [name.replace(".base_layer", "") for name in modules], names)
    targets = {}
    for name in names:
        inner = next((other for other in adapted if f"{other}.".startswith(f"{name}.")), None)
        if inner is not None and "softmoa_mixture" not in getattr(modules[name], "adapter_layer_names", ()):
            raise ValueError(
                f"`target_modules` matches '{name}', but '{inner}' in it has an adapter already, whose weights "
                "would get other names. Adapt the same modules, modules apart from it, or a block from its first "
                f"linear layer to its last, such as ['q_proj{ARROW}o_proj'] for an attention."
            )
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(
                f"`target_modules` matches '{name}' and also '{outer}', which contains it. Write it so that it "
                "matches one of them, or name the other in `exclude_modules`."
            )
        targets[name] = _make_target(config, model, name, _find_entry(config, name), layers)
    return targets


def _check_all_match(config: SoftMoAConfig, modules: list[str], targets: list[str]) -> None:
    """Check that each name, expression and index of a config stands for something: what does not is a mistake."""
    for field in ("target_modules", "exclude_modules"):
        given = getattr(config, field)
        if isinstance(given, str):
            unknown = [] if any(matches(field, given, name) for name in modules) else [given]
        else:
            endings = {each: f".{each.rpartition(ARROW)[2]}" for each in given or ()}
            unknown = [each for each, end in endings.items() if not any(f".{name}".endswith(end) for name in modules)]
        if unknown and (targets or field == "exclude_modules"):  # PEFT has an error of its own if nothing is adapted
            raise ValueError(f"`{field}` has names that match no module of the model: {sorted(unknown)}.")
    indices = config.layers_to_transform
    for index in [indices] if isinstance(indices, int) else indices or ():
        only = copy.copy(config)
        only.layers_to_transform = [index]
        if targets and not any(is_target(only, name) for name in targets):
            raise ValueError(f"`layers_to_transform` has the index {index}, but no layer with it is adapted.")


def _make_target(
    config: SoftMoAConfig, model: nn.Module, name: str, entry: Optional[str], layers: list[Layer]
) -> Target:
    layer = next((layer for layer in reversed(layers) if name.startswith(f"{layer.name}.")), None)
    if _crosses(layers, name):
        raise ValueError(
            f"`target_modules` matches '{name}', which belongs to the cross-attention of a decoder. Its queries and "
            "keys are different sequences, so it is never adapted: name it in `exclude_modules`."
        )
    in_features, out_features = _find_widths(model, name, entry, layer)
    around = _elements_around(model, name)
    causal = is_causal(config, model, name, around[-1] if around else None)
    if (
        not around
        and takes_mask(model)
        and (mixes_tokens(config.routing, config.expert_type) or config.resolved_fields().get("router_aux_loss_coef"))
    ):
        warnings.warn(
            f"'{name}' is in no layer that could be called with a mask: for it, padded tokens count as real ones. Name "
            "it in `exclude_modules`, use routing='dense', or give clips of one length.",
            stacklevel=2,
        )
    if layer is not None:
        masks = _find_masks(model, layer, entry or name)
        return Target(name, entry, in_features, out_features, layer.name, masks, causal)
    # What is no layer as `find_layers` knows it may still be called with a mask.
    masks = tuple([each for each in around if takes_mask(find_module(model, each))][:1])
    return Target(name, entry, in_features, out_features, next(iter(masks or tuple(around)), None), masks, causal)


def unmatched_target(config: SoftMoAConfig, model: nn.Module, name: str) -> Target:
    """A module that PEFT adapts for its name in a state dict, though the config does not match it.

    Args:
        config (SoftMoAConfig): the config.
        model (nn.Module): the model.
        name (str): name of the module.

    Returns:
        Target: the module as a block of its own.

    Raises:
        ValueError: if the config asks for what is impossible there.
    """
    around = _elements_around(model, name)
    causal = is_causal(config, model, name, around[-1] if around else None)
    return Target(name, None, *block_widths(name, find_module(model, name)), causal=causal)


def _elements_around(model: nn.Module, name: str) -> list[str]:
    """The elements of lists that a module is in, or is, innermost first."""
    parts = name.split(".")
    found = []
    for length in range(len(parts), 0, -1):
        *outer, index = parts[:length]
        around = find_module(model, ".".join(outer))
        if index.isdigit() and (isinstance(around, nn.ModuleList) or is_repeated(around)):
            found.append(".".join(parts[:length]))
    return found


def _find_widths(model: nn.Module, name: str, entry: Optional[str], layer: Optional[Layer]) -> tuple[int, int]:
    """Widths D and D' of a block: those that its layer shows, or those of the modules where it begins and ends."""
    if layer is not None:
        for block in (*layer.attentions, *layer.ffns):
            is_whole = (entry, name) == (None, block.module) and not is_linear(find_module(model, name))
            if is_whole or (entry or name, name) == (block.entry, block.exit):
                return block.reads, layer.width
    try:
        begin, end = find_module(model, entry or name), find_module(model, name)
    except AttributeError as error:
        raise ValueError(
            f"`target_modules` has a block from '{entry}' to '{name}', but no '{entry}'. Write both names from the "
            f"same module on, as in ['fc1{ARROW}fc2'] or ['layers.0.fc1{ARROW}layers.0.fc2']."
        ) from error
    width = layer.width if layer else getattr(getattr(model, "config", None), "hidden_size", None)
    reads, writes = block_widths(entry or name, begin, width)
    return reads, writes if entry is None else block_widths(name, end, width)[1]


def _crosses(layers: Iterable[Layer], name: str) -> bool:
    """Whether a module is a cross-attention or a part of one."""
    return any(f"{name}.".startswith(f"{attention.module}.") for layer in layers for attention in layer.attentions[1:])


def _find_masks(model: nn.Module, layer: Layer, entry: str) -> tuple[str, ...]:
    """The modules around or before a block that are called with the mask of its tokens."""
    attention = layer.attentions[0].module
    if f"{entry}.".startswith(f"{attention}."):
        sources = [attention]
    elif takes_mask(find_module(model, layer.name)):
        sources = [layer.name, attention]
    else:
        sources = []  # the layer's own mask, if it makes one, is for windows of the attention only
    return tuple(source for source in sources if takes_mask(find_module(model, source)))
