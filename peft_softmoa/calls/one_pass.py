"""What one forward pass of a model carries, and what its blocks are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from torch import Tensor

from ..method.past import Past
from .caches import LayerCache
from .channels import Folded
from .masks import Mask
from .mixed_batch import MixedBatch


class Call(NamedTuple):
    """What a mixture is called with."""

    tokens: Tensor  # (B, T, D)
    mask: Optional[Tensor]  # (B, T), true for real tokens
    past: Optional[Past]  # what came before
    reading: Optional[tuple[Tensor, Tensor]]  # where in the past its slots read, if that is known


# Is called with an adapted block, an adapter's name, and what its mixture is called with.
Recorder = Callable[[Any, str, Call], None]

# Name of the model among its layers.
MODEL = ""


class CallKey(NamedTuple):
    """Which adapter has blocks in which layer."""

    adapter: str
    layer: str


class LayerCall:
    """What one call of a layer, or of the model, tells the adapted blocks of one adapter in it."""

    def __init__(self) -> None:
        self.tokens: dict[str, Any] = {}  # what each module is called with in which a block begins
        self.mask: Optional[Mask] = None
        self.mask_sources: set[str] = set()  # the modules that have told the mask, also that there is none
        self.mask_readers: set[str] = set()  # the blocks that have read it
        self.cache: Optional[LayerCache] = None  # of earlier tokens


class ForwardPass:
    """One forward pass.

    Args:
        mixed_batch (MixedBatch, optional): the adapter of each sample. Default: the active ones, for all.
    """

    def __init__(self, mixed_batch: Optional[MixedBatch] = None) -> None:
        self.mixed_batch = mixed_batch
        self.router_losses: Optional[list[Tensor]] = None  # None: they are not collected
        self.calls: dict[CallKey, LayerCall] = {}  # those that have begun and not ended
        self.folded: Optional[Folded] = None  # None: the clips have no channels

    @property
    def of_model(self) -> Optional[ForwardPass]:
        """The pass itself, if it is one of the model as a whole."""
        return self if any(key.layer == MODEL for key in self.calls) else None


class RouterLoss:
    """The load-balancing loss of the latest pass in training, and whether anybody has added it to another."""

    def __init__(self) -> None:
        self.value: Optional[Tensor] = None
        self.is_used = False
