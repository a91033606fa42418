"""Evaluate a trained adapter on a dataset."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional

import torch
from transformers import AutoTokenizer, Seq2SeqTrainingArguments

from ..training.load import load_stream
from ..training.options import DataOptions
from ..training.tasks import find_task
from ..training.trainer import AudioTrainer
from .loading import load_adapter


def evaluate_adapter(
    adapter: str,
    dataset: str,
    split: str,
    *,
    rows: Optional[str] = None,
    options: Optional[DataOptions] = None,
    revision: Optional[str] = None,
    batch_size: int = 8,
    num_workers: int = 0,
    metrics: Optional[Sequence[str]] = None,
    **task_options: Any,
) -> dict[str, float]:
    """Evaluate an adapter, as the training that made it did.

    Args:
        adapter (str): folder of the adapter, or its id on the Hub.
        dataset (str): id on the Hub or local folder, as for `load_stream`.
        split (str): split of the dataset.
        rows (str, optional): rows of the dataset, such as `"fold=5"`. Default: all.
        options (DataOptions, optional): how the dataset is read; without a `label_column`, that of the task. Default:
            the defaults of `DataOptions`, and the task's column.
        revision (str, optional): branch, tag or commit of the adapter.
        batch_size (int): number of clips in a batch. Default: 8.
        num_workers (int): number of processes that decode. Default: 0.
        metrics (sequence of str, optional): as for `compute_metrics`. Default: those of the task.
        task_options (Any): other arguments of the task, as for `make_task`.

    Returns:
        dict[str, float]: `loss`, the metrics and `num_clips`.

    Raises:
        ValueError: if the adapter is for none of the tasks, or the dataset does not fit it.
        OSError: if the adapter or its base model cannot be read.
    """
    model, feature_extractor = load_adapter(adapter, revision, dtype="float32")
    config = model.active_peft_config
    task = find_task(config, model.get_base_model(), metrics=metrics, **task_options)
    if hasattr(task, "tokenizer") and task.tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(adapter, revision=revision)
        except (OSError, ValueError):  # the adapter was saved without it
            tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path, revision=config.revision)
        task = replace(task, tokenizer=tokenizer)  # type: ignore[call-arg]
    options = options or DataOptions(label_column=None)
    options = replace(options, label_column=options.label_column or task.label_column)
    stream = load_stream(
        dataset, split, feature_extractor, options, task=task, rows=rows, training=False, needs_length=False
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            folder,
            per_device_eval_batch_size=batch_size,
            dataloader_num_workers=num_workers,
            predict_with_generate=True,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = AudioTrainer(model, arguments, eval_dataset=stream)
        found = trainer.evaluate()
    others = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")
    values = {name.removeprefix("eval_"): value for name, value in found.items()}
    values = {name: value for name, value in values.items() if name not in others}
    skipped = len(stream.extract.skipped)
    return {**values, **({"num_clips": stream.summary.num_rows - skipped} if stream.summary else {})}
