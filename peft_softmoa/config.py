"""SoftMoAConfig: every choice of a soft mixture of adapters, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union, get_args

from peft import PeftConfig
from transformers.activations import ACT2FN

from .card import write_model_card
from .registration import SOFTMOA

Placement = Literal["attention", "ffn", "both"]
PLACEMENTS = get_args(Placement)

# These two have parameters of their own, which would be shared by all experts.
ACTIVATIONS = tuple(sorted(set(ACT2FN) - {"prelu", "xielu"}))


@dataclass
class SoftMoAConfig(PeftConfig):
    """
    Configuration of a soft mixture of adapters, the counterpart of `LoraConfig`.

    Per adapted block of width D, the adapter trains `D·S + N·(D·R + R + R·D' + D')` parameters, with N experts,
    P slots each, S = N·P slots, bottleneck R and output width D'. The defaults are the paper's
    (arXiv 2402.00828): 903,672 parameters on AST-base.

    Args:
        num_experts (`int`, defaults to 7):
            N, the number of experts (the paper says adapters) in each mixture.
        num_slots (`int`, defaults to 1):
            P, the number of slots per expert. Each slot is one soft average of all tokens.
        r (`int`, defaults to 6):
            R, the width of each expert's bottleneck.
        placement (`"attention"`, `"ffn"` or `"both"`, defaults to `"attention"`):
            Which sub-blocks of every layer are adapted when `target_modules` is not given.
        normalize (`bool`, defaults to `False`):
            Whether the routing logits use L2-normalised tokens and slot parameters, times one learned scale.
        activation (`str`, defaults to `"gelu"`):
            The non-linearity between an expert's two projections, by its name in transformers.
        dropout (`float`, defaults to 0.0):
            The dropout probability on an expert's activations, in [0, 1).
        scaling (`float`, defaults to 1.0):
            The factor on the mixture's output.
        init_weights (`bool`, defaults to `True`):
            `True`: the new adapter changes nothing until it is trained. `False`: a random adapter that does, for
            tests.
        target_modules (`list[str]` or `str`, *optional*):
            The modules to adapt, as in `LoraConfig`: names, endings of names or one regular expression. Any linear
            layer, or any block that maps tokens `(B, T, D)` to `(B, T, D')`. Without it, `placement` chooses by the
            model's architecture, and the choice is written here.
        exclude_modules (`list[str]` or `str`, *optional*):
            The modules not to adapt, in the same forms.
        modules_to_save (`list[str]`, *optional*):
            Modules apart from the adapter that are trained and saved with it, such as `["classifier"]`.
        layers_to_transform (`list[int]` or `int`, *optional*):
            The indices of the layers to adapt; all by default.
        layers_pattern (`list[str]` or `str`, *optional*):
            The name of the list of layers, if `layers_to_transform` is given.
        label_names (`list[str]`, *optional*):
            The classes of the classification head in `modules_to_save`, in the order of its outputs. Where the base
            model's head has other classes, the adapter gets a fresh head of its own, and the model's config names
            these classes while the adapter is active in a `PeftModel`. So an adapter with 10 classes loads onto a
            checkpoint with 527, in `pipeline()` too.

    Raises:
        ValueError: for a value that is not allowed; it names the field, the value and what is allowed.
    """

    num_experts: int = field(default=7, metadata={"help": "N, the number of experts in each mixture."})
    num_slots: int = field(
        default=1, metadata={"help": "P, the number of slots per expert; each is one soft average of all tokens."}
    )
    r: int = field(default=6, metadata={"help": "R, the width of each expert's bottleneck."})
    placement: Placement = field(
        default="attention",
        metadata={
            "help": "Which sub-blocks of every layer are adapted when target_modules is not given: "
            "'attention', 'ffn' or 'both'."
        },
    )
    normalize: bool = field(
        default=False,
        metadata={
            "help": "Whether the routing logits use L2-normalised tokens and slot parameters, times one learned scale."
        },
    )
    activation: str = field(
        default="gelu",
        metadata={"help": "The non-linearity between an expert's projections, by its name in transformers."},
    )
    dropout: float = field(
        default=0.0, metadata={"help": "The dropout probability on an expert's activations, in [0, 1)."}
    )
    scaling: float = field(default=1.0, metadata={"help": "The factor on the mixture's output."})
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True: the new adapter changes nothing until it is trained. False: a random adapter that does, "
            "for tests. Don't change this setting, except if you know exactly what you're doing."
        },
    )
    target_modules: Optional[Union[list[str], set[str], str]] = field(
        default=None,
        metadata={
            "help": "The modules to adapt: names, endings of names or one regular expression. Any linear layer or any "
            "block that maps (B, T, D) to (B, T, D'). Without it, placement chooses by the architecture.",
            "example": "For example, ['attention'] or '.*layers.(0|1).mlp'.",
        },
    )
    exclude_modules: Optional[Union[list[str], set[str], str]] = field(
        default=None, metadata={"help": "The modules not to adapt: names, endings or one regular expression."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Modules apart from the adapter that are trained and saved with it. For example, a fresh "
            "classification head has to be trained: ['classifier']."
        },
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "The indices of the layers to adapt; all by default."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "The name of the list of layers, if layers_to_transform is given."},
    )
    label_names: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "The classes of the classification head in modules_to_save, in the order of its outputs. Where "
            "the base model's head has other classes, the adapter gets a fresh head of its own."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SOFTMOA
        for name in ("num_experts", "num_slots", "r"):
            _check(self, name, "a positive integer", lambda value: _is_int(value) and value > 0)
        _check(self, "placement", f"one of {', '.join(PLACEMENTS)}", lambda value: value in PLACEMENTS)
        _check(self, "activation", f"one of {', '.join(ACTIVATIONS)}", lambda value: value in ACTIVATIONS)
        _check(self, "dropout", "a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1)
        _check(self, "scaling", "a finite number", _is_number)
        for name in ("normalize", "init_weights"):
            _check(self, name, "True or False", lambda value: isinstance(value, bool))
        # PEFT matches names against a set.
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            _check(self, name, "None, a string or names", lambda value: isinstance(value, str) or _are_names(value))
        _check(self, "modules_to_save", "None or a list of names", _are_names)
        _check(self, "layers_to_transform", "None, an index or a list of indices", _are_indices)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                _check(self, name, "None if `target_modules` is a regular expression", lambda value: value is None)
        if self.layers_to_transform is None:
            _check(self, "layers_pattern", "None unless `layers_to_transform` is given", lambda value: not value)
        if self.label_names is not None:
            if isinstance(self.label_names, tuple):
                self.label_names = list(self.label_names)
            _check(self, "label_names", "a list of distinct class names", _are_distinct_names)
            _check(self, "modules_to_save", "the name of the head, if `label_names` is given", bool)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` to a folder, and the model card if the folder holds the adapter's weights.

        Args:
            save_directory (`str`): the folder; it is made if it is missing.
            kwargs: passed on to `PeftConfig.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        write_model_card(self.to_dict(), save_directory)


def _check(config: SoftMoAConfig, name: str, allowed: str, is_allowed: Callable[[Any], bool]) -> None:
    value = getattr(config, name)
    if not is_allowed(value):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value))


def _are_distinct_names(value: Any) -> bool:
    return isinstance(value, list) and _are_names(value) and 0 < len(value) == len(set(value))


def _are_indices(value: Any) -> bool:
    return value is None or _is_int(value) or (isinstance(value, list) and all(_is_int(index) for index in value))
