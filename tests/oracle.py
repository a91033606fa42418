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
            if scale is not None and x[b, t].any():  # the cosine of a token of zeros counts as zero
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


def depthwise(hidden, conv_weight, conv_bias, grid=None, causal=False):
    """Each of R channels convolved over the vectors of a list, which are neighbours; a list of vectors.

    With a grid (class tokens, height, width) that is in two dimensions, and class tokens have no neighbours. If it is
    causal, all neighbours are before a vector.

    The kernel (R, K) or (R, A, K) is applied without flipping; beyond the ends there are zeros.
    """
    length, (r, *_, size) = len(hidden), conv_weight.shape
    outputs = []
    for i in range(length):
        mixed = []
        for c in range(r):
            value = conv_bias[c]
            if grid is None:
                for k in range(size):
                    j = i + k - (size - 1 if causal else size // 2)
                    value = value + (conv_weight[c, k] * hidden[j][c] if 0 <= j < length else 0)
            elif i < grid[0]:
                value = value + conv_weight[c, conv_weight.shape[1] // 2, size // 2] * hidden[i][c]
            else:
                row, column = divmod(i - grid[0], grid[2])
                for a in range(conv_weight.shape[1]):
                    for b in range(size):
                        y, x = row + a - conv_weight.shape[1] // 2, column + b - size // 2
                        if 0 <= y < grid[1] and 0 <= x < grid[2]:
                            value = value + conv_weight[c, a, b] * hidden[grid[0] + y * grid[2] + x][c]
            mixed.append(value)
        outputs.append(torch.stack(mixed))
    return outputs


def convolution(
    z, down_weight, down_bias, up_weight, up_bias, conv_weight, conv_bias, valid=None, grid=None, causal=False
):
    """One expert on all of z (L, D), which are neighbours; invalid ones are zero for others."""
    hidden = [gelu(down_bias + row @ down_weight) for row in z]
    hidden = [row if valid is None or bool(valid[i]) else 0 * row for i, row in enumerate(hidden)]
    mixed = depthwise(hidden, conv_weight, conv_bias, grid, causal)
    return torch.stack([up_bias + gelu(row) @ up_weight for row in mixed])


def conformer(
    z, down_weight, down_bias, up_weight, up_bias, conv_weight, conv_bias, norm_weight, norm_bias,
    valid=None, grid=None, causal=False,
):  # fmt: skip
    """One Conformer adapter on all of z (L, D), with a root mean square of each vector in the place of BatchNorm."""
    r = len(conv_bias)
    gated = []
    for i, row in enumerate(z):
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        both = down_bias + (row - mean) / torch.sqrt(variance + 1e-5) @ down_weight
        gate = torch.stack([both[c] / (1 + torch.exp(-both[r + c])) for c in range(r)])
        gated.append(gate if valid is None or bool(valid[i]) else 0 * gate)
    outputs = []
    for row in depthwise(gated, conv_weight, conv_bias, grid, causal):
        root = torch.sqrt(sum(value**2 for value in row) / r + 0.01)
        normed = torch.stack([norm_weight[c] * row[c] / root + norm_bias[c] for c in range(r)])
        outputs.append(up_bias + normed / (1 + torch.exp(-normed)) @ up_weight)
    return torch.stack(outputs)


PROJECTIONS = ("down_weight", "down_bias", "up_weight", "up_bias")
CONVOLUTION = (*PROJECTIONS, "conv_weight", "conv_bias")
# What computes an expert on vectors that are neighbours, and the names of its weights.
EXPERTS = {
    "bottleneck": (None, PROJECTIONS),
    "convolution": (convolution, CONVOLUTION),
    "conformer": (conformer, (*CONVOLUTION, "norm_weight", "norm_bias")),
}


def weights_of(experts, expert_type="bottleneck"):
    """The weights of each of the stacked experts, as a list of N tuples."""
    return list(zip(*(getattr(experts, name) for name in EXPERTS[expert_type][1]), strict=True))


def expert_on_all(z, weights, valid=None, grid=None, causal=False):
    """One expert on all of z (L, D): the number of its tensors tells its type."""
    if len(weights) == len(PROJECTIONS):
        return torch.stack([bottleneck(row, *weights) for row in z])
    apply = next(apply for apply, names in EXPERTS.values() if len(names) == len(weights))
    return apply(z, *weights, valid=valid, grid=grid, causal=causal)


def slots_of(router):
    """Φ, `(D, S)`, and the factor of cosines, or None, from the parameters of a router of slots."""
    root = len(router.slots) ** 0.5 if router.unit_slots else 1.0
    return router.slots / root, None if router.scale is None else router.scale * root


def soft_mixture(x, slots, experts, mask=None, scale=None):
    """Output (B, T, D') for tokens x (B, T, D); `experts` is a list of N tuples of weights."""
    batch, num_tokens, _ = x.shape
    num_slots = slots.shape[1]
    slots_per_expert = num_slots // len(experts)
    dispatch, combine = soft_weights(x, slots, mask, scale)
    outputs = []
    for b in range(batch):
        read = [sum(dispatch[b, t, s] * x[b, t] for t in range(num_tokens)) for s in range(num_slots)]
        answers = []
        for n, weights in enumerate(experts):
            answers += expert_on_all(torch.stack(read[n * slots_per_expert : (n + 1) * slots_per_expert]), weights)
        for t in range(num_tokens):
            outputs.append(sum(combine[b, t, s] * answers[s] for s in range(num_slots)))
    return torch.stack(outputs).unflatten(0, (batch, num_tokens))


def causal_soft_mixture(x, slots, experts, mask=None, scale=None, chunk_size=1, rates=None):
    """Output (B, T, D'): for each token soft routing of the tokens that it sees, whose weights fall with their age.

    A token sees all before it and up to the end of its chunk; chunks begin with the first real token. If it sees no
    real one, it reads nothing, not even the biases of `down`.
    """
    batch, num_tokens, _ = x.shape
    num_slots = slots.shape[1]
    slots_per_expert = num_slots // len(experts)
    outputs = []
    for b in range(batch):
        valid = [t for t in range(num_tokens) if mask is None or bool(mask[b, t])]
        first = valid[0] if valid else 0
        logits = [[None] * num_slots for _ in range(num_tokens)]
        for t in range(num_tokens):
            for s in range(num_slots):
                logits[t][s] = (x[b, t] * slots[:, s]).sum()
                if scale is not None and x[b, t].any():
                    norms = x[b, t].pow(2).sum().sqrt() * slots[:, s].pow(2).sum().sqrt()
                    logits[t][s] = scale[0] * logits[t][s] / norms
        for t in range(num_tokens):
            end = first + ((t - first) // chunk_size + 1) * chunk_size - 1
            seen = [u for u in valid if u <= end]
            answers = []
            for n, weights in enumerate(experts):
                read = []
                for s in range(n * slots_per_expert, (n + 1) * slots_per_expert):
                    ages = [x.new_zeros(()) if rates is None else -rates[s] * (end - u) for u in seen]
                    terms = [torch.exp(logits[u][s] + age) for u, age in zip(seen, ages)]
                    read.append(sum((term / sum(terms) * x[b, u] for term, u in zip(terms, seen)), x.new_zeros(())))
                if seen:
                    answers += expert_on_all(torch.stack(read), weights)
                else:
                    down, bias, *others = weights
                    nothing = x.new_zeros(slots_per_expert, x.shape[2])
                    answers += expert_on_all(nothing, (down, 0 * bias, *others))
            exponentials = [torch.exp(value) for value in logits[t]]
            outputs.append(sum(exponentials[s] / sum(exponentials) * answers[s] for s in range(num_slots)))
    return torch.stack(outputs).unflatten(0, (batch, num_tokens))


def reading_in_time(logits, mask=None, chunk_size=1, rates=None):
    """Mean age and effective number (B, T, S) of the tokens that slots read with logits (B, T, S), each by its loops.

    What a token sees is as in `causal_soft_mixture`.
    """
    batch, num_tokens, num_slots = logits.shape
    ages, numbers = torch.zeros_like(logits), torch.zeros_like(logits)
    for b in range(batch):
        valid = [t for t in range(num_tokens) if mask is None or bool(mask[b, t])]
        first = valid[0] if valid else 0
        for t in range(num_tokens):
            end = first + ((t - first) // chunk_size + 1) * chunk_size - 1
            seen = [u for u in valid if u <= end]
            for s in range(num_slots):
                rate = 0.0 if rates is None else rates[s]
                terms = [torch.exp(logits[b, u, s] - rate * (end - u)) for u in seen]
                weights = [term / sum(terms) for term in terms]
                ages[b, t, s] = sum(weight * (t - u) for weight, u in zip(weights, seen))
                numbers[b, t, s] = 1 / sum(weight**2 for weight in weights) if seen else 0
    return ages, numbers


def with_channels(x, embedding, mask=None):
    """The tokens (B, C·T, D) that a mixture reads of x (B, C, T, D): padding is zero, without the embedding too."""
    clips = []
    for b in range(x.shape[0]):
        tokens = []
        for c in range(x.shape[1]):
            for t in range(x.shape[2]):
                token = x[b, c, t] if embedding is None else x[b, c, t] + embedding[c]
                tokens.append(token if mask is None or bool(mask[b, c, t]) else torch.zeros_like(token))
        clips.append(torch.stack(tokens))
    return torch.stack(clips)


def causal_soft_mixture_of_channels(x, slots, experts, mask=None, scale=None, chunk_size=1, rates=None):
    """Output (B, C, T, D') for x (B, C, T, D): each token reads all channels up to its time, or to the chunk's end.

    Ages count times, and chunks begin with the first time at which any channel has a real token.
    """
    batch, channels, times, _ = x.shape
    num_slots = slots.shape[1]
    slots_per_expert = num_slots // len(experts)

    def logit(token, s):
        value = (token * slots[:, s]).sum()
        if scale is not None and token.any():
            value = scale[0] * value / (token.pow(2).sum().sqrt() * slots[:, s].pow(2).sum().sqrt())
        return value

    outputs = []
    for b in range(batch):
        places = [(c, t) for t in range(times) for c in range(channels) if mask is None or bool(mask[b, c, t])]
        first = min((t for _, t in places), default=0)
        for c in range(channels):
            for t in range(times):
                end = first + ((t - first) // chunk_size + 1) * chunk_size - 1
                seen = [(d, u) for d, u in places if u <= end]
                answers = []
                for n, weights in enumerate(experts):
                    read = []
                    for s in range(n * slots_per_expert, (n + 1) * slots_per_expert):
                        rate = 0 if rates is None else rates[s]
                        terms = [torch.exp(logit(x[b, d, u], s) - rate * (t - u)) for d, u in seen]
                        zero = x.new_zeros(x.shape[3])
                        read.append(sum((w / sum(terms) * x[b, d, u] for w, (d, u) in zip(terms, seen)), zero))
                    if not seen:
                        weights = (weights[0], 0 * weights[1], *weights[2:])
                    answers += expert_on_all(torch.stack(read), weights)
                combine = [torch.exp(logit(x[b, c, t], s)) for s in range(num_slots)]
                outputs.append(sum(combine[s] / sum(combine) * answers[s] for s in range(num_slots)))
    return torch.stack(outputs).unflatten(0, (batch, channels, times))


def gates(x, weight, bias):
    """Gates (B, T, N) of tokens x (B, T, D)."""
    batch, num_tokens, _ = x.shape
    num_experts = weight.shape[1]
    rows = []
    for b in range(batch):
        for t in range(num_tokens):
            exponentials = [torch.exp((x[b, t] * weight[:, n]).sum() + bias[n]) for n in range(num_experts)]
            rows.append(torch.stack([value / sum(exponentials) for value in exponentials]))
    return torch.stack(rows).unflatten(0, (batch, num_tokens))


def top_k_weights(g, top_k):
    """Weights (B, T, N) of the experts with the largest gates, which sum to one; and which they are, as sets."""
    batch, num_tokens, num_experts = g.shape
    rows, chosen = [], []
    for b in range(batch):
        for t in range(num_tokens):
            best = sorted(range(num_experts), key=lambda n, b=b, t=t: -g[b, t, n].item())[:top_k]
            total = sum(g[b, t, n] for n in best)
            zero = g.new_zeros(())
            rows.append(torch.stack([g[b, t, n] / total if n in best else zero for n in range(num_experts)]))
            chosen.append(set(best))
    return torch.stack(rows).unflatten(0, (batch, num_tokens)), chosen


def load_balancing(g, chosen, mask=None):
    """The Switch Transformer's loss of gates g (B, T, N) and the experts chosen for each of the B·T tokens."""
    _, num_tokens, num_experts = g.shape
    places = [divmod(i, num_tokens) for i in range(len(chosen)) if mask is None or bool(mask[divmod(i, num_tokens)])]
    loss = g.new_zeros(())
    for n in range(num_experts):
        choices = sum(1 for b, t in places for m in chosen[b * num_tokens + t] if m == n)
        share = choices / sum(len(chosen[b * num_tokens + t]) for b, t in places)
        loss = loss + num_experts * share * sum(g[b, t, n] for b, t in places) / len(places)
    return loss


def expert_choice_weights(g, capacity_factor, mask=None):
    """Weights (B, T, N): the gates of the tokens that each expert takes in each sample."""
    batch, num_tokens, num_experts = g.shape
    weights = [[[g.new_zeros(()) for _ in range(num_experts)] for _ in range(num_tokens)] for _ in range(batch)]
    for b in range(batch):
        valid = [t for t in range(num_tokens) if mask is None or bool(mask[b, t])]
        capacity = math.ceil(round(capacity_factor * len(valid) / num_experts, 9))
        for n in range(num_experts):
            for t in sorted(valid, key=lambda t, b=b, n=n: -g[b, t, n].item())[:capacity]:
                weights[b][t][n] = g[b, t, n]
    return torch.stack([torch.stack([torch.stack(row) for row in sample]) for sample in weights])


def token_mixture(x, weights, experts, mask=None, grid=None, causal=False):
    """Output (B, T, D'): for each token the sum of all experts by their weights (B, T, N)."""
    samples = []
    for b in range(x.shape[0]):
        valid = None if mask is None else mask[b]
        answers = [expert_on_all(x[b], expert, valid, grid, causal) for expert in experts]
        samples.append(sum(weights[b, :, n, None] * answers[n] for n in range(len(experts))))
    return torch.stack(samples)
