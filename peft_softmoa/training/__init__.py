"""Audio streams, metrics, checkpoints and callbacks, for the Hugging Face Trainer and for loops of one's own."""

from .augment import spec_augment
from .callbacks import LogRouterLoss
from .checkpoints import begin_run, checkpoint_only_adapters, newest_checkpoint, note_run, whole_checkpoint
from .data import (
    AudioError,
    ExtractFeatures,
    Survey,
    check_apart,
    class_names,
    decode_audio,
    load_rows,
    parse_selection,
    reads_single_columns,
    select_rows,
    survey_metadata,
    survey_rows,
)
from .metrics import Accuracy, MacroF1, classification_metrics
from .network import patiently
from .streams import AudioStream, load_stream, make_eval_loader, make_loader
from .trainer import AudioTrainer

__all__ = [
    "Accuracy",
    "AudioError",
    "AudioStream",
    "AudioTrainer",
    "ExtractFeatures",
    "LogRouterLoss",
    "MacroF1",
    "Survey",
    "begin_run",
    "check_apart",
    "checkpoint_only_adapters",
    "class_names",
    "classification_metrics",
    "decode_audio",
    "load_rows",
    "load_stream",
    "make_eval_loader",
    "make_loader",
    "newest_checkpoint",
    "note_run",
    "parse_selection",
    "patiently",
    "reads_single_columns",
    "select_rows",
    "spec_augment",
    "survey_metadata",
    "survey_rows",
    "whole_checkpoint",
]
