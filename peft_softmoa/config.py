"""SoftMoAConfig: every choice of a soft mixture of adapters, checked when it is made."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Optional, Union, get_args

import regex
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES, SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers.activations import ACT2FN

from .budget import largest_r
from .card import write_model_card
from .loading import read_config, read_shapes
from .registration import SOFTMOA

Routing = Literal["soft", "dense", "top_k", "expert_choice"]
ExpertType = Literal["bottleneck", "convolution"]
Placement = Literal["attention", "ffn", "both"]

# What is larger is a mistake, or meant to exhaust memory.
LARGEST, LARGEST_KERNEL, LONGEST_EXPRESSION, MOST_NAMES = 65_536, 1_023, 10_000, 256
SIZE = f"an integer from 1 to {LARGEST}"

# What PEFT adds to `modules_to_save` when it wraps a model for a task.
PEFTS_HEADS = {*SEQ_CLS_HEAD_NAMES, "qa_outputs"}

# These two have parameters of their own, which would be shared by all experts.
ACTIVATIONS: tuple[str, ...] = tuple(sorted(set(ACT2FN) - {"prelu", "xielu"}))


@dataclass
class SoftMoAConfig(PeftConfig):
    """
    Configuration of a soft mixture of adapters, the counterpart of `LoraConfig`.

    The defaults are the paper's (arXiv 2402.00828): 903,672 parameters on AST-base. `for_budget` chooses `r` for a
    number of parameters, and `count_parameters` tells the number.

    Some fields belong to one choice of another field. There they have the default given here; elsewhere they are left
    out, and setting them is an error.

    Args:
        routing (`"soft"`, `"dense"`, `"top_k"` or `"expert_choice"`, defaults to `"soft"`):
            Who reads what. `"soft"`: each expert reads a few soft averages of all tokens, each token gets a soft
            average of all experts. `"dense"`: every expert reads every token, weighted by a softmax (Dense-MoA); with
            `num_experts=1` that is a single adapter, without router. `"top_k"`: the same, but only the best experts of
            each token count. `"expert_choice"`: the same, but each expert takes its best tokens.
        num_experts (`int`, defaults to 7):
            N, the number of experts (the paper says adapters) in each mixture.
        num_slots (`int`, defaults to 1 with `routing="soft"`):
            P, the number of slots per expert. Each slot is one soft average of all tokens.
        normalize (`bool`, defaults to `False`; with `routing="soft"`):
            Whether the routing logits use L2-normalised tokens and slot parameters, times one learned scale.
        top_k (`int`, defaults to 2 with `routing="top_k"`):
            How many experts count for each token, their weights renormalised. With 1, nothing but the load-balancing
            loss trains the router.
        router_aux_loss_coef (`float`, defaults to 0.01 with `routing="top_k"`):
            The weight of the load-balancing loss (arXiv 2101.03961), which in training the model adds to its loss, for
            each adapted block.
        capacity_factor (`float`, defaults to 1.0 with `routing="expert_choice"`):
            How many tokens of a sample each expert takes, as a multiple of an equal share T / N.
        expert_type (`"bottleneck"` or `"convolution"`, defaults to `"bottleneck"`):
            What an expert is. `"bottleneck"`: down, activation, up. `"convolution"`: down, activation, depthwise
            convolution, activation, up; it runs over neighbouring tokens or, with `routing="soft"`, over the slots of
            the expert, so that it needs more than one slot to mix anything.
        kernel_size (`int`, defaults to 3 with `expert_type="convolution"`):
            K, the odd size of the convolution's kernel.
        patch_grid (`bool`, defaults to `False`; with `expert_type="convolution"` and any routing but `"soft"`):
            Whether the convolution runs over the patches in time and frequency, with a kernel K × K, instead of the
            sequence of tokens. Class tokens are no neighbours there. For Audio Spectrogram Transformers.
        r (`int`, defaults to 6):
            R, the width of each expert's bottleneck.
        placement (`"attention"`, `"ffn"` or `"both"`, defaults to `"attention"`):
            Which blocks of every layer of the audio encoder are adapted when `target_modules` is not given: the
            self-attention, the feed-forward (the last one, if there are two half-steps), or both.
        activation (`str`, defaults to `"gelu"`):
            The non-linearity of the experts, by its name in transformers.
        dropout (`float`, defaults to 0.0):
            The dropout probability on an expert's activations, in [0, 1).
        scaling (`float`, defaults to 1.0):
            The factor on the mixture's output.
        init_weights (`bool`, defaults to `True`):
            `True`: the new adapter changes nothing until it is trained. `False`: a random adapter that does, for
            tests.
        target_modules (`list[str]` or `str`, *optional*):
            The modules to adapt, as in `LoraConfig`: names, endings of names or one regular expression. Any linear
            layer, or any block that maps tokens `(B, T, D)` to `(B, T, D')`. Among names, `"fc1->fc2"` is a block that
            begins in one module and ends in another. Without it, `placement` chooses by the model's structure, and the
            choice is written here.
        exclude_modules (`list[str]` or `str`, *optional*):
            The modules not to adapt, in the same forms.
        modules_to_save (`list[str]`, *optional*):
            Modules apart from the adapter that are trained and saved with it, such as `["classifier"]`.
        train_norms (`bool`, defaults to `False`):
            Whether the normalization layer in front of each adapted block is trained and saved with the adapter, as in
            the paper's recipe. The layers are found by running the model's layers on shapes, and added to
            `modules_to_save`.
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

    routing: Routing = field(
        default="soft",
        metadata={
            "help": "Who reads what. 'soft': experts read soft averages of all tokens. 'dense': every expert reads "
            "every token. 'top_k': only the best experts of each token count. 'expert_choice': each expert takes its "
            "best tokens."
        },
    )
    num_experts: int = field(default=7, metadata={"help": "N, the number of experts in each mixture."})
    num_slots: Optional[int] = field(
        default=None,
        metadata={
            "help": "P, the number of slots per expert; each is one soft average of all tokens. 1 with routing 'soft', "
            "which alone has slots."
        },
    )
    normalize: bool = field(
        default=False,
        metadata={
            "help": "Whether the routing logits use L2-normalised tokens and slot parameters, times one learned scale. "
            "For routing 'soft'."
        },
    )
    top_k: Optional[int] = field(
        default=None, metadata={"help": "How many experts count for each token: 2 with routing 'top_k'."}
    )
    router_aux_loss_coef: Optional[float] = field(
        default=None, metadata={"help": "The weight of the load-balancing loss: 0.01 with routing 'top_k'."}
    )
    capacity_factor: Optional[float] = field(
        default=None,
        metadata={
            "help": "How many tokens each expert takes, as a multiple of an equal share: 1.0 with routing "
            "'expert_choice'."
        },
    )
    expert_type: ExpertType = field(
        default="bottleneck",
        metadata={
            "help": "What an expert is: 'bottleneck', or 'convolution' with a depthwise convolution in the bottleneck."
        },
    )
    kernel_size: Optional[int] = field(
        default=None, metadata={"help": "K, the odd size of the kernel: 3 with expert type 'convolution'."}
    )
    patch_grid: bool = field(
        default=False,
        metadata={
            "help": "Whether the convolution runs over the patches in time and frequency instead of the sequence."
        },
    )
    r: int = field(default=6, metadata={"help": "R, the width of each expert's bottleneck."})
    placement: Placement = field(
        default="attention",
        metadata={
            "help": "Which sub-blocks of every layer are adapted when target_modules is not given: "
            "'attention', 'ffn' or 'both'."
        },
    )
    activation: str = field(
        default="gelu",
        metadata={"help": "The non-linearity of the experts, by its name in transformers."},
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
            "block that maps (B, T, D) to (B, T, D'). Without it, placement chooses by the model's structure.",
            "example": "For example, ['attention'], ['fc1->fc2'] or '.*layers.(0|1).mlp'.",
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
    train_norms: bool = field(
        default=False,
        metadata={
            "help": "Whether the normalization layer in front of each adapted block is trained and saved with it."
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
        # What it was when it was loaded, and the shapes of the adapter's tensors.
        self._loaded: tuple[Any, Optional[dict[str, tuple[int, ...]]]] = (None, None)
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            _check(self, name, "None or a string", lambda value: value is None or isinstance(value, str))
        _check(self, "auto_mapping", "None or a dictionary", lambda value: value is None or isinstance(value, dict))
        _check(self, "inference_mode", "True or False", lambda value: isinstance(value, bool))
        for name, choices in (("routing", Routing), ("expert_type", ExpertType), ("placement", Placement)):
            options = get_args(choices)
            _check(self, name, f"one of {', '.join(options)}", options.__contains__)
        for name in ("num_experts", "r"):
            _check(self, name, SIZE, _is_size)
        self._check_dependent_fields()
        _check(self, "activation", f"one of {', '.join(ACTIVATIONS)}", lambda value: value in ACTIVATIONS)
        _check(self, "dropout", "a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1)
        _check(self, "scaling", "a finite number", _is_number)
        for name in ("normalize", "patch_grid", "train_norms", "init_weights"):
            _check(self, name, "True or False", lambda value: isinstance(value, bool))
        for name in ("target_modules", "exclude_modules"):
            allowed = f"None, names, or a regular expression of at most {LONGEST_EXPRESSION:,} characters"
            _check(self, name, allowed, lambda value: _is_expression(value) or _are_names(value))
            # PEFT matches names against a set.
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        # PEFT puts it into a regular expression.
        _check(self, "layers_pattern", "None, the name of a list of layers, or several", _are_paths)
        # PEFT puts these names into regular expressions, too.
        allowed = f"None or a list of at most {MOST_NAMES} names"
        _check(self, "modules_to_save", allowed, lambda value: not isinstance(value, str) and _are_paths(value))
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

    def _check_dependent_fields(self) -> None:
        """Give the fields that belong to the choices made their defaults, and refuse the others."""
        experts = self.num_experts
        self._belongs("num_slots", "routing", "soft", 1)
        self._belongs("normalize", "routing", "soft", False)
        self._belongs("top_k", "routing", "top_k", 2)
        self._belongs("router_aux_loss_coef", "routing", "top_k", 0.01)
        self._belongs("capacity_factor", "routing", "expert_choice", 1.0)
        self._belongs("kernel_size", "expert_type", "convolution", 3)
        self._belongs("patch_grid", "expert_type", "convolution", False)
        if self.routing in ("top_k", "expert_choice"):
            allowed = f"at least 2 with routing='{self.routing}'; a single adapter is routing='dense'"
            _check(self, "num_experts", allowed, lambda value: value > 1)
        if self.routing == "soft":
            _check(self, "num_slots", SIZE, _is_size)
            _check(self, "patch_grid", "False with routing='soft', whose experts read slots", lambda value: not value)
        if self.routing == "top_k":
            allowed = f"an integer from 1 to `num_experts`, {experts}"
            _check(self, "top_k", allowed, lambda value: _is_int(value) and 1 <= value <= experts)
            _check(self, "router_aux_loss_coef", "a number from 0", lambda value: _is_number(value) and value >= 0)
            if self.top_k == 1:
                allowed = "above 0 with top_k=1: nothing else would train the router"
                _check(self, "router_aux_loss_coef", allowed, lambda value: value > 0)
        if self.routing == "expert_choice":
            allowed = f"a number from 0.001 to `num_experts`, {experts}"
            _check(self, "capacity_factor", allowed, lambda value: _is_number(value) and 0.001 <= value <= experts)
        if self.expert_type == "convolution":
            allowed = f"odd and positive, at most {LARGEST_KERNEL}"
            _check(
                self, "kernel_size", allowed, lambda value: _is_int(value) and value % 2 and 0 < value <= LARGEST_KERNEL
            )
            if self.num_slots == 1 and self.kernel_size != 1:
                warnings.warn(
                    "With routing='soft' and num_slots=1 a convolution has no neighbours to mix, and only the centre "
                    f"of its kernel of {self.kernel_size} trains. Choose more slots, or another routing.",
                    stacklevel=4,
                )

    def _belongs(self, name: str, choice: str, wanted: str, default: Any) -> None:
        """A field that belongs to one choice has its default there, and is left out elsewhere."""
        chosen = getattr(self, choice)
        if chosen != wanted:
            allowed = f"left out unless {choice}='{wanted}' (here {choice}='{chosen}')"
            _check(self, name, allowed, lambda value: value is None or (value is False and default is False))
        elif getattr(self, name) is None:
            setattr(self, name, default)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: Optional[str] = None, **kwargs: Any
    ) -> SoftMoAConfig:
        """Load the config of an adapter, and the names and shapes of its tensors, so that they can be checked.

        Args:
            pretrained_model_name_or_path (`str`): the adapter's folder, or its id on the Hub.
            subfolder (`str`, *optional*): where it is in there.
            kwargs: passed on to `huggingface_hub.hf_hub_download`, such as `revision` and `token`.

        Returns:
            SoftMoAConfig: the config.

        Raises:
            ValueError: if the config or the file of tensors is damaged or not allowed; it names the file and the
                field. Pickled tensors are not read unless the environment variable `SOFTMOA_ALLOW_PICKLE` is set.
        """
        hub, _, _ = cls._split_kwargs(kwargs)
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (TypeError, ValueError) as error:
            path = os.path.join(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
            raise ValueError(f"'{path}' is not the config of a Soft-MoA adapter: {error}") from error
        config._loaded = config.choices(), read_shapes(pretrained_model_name_or_path, subfolder, **hub)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields of a config from a file.

        Args:
            path_json_file (`str`): the file.
            kwargs: not used; PEFT's method has them.

        Returns:
            dict: the fields.

        Raises:
            ValueError: if it is no config of this method.
        """
        return read_config(path_json_file, [field.name for field in fields(cls)])

    def loaded_shapes(self) -> Optional[dict[str, tuple[int, ...]]]:
        """The tensors of the adapter that this config was loaded with.

        Returns:
            dict[str, tuple[int, ...]], optional: the shape of each tensor by its name; None if the config was not
            loaded with weights, or has been changed since.
        """
        loaded, shapes = self._loaded
        if loaded is None:
            return None
        # PEFT adds names of heads when a model is wrapped for a task.
        before, now = (
            {**each, "modules_to_save": each["modules_to_save"] - PEFTS_HEADS} for each in (loaded, self.choices())
        )
        return shapes if before == now else None

    def choices(self) -> dict[str, Any]:
        """What is chosen here.

        Returns:
            dict[str, Any]: the fields of this class, `modules_to_save` as a set.
        """
        fields = {name: copy.copy(getattr(self, name)) for name in SoftMoAConfig.__annotations__}
        return {**fields, "modules_to_save": set(self.modules_to_save or ())}

    @classmethod
    def for_budget(cls, model: nn.Module, parameters: int, **fields: Any) -> SoftMoAConfig:
        """Make the config with the largest `r` that stays within a number of trainable parameters.

        Everything counts that `get_peft_model` makes trainable, so also `modules_to_save` and `train_norms`.

        Args:
            model (nn.Module): the base model; it may be on the meta device.
            parameters (int): the most parameters that may be trained.
            fields: the other fields of the config, without `r`.

        Returns:
            SoftMoAConfig: the config.

        Raises:
            ValueError: if even `r=1` needs more, or a field is not allowed.
        """
        if not (_is_int(parameters) and parameters > 0):
            raise ValueError(f"`parameters` must be a positive integer, got {parameters!r}.")
        if "r" in fields:
            raise ValueError(f"`r` must be left out of `for_budget`, which finds it, got {fields['r']!r}.")
        return cls(**fields, r=largest_r(model, cls(**fields), parameters))

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
    return (_is_int(value) and abs(value) < 2**53) or (isinstance(value, float) and math.isfinite(value))


def _are_names(value: Any) -> bool:
    return value is None or (
        isinstance(value, (list, tuple, set)) and all(isinstance(name, str) and name for name in value)
    )


def _is_size(value: Any) -> bool:
    return _is_int(value) and 0 < value <= LARGEST


def _are_paths(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    path = regex.compile(r"[\w-]+(\.[\w-]+)*")
    return _are_names(names) and len(names or ()) <= MOST_NAMES and all(map(path.fullmatch, names or ()))


def _is_expression(value: Any) -> bool:
    # PEFT has one string that stands for no module.
    if not isinstance(value, str) or len(value) > LONGEST_EXPRESSION or value == DUMMY_TARGET_MODULES:
        return False
    try:
        regex.compile(value)
    except (regex.error, RecursionError):
        return False
    return True


def _are_distinct_names(value: Any) -> bool:
    return isinstance(value, list) and _are_names(value) and 0 < len(value) == len(set(value))


def _are_indices(value: Any) -> bool:
    return value is None or _is_int(value) or (isinstance(value, list) and all(_is_int(index) for index in value))
