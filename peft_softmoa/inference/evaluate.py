"""Evaluate a trained adapter on a dataset."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    EvalPrediction,
    Seq2SeqTrainingArguments,
    WhisperFeatureExtractor,
    pipeline,
)

from ..training.audio import AudioError, decode_audio, name_and_content
from ..training.load import load_stream
from ..training.metrics import compute_metrics
from ..training.options import DataOptions
from ..training.rows import name_some
from ..training.streams import AudioStream
from ..training.tasks import SpeechSeq2Seq, find_task
from ..training.trainer import AudioTrainer
from .loading import load_adapter, load_tokenizer

logger = logging.getLogger(__name__)


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
    long_form: bool = False,
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
        long_form (bool): whether a Whisper transcribes clips of any length, piece by piece, as transformers' pipeline
            does; one clip at a time, without a loss. Default: False; then longer clips than it reads are skipped.
        task_options (Any): other arguments of the task, as for `make_task`.

    Returns:
        dict[str, float]: `loss`, the metrics, and `num_clips`, the number of clips that could be used.

    Raises:
        ValueError: if the adapter is for none of the tasks, or the dataset does not fit it.
        OSError: if the adapter or its base model cannot be read.
    """
    model, feature_extractor = load_adapter(adapter, revision, dtype="float32")
    config = model.active_peft_config
    task = find_task(config, model.get_base_model(), metrics=metrics, **task_options)
    if hasattr(task, "tokenizer") and task.tokenizer is None:
        tokenizer = load_tokenizer(adapter, revision)
        if tokenizer is None:
            raise ValueError(
                f"Neither '{adapter}' nor its base model has a tokenizer, which makes text of the outputs. Save "
                "that of the training into the adapter's folder."
            )
        task = replace(task, tokenizer=tokenizer)  # type: ignore[call-arg]
    options = options or DataOptions(label_column=None)
    options = replace(options, label_column=options.label_column or task.label_column)
    stream = load_stream(
        dataset, split, feature_extractor, options, task=task, rows=rows, training=False, needs_length=False
    )
    if long_form:
        stream.prepare(model)
        if stream.extract.channels != "mono":
            raise ValueError("`long_form` is for mono adapters, as transformers' pipeline is mono: leave it out.")
        return _evaluate_long_form(model, feature_extractor, stream)
    counted = []

    def score(prediction: EvalPrediction) -> dict[str, float]:
        counted.append(len(prediction.label_ids))
        return task.score(prediction)

    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            folder,
            per_device_eval_batch_size=batch_size,
            dataloader_num_workers=num_workers,
            predict_with_generate=True,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = AudioTrainer(model, arguments, eval_dataset=stream, compute_metrics=score)
        found = trainer.evaluate()
    others = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")
    values = {name.removeprefix("eval_"): value for name, value in found.items()}
    values = {name: value for name, value in values.items() if name not in others}
    return {**values, "num_clips": sum(counted)}


def _evaluate_long_form(model: PeftModel, feature_extractor: Any, stream: AudioStream) -> dict[str, float]:
    task, options = stream.task, stream.extract.options
    if not isinstance(task, SpeechSeq2Seq) or not isinstance(feature_extractor, WhisperFeatureExtractor):
        raise ValueError("`long_form` is for adapters of a Whisper that recognises speech: leave it out.")
    base: Any = model.get_base_model()
    recognize: Any = pipeline(
        "automatic-speech-recognition",
        model=base,
        tokenizer=task.tokenizer,
        feature_extractor=feature_extractor,
    )
    recognised, written, skipped = [], [], []
    total = stream.summary.num_rows if stream.summary else None
    for row in tqdm(stream.rows, desc="Transcribing", unit=" clips", total=total, disable=None):
        audio = row[options.audio_column]
        name, _ = name_and_content(audio)
        try:
            waveform = decode_audio(audio, feature_extractor.sampling_rate)
        except AudioError as error:
            if options.on_bad_audio == "raise":
                raise
            skipped.append(str(error))
            continue
        recognised.append(recognize(waveform, return_timestamps=True)["text"])
        written.append(task.parse({column: row[column] for column in options.label_columns}, name))
    if skipped:
        logger.warning(f"Skipped {len(skipped)} audio files that cannot be used: {name_some(skipped, separator='; ')}")
    texts = task.compared(recognised), task.compared(written)
    return {**compute_metrics(task.metrics or task.default_metrics, {"texts": texts}), "num_clips": len(written)}
