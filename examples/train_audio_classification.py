#!/usr/bin/env python
"""Train a soft mixture of adapters for audio classification, on a streamed dataset, with the Hugging Face Trainer.

For example, on ESC-50 with its fifth fold for evaluation:

    python examples/train_audio_classification.py \
        --model_name_or_path MIT/ast-finetuned-audioset-10-10-0.4593 \
        --dataset_name ashraq/esc50 --label_column_name category \
        --train_rows fold=1,2,3,4 --eval_split_name train --eval_rows fold=5 \
        --num_train_epochs 10 --output_dir esc50-softmoa

The arguments of `transformers.TrainingArguments` are taken too, and `accelerate launch` works. It always trains, and
evaluates unless `--eval_strategy no` is given.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Optional

import torch
import transformers
from datasets import IterableDataset
from huggingface_hub import HfApi
from peft import get_peft_model
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    HfArgumentParser,
    SequenceFeatureExtractor,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_softmoa.arguments import AdapterArguments, make_config
from peft_softmoa.training import (
    ExtractFeatures,
    LogRouterLoss,
    SizedStream,
    audio_stream,
    class_names,
    classification_metrics,
    load_rows,
    parse_selection,
    select_rows,
    survey_rows,
)

logger = logging.getLogger(__name__)

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
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class ModelArguments:
    """Which base model is adapted."""

    model_name_or_path: str = field(
        default="MIT/ast-finetuned-audioset-10-10-0.4593",
        metadata={"help": "Id on the Hub or folder of an Audio Spectrogram Transformer."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    feature_extractor_name: Optional[str] = field(
        default=None, metadata={"help": "Id or folder of the feature extractor, if it is not the model's."}
    )
    cache_dir: Optional[str] = field(default=None, metadata={"help": "Where downloads go."})
    token: Optional[str] = field(
        default=None, metadata={"help": "Access token for the Hub. Default: the one that is logged in."}
    )


@dataclass
class DataArguments:
    """Which audio it is trained and evaluated on."""

    dataset_name: str = field(
        metadata={"help": "Id of a dataset on the Hub, a folder with a metadata.csv, or a folder with Parquet files."}
    )
    dataset_config_name: Optional[str] = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: Optional[str] = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split_name: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    train_rows: Optional[str] = field(
        default=None, metadata={"help": "Rows to train on, by the values of a column, such as fold=1,2,3,4."}
    )
    eval_rows: Optional[str] = field(
        default=None, metadata={"help": "Rows to evaluate on, by the values of a column, such as fold=5."}
    )
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the audio."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the labels."})
    max_length_seconds: Optional[float] = field(
        default=None,
        metadata={"help": "Longer clips are cut to this length: at a random place in training, else at the start."},
    )
    streaming: bool = field(default=True, metadata={"help": "Read while training instead of downloading first."})
    shuffle_buffer_size: int = field(default=500, metadata={"help": "How many rows are held to draw from."})
    on_bad_audio: Literal["skip", "raise"] = field(
        default="skip",
        metadata={"help": "Audio that cannot be used is skipped, counted and named in a warning, or is an error."},
    )


def main(arguments: Optional[list[str]] = None) -> Trainer:
    parser = HfArgumentParser((ModelArguments, DataArguments, AdapterArguments, TrainingArguments))
    parser.set_defaults(**TRAINING_DEFAULTS)
    model_args, data_args, adapter_args, training_args = parser.parse_args_into_dataclasses(arguments)

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    logging.getLogger().setLevel(logging.WARNING)
    transformers.logging.set_verbosity_warning()
    check_arguments(data_args, training_args)
    config = make_config(adapter_args, modules_to_save=["classifier"])
    if config.router_aux_loss_coef and training_args.label_smoothing_factor:
        raise ValueError(
            "--label_smoothing_factor and --routing top_k do not go together: the Trainer computes a smoothed loss "
            "itself, without the load-balancing loss of the routers. Leave one out, or set --router_aux_loss_coef 0."
        )
    set_seed(training_args.seed)

    # Rows, without their audio for a first look at the labels.
    train_rows = read_rows(data_args, model_args, data_args.train_split_name, data_args.train_rows)
    survey = survey_rows(
        read_rows(data_args, model_args, data_args.train_split_name, data_args.train_rows, labels_only=True),
        data_args.label_column_name,
        f"{data_args.dataset_name} (training)",
    )
    label_names = class_names(train_rows, data_args.label_column_name) or list(survey.labels)

    feature_extractor = AutoFeatureExtractor.from_pretrained(
        model_args.feature_extractor_name or model_args.model_name_or_path,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
    )
    train_dataset = make_dataset(
        train_rows, survey.num_rows, label_names, feature_extractor, data_args, training_args, training=True
    )
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_rows = read_rows(data_args, model_args, data_args.eval_split_name, data_args.eval_rows)
        eval_survey = survey_rows(
            read_rows(data_args, model_args, data_args.eval_split_name, data_args.eval_rows, labels_only=True),
            data_args.label_column_name,
            f"{data_args.dataset_name} (evaluation)",
        )
        unseen = sorted(set(eval_survey.labels) - set(survey.labels))
        if unseen:
            raise ValueError(
                f"The evaluation rows of {data_args.dataset_name} have labels that the training rows do not have: "
                f"{', '.join(unseen)}. Training has: {', '.join(survey.labels)}."
            )
        eval_dataset = make_dataset(
            eval_rows, eval_survey.num_rows, label_names, feature_extractor, data_args, training_args, training=False
        )

    model = AutoModelForAudioClassification.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
    )
    config = replace(config, label_names=label_names)
    model = get_peft_model(model, config, revision=model_args.model_revision)
    model.print_trainable_parameters()

    # The Trainer would write a card of its own over the adapter's, so pushing is done here, at the end.
    push_to_hub, training_args.push_to_hub = training_args.push_to_hub, False
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=feature_extractor,
        compute_metrics=classification_metrics,
    )
    if config.router_aux_loss_coef:
        trainer.add_callback(LogRouterLoss(trainer))
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    if eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if push_to_hub and trainer.is_world_process_zero():
        push(training_args)
    return trainer


def check_arguments(data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Refuse what would overwrite a model or evaluate on rows that were trained on."""
    folder = Path(training_args.output_dir)
    patterns = ("config.json", "adapter_*", "model*", "pytorch_model*", "checkpoint-*")
    present = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    resume = training_args.resume_from_checkpoint
    if resume and resume.lower() == "true":
        training_args.resume_from_checkpoint = True  # the newest checkpoint in the folder
    elif present and not (resume and Path(resume).resolve().parent == folder.resolve()):
        raise ValueError(
            f"The output folder '{folder}' already holds a model ({', '.join(present)}). Choose another --output_dir, "
            "or go on from one of its checkpoints with --resume_from_checkpoint."
        )
    if training_args.eval_strategy != "no" and data_args.train_split_name == data_args.eval_split_name:
        column, values = parse_selection(data_args.train_rows) if data_args.train_rows else (None, ())
        other_column, other_values = parse_selection(data_args.eval_rows) if data_args.eval_rows else (None, ())
        if None in (column, other_column) or (column == other_column and set(values) & set(other_values)):
            raise ValueError(
                f"Training and evaluation both read the split '{data_args.train_split_name}' and share rows: choose "
                f"different ones with --train_rows and --eval_rows (now {data_args.train_rows} and "
                f"{data_args.eval_rows})."
            )


def read_rows(
    data_args: DataArguments,
    model_args: ModelArguments,
    split: str,
    selection: Optional[str],
    labels_only: bool = False,
) -> IterableDataset:
    """Rows of a split, selected; with the columns that are needed."""
    columns = (
        [data_args.label_column_name] if labels_only else [data_args.audio_column_name, data_args.label_column_name]
    )
    if selection and parse_selection(selection)[0] not in columns:
        columns.append(parse_selection(selection)[0])
    rows = load_rows(
        data_args.dataset_name,
        split,
        audio_column=data_args.audio_column_name,
        columns=columns,
        config_name=data_args.dataset_config_name,
        revision=data_args.dataset_revision,
        token=model_args.token,
        cache_dir=model_args.cache_dir,
        streaming=data_args.streaming,
    )
    return select_rows(rows, selection, data_args.dataset_name) if selection else rows


def make_dataset(
    rows: IterableDataset,
    num_rows: int,
    label_names: list[str],
    feature_extractor: SequenceFeatureExtractor,
    data_args: DataArguments,
    training_args: TrainingArguments,
    training: bool,
) -> SizedStream:
    """Stream of model inputs; shuffled and cut at random places in training."""
    extract = ExtractFeatures(
        feature_extractor,
        label_names,
        audio_column=data_args.audio_column_name,
        label_column=data_args.label_column_name,
        class_names=class_names(rows, data_args.label_column_name),
        max_length_seconds=data_args.max_length_seconds,
        random_crop=training,
        on_bad_audio=data_args.on_bad_audio,
    )
    stream = audio_stream(
        rows,
        extract,
        shuffle_buffer=data_args.shuffle_buffer_size if training else 0,
        seed=training_args.seed,
        name=data_args.dataset_name,
    )
    return SizedStream(stream, num_rows, extract)


def push(training_args: TrainingArguments) -> None:
    """Upload the adapter, its card and its feature extractor, without checkpoints and pickles."""
    api = HfApi(token=training_args.hub_token)
    repo = api.create_repo(
        training_args.hub_model_id or Path(training_args.output_dir).resolve().name,
        private=training_args.hub_private_repo,
        exist_ok=True,
    )
    api.upload_folder(
        repo_id=repo.repo_id, folder_path=training_args.output_dir, ignore_patterns=["checkpoint-*", "*.bin", "*.pt"]
    )


if __name__ == "__main__":
    main()
