"""Audio streams, tasks, metrics, checkpoints and callbacks, for the Hugging Face Trainer and for loops of one's own."""

from .audio import AudioError, decode_audio
from .augment import mixup, spec_augment, swap_channels
from .callbacks import LogRouterLoss
from .checkpoints import (
    atomic_checkpoint,
    checkpoint_only_adapters,
    lock_run,
    newest_checkpoint,
    read_run_state,
    start_or_resume,
    write_run_state,
)
from .classes import check_classes
from .features import ExtractFeatures
from .fingerprint import fingerprint_config, fingerprint_weights
from .frames import shortest_clip
from .inputs import Collate, cast_inputs
from .load import load_stream
from .loaders import make_eval_loader, make_loader
from .losses import compute_loss, loss_function
from .metrics import (
    Accuracy,
    CharacterErrorRate,
    MacroF1,
    MeanAbsoluteError,
    MeanAveragePrecision,
    PearsonCorrelation,
    UnweightedAverageRecall,
    WordErrorRate,
    classification_metrics,
    compute_metrics,
)
from .network import retry
from .options import DataOptions, collect_options, flag_names, name_flags, option
from .rows import DatasetSummary, check_no_shared_rows, class_names, parse_selection, select_rows, summarize_rows
from .source import Source, load_rows, open_source
from .streams import AudioStream
from .tasks import (
    CTC,
    FrameClassification,
    MultiLabel,
    Regression,
    SingleLabel,
    SpeechSeq2Seq,
    Task,
    find_task,
    make_task,
)
from .trainer import AudioTrainer

__all__ = [
    "CTC",
    "Accuracy",
    "AudioError",
    "AudioStream",
    "AudioTrainer",
    "CharacterErrorRate",
    "Collate",
    "DataOptions",
    "DatasetSummary",
    "ExtractFeatures",
    "FrameClassification",
    "LogRouterLoss",
    "MacroF1",
    "MeanAbsoluteError",
    "MeanAveragePrecision",
    "MultiLabel",
    "PearsonCorrelation",
    "Regression",
    "SingleLabel",
    "Source",
    "SpeechSeq2Seq",
    "Task",
    "UnweightedAverageRecall",
    "WordErrorRate",
    "atomic_checkpoint",
    "cast_inputs",
    "check_classes",
    "check_no_shared_rows",
    "checkpoint_only_adapters",
    "class_names",
    "classification_metrics",
    "collect_options",
    "compute_loss",
    "compute_metrics",
    "decode_audio",
    "find_task",
    "fingerprint_config",
    "fingerprint_weights",
    "flag_names",
    "load_rows",
    "load_stream",
    "lock_run",
    "loss_function",
    "make_eval_loader",
    "make_loader",
    "make_task",
    "mixup",
    "name_flags",
    "newest_checkpoint",
    "open_source",
    "option",
    "parse_selection",
    "read_run_state",
    "retry",
    "select_rows",
    "shortest_clip",
    "spec_augment",
    "start_or_resume",
    "summarize_rows",
    "swap_channels",
    "write_run_state",
]
