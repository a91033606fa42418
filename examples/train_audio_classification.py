#!/usr/bin/env python
"""Train a soft mixture of adapters for audio classification, on a streamed dataset, with the Hugging Face Trainer.

For example, on ESC-50 with its fifth fold for evaluation:

    python examples/train_audio_classification.py \
        --model_name_or_path MIT/ast-finetuned-audioset-10-10-0.4593 \
        --dataset_name ashraq/esc50 --label_column_name category \
        --train_rows fold=1,2,3,4 --eval_split_name train --eval_rows fold=5 \
        --num_train_epochs 10 --output_dir esc50-softmoa

The arguments of `transformers.TrainingArguments` are taken too, and `accelerate launch` works. `--config FILE` reads
arguments from a YAML file, such as those of `peft-softmoa recipes`; the command line overrides the file. It always
trains, and evaluates unless `--eval_strategy no` is given. Interrupted runs resume: run the same command again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import transformers
import yaml
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from peft_softmoa import SoftMoAConfig
from peft_softmoa.arguments import AdapterArguments, make_config
from peft_softmoa.inspection import ExpertUtilizationCallback
from peft_softmoa.recipes import find_recipe
from peft_softmoa.saving.card import add_results
from peft_softmoa.training import (
    AudioStream,
    AudioTrainer,
    LogRouterLoss,
    check_no_shared_rows,
    classification_metrics,
    collect_options,
    fingerprint_config,
    fingerprint_weights,
    flag_names,
    load_stream,
    lock_run,
    name_flags,
    option,
    retry,
    start_or_resume,
    write_run_state,
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
    "hub_strategy": "end",
    "dataloader_pin_memory": torch.cuda.is_available(),
}


# The training arguments that must stay the same when a run resumes, besides the model, the data and the adapter.
SETTINGS = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_num_workers",
    "optim",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_steps",
    "lr_scheduler_kwargs",
    "optim_args",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "average_tokens_across_devices",
    "bf16",
    "fp16",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "num_train_epochs",
    "max_steps",
)
# The other arguments that may change: they do not affect the training.
OTHER = ("token", "cache_dir", "log_experts_steps", "eval_split_name", "eval_rows", "test_split_name", "test_rows")


@dataclass
class ModelArguments:
    """The base model, and how the Hub is used."""

    model_name_or_path: str = field(
        default="MIT/ast-finetuned-audioset-10-10-0.4593",
        metadata={"help": "Id on the Hub or folder of an Audio Spectrogram Transformer."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={"help": "Dtype of the base model's weights in training; auto is the one in which they are stored."},
    )
    feature_extractor_name: Optional[str] = field(
        default=None, metadata={"help": "Id or folder of the feature extractor, if it is not the model's."}
    )
    modules_to_save: list[str] = field(
        default_factory=lambda: ["classifier"],
        metadata={"help": "Modules that are trained in full, besides the adapter."},
    )
    log_experts_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps between logs of how the experts are used. Default: no logs."},
    )
    cache_dir: Optional[str] = option("cache_dir")
    token: Optional[str] = option("token")


@dataclass
class DataArguments:
    """The data for training, evaluation and test."""

    dataset_name: str = field(
        metadata={"help": "Id of a dataset on the Hub, or a folder of one of the layouts in the README."}
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
    label_column_name: str = option("label_column")
    max_length_seconds: Optional[float] = option("max_length_seconds")
    mask_frequencies: int = field(
        default=0, metadata={"help": "SpecAugment: a band of up to so many mel bins is set to zero in training."}
    )
    mask_frames: int = field(
        default=0, metadata={"help": "SpecAugment: a span of up to so many frames is set to zero in training."}
    )
    streaming: bool = option("streaming")
    shuffle_buffer_size: int = option("shuffle_buffer")
    on_bad_audio: Literal["skip", "raise"] = option("on_bad_audio")


# Errors of the library name Python arguments: what this script calls them.
FLAGS = flag_names(ModelArguments, DataArguments, AdapterArguments, TrainingArguments) | {
    "rows": "--train_rows, --eval_rows and --test_rows",
    "needs_length=False": "--max_steps",
}


@name_flags(FLAGS)
def main(arguments: Optional[list[str]] = None) -> AudioTrainer:
    model_args, data_args, adapter_args, training_args = parse(sys.argv[1:] if arguments is None else arguments)

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    logging.getLogger().setLevel(logging.WARNING)
    transformers.logging.set_verbosity_warning()
    config = make_config(adapter_args, modules_to_save=model_args.modules_to_save)
    if config.choices()["router_aux_loss_coef"] and training_args.label_smoothing_factor:
        raise ValueError(
            "--label_smoothing_factor and --routing top_k do not go together: the Trainer computes a smoothed loss "
            "itself, without the load-balancing loss of the routers. Leave one out, or set --router_aux_loss_coef 0."
        )
    parts = {"training": (data_args.train_split_name, data_args.train_rows)}
    if training_args.eval_strategy != "no":
        parts["evaluation"] = (data_args.eval_split_name, data_args.eval_rows)
    if data_args.test_split_name:
        parts["test"] = (data_args.test_split_name, data_args.test_rows)
    check_no_shared_rows(parts)
    for name in ("save_only_model", "ignore_data_skip"):
        if getattr(training_args, name):
            raise ValueError(f"With --{name} an interrupted run could not resume as it was: leave it out.")
    with lock_run(training_args.output_dir, is_main=training_args.process_index == 0):
        return train(model_args, data_args, adapter_args, training_args, config, parts)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    adapter_args: AdapterArguments,
    training_args: TrainingArguments,
    config: SoftMoAConfig,
    parts: dict[str, tuple[str, Optional[str]]],
) -> AudioTrainer:
    """Train on the first of the parts, which are splits and selections of rows, and evaluate on the others."""
    set_seed(training_args.seed)
    feature_extractor = retry(
        AutoFeatureExtractor.from_pretrained,
        model_args.feature_extractor_name or model_args.model_name_or_path,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
    )
    options = collect_options(model_args, data_args, training_args)
    streams: dict[str, AudioStream] = {}
    label_names = None
    for part, (split, rows) in parts.items():
        streams[part] = load_stream(
            data_args.dataset_name,
            split,
            feature_extractor,
            options,
            rows=rows,
            label_names=label_names,
            training=part == "training",
            needs_length=part == "training" and training_args.max_steps <= 0,
        )
        label_names = streams[part].label_names

    model = retry(
        AutoModelForAudioClassification.from_pretrained,
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
        dtype=model_args.dtype,
    )
    config = replace(config, label_names=label_names, problem_type="single_label_classification")
    model = get_peft_model(model, config, revision=model_args.model_revision)
    if training_args.should_log:
        model.print_trainable_parameters()
    settings = settings_of(model_args, data_args, adapter_args, training_args)
    settings |= fingerprints(model, feature_extractor, streams, training_args.load_best_model_at_end)
    [settings] = broadcast_object_list([settings])  # files may have other times where other processes read them
    resume = training_args.resume_from_checkpoint
    if resume and str(resume).lower() in ("true", "false"):
        resume = str(resume).lower() == "true"
    checkpoint = start_or_resume(
        training_args.output_dir,
        settings,
        resume,
        may_change=("num_train_epochs", "max_steps"),
        is_main=training_args.process_index == 0,
    )

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
    if config.choices()["router_aux_loss_coef"]:
        trainer.add_callback(LogRouterLoss(trainer))
    if model_args.log_experts_steps:
        trainer.add_callback(ExpertUtilizationCallback(trainer, every=model_args.log_experts_steps))
    result = trainer.train(resume_from_checkpoint=checkpoint)
    # The Trainer has pushed what `--hub_strategy` asks for. The last push is this script's, and has the results.
    push_to_hub, training_args.push_to_hub = training_args.push_to_hub, False
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():  # an interrupted run may leave a broken one
        Path(training_args.output_dir, "all_results.json").unlink(missing_ok=True)
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
        if push_to_hub:
            push(training_args, trainer.hub_model_id)
        write_run_state(training_args.output_dir, settings, finished=True)
    trainer.accelerator.wait_for_everyone()
    return trainer


def settings_of(
    model_args: ModelArguments,
    data_args: DataArguments,
    adapter_args: AdapterArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """The settings that must stay the same when a run resumes."""
    settings = {
        **{name: value for part in (model_args, data_args, adapter_args) for name, value in asdict(part).items()},
        **{name: getattr(training_args, name, None) for name in SETTINGS},
        "num_processes": training_args.world_size,
        "distributed_type": str(training_args.distributed_state.distributed_type),
    }
    # What chooses the best checkpoint affects the result.
    evaluation = ("eval_split_name", "eval_rows") if training_args.load_best_model_at_end else ()
    return {name: value for name, value in settings.items() if name not in OTHER or name in evaluation}


def fingerprints(
    model: PeftModel, feature_extractor: Any, streams: dict[str, AudioStream], evaluation_counts: bool
) -> dict[str, str]:
    """What must stay the same under the same names: the base model, and the rows with their audio."""
    parts = ("training", "evaluation") if evaluation_counts else ("training",)
    return {
        "base_weights": fingerprint_weights(model),
        "base_config": fingerprint_config(model.config),
        "feature_extractor": fingerprint_config(feature_extractor),
        **{f"{part}_{what}": value for part in parts for what, value in streams[part].fingerprint.items()},
    }


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, AdapterArguments, TrainingArguments]:
    """Arguments of the command line, which override those of the YAML file that `--config` names."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", metavar="FILE", help="YAML file with arguments, or a recipe")
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, AdapterArguments, TrainingArguments), parents=[files], allow_abbrev=False
    )
    parser.set_defaults(**TRAINING_DEFAULTS)
    file, arguments = files.parse_known_args(arguments)
    if file.config:
        arguments = [*read_config(file.config, parser), *arguments]
    return parser.parse_args_into_dataclasses(arguments)[:4]


def read_config(path: str, parser: HfArgumentParser) -> list[str]:
    """Arguments from a YAML file, in the form of a command line."""
    given = yaml.safe_load(find_recipe(path).read_text())
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    unknown = sorted(map(str, given.keys() - known)) if isinstance(given, dict) else ["no fields at all"]
    if unknown:
        raise ValueError(
            f"'{path}' has {', '.join(unknown)}, which this script does not take. Correct or remove it: --help lists "
            "all arguments."
        )
    arguments = []
    for name, value in given.items():
        if value is False and "no" in map(str, known[name].choices or ()):
            value = "no"  # YAML reads it as False
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        if value is not None:
            arguments += [f"--{name}", *map(str, values)]
    return arguments


def push(training_args: TrainingArguments, repo_id: str) -> None:
    """Upload the adapter, its card and its feature extractor, without checkpoints and pickles."""
    retry(
        HfApi(token=training_args.hub_token).upload_folder,
        repo_id=repo_id,
        folder_path=training_args.output_dir,
        ignore_patterns=["checkpoint-*", "_*", "run.json*", "runs/*", "*.bin", "*.pt"],
        revision=training_args.hub_revision,
    )


if __name__ == "__main__":
    # Ends the process group: a process that ends before may be aborted otherwise.
    main().accelerator.end_training()
