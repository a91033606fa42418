"""A report as one HTML file that needs no other and no network."""

from __future__ import annotations

import base64
import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

TEMPLATE = Path(__file__).with_name("template")
# Width of the cells of a matrix in pixels, for at most so many columns; narrower ones have no text. What is usual fits
# on a phone of 390 pixels.
CELLS, NARROW = {5: 40, 8: 31, 16: 25}, 15
# Width of the characters of a matrix in pixels, in the widest of the usual fonts; that of the reader is not known.
CHARACTERS = {**dict.fromkeys("fijlrtI.,:;'|!()[]/- ", 5.0), **dict.fromkeys("mwMW@%—…", 12.0)}


class Problem(NamedTuple):
    """Problems of one kind, and what may be done about them."""

    title: str
    texts: Sequence[str]
    advice: str  # names of options are between backticks


class Tick(NamedTuple):
    """A tick of an axis."""

    at: float  # where, in % of the axis
    label: str


class Image(NamedTuple):
    """A picture in shades, which the page colours."""

    source: str  # a grey PNG file as a data URL, white for the most
    width: float = 100.0  # how much of the axes it covers, from the lower left corner on, in %
    height: float = 100.0


class SlotMap(NamedTuple):
    """Where in the clip a slot reads."""

    expert: int
    name: str
    notes: Sequence[str]
    image: Image
    alt: str


class BlockMaps(NamedTuple):
    """Where in the clip the slots of a block read."""

    name: str
    maps: Sequence[SlotMap]
    scale: Sequence[Tick]  # what the shades mean


class ClipView(NamedTuple):
    """A clip to listen to, and where in it the slots read."""

    name: str
    says: str  # what the model says, in a sentence, or nothing
    sound: bytes  # a WAV file
    seconds: float  # what the maps span in time
    end: Optional[float]  # where the clip ends, in %, if it is padded
    kind: str  # what the spectrogram is
    spectrogram: Image
    times: Sequence[Tick]
    frequencies: Sequence[Tick]  # from the bottom
    has_frequencies: bool  # whether the maps have them, too
    text: str  # how to read the maps
    blocks: Sequence[BlockMaps]

    @property
    def num_experts(self) -> int:
        """The greatest number of experts of a block."""
        return max((each.expert + 1 for block in self.blocks for each in block.maps), default=0)


class Matrix(NamedTuple):
    """A matrix of shaded cells."""

    title: str
    alt: str
    caption: str
    row_label: str
    column_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    # Shade from 0 to 1 and text of each cell; blank where there is nothing to show, which is not zero.
    cells: Sequence[Sequence[Optional[tuple[float, str]]]]
    marked: Sequence[tuple[int, int]] = ()  # cells with a border, by row and column

    @property
    def cell(self) -> int:
        """Width of a cell in pixels."""
        return next((width for most, width in CELLS.items() if len(self.columns) <= most), NARROW)

    @property
    def has_text(self) -> bool:
        """Whether cells have room for their texts."""
        return self.cell > NARROW

    @property
    def left(self) -> int:
        """Room for the names of rows, in pixels."""
        return _width([*self.rows, f"{self.row_label} ↓"]) + 8

    @property
    def top(self) -> int:
        """Room for the names of columns, in pixels; they are upright if they are longer than the cells are wide."""
        return 20 + (_width(self.columns) + 4 if self.is_upright else 18)

    @property
    def is_upright(self) -> bool:
        """Whether the names of columns stand upright."""
        return _width(self.columns) > self.cell


class Table(NamedTuple):
    """A table; the first column names the rows."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A part of the page."""

    title: str
    text: str = ""
    figure: str = ""  # a number that stands out
    sentences: Sequence[str] = ()
    matrices: Sequence[Matrix] = ()
    table: Optional[Table] = None
    facts: Optional[Mapping[str, str]] = None


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: str,
    subtitle: str = "",
    clip: Optional[ClipView] = None,
    problems: Sequence[Problem] = (),
    sections: Sequence[Section] = (),
) -> None:
    """Write a report as one HTML file. It contains everything, and loads nothing; a policy keeps it to its own script.

    Args:
        path (str or PathLike): the file.
        title (str): heading of the page.
        summary (str): the result in one or two sentences.
        subtitle (str): what is reported on. Default: nothing.
        clip (ClipView, optional): the clip, with which the page opens.
        problems (sequence of Problem): what comes next, with the summary.
        sections (sequence of Section): the rest.
    """
    # Encoded as browsers read them, from which they compute the hash.
    style, script = ((TEMPLATE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "media-src data:; base-uri 'none'; form-action 'none'"
    )
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(TEMPLATE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(code=_code, wav=lambda content: data_url("audio/wav", content))
    document = environment.get_template("page.html").render(
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        title=title,
        summary=summary,
        subtitle=subtitle,
        clip=clip,
        problems=problems,
        sections=sections,
    )
    # File names may contain lone surrogates, which UTF-8 cannot encode.
    Path(path).write_bytes(document.encode("utf-8", "replace"))


def data_url(kind: str, content: bytes) -> str:
    """Write a file as a URL that contains it.

    Args:
        kind (str): its media type.
        content (bytes): the file.

    Returns:
        str: the URL.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _code(text: str) -> Markup:
    """What is between backticks, as code."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part)
        for index, part in enumerate(text.split("`"))
    )


def _width(names: Sequence[str]) -> int:
    return round(max((sum(map(_character_width, name)) for name in names), default=0))


def _character_width(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return 12.0
    return CHARACTERS.get(character, 9.0 if character.isupper() else 7.6)
