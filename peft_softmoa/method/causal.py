"""Soft routing in order of time.

Letters of all shapes: B batch, T tokens, D hidden size of the input, N experts, P slots per expert, S = N·P slots, R
bottleneck.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from .past import Past
from .routers import SoftRouter
from .routing import chunk_ends, soft_logits, soft_weights
from .scan import Averages, running_average

# λ of a fresh router: the weight of a token has halved after 69 tokens.
RATE = 0.01


class CausalSoftRouter(SoftRouter):
    """Soft routing in order of time: each token reads slots of the tokens so far, or up to the end of its chunk.

    A slot's average is not made of tokens, but of what the experts' `down` makes of them: as `down` is linear and the
    weights sum to one, that is the same, and R numbers are averaged instead of D.

        L            = x Φ                                                                  (B, T, S)
        read[t, s]   = Σ_{u ≤ end(t)} e^(L[u, s] - λ[s]·(t - u)) g[u, ⌊s/P⌋] / Σ_{u ≤ end(t)} e^(L[u, s] - λ[s]·(t - u))
        combine      = softmax over S of L

    The last token gets what `SoftRouter` gives it, and with chunks as long as the clip, all tokens do.

    Args:
        in_features (int): D.
        num_experts (int): N.
        num_slots (int): P, per expert. Default: 1.
        normalize (bool): whether the logits are scaled cosines. Default: False.
        unit_slots (bool): whether the slot parameters have unit variance. Default: False.
        chunk_size (int, optional): number of tokens that see up to the last one of them. Default: each only itself and
            what was before.
        forgetting (bool): whether the weights of tokens fall with their age, at a rate λ = e^ρ / 100 that each slot
            learns. Default: False, λ = 0.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_slots: int = 1,
        normalize: bool = False,
        unit_slots: bool = False,
        chunk_size: Optional[int] = None,
        forgetting: bool = False,
    ) -> None:
        super().__init__(in_features, num_experts, num_slots=num_slots, normalize=normalize, unit_slots=unit_slots)
        self.chunk_size = chunk_size
        self.forgetting = nn.Parameter(torch.zeros(num_experts * num_slots)) if forgetting else None

    def reset_parameters(self) -> None:
        """Draw Φ as `SoftRouter` does; ρ starts at zero."""
        super().reset_parameters()
        rates: Optional[nn.Parameter] = getattr(self, "forgetting", None)
        if rates is not None:
            nn.init.zeros_(rates)

    def extra_repr(self) -> str:
        """Sizes and choices, for `print`."""
        return f"{super().extra_repr()}, chunk_size={self.chunk_size}, forgetting={self.forgetting is not None}"

    def logits(self, tokens: Tensor) -> Tensor:
        """L of tokens `(B, T, D)`, `(B, T, S)` in float32 or float64."""
        return soft_logits(tokens, self.phi, self.logit_scale)

    def read(
        self,
        logits: Tensor,
        projected: Tensor,
        mask: Optional[Tensor] = None,
        past: Optional[Past] = None,
        channels: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Average, for each token and slot, what an expert's `down` makes of the tokens that it sees.

        With several channels d, a token reads all of them up to its own time, or to the end of its chunk of times:

            read[c, t, s] = Σ_{d, u ≤ end(t)} w[d, u, s] g[d, u, ⌊s/P⌋],    w[d, u, s] ∝ e^(L[d, u, s] - λ[s]·(t - u))

        Chunks begin with the first time at which a channel has a real token.

        Args:
            logits (Tensor): L, `(B, C·T, S)`, channel by channel.
            projected (Tensor): g, what `down` makes of them, `(B, C·T, N, R)`.
            mask (Tensor, optional): `(B, C·T)` boolean, true for real tokens. Default: all are real.
            past (Past, optional): what came before these tokens; it goes on with them. Default: nothing.
            channels (int): C. Default: 1.

        Returns:
            tuple[Tensor, Tensor]: the averages, `(B, C·T, S, R)`, zero where no real token is seen, and the combine
            weights, `(B, C·T, S)`.

        Raises:
            ValueError: if the tokens do not begin with a chunk.
        """
        combine, times = logits.softmax(dim=-1), logits.shape[1] // channels
        rates, chunk_size, is_real = self._rates(logits), self.chunk_size or 1, mask
        if channels > 1:
            # The tokens of one time are a chunk that sees itself whole.
            logits, projected = _time_by_time(logits, channels), _time_by_time(projected, channels)
            mask = None if mask is None else _time_by_time(mask, channels)
            is_real = None if mask is None else mask.unflatten(1, (times, channels)).any(dim=2)
            if rates is not None:
                # From one token to the next a C-th of a time passes; all tokens of a time are as old as its last one.
                rates = rates / channels
                lead = torch.arange(channels - 1, -1, -1, device=logits.device, dtype=logits.dtype)
                logits = logits + (lead.unsqueeze(1) * rates).repeat(times, 1)
        before = None
        if past is not None:
            first, last = past.ends(logits[:, ::channels], is_real)
            if chunk_size > 1:
                past.check_chunks(chunk_size, first, last)
            before = past.running(first * channels, rates)
        averages = running_average(projected, logits, mask, rates, before)
        if past is not None:
            past.keep_averages(averages, (last + 1) * channels - 1)
        read = averages.average
        if chunk_size > 1 or channels > 1:
            ends = chunk_ends(chunk_size, times, is_real).to(read.device)
            ends = ends if channels == 1 else (ends * channels + channels - 1).repeat_interleave(channels, dim=1)
            read = read.gather(1, ends[:, :, None, None].expand_as(read))
        return (read if channels == 1 else _channel_by_channel(read, channels)), combine

    def weights(self, tokens: Tensor, mask: Optional[Tensor] = None, channels: int = 1) -> tuple[Tensor, Tensor]:
        """Dispatch weights of what the last token reads, and combine weights.

        Args:
            tokens (Tensor): x, `(B, T, D)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
            channels (int): number of channels, one after the other, in which the tokens have their places in time.
                Default: 1.

        Returns:
            tuple[Tensor, Tensor]: both `(B, T, S)`, in float32 or float64.
        """
        logits = self.logits(tokens)
        combine = logits.softmax(dim=-1)
        rates = self._rates(logits)
        if rates is not None:
            times = tokens.shape[1] // channels
            ages = torch.arange(times - 1, -1, -1, device=logits.device, dtype=logits.dtype).repeat(channels)
            logits = logits - ages.unsqueeze(-1) * rates
        return soft_weights(logits.mT, mask)[0].mT, combine

    def reading(
        self, logits: Tensor, mask: Optional[Tensor] = None, past: Optional[Past] = None
    ) -> Optional[tuple[Tensor, Tensor]]:
        """Where in the past each slot reads, with the weights w of `read`.

            age[t, s]       = Σ_u w[t, u, s] · (t - u)
            effective[t, s] = 1 / Σ_u w[t, u, s]²

        Both are running averages: of the places of tokens, and of the weights themselves.

        Args:
            logits (Tensor): L, `(B, T, S)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
            past (Past, optional): what came before these tokens; what is needed of it goes on with them, and the rest
                stays for `read`. Default: nothing.

        Returns:
            tuple[Tensor, Tensor], optional: mean age of what is read, below zero ahead of the token in its chunk, and
            effective number of tokens, `(B, T, S)` each, zero where no real token is seen; None if there were tokens
            before with which this was not called.
        """
        past = Past() if past is None else past
        if past.num_recorded != past.num_tokens:
            return None
        num_tokens, rates = logits.shape[1], self._rates(logits)
        first, last = past.ends(logits, mask)
        lowest = torch.finfo(logits.dtype).min
        before = squares_before = None
        if "age" in past.tensors:
            names = ("maximum", "total", "age", "squares")
            maximum, total, age, squares = (past.tensors[name][:, -1:] for name in names)
            if rates is not None:
                maximum = maximum + first.view(-1, 1, 1) * rates
            before = Averages((-1 - age).unsqueeze(-1), total, maximum)
            ones = torch.ones_like(squares).unsqueeze(-1)
            squares_before = Averages(ones, squares, (2 * maximum).clamp_min(lowest))
        places = torch.arange(num_tokens, device=logits.device) - first.unsqueeze(1)
        values = places.to(logits.dtype)[:, :, None, None]
        mean = running_average(values, logits, mask, rates, before)
        # Twice the logits are squared weights, in the square of the same unit.
        doubled = None if rates is None else 2 * rates
        squared = running_average(torch.ones_like(values), 2 * logits, mask, doubled, squares_before)
        is_read = mean.maximum > lowest / 2
        age = (places.unsqueeze(-1) - mean.average.squeeze(-1)) * is_read
        effective = mean.total.square() / squared.total.clamp_min(torch.finfo(logits.dtype).tiny) * is_read
        past.keep({"age": age, "squares": squared.total}, last)
        past.num_recorded += num_tokens
        if self.chunk_size is not None and self.chunk_size > 1:
            ends = chunk_ends(self.chunk_size, num_tokens, mask).to(logits.device).expand(len(logits), -1)
            index = ends.unsqueeze(-1).expand_as(age)
            ahead = index - torch.arange(num_tokens, device=logits.device).unsqueeze(-1)
            effective = effective.gather(1, index)
            age = (age.gather(1, index) - ahead) * (effective > 0)
        return age, effective

    def _rates(self, logits: Tensor) -> Optional[Tensor]:
        return None if self.forgetting is None else RATE * self.forgetting.to(logits.dtype).exp()


def _time_by_time(tokens: Tensor, channels: int) -> Tensor:
    """`(B, T·C, …)` from `(B, C·T, …)`."""
    return tokens.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1, 2)


def _channel_by_channel(tokens: Tensor, channels: int) -> Tensor:
    """`(B, C·T, …)` from `(B, T·C, …)`."""
    return tokens.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1, 2)
