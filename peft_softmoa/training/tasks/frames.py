"""Labels in time: which events each frame of a clip is in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Optional

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForAudioFrameClassification

from ..frames import FrameGrid, find_frames
from ..rows import label_name
from .base import Clip
from .labels import MultiLabel

# What datasets call the parts of an event.
START, END, LABEL = ("start", "onset", "start_time"), ("end", "offset", "end_time"), ("label", "event_label", "class")


class Event(NamedTuple):
    """A label with its time.

    Args:
        start (float): in seconds.
        end (float): in seconds.
        label (str): what it is.
    """

    start: float
    end: float
    label: str


@dataclass
class FrameClassification(MultiLabel):
    """Events in time: any number of labels for each frame of a clip, with binary cross entropies, and a mask.

    A row has a list of events, each a mapping with `start`, `end` (seconds) and `label`, or the same as JSON. A frame
    has the labels of the events in which its middle lies; an event that is too short for that has the frame nearest to
    its own middle. A row without a value has no events. `prepare` asks the model where its frames lie. The arguments
    are those of `MultiLabel`.
    """

    _grid: Optional[FrameGrid] = field(default=None, repr=False)

    name: ClassVar[str] = "audio-frame-classification"
    label_column: ClassVar[str] = "events"
    model_class: ClassVar[Any] = AutoModelForAudioFrameClassification

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_weights == "balanced":
            raise ValueError(
                "`class_weights='balanced'` is for labels of whole clips: how many frames have a class is not counted. "
                "Give a number for each class."
            )

    def prepare(self, model: nn.Module, feature_extractor: Any) -> None:
        self._grid = find_frames(model, feature_extractor)

    def parse(self, values: Mapping[str, Any], where: str) -> list[Event]:  # type: ignore[override]
        if len(values) > 1:
            raise ValueError(
                f"`label_column` must be one column with events for `task={self.name}`, got {','.join(values)}."
            )
        [(column, given)] = values.items()
        problem = (
            f"{where}: column '{column}' must be a list of events, such as "
            '[{"start": 0.5, "end": 1.25, "label": "dog"}], as JSON or as a column of structs'
        )
        if isinstance(given, str):
            try:
                given = json.loads(given) if given.strip() else None
            except ValueError as error:
                raise ValueError(f"{problem}; got {given[:60]!r}.") from error
        if given is None or (isinstance(given, float) and math.isnan(given)):  # an empty cell
            given = []
        if isinstance(given, dict):  # how Parquet may store a list of structs
            given = [dict(zip(given, each)) for each in zip(*given.values())]
        if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
            raise ValueError(f"{problem}; got {str(given)[:60]!r}.")
        return [self._event(each, f"{problem}; got {str(each)[:60]!r}.", column, where) for each in given]

    def _event(self, event: dict[str, Any], problem: str, column: str, where: str) -> Event:
        found = [next((event[name] for name in names if name in event), None) for names in (START, END, LABEL)]
        try:
            start, end = float(found[0]), float(found[1])  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(problem) from error
        if not (math.isfinite(start) and 0 <= start < end < math.inf):
            raise ValueError(
                f"{where}: an event in column '{column}' begins at {start} s and ends at {end} s, but it must begin at "
                "0 or later, and end after that."
            )
        return Event(start, end, label_name(found[2], self.declared.get(column), where))

    def labels_in(self, target: list[Event]) -> Iterable[str]:  # type: ignore[override]
        return (event.label for event in target)

    def encode(self, target: list[Event], where: str, clip: Clip) -> Any:  # type: ignore[override]
        if self._grid is None:
            raise ValueError(
                "The frames of the model are not known yet: call `task.prepare(model, feature_extractor)`, as "
                "AudioTrainer does, before the stream is read."
            )
        middles = self._grid.middles(clip.num_samples) / clip.sampling_rate + clip.start
        labels = np.zeros((len(middles), len(self.label_names)), np.float32)
        length = clip.num_samples / clip.sampling_rate
        for event in target:
            index = self._check_class(event.label, where)
            inside = (middles >= event.start) & (middles < event.end)
            middle = (event.start + event.end) / 2
            if not inside.any() and clip.start <= middle < clip.start + length:
                inside[np.abs(middles - middle).argmin()] = True
            labels[inside, index] = 1.0
        return labels

    def loss(self, logits: Tensor, labels: Tensor, num_items: Optional[Tensor | int] = None) -> Tensor:
        if logits.shape != labels.shape:
            raise ValueError(
                f"The model gives {tuple(logits.shape)} logits (batch, frames, classes) for {tuple(labels.shape)} "
                "labels: its frames are not those that its encoder reads."
            )
        return super().loss(logits, labels, num_items)
