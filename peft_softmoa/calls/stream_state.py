"""What the mixtures of a model keep of a stream."""

from __future__ import annotations

import copy
from typing import Any, Optional
from weakref import ReferenceType, ref

from ..method.past import Past
from .caches import BlockKey


class StreamState:
    """What each mixture keeps of a stream, from one piece to the next.

    All mixtures that have read its first piece read each: one that has missed a piece, or begins later, would go on as
    if there had been nothing.
    """

    def __init__(self) -> None:
        self.pasts: dict[BlockKey, Past] = {}
        self._piece: Optional[ReferenceType[Any]] = None  # the pass in which the latest piece is read
        self._begins = True
        self._read: set[BlockKey] = set()  # those that have read it

    def past(self, key: BlockKey, piece: Any) -> Past:
        """What a mixture keeps.

        Args:
            key (BlockKey): the block and the adapter.
            piece (ForwardPass, optional): the pass of the model as a whole; None if only a part of it is called.

        Returns:
            Past: to be read and gone on with.

        Raises:
            ValueError: if it, or another mixture, has missed a piece.
        """
        if piece is not None and (self._piece is None or piece is not self._piece()):
            missed = self.pasts.keys() - self._read
            if missed and self._piece is not None:
                raise ValueError(self._explain(min(missed)))
            self._piece, self._begins, self._read = ref(piece), not self.pasts, set()
        if piece is not None and key not in self.pasts and not self._begins:
            raise ValueError(self._explain(key))
        self._read.add(key)
        return self.pasts.setdefault(key, Past())

    def check_off(self, block: str) -> None:
        """Check that no adapter of a block has read earlier pieces, where adapters are disabled."""
        key: Optional[BlockKey] = next((each for each in self.pasts if each[0] == block), None)
        if key is not None:
            raise ValueError(self._explain(key))

    def reset(self) -> None:
        """Begin anew."""
        self.pasts.clear()
        self._piece, self._begins, self._read = None, True, set()

    def copy(self) -> StreamState:
        """Another one in the same state."""
        other = copy.copy(self)
        other.pasts = {key: past.copy() for key, past in self.pasts.items()}
        other._read = set(self._read)
        return other

    def _explain(self, key: BlockKey) -> str:
        return (
            f"The adapter '{key[1]}' in '{key[0]}' misses a piece of the stream, because a call has failed, or the "
            "adapter was not in use. Reset the stream, or go on from a copy that was made before."
        )
