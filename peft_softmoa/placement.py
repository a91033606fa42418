"""Placement: which modules of a model are adapted, and how their tokens lie.

Nothing else in the package knows the names of models.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Optional

import regex
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers import PreTrainedModel

from .experts import PatchGrid
from .masking import argument_names, takes_mask
from .mixture import EXPERTS, ROUTERS, mixes_tokens
from .shapes import block_widths
from .structure import Block, Layer, find_layers, find_module, is_linear, is_repeated, own_module

# Between the two modules of a block that begins in one and ends in another, as in target_modules=["fc1->fc2"].
ARROW = "->"

# Seconds that matching may take: a regular expression with one name, and everything with all names.
LONGEST_MATCH, LONGEST_SEARCH = 0.2, 1.0

# Arguments of models that generate token after token.
CACHES = {"past_key_values", "cache_params", "use_cache"}


def _ast_grid(config: dict[str, Any]) -> PatchGrid:
    def patches(size: str, stride: str) -> int:
        return (config[size] - config["patch_size"]) // config[stride] + 1

    # A class and a distillation token, then the patches, all times of the lowest frequency first.
    height, width = patches("num_mel_bins", "frequency_stride"), patches("max_length", "time_stride")
    return PatchGrid(2, height, width, config["patch_size"], config["frequency_stride"], config["time_stride"])


class Architecture(NamedTuple):
    """What the structure of a model does not show."""

    patch_grid: Optional[Callable[[dict[str, Any]], PatchGrid]] = None  # from the model's config to its grid
    takes_audio: Optional[bool] = None  # by default what its class says
    causal: Optional[bool] = None  # whether tokens see few or none of those after them; by default what it looks like


# By the `model_type` of the config. All that is not here goes by structure.
ARCHITECTURES = {
    # Only the config says how the patches lie.
    "audio-spectrogram-transformer": Architecture(patch_grid=_ast_grid),
    # These encoders are made to run while the audio comes in, but only their masks show it.
    "gemma3n_audio": Architecture(causal=True),
    "gemma4_audio": Architecture(causal=True),
    "moonshine_streaming_encoder": Architecture(causal=True),
    "nemotron_asr_streaming_encoder": Architecture(causal=True),
    # Its attention is flagged as causal, but sees whole clips.
    "phi4_multimodal_audio": Architecture(causal=False),
    # Its encoder is T5's, which takes the names of ids for its embedded spectrograms.
    "pop2piano": Architecture(takes_audio=True),
}


class Target(NamedTuple):
    """A block that is adapted."""

    name: str  # the module to whose output the mixture adds
    entry: Optional[str]  # the module whose tokens it reads; None: its own
    in_features: int  # D
    out_features: int  # D'
    layer: Optional[str] = None  # the layer around it
    masks: tuple[str, ...] = ()  # modules that are called with its tokens' mask, if it is not


def find_patch_grid(model_config: dict[str, Any]) -> PatchGrid:
    """Look up how a model's tokens lie in time and frequency.

    Args:
        model_config (dict): the model's config.

    Returns:
        PatchGrid: the grid.

    Raises:
        ValueError: if the architecture is not known to have one.
    """
    grid = known_patch_grid(model_config)
    if grid is None:
        known = ", ".join(sorted(name for name, architecture in ARCHITECTURES.items() if architecture.patch_grid))
        raise ValueError(
            f"`patch_grid` is known for models of type {known}, not for '{model_config.get('model_type', 'unknown')}'. "
            "Set it to False: the convolution then runs over the sequence of tokens."
        )
    return grid


def known_patch_grid(model_config: dict[str, Any]) -> Optional[PatchGrid]:
    """How a model's tokens lie in time and frequency, if its architecture is known to have a grid.

    Args:
        model_config (dict): the model's config.

    Returns:
        PatchGrid, optional: the grid.
    """
    make = ARCHITECTURES.get(model_config.get("model_type", "unknown"), Architecture()).patch_grid
    return None if make is None else make(model_config)


def choose_targets(config: Any, model: nn.Module) -> None:
    """Let `placement` choose the target modules, if they are not given.

    In the layers of the audio encoder that is the self-attention, the last feed-forward, or both.

    Args:
        config (SoftMoAConfig): the choice is written into it.
        model (nn.Module): the model.

    Raises:
        ValueError: if the model has no audio encoder, or its layers not what `placement` wants.
    """
    if config.target_modules is not None:
        return
    layers = _select_layers(config, find_encoder(model))
    names = set()
    if config.placement in ("attention", "both"):
        names |= _shortest_names([layer.attentions[0] for layer in layers], model)
    if config.placement in ("ffn", "both"):
        missing = next((layer.name for layer in layers if not layer.ffns), None)
        if missing is not None:
            raise ValueError(
                f"`placement='{config.placement}'` looks for a feed-forward block in every layer, linear layers that "
                f"widen tokens and narrow them again, but finds none in '{missing}'.{_describe_stacks(model)}"
            )
        names |= _shortest_names([layer.ffns[-1] for layer in layers], model)
    config.target_modules = names


def find_encoder(model: nn.Module) -> list[Layer]:
    """Find the layers of a model's audio encoder.

    Its layers have one attention, which is not a decoder's, and belong to a part of the model that takes audio. If
    several stacks are left, it is the one with most layers, together with those of the same class in that part.

    Args:
        model (nn.Module): the model.

    Returns:
        list[Layer]: the layers.

    Raises:
        ValueError: if there is none.
    """
    found: dict[tuple, list[Layer]] = {}
    for layers in find_layers(model):
        parts = _parts_around(model, layers[0].name)
        if len(layers[0].attentions) == 1 and _take_audio(parts):
            classes = frozenset(type(find_module(model, layer.name)) for layer in layers)
            found.setdefault((id(parts[-1]) if parts else None, classes), []).extend(layers)
    if not found:
        raise ValueError(
            "`placement` looks for the audio encoder of a model: a list of layers, in a part of the model that takes "
            f"audio, with a self-attention in each and no cross-attention. {type(model).__name__} has none."
            f"{_describe_stacks(model)}"
        )
    return max(found.values(), key=len)


def _parts_around(model: nn.Module, name: str) -> list[PreTrainedModel]:
    """The pretrained models around a module, outermost first: the whole one, and in it an encoder or a decoder."""
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and (not path or name.startswith(f"{path}."))
    ]


def _architecture_of(parts: list[PreTrainedModel]) -> Architecture:
    """What is known of the innermost of some parts."""
    return ARCHITECTURES.get(parts[-1].config.model_type, Architecture()) if parts else Architecture()


def _take_audio(parts: list[PreTrainedModel]) -> bool:
    """Whether all parts around a module take audio."""
    known = _architecture_of(parts).takes_audio
    return all(_takes_audio(part, part is parts[-1]) for part in parts) if known is None else known


def _takes_audio(part: PreTrainedModel, is_innermost: bool) -> bool:
    # Where its class says nothing, this is the default.
    says = part.input_modalities != PreTrainedModel.input_modalities
    if says and not (is_innermost and "audio" in part.input_modalities):
        return "audio" in part.input_modalities
    names = argument_names(part)
    if is_innermost and "input_ids" in names and not CACHES.isdisjoint(names):
        return False  # a decoder that generates, also from codes of audio
    # An inner part may have inherited what holds for another one.
    takes_other = any(name.endswith(("input_ids", "pixel_values")) for name in names)
    return not takes_other or any(name.endswith(("input_features", "input_values")) for name in names)


def _select_layers(config: Any, layers: list[Layer]) -> list[Layer]:
    """The layers of `layers_to_transform`."""
    if config.layers_to_transform is None:
        return layers
    if not config.layers_pattern:
        config.layers_pattern = layers[0].name.split(".")[-2]
    probe = copy.copy(config)
    probe.exclude_modules = probe.modules_to_save = None
    probe.target_modules = {"probe"}
    selected = [layer for layer in layers if check_target_module_exists(probe, f"{layer.name}.probe")]
    if not selected:
        raise ValueError(
            f"`layers_to_transform={config.layers_to_transform}` and `layers_pattern={config.layers_pattern!r}` match "
            f"none of the layers '{layers[0].name}' to '{layers[-1].name}'."
        )
    return selected


def _shortest_names(blocks: list[Block], model: nn.Module) -> set[str]:
    """The shortest endings of names that match some blocks and nothing else."""
    entries = {block.exit: block.entry for block in blocks}
    others = {name.replace(".base_layer", "") for name, _ in model.named_modules()} - entries.keys() - {""}
    shortest = _find_minimal_target_modules(set(entries), others)
    names = set()
    for exit, entry in entries.items():
        ending = next(ending for ending in shortest if f".{exit}".endswith(f".{ending}"))
        if entry == exit:
            names.add(ending)
            continue
        # The names of both modules from where they part, and what the ending has before that.
        parts, entry_parts = exit.split("."), entry.split(".")
        common = next((i for i, (a, b) in enumerate(zip(parts, entry_parts)) if a != b), len(entry_parts))
        common = min(common, len(parts) - 1, len(entry_parts) - 1, len(parts) - len(ending.split(".")))
        names.add(".".join(entry_parts[common:]) + ARROW + ".".join(parts[common:]))
    return names


def is_target(config: Any, name: str) -> Any:
    """Whether an adapter adapts a module: PEFT's own rule, applied to the end of a block that has two.

    Args:
        config (SoftMoAConfig): says which.
        name (str): name of the module.

    Returns:
        What `peft.tuners.tuners_utils.check_target_module_exists` returns.
    """
    config = copy.copy(config)
    for field in ("target_modules", "exclude_modules"):
        names = getattr(config, field)
        if isinstance(names, set):
            setattr(config, field, {each.rpartition(ARROW)[2] for each in names})
        elif isinstance(names, str):
            setattr(config, field, {name} if _matches(field, names, name) else set())
    return check_target_module_exists(config, name)


def _matches(field: str, expression: str, name: str) -> bool:
    """Whether a name matches a regular expression, which must not take forever to tell."""
    try:
        return regex.fullmatch(expression, name, timeout=LONGEST_MATCH) is not None
    except TimeoutError as error:
        raise ValueError(
            f"`{field}={expression!r}` takes too long to match against '{name}': repetitions within repetitions, as in "
            "'(a+)+', multiply. Write it without them, or list names."
        ) from error


def _find_entry(config: Any, name: str) -> Optional[str]:
    """The module where a matched block begins, if it is another one than where it ends."""
    entries = set()
    for target in config.target_modules if isinstance(config.target_modules, set) else ():
        entry, _, exit = target.rpartition(ARROW)
        if f".{name}".endswith(f".{exit}"):
            entries.add(name[: len(name) - len(exit)] + entry if entry else name)
    if len(entries) > 1:
        raise ValueError(f"`target_modules` matches '{name}' as the end of several blocks: {sorted(entries)}.")
    return next(iter(entries - {name}), None)


def find_targets(config: Any, model: nn.Module) -> dict[str, Target]:
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
    names = []
    started = time.thread_time()
    for name in modules:
        if name and not name.startswith(inside_adapted) and is_target(config, name):
            names.append(name)
        if time.thread_time() - started > LONGEST_SEARCH:
            raise ValueError(
                f"`target_modules` or `exclude_modules` take more than {LONGEST_SEARCH} seconds to match against the "
                f"{len(modules)} modules of the model. Give fewer names, or a simpler expression."
            )
    targets = {}
    for name in names:
        inner = next((other for other in adapted if f"{other}.".startswith(f"{name}.")), None)
        if inner is not None and "softmoa_experts" not in getattr(modules[name], "adapter_layer_names", ()):
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


def _make_target(config: Any, model: nn.Module, name: str, entry: Optional[str], layers: list[Layer]) -> Target:
    layer = next((layer for layer in reversed(layers) if name.startswith(f"{layer.name}.")), None)
    if _crosses(layers, name):
        raise ValueError(
            f"`target_modules` matches '{name}', which belongs to the cross-attention of a decoder. Its queries and "
            "keys are different sequences, so it is never adapted: name it in `exclude_modules`."
        )
    in_features, out_features = _find_widths(model, name, entry, layer)
    around = _elements_around(model, name)
    if around:
        _check_order_in_time(config, model, name, around[-1])
    elif takes_mask(model) and (mixes_tokens(config) or config.router_aux_loss_coef):
        warnings.warn(
            f"'{name}' is in no layer that could be called with a mask: for it, padded tokens count as real ones. Name "
            "it in `exclude_modules`, use routing='dense', or give clips of one length.",
            stacklevel=2,
        )
    if layer is not None:
        return Target(name, entry, in_features, out_features, layer.name, _find_masks(model, layer, entry or name))
    # What is no layer as `find_layers` knows it may still be called with a mask.
    masks = [each for each in around if _takes_mask(model, each)][:1]
    return Target(name, entry, in_features, out_features, next(iter(masks or around), None), tuple(masks))


def _elements_around(model: nn.Module, name: str) -> list[str]:
    """The elements of lists that a module is in, or is, innermost first."""
    parts = name.split(".")
    found = []
    for length in range(len(parts), 0, -1):
        *outer, index = parts[:length]
        if index.isdigit() and isinstance(find_module(model, ".".join(outer)) if outer else model, nn.ModuleList):
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


def _takes_mask(model: nn.Module, name: str) -> bool:
    return takes_mask(find_module(model, name))


def _find_masks(model: nn.Module, layer: Layer, entry: str) -> tuple[str, ...]:
    """The modules around or before a block that are called with the mask of its tokens."""
    attention = layer.attentions[0].module
    if f"{entry}.".startswith(f"{attention}."):
        sources = [attention]
    elif _takes_mask(model, layer.name):
        sources = [layer.name, attention]
    else:
        sources = []  # the layer's own mask, if it makes one, is for windows of the attention only
    return tuple(source for source in sources if _takes_mask(model, source))


def _check_order_in_time(config: Any, model: nn.Module, name: str, layer: str) -> None:
    """Check that no token would see the ones after it where the model does not let it."""
    parts = _parts_around(model, name)
    known = _architecture_of(parts).causal
    if not (_looks_causal(find_module(model, layer), parts) if known is None else known):
        return
    for field, table in (("routing", ROUTERS), ("expert_type", EXPERTS)):
        choice = getattr(config, field)
        if table[choice][0].mixes_tokens:
            works = [option for option, (kind, _) in table.items() if not kind.mixes_tokens]
            raise ValueError(
                f"`{field}='{choice}'` mixes all tokens of a sample, but '{name}' is in a causal or streaming layer, "
                "whose tokens must not see the ones after them. "
                f"There, {field} may be {' or '.join(map(repr, works))}."
            )


def _looks_causal(layer: nn.Module, parts: list[PreTrainedModel]) -> bool:
    """Whether a layer says that it is causal or, if it says nothing, belongs to a part that keeps a cache."""
    # Some decoders have only the second flag.
    flags = [getattr(module, flag, None) for module in layer.modules() for flag in ("is_causal", "is_decoder")]
    keeps_cache = bool(parts) and not CACHES.isdisjoint(argument_names(parts[-1]))
    return True in flags or (keeps_cache and False not in flags)


def _describe_stacks(model: nn.Module) -> str:
    """The lists of layers in a model and what is in each layer, for errors."""
    found = []
    for name, module in model.named_modules():
        if is_repeated(module):
            layer = own_module(next(iter(module.children())))
            parts = ", ".join(path for path, _ in layer.named_children())
            found.append(f"\n  {name}: {len(list(module.children()))} x {type(layer).__name__} ({parts})")
    what = f" Its repeated blocks are:{''.join(found)}\n" if found else " It has no repeated blocks. "
    return (
        f"{what}Name the modules to adapt in `target_modules`, for example target_modules=['self_attn'], or "
        f"['fc1{ARROW}fc2'] for a block that begins in one module and ends in another."
    )
