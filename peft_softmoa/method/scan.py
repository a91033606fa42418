"""Running softmax averages: what soft routing reads in order of time.

Sums of weighted values are kept in the unit of a running maximum, which no logits overflow. So they follow a linear
recurrence, whose factors are at most one. The tokens are cut into pieces: all pieces go on by one token at a time, and
their ends are then tokens of the same problem, so that the work is linear in the number of tokens, in few operations.
Where no gradient is recorded, these are plain operations, for whatever traces them.

Letters of all shapes: B batch, T tokens, N experts, P slots per expert, S = N·P slots, R bottleneck; F rows of numbers
for each token and slot, as many as R + 1; K pieces of C tokens. Pieces are `(C, F, B, K, S)`, so that what goes on
together lies together.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import without_autocast

# C: how many operations there are for each level, and by how much each level is shorter.
PIECE = 8
# The logarithm of a weight that counts as none: processors take a hundred times as long for what underflows.
FAINT = -80.0
# What a sum of weights is divided by where there is none yet.
NOTHING = 1e-20


class Averages(NamedTuple):
    """Running averages, and the weight that each has: total · e^maximum."""

    average: Tensor  # (B, T, S, R)
    total: Tensor  # (B, T, S): sums of the weights, over e^maximum
    maximum: Tensor  # (B, T, S): the largest logarithm of a weight so far, as old as it is


def running_average(
    values: Tensor,
    logits: Tensor,
    mask: Optional[Tensor] = None,
    forgetting: Optional[Tensor] = None,
    before: Optional[Averages] = None,
) -> Averages:
    """Averages of values over the tokens so far, weighted by a softmax.

        w[t, u, s]   = e^(L[u, s] - λ[s]·(t - u)) / Σ_v e^(L[v, s] - λ[s]·(t - v))    over valid u, v ≤ t
        average[t, s] = Σ_u w[t, u, s] · values[u, ⌊s/P⌋]                                   (B, T, S, R)

    Before the first valid token it is zero. What is kept for the backward pass is the average and what is given. Call
    it without autocast.

    Args:
        values (Tensor): `(B, T, N, R)`, float32 or float64.
        logits (Tensor): L, `(B, T, S)`, in the same dtype.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
        forgetting (Tensor, optional): λ, `(S,)`, from 0, in the same dtype. Default: 0.
        before (Averages, optional): the averages of tokens before these, as one token, T = 1; only its maximum gets a
            gradient. Default: none.

    Returns:
        Averages: the averages, and what a later call can go on from, which has no gradient.
    """
    run = _RunningAverage.apply if torch.is_grad_enabled() else _RunningAverage.forward
    return Averages(*run(values, logits, mask, forgetting, *(before or (None, None, None))))


class _RunningAverage(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        values: Tensor,
        logits: Tensor,
        mask: Optional[Tensor],
        forgetting: Optional[Tensor],
        average_before: Optional[Tensor],
        total_before: Optional[Tensor],
        maximum_before: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _by_slot(values, logits)
        if average_before is not None:
            rows = torch.cat([average_before.permute(3, 0, 1, 2), rows], dim=2)
        maximum, sums = _sums(rows, logits, mask, forgetting, total_before, maximum_before)
        average = sums[:-1] / sums[-1].clamp_min(NOTHING)
        return average.permute(1, 2, 3, 0).contiguous(), sums[-1].contiguous(), maximum.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    def backward(
        ctx: Any, grad: Optional[Tensor], *_: None
    ) -> tuple[Optional[Tensor], Optional[Tensor], None, Optional[Tensor], None, None, Optional[Tensor]]:
        values, logits, mask, forgetting, _, total_before, maximum_before, output = ctx.saved_tensors
        if grad is None:
            return None, None, None, None, None, None, None
        with without_autocast(values.device.type):
            # The logits get Σ_t w[t, u] · <grad[t], values[u] - output[t]>, and
            # w[t, u] = own[u] · e^(maximum[u] - λ·(t - u) - maximum[t]) / total[t]
            # Maximum and total are cheaper to make again than to keep.
            maximum, [total] = _sums(None, logits, mask, forgetting, total_before, maximum_before)
            through_output = (grad * output).sum(dim=-1)
            given = torch.cat([grad.permute(3, 0, 1, 2), through_output.unsqueeze(0)]) / total.clamp_min(NOTHING)
            own = _exp(_real(logits, mask) - maximum)
            own = own if mask is None else own.masked_fill(~mask.unsqueeze(-1), 0.0)
            later = _sums_back(maximum, given, forgetting) * own
            values_grad = later[:-1]
            logits_grad = (values_grad * _by_slot(values, logits)).sum(dim=0) - later[-1]
            # All logits up by the same is no change of the average.
            maximum_grad = -logits_grad.sum(dim=1, keepdim=True) if ctx.needs_input_grad[6] else None
            forgetting_grad = None
            if forgetting is not None:
                # So λ·(t - u) is as good as -λ·(u + 1), where what was before these tokens is at u = -1.
                ages = torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=logits.dtype)
                forgetting_grad = (logits_grad * ages.unsqueeze(-1)).sum(dim=(0, 1))
            values_grad = values_grad.unflatten(3, (values.shape[2], -1)).sum(dim=4).permute(1, 2, 3, 0)
        return values_grad, logits_grad, None, forgetting_grad, None, None, maximum_grad


def _by_slot(values: Tensor, logits: Tensor) -> Tensor:
    """The values that each slot reads, `(R, B, T, S)`."""
    per_expert = logits.shape[2] // values.shape[2]
    rows = values.permute(3, 0, 1, 2)
    return rows.repeat_interleave(per_expert, dim=3) if per_expert > 1 else rows


def _real(logits: Tensor, mask: Optional[Tensor]) -> Tensor:
    """The logits; of padding, which must not be the maximum, the least number that there is."""
    return logits if mask is None else logits.masked_fill(~mask.unsqueeze(-1), torch.finfo(logits.dtype).min)


def _sums(
    rows: Optional[Tensor],
    logits: Tensor,
    mask: Optional[Tensor],
    rate: Optional[Tensor],
    total_before: Optional[Tensor],
    maximum_before: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """Weighted sums up to each token.

    Args:
        rows (Tensor, optional): what is summed up, `(R, B, T, S)`; with what came before these tokens, as one more.
            Default: nothing but the weights.
        logits (Tensor): `(B, T, S)`.
        mask (Tensor, optional): `(B, T)`.
        rate (Tensor, optional): by how much the logarithm of a weight falls from one token to the next, `(S,)`.
        total_before (Tensor, optional): the weight of what came before, `(B, 1, S)`.
        maximum_before (Tensor, optional): its unit.

    Returns:
        tuple[Tensor, Tensor]: the running maximum, `(B, T, S)`, and the sums, the last of which is that of the weights,
        `(R + 1, B, T, S)`.
    """
    lowest, num_tokens = torch.finfo(logits.dtype).min, logits.shape[1]
    weights = None
    if mask is not None or total_before is not None:
        weights = logits.new_ones(()) if mask is None else mask.unsqueeze(-1).to(logits.dtype)
        weights = weights.expand_as(logits)
    logits = _real(logits, mask)
    if weights is not None and total_before is not None and maximum_before is not None:
        weights = torch.cat([total_before, weights], dim=1)
        logits = torch.cat([maximum_before, logits], dim=1)
    if torch.compiler.is_exporting():
        maximum, sums = _all_pairs(rows, logits, weights, rate)
    else:
        pieces = _in_pieces(logits.unsqueeze(0), lowest)
        maximum = _running_maximum(pieces.detach(), rate)
        decays = _exp(_fallen(_previous(maximum, lowest) - maximum, rate))
        given = _exp(pieces - maximum)
        given = given if weights is None else given * _in_pieces(weights.unsqueeze(0))
        given = given if rows is None else torch.cat([given * _in_pieces(rows), given], dim=1)
        maximum, sums = _joined(maximum, logits.shape[1])[0], _joined(_recur(decays, given), logits.shape[1])
    return maximum[:, -num_tokens:], sums[:, :, -num_tokens:]


def _sums_back(maximum: Tensor, given: Tensor, rate: Optional[Tensor]) -> Tensor:
    """Sums from each token on, in the unit of that token.

        output[u] = Σ_{t ≥ u} e^(maximum[u] - rate·(t - u) - maximum[t]) · given[t]

    Args:
        maximum (Tensor): `(B, T, S)`, as `_sums` returns it: no exponent is above zero.
        given (Tensor): `(F, B, T, S)`.
        rate (Tensor, optional): `(S,)`.

    Returns:
        Tensor: `(F, B, T, S)`.
    """
    highest = torch.finfo(maximum.dtype).max
    pieces = _in_pieces(maximum.unsqueeze(0), highest)
    following = _previous(pieces, highest, back=True)
    decays = _exp(_fallen(pieces - following, rate))
    return _joined(_recur(decays, _in_pieces(given), back=True), given.shape[2])


def _running_maximum(logits: Tensor, rate: Optional[Tensor]) -> Tensor:
    """The largest logit up to each token, which falls from one token to the next, `(C, 1, B, K, S)`."""
    maximum = [logits[0]]
    for each in logits[1:].unbind():
        maximum.append(torch.maximum(each, _fallen(maximum[-1], rate)))
    inside = torch.stack(maximum)
    if inside.shape[3] == 1:
        return inside
    lowest, size = torch.finfo(logits.dtype).min, len(inside)
    ends = _running_maximum(_in_pieces(maximum[-1], lowest), None if rate is None else rate * size)
    carried = F.pad(_joined(ends, inside.shape[3])[:, :, :-1], (0, 0, 1, 0), value=lowest)
    if rate is not None:
        carried = carried - rate * torch.arange(1, size + 1, device=rate.device, dtype=rate.dtype).view(-1, 1, 1, 1, 1)
    return torch.maximum(inside, carried)


def _recur(decays: Tensor, given: Tensor, back: bool = False) -> Tensor:
    """A linear recurrence.

        output[t] = decays[t] · output[t - 1] + given[t]    or, back, with t + 1

    Args:
        decays (Tensor): `(C, 1, B, K, S)`, from zero to one.
        given (Tensor): `(C, F, B, K, S)`.
        back (bool): whether from the last token on. Default: False.

    Returns:
        Tensor: `(C, F, B, K, S)`.
    """
    step = -1 if back else 1
    factors, outputs = list(decays.unbind())[::step], list(given.unbind())[::step]
    for index in range(1, len(outputs)):
        outputs[index] = torch.addcmul(outputs[index], factors[index], outputs[index - 1])
        factors[index] = factors[index] * factors[index - 1]
    inside = torch.stack(outputs[::step])
    if inside.shape[3] == 1:
        return inside
    ends = _recur(_in_pieces(factors[-1]), _in_pieces(outputs[-1]), back)
    ends = _joined(ends, inside.shape[3])
    carried = F.pad(ends[:, :, 1:], (0, 0, 0, 1)) if back else F.pad(ends[:, :, :-1], (0, 0, 1, 0))
    return torch.addcmul(inside, torch.stack(factors[::step]), carried)


def _all_pairs(
    rows: Optional[Tensor], logits: Tensor, weights: Optional[Tensor], rate: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """Maximum and sums of all pairs of tokens: one graph for any number of them, as that of attention is."""
    places = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
    ages = places.unsqueeze(1) - places
    pairs = logits.mT.unsqueeze(2)  # (B, S, 1, T)
    pairs = pairs if rate is None else pairs - rate.view(-1, 1, 1) * ages
    pairs = pairs.masked_fill(ages < 0, torch.finfo(logits.dtype).min)
    maximum = pairs.amax(dim=-1)
    pairs = _exp(pairs - maximum.unsqueeze(-1)).masked_fill(ages < 0, 0.0)
    given = (torch.ones_like(logits) if weights is None else weights).unsqueeze(0)
    given = given if rows is None else torch.cat([given * rows, given])
    return maximum.mT, (pairs @ given.permute(1, 3, 2, 0)).permute(3, 0, 2, 1)


def _fallen(logarithms: Tensor, rate: Optional[Tensor]) -> Tensor:
    """Logarithms one token later. It is best told the difference of two, which are so near that it is exact."""
    return logarithms if rate is None else logarithms - rate


def _exp(logarithms: Tensor) -> Tensor:
    """What is faint is not exactly zero, but less than can be seen beside one."""
    return torch.exp(logarithms.clamp_min(FAINT))


def _previous(pieces: Tensor, value: float, back: bool = False) -> Tensor:
    """What each token's neighbour has, in time before it or, back, after it; a value where there is none."""
    if back:
        return torch.cat([pieces[1:], F.pad(pieces[:1, :, :, 1:], (0, 0, 0, 1), value=value)])
    return torch.cat([F.pad(pieces[-1:, :, :, :-1], (0, 0, 1, 0), value=value), pieces[:-1]])


def _in_pieces(tensor: Tensor, padding: float = 0.0) -> Tensor:
    """Cut `(F, B, T, S)` into `(C, F, B, K, S)`, padded at the end."""
    num_tokens = tensor.shape[2]
    size = num_tokens if num_tokens <= 2 * PIECE else PIECE  # a few tokens more are less than one level more
    missing = -num_tokens % size
    padded = F.pad(tensor, (0, 0, 0, missing), value=padding) if missing else tensor
    return padded.unflatten(2, (-1, size)).permute(3, 0, 1, 2, 4).contiguous()


def _joined(pieces: Tensor, num_tokens: int) -> Tensor:
    """The reverse of `_in_pieces`."""
    return pieces.permute(1, 2, 3, 0, 4).flatten(2, 3)[:, :, :num_tokens]
