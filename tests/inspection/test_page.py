"""The page of a report: safe, complete in itself, and as a browser shows it."""

import base64
import io
import re
import struct
import wave
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from peft_softmoa.inspection.page import Picture, Section, Table, write_page

EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)>"onerror="alert(3)" \'onload=\'alert(4)&amp;'
LONG = "name_without_any_place_to_break_" * 6

# The least contrast of any text with what is behind it, by WCAG 2.2, and where.
LEAST_CONTRAST = """() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const parts = rgb(color).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const isClear = (color) => rgb(color)[3] === 0;
  let least = [100, "nothing"];
  for (const element of document.body.querySelectorAll("*")) {
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    let behind = element;
    while (isClear(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(luminance);
    const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (contrast < least[0]) least = [contrast, element.outerHTML];
  }
  return least;
}"""


def image(width=900, height=600):
    """A grey PNG file."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress((b"\0" + b"\x80" * width) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def sound(seconds=1.5):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.zeros(int(16_000 * seconds), "<i2").tobytes())
    return buffer.getvalue()


def write(path, text="a dog"):
    """A page with everything that there is, and the text in every field."""
    picture = Picture(f"title {text}", image(), f"alt {text}", f"caption {text}")
    table = Table(f"table {text}", [f"column {n} {text}" for n in range(9)], [[f"cell {n} {text}" for n in range(9)]])
    write_page(
        path,
        title=f"page {text}",
        summary=f"summary {text}",
        findings=[f"finding {number} {text}" for number in range(14)],
        facts={f"fact {text}": f"value {text}"},
        sections=[
            Section(f"open {text}", f"words {text}", [picture, picture], table),
            Section(f"folded {text}", f"words {text}", [picture], table, f"fold {text}"),
        ],
        notes=[f"note {text}"],
        audio=sound(),
        audio_label=f"clip {text}",
    )
    return path


class Elements(HTMLParser):
    """The tags of a page, with their attributes, and its texts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.errors, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"<{tag}> has an attribute twice"
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("page") / "report.html", LONG)


@pytest.fixture
def elements(page_path):
    return Elements(page_path)


def test_every_text_is_escaped(tmp_path):
    plain, evil = Elements(write(tmp_path / "plain.html")), Elements(write(tmp_path / "evil.html", EVIL))
    # The same elements with the same attributes, whatever the texts say.
    assert [(tag, set(attributes)) for tag, attributes in plain.tags] == [
        (tag, set(attributes)) for tag, attributes in evil.tags
    ]
    assert not evil.all("script")
    shown = "".join(evil.texts)
    for field in (
        "page", "summary", "finding 0", "finding 13", "fact", "value", "open", "folded", "words", "title", "caption",
        "table", "column 0", "column 8", "cell 0", "cell 8", "fold", "note", "clip",
    ):  # fmt: skip
        assert f"{field} {EVIL}" in shown, field
    assert evil.all("img")[0]["alt"] == f"alt {EVIL}"
    assert evil.all("audio")[0]["aria-label"] == f"clip {EVIL}"
    assert [each for each in evil.all("div") if "tabindex" in each][0]["aria-label"] == f"table {EVIL}"


def test_names_that_no_encoding_has_are_written(tmp_path):
    assert "page \ud800犬".replace("\ud800", "?") in "".join(Elements(write(tmp_path / "a.html", "\ud800犬")).texts)


def test_everything_is_in_the_file(elements):
    for _, attributes in elements.tags:
        for name in ("src", "href", "srcset", "poster", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    text = "".join(elements.texts)
    assert "url(" not in text and "@import" not in text and "http" not in text
    policy = next(each["content"] for each in elements.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy and "script-src" not in policy
    images = [each["src"] for each in elements.all("img")]
    assert [base64.b64decode(each.partition("base64,")[2]) for each in images] == [image()] * 3
    assert base64.b64decode(elements.all("audio")[0]["src"].partition("base64,")[2]) == sound()


def test_structure(elements):
    assert elements.open == []
    assert elements.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in elements.all("meta")
    levels = [int(tag[1]) for tag, _ in elements.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    names = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(set(names)) == len(names)
    for each in elements.all("a"):
        assert each["href"][1:] in names
    for each in elements.all("section"):
        assert each["aria-labelledby"] in names
    for each in elements.all("img"):
        assert each["alt"]
        assert (each["width"], each["height"]) == ("576", "384")  # 150 pixels to the inch, of which pages have 96
    assert len(elements.all("figure")) == len(elements.all("figcaption")) == 4
    assert {each.get("scope") for each in elements.all("th")} == {"col", "row"}


def test_what_is_not_given_has_no_part(tmp_path):
    write_page(tmp_path / "page.html", title="Experts", summary="All are of use.")
    elements = Elements(tmp_path / "page.html")
    assert not elements.all("h2", "section", "audio", "nav", "details", "dl", "ul")


def test_browser_shows_everything(visit, page_path):
    page = visit(page_path)
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    assert page.evaluate("[...document.images].map((image) => image.naturalWidth)") == [900] * 3
    page.wait_for_function("document.querySelector('audio').readyState >= 1")
    assert page.evaluate("document.querySelector('audio').duration") == pytest.approx(1.5, abs=0.01)
    assert page.evaluate("document.querySelector('audio').error") is None
    # The policy lets the page's own style through.
    assert page.evaluate("getComputedStyle(document.body).marginTop") == "0px"


def test_browser_runs_nothing_of_what_names_say(visit, tmp_path):
    page = visit(write(tmp_path / "evil.html", EVIL))
    page.wait_for_function("document.readyState === 'complete'")
    assert page.evaluate("document.scripts.length") == 0
    assert page.title() == f"page {EVIL}"


@pytest.mark.parametrize("width", [320, 360, 1200])
def test_page_fits_the_screen(visit, page_path, width):
    page = visit(page_path, viewport={"width": width, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing is cut off either, but for the tables, which scroll by themselves.
    assert (
        page.evaluate(
            """(width) => [...document.body.querySelectorAll("*:not(.scroll *, .skip)")]
        .filter((element) => element.getBoundingClientRect().right > width + 0.5).length""",
            width,
        )
        == 0
    )
    assert page.evaluate(
        "(() => { const box = document.querySelector('.scroll'); return box.scrollWidth > box.clientWidth })()"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(visit, page_path, scheme):
    page = visit(page_path, color_scheme=scheme)
    contrast, where = page.evaluate(LEAST_CONTRAST)
    assert contrast >= 4.5, where
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 128) == (scheme == "dark")
    # Pictures are made for white paper.
    assert page.evaluate("getComputedStyle(document.images[0]).backgroundColor") == "rgb(255, 255, 255)"


def test_keyboard_reaches_everything(visit, page_path):
    page = visit(page_path, viewport={"width": 800, "height": 740})
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.className || document.activeElement.localName"))
        if reached == ["skip"]:
            assert page.evaluate("document.activeElement.getBoundingClientRect().top") == 0
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        if reached[-1] == "summary" and page.evaluate("!document.activeElement.parentElement.open"):
            page.keyboard.press("Enter")
    assert reached[0] == "skip"
    assert {"a", "audio", "scroll", "summary"} <= set(reached)
    assert page.evaluate("[...document.querySelectorAll('details')].every((each) => each.open)")


def test_skip_link_leads_to_the_report(visit, page_path):
    page = visit(page_path)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_print_has_what_is_folded_and_no_dark_page(visit, page_path):
    page = visit(page_path, color_scheme="dark")
    last = "[...document.images].at(-1)"
    assert not page.evaluate(f"{last}.checkVisibility({{contentVisibilityAuto: true}})")
    page.emulate_media(media="print", color_scheme="dark")
    # In the next frame.
    page.wait_for_function(f"{last}.checkVisibility({{contentVisibilityAuto: true}})", timeout=5000)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(LEAST_CONTRAST)[0] >= 7
