"""Running softmax averages: what soft routing reads in order of time.

The tokens are cut into pieces. Within a piece all pairs of tokens meet, a small triangle of weights; the ends of the
pieces are then tokens of the same problem, so that the work is linear in the number of tokens, in few operations. All
weights are relative to a running maximum, which no logits overflow. Where no gradient is recorded, these are plain
operations, for whatever traces them.

Letters of all shapes: B batch, T tokens, N experts, P slots per expert, S = N·P slots, R bottleneck; K pieces of C
tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import without_autocast

# C. The triangles cost T·S·C, the ends of the pieces T·S·R / C.
PIECE = 8
# The logarithm of a weight that counts as none: processors take a hundred times as long for what underflows.
FAINT = -80.0


class Running(NamedTuple):
    """Sums of weighted values up to each token, and in which unit the weights are."""

    maximum: Tensor  # (B, S, T): the largest logarithm of a weight so far, as old as it is
    sums: Tensor  # (B, S, T, R + 1): the weighted values and the weights, over exp(maximum)


class Averages(NamedTuple):
    """Running averages, and what makes sums of them again: the sums are average · e^log_total, over exp(maximum)."""

    average: Tensor  # (B, T, S, R)
    log_total: Tensor  # (B, S, T)
    maximum: Tensor  # (B, S, T)


def running_average(
    values: Tensor,
    logits: Tensor,
    mask: Optional[Tensor] = None,
    forgetting: Optional[Tensor] = None,
    before: Optional[Running] = None,
) -> Averages:
    """Averages of values over the tokens so far, weighted by a softmax.

        w[t, u, s]   = e^(L[u, s] - λ[s]·(t - u)) / Σ_v e^(L[v, s] - λ[s]·(t - v))    over valid u, v ≤ t
        average[t, s] = Σ_u w[t, u, s] · values[u, ⌊s/P⌋]                                   (B, T, S, R)

    Before the first valid token it is zero. What is kept for the backward pass is of the size of the average. Call
    it without autocast.

    Args:
        values (Tensor): `(B, T, N, R)`, float32 or float64.
        logits (Tensor): L, `(B, T, S)`, in the same dtype.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
        forgetting (Tensor, optional): λ, `(S,)`, from 0, in the same dtype. Default: 0.
        before (Running, optional): the sums of tokens before these, as one token, `(B, S)` and `(B, S, R + 1)`; only
            its maximum gets a gradient. Default: none.

    Returns:
        Averages: the averages, and what a later call can go on from.
    """
    run = _RunningAverage.apply if torch.is_grad_enabled() else _RunningAverage.forward
    return Averages(*run(values, logits, mask, forgetting, *(before or (None, None))))


class _RunningAverage(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        values: Tensor,
        logits: Tensor,
        mask: Optional[Tensor],
        forgetting: Optional[Tensor],
        maximum_before: Optional[Tensor],
        sums_before: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_slot = _by_slot(values, logits)
        weights = _weights(logits, mask)
        logits = _in_time(logits, mask)
        given = torch.cat([by_slot * weights.unsqueeze(-1), weights.expand(by_slot.shape[:3]).unsqueeze(-1)], dim=-1)
        rate = logits.new_zeros(logits.shape[1], 1) if forgetting is None else forgetting.unsqueeze(1)
        if maximum_before is None or sums_before is None:
            maximum, sums = _scan(Running(logits, given), rate)
        else:
            logits = torch.cat([maximum_before.unsqueeze(2), logits], dim=2)
            maximum, sums = _scan(Running(logits, torch.cat([sums_before.unsqueeze(2), given], dim=2)), rate)
            maximum, sums = maximum[:, :, 1:], sums[:, :, 1:]
        # Where there is no valid token yet, the sums are zero; elsewhere the largest weight alone is one.
        total = sums[..., -1].clamp_min(1)
        output = (sums[..., :-1] / total.unsqueeze(-1)).transpose(1, 2).contiguous()
        return output, total.log(), maximum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        values, logits, mask, forgetting, *_ = inputs
        # A unit only: nothing depends on it. The total, in that unit, is returned for the gradients of gradients.
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, logits, mask, forgetting, *output)

    @staticmethod
    def backward(
        ctx: Any, grad: Optional[Tensor], total_grad: Optional[Tensor], _: None
    ) -> tuple[Tensor, Tensor, None, Optional[Tensor], Optional[Tensor], None]:
        values, logits, mask, forgetting, output, log_total, maximum = ctx.saved_tensors
        with without_autocast(values.device.type):
            num_experts, output = values.shape[2], output.transpose(1, 2)
            grad = torch.zeros_like(output) if grad is None else grad.transpose(1, 2)
            # The logits get Σ_t w[t, u] · <grad[t], values[u] - output[t]>, and
            # w[t, u] = own[u] · e^(maximum[u] - λ·(t - u) - maximum[t]) / total[t]
            through_output = (grad * output).sum(dim=-1)
            if total_grad is not None:
                through_output = through_output - total_grad
            given = torch.cat([grad, through_output.unsqueeze(-1)], dim=-1) * torch.exp(-log_total).unsqueeze(-1)
            rate = logits.new_zeros(logits.shape[2], 1) if forgetting is None else forgetting.unsqueeze(1)
            later = _scan_back(maximum, given, rate)
            own = _weights(logits, mask) * _exp(_in_time(logits, mask) - maximum)
            values_grad, through_output = (later * own.unsqueeze(-1)).split([values.shape[3], 1], dim=-1)
            by_slot = _by_slot(values, logits)
            logits_grad = (values_grad * by_slot).sum(dim=-1) - through_output.squeeze(-1)
            # All logits up by the same is no change of the average.
            by_age = logits_grad if total_grad is None else logits_grad - total_grad
            maximum_grad = -by_age.sum(dim=2) if ctx.needs_input_grad[4] else None
            forgetting_grad = None
            if forgetting is not None:
                # So λ·(t - u) is as good as -λ·(u + 1), where what was before these tokens is at u = -1.
                ages = torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=logits.dtype)
                forgetting_grad = (by_age * ages).sum(dim=(0, 2))
            values_grad = values_grad.unflatten(1, (num_experts, -1)).sum(dim=2).transpose(1, 2)
        return values_grad, logits_grad.transpose(1, 2), None, forgetting_grad, maximum_grad, None


def _by_slot(values: Tensor, logits: Tensor) -> Tensor:
    """The values that each slot reads, `(B, S, T, R)`."""
    per_expert = logits.shape[2] // values.shape[2]
    return values.transpose(1, 2).repeat_interleave(per_expert, dim=1) if per_expert > 1 else values.transpose(1, 2)


def _weights(logits: Tensor, mask: Optional[Tensor]) -> Tensor:
    """One for real tokens, zero for others, `(B, 1, T)`."""
    if mask is None:
        return logits.new_ones(logits.shape[0], 1, logits.shape[1])
    return mask.unsqueeze(1).to(logits.dtype)


def _in_time(logits: Tensor, mask: Optional[Tensor]) -> Tensor:
    """The logits as `(B, S, T)`; of padding, which must not be the maximum, the least number that there is."""
    logits = logits.transpose(1, 2)
    return logits if mask is None else logits.masked_fill(~mask.unsqueeze(1), torch.finfo(logits.dtype).min)


def _scan(given: Running, rate: Tensor) -> Running:
    """Sums up to each token, of tokens that each are a sum already.

    Args:
        given (Running): the tokens.
        rate (Tensor): by how much the logarithm of a weight falls from one token to the next, `(S, 1)`.

    Returns:
        Running: the sums.
    """
    lowest = torch.finfo(rate.dtype).min
    num_tokens = given.maximum.shape[-1]
    logits = _in_pieces(given.maximum, lowest)
    steps = torch.arange(logits.shape[3], device=rate.device, dtype=rate.dtype)
    falls = rate.unsqueeze(-1) * steps  # (S, 1, C): by how much, since the beginning of the piece
    logits = logits + falls  # as if they were all as old as the first
    seen = steps.unsqueeze(1) >= steps
    pairs = logits.unsqueeze(-2).masked_fill(~seen, lowest)
    maximum = pairs.amax(dim=-1)
    pairs = _exp(pairs.sub_(maximum.unsqueeze(-1))).masked_fill_(~seen, 0.0)
    maximum = maximum - falls
    sums = pairs @ _in_pieces(given.sums, 0.0)
    if logits.shape[2] > 1:
        before = _scan(Running(maximum[..., -1], sums[..., -1, :]), rate * PIECE)
        # What the piece before ends with, one token ago for the first.
        carried = F.pad(before.maximum[..., :-1], (1, 0), value=lowest).unsqueeze(-1) - falls - rate.unsqueeze(-1)
        carried_sums = F.pad(before.sums[..., :-1, :], (0, 0, 1, 0)).unsqueeze(-2)
        inside, maximum = maximum, torch.maximum(maximum, carried)
        sums = sums * _exp(inside - maximum).unsqueeze(-1)
        sums += carried_sums * _exp(carried - maximum).unsqueeze(-1)
    return Running(maximum.flatten(2)[..., :num_tokens], sums.flatten(2, 3)[..., :num_tokens, :])


def _scan_back(maximum: Tensor, given: Tensor, rate: Tensor) -> Tensor:
    """Sums from each token on, in the unit of that token.

        output[u] = Σ_{t ≥ u} e^(maximum[u] - rate·(t - u) - maximum[t]) · given[t]

    Args:
        maximum (Tensor): `(B, S, T)`, as `_scan` returns it: no exponent is above zero.
        given (Tensor): `(B, S, T, R + 1)`.
        rate (Tensor): as for `_scan`, `(S, 1)`.

    Returns:
        Tensor: `(B, S, T, R + 1)`.
    """
    lowest = torch.finfo(rate.dtype).min
    num_tokens = maximum.shape[-1]
    units = _in_pieces(maximum, -lowest)
    steps = torch.arange(units.shape[3], device=rate.device, dtype=rate.dtype)
    falls = rate.unsqueeze(-1) * steps
    units = units + falls
    pairs = units.unsqueeze(-1) - units.unsqueeze(-2)
    before = steps.unsqueeze(1) > steps
    pairs = _exp(pairs.masked_fill(before, FAINT)).masked_fill(before, 0.0)
    sums = pairs @ _in_pieces(given, 0.0)
    if units.shape[2] > 1:
        first = units[..., 0]
        after = _scan_back(first, sums[..., 0, :], rate * PIECE)
        after = F.pad(after[..., 1:, :], (0, 0, 0, 1)).unsqueeze(-2)
        # Nothing comes after the last piece.
        next_first = F.pad(first[..., 1:], (0, 1), value=-lowest).unsqueeze(-1) + PIECE * rate.unsqueeze(-1)
        sums = sums + after * _exp(units - next_first).unsqueeze(-1)
    return sums.flatten(2, 3)[..., :num_tokens, :]


def _exp(logarithms: Tensor) -> Tensor:
    """What is faint is not exactly zero, but less than can be seen beside one."""
    return torch.exp(logarithms.clamp_min(FAINT))


def _in_pieces(tensor: Tensor, padding: float) -> Tensor:
    """Cut `(B, S, T, …)` into `(B, S, K, C, …)`, padded at the end."""
    if torch.compiler.is_exporting():
        return tensor.unsqueeze(2)  # one piece: its graph holds for any number of tokens, as those of attention do
    missing = -tensor.shape[2] % PIECE
    padded = F.pad(tensor, (*[0] * (2 * tensor.ndim - 6), 0, missing), value=padding)
    return padded.unflatten(2, (-1, PIECE))
