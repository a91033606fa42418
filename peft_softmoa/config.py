"""SoftMoAConfig: every choice of a soft mixture of adapters, checked when it is made."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, fields
from typing import Any, Optional, Union

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import nn

from .config_file import LoadedFrom, read_fields
from .dependent_fields import ACTIVATION, mixture_options, resolve_fields
from .fields import Allocation, ExpertType, Modules, Placement, ProblemType, Routing, check_fields
from .registration import SOFTMOA


def _option(default: Any, help: str, **metadata: str) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class SoftMoAConfig(PeftConfig):
    """
    Configuration of a soft mixture of adapters, the counterpart of `LoraConfig`.

    The defaults are the paper's (arXiv 2402.00828): 903,672 parameters on AST-base. `for_budget` chooses `r` for a
    number of parameters, and `count_parameters` tells the number.

    Some fields belong to one choice of another field. There None stands for the default that their description gives,
    which is put in when the adapter is built; elsewhere they are left out, and setting them is an error.

    Raises:
        ValueError: for a value that is not allowed; it names the field, the value and what is allowed.
    """

    routing: Routing = _option(
        "soft",
        "Who reads what. 'soft': each expert reads a few soft averages of all tokens, each token gets a soft average "
        "of all experts. 'dense': every expert reads every token, weighted by a softmax (Dense-MoA); with "
        "num_experts=1 that is a single adapter, without router. 'top_k': the same, but only the best experts of each "
        "token count. 'expert_choice': the same, but each expert takes its best tokens.",
    )
    num_experts: int = _option(7, "N, the number of experts (the paper says adapters) in each mixture.")
    num_slots: Optional[int] = _option(
        None,
        "P, the number of slots per expert; each is one soft average of all tokens. For routing 'soft', there 1 by "
        "default.",
    )
    normalize: bool = _option(
        False,
        "Whether the routing logits use L2-normalised tokens and slot parameters, times one learned scale. For "
        "routing 'soft'.",
    )
    unit_slots: bool = _option(
        False,
        "Whether slot parameters have unit variance and are divided by √D in the logits (cosines are multiplied by it "
        "instead), so that a step of Adam changes the logits √D times less, and routing stays nearer to where it "
        "begins. For routing 'soft'.",
    )
    causal: Optional[bool] = _option(
        None,
        "Whether no token sees the tokens after it: slots are averages of the tokens so far, and convolutions reach "
        "back only. None: in decoders and in encoders made for streaming, and not in others. False is an error there.",
    )
    chunk_size: Optional[int] = _option(
        None,
        "How many tokens see up to the last one of them, if causal=True makes an encoder causal: its lookahead. For "
        "routing 'soft', there by default each token sees itself and those before it.",
    )
    forgetting: bool = _option(
        False,
        "Whether the weights of tokens fall with their age, at a rate that each slot learns, so that endless streams "
        "stay fresh. For routing 'soft' that is causal.",
    )
    top_k: Optional[int] = _option(
        None,
        "How many experts count for each token, their weights renormalised. With 1, nothing but the load-balancing "
        "loss trains the router. For routing 'top_k', there 2 by default.",
    )
    router_aux_loss_coef: Optional[float] = _option(
        None,
        "The weight of the load-balancing loss (arXiv 2101.03961), which in training the model adds to its loss, for "
        "each adapted block. For routing 'top_k', there 0.01 by default.",
    )
    capacity_factor: Optional[float] = _option(
        None,
        "How many tokens of a sample each expert takes, as a multiple of an equal share T / N. For routing "
        "'expert_choice', there 1.0 by default.",
    )
    expert_type: ExpertType = _option(
        "bottleneck",
        "What an expert is. 'bottleneck': down, activation, up. 'convolution': down, activation, depthwise "
        "convolution, activation, up; it runs over neighbouring tokens or, with routing 'soft', over the slots of the "
        "expert, so that it needs more than one slot to mix anything. 'conformer': layer norm, down to twice the "
        "width, gate (GLU), depthwise convolution, normalization of each token, SiLU, up (arXiv 2312.03694); the "
        "convolution as before, but not with routing 'soft' in order of time.",
    )
    kernel_size: Optional[int] = _option(
        None,
        "K, the odd size of the convolution's kernel. For expert type 'convolution', there 3 by default, and "
        "'conformer', there 31.",
    )
    patch_grid: bool = _option(
        False,
        "Whether the convolution runs over the patches in time and frequency instead of the sequence of tokens, with "
        "a kernel K x K or, for expert type 'conformer', 1 x K along time. Class tokens are no neighbours there. For "
        "expert types 'convolution' and 'conformer' with any routing but 'soft', in Audio Spectrogram Transformers.",
    )
    num_channels: Optional[int] = _option(
        None,
        "C, the number of channels of a clip, such as microphones. A mono model reads each as a sample, and their "
        "tokens meet in the mixtures; inputs are (B, C, ...), logits are the mean. Not for models that generate.",
    )
    channel_embedding: bool = _option(
        True,
        "Whether mixtures tell channels apart, by a learned embedding that is added to the tokens they read. False: "
        "they take any number of channels, in any order. Needs num_channels.",
    )
    r: int = _option(6, "R, the width of each expert's bottleneck.")
    r_pattern: Optional[dict[str, int]] = _option(
        None,
        "Other values of r for some blocks, as rank_pattern in LoraConfig: by names or endings of names of adapted "
        "blocks, or of the module in which one ends, or by regular expressions.",
        example='For example, {"layers.0.attention": 2} or {".*layers.(10|11).*": 12}.',
    )
    num_experts_pattern: Optional[dict[str, int]] = _option(None, "Other values of num_experts, in the same form.")
    scaling_pattern: Optional[dict[str, float]] = _option(None, "Other values of scaling, in the same form.")
    placement: Placement = _option(
        "attention",
        "Which blocks of every layer of the audio encoder are adapted when target_modules is not given: the "
        "self-attention, the feed-forward (the last one, if there are two half-steps), or both.",
    )
    activation: str = _option(
        ACTIVATION,
        "The non-linearity of the experts, by its name in transformers. Expert type 'conformer' has its own.",
    )
    dropout: float = _option(0.0, "The dropout probability on an expert's activations, in [0, 1).")
    scaling: float = _option(1.0, "The factor on the mixture's output.")
    init_weights: bool = _option(
        True,
        "True: the new adapter changes nothing until it is trained. False: a random adapter that does, for tests. "
        "Don't change this setting, except if you know exactly what you're doing.",
    )
    target_modules: Modules = _option(
        None,
        "The modules to adapt, as in LoraConfig: names, endings of names or one regular expression. Any linear layer, "
        "or any block that maps tokens (B, T, D) to (B, T, D'). Among names, 'fc1->fc2' is a block that begins in one "
        "module and ends in another. Without it, placement chooses by the model's structure, and the choice is "
        "written here.",
        example="For example, ['attention'], ['fc1->fc2'] or '.*layers.(0|1).mlp'.",
    )
    exclude_modules: Modules = _option(None, "The modules not to adapt, in the same forms.")
    modules_to_save: Optional[list[str]] = _option(
        None, "Modules apart from the adapter that are trained and saved with it, such as ['classifier']."
    )
    train_norms: bool = _option(
        False,
        "Whether the normalization layer in front of each adapted block is trained and saved with the adapter, as in "
        "the paper's recipe. The layers are found by running the model's layers on shapes, and added to "
        "modules_to_save.",
    )
    layers_to_transform: Optional[Union[list[int], int]] = _option(
        None, "The indices of the layers to adapt; all by default."
    )
    layers_pattern: Optional[Union[list[str], str]] = _option(
        None, "The name of the list of layers, if layers_to_transform is given."
    )
    label_names: Optional[list[str]] = _option(
        None,
        "The classes of the classification head in modules_to_save, in the order of its outputs. Where the base "
        "model's head has other classes, the adapter gets a fresh head of its own, and the model's config names these "
        "classes while the adapter is active. So an adapter with 10 classes loads onto a checkpoint with 527, in "
        "pipeline() too. For CTC they are the vocabulary, the blank first.",
    )
    problem_type: Optional[ProblemType] = _option(
        None,
        "What the head in modules_to_save is trained for, as in the model's config, which says it while the adapter is "
        "active: it chooses the loss, and how pipeline() makes scores of logits. Without it, the base model's own, or "
        "what transformers finds from the labels of the first loss; it is written here.",
    )
    max_length_seconds: Optional[float] = _option(
        None,
        "The length to which AST and Whisper, which read clips of one length only, are fitted while the adapter is in "
        "them; longer clips are cut. fit_feature_extractor makes the feature extractor to match.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = SOFTMOA
        self._loaded_from: Optional[LoadedFrom] = None
        if isinstance(self.label_names, tuple):
            self.label_names = list(self.label_names)
        check_fields(vars(self))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))  # PEFT matches names against a set

    def resolved_fields(self) -> dict[str, Any]:
        """The fields that belong to the choices made, by name, with their defaults where they were left out."""
        return resolve_fields(vars(self))

    def mixture_options(self) -> dict[str, Any]:
        """The arguments of `method.Mixture` by name, but for its widths, the patch grid and order in time."""
        return mixture_options(vars(self))

    def choices(self) -> dict[str, Any]:
        """The fields of this class by name, defaults put in, and `modules_to_save` as a set."""
        given = {name: copy.copy(getattr(self, name)) for name in SoftMoAConfig.__annotations__}
        return {**given, **self.resolved_fields(), "modules_to_save": set(self.modules_to_save or ())}

    @classmethod
    def for_budget(
        cls, model: nn.Module, parameters: int, allocate: Allocation = "uniform", **fields: Any
    ) -> SoftMoAConfig:
        """Make the config with the largest `r` that stays within a number of trainable parameters.

        Everything counts that `get_peft_model` makes trainable, so also `modules_to_save` and `train_norms`.

        Args:
            model (nn.Module): the base model; it may be on the meta device.
            parameters (int): the most parameters that may be trained.
            allocate (str): `"uniform"`: the same `r` in all blocks. `"middle"` or `"late"`: most in the middle or the
                last layers, least in those farthest from them, as `r_pattern` then says.
            fields (Any): the other fields of the config, without `r` and `r_pattern`.

        Returns:
            SoftMoAConfig: the config.

        Raises:
            ValueError: if even `r=1` needs more, or a field is not allowed.
        """
        from .targets.budget import allocate_r  # which needs the config's class

        for name in {"r", "r_pattern"} & fields.keys():
            raise ValueError(f"`{name}` must be left out of `for_budget`, which finds it, got {fields[name]!r}.")
        return allocate_r(model, cls(**fields), parameters, allocate)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: Optional[str] = None, **kwargs: Any
    ) -> SoftMoAConfig:
        """Load the config of an adapter. An adapter that is built from it has to have the tensors that lie beside it.

        Args:
            pretrained_model_name_or_path (str): the adapter's folder, or its id on the Hub.
            subfolder (str, optional): where it is in there.
            kwargs (Any): passed on to `huggingface_hub.hf_hub_download`, such as `revision` and `token`.

        Returns:
            SoftMoAConfig: the config.

        Raises:
            ValueError: if the config is damaged or not allowed; it names the file and the field.
        """
        hub, _, _ = cls._split_kwargs(kwargs)  # type: ignore[no-untyped-call]
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (TypeError, ValueError) as error:
            path = os.path.join(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
            raise ValueError(f"'{path}' is not the config of a Soft-MoA adapter: {error}") from error
        config._loaded_from = LoadedFrom(pretrained_model_name_or_path, subfolder, hub, config.choices())
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields of a config from a file; a ValueError says why they are none of this method."""
        return read_fields(path_json_file, (entry.name for entry in fields(cls)))

    @property
    def loaded_from(self) -> Optional[LoadedFrom]:
        """Where the config was loaded from; None if it was not, or has been changed since."""
        loaded = self._loaded_from
        return loaded if loaded is not None and loaded.chose(self.choices()) else None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` to a folder, and the model card if the folder holds the adapter's weights.

        Args:
            save_directory (str): the folder; it is made if it is missing.
            kwargs (Any): passed on to `PeftConfig.save_pretrained`.

        Raises:
            ValueError: if PEFT has just written the adapter's weights as a pickle.
        """
        from .saving import card, pickles  # which a config that is not saved does not need

        pickles.refuse_written(self, save_directory)
        super().save_pretrained(save_directory, **kwargs)
        described = {**self.to_dict(), **self.resolved_fields()}
        # PEFT keeps the class of the model for the file alone.
        described["auto_mapping"] = kwargs.get("auto_mapping_dict") or self.auto_mapping
        card.write_model_card(described, save_directory)


# The only place where a field is explained is the field itself.
SoftMoAConfig.__doc__ = f"{SoftMoAConfig.__doc__}\n    Args:\n" + "\n".join(
    f"        {entry.name} (`{entry.type}`, defaults to `{entry.default!r}`): {entry.metadata['help']}"
    for entry in fields(SoftMoAConfig)
    if entry.name in SoftMoAConfig.__annotations__
)
