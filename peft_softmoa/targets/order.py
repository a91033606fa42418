"""Order in time: in which blocks no token may see the tokens after it."""

from __future__ import annotations

from typing import Optional

from torch import nn

from ..calls.masks import argument_names
from ..config import SoftMoAConfig
from ..dependent_fields import CAUSAL_FIELDS, NOT_LINEAR
from ..method.choices import CAUSAL_ROUTERS, EXPERTS
from .architectures import architecture_of, looks_causal, parts_around
from .layers import find_module, without_adapters


def is_causal(config: SoftMoAConfig, model: nn.Module, name: str, layer: Optional[str]) -> bool:
    """Whether the mixture of a block must be causal: as the config says or, if it says nothing, as the layer is.

    Args:
        config (SoftMoAConfig): the config.
        model (nn.Module): the model.
        name (str): name of the block.
        layer (str, optional): name of the innermost layer around it; None: it is in none.

    Returns:
        bool: whether it is causal.

    Raises:
        ValueError: if the config asks for what would let tokens see those after them, or for an order that is none.
    """
    parts = parts_around(model, name)
    known = architecture_of(parts)
    follows = known.causal
    if layer is None:
        follows = False
    elif follows is None:
        follows = looks_causal(find_module(model, layer), parts)
    if follows:
        _check_causal_layer(config, name)
        if known.padding_mask in argument_names(without_adapters(find_module(model, name))):
            raise ValueError(
                f"'{name}' is called with a mask that is true for padding, where others are true for real tokens. "
                f"Adapt what is around it, '{name.rpartition('.')[0]}', or a linear layer in it."
            )
        return True
    if not config.causal:
        given = next((field for field in CAUSAL_FIELDS if getattr(config, field)), None)
        if given is not None:
            raise ValueError(
                f"`{given}={getattr(config, given)}` is for order in time, and '{name}' is in a layer whose tokens see "
                "whole clips. Set `causal=True`, which makes its mixture causal, or leave it out."
            )
        return False
    if not known.in_time:
        raise ValueError(
            f"`causal=True` needs tokens in order of time, but those of '{name}' are patches in time and frequency. "
            "Leave it out."
        )
    return True


def _check_causal_layer(config: SoftMoAConfig, name: str) -> None:
    where = f"'{name}' is in a causal or streaming layer, whose tokens must not see the ones after them"
    if config.causal is False:
        raise ValueError(f"`causal=False` lets tokens see whole clips, but {where}. Leave it out.")
    if config.routing not in CAUSAL_ROUTERS:
        works = ", ".join(map(repr, CAUSAL_ROUTERS))
        raise ValueError(
            f"`routing='{config.routing}'` lets each expert choose among all tokens of a sample, so that whether it "
            f"takes one depends on the tokens after it, but {where}. There, routing may be {works}."
        )
    if config.routing == "soft" and not EXPERTS[config.expert_type].begins_linearly:
        raise ValueError(
            f"`expert_type='{config.expert_type}'` does not go with routing='soft' here, as {NOT_LINEAR}: {where}. "
            "Take routing='dense' or 'top_k', or another type."
        )
    if config.chunk_size is not None and config.chunk_size > 1:
        raise ValueError(
            f"`chunk_size={config.chunk_size}` lets tokens see up to the end of their chunk, but {where}. Leave it "
            "out: each token then reads itself and those before it."
        )
    if config.patch_grid:
        raise ValueError(
            f"`patch_grid=True` convolves in time and frequency, but {where}. Leave it out: the convolution then runs "
            "over the tokens before each token."
        )
