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
# Findings that are shown before one asks for more.
MOST_FINDINGS = 10

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f5f6f8; --text: #1c2127; --soft: #535c67; --line: #d5dae0; --link: #0a56a3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --card: #1d2329; --text: #e4e8ec; --soft: #a7b1bc; --line: #3a434d; --link: #82bdf7;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}
header, main { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
main { padding-bottom: 4rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.75rem; }
h2 { font-size: 1.375rem; line-height: 1.3; margin: 3rem 0 0.75rem; padding-top: 1.25rem; }
h2 { border-top: 1px solid var(--line); }
h3 { font-size: 1.0625rem; line-height: 1.4; margin: 2rem 0 0.5rem; }
p { margin: 0 0 0.75rem; max-width: 46rem; }
.summary { font-size: 1.1875rem; line-height: 1.5; }
a { color: var(--link); text-underline-offset: 0.15em; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 3px; border-radius: 2px; }
.skip { position: absolute; left: 0; top: -10rem; padding: 0.75rem 1.25rem; background: var(--page); z-index: 1; }
.skip:focus { top: 0; }
nav ul { list-style: none; margin: 1.25rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }
nav a { display: inline-block; padding: 0.25rem 0; }
.findings { margin: 0; padding-left: 1.25rem; max-width: 48rem; }
.findings li { margin-bottom: 0.375rem; }
dl { margin: 0; padding: 0.5rem 1.25rem; background: var(--card); border-radius: 0.5rem; }
dl div {
  display: grid; grid-template-columns: minmax(8rem, 1fr) 3fr; gap: 0 1.25rem; padding: 0.4375rem 0;
}
dl div + div { border-top: 1px solid var(--line); }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; }
figure { margin: 0 0 2rem; }
figcaption { color: var(--soft); max-width: 46rem; margin-top: 0.5rem; }
figure img {
  display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: 0.375rem;
}
audio { display: block; width: 100%; max-width: 36rem; margin-top: 0.5rem; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--link); padding: 0.375rem 0; width: fit-content; max-width: 100%; }
.scroll { overflow-x: auto; margin: 0.5rem 0 1.5rem; border: 1px solid var(--line); border-radius: 0.5rem; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.5rem 0.75rem; color: var(--soft); }
th, td { padding: 0.375rem 0.75rem; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; min-width: 6.5rem; overflow-wrap: normal; }
th:first-child { text-align: left; font-weight: 500; }
tbody tr { border-top: 1px solid var(--line); }
thead th, thead th:first-child { font-weight: 600; background: var(--card); }
@media (max-width: 36rem) {
  header { padding-top: 1.5rem; }
  h1 { font-size: 1.625rem; }
  header, main { padding-left: 1rem; padding-right: 1rem; }
  dl { padding: 0.25rem 1rem; }
  dl div { grid-template-columns: minmax(0, 1fr); }
}
@media (prefers-color-scheme: dark) { figure img { padding: 0.5rem; } }
@media print {
  :root { --page: #ffffff; --card: #ffffff; --text: #000000; --soft: #333333; --line: #bbbbbb; --link: #000000; }
  body { font-size: 10pt; }
  header, main { max-width: none; padding: 0; }
  nav, audio, .skip { display: none; }
  figure img { padding: 0; max-height: 22cm; width: auto; }
  figure, tr, li { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; border: 0; }
  th, td { white-space: normal; padding: 2pt 4pt; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary { display: none; }
}
"""


class Picture(NamedTuple):
    """A picture and its words."""

    title: str
    png: bytes
    alt: str  # what it shows, for who does not see it
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
    # What closes off pictures and table until one opens it, such as "12 blocks"; without, they are open.
    folded: Optional[str] = None


def write_page(
    path: str | os.PathLike,
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
    """Write a report as one HTML file: everything is in it, and it loads and runs nothing.

    Args:
        path (str or PathLike): the file.
        title (str): heading of the page.
        summary (str): the whole in a sentence or two.
        findings (sequence of str): what stands out, a sentence each.
        facts (mapping, optional): what was looked at, such as the adapter's name, by what it is.
        sections (sequence of Section): the figures and tables.
        notes (sequence of str): what is left out, and why.
        audio (bytes, optional): a WAV file to listen to.
        audio_label (str): names it. Default: `"The clip"`.
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
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
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
<style>{STYLE}</style>
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
    # Names of files may have halves of characters, which no encoding has.
    Path(path).write_bytes(document.encode("utf-8", "replace"))


def _findings(findings: Sequence[str]) -> str:
    shown = f'<ul class="findings">\n{_items(findings[:MOST_FINDINGS])}\n</ul>'
    more = findings[MOST_FINDINGS:]
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
    # A reader without a mouse scrolls what has the focus.
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
