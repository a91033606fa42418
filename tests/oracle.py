"""The formulas as plain loops over scalars and vectors, straight from the equations, to hold the fast code to.

Letters: B batch, T tokens, D hidden size, N experts, P slots per expert, S = N·P slots, R bottleneck.
"""

from __future__ import annotations

import math

import torch


def gelu(z):
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def soft_weights(x, slots, mask=None, scale=None):
    """Dispatch and combine weights (B, T, S) of tokens x (B, T, D) and slot parameters (D, S)."""
    batch, num_tokens, _ = x.shape
    num_slots = slots.shape[1]
    dispatch = [[[None] * num_slots for _ in range(num_tokens)] for _ in range(batch)]
    combine = [[[None] * num_slots for _ in range(num_tokens)] for _ in range(batch)]
    for b in range(batch):

        def logit(t, s, b=b):
            value = (x[b, t] * slots[:, s]).sum()
            if scale is not None:
                value = scale[0] * value / (x[b, t].pow(2).sum().sqrt() * slots[:, s].pow(2).sum().sqrt())
            return value

        def valid(t, b=b):
            return mask is None or bool(mask[b, t])

        zero = x.new_zeros(())
        for t in range(num_tokens):
            for s in range(num_slots):
                over_tokens = sum((torch.exp(logit(u, s)) for u in range(num_tokens) if valid(u)), zero)
                over_slots = sum((torch.exp(logit(t, q)) for q in range(num_slots)), zero)
                dispatch[b][t][s] = torch.exp(logit(t, s)) / over_tokens if valid(t) else zero
                combine[b][t][s] = torch.exp(logit(t, s)) / over_slots

    def stack(weights):
        return torch.stack([torch.stack([torch.stack(row) for row in sample]) for sample in weights])

    return stack(dispatch), stack(combine)


def bottleneck(z, down_weight, down_bias, up_weight, up_bias):
    """One expert on one vector z (D)."""
    return up_bias + gelu(down_bias + z @ down_weight) @ up_weight


def soft_mixture(x, slots, experts, mask=None, scale=None):
    """Output (B, T, D') for tokens x (B, T, D); `experts` is a list of N tuples of bottleneck weights."""
    batch, num_tokens, _ = x.shape
    num_slots = slots.shape[1]
    slots_per_expert = num_slots // len(experts)
    dispatch, combine = soft_weights(x, slots, mask, scale)
    outputs = []
    for b in range(batch):
        answers = []
        for s in range(num_slots):
            read = sum(dispatch[b, t, s] * x[b, t] for t in range(num_tokens))
            answers.append(bottleneck(read, *experts[s // slots_per_expert]))
        for t in range(num_tokens):
            outputs.append(sum(combine[b, t, s] * answers[s] for s in range(num_slots)))
    return torch.stack(outputs).unflatten(0, (batch, num_tokens))
