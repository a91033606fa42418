"""When in a clip each class is heard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .classify import WindowScores


class Segment(NamedTuple):
    """A class that is heard from one time to another, in seconds."""

    start: float
    end: float
    label: str

    def audacity(self) -> str:
        """The segment in an Audacity label track.

        Returns:
            str: one line, with its end.
        """
        return f"{self.start:.6f}\t{self.end:.6f}\t{' '.join(self.label.split())}\n"


class Segments:
    """Neighbouring windows of a clip whose score of a class is at least a threshold, merged into segments.

    Args:
        label_names (Sequence[str]): the classes.
        threshold (float): the threshold.
    """

    def __init__(self, label_names: Sequence[str], threshold: float) -> None:
        self.label_names = label_names
        self.threshold = threshold
        self._open: dict[int, Segment] = {}

    def add(self, result: WindowScores) -> list[Segment]:
        """Add the next window of the clip.

        Args:
            result (WindowScores): its result.

        Returns:
            list[Segment]: the segments that have ended before it.
        """
        heard = {index for index, score in enumerate(result.scores) if score >= self.threshold}
        going = {index for index in heard & self._open.keys() if result.start <= self._open[index].end}
        ended = [self._open.pop(index) for index in sorted(self._open.keys() - going)]
        for index in heard:
            start = self._open[index].start if index in going else result.start
            self._open[index] = Segment(start, result.end, self.label_names[index])
        return ended

    def close(self) -> list[Segment]:
        """End all segments, as the clip ends.

        Returns:
            list[Segment]: those that had not ended before.
        """
        ended = [self._open[index] for index in sorted(self._open)]
        self._open = {}
        return ended
