"""The fast form of soft routing, which `routing.py` writes plainly, with backward passes of its own.

What is as long as the tokens and as wide as the model should be read and written as few times as possible: that, not
arithmetic, is the cost of a mixture with few slots. The weights lie as `(B, S, T)`, so that every product runs along
the tokens as they are in memory. There are no forward-mode derivatives. Where no gradient is recorded, these are plain
operations, for whatever traces them.

Letters of all shapes: B batch, T tokens, D hidden size of the input and D' of the output, N experts, P slots per
expert, S = N·P slots.
"""

from __future__ import annotations

import contextlib
from typing import Any, Optional

import torch
from torch import Tensor

from .routing import in_full_precision, soft_weights


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    """A context in which operations on a type of device run in the dtype of their inputs."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def read_slots(tokens: Tensor, slots: Tensor, mask: Optional[Tensor] = None) -> tuple[Tensor, Tensor, Tensor]:
    """What the slots read by soft routing, and its weights.

        dispatch, combine = soft_routing(x, Φ, mask)
        X̃ = dispatchᵀ x                              (B, S, D)

    The tokens get their gradient, through the logits and through the average, in one product. What is kept for it are
    the tokens as they are given, in half precision too, and the weights. Call it without autocast.

    Args:
        tokens (Tensor): x, `(B, T, D)`.
        slots (Tensor): Φ, `(D, S)`.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

    Returns:
        tuple[Tensor, Tensor, Tensor]: X̃, `(B, S, D)`; dispatch and combine weights, `(B, S, T)` each; in float32, or
        in float64 if the tokens are.

    Source: arXiv 2402.00828; arXiv 2308.00951, section 2.1.
    """
    run = _ReadSlots.apply if torch.is_grad_enabled() else _ReadSlots.forward
    return run(tokens, slots, mask)


def add_slots(hidden: Tensor, combine: Tensor, outputs: Tensor) -> Tensor:
    """Add to each token its average of the expert outputs.

        output = F(x) + combine Ỹ                    (B, T, D')

    Args:
        hidden (Tensor): F(x), `(B, T, D')`.
        combine (Tensor): `(B, S, T)`.
        outputs (Tensor): Ỹ, the expert outputs, `(B, S, D')`.

    Returns:
        Tensor: output, `(B, T, D')`; the product and its gradients are in the dtype of `hidden`.

    Source: arXiv 2402.00828; arXiv 2308.00951, section 2.1.
    """
    run = _AddSlots.apply if torch.is_grad_enabled() else _AddSlots.forward
    return run(hidden, combine.to(hidden.dtype), outputs.to(hidden.dtype))


class _ReadSlots(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, slots: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = in_full_precision(tokens)
        dispatch, combine = soft_weights(torch.bmm(_rows(slots, tokens), tokens.mT), mask)
        return torch.bmm(dispatch, tokens), dispatch, combine

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        tokens, slots, _ = inputs
        _, dispatch, combine = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tokens, slots, dispatch, combine)

    @staticmethod
    def backward(
        ctx: Any, read_grad: Optional[Tensor], dispatch_grad: Optional[Tensor], combine_grad: Optional[Tensor]
    ) -> tuple[Optional[Tensor], Optional[Tensor], None]:
        given, slots, dispatch, combine = ctx.saved_tensors
        tokens_grad = slots_grad = None
        with without_autocast(given.device.type):
            tokens = given.to(dispatch.dtype)
            if read_grad is None:
                read_grad = tokens.new_zeros(*dispatch.shape[:2], tokens.shape[2])
            through_read = torch.bmm(read_grad, tokens.mT)
            dispatch_grad = through_read if dispatch_grad is None else dispatch_grad + through_read
            logits_grad = _softmax_backward(dispatch_grad, dispatch, dim=2)
            if combine_grad is not None:
                logits_grad = logits_grad + _softmax_backward(combine_grad, combine, dim=1)
            if ctx.needs_input_grad[0]:
                weights, rows = (dispatch, logits_grad), (read_grad, _rows(slots, tokens))
                tokens_grad = torch.bmm(torch.cat(weights, dim=1).mT, torch.cat(rows, dim=1)).to(given.dtype)
            if ctx.needs_input_grad[1]:
                slots_grad = torch.bmm(logits_grad, tokens).sum(dim=0).mT.to(slots.dtype)
        return tokens_grad, slots_grad, None


class _AddSlots(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, combine: Tensor, outputs: Tensor) -> Tensor:
        return torch.baddbmm(hidden, combine.mT, outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        combine, outputs = ctx.saved_tensors
        with without_autocast(grad.device.type):
            return grad, torch.bmm(outputs, grad.mT), torch.bmm(combine, grad)


def _rows(slots: Tensor, tokens: Tensor) -> Tensor:
    """Φ as `(B, S, D)`, the same for every sample, in the dtype of the tokens."""
    return slots.to(tokens.dtype).mT.contiguous().expand(tokens.shape[0], -1, -1)


def _softmax_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    """The gradient of the logits of `output = softmax(logits)`."""
    # Written out it is three operations instead of one.
    return torch._softmax_backward_data(grad, output, dim, output.dtype)
