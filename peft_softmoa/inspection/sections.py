"""The sections of the report of `inspect_adapter`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .clips import FRAME_SECONDS, ClipReading
from .maps import ReadingMap
from .page import Picture, Section, Table
from .plots import plot_classes, plot_load, plot_reading, png
from .report import ExpertReport

# Number of blocks whose classes the page shows: those that tell most of the class. The JSON file has all.
CLASS_PICTURES = 3


def load_section(report: ExpertReport) -> Section:
    """The section about the load of the experts.

    Args:
        report (ExpertReport): the report.

    Returns:
        Section: a picture with all blocks.
    """
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


def class_sections(report: ExpertReport) -> list[Section]:
    """The section about classes.

    Args:
        report (ExpertReport): the report.

    Returns:
        list[Section]: a section with pictures of the blocks that tell most of the class; empty without classes.
    """
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


def reading_section(report: ExpertReport, reading: ClipReading) -> Section:
    """The section about where in a clip the slots read.

    Args:
        report (ExpertReport): the report, which names the blocks.
        reading (ClipReading): what the blocks did with the clip.

    Returns:
        Section: a picture of each block that has a map.
    """
    pictures = []
    caption = "Bright is where a slot reads more than one that reads all tokens alike."
    if reading.grid:
        caption += " Elsewhere are tokens without a place, such as class tokens."
    maps = list(zip(reading.records, reading.maps))
    for record, found in tqdm(maps, desc="Drawing the clip", unit=" blocks", delay=1, leave=False, disable=None):
        if found is not None:
            name = report.names[record.block, record.adapter]
            peaks = "; ".join(_describe_peak(peak) for peak in find_peaks(found, reading))
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


def metrics_section(report: ExpertReport) -> Section:
    """The section with the metrics of all blocks.

    Args:
        report (ExpertReport): the report.

    Returns:
        Section: a table with a row for each block.
    """
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
    """Find where each slot reads most, as a multiple of a uniform reading.

    Args:
        found (ReadingMap): where the slots of a block read.
        reading (ClipReading): the clip.

    Returns:
        list[dict]: for each slot the `expert` and the `slot`, the `seconds` and, for patches, the `hertz` at the middle
        of what it reads most, and the share that it reads `elsewhere`.
    """
    peaks = []
    clip, (experts, slots, bins, length) = reading.clip, found.shares.shape
    step = FRAME_SECONDS if reading.grid and bins > 1 else clip.seconds / length
    # As in the pictures: a place does not count more because more patches cover it.
    multiples = (found.shares / found.uniform).nan_to_num(0.0, 0.0, 0.0)
    for expert in range(experts):
        for slot in range(slots):
            # The middle of the patch, or of the part that no other patch covers.
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


def _describe_peak(peak: dict[str, Any]) -> str:
    where = f"{peak['seconds']:.2f} s" + (f", {peak['hertz']:.0f} Hz" if peak["hertz"] is not None else "")
    return f"expert {peak['expert']}, slot {peak['slot']} most at {where}"
