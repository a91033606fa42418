"""Audio streams, metrics and callbacks for the Hugging Face Trainer."""

from .callbacks import LogRouterLoss
from .data import (
    AudioError,
    ExtractFeatures,
    SizedStream,
    audio_stream,
    class_names,
    decode_audio,
    load_rows,
    parse_selection,
    select_rows,
    survey_rows,
)
from .metrics import Accuracy, MacroF1, classification_metrics

__all__ = [
    "Accuracy",
    "AudioError",
    "ExtractFeatures",
    "LogRouterLoss",
    "MacroF1",
    "SizedStream",
    "audio_stream",
    "class_names",
    "classification_metrics",
    "decode_audio",
    "load_rows",
    "parse_selection",
    "select_rows",
    "survey_rows",
]
