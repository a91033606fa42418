"""Trained adapters at work."""

from .classify import Classifier, WindowScores, classify_windows, load_classifier
from .follow import classify_following, follow, following_window
from .incoming import PCM, IncomingAudio
from .loading import load_adapter
from .segments import Segment, Segments
from .windows import Meter, Window, cut_windows, find_clips, pcm_blocks

__all__ = [
    "PCM",
    "Classifier",
    "IncomingAudio",
    "Meter",
    "Segment",
    "Segments",
    "Window",
    "WindowScores",
    "classify_following",
    "classify_windows",
    "cut_windows",
    "find_clips",
    "follow",
    "following_window",
    "load_adapter",
    "load_classifier",
    "pcm_blocks",
]
