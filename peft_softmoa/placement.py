"""Placement: which modules of which architecture are adapted, and how wide their tokens are.

Nothing else in the package knows the names of models.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from typing import Any, NamedTuple, Optional

import torch
from accelerate.hooks import remove_hook_from_submodules
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


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

# Modules that read something else than tokens.
NO_TOKENS = (nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)


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


def block_widths(name: str, block: nn.Module, hidden_size: Optional[int] = None) -> tuple[int, int]:
    """Widths D and D' of a module that maps tokens `(B, T, D)` to `(B, T, D')`.

    A linear layer says so itself. Any other block is asked: a copy of it without weights is run on shapes alone (the
    meta device), for each size that occurs in its parameters, until tokens come out. What flows through a block counts,
    not what is inside: an attention may begin with a layer narrower than its input. A block that cannot run so, because
    it needs more than tokens or a kernel without shapes, is taken to map the model's hidden size to itself.

    Args:
        name (str): name of the module, for the error.
        block (nn.Module): the module; it is neither run nor changed.
        hidden_size (int, optional): hidden size of the model. Default: unknown.

    Returns:
        tuple[int, int]: D and D'.

    Raises:
        ValueError: if the module does not map tokens to tokens.
    """
    base = block.get_base_layer() if isinstance(block, BaseTunerLayer) else block
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
    parameters = [] if isinstance(base, NO_TOKENS) else base.parameters()
    sizes = Counter(size for parameter in parameters for size in parameter.shape)
    failure: Optional[Exception] = None
    # What is no block at all, or reads something else than tokens, is not taken for one that needs more than tokens.
    refused = type(base).forward is nn.Module.forward or any(isinstance(module, NO_TOKENS) for module in base.modules())
    for width, _ in sizes.most_common():
        try:
            output = _run_on_shapes(base, width)
        except Exception as error:  # noqa: BLE001 - a foreign block may raise anything; it is chained below
            failure = error
            continue
        hidden = output[0] if isinstance(output, tuple) and output else output
        if isinstance(hidden, torch.Tensor) and hidden.shape[:-1] == (1, PROBE_TOKENS):
            return width, hidden.shape[-1]
        refused = True  # it runs, but does not give tokens
    if hidden_size is not None and hidden_size in sizes and not refused:
        return hidden_size, hidden_size
    raise ValueError(
        f"`target_modules` matches '{name}', a {type(base).__name__}, which cannot be adapted. A target is a linear "
        "layer or a block that, called with tokens (batch, tokens, width) alone, returns as many tokens, as a tensor "
        "or as the first item of a tuple."
    ) from failure


def _run_on_shapes(block: nn.Module, width: int) -> Any:
    """Output of a copy of the block, without weights and hooks, for tokens of a width."""
    state = [*block.parameters(), *block.buffers()]
    shapes = {id(tensor): nn.Parameter(tensor.detach().to("meta"), requires_grad=False) for tensor in state}
    ghost = copy.deepcopy(block, shapes)
    remove_hook_from_submodules(ghost)
    ghost.to("meta")  # accelerate's hooks leave the weights that they have offloaded
    for module in ghost.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    dtype = next((tensor.dtype for tensor in state if tensor.is_floating_point()), None)
    tokens = torch.empty(1, PROBE_TOKENS, width, dtype=dtype, device="meta")
    first = next(iter(inspect.signature(ghost.forward).parameters.values()))
    with torch.no_grad():
        return ghost(hidden_states=tokens) if first.kind is first.KEYWORD_ONLY else ghost(tokens)
