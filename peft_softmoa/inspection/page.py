"""A report as one HTML file that needs no other, no script and no network."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

# Pixels of a picture for each of the page's: pictures have 150 to the inch, pages 96.
DENSITY = 150 / 96
# Number of findings that are shown at first.
MAX_FINDINGS = 10
STYLE = Path(__file__).with_name("report.css")


class Picture(NamedTuple):
    """A picture and its texts."""

    title: str
    png: bytes
    alt: str  # what it shows, for readers who cannot see it
    caption: str  # how to read it, in a sentence


class Table(NamedTuple):
    """A table; the first column names the rows."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A part of the page."""

    title: str
    text: str
    pictures: Sequence[Picture] = ()
    table: Optional[Table] = None
    # Label of a fold that hides pictures and table until a reader opens it, such as "12 blocks". Default: no fold.
    folded: Optional[str] = None


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: str,
    findings: Sequence[str] = (),
    facts: Optional[Mapping[str, str]] = None,
    sections: Sequence[Section] = (),
    notes: Sequence[str] = (),
    audio: Optional[bytes] = None,
    audio_label: str = "The clip",
) -> None:
    """Write a report as one HTML file. It contains everything, and it loads and runs nothing.

    Args:
        path (str or PathLike): the file.
        title (str): heading of the page.
        summary (str): the result in one or two sentences.
        findings (sequence of str): what stands out, a sentence each.
        facts (mapping, optional): what was inspected, such as the adapter's name, by its label.
        sections (sequence of Section): the figures and tables.
        notes (sequence of str): what is left out, and why.
        audio (bytes, optional): a WAV file to listen to.
        audio_label (str): label of the audio. Default: `"The clip"`.
    """
    parts = []
    if findings:
        parts.append(("What stands out", _findings(findings)))
    if facts:
        rows = "\n".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
        parts.append(("What was looked at", f"<dl>\n{rows}\n</dl>"))
    if audio is not None:
        label = _text(audio_label)
        player = f'<audio controls preload="metadata" aria-label="{label}" src="{_data("audio/wav", audio)}"></audio>'
        parts.append(("Listen", f"<figure>\n{player}\n<figcaption>{label}</figcaption>\n</figure>"))
    parts += [(section.title, _section(section)) for section in sections]
    if notes:
        parts.append(("What is left out", f'<ul class="findings">\n{_items(notes)}\n</ul>'))
    links = "\n".join(f'<li><a href="#part-{n}">{_text(name)}</a></li>' for n, (name, _) in enumerate(parts, 1))
    navigation = f'<nav aria-label="Contents">\n<ul>\n{links}\n</ul>\n</nav>' if len(parts) > 1 else ""
    body = "\n".join(
        f'<section aria-labelledby="part-{n}">\n<h2 id="part-{n}">{_text(name)}</h2>\n{content}\n</section>'
        for n, (name, content) in enumerate(parts, 1)
    )
    style = STYLE.read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; media-src data:; base-uri 'none'"
    document = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{_text(title)}</h1>
<p class="summary">{_text(summary)}</p>
{navigation}
</header>
<main id="main" tabindex="-1">
{body}
</main>
</body>
</html>
"""
    # File names may contain lone surrogates, which UTF-8 cannot encode.
    Path(path).write_bytes(document.encode("utf-8", "replace"))


def _findings(findings: Sequence[str]) -> str:
    shown = f'<ul class="findings">\n{_items(findings[:MAX_FINDINGS])}\n</ul>'
    more = findings[MAX_FINDINGS:]
    if not more:
        return shown
    rest = f'<ul class="findings">\n{_items(more)}\n</ul>'
    return f"{shown}\n<details>\n<summary>{len(more)} more</summary>\n{rest}\n</details>"


def _section(section: Section) -> str:
    parts = [_picture(picture) for picture in section.pictures]
    if section.table is not None:
        parts.append(_table(section.table))
    content = "\n".join(parts)
    if section.folded is not None:
        content = f"<details>\n<summary>{_text(section.folded)}</summary>\n{content}\n</details>"
    return f"<p>{_text(section.text)}</p>\n{content}"


def _picture(picture: Picture) -> str:
    width, height = (round(size / DENSITY) for size in struct.unpack(">II", picture.png[16:24]))
    source = f'src="{_data("image/png", picture.png)}" width="{width}" height="{height}"'
    return f"""<h3>{_text(picture.title)}</h3>
<figure>
<img alt="{_text(picture.alt)}" {source}>
<figcaption>{_text(picture.caption)}</figcaption>
</figure>"""


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header)
    rows = "\n".join(
        f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in table.rows
    )
    # Readers without a mouse can scroll the element that has the focus.
    return f"""<div class="scroll" role="region" tabindex="0" aria-label="{_text(table.caption)}">
<table>
<caption>{_text(table.caption)}</caption>
<thead><tr>{header}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>"""


def _items(texts: Sequence[str]) -> str:
    return "\n".join(f"<li>{_text(text)}</li>" for text in texts)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _text(text: str) -> str:
    """Safe as text and between quotes."""
    return html.escape(text, quote=True)
