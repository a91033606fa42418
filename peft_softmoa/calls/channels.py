"""Which rows of a batch are the channels of a clip, and which channels are there.

Letters of all shapes: B batch, C channels, k windows of a channel, T tokens. In a model that is called with clips of C
channels, rows are samples `(B·C, …)`, those of a clip one after another, or their windows `(B·C·k, …)`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional
from weakref import WeakSet

import torch
from torch import Tensor, nn

# Under this name the graph of a pass keeps its channels.
KEPT = "softmoa_channels"


class Channels:
    """The channels of the clips of one forward pass.

    Args:
        batch (int): B.
        count (int): C.
        present (Tensor, optional): `(B, C)` boolean, true for channels that are there. Default: all are.
    """

    def __init__(self, batch: int, count: int, present: Optional[Tensor] = None) -> None:
        self.batch, self.count, self.present = batch, count, present

    def equals(self, other: Channels) -> bool:
        """Whether the clips of another pass have the same channels."""
        if (self.batch, self.count) != (other.batch, other.count):
            return False
        if self.present is None or other.present is None:
            return self.present is other.present
        return torch.equal(self.present, other.present)

    def select(self, clips: Sequence[int]) -> Channels:
        """The channels of some of the clips.

        Args:
            clips (sequence of int): their indices.

        Returns:
            Channels: in the same order.
        """
        return Channels(len(clips), self.count, None if self.present is None else self.present[list(clips)])

    def rows(self) -> Optional[Tensor]:
        """From which row each row is filled, so that a missing channel holds what another one of its clip does.

        Returns:
            Tensor, optional: `(B·C,)` indices; None if no channel is missing.
        """
        if self.present is None:
            return None
        channels = torch.arange(self.count, device=self.present.device)
        first = self.present.int().argmax(dim=1, keepdim=True)
        clips = torch.arange(self.batch, device=self.present.device).unsqueeze(1)
        return (clips * self.count + torch.where(self.present, channels, first)).flatten()

    def join_all(
        self, hidden: Tensor, tokens: Tensor, mask: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """What a mixture is called with, for all channels of a clip together.

        Args:
            hidden (Tensor): `(B·C·k, T, D')`.
            tokens (Tensor): `(B·C·k, T, D)`.
            mask (Tensor, optional): `(B·C·k, T)` boolean, true for real tokens. Default: all are real.

        Returns:
            tuple[Tensor, Tensor, Optional[Tensor]]: the same, joined; the mask is false for missing channels.
        """
        mask = self.mask(mask, tokens)
        return self.join(hidden), self.join(tokens), None if mask is None else self.join(mask)

    def join(self, rows: Tensor) -> Tensor:
        """Put the tokens of a clip's channels into one row, those of a window of all of its channels.

        Args:
            rows (Tensor): `(B·C·k, T, …)`.

        Returns:
            Tensor: `(B·k, C·T, …)`, channel by channel.

        Raises:
            ValueError: if the rows are not those of the channels.
        """
        if rows.shape[0] == self.batch * self.count:
            return rows.unflatten(0, (self.batch, self.count)).flatten(1, 2)
        if rows.shape[0] % (self.batch * self.count):
            raise ValueError(
                f"It is called with {rows.shape[0]} rows, which are not those of {self.batch} clips of {self.count} "
                "channels: clips that a model packs have no channels. Adapt another block, or mix the channels down."
            )
        by_channel = rows.unflatten(0, (self.batch, self.count, -1))
        return by_channel.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def split(self, joined: Tensor) -> Tensor:
        """The opposite of `join`: `(B·C·k, T, …)` from `(B·k, C·T, …)`."""
        by_channel = joined.unflatten(1, (self.count, -1))
        if joined.shape[0] == self.batch:
            return by_channel.flatten(0, 1)
        return by_channel.unflatten(0, (self.batch, -1)).transpose(1, 2).flatten(0, 2)

    def mask(self, mask: Optional[Tensor], rows: Tensor) -> Optional[Tensor]:
        """Which tokens are real, and of a channel that is there.

        Args:
            mask (Tensor, optional): `(B·C·k, T)` boolean, true for real tokens. Default: all are real.
            rows (Tensor): the tokens, `(B·C·k, T, …)`.

        Returns:
            Tensor, optional: `(B·C·k, T)` boolean; None if all are.
        """
        if self.present is None:
            return mask
        windows = rows.shape[0] // (self.batch * self.count)
        present = self.present.flatten().repeat_interleave(windows).unsqueeze(1).expand(rows.shape[:2])
        return present if mask is None else mask & present

    def average(self, rows: Tensor) -> Tensor:
        """The mean over the channels of each clip that are there.

        Args:
            rows (Tensor): `(B·C, …)`, finite also for missing channels.

        Returns:
            Tensor: `(B·C, …)`, the same for all channels of a clip.
        """
        by_channel = rows.unflatten(0, (self.batch, self.count))
        if self.present is None:
            mean = by_channel.mean(dim=1, keepdim=True)
        else:
            weights = self.present.to(rows.dtype).reshape(self.batch, self.count, *[1] * (rows.ndim - 1))
            mean = (by_channel * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
        return mean.expand_as(by_channel).flatten(0, 1)

    def by_clip(self, rows: Tensor) -> Tensor:
        """`(B, C, …)` from `(B·C, …)`, or `(B, C, k, …)` from `(B·C·k, …)`; anything else stays as it is."""
        samples = self.batch * self.count
        if rows.ndim == 0 or rows.shape[0] % samples:
            return rows
        own = () if rows.shape[0] == samples else (-1,)
        return rows.unflatten(0, (self.batch, self.count, *own))


@dataclass
class Folded:
    """How one call of a model has taken the channels of its clips for samples.

    Args:
        channels (Channels): the channels.
        adapter_name (str): the adapter whose hook has done it, and gives the clips back.
        head (nn.Module, optional): what makes the logits; None if nothing does.
        masks (list[Tensor]): masks of tokens, a row for each channel, `(B·C, T)`; that of a missing one is another's.
        averaged (Tensor, optional): the mean logits, as the head has given them; None before it has run.
    """

    channels: Channels
    adapter_name: str
    head: Optional[nn.Module]
    masks: list[Tensor]
    averaged: Optional[Tensor] = None


def keep_channels(kept: WeakSet[Channels], channels: Channels, outputs: Iterable[Any]) -> None:
    """Keep the channels of a pass as long as its graph, which gradient checkpointing may run again.

    Args:
        kept (WeakSet): where they are found again.
        channels (Channels): the channels.
        outputs (iterable): what the model returns; tensors are part of the graph.
    """
    for output in outputs:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            metadata: dict[Any, Any] = output.grad_fn.metadata  # type: ignore[assignment]
            metadata[KEPT] = channels
            kept.add(channels)


def only_channels(kept: Collection[Channels]) -> Optional[Channels]:
    """The channels of the pass that a backward pass runs again.

    Args:
        kept (collection): those of all passes whose graphs are still there.

    Returns:
        Channels, optional: None if there are none.

    Raises:
        ValueError: if they differ, so that it is not known which ones they are.
    """
    found = list(kept)
    if any(not found[0].equals(other) for other in found):
        raise ValueError(
            "Under gradient checkpointing, the backward pass runs blocks again, but it is not known with which "
            "channels: there are outputs of several forward passes, whose clips differ in them. Run the backward pass "
            "after each forward pass, keep no outputs of earlier ones, or train without gradient checkpointing."
        )
    return found[0] if found else None


def check_channels(
    found: Optional[Channels], num_channels: Optional[int], is_packed: bool, in_backward: bool
) -> Optional[Channels]:
    """Check that a mixture gets the clips that it is for.

    Args:
        found (Channels, optional): the channels of the pass; None if its clips have none, or nothing is known of them.
        num_channels (int, optional): how many the mixture is for; None: it is for mono clips.
        is_packed (bool): whether the model packs samples one after another.
        in_backward (bool): whether a backward pass runs the block again; channels may then be those of another pass.

    Returns:
        Channels, optional: those that the mixture joins; None if it is for mono clips.

    Raises:
        ValueError: if they do not fit.
    """
    if num_channels is None:
        if found is not None and not in_backward:
            raise ValueError("Adapters with and without `num_channels` are not used together: their inputs differ.")
        return None
    if is_packed:
        raise ValueError("Clips that a model packs one after another have no channels. Leave out `num_channels`.")
    if found is None:
        raise ValueError(
            "Its adapter is for clips of several channels, but which rows are those of a clip is not known. Call the "
            "model itself, not a part of it; under gradient checkpointing, keep its outputs for the backward pass."
        )
    return found
