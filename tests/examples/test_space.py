"""The Space, started as a user starts it, and used in a browser."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FRAMES, MEL_BINS, write_tone
from packaging.requirements import Requirement
from peft import get_peft_model
from transformers import ASTFeatureExtractor, ASTForAudioClassification

import peft_softmoa
from peft_softmoa import SoftMoAConfig
from peft_softmoa.inference import Window, classify_windows, load_classifier

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
CLASSES = ["dog", "rain", "siren", "door", "bird"]
PICTURE = "img[alt^='The clip']"
needs_gradio = pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="needs gradio: pip install gradio")


@pytest.fixture(scope="module")
def adapter(base_folder, tmp_path_factory):
    """An adapter for a tiny AST, which takes 0.64 s."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = SoftMoAConfig(num_experts=3, r=2, init_weights=False, label_names=CLASSES, modules_to_save=["classifier"])
    get_peft_model(ASTForAudioClassification.from_pretrained(base_folder), config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(adapter, tmp_path_factory):
    """Where the app runs: at the first free port from 7860 on."""
    folder = tmp_path_factory.mktemp("space")
    names = ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "SYSTEM")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    own = {"ADAPTER": str(adapter), "GRADIO_TEMP_DIR": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-u", SPACE / "app.py"],
        cwd=folder,
        env={**kept, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        printed = ""
        for line in process.stdout:
            printed += line
            if found := re.search(r"Running on local URL:\s+(http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail(printed)
        yield found.group(1)
        process.terminate()


@pytest.fixture
def page(browser, address):
    """The page; at the end there must have been no errors of scripts, and no requests but to the app."""
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page, problems = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda request: request.url.startswith((address, f"blob:{address}", "data:")) or problems.append(request.url),
    )
    page.goto(address)
    yield page
    context.close()
    assert problems == []


def upload(page, path):
    page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_role("button", name="Clear").wait_for()  # the file is there
    page.get_by_role("button", name="Classify").click()


@needs_gradio
def test_a_clip_is_classified_and_experts_are_picked(page, adapter, tmp_path):
    samples = write_tone(tmp_path / "tone.wav", seconds=0.5)
    assert page.locator(PICTURE).count() == 0
    upload(page, tmp_path / "tone.wav")
    picture = page.locator(PICTURE)
    picture.wait_for()
    assert picture.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 750
    [result] = classify_windows(load_classifier(str(adapter)), [Window("tone", samples, 0.0, 0.5)])
    for name, score in zip(CLASSES, result.scores.tolist()):
        line = page.get_by_test_id(f"{name}-confidence-set").inner_text()
        assert int(re.search(r"(\d+)%", line).group(1)) == pytest.approx(100 * score, abs=0.6)
    assert page.get_by_test_id("label-output-value").inner_text() == CLASSES[result.scores.argmax()]

    seen = [picture.get_attribute("src")]
    for label, choice in (("Expert", "expert 2"), ("Block", "layers.1.attention"), ("Expert", "all experts")):
        page.get_by_label(label, exact=True).click()
        page.get_by_role("option", name=choice).click()
        page.wait_for_function("([css, old]) => document.querySelector(css).src !== old", arg=[PICTURE, seen[-1]])
        seen.append(picture.get_attribute("src"))
    assert len(set(seen)) == 4
    assert (
        picture.get_attribute("alt")
        == "The clip, and below it where in the clip all experts of layers.1.attention read"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@needs_gradio
def test_examples_are_there(page):
    page.get_by_role("button", name="siren.wav").click()
    page.get_by_role("button", name="Clear").wait_for()
    page.get_by_role("button", name="Classify").click()
    page.locator(PICTURE).wait_for()


@needs_gradio
@pytest.mark.parametrize("kind", ["broken", "long", "none"])
def test_what_cannot_be_used_is_said(page, tmp_path, kind):
    if kind == "none":
        page.get_by_role("button", name="Classify").click()
        message = "There is no clip: upload one, record one, or pick an example."
    elif kind == "broken":
        (tmp_path / "broken.wav").write_bytes(b"RIFF no audio at all")
        upload(page, tmp_path / "broken.wav")
        message = "broken.wav: "
    else:
        write_tone(tmp_path / "long.wav", seconds=0.7)
        upload(page, tmp_path / "long.wav")
        message = "long.wav: longer than the 0.64 s that the model takes: trim it with the scissors"
    page.get_by_text(message).wait_for()
    assert page.locator(PICTURE).count() == 0


@needs_gradio
def test_without_an_adapter_it_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADAPTER", raising=False)
    message = r"no adapter in demo/adapter\. .* make one in a minute: peft-softmoa demo --output_dir demo$"
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(SPACE / "app.py"))


def test_the_front_matter_and_the_requirements_are_up_to_date():
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).exists()
    assert len(front["short_description"]) <= 60  # what the Hub takes
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"gradio=={front['sdk_version']}" in constraints
    lines = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    needed = {each.name: each for each in map(Requirement, lines)}
    assert needed["gradio"].specifier.contains(front["sdk_version"])
    assert needed["peft-softmoa"].specifier.contains(peft_softmoa.__version__)
