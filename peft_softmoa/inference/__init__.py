"""Trained adapters at work."""

from .classify import Classifier, WindowScores, classify_windows, load_classifier
from .loading import load_adapter
from .segments import Segment, Segments
from .windows import Meter, Window, cut_windows, find_clips, pcm_blocks

__all__ = [
    "Classifier",
    "Meter",
    "Segment",
    "Segments",
    "Window",
    "WindowScores",
    "classify_windows",
    "cut_windows",
    "find_clips",
    "load_adapter",
    "load_classifier",
    "pcm_blocks",
]
