#!/usr/bin/env python
"""Train a soft mixture of adapters for audio classification, on a streamed dataset, with the Hugging Face Trainer.

For example, on ESC-50 with its fifth fold for evaluation:

    python examples/train_audio_classification.py \
        --model_name_or_path MIT/ast-finetuned-audioset-10-10-0.4593 \
        --dataset_name ashraq/esc50 --label_column_name category \
        --train_rows fold=1,2,3,4 --eval_split_name train --eval_rows fold=5 \
        --num_train_epochs 10 --output_dir esc50-softmoa

The arguments of `transformers.TrainingArguments` are taken too, and `accelerate launch` works. `--config FILE` reads
arguments from a YAML file, as those in `examples/recipes/`; what the command line gives comes before it. It always
trains, and evaluates unless `--eval_strategy no` is given. A run that was cut off goes on when the same command is
started again.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, Optional

import torch
import transformers
import yaml
from datasets import IterableDataset
from huggingface_hub import HfApi
from peft import get_peft_model
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    HfArgumentParser,
    SequenceFeatureExtractor,
    TrainingArguments,
    set_seed,
)

from peft_softmoa.arguments import AdapterArguments, make_config
from peft_softmoa.card import add_results
from peft_softmoa.training import (
    AudioStream,
    AudioTrainer,
    ExtractFeatures,
    LogRouterLoss,
    Survey,
    begin_run,
    class_names,
    classification_metrics,
    load_rows,
    note_run,
    parse_selection,
    patiently,
    reads_single_columns,
    select_rows,
    survey_metadata,
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


# What has to stay the same when a run goes on: how it is trained, besides the model, the data and the adapter.
SETTINGS = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_num_workers",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
)


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
    test_split_name: Optional[str] = field(
        default=None, metadata={"help": "Split to test the trained model on, once. Default: none."}
    )
    test_rows: Optional[str] = field(
        default=None, metadata={"help": "Rows to test it on, by the values of a column, such as fold=4."}
    )
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the audio."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the labels."})
    max_length_seconds: Optional[float] = field(
        default=None,
        metadata={"help": "Longer clips are cut to this length: at a random place in training, else at the start."},
    )
    mask_frequencies: int = field(
        default=0, metadata={"help": "SpecAugment: a band of up to so many mel bins is set to zero in training."}
    )
    mask_frames: int = field(
        default=0, metadata={"help": "SpecAugment: a span of up to so many frames is set to zero in training."}
    )
    streaming: bool = field(default=True, metadata={"help": "Read while training instead of downloading first."})
    shuffle_buffer_size: int = field(default=500, metadata={"help": "How many rows are held to draw from."})
    on_bad_audio: Literal["skip", "raise"] = field(
        default="skip",
        metadata={"help": "Audio that cannot be used is skipped, counted and named in a warning, or is an error."},
    )


def main(arguments: Optional[list[str]] = None) -> AudioTrainer:
    model_args, data_args, adapter_args, training_args = parse(sys.argv[1:] if arguments is None else arguments)

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    logging.getLogger().setLevel(logging.WARNING)
    transformers.logging.set_verbosity_warning()
    config = make_config(adapter_args, modules_to_save=["classifier"])
    if config.router_aux_loss_coef and training_args.label_smoothing_factor:
        raise ValueError(
            "--label_smoothing_factor and --routing top_k do not go together: the Trainer computes a smoothed loss "
            "itself, without the load-balancing loss of the routers. Leave one out, or set --router_aux_loss_coef 0."
        )
    check_rows_are_apart(data_args, training_args)
    settings = {
        **{name: value for name, value in asdict(model_args).items() if name not in ("token", "cache_dir")},
        **asdict(data_args),
        **asdict(adapter_args),
        **{name: getattr(training_args, name) for name in SETTINGS},
        "num_processes": training_args.world_size,
    }
    resume = training_args.resume_from_checkpoint
    if resume and str(resume).lower() in ("true", "false"):
        resume = str(resume).lower() == "true"
    checkpoint = begin_run(training_args.output_dir, settings, resume)
    set_seed(training_args.seed)
    # Pushing is done here, at the end: the Trainer would write a card of its own over the adapter's, and a token into
    # every checkpoint.
    push_to_hub, hub_token = training_args.push_to_hub, training_args.hub_token
    training_args.push_to_hub, training_args.hub_token = False, None
    repo_id = None
    if push_to_hub and training_args.process_index == 0:  # now, for what is not allowed should not show after training
        repo_id = patiently(
            HfApi(token=hub_token).create_repo,
            training_args.hub_model_id or Path(training_args.output_dir).resolve().name,
            private=training_args.hub_private_repo,
            exist_ok=True,
        ).repo_id

    feature_extractor = patiently(
        AutoFeatureExtractor.from_pretrained,
        model_args.feature_extractor_name or model_args.model_name_or_path,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
    )
    parts = {"training": (data_args.train_split_name, data_args.train_rows)}
    if training_args.eval_strategy != "no":
        parts["evaluation"] = (data_args.eval_split_name, data_args.eval_rows)
    if data_args.test_split_name:
        parts["test"] = (data_args.test_split_name, data_args.test_rows)
    rows = {part: read_rows(data_args, model_args, *each) for part, each in parts.items()}
    surveys = {part: survey(part, *each, data_args, model_args, training_args) for part, each in parts.items()}
    known = surveys["training"].labels if surveys["training"] else ()
    for part, found in surveys.items():
        unseen = sorted(set(found.labels) - set(known)) if found and known else ()
        if unseen:
            raise ValueError(
                f"The {part} rows of {data_args.dataset_name} have labels that the training rows do not have: "
                f"{', '.join(unseen)}. Training has: {', '.join(known)}."
            )
    label_names = class_names(rows["training"], data_args.label_column_name) or list(known)
    streams = {
        part: make_stream(rows[part], surveys[part], label_names, feature_extractor, data_args, training_args, part)
        for part in parts
    }

    model = patiently(
        AutoModelForAudioClassification.from_pretrained,
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
    )
    config = replace(config, label_names=label_names)
    model = get_peft_model(model, config, revision=model_args.model_revision)
    if training_args.should_log:
        model.print_trainable_parameters()

    trainer = AudioTrainer(
        model=model,
        args=training_args,
        train_dataset=streams["training"],
        eval_dataset=streams.get("evaluation"),
        processing_class=feature_extractor,
        compute_metrics=classification_metrics,
        mask_frequencies=data_args.mask_frequencies,
        mask_frames=data_args.mask_frames,
    )
    if config.router_aux_loss_coef:
        trainer.add_callback(LogRouterLoss(trainer))
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    for part, prefix in (("evaluation", "eval"), ("test", "test")):
        if part in streams:
            metrics = trainer.evaluate(streams[part], metric_key_prefix=prefix)
            trainer.log_metrics(prefix, metrics)
            trainer.save_metrics(prefix, metrics)
            if trainer.is_world_process_zero():
                split, selection = parts[part]
                add_results(
                    training_args.output_dir,
                    {name: metrics[f"{prefix}_{name}"] for name in ("accuracy", "f1_macro")},
                    dataset=data_args.dataset_name,
                    config_name=data_args.dataset_config_name,
                    revision=data_args.dataset_revision,
                    split=f"{split} ({selection})" if selection else split,
                )
    if trainer.is_world_process_zero():
        if repo_id:
            push(training_args.output_dir, repo_id, hub_token)
        note_run(training_args.output_dir, settings, finished=True)
    return trainer


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, AdapterArguments, TrainingArguments]:
    """Arguments of the command line and, before it, of the YAML file that `--config` names."""
    parser = HfArgumentParser((ModelArguments, DataArguments, AdapterArguments, TrainingArguments))
    parser.set_defaults(**TRAINING_DEFAULTS)
    parser.add_argument("--config", metavar="FILE", help="YAML file with arguments, as in examples/recipes/.")
    if "--config" in arguments:
        index = arguments.index("--config")
        arguments = [*read_config(arguments[index + 1 :][:1], parser), *arguments[:index], *arguments[index + 2 :]]
    return parser.parse_args_into_dataclasses(arguments)[:4]


def read_config(paths: list[str], parser: HfArgumentParser) -> list[str]:
    """Arguments from a YAML file, in the form of a command line."""
    if not paths:
        raise ValueError("--config takes a YAML file.")
    given = yaml.safe_load(Path(paths[0]).read_text())
    names = {action.dest for action in parser._actions} - {"help", "config"}
    unknown = sorted(map(str, given.keys() - names)) if isinstance(given, dict) else ["no fields at all"]
    if unknown:
        raise ValueError(
            f"'{paths[0]}' has {', '.join(unknown)}, which this script does not take. Correct or remove it: --help "
            "lists all arguments."
        )
    arguments = []
    for name, value in given.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        arguments += [f"--{name}", *map(str, values)]
    return arguments


def check_rows_are_apart(data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Refuse to evaluate, or to test, on rows that were trained on."""
    selections = {"training": (data_args.train_split_name, data_args.train_rows)}
    if training_args.eval_strategy != "no":
        selections["evaluation"] = (data_args.eval_split_name, data_args.eval_rows)
    if data_args.test_split_name:
        selections["test"] = (data_args.test_split_name, data_args.test_rows)
    for one, other in itertools.combinations(selections, 2):
        (split, rows), (other_split, other_rows) = selections[one], selections[other]
        column, values = parse_selection(rows) if rows else (None, ())
        other_column, other_values = parse_selection(other_rows) if other_rows else (None, ())
        if split != other_split or (None not in (column, other_column) and column != other_column):
            continue
        if None in (column, other_column) or set(values) & set(other_values):
            raise ValueError(
                f"{one.capitalize()} and {other} both read the split '{split}' and share rows: choose different ones "
                f"with --train_rows, --eval_rows and --test_rows (now {rows} and {other_rows})."
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


def survey(
    part: str,
    split: str,
    selection: Optional[str],
    data_args: DataArguments,
    model_args: ModelArguments,
    training_args: TrainingArguments,
) -> Optional[Survey]:
    """Number of rows and labels: counted where that does not read the audio, else from what the dataset says."""
    label_column = data_args.label_column_name
    rows = read_rows(data_args, model_args, split, selection, labels_only=True)
    options = {"revision": data_args.dataset_revision, "token": model_args.token, "cache_dir": model_args.cache_dir}
    names = class_names(rows, label_column)
    if names is None or reads_single_columns(data_args.dataset_name, data_args.dataset_config_name, **options):
        return survey_rows(rows, label_column, f"{data_args.dataset_name} ({part})")
    found = None if selection else survey_metadata(rows, label_column)
    if found is None and part == "training" and training_args.max_steps <= 0:
        raise ValueError(
            f"{data_args.dataset_name} does not say how many rows '{split}'{f' with {selection}' if selection else ''} "
            "has, and counting them would read all of its audio: give --max_steps instead of --num_train_epochs."
        )
    return found


def make_stream(
    rows: IterableDataset,
    found: Optional[Survey],
    label_names: list[str],
    feature_extractor: SequenceFeatureExtractor,
    data_args: DataArguments,
    training_args: TrainingArguments,
    part: str,
) -> AudioStream:
    """Stream of model inputs; shuffled and cut at random places in training."""
    extract = ExtractFeatures(
        feature_extractor,
        label_names,
        audio_column=data_args.audio_column_name,
        label_column=data_args.label_column_name,
        class_names=class_names(rows, data_args.label_column_name),
        max_length_seconds=data_args.max_length_seconds,
        random_crop=part == "training",
        on_bad_audio=data_args.on_bad_audio,
    )
    return AudioStream(
        rows,
        extract,
        found,
        shuffle_buffer=data_args.shuffle_buffer_size if part == "training" else 0,
        seed=training_args.seed,
        name=data_args.dataset_name,
    )


def push(folder: str, repo_id: str, token: Optional[str]) -> None:
    """Upload the adapter, its card and its feature extractor, without checkpoints and pickles."""
    ignored = ["checkpoint-*", "unfinished-*", "run.json*", "runs/*", "*.bin", "*.pt"]
    patiently(HfApi(token=token).upload_folder, repo_id=repo_id, folder_path=folder, ignore_patterns=ignored)


if __name__ == "__main__":
    main()
