"""What the fields of a config may be."""

from __future__ import annotations

import math
import reprlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, Optional, Union, get_args

from transformers.activations import ACT2FN

from .dependent_fields import ACTIVATION, CAUSAL_FIELDS, DEPENDENT_FIELDS, NOT_LINEAR, PATTERN_FIELDS, resolve_fields
from .expressions import (
    LARGEST_EXPRESSION,
    LARGEST_EXPRESSIONS,
    LONGEST_EXPRESSION,
    LONGEST_EXPRESSIONS,
    LONGEST_NAME,
    MOST_NAMES,
    MOST_TARGETS,
    are_modules,
    are_names,
    are_paths,
    are_patterns,
    is_expression,
)

Routing = Literal["soft", "dense", "top_k", "expert_choice"]
ExpertType = Literal["bottleneck", "convolution", "conformer"]
Allocation = Literal["uniform", "middle", "late"]
Placement = Literal["attention", "ffn", "both"]
# Names of modules, or one regular expression.
Modules = Optional[Union[list[str], set[str], str]]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

# What is larger is a mistake, or meant to exhaust memory.
LARGEST_SIZE, LARGEST_KERNEL, MOST_INDICES, MOST_CHANNELS = 65_536, 1_023, 1_000, 1_024
LONGEST_CLIP = 60  # seconds; longer ones need a model that is made for them

# The others have parameters of their own, which would be shared by all experts.
ACTIVATIONS: tuple[str, ...] = tuple(sorted(set(ACT2FN) - {"prelu", "xielu"}))


def check_fields(values: Mapping[str, Any]) -> None:
    """Check what a config is made of.

    Args:
        values (mapping): all fields by name.

    Raises:
        ValueError: for a value that is not allowed; it names the field, the value and what is allowed.
    """
    for name, (allowed, is_allowed) in RULES.items():
        _require(values, name, allowed, is_allowed(values[name]))
    for name, (choice, defaults) in DEPENDENT_FIELDS.items():
        left_out = values[name] is None or (False in defaults.values() and values[name] is False)
        wanted = " or ".join(map(repr, defaults))
        allowed = f"left out unless {choice}={wanted} (here {choice}='{values[choice]}')"
        _require(values, name, allowed, values[choice] in defaults or left_out)
    resolved = resolve_fields(values)
    _check_numbers(values, resolved)
    _check_patterns(values, resolved)
    _check_modules(values)
    allowed = "True unless `num_channels` is given"
    _require(values, "channel_embedding", allowed, values["channel_embedding"] or values["num_channels"] is not None)
    slots, kernel = resolved.get("num_slots"), resolved.get("kernel_size", 1)
    if slots is not None and slots <= kernel // 2:
        mixed = "no neighbours" if slots == 1 else f"at most {slots - 1} neighbours on a side"
        trains = "the centre" if slots == 1 else f"the middle {2 * slots - 1} weights"
        warnings.warn(
            f"With routing='soft' and num_slots={slots} a convolution has {mixed} to mix, and only {trains} of its "
            f"kernel of {kernel} trains. Choose more slots, a smaller kernel, or another routing.",
            stacklevel=4,
        )


def _require(values: Mapping[str, Any], name: str, allowed: str, is_allowed: bool) -> None:
    if not is_allowed:
        raise ValueError(f"`{name}` must be {allowed}, got {shorten(values[name])}.")


def shorten(value: Any) -> str:
    """A value as Python writes it, in an error: not all of what is long or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    return short.repr(value)


def _check_numbers(values: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    routing, experts = values["routing"], values["num_experts"]
    if routing in ("top_k", "expert_choice"):
        allowed = f"at least 2 with routing='{routing}'; a single adapter is routing='dense'"
        _require(values, "num_experts", allowed, experts > 1)
    if routing == "soft":
        _require(values, "num_slots", SIZE, is_size(resolved["num_slots"]))
        chunk = values["chunk_size"]
        _require(values, "chunk_size", f"None or {SIZE}", chunk is None or is_size(chunk))
        for name in CAUSAL_FIELDS:
            allowed = "left out with causal=False: whole clips have no order in time"
            _require(values, name, allowed, values["causal"] is not False or not values[name])
        if "patch_grid" in resolved:
            allowed = "False with routing='soft', whose experts read slots"
            _require(values, "patch_grid", allowed, not values["patch_grid"])
    if values["causal"]:
        allowed = (
            "'soft', 'dense' or 'top_k' with causal=True: by expert choice, whether an expert takes a token depends "
        )
        _require(values, "routing", f"{allowed}on the tokens after it", routing != "expert_choice")
        allowed = "False with causal=True: patches in time and frequency are no sequence in time"
        _require(values, "patch_grid", allowed, not values["patch_grid"])
    if routing == "top_k":
        chosen, coef = resolved["top_k"], resolved["router_aux_loss_coef"]
        allowed = f"an integer from 1 to `num_experts`, {experts}"
        _require(values, "top_k", allowed, is_integer(chosen) and 1 <= chosen <= experts)
        _require(values, "router_aux_loss_coef", "a number from 0", _is_number(coef) and coef >= 0)
        allowed = "above 0 with top_k=1: nothing else would train the router"
        _require(values, "router_aux_loss_coef", allowed, chosen > 1 or coef > 0)
    if routing == "expert_choice":
        share = resolved["capacity_factor"]
        allowed = f"a number from 0.001 to `num_experts`, {experts}"
        _require(values, "capacity_factor", allowed, _is_number(share) and 0.001 <= share <= experts)
    if values["expert_type"] == "conformer":
        allowed = f"left out with expert_type='conformer', whose activations are a gate and SiLU, or '{ACTIVATION}'"
        _require(values, "activation", allowed, values["activation"] == ACTIVATION)
        if routing == "soft":
            order = next((name for name in ("causal", *CAUSAL_FIELDS) if values[name]), None)
            allowed = "'bottleneck' or 'convolution' with routing='soft' and order in time (here `{}`): {}"
            _require(values, "expert_type", allowed.format(order, NOT_LINEAR), order is None)
    if "kernel_size" in resolved:
        kernel = resolved["kernel_size"]
        allowed = f"odd and positive, at most {LARGEST_KERNEL}"
        _require(
            values, "kernel_size", allowed, is_integer(kernel) and kernel % 2 == 1 and 0 < kernel <= LARGEST_KERNEL
        )


def _check_patterns(values: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    """Check that single blocks get values that all blocks could have."""
    for field, name in PATTERN_FIELDS.items():
        for pattern, value in (values[field] or {}).items():
            allowed, is_allowed = RULES[name]
            problem = None if is_allowed(value) else f"{allowed}, got {shorten(value)}"
            if problem is None and name == "num_experts":
                try:
                    _check_numbers({**values, name: value}, resolved)
                except ValueError as error:
                    problem = f"a number of experts that fits the other fields, got {value}: {error}"
            if problem is not None:
                raise ValueError(f"`{field}` must give {shorten(pattern)} {problem}")


def _check_modules(values: Mapping[str, Any]) -> None:
    if isinstance(values["target_modules"], str):
        for name in ("layers_to_transform", "layers_pattern"):
            _require(values, name, "None if `target_modules` is a regular expression", values[name] is None)
    if values["layers_to_transform"] is None:
        _require(values, "layers_pattern", "None unless `layers_to_transform` is given", not values["layers_pattern"])
    if values["label_names"] is not None:
        allowed = "the name of the head, if `label_names` is given"
        _require(values, "modules_to_save", allowed, bool(values["modules_to_save"]))


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_size(value: Any) -> bool:
    """Whether a value is an integer from 1 to the largest size that is allowed."""
    return is_integer(value) and 0 < value <= LARGEST_SIZE


def is_length(value: Any) -> bool:
    """Whether a value is a length of clips in seconds that is allowed."""
    return _is_number(value) and 0 < value <= LONGEST_CLIP


def _is_number(value: Any) -> bool:
    return (is_integer(value) and abs(value) < 2**53) or (isinstance(value, float) and math.isfinite(value))


def _are_distinct_names(value: Any) -> bool:
    return isinstance(value, list) and are_names(value) and 0 < len(value) == len(set(value))


def _are_indices(value: Any) -> bool:
    return (
        value is None
        or is_integer(value)
        or (isinstance(value, list) and len(value) <= MOST_INDICES and all(map(is_integer, value)))
    )


def _is_flat(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(each, (str, bool, type(None))) for each in value.values())
    )


SIZE = f"an integer from 1 to {LARGEST_SIZE}"
LENGTH = f"a number of seconds above 0, at most {LONGEST_CLIP}"
Rule = tuple[str, Callable[[Any], bool]]
_TEXT: Rule = ("None or a string", lambda value: value is None or isinstance(value, str))
_SWITCH: Rule = ("True or False", lambda value: isinstance(value, bool))
_NAMES = f"of at most {LONGEST_NAME} letters, digits, dots and dashes"
_SIMPLE = "without recursion, and with braces only around the numbers of repetitions"
_MODULES: Rule = (
    f"None, names, or a regular expression of at most {LONGEST_EXPRESSION:,} characters, {_SIMPLE}; its length times "
    f"all these numbers is at most {LARGEST_EXPRESSION:,}, and there are at most {MOST_TARGETS:,} names of "
    f"{LONGEST_NAME} characters",
    lambda value: is_expression(value) or are_modules(value),
)
_PATTERNS: Rule = (
    f"None, or values by names of blocks, at most {MOST_TARGETS:,} of {LONGEST_NAME} characters, or by regular "
    f"expressions, together at most {LONGEST_EXPRESSIONS:,} characters, {_SIMPLE}; the sum of their lengths, each "
    f"times all these numbers, is at most {LARGEST_EXPRESSIONS:,}",
    are_patterns,
)
# What a field may be whatever the others are, and how the error says so.
RULES: dict[str, Rule] = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), _TEXT),
    "auto_mapping": ("None or a dictionary of strings", _is_flat),
    **dict.fromkeys(
        (
            *("inference_mode", "normalize", "unit_slots", "forgetting", "patch_grid", "channel_embedding"),
            *("train_norms", "init_weights"),
        ),
        _SWITCH,
    ),
    "num_channels": (
        f"None or an integer from 1 to {MOST_CHANNELS:,}",
        lambda value: value is None or (is_size(value) and value <= MOST_CHANNELS),
    ),
    "causal": ("True, False or None", lambda value: value is None or isinstance(value, bool)),
    **{
        name: (f"one of {', '.join(map(str, options))}", options.__contains__)
        for name, options in (
            ("routing", get_args(Routing)),
            ("expert_type", get_args(ExpertType)),
            ("placement", get_args(Placement)),
            ("activation", ACTIVATIONS),
            ("problem_type", (*get_args(ProblemType), None)),
        )
    },
    **dict.fromkeys(("num_experts", "r"), (SIZE, is_size)),
    "dropout": ("a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1),
    "scaling": ("a finite number", _is_number),
    **dict.fromkeys(("target_modules", "exclude_modules"), _MODULES),
    **dict.fromkeys(PATTERN_FIELDS, _PATTERNS),
    # PEFT puts these names into regular expressions.
    "layers_pattern": (f"None, the name of a list of layers, or several, {_NAMES}", are_paths),
    "modules_to_save": (
        f"None or a list of at most {MOST_NAMES} names {_NAMES}",
        lambda value: not isinstance(value, str) and are_paths(value),
    ),
    "layers_to_transform": (f"None, an index or a list of indices, {MOST_INDICES:,} at most", _are_indices),
    "max_length_seconds": (f"None or {LENGTH}", lambda value: value is None or is_length(value)),
    "label_names": ("a list of distinct class names", lambda value: value is None or _are_distinct_names(value)),
}
