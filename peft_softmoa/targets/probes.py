"""What a model says about itself when parts of it are run on shapes alone.

A copy without weights, on the meta device, costs neither memory nor time, and knows no names.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
from accelerate.hooks import remove_hook_from_submodules
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..calls.masks import find_tokens
from .layers import CONVOLUTIONS, is_linear, is_norm, whole_shape

# Tokens in a probe of a block. Prime and small: it should not happen to be the size of a block's weight.
PROBE_TOKENS = 3

# Modules that read something else than tokens.
NO_TOKENS = (*CONVOLUTIONS, nn.Embedding, nn.EmbeddingBag)


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
    if is_linear(base):
        return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
    parameters = [] if isinstance(base, NO_TOKENS) else base.parameters()
    sizes = Counter(size for parameter in parameters for size in whole_shape(parameter))
    failure: Optional[Exception] = None
    # What is no block at all, or reads something else than tokens, is not taken for one that needs more than tokens.
    refused = type(base).forward is nn.Module.forward or any(isinstance(module, NO_TOKENS) for module in base.modules())
    for width, _ in sizes.most_common():
        try:
            output = _run_on_shapes(_meta_copy(base), width)
        except Exception as error:  # noqa: BLE001 - a foreign block may raise anything; it is chained below
            failure = error
            continue
        hidden = output[0] if isinstance(output, tuple) and output else output
        if isinstance(hidden, Tensor) and hidden.shape[:-1] == (1, PROBE_TOKENS):
            return width, hidden.shape[-1]
        refused = True  # it runs, but does not give tokens
    if hidden_size is not None and hidden_size in sizes and not refused:
        return hidden_size, hidden_size
    raise ValueError(
        f"`target_modules` matches '{name}', a {type(base).__name__}, which cannot be adapted. A target is a linear "
        "layer or a block that, called with tokens (batch, tokens, width) alone, returns as many tokens, as a tensor "
        "or as the first item of a tuple."
    ) from failure


def norms_before(model: nn.Module, widths: Mapping[str, int]) -> dict[str, str]:
    """Find the normalization layer whose output each block reads.

    In a pre-norm model that is a norm of the block's own layer, in a post-norm model it can be the last norm of the
    layer before. The smallest module around the block that shows it is run on tokens.

    Args:
        model (nn.Module): the model; it is neither run nor changed.
        widths (Mapping[str, int]): D of each block, by the block's name.

    Returns:
        dict[str, str]: name of the norm for each block's name.

    Raises:
        ValueError: if no such norm shows.
    """
    found: dict[str, str] = {}
    for block, width in widths.items():
        scope: Optional[str] = block
        failures = []
        while block not in found and scope:
            scope = scope.rpartition(".")[0]
            try:
                _note_norms(model.get_submodule(scope), scope, set(widths), width, found)
            except Exception as error:  # noqa: BLE001 - a foreign module may raise anything; it is chained below
                failures.append(error)
        if block not in found:
            raise ValueError(
                f"`train_norms` does not find a normalization layer whose output the block '{block}' reads, by running "
                "the modules around it on tokens. Set it to False, and name the layers to train in `modules_to_save`."
            ) from next(iter(failures), None)
    return {block: found[block] for block in widths}


def token_probe(model: nn.Module, layer: Optional[str] = None) -> Callable[[Mapping[str, Tensor]], int]:
    """Make a function that tells how many tokens of a sample come to a layer from some inputs of the model.

    Args:
        model (nn.Module): the model; it is neither run nor changed.
        layer (str, optional): name of the layer. Default: those for which the model gives logits.

    Returns:
        Callable[[Mapping[str, Tensor]], int]: takes the model's inputs, of which only the shapes matter, and raises
        what the model raises on the way to the layer; 1 if the model does not come to the layer.
    """
    copied = _meta_copy(model)
    dtype = next((parameter.dtype for parameter in copied.parameters() if parameter.is_floating_point()), None)

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(find_tokens(args, kwargs))

    if layer is not None:
        copied.get_submodule(layer).register_forward_pre_hook(stop, with_kwargs=True)

    def probe(inputs: Mapping[str, Tensor]) -> int:
        shapes = {
            name: torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device="meta")
            for name, value in inputs.items()
        }
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                output = copied(**shapes)
        except _Reached as reached:
            return reached.tokens.shape[1] if reached.tokens.numel() else 0
        return 1 if layer is not None else int(output.logits.shape[1])

    return probe


class _Reached(Exception):
    """Ends the run of a model at a layer."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


def _note_norms(module: nn.Module, name: str, blocks: set[str], width: int, found: dict[str, str]) -> None:
    """Run a module on tokens of a width, and note the norms of blocks in it; what showed before an error counts."""
    copied = _meta_copy(module)
    norms: dict[int, tuple[str, Tensor]] = {}  # by the identity of the output, which is kept so that it stays unique
    for path, child in copied.named_modules():
        full = f"{name}.{path}".strip(".")
        if is_norm(child.original_module if isinstance(child, ModulesToSaveWrapper) else child):
            child.register_forward_hook(
                lambda module, args, output, full=full: norms.update({id(output): (full, output)})
            )
        if full in blocks:

            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], full: str = full) -> None:
                tokens = find_tokens(args, kwargs)
                if id(tokens) in norms:
                    found[full] = norms[id(tokens)][0]

            child.register_forward_pre_hook(note, with_kwargs=True)
    _run_on_shapes(copied, width)


def _meta_copy(module: nn.Module) -> nn.Module:
    """A copy of a module without weights, hooks, adapters and dropout."""
    state = [*module.parameters(), *module.buffers()]
    empty = {tensor: torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta") for tensor in state}
    shapes = {id(tensor): nn.Parameter(copied, requires_grad=False) for tensor, copied in empty.items()}
    copied = copy.deepcopy(module, shapes)
    remove_hook_from_submodules(copied)
    copied.to("meta")  # accelerate's hooks leave the weights that they have offloaded
    for child in copied.modules():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
        if isinstance(child, BaseTunerLayer):
            child._disable_adapters = True
    return copied.eval()


def _run_on_shapes(copied: nn.Module, width: int) -> Any:
    """Output of a copy without weights for tokens of a width."""
    state = [*copied.parameters(), *copied.buffers()]
    dtype = next((tensor.dtype for tensor in state if tensor.is_floating_point()), None)
    tokens = torch.empty(1, PROBE_TOKENS, width, dtype=dtype, device="meta")
    first, *others = inspect.signature(copied.forward).parameters.values()
    # Some layers insist on a mask.
    masks = {other.name: None for other in others if other.default is other.empty and "mask" in other.name}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # some draw numbers to drop layers
        if first.kind is first.KEYWORD_ONLY:
            return copied(hidden_states=tokens, **masks)
        return copied(tokens, **masks)
