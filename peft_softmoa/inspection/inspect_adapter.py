"""Inspect an adapter: what its experts do with a clip or over a dataset, as numbers, pictures and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Optional

import numpy as np
from peft import PeftConfig
from torch import Tensor
from tqdm.auto import tqdm

from ..inference.loading import load_adapter
from ..registration import SOFTMOA
from ..targets.patterns import name_patterns
from ..training.inputs import Collate
from ..training.load import load_stream
from ..training.options import DataOptions
from ..training.rows import name_some
from ..training.source import open_source
from ..training.tasks import SingleLabel, find_task
from .clip_view import clip_view, find_peaks
from .clips import ClipReading, prepare_batches, read_clip, shared_name
from .page import Section, write_page
from .plots import plot_classes, plot_load, plot_reading, png
from .report import ExpertReport, expert_report
from .sections import (
    accuracy_sections,
    blocks_of_classes,
    class_sections,
    load_section,
    metrics_section,
    problems_of,
)
from .spectrograms import FRAME_SECONDS

# The label column is `label`, if there is one, and the adapter is for one class a clip.
DEFAULT_OPTIONS = DataOptions(label_column=None, max_length_seconds=30.0)


def inspect_adapter(
    adapter: str,
    output_dir: str | os.PathLike[str],
    *,
    audio: Optional[str] = None,
    dataset: Optional[str] = None,
    split: str = "train",
    rows: Optional[str] = None,
    options: DataOptions = DEFAULT_OPTIONS,
    revision: Optional[str] = None,
    max_clips: Optional[int] = None,
    batch_size: int = 8,
) -> Path:
    """Report what the experts of an adapter do with a clip, over a dataset, or both.

    The report is `report.json` with all numbers, pictures as PNG files, and `report.html`, one file with everything.

    Args:
        adapter (str): folder of the adapter, or its id on the Hub.
        output_dir (str or PathLike): folder for the report; it is created.
        audio (str, optional): a file with a clip; the report shows where in the clip each slot reads.
        dataset (str, optional): id on the Hub or local folder, as for `load_stream`. The metrics are those of its
            clips; without a dataset, those of the one clip.
        split (str): split of the dataset. Default: `"train"`.
        rows (str, optional): rows of the dataset, such as `"fold=5"`. Default: all.
        options (DataOptions): how the dataset is read, and how much of a clip, from its start. With `label_column=None`
            the labels are in the column `label`, if there is one and the adapter is for one class a clip. Default:
            that, and 30 seconds of each clip.
        revision (str, optional): branch, tag or commit of the adapter.
        max_clips (int, optional): number of clips of the dataset that are read. Default: all.
        batch_size (int): number of clips in a batch. Default: 8.

    Returns:
        Path: the page, `report.html`.

    Raises:
        ValueError: if there is neither clip nor dataset, the adapter is of another method, or a clip cannot be used.
        OSError: if the adapter or its base model cannot be read.
    """
    if audio is None and dataset is None:
        raise ValueError("There is nothing to look at: give a clip with `audio`, a dataset with `dataset`, or both.")
    if batch_size < 1 or (max_clips is not None and max_clips < 1):
        raise ValueError(f"`batch_size` and `max_clips` must be positive, got {batch_size} and {max_clips}.")
    method = PeftConfig._get_peft_type(adapter, revision=revision)
    if method != SOFTMOA:
        raise ValueError(f"'{adapter}' is a {method} adapter, but only those of Soft-MoA have experts to look at.")
    model, feature_extractor = load_adapter(adapter, revision)
    config = model.active_peft_config
    reading = None if audio is None else read_clip(model, feature_extractor, audio, options.max_length_seconds)
    # The page may be sent to others: it does not name folders of this computer.
    adapter_name, base_name, dataset_name = (
        Path(name).resolve().name if name and os.path.isdir(name) else name
        for name in (adapter, config.base_model_name_or_path, dataset)
    )
    patterns = name_patterns(vars(config))
    facts = {
        "Adapter": str(adapter_name),
        "Base model": str(base_name),
        "Mixture": f"{config.num_experts} experts of r={config.r}, {config.routing} routing, type {config.expert_type}"
        f"{'; ' if patterns else ''}{patterns}",
    }
    notes = []
    if dataset is not None:
        source = open_source(dataset, split, options)
        has_classes = _has_one_class(model)
        if options.label_column is None and has_classes and "label" in source.columns:
            options = replace(options, label_column="label")
        stream = load_stream(
            source, source.split, feature_extractor, options, rows=rows, training=False, needs_length=False
        )
        stream.prepare(model)
        total = max_clips or (len(stream) if stream.summary else None)
        clips = tqdm(islice(stream, max_clips), desc="Recording experts", unit=" clips", total=total, disable=None)
        batches = _batches(clips, batch_size, Collate(feature_extractor, stream.task))
        report = expert_report(
            model, prepare_batches(model, batches), label_names=stream.label_names, show_progress=False
        )
        if options.label_column is None and not has_classes:
            report = replace(report, no_classes_reason="the adapter was not trained for one class a clip")
        facts["Dataset"] = f"{dataset_name}, {split}{f', {rows}' if rows else ''}: {report.num_clips} clips"
        if stream.extract.skipped:
            data_folder = dataset if os.path.isdir(dataset) else None
            skipped = [f"{shared_name(name, data_folder)}: {reason}" for name, reason in stream.extract.skipped]
            notes.append(f"Clips that cannot be used: {name_some(skipped, separator='; ')}.")
    elif reading is not None:
        report = expert_report(model, prepare_batches(model, [reading.inputs]), show_progress=False)
        notes.append("These are numbers of one clip. A dataset shows what holds for the adapter in general.")
    if report.no_classes_reason:
        notes.append(f"There is nothing about classes: {report.no_classes_reason}.")
    if report.no_confusion_reason:
        notes.append(f"There is no accuracy: {report.no_confusion_reason}.")
    if reading is not None:
        facts["Clip"] = f"{reading.clip.name}, {reading.duration:.2f} s"
        if reading.prediction:
            facts["The model says"] = reading.prediction
        notes += _clip_notes(reading)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for title, picture in _draw(report, reading):
        (folder / f"{_file_name(title)}.png").write_bytes(picture)
    found = {"facts": facts, "left_out": notes, **report.to_dict()}
    if reading is not None:
        found["clip"] = _clip_to_dict(reading)
    (folder / "report.json").write_text(json.dumps(found, indent=1, allow_nan=False))
    page = folder / "report.html"
    write_page(
        page,
        title="What the experts do",
        summary=report.summary,
        subtitle=f"{adapter_name} on {base_name}",
        clip=None if reading is None else clip_view(report, reading),
        problems=problems_of(report),
        sections=[
            *accuracy_sections(report),
            load_section(report),
            *class_sections(report),
            metrics_section(report),
            Section("What was looked at", facts=facts),
            *([Section("What is left out", sentences=notes)] if notes else []),
        ],
    )
    return page


def _has_one_class(model: Any) -> bool:
    try:
        return isinstance(find_task(model.active_peft_config, model.get_base_model()), SingleLabel)
    except ValueError:  # a model of nobody's task, such as an encoder
        return True


def _batches(clips: Iterator[dict[str, Any]], size: int, collate: Any) -> Iterator[Any]:
    """Batches of clips. Without a mask, clips of unequal length go one by one: the model would read the padding."""
    while chunk := list(islice(clips, size)):
        lengths = {np.shape(next(iter(clip.values()))) for clip in chunk}
        has_mask = any("mask" in name for name in chunk[0] if name != "channel_mask")
        if len(lengths) > 1 and not has_mask:
            yield from (collate([clip]) for clip in chunk)
        else:
            yield collate(chunk)


def _clip_to_dict(reading: ClipReading) -> dict[str, Any]:
    return {
        "name": reading.clip.name,
        "duration": reading.duration,
        "seconds": reading.clip.seconds,
        "prediction": reading.prediction,
        "blocks": [
            {
                "block": record.block,
                "adapter": record.adapter,
                "peaks": None if found is None else find_peaks(found, reading),
                "mask": record.mask.tolist(),
                **{name: _rounded(getattr(record, name)) for name in ("dispatch", "combine", "norms")},
            }
            for record, found in zip(reading.records, reading.maps)
        ],
    }


def _rounded(values: Tensor) -> list[Any]:
    """Round the numbers: a clip has many of them."""
    rounded: list[Any] = np.round(values.cpu().double().numpy(), 7).tolist()
    return rounded


def _clip_notes(reading: ClipReading) -> list[str]:
    notes = list(dict.fromkeys(reading.without_map))
    seconds = len(reading.clip.samples) / reading.clip.sampling_rate
    if reading.duration > seconds + FRAME_SECONDS:
        notes.append(f"Of the clip's {reading.duration:.4g} s only the first {seconds:.4g} s are read.")
    if seconds > reading.clip.seconds + FRAME_SECONDS:
        notes.append(f"The model takes the first {reading.clip.seconds:.4g} s of a clip, and no more.")
    if reading.clip.seconds > seconds + FRAME_SECONDS:
        notes.append(
            f"The clip is filled up with silence to the {reading.clip.seconds:.4g} s that the model takes, and has no "
            "mask: the silence after its end is read like everything else."
        )
    return notes


def _draw(report: ExpertReport, reading: Optional[ClipReading]) -> Iterator[tuple[str, bytes]]:
    """The pictures as PNG files, for other pages than ours, with their titles."""
    yield "Load of the experts", png(plot_load(report))
    for block in blocks_of_classes(report):
        yield f"Classes in {report.names[block.block, block.adapter]}", png(plot_classes(report, block))
    found = [] if reading is None else [each for each in reading.maps if each is not None]
    for each in tqdm(found, desc="Drawing the clip", unit=" blocks", delay=1, leave=False, disable=None):
        assert reading is not None
        name = report.names[each.block, each.adapter]
        yield f"Reading of {name}", png(plot_reading(each, reading.clip, name))


def _file_name(title: str) -> str:
    return title.lower().replace(" ", "-").replace("(", "").replace(")", "")
