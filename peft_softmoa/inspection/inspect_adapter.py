"""Look at an adapter: what its experts do with a clip or over a dataset, as numbers, pictures and a page."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from ..training.load import stream_source
from ..training.options import DataOptions
from ..training.source import open_source
from .clips import FRAME_SECONDS, ClipReading, load_adapter, prepare_batches, read_clip
from .maps import ReadingMap
from .page import Picture, Section, Table, write_page
from .plots import plot_classes, plot_load, plot_reading, png
from .report import ExpertReport, expert_report

# Of how many blocks the page shows classes: of those that tell most of them. All are in the JSON file.
CLASS_PICTURES = 3
# The label column is `label`, if there is one.
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
    """See what the experts of an adapter do with a clip, over a dataset, or both.

    Writes `report.json` with all numbers, pictures as PNG files, and `report.html`, one file that needs no other.

    Args:
        adapter (str): folder of the adapter, or its id on the Hub.
        output_dir (str or PathLike): where to write; it is made.
        audio (str, optional): a file with a clip; the report shows where in it each slot reads.
        dataset (str, optional): id on the Hub or local folder, as for `load_stream`. The report's metrics are those
            over its clips, or else those of the one clip.
        split (str): of the dataset. Default: `"train"`.
        rows (str, optional): which rows of it, such as `"fold=5"`. Default: all.
        options (DataOptions): how the dataset is read, and how much of a clip, from its start. With `label_column=None`
            the labels are in the column `label`, if there is one. Default: that, and 30 seconds of each clip.
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
    model, feature_extractor = load_adapter(adapter, revision)
    config = model.active_peft_config
    reading = None if audio is None else read_clip(model, feature_extractor, audio, options.max_length_seconds)
    # The page may be sent to others, whom folders of this computer do not concern.
    adapter_name, base_name, dataset_name = (
        Path(name).resolve().name if name and os.path.isdir(name) else name
        for name in (adapter, config.base_model_name_or_path, dataset)
    )
    facts = {
        "Adapter": str(adapter_name),
        "Base model": str(base_name),
        "Mixture": f"{config.num_experts} experts of r={config.r}, {config.routing} routing, type {config.expert_type}",
    }
    notes = []
    if dataset is not None:
        source = open_source(dataset, split, options)
        if options.label_column is None and "label" in source.columns:
            options = replace(options, label_column="label")
        stream = stream_source(source, feature_extractor, options, rows=rows, training=False, needs_length=False)
        total = max_clips or (len(stream) if stream.summary else None)
        clips = tqdm(islice(stream, max_clips), desc="Recording experts", unit=" clips", total=total)
        batches = _batches(clips, batch_size, DataCollatorWithPadding(feature_extractor))
        report = expert_report(
            model, prepare_batches(model, batches), label_names=stream.label_names, show_progress=False
        )
        facts["Dataset"] = f"{dataset_name}, {split}{f', {rows}' if rows else ''}: {report.num_clips} clips"
        if stream.extract.skipped:
            notes.append(f"Clips that cannot be used: {'; '.join(stream.extract.skipped)}.")
    elif reading is not None:
        report = expert_report(model, prepare_batches(model, [reading.inputs]), show_progress=False)
        notes.append("These are numbers of one clip. A dataset shows what holds for the adapter in general.")
    if report.without_classes:
        notes.append(f"There is nothing about classes: {report.without_classes}.")
    sections = [_load(report), *_classes(report)]
    sound = None
    if reading is not None:
        facts["Clip"] = f"{reading.clip.name}, {reading.duration:.2f} s"
        if reading.prediction:
            facts["The model says"] = reading.prediction
        notes += _left_out(reading)
        sections.append(_reading(report, reading))
        sound = _wav(reading)
    sections.append(_numbers(report))

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for picture in section.pictures:
            (folder / f"{_file_name(picture.title)}.png").write_bytes(picture.png)
    found = {"facts": facts, "left_out": notes, **report.to_dict()}
    if reading is not None:
        found["clip"] = _clip_to_dict(reading)
    (folder / "report.json").write_text(json.dumps(found, indent=1, allow_nan=False))
    page = folder / "report.html"
    write_page(
        page,
        title="What the experts do",
        summary=report.summary,
        findings=[finding.text for finding in report.findings],
        facts=facts,
        sections=sections,
        notes=notes,
        audio=sound,
        audio_label="The clip, as far as it is read",
    )
    return page


def _batches(clips: Iterator[dict[str, Any]], size: int, collate: Any) -> Iterator[Any]:
    """Batches of clips; of one, where clips have other lengths and the model would not know which tokens are real."""
    while chunk := list(islice(clips, size)):
        lengths = {np.shape(next(iter(clip.values()))) for clip in chunk}
        if len(lengths) > 1 and not any("mask" in name for name in chunk[0]):
            yield from (collate([clip]) for clip in chunk)
        else:
            yield collate(chunk)


def _load(report: ExpertReport) -> Section:
    loads = "; ".join(
        f"{report.names[block.block, block.adapter]}: {', '.join(f'{share:.0%}' for share in block.load.tolist())}"
        for block in report.blocks
    )
    picture = Picture(
        "Load of the experts",
        png(plot_load(report)),
        f"A matrix of blocks and experts. {loads}.",
        "Each row is an adapted block and adds up to 100%: how much of what the tokens get comes from each expert.",
    )
    text = (
        "An expert that hardly any token reads is idle. If all have the same share, all are used; how alike is what "
        "they read is another question, which their similarity answers. None of this says how alike their outputs are."
    )
    return Section("Who is used", text, [picture])


def _classes(report: ExpertReport) -> list[Section]:
    blocks = [block for block in report.blocks if block.class_loads is not None and block.num_experts > 1]
    blocks = sorted(blocks, key=lambda block: -block.scalars["class_information"])[:CLASS_PICTURES]
    if not blocks:
        return []
    pictures = [
        Picture(
            f"Classes in {report.names[block.block, block.adapter]}",
            png(plot_classes(report, block)),
            f"A matrix of classes and experts for the block {block.block}. The expert that a token reads tells "
            f"{block.scalars['class_information']:.3f} bits of the class.",
            "Each row is a class and adds up to 100%: from which experts the tokens of its clips get their outputs.",
        )
        for block in blocks
    ]
    text = (
        "If rows differ, experts have specialised on classes. Shown are the blocks whose experts tell most of the "
        "class, by their mutual information; over few clips of a class, chance makes some of it."
    )
    return [Section("Which expert for which class", text, pictures)]


def _reading(report: ExpertReport, reading: ClipReading) -> Section:
    pictures = []
    caption = "Bright is where a slot reads more than one that reads all tokens alike."
    if reading.grid:
        caption += " Elsewhere are tokens without a place, such as class tokens."
    for record, found in zip(reading.records, reading.maps):
        if found is not None:
            name = report.names[record.block, record.adapter]
            peaks = "; ".join(_say_peak(peak) for peak in find_peaks(found, reading))
            pictures.append(
                Picture(
                    f"Reading of {name}",
                    png(plot_reading(found, reading.clip, name)),
                    f"Maps of the clip for each slot of {name}. {peaks}.",
                    caption,
                )
            )
    text = (
        "A slot is a weighted average of tokens, and this is where in the clip its weights lie."
        if reading.grid
        else "A slot is a weighted average of tokens. Tokens are laid evenly over the time of the clip; what one of "
        "them has seen of its neighbours is not shown."
    )
    folded = f"{len(pictures)} blocks" if len(pictures) > 1 else None
    return Section("Where in the clip they read", text, pictures, folded=folded)


def _numbers(report: ExpertReport) -> Section:
    names = list(report.blocks[0].scalars)
    rows = [
        (report.names[block.block, block.adapter], *(f"{block.scalars[name]:.3g}" for name in names))
        for block in report.blocks
    ]
    table = Table("Metrics of each block", ["block", *(name.replace("_", " ") for name in names)], rows)
    text = (
        "The normalized entropy of the load is 1 and its coefficient of variation 0 if all experts have the same "
        "share; the effective number says how many equal ones would be as diverse. Effective tokens are from how many "
        "tokens a slot reads, similarities are cosines, and the class information is in bits."
    )
    return Section("In numbers", text, table=table, folded=f"{len(rows)} blocks")


def find_peaks(found: ReadingMap, reading: ClipReading) -> list[dict[str, Any]]:
    """Where each slot reads most, as a multiple of a uniform reading.

    Args:
        found (ReadingMap): where the slots of a block read.
        reading (ClipReading): the clip.

    Returns:
        list[dict]: for each slot its `expert` and `slot`, the `seconds` and, for patches, the `hertz` in the middle of
        what it reads most, and the share that it reads `elsewhere`.
    """
    peaks = []
    clip, (experts, slots, bins, length) = reading.clip, found.shares.shape
    step = FRAME_SECONDS if reading.grid and bins > 1 else clip.seconds / length
    # As in the pictures: places that more patches cover are not read more for that.
    multiples = (found.shares / found.uniform).nan_to_num(0.0, 0.0, 0.0)
    for expert in range(experts):
        for slot in range(slots):
            # The middle of the patch, or of what only the best one covers.
            best = torch.nonzero(multiples[expert, slot] >= multiples[expert, slot].max() * (1 - 1e-9)).double()
            place, time = best.median(0).values.tolist() if bins == 1 else best.mean(0).tolist()
            hertz = None
            if clip.frequencies is not None and bins > 1:
                hertz = float(np.interp(place, np.arange(len(clip.frequencies)), clip.frequencies))
            peaks.append(
                {
                    "expert": expert,
                    "slot": slot,
                    "seconds": (time + 0.5) * step,
                    "hertz": hertz,
                    "elsewhere": found.elsewhere[expert, slot].item(),
                }
            )
    return peaks


def _say_peak(peak: dict[str, Any]) -> str:
    where = f"{peak['seconds']:.2f} s" + (f", {peak['hertz']:.0f} Hz" if peak["hertz"] is not None else "")
    return f"expert {peak['expert']}, slot {peak['slot']} most at {where}"


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
    """Numbers of a few digits: a clip has many."""
    return np.round(values.cpu().double().numpy(), 7).tolist()


def _left_out(reading: ClipReading) -> list[str]:
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


def _wav(reading: ClipReading) -> bytes:
    import soundfile

    file, clip = io.BytesIO(), reading.clip
    samples = clip.samples[: round(clip.seconds * clip.sampling_rate)]
    soundfile.write(file, samples, clip.sampling_rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _file_name(title: str) -> str:
    return title.lower().replace(" ", "-").replace("(", "").replace(")", "")
