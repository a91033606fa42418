"""The parts of the report of `inspect_adapter` that are about a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np

from .blocks import BlockReport
from .confusion import Confusion
from .figures import shorten
from .findings import ADVICE
from .page import Matrix, Problem, Section, Table
from .report import ExpertReport

# Number of blocks whose classes the page shows: those that tell most of the class. The JSON file has all.
CLASS_PICTURES = 3
# Greatest number of classes in a matrix of confusion.
MAX_CLASSES = 60
# Longest name in a matrix, in characters.
LONGEST = 22


def problems_of(report: ExpertReport) -> list[Problem]:
    """The problems by their kind, with advice.

    Args:
        report (ExpertReport): the report.

    Returns:
        list[Problem]: one for each kind that occurs.
    """
    texts: dict[str, list[str]] = {}
    for finding in report.problems:
        texts.setdefault(finding.kind, []).append(finding.text)
    return [Problem(title, texts[kind], advice) for kind, (title, advice) in ADVICE.items() if kind in texts]


def accuracy_sections(report: ExpertReport) -> list[Section]:
    """The section about accuracy and confusion.

    Args:
        report (ExpertReport): the report.

    Returns:
        list[Section]: a section, or none without labels.
    """
    confusion = report.confusion
    if confusion is None:
        return []
    correct, clips = int(confusion.correct.sum()), int(confusion.counts.sum())
    mistakes = [
        f"{true} is taken for {taken} in {count} of {number} clips" for true, taken, count, number in confusion.mistakes
    ]
    text = f"{correct} of {clips} clips are taken for what they are."
    if mistakes:
        text += " The mistakes, the most frequent first:"
    matrix = _confusion_matrix(confusion)
    return [
        Section(
            "Accuracy and confusion",
            text,
            f"{confusion.accuracy:.1%}",
            mistakes,
            [] if matrix is None else [matrix],
        )
    ]


def _confusion_matrix(confusion: Confusion) -> Optional[Matrix]:
    """Of the classes that have clips, or that clips are taken for."""
    counts = confusion.counts.numpy()
    totals = counts.sum(1)
    rows = [row for row in range(len(counts)) if totals[row]]
    named = [confusion.output_names.index(confusion.label_names[row]) for row in rows]
    # In the order of the rows, and then what is no class of the dataset.
    columns = [*named, *(each for each in np.flatnonzero(counts.sum(0)).tolist() if each not in named)]
    if len(columns) > MAX_CLASSES:
        return None
    return Matrix(
        "Confusion",
        "; ".join(
            f"{confusion.label_names[row]}: {counts[row, column]} of {totals[row]} right"
            for row, column in zip(rows, named)
        ),
        "Each row is a class, and says how many of its clips the model takes for each class; the diagonal is right.",
        "true class",
        "what the model says",
        [shorten(confusion.label_names[row], LONGEST) for row in rows],
        [shorten(confusion.output_names[column], LONGEST) for column in columns],
        [
            [(count / totals[row], str(count) if count else "") for count in counts[row, columns].tolist()]
            for row in rows
        ],
        [(index, index) for index in range(len(rows))],
    )


def load_section(report: ExpertReport) -> Section:
    """The section about the load of the experts.

    Args:
        report (ExpertReport): the report.

    Returns:
        Section: a matrix with all blocks.
    """
    most = max(block.num_experts for block in report.blocks)
    names = [report.names[block.block, block.adapter] for block in report.blocks]
    loads = [block.load.tolist() for block in report.blocks]
    matrix = Matrix(
        "Load of the experts, in %",
        "; ".join(f"{name}: {', '.join(f'{share:.0%}' for share in load)}" for name, load in zip(names, loads)),
        "Each row is an adapted block, the first to run on top, and adds up to 100%: how much of what the tokens get "
        "comes from each expert. "
        f"Equal shares are {_equal_shares(report.blocks)}.",
        "block",
        "expert",
        [shorten(name, LONGEST) for name in names],
        [str(expert) for expert in range(most)],
        _percent([load + [None] * (most - len(load)) for load in loads], report.blocks),
    )
    text = (
        "An expert that hardly any token reads is idle. If all have the same share, all are used; how alike is what "
        "they read is another question, which their similarity answers. None of this says how alike their outputs are."
    )
    return Section("Who is used", text, matrices=[matrix])


def class_sections(report: ExpertReport) -> list[Section]:
    """The section about classes.

    Args:
        report (ExpertReport): the report.

    Returns:
        list[Section]: a section with matrices of the blocks that tell most of the class; empty without classes.
    """
    blocks = blocks_of_classes(report)
    if not blocks or report.label_names is None:
        return []
    rows = [shorten(name, LONGEST) for name in report.label_names]
    matrices = []
    for block in blocks:
        assert block.class_loads is not None
        loads = [each if any(each) else [None] * block.num_experts for each in block.class_loads.tolist()]
        name = report.names[block.block, block.adapter]
        matrices.append(
            Matrix(
                f"{name}, in %",
                f"The expert that a token reads tells {block.scalars['class_information']:.3f} bits of the class.",
                f"{block.scalars['class_information']:.2f} bits of the class. Each row adds up to 100%.",
                "class",
                "expert",
                rows,
                [str(expert) for expert in range(block.num_experts)],
                _percent(loads, [block]),
            )
        )
    text = (
        "How much of what the tokens of a class get comes from each expert. If rows differ, experts have specialised "
        "on classes. Shown are the blocks whose experts tell most of the class, by their mutual information; over few "
        "clips of a class, chance makes some of it."
    )
    preferences = [finding.text for finding in report.findings if finding.kind == "class"]
    return [Section("Which expert for which class", text, sentences=preferences, matrices=matrices)]


def blocks_of_classes(report: ExpertReport) -> list[BlockReport]:
    """Choose the blocks whose experts tell most of the class.

    Args:
        report (ExpertReport): the report.

    Returns:
        list[BlockReport]: the blocks, the most telling first; empty without classes.
    """
    blocks = [block for block in report.blocks if block.class_loads is not None and block.num_experts > 1]
    return sorted(blocks, key=lambda block: -block.scalars["class_information"])[:CLASS_PICTURES]


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
    return Section("In numbers", text, table=table)


def _equal_shares(blocks: Sequence[BlockReport]) -> str:
    sizes = sorted({block.num_experts for block in blocks})
    if len(sizes) == 1:
        return f"{100 / sizes[0]:.3g}%"
    return ", ".join(f"{100 / size:.3g}% among {size}" for size in sizes)


def _percent(
    shares: Sequence[Sequence[Optional[float]]], blocks: Sequence[BlockReport]
) -> list[list[Optional[tuple[float, str]]]]:
    """Cells of shares in %; the shades never end near an equal share, so that small differences do not stand out."""
    top = max([share or 0 for row in shares for share in row] + [2 / min(block.num_experts for block in blocks)])
    return [[None if share is None else (share / min(top, 1), f"{100 * share:.0f}") for share in row] for row in shares]
