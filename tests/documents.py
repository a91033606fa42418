"""The README and the pages of `docs/`, and the code in them.

A block of Python has a name in a comment in front of it, such as `<!-- quickstart -->`, and a test runs it.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]}
NAMED = re.compile(r"<!-- ([\w-]+) -->\n```python\n(.*?)```(?:\n\n```\n(.*?)```)?", re.DOTALL)
BLOCKS = {name: (code, output) for text in PAGES.values() for name, code, output in NAMED.findall(text)}


def code(name):
    """The code of a block."""
    return BLOCKS[name][0]


def output(name):
    """What the page shows as printed by a block."""
    return BLOCKS[name][1]
