"""The page of a report: safe, complete in itself, and as a browser shows it."""

import base64
import hashlib
import io
import re
import wave
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest
from conftest import wait_until

from peft_softmoa.inspection.page import (
    TEMPLATE,
    BlockMaps,
    ClipView,
    Image,
    Matrix,
    Problem,
    Section,
    SlotMap,
    Table,
    Tick,
    data_url,
    write_page,
)

EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)>"onerror="alert(3)" \'onload=\'alert(4)&amp;'
LONG = "name_without_any_place_to_break_" * 6
# Nearly those of ESC-10.
CLASSES = [
    "dog", "rooster", "rain", "sea_waves", "crackling_fire", "crying_baby", "sneezing", "clock_tick", "helicopter",
    "Mowing lawns",
]  # fmt: skip

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


def sound(seconds=1.5):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.zeros(int(16_000 * seconds), "<i2").tobytes())
    return buffer.getvalue()


def image(rows, columns, width=100.0, height=100.0):
    """Shades that get stronger from left to right."""
    buffer = io.BytesIO()
    shades = np.linspace(0, 255, columns).astype(np.uint8)
    PIL.Image.fromarray(np.tile(shades, (rows, 1))).save(buffer, "PNG")
    return Image(data_url("image/png", buffer.getvalue()), width, height)


def clip_view(text, experts=(3, 2), end=75.0, has_frequencies=True):
    """A clip of 1.5 s in 2 s, with blocks that have so many experts."""
    blocks = [
        BlockMaps(
            f"block {number} {text}",
            [SlotMap(n, f"slot {n} {text}", [f"aside {text}"], image(8, 32), f"peak {text}") for n in range(count)],
            [Tick(0, "0"), Tick(25, "1"), Tick(100, "12")],
        )
        for number, count in enumerate(experts)
    ]
    return ClipView(
        f"clip {text}",
        f"says {text}",
        sound(),
        2.0,
        end,
        f"kind {text}",
        image(64, 90, width=75.0),
        [Tick(0, "0"), Tick(50, "1"), Tick(100, "2")],
        [Tick(30, "1 kHz")],
        has_frequencies,
        f"how {text}",
        blocks,
    )


def write(path, text="a dog", clip=True, **options):
    """A page with everything that there is, and the text in every field."""
    cells = [[(0.0, ""), (0.5, f"7 {text}"), None], [(1.0, "9"), (0.2, "1"), (0.0, "0")]]
    names = f"row {text}", f"column {text}"
    matrix = Matrix(
        f"matrix {text}", f"alt {text}", f"caption {text}", *names, [f"r{n} {text}" for n in range(2)], ["0", "1", "2"],
        cells, [(0, 0)],
    )  # fmt: skip
    upright = Matrix(
        "Upright", "alt", "caption", "true class", "what the model says", CLASSES, CLASSES,
        [[(float(row == column), "8" if row == column else "") for column in range(10)] for row in range(10)],
    )  # fmt: skip
    table = Table(f"table {text}", [f"column {n} {text}" for n in range(9)], [[f"cell {n} {text}" for n in range(9)]])
    write_page(
        path,
        title=f"page {text}",
        summary=f"summary {text}",
        subtitle=f"subtitle {text}",
        clip=clip_view(text, **options) if clip else None,
        problems=[Problem(f"problem {text}", [f"finding {n} {text}" for n in range(9)], f"use `num_experts` {text}")],
        sections=[
            Section("Accuracy", f"right {text}", "93%", [f"mistake {n} {text}" for n in range(9)], [upright]),
            Section(f"open {text}", f"words {text}", matrices=[matrix, upright], table=table),
            Section("Facts", facts={f"fact {text}": f"value {text}"}),
        ],
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
        if tag not in ("meta", "link", "input"):
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
    assert len(evil.all("script")) == 1
    shown = "".join(evil.texts)
    for field in (
        "page", "summary", "subtitle", "problem", "finding 0", "finding 8", "use num_experts", "clip", "says", "kind",
        "how", "block 0", "slot 0", "aside", "peak", "right", "mistake 8", "open", "words", "matrix", "alt", "caption",
        "row", "column", "r0", "7", "table", "column 0", "cell 8", "fact", "value",
    ):  # fmt: skip
        assert f"{field} {EVIL}" in shown, field
    assert evil.all("audio")[0]["aria-label"] == f"clip {EVIL}"
    assert f"table {EVIL}" in [each.get("aria-label") for each in evil.all("div")]


def test_names_that_no_encoding_has_are_written(tmp_path):
    assert "page \ud800犬".replace("\ud800", "?") in "".join(Elements(write(tmp_path / "a.html", "\ud800犬")).texts)


def test_everything_is_in_the_file(elements):
    for _, attributes in elements.tags:
        for name in ("src", "href", "srcset", "poster", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
        # The policy would not let them through.
        assert "style" not in attributes and not [name for name in attributes if name.startswith("on")]
    text = "".join(elements.texts)
    assert "url(" not in text and "@import" not in text and "http" not in text
    policy = next(each["content"] for each in elements.all("meta") if "http-equiv" in each)
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    for name, file in (("style", "page.css"), ("script", "page.js")):
        digest = base64.b64encode(hashlib.sha256((TEMPLATE / file).read_bytes()).digest()).decode()
        assert allowed.pop(f"{name}-src") == f"'sha256-{digest}'"
    assert allowed == {
        "default-src": "'none'", "img-src": "data:", "media-src": "data:", "base-uri": "'none'",
        "form-action": "'none'",
    }  # fmt: skip
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
    for each in [*elements.all("a"), *elements.all("use")]:
        assert each["href"][1:] in names
    for _, each in elements.tags:
        assert set(each.get("aria-labelledby", "").split()) <= set(names)
        for value in each.values():
            assert set(re.findall(r"url\(#(.*)\)", value or "")) <= set(names)
    # Whoever does not see a picture gets what it says.
    for each in elements.all("svg"):
        assert each.get("aria-hidden") or (
            each["role"] == "img" and ("aria-label" in each or "aria-labelledby" in each)
        )
    assert len(elements.all("title")) > len(elements.all("desc")) == len(elements.all("mask")) + 3
    assert {each.get("scope") for each in elements.all("th")} == {"col", "row"}


def test_the_clip_and_the_problems_come_first(page_path, elements):
    headings = [attributes.get("id") for tag, attributes in elements.tags if tag == "h2"]
    assert headings == ["clip", "problems", "part-1", "part-2", "part-3"]
    # What reads only texts gets them in an order that makes sense.
    shown = page_path.read_text(encoding="utf-8").partition("<body>")[2]
    order = [
        "<h1>", 'id="clip"', "<audio", 'id="spectrogram-title"', 'id="block-0"', 'id="block-1"', 'id="problems"',
        "summary name", "finding 0", "use <code>num_experts</code>", "<nav", "93%", "right name", "matrix name",
    ]  # fmt: skip
    places = [shown.index(each) for each in order]
    assert places == sorted(places)


def test_what_is_not_given_has_no_part(tmp_path):
    write_page(tmp_path / "page.html", title="Experts", summary="All are of use.")
    elements = Elements(tmp_path / "page.html")
    assert [each["id"] for each in elements.all("h2")] == ["problems"]
    assert not elements.all("audio", "nav", "details", "dl", "ul", "svg", "select", "input")


def test_browser_shows_everything(visit, page_path):
    page = visit(page_path)
    wait_until(page, "document.querySelector('audio').readyState >= 1")
    assert page.evaluate("document.querySelector('audio').duration") == pytest.approx(1.5, abs=0.01)
    assert page.evaluate("document.querySelector('audio').error") is None
    # The policy lets the page's own style and script through.
    assert page.evaluate("getComputedStyle(document.body).marginTop") == "0px"
    assert page.evaluate("document.documentElement.className") == "js"


def test_browser_runs_nothing_of_what_names_say(visit, tmp_path):
    page = visit(write(tmp_path / "evil.html", EVIL))
    wait_until(page, "document.readyState === 'complete'")
    assert page.evaluate("document.scripts.length") == 1
    assert page.title() == f"page {EVIL}"


def test_the_policy_stops_a_script_that_is_not_the_pages(browser, page_path, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page_path.read_text(encoding="utf-8").replace("</h1>", "</h1><script>alert(1)</script>"))
    context = browser.new_context()
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: (said.append("it ran"), dialog.dismiss()))
    page.goto(path.as_uri())
    context.close()
    assert len(said) == 1 and "Content Security Policy" in said[0]


HEADS = "[...document.querySelectorAll('.playhead')].map((line) => [line.getAttribute('x1'), line.getAttribute('x2')])"


def test_playhead_follows_the_clip(visit, page_path):
    page = visit(page_path)
    wait_until(page, "document.querySelector('audio').readyState >= 1")
    assert page.evaluate(HEADS) == [["0%", "0%"]] * 6  # of the spectrogram and five maps
    page.evaluate("document.querySelector('audio').currentTime = 0.5")
    wait_until(page, f"({HEADS}).every(([from, to]) => from === '25%' && to === '25%')")  # of 2 s
    spectrogram = page.locator(".spectrogram .map")
    line, box = page.locator(".spectrogram .playhead").bounding_box(), spectrogram.bounding_box()
    assert line["x"] + line["width"] / 2 - box["x"] == pytest.approx(box["width"] / 4, abs=1.5)
    page.evaluate("document.querySelector('audio').muted = true")
    page.evaluate("document.querySelector('audio').play()")
    wait_until(page, f"parseFloat(({HEADS})[5][0]) > 40")
    assert len({tuple(pair) for pair in page.evaluate(HEADS)}) == 1
    # At the end of 1.5 s.
    wait_until(page, f"document.querySelector('audio').ended && ({HEADS})[0][0] === '75%'")


def test_a_click_on_a_map_seeks(visit, page_path):
    page = visit(page_path)
    wait_until(page, "document.querySelector('audio').readyState >= 1")
    for number, share, seconds in ((0, 0.3, 0.6), (1, 0.1, 0.2), (2, 0.9, 1.5)):  # the clip ends before the map does
        shown = page.locator(".map:visible").nth(number)
        box = shown.bounding_box()
        shown.click(position={"x": share * box["width"], "y": box["height"] / 2})
        assert page.evaluate("document.querySelector('audio').currentTime") == pytest.approx(seconds, abs=0.02)


SHOWN = """[...document.querySelectorAll('.block .map')].filter((map) => map.checkVisibility())
    .map((map) => map.querySelector('mask').id)"""


def test_pickers_choose_block_and_expert(visit, page_path):
    page = visit(page_path)
    assert page.evaluate(SHOWN) == ["map-0-0", "map-0-1", "map-0-2"]
    low = page.locator("#map-0-2").locator("..").bounding_box()["height"]
    page.get_by_label("2", exact=True).check()
    assert page.evaluate(SHOWN) == ["map-0-2"]
    assert page.locator("#map-0-2").locator("..").bounding_box()["height"] > 2 * low
    # The second block has no such expert: it shows all that it has.
    page.locator("select").select_option(index=1)
    assert page.evaluate(SHOWN) == ["map-1-0", "map-1-1"]
    assert page.get_by_label("2", exact=True).is_disabled() and page.get_by_label("all", exact=True).is_checked()
    # By keyboard alone.
    page.get_by_label("all", exact=True).focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(SHOWN) == ["map-1-0"]
    page.keyboard.press("ArrowRight")
    assert page.evaluate(SHOWN) == ["map-1-1"]
    page.locator("select").focus()
    page.keyboard.press("ArrowUp")
    assert page.evaluate(SHOWN) == ["map-0-1"]
    assert page.evaluate("document.querySelector('.spectrogram .map').checkVisibility()")


@pytest.mark.parametrize("experts", [(), (1,), (4,)])
def test_what_there_is_nothing_to_choose_from_has_no_picker(visit, tmp_path, experts):
    page = visit(write(tmp_path / "page.html", experts=experts, end=None, has_frequencies=False))
    assert page.locator("select").count() == 0
    assert page.locator("input").count() == (5 if experts == (4,) else 0)
    assert len(page.evaluate(SHOWN)) == sum(experts)
    wait_until(page, "document.querySelector('audio').readyState >= 1")
    page.evaluate("document.querySelector('audio').currentTime = 1")
    wait_until(page, f"({HEADS}).every(([from]) => from === '50%')")


def test_without_scripts_all_maps_are_there(visit, page_path):
    page = visit(page_path, java_script_enabled=False)
    for number in range(5):
        assert page.locator(".block .map").nth(number).is_visible()
    assert not page.locator("select").is_visible() and not page.get_by_label("all", exact=True).is_visible()
    assert not page.locator(".playhead").first.is_visible()


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_page_fits_the_screen(visit, page_path, width):
    page = visit(page_path, viewport={"width": width, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    page.evaluate("document.querySelectorAll('.block').forEach((each) => { each.classList.add('shown') })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing is cut off either, but for what scrolls by itself.
    assert (
        page.evaluate(
            """(width) => [...document.body.querySelectorAll("*:not(.scroll *, .skip, mask *)")]
        .filter((element) => element.getBoundingClientRect().right > width + 0.5
            || element.getBoundingClientRect().left < -0.5).map((element) => element.outerHTML.slice(0, 80))""",
            width,
        )
        == []
    )
    table = "document.querySelector('.scroll:has(table)')"
    assert page.evaluate(f"{table}.scrollWidth > {table}.clientWidth")


def test_usual_matrices_fit_a_phone(visit, tmp_path):
    """Ten classes, and nothing of them is cut off at the borders of the drawing."""
    page = visit(write(tmp_path / "page.html", "dog"), viewport={"width": 390, "height": 740})
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll:has(svg)')].every((box) => box.scrollWidth <= box.clientWidth)"
    )
    assert (
        page.evaluate(
            """() => [...document.querySelectorAll('.matrix')].flatMap((svg) => {
        const all = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].filter((text) => {
            const one = text.getBoundingClientRect();
            return one.left < all.left - 0.5 || one.right > all.right + 0.5 || one.top < all.top - 0.5;
        }).map((text) => text.textContent);
    })"""
        )
        == []
    )


COLORS = """() => Object.fromEntries(
    [['.map .shades', 'fill'], ['.spectrogram .shades', 'fill'], ['.matrix .cell', 'fill'], ['.matrix .number', 'fill'],
     ['.map .paper', 'fill'], ['.playhead', 'stroke'], ['.axis text', 'fill'], ['.axis line', 'stroke']]
    .map(([where, what]) => [where, getComputedStyle(document.querySelector(where))[what]]))"""


def test_figures_follow_light_and_dark(visit, page_path):
    page = visit(page_path, color_scheme="light")
    light = page.evaluate(COLORS)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(COLORS)
    assert [name for name in light if light[name] == dark[name]] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_maps_are_seen(visit, page_path, scheme):
    """By their pixels: shades get stronger from left to right, from the paper to the colour of the scheme."""
    page = visit(page_path, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('.playhead, .end').forEach((each) => each.remove())")
    shot = page.locator(".block.shown .map").first.screenshot()
    pixels = np.asarray(PIL.Image.open(io.BytesIO(shot)).convert("L"), int)
    row = pixels[len(pixels) // 2]
    first, last = row[int(0.02 * len(row))], row[int(0.98 * len(row))]
    steps = np.diff(row[4:-4])
    assert abs(last - first) > 120 and (last > first) == (scheme == "dark")
    assert (steps >= 0).all() if scheme == "dark" else (steps <= 0).all()
    # 32 columns without smoothing between them.
    assert len(np.unique(row[4:-4])) <= 32


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_frequencies_are_read_beside_a_single_expert(visit, page_path, scheme):
    """By their pixels: the labels are copies of those of the spectrogram, whose style is not asked for so easily."""
    page = visit(page_path, color_scheme=scheme)
    page.get_by_label("1", exact=True).check()
    shot = page.locator(".block.shown .map:visible").screenshot()
    pixels = np.asarray(PIL.Image.open(io.BytesIO(shot)).convert("L"), int)
    # At 30% from the bottom, where the paper has no shade yet.
    middle = round(0.7 * len(pixels))
    label = pixels[middle - 8 : middle + 8, 4:45]  # the playhead is at the border
    paper = np.median(pixels[middle - 30 : middle - 12, :20])
    assert (paper > 128) == (scheme == "light") and abs(label - paper).max() > 120


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(visit, page_path, scheme):
    page = visit(page_path, color_scheme=scheme)
    contrast, where = page.evaluate(LEAST_CONTRAST)
    assert contrast >= 4.5, where
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 128) == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_can_be_read_on_every_shade(visit, page_path, scheme):
    colors = visit(page_path, color_scheme=scheme).evaluate(COLORS)

    def luminance(color):
        parts = np.array(re.findall(r"\d+", color)[:3], float) / 255 if isinstance(color, str) else color
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    paper, cell = (
        np.array(re.findall(r"\d+", colors[name])[:3], float) / 255 for name in (".map .paper", ".matrix .cell")
    )
    for shade in np.linspace(0, 1, 11):
        pair = luminance(colors[".matrix .number"]), luminance(shade * cell + (1 - shade) * paper)
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5


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
    assert {"a", "audio", "scroll", "summary", "select", "input"} <= set(reached)
    assert page.evaluate("[...document.querySelectorAll('details')].every((each) => each.open)")


def test_skip_link_leads_to_the_report(visit, page_path):
    page = visit(page_path)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_print_has_what_is_folded_and_no_dark_page(visit, page_path):
    page = visit(page_path, color_scheme="dark")
    page.get_by_label("1", exact=True).check()
    last = "['.problems details li', '#map-1-1', '[data-expert=\"0\"]'].map((each) => document.querySelector(each))"
    last += ".map((each) => (each.closest('svg') ?? each).checkVisibility({contentVisibilityAuto: true}))"
    assert page.evaluate(last) == [False] * 3
    page.emulate_media(media="print", color_scheme="dark")
    # In the next frame.
    wait_until(page, f"{last}.every((each) => each)")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(LEAST_CONTRAST)[0] >= 7
