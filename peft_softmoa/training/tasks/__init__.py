"""What models learn from audio: the tasks, and everything that depends on them."""

from .base import Clip, Task
from .choice import TASKS, find_task, make_task, parse_weights
from .frames import FrameClassification
from .labels import MultiLabel, Regression, SingleLabel
from .text import CTC, SpeechSeq2Seq

__all__ = [
    "CTC",
    "TASKS",
    "Clip",
    "FrameClassification",
    "MultiLabel",
    "Regression",
    "SingleLabel",
    "SpeechSeq2Seq",
    "Task",
    "find_task",
    "make_task",
    "parse_weights",
]
