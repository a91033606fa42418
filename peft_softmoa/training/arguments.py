"""The options of a training run, as dataclasses from which commands and scripts make their arguments."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Optional

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, Seq2SeqTrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

from ..arguments import AdapterArguments
from .augment import parse_mirror
from .channels import parse_channels
from .metrics import LOWER_IS_BETTER
from .network import retry
from .options import collect_options, option
from .tasks import Task, make_task, parse_weights

# The paper's optimisation, and an evaluation after every epoch.
TRAINING_DEFAULTS = {
    "learning_rate": 5e-3,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_strategy": "epoch",
    "hub_strategy": "end",
    "predict_with_generate": True,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
# The training arguments that must stay the same when a run resumes, besides the model, the data and the adapter.
SETTINGS = (
    *("seed", "data_seed", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_num_workers"),
    *("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices", "bf16", "fp16"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
# Those that choose the best checkpoint; they may change where none is chosen.
CHOICE = (
    *("eval_split_name", "eval_rows", "eval_strategy", "eval_steps", "metrics", "normalize_text"),
    *("predict_with_generate", "generation_max_length", "generation_num_beams"),
)
# The other arguments that may change: they do not affect the training.
OTHER = ("token", "cache_dir", "log_experts_steps", "test_split_name", "test_rows")


@dataclass
class ModelArguments:
    """The base model, and how the Hub is used."""

    model_name_or_path: str = field(
        default="MIT/ast-finetuned-audioset-10-10-0.4593",
        metadata={"help": "Id on the Hub or folder of an audio transformer."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={"help": "Dtype of the base model's weights in training; auto is the one in which they are stored."},
    )
    feature_extractor_name: Optional[str] = field(
        default=None, metadata={"help": "Id or folder of the feature extractor, if it is not the model's."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Modules that are trained in full, besides the adapter. Default: the head, if the task has one."
        },
    )
    log_experts_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps between logs of how the experts are used. Default: no logs."},
    )
    cache_dir: Optional[str] = option("cache_dir")
    token: Optional[str] = option("token")

    def hub_options(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` for this model."""
        return {"revision": self.model_revision, "cache_dir": self.cache_dir, "token": self.token}


@dataclass
class TaskArguments:
    """What the model learns."""

    task: Literal["audio-classification", "audio-frame-classification", "ctc", "speech-seq2seq"] = field(
        default="audio-classification",
        metadata={
            "help": "What the model learns: classes or numbers of a clip (problem_type says which), events in time, "
            "or the text that is spoken, by CTC (wav2vec 2.0, …) or by a decoder (Whisper, …)."
        },
    )
    class_weights: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Weights of the classes in the loss: a number for each, or balanced, which makes rare classes "
            "count as much as frequent ones. Default: all the same."
        },
    )
    label_separator: Optional[str] = field(
        default=None,
        metadata={"help": "What stands between several labels in one column. Default: a comma."},
    )
    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Mixup: clips of a batch are mixed with a share from Beta(a, a). Default: no mixup."},
    )
    vocabulary: Optional[Literal["texts", "model"]] = field(
        default=None,
        metadata={
            "help": "For ctc: a vocabulary of the characters in the texts, with a head for it, or the model's own. "
            "Default: the model's, if it was trained for CTC."
        },
    )
    text_case: Optional[Literal["lower", "upper"]] = field(
        default=None, metadata={"help": "The case into which texts are put. Default: texts stay as they are."}
    )
    language: Optional[str] = field(
        default=None, metadata={"help": "Language of the texts, for a Whisper of many languages."}
    )
    speech_task: Optional[Literal["transcribe", "translate"]] = field(
        default=None, metadata={"help": "What such a Whisper does."}
    )
    metrics: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Metrics of the evaluation: accuracy, f1_macro, unweighted_average_recall, mean_average_precision, "
            "mae, pearson, wer, cer, or ids that evaluate.load knows. Default: two that go with the task."
        },
    )
    normalize_text: bool = field(
        default=False, metadata={"help": "Compare texts in lower case and without punctuation in the metrics."}
    )


@dataclass
class DataArguments:
    """The data for training, evaluation and test."""

    dataset_name: str = field(
        metadata={"help": "Id of a dataset on the Hub, or a folder of one of the layouts in the documentation."}
    )
    dataset_config_name: Optional[str] = option("config_name")
    dataset_revision: Optional[str] = option("revision")
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split_name: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    train_rows: Optional[str] = field(
        default=None, metadata={"help": "Rows to train on, by the values of a column, such as fold=1,2,3,4."}
    )
    eval_rows: Optional[str] = field(
        default=None, metadata={"help": "Rows to evaluate on, by the values of a column, such as fold=5."}
    )
    test_split_name: Optional[str] = field(
        default=None, metadata={"help": "Split to test the trained model on, once. Default: none."}
    )
    test_rows: Optional[str] = field(
        default=None, metadata={"help": "Rows to test it on, by the values of a column, such as fold=4."}
    )
    audio_column_name: str = option("audio_column")
    label_column_name: Optional[str] = option(
        "label_column", default=None, more="Default: label, text for recognition, events for events in time."
    )
    max_length_seconds: Optional[float] = option("max_length_seconds")
    mask_frequencies: int = field(
        default=0, metadata={"help": "SpecAugment: a band of up to so many mel bins is set to zero in training."}
    )
    mask_frames: int = field(
        default=0, metadata={"help": "SpecAugment: a span of up to so many frames is set to zero in training."}
    )
    channels: Optional[list[str]] = option("channels")
    mirror_labels: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "In training, the channels of every second clip, drawn at random, come in reverse order, and these "
            "classes change places, such as left=right. Default: channels keep their order."
        },
    )
    streaming: bool = option("streaming")
    shuffle_buffer_size: int = option("shuffle_buffer")
    on_bad_audio: Literal["skip", "raise"] = option("on_bad_audio")

    def __post_init__(self) -> None:
        # The same setting for a command and for Python.
        vars(self).update(
            channels=parse_channels(self.channels), mirror_labels=parse_mirror(self.mirror_labels) or None
        )


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """The Trainer's own arguments, which know which of the package's metrics are better the lower they are."""

    def __post_init__(self) -> None:
        if (
            self.greater_is_better is None
            and (self.metric_for_best_model or "").removeprefix("eval_") in LOWER_IS_BETTER
        ):
            self.greater_is_better = False
        super().__post_init__()  # type: ignore[no-untyped-call]


@dataclass
class RunArguments:
    """All options of a run."""

    model: ModelArguments
    task: TaskArguments
    data: DataArguments
    adapter: Any  # AdapterArguments
    training: Any  # TrainingArguments, or what a loop of one's own has of them

    def settings(self) -> dict[str, Any]:
        """The settings that must stay the same when the run resumes, by name."""
        parts = (self.model, self.task, self.data, self.adapter)
        settings = {
            **{name: value for part in parts for name, value in asdict(part).items()},
            **{name: getattr(self.training, name) for name in CHOICE if hasattr(self.training, name)},
            **{name: getattr(self.training, name, None) for name in SETTINGS},
            "num_processes": PartialState().num_processes,
            "distributed_type": str(PartialState().distributed_type),
        }
        left_out = OTHER if self.training.load_best_model_at_end else (*OTHER, *CHOICE)
        return {name: value for name, value in settings.items() if name not in left_out}

    def parts(self) -> dict[str, tuple[str, Optional[str]]]:
        """The split and the selection of rows, by the name of their use: training, evaluation and test."""
        parts = {"training": (self.data.train_split_name, self.data.train_rows)}
        if self.training.eval_strategy != "no":
            parts["evaluation"] = (self.data.eval_split_name, self.data.eval_rows)
        if self.data.test_split_name:
            parts["test"] = (self.data.test_split_name, self.data.test_rows)
        return parts

    def data_options(self, task: Task) -> Any:
        """How the data is read.

        Args:
            task (Task): what is learned, which says the column that is read if none is given.

        Returns:
            DataOptions: the options.
        """
        column = self.data.label_column_name or task.label_column
        return collect_options(self.model, self.data, self.training, label_column=column)

    def make_task(self) -> Task:
        """Make the task, with the tokenizer of the model where it needs one.

        Returns:
            Task: the task, without classes.
        """
        given, model = self.task, self.model
        if given.vocabulary is not None and given.task != "ctc":
            raise ValueError(f"`vocabulary` is for `task=ctc`: leave it out for `task={given.task}`.")
        tokenizer = None
        if given.task == "speech-seq2seq" or (given.task == "ctc" and self._keeps_vocabulary()):
            tokenizer = retry(AutoTokenizer.from_pretrained, model.model_name_or_path, **model.hub_options())
        return make_task(
            given.task,
            problem_type=self.adapter.problem_type,
            class_weights=parse_weights(given.class_weights),
            separator=given.label_separator,
            tokenizer=tokenizer,
            **{name: getattr(given, name) for name in ("text_case", "language", "speech_task", "metrics")},
            normalize_text=given.normalize_text,
        )

    def _keeps_vocabulary(self) -> bool:
        if self.task.vocabulary is not None:
            return self.task.vocabulary == "model"
        config = retry(AutoConfig.from_pretrained, self.model.model_name_or_path, **self.model.hub_options())
        return not set(MODEL_FOR_CTC_MAPPING_NAMES.values()).isdisjoint(config.architectures or ())


def make_run(**options: Any) -> RunArguments:
    """Make the options of a run in Python.

        trainer = train(make_run(dataset_name="ashraq/esc50", label_column_name="category", output_dir="out"))

    Args:
        options (Any): fields of the dataclasses of this module, of `SoftMoAConfig` and of `TrainingArguments`.

    Returns:
        RunArguments: all options, with the defaults of the commands.

    Raises:
        ValueError: if an option is unknown, or a value is not allowed.
    """
    classes: Any = (ModelArguments, TaskArguments, DataArguments, AdapterArguments, TrainingArguments)
    return RunArguments(*HfArgumentParser(classes).parse_dict({**TRAINING_DEFAULTS, **options}))
