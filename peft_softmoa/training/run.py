"""A training run from its options: load, train, evaluate, save, and resume after an interruption."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import transformers
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from transformers import AutoFeatureExtractor, TrainingArguments, set_seed

from ..arguments import make_config
from ..config import SoftMoAConfig
from ..quiet import quiet_loading
from ..saving.card import METRICS, add_results
from ..targets.clip_length import fit_feature_extractor, fitting_length
from .arguments import RunArguments
from .callbacks import LogRouterLoss
from .checkpoints import lock_run, start_or_resume, write_run_state
from .fingerprint import fingerprint_config, fingerprint_weights
from .load import load_stream
from .network import retry
from .rows import check_no_shared_rows
from .streams import AudioStream
from .tasks import Task
from .trainer import AudioTrainer


def train(run: RunArguments) -> AudioTrainer:
    """Train an adapter, evaluate it, and save it with its card.

    It always trains, and evaluates unless `eval_strategy` is `"no"`. A run that was interrupted resumes from its newest
    complete checkpoint; its settings, its data and its base model must be the same.

    Args:
        run (RunArguments): the options.

    Returns:
        AudioTrainer: after training. With several processes, call `accelerator.end_training()` at the end.

    Raises:
        ValueError: if options do not go together, or the output folder holds something else.
    """
    training = run.training
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    logging.getLogger().setLevel(logging.WARNING)
    transformers.logging.set_verbosity_warning()
    config = make_config(run.adapter, modules_to_save=run.model.modules_to_save)
    if config.choices()["router_aux_loss_coef"] and training.label_smoothing_factor:
        raise ValueError(
            "`label_smoothing_factor` and `routing=top_k` do not go together: the Trainer computes a smoothed loss "
            "itself, without the load-balancing loss of the routers. Leave one out, or set `router_aux_loss_coef=0`."
        )
    check_no_shared_rows(run.parts())
    for name in ("save_only_model", "ignore_data_skip"):
        if getattr(training, name):
            raise ValueError(f"With `{name}` an interrupted run could not resume as it was: leave it out.")
    with lock_run(str(training.output_dir), is_main=training.process_index == 0):
        return _train(run, config)


def _train(run: RunArguments, config: SoftMoAConfig) -> AudioTrainer:
    training = run.training
    set_seed(training.seed)
    task = run.make_task()
    base = load_base(run, task)
    feature_extractor = load_feature_extractor(run, base)
    streams = load_streams(run, task, feature_extractor)
    model = add_adapter(run, base, streams["training"].task or task, config)
    for stream in streams.values():
        stream.choose_channels(model)
    if training.should_log:
        model.print_trainable_parameters()
    settings = run.settings() | fingerprints(model, feature_extractor, streams, training.load_best_model_at_end)
    [settings] = broadcast_object_list([settings])  # files may have other times where other processes read them
    resume: Any = training.resume_from_checkpoint
    if resume and str(resume).lower() in ("true", "false"):
        resume = str(resume).lower() == "true"
    checkpoint = start_or_resume(
        str(training.output_dir),
        settings,
        resume,
        may_change=("num_train_epochs", "max_steps"),
        is_main=training.process_index == 0,
    )
    trainer = AudioTrainer(
        model=model,
        args=training,
        train_dataset=streams["training"],
        eval_dataset=streams.get("evaluation"),
        processing_class=feature_extractor,
        mask_frequencies=run.data.mask_frequencies,
        mask_frames=run.data.mask_frames,
        mixup_alpha=run.task.mixup_alpha,
        mirror_labels=run.data.mirror_labels,
    )
    if config.choices()["router_aux_loss_coef"]:
        trainer.add_callback(LogRouterLoss(trainer))
    if run.model.log_experts_steps:
        from ..inspection import ExpertUtilizationCallback  # which needs matplotlib

        trainer.add_callback(ExpertUtilizationCallback(trainer, every=run.model.log_experts_steps))
    result = trainer.train(resume_from_checkpoint=checkpoint)
    # The Trainer has pushed what `--hub_strategy` asks for. The last push is this function's, and has the results.
    push_to_hub, training.push_to_hub = training.push_to_hub, False
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():  # an interrupted run may leave a broken one
        Path(str(training.output_dir), "all_results.json").unlink(missing_ok=True)
    trainer.save_metrics("train", result.metrics)
    for part, prefix in (("evaluation", "eval"), ("test", "test")):
        if part in streams:
            evaluate_part(run, trainer, streams[part], part, prefix)
    if trainer.is_world_process_zero():
        if push_to_hub:
            push(training, str(trainer.hub_model_id))
        write_run_state(str(training.output_dir), settings, finished=True)
    trainer.accelerator.wait_for_everyone()
    return trainer


def load_base(run: RunArguments, task: Task) -> Any:
    """Load the base model.

    Args:
        run (RunArguments): the options.
        task (Task): what is learned.

    Returns:
        PreTrainedModel: the model.
    """
    # A head that the checkpoint does not have is trained with the adapter.
    with quiet_loading(task.config_fields().get("modules_to_save")):
        return retry(
            task.model_class.from_pretrained,
            run.model.model_name_or_path,
            dtype=run.model.dtype,
            **run.model.hub_options(),
        )


def load_feature_extractor(run: RunArguments, base: Any) -> Any:
    """Load the feature extractor of the base model, for clips of the greatest length that are read.

    Args:
        run (RunArguments): the options.
        base (PreTrainedModel): the base model.

    Returns:
        SequenceFeatureExtractor: it.
    """
    name = run.model.feature_extractor_name or run.model.model_name_or_path
    with quiet_loading():
        feature_extractor = retry(AutoFeatureExtractor.from_pretrained, name, **run.model.hub_options())
    seconds = _fitting_length(run, base)
    return feature_extractor if seconds is None else fit_feature_extractor(feature_extractor, seconds)


def _fitting_length(run: RunArguments, base: Any) -> Optional[float]:
    """The length to which the base model is cut, if it is."""
    seconds = run.data.max_length_seconds
    return None if seconds is None else fitting_length(base, seconds)


def load_streams(run: RunArguments, task: Task, feature_extractor: Any) -> dict[str, AudioStream]:
    """Load the data for training, evaluation and test.

    Args:
        run (RunArguments): the options.
        task (Task): what is learned; its classes are those of the training data.
        feature_extractor (SequenceFeatureExtractor): the model's feature extractor.

    Returns:
        dict[str, AudioStream]: by use.
    """
    streams: dict[str, AudioStream] = {}
    for part, (split, rows) in run.parts().items():
        streams[part] = load_stream(
            run.data.dataset_name,
            split,
            feature_extractor,
            run.data_options(task),
            task=task,
            rows=rows,
            training=part == "training",
            needs_length=part == "training" and run.training.max_steps <= 0,
        )
        task = streams[part].task or task
    return streams


def add_adapter(run: RunArguments, base: Any, task: Task, config: SoftMoAConfig) -> PeftModel:
    """Put the adapter into the base model.

    Args:
        run (RunArguments): the options.
        base (PreTrainedModel): the base model.
        task (Task): what is learned, with its classes.
        config (SoftMoAConfig): of the adapter; what the task says is put in.

    Returns:
        PeftModel: the model.
    """
    fields = {**task.config_fields(), "max_length_seconds": _fitting_length(run, base)}
    if config.modules_to_save is not None:
        fields["modules_to_save"] = config.modules_to_save
    with quiet_loading():
        model: Any = get_peft_model(base, replace(config, **fields), revision=run.model.model_revision)
    return model


def fingerprints(
    model: PeftModel, feature_extractor: Any, streams: Mapping[str, AudioStream], evaluation_counts: bool
) -> dict[str, str]:
    """What must stay the same under the same names: the base model, and the rows with their audio.

    Args:
        model (PeftModel): the model.
        feature_extractor (SequenceFeatureExtractor): its feature extractor.
        streams (mapping): the data, by use.
        evaluation_counts (bool): whether the evaluation chooses the checkpoint.

    Returns:
        dict[str, str]: by name.
    """
    parts = ("training", "evaluation") if evaluation_counts else ("training",)
    return {
        "base_weights": fingerprint_weights(model),
        "base_config": fingerprint_config(model.config),
        "feature_extractor": fingerprint_config(feature_extractor),
        **{f"{part}_{what}": value for part in parts for what, value in streams[part].fingerprint.items()},
    }


def evaluate_part(run: RunArguments, trainer: AudioTrainer, stream: AudioStream, part: str, prefix: str) -> None:
    """Evaluate the trained model, and write the metrics into files and the adapter's card.

    Args:
        run (RunArguments): the options.
        trainer (AudioTrainer): after training.
        stream (AudioStream): the data.
        part (str): its use, one of `run.parts()`.
        prefix (str): of the metrics.
    """
    metrics = trainer.evaluate(stream, metric_key_prefix=prefix)
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    if not trainer.is_world_process_zero():
        return
    split, selection = run.parts()[part]
    add_results(
        str(run.training.output_dir),
        {name: metrics[f"{prefix}_{name}"] for name in METRICS if f"{prefix}_{name}" in metrics},
        dataset=run.data.dataset_name,
        config_name=run.data.dataset_config_name,
        revision=run.data.dataset_revision,
        split=f"{split} ({selection})" if selection else split,
    )


def push(training: TrainingArguments, repo_id: str) -> None:
    """Upload the adapter, its card and its feature extractor, without checkpoints and pickles.

    Args:
        training (TrainingArguments): says what is uploaded, and how.
        repo_id (str): where to.
    """
    retry(
        HfApi(token=training.hub_token).upload_folder,
        repo_id=repo_id,
        folder_path=str(training.output_dir),
        ignore_patterns=["checkpoint-*", "_*", "run.json*", "runs/*", "*.bin", "*.pt"],
        revision=training.hub_revision,
    )
