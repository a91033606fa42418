"""Placement: which modules of which architecture are adapted, and how wide their tokens are.

Nothing else in the package knows the names of models.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call


class Architecture(NamedTuple):
    """Where the sub-blocks of one architecture are."""

    layers: str  # name of the list of layers
    attention: str  # name of the self-attention block in a layer
    ffn: str  # name of the feed-forward block in a layer


ARCHITECTURES = {
    "audio-spectrogram-transformer": Architecture(layers="layers", attention="attention", ffn="mlp"),
}

# Tokens in a probe of a block. Prime and small: it should not happen to be the size of a block's weight.
PROBE_TOKENS = 3


def find_architecture(model_type: str) -> Architecture:
    """Look up where the sub-blocks of an architecture are.

    Args:
        model_type (str): `model_type` of the model's config.

    Returns:
        Architecture: the names of its parts.

    Raises:
        ValueError: if no placement knows the architecture.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"No `placement` is known for models of type '{model_type}', only for: {', '.join(sorted(ARCHITECTURES))}. "
            "Name the modules to adapt in `target_modules`, for example target_modules=['attention']."
        )
    return ARCHITECTURES[model_type]


def placed_blocks(architecture: Architecture, placement: str) -> set[str]:
    """Names of the blocks that a placement adapts in every layer.

    Args:
        architecture (Architecture): where the sub-blocks are.
        placement (str): `"attention"`, `"ffn"` or `"both"`.

    Returns:
        set[str]: endings of module names, as for `target_modules`.
    """
    if placement == "both":
        return {architecture.attention, architecture.ffn}
    return {getattr(architecture, placement)}


def block_widths(name: str, block: nn.Module) -> tuple[int, int]:
    """Widths D and D' of a module that maps tokens `(B, T, D)` to `(B, T, D')`.

    A linear layer says so itself. Any other block is asked: it is run on shapes alone (the meta device, no weights and
    no arithmetic), for each size that occurs in its parameters, until tokens come out. What flows through a block
    counts, not what is inside: an attention may begin with a layer narrower than its input.

    Args:
        name (str): name of the module, for the error.
        block (nn.Module): the module; it is not changed.

    Returns:
        tuple[int, int]: D and D'.

    Raises:
        ValueError: if the module does not map tokens to tokens.
    """
    base = block.get_base_layer() if isinstance(block, BaseTunerLayer) else block
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
    is_leaf = isinstance(base, (nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag))
    sizes = Counter(size for parameter in base.parameters() for size in parameter.shape)
    for width, _ in [] if is_leaf else sizes.most_common():
        out_width = _flow(base, width)
        if out_width is not None:
            return width, out_width
    raise ValueError(
        f"`target_modules` matches '{name}', a {type(base).__name__}, which cannot be adapted. A target is a linear "
        "layer or a block that, called with tokens (batch, tokens, width) alone, returns as many tokens, as a tensor "
        "or as the first item of a tuple."
    )


def _flow(block: nn.Module, width: int) -> Optional[int]:
    """Width of the tokens that come out if tokens of this width go in; None if the block does not take them."""
    state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), None)
    tokens = torch.empty(1, PROBE_TOKENS, width, dtype=dtype, device="meta")
    try:
        with torch.no_grad():
            output = functional_call(block, {key: tensor.to("meta") for key, tensor in state.items()}, (tokens,))
    except Exception:  # noqa: BLE001 - whatever a foreign block raises, it does not take such tokens
        return None
    hidden = output[0] if isinstance(output, tuple) and output else output
    if isinstance(hidden, torch.Tensor) and hidden.shape[:-1] == (1, PROBE_TOKENS):
        return hidden.shape[-1]
    return None
