"""The options of `peft-softmoa classify --follow`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from ..inference.incoming import IDLE_SECONDS


@dataclass
class FollowArguments:
    """How audio is read while it comes in."""

    follow: bool = field(
        default=False,
        metadata={
            "help": "Read one file that grows, named pipe, or - while it comes in, each window as soon as it is there: "
            "WAV, or raw PCM if --sampling_rate says so. With an adapter that is causal, routing goes on from window "
            "to window."
        },
    )
    idle_seconds: Optional[float] = field(
        default=None,
        metadata={
            "help": "With --follow, a file that has not grown for so many seconds has ended. "
            f"Default: {IDLE_SECONDS:g}."
        },
    )

    @property
    def idle(self) -> float:
        """The same, or its default."""
        return IDLE_SECONDS if self.idle_seconds is None else self.idle_seconds


def check_following(
    following: FollowArguments, words: Sequence[str], pcm: Mapping[str, Any], batch_size: Optional[int]
) -> None:
    """Refuse options that do not go with it.

    Args:
        following (FollowArguments): the options.
        words (sequence of str): what is classified.
        pcm (mapping): the options of raw PCM, None if they are not given.
        batch_size (int, optional): number of windows in a batch, if it is given.

    Raises:
        ValueError: if they do not go together.
    """
    if not following.follow:
        if following.idle_seconds is not None:
            raise ValueError("`idle_seconds` is for audio that comes in, with `follow`.")
        return
    if len(words) > 1 or "://" in words[0]:
        raise ValueError(f"`follow` reads one file or pipe while it comes in, got {' '.join(words)}.")
    if batch_size is not None:
        raise ValueError("`batch_size` is not for `follow`, where each result comes as soon as its window is there.")
    if not following.idle >= 0:
        raise ValueError(f"`idle_seconds` must not be negative, got {following.idle}.")
    if pcm["sampling_rate"] is None and any(value is not None for value in pcm.values()):
        raise ValueError(
            "With `follow`, raw PCM needs its `sampling_rate`; without, WAV is read, which says it itself."
        )
