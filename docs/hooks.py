"""What MkDocs does besides: links to files of the repository, and the table of options."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OPTIONS = "<!-- options -->"
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def picture(path: str) -> str:
    """Where the site keeps a picture of the repository; several studies have a `results.png`."""
    return "pictures/" + path.replace("/", "-")


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures outside of `docs/` that pages show."""
    from mkdocs.structure.files import File

    for page in ROOT.joinpath("docs").glob("*.md"):
        for mark, _, path, _ in OUTSIDE.findall(page.read_text()):
            if mark and files.get_file_from_path(picture(path)) is None:
                files.append(File.generated(config, picture(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Let links that leave `docs/` lead to the repository, pictures to themselves, and put in the table of options.

    A page is then right both here and where the repository is read, and a picture can be seen large on a phone.
    """

    def outside(match: re.Match[str]) -> str:
        mark, text, path, anchor = match.groups()
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"A page links to {path}, which is not in the repository.")
        if mark:
            return f"[![{text}]({picture(path)})]({picture(path)})"
        return f"[{text}]({config['repo_url']}/blob/main/{path}{anchor or ''})"

    return OUTSIDE.sub(outside, markdown.replace(OPTIONS, options_table() if OPTIONS in markdown else OPTIONS))


def options_table() -> str:
    """Each field of `SoftMoAConfig` that is not PEFT's own, with its default and its help.

    Returns:
        str: a Markdown table.
    """
    from peft_softmoa import SoftMoAConfig

    rows = ["| field | default | meaning |", "| --- | --- | --- |"]
    for entry in fields(SoftMoAConfig):
        if entry.name in SoftMoAConfig.__annotations__:
            meaning = " ".join(filter(None, (entry.metadata["help"], entry.metadata.get("example"))))
            meaning = re.sub(r"([*_|<])", r"\\\1", meaning)
            rows.append(f"| `{entry.name}` | `{entry.default!r}` | {meaning} |")
    return "\n".join(rows)
