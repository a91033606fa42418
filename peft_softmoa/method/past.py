"""What a mixture keeps of the tokens before those that it is called with.

Letters of all shapes: B batch, T tokens, T' tokens kept, N experts, S slots, R bottleneck, K size of a kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from .scan import Averages


class Past:
    """The state of one mixture in a stream of tokens, for each sample of a batch.

    It begins empty. Each call of the mixture reads it, and leaves in it what the next call needs: of soft routing the
    running averages, S·(R + 2) numbers, and of a convolution what its kernel reaches back to, (K - 1)·N·R numbers.
    Nothing in it has a gradient.

    Args:
        skips_padding (bool): whether padding before and after the real tokens is no part of the stream, so that
            streams which begin and end apart can be in one batch. If false, padded tokens have a place in time, as
            they have within a call. Default: True.
        history (bool): whether the state after each token is kept, so that the last tokens can be taken back. Not with
            `skips_padding`. Default: False.
    """

    def __init__(self, *, skips_padding: bool = True, history: bool = False) -> None:
        if skips_padding and history:
            raise ValueError("`history` must be False with `skips_padding`: its samples end at different tokens.")
        self.skips_padding, self.history = skips_padding, history
        # After each token that is kept, (B, T', …). Only the last one is read, and the last K - 1 of `hidden`.
        self.tensors: dict[str, Tensor] = {}
        self.num_tokens = 0  # padding counts, too
        self.num_recorded = 0  # those of which it is kept how old they are in what slots read

    @property
    def batch(self) -> Optional[int]:
        """B; None if it is empty."""
        return next((len(tensor) for tensor in self.tensors.values()), None)

    def ends(self, like: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        """Where the real tokens of a call begin and end.

        Args:
            like (Tensor): any of `(B, T, …)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.

        Returns:
            tuple[Tensor, Tensor]: the first and the last one, `(B,)` integers; 0 and -1 if there is none.
        """
        batch, num_tokens = like.shape[:2]
        places = torch.arange(num_tokens, device=like.device).expand(batch, -1)
        if mask is None or not self.skips_padding:
            return places[:, 0], places[:, -1]
        first = places.masked_fill(~mask, num_tokens).amin(dim=1)
        return first.where(first < num_tokens, 0), places.masked_fill(~mask, -1).amax(dim=1)

    def running(self, first: Tensor, rates: Optional[Tensor]) -> Optional[Averages]:
        """The running averages as one more token, before those of a call.

        Args:
            first (Tensor): the first real token of the call, `(B,)`.
            rates (Tensor, optional): λ, `(S,)`. Default: 0.

        Returns:
            Averages, optional: of one token; None if it is empty.
        """
        if "maximum" not in self.tensors:
            return None
        average, total, maximum = (self.tensors[name][:, -1:] for name in ("average", "total", "maximum"))
        if rates is not None:  # padding does not make it older
            maximum = maximum + first.view(-1, 1, 1) * rates
        return Averages(average, total, maximum)

    def keep_averages(self, averages: Averages, last: Tensor) -> None:
        """Go on with the running averages of a call.

        Args:
            averages (Averages): `(B, T, S, R)` and `(B, T, S)`.
            last (Tensor): the last real token, `(B,)`.
        """
        given = {"average": averages.average, "total": averages.total, "maximum": averages.maximum}
        self.keep(given, last)

    def keep(self, given: Mapping[str, Tensor], last: Tensor) -> None:
        """Keep what is known after each token of a call.

        Args:
            given (mapping): by name, `(B, T, …)` each.
            last (Tensor): the last real token, `(B,)`.
        """
        for name, tensor in given.items():
            before = self.tensors.get(name)
            if before is None and self.history:
                self.tensors[name] = tensor.detach()
                continue
            if before is None:
                before = torch.full_like(tensor[:, :1], _empty(name, tensor))
            joined = torch.cat([before, tensor.detach()], dim=1)
            self.tensors[name] = joined if self.history else _take(joined, before.shape[1] + last, 1)

    def before(self, hidden: Tensor, reach: int, first: Tensor, last: Tensor) -> Tensor:
        """Put in front of each token what a causal convolution reads there, and go on with these tokens.

        Args:
            hidden (Tensor): what the convolution reads, zero at padding, `(B, T, N·R)`.
            reach (int): K - 1.
            first (Tensor): the first real token, `(B,)`.
            last (Tensor): the last real token, `(B,)`.

        Returns:
            Tensor: `(B, K - 1 + T, N·R)`.
        """
        nothing = hidden.new_zeros(len(hidden), reach, hidden.shape[2])
        kept = self.tensors.get("hidden", nothing)
        joined = torch.cat([nothing, hidden], dim=1)
        places = first.unsqueeze(1) + torch.arange(reach, device=hidden.device)
        latest = kept[:, kept.shape[1] - reach :]
        joined = joined.scatter(1, places.unsqueeze(-1).expand_as(latest), latest)
        if self.history:
            self.tensors["hidden"] = torch.cat([kept, hidden.detach()], dim=1)
        else:
            self.tensors["hidden"] = _take(joined.detach(), last + 1, reach)
        return joined

    def check_chunks(self, chunk_size: int, first: Tensor, last: Tensor) -> None:
        """Check that the tokens of a call begin with a chunk, and go on with them.

        Args:
            chunk_size (int): number of tokens in a chunk.
            first (Tensor): the first real token, `(B,)`.
            last (Tensor): the last real token, `(B,)`.

        Raises:
            ValueError: if they do not.
        """
        given = (last - first + 1).unsqueeze(1)
        before = self.tensors.get("count", torch.zeros_like(given))
        if ((before % chunk_size != 0) & (given > 0)).any():
            raise ValueError(
                f"With chunk_size={chunk_size}, each token reads up to the end of its chunk, but the "
                f"{before.flatten().tolist()} tokens before these end within one. Give pieces of multiples of "
                f"{chunk_size} tokens; only the last one may be shorter."
            )
        self.tensors["count"] = before + given

    def check(self, tokens: Tensor, channels: int = 1) -> None:
        """Check that a call is of as many samples as the calls before, and count its tokens.

        Args:
            tokens (Tensor): `(B, C·T, D)`.
            channels (int): C, whose tokens of one time count once. Default: 1.

        Raises:
            ValueError: if it is not.
        """
        self.check_batch(tokens)
        self.num_tokens += tokens.shape[1] // channels

    def check_batch(self, tokens: Tensor) -> None:
        """Check that a call is of as many samples as the calls before.

        Args:
            tokens (Tensor): `(B, T, D)`.

        Raises:
            ValueError: if it is not.
        """
        if self.batch not in (None, len(tokens)):
            raise ValueError(
                f"What came before is of {self.batch} samples, but there are {len(tokens)} now. Select those that "
                "go on, or reset all."
            )

    def select(self, rows: Tensor) -> None:
        """Keep some samples, in another order, also several times.

        Args:
            rows (Tensor): their indices, integers.
        """
        self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def crop(self, num_tokens: int) -> None:
        """Take the last tokens back.

        Args:
            num_tokens (int): how many.

        Raises:
            ValueError: if it keeps no history.
        """
        if num_tokens and not self.history:
            raise ValueError(
                "Of caches that slide or have a fixed size, the adapter keeps only its latest state, so that no tokens "
                "can be taken back, as guessed ones are. Generate without guesses, or with `use_cache=False`."
            )
        self.num_tokens -= num_tokens
        self.num_recorded -= num_tokens
        self._map(lambda tensor: tensor[:, : tensor.shape[1] - num_tokens])

    def reset(self, rows: Optional[Tensor] = None) -> None:
        """Begin anew.

        Args:
            rows (Tensor, optional): indices of the samples that do. Default: all, and their number may change.
        """
        if rows is None:
            self.tensors.clear()
            self.num_tokens = self.num_recorded = 0
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.index_fill(0, rows.to(tensor.device), _empty(name, tensor))  # type: ignore[union-attr]

    def to(self, device: Any) -> None:
        """Move it to a device."""
        self._map(lambda tensor: tensor.to(device))

    def copy(self) -> Past:
        """Another one in the same state; its tensors are never changed in place."""
        other = copy.copy(self)
        other.tensors = dict(self.tensors)
        return other

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}


def _empty(name: str, like: Tensor) -> float:
    return torch.finfo(like.dtype).min if name == "maximum" else 0.0


def _take(tensor: Tensor, start: Tensor, length: int) -> Tensor:
    """Some places in time of `(B, T, …)`, from `start`, `(B,)`, on."""
    places = start.unsqueeze(1) + torch.arange(length, device=tensor.device)
    return tensor.gather(1, places.view(*places.shape, *[1] * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:]))
