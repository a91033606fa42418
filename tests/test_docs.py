"""The code of the README and of every page is run, with local checkpoints and datasets in place of those on the Hub."""

import dataclasses
import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import FRAMES, write_parquet, write_tone
from documents import BLOCKS, DOCS, NAMED, PAGES, README, ROOT, code, output
from families import FAMILIES
from made_tasks import WHISPER_TOKENS, make_base, whisper_tokenizer
from models_table import BEGIN, END, PAGE
from peft import PeftConfig, get_peft_model
from transformers import AutoFeatureExtractor, WhisperConfig, WhisperForConditionalGeneration

from peft_softmoa import SoftMoAConfig
from peft_softmoa.cli import main
from peft_softmoa.commands import VERBS
from peft_softmoa.demo import run as demo_run

AST = "MIT/ast-finetuned-audioset-10-10-0.4593"


def test_every_block_of_python_is_run():
    """By a test that asks for it by its name."""
    for page, text in PAGES.items():
        assert len(NAMED.findall(text)) == text.count("```python\n"), f"{page} has Python without a name"
    assert len(BLOCKS) == sum(text.count("```python\n") for text in PAGES.values()), "two blocks have one name"
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    assert set(BLOCKS) <= set(re.findall(r'\b(?:code|run)\("([\w-]+)"', tests))


def test_the_first_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = code("first").replace("num_train_epochs=4", "max_steps=2")
    monkeypatch.setattr(demo_run, "CLIPS", {"train": 2, "test": 1})
    exec(first, names := {})
    assert set(names["train"].label_names) == set(names["model"].config.label2id)
    printed = capsys.readouterr().out
    assert re.search(r"^[01]\.\d+\n", printed, re.MULTILINE)
    assert re.search(r"^\{'score': [\d.]+, 'label': '\w+'\}$", printed, re.MULTILINE)


def test_quickstart_and_loading(base_folder, tones_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    local = {
        AST: str(base_folder),
        "ashraq/esc50": str(write_parquet(tmp_path / "parquet", tones_folder, class_label=False)),
        'label_column="category"': 'label_column="label"',
    }
    quickstart = code("quickstart")
    for there, here in local.items():
        assert there in quickstart
        quickstart = quickstart.replace(there, here)
    exec(quickstart, {})
    write_tone(tmp_path / "dog.wav")
    capsys.readouterr()
    exec(code("load"), {})
    assert re.search(r"\[\{'score': [\d.]+, 'label': '(high|low)'\}, ", capsys.readouterr().out)
    shutil.copytree("esc50-softmoa", "esc50-softmoa-2")
    names: dict = {}
    exec(code("several").replace("1024", str(FRAMES)), names)
    assert names["logits"].shape == (4, 2)
    capsys.readouterr()
    exec(code("records").replace("1024", str(FRAMES)), {})
    printed = capsys.readouterr().out
    assert "layers.0.attention torch.Size([4, " in printed and "Over 4 clips, the load is spread" in printed


def test_tasks(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        folder = tmp_path / "birds" / split
        folder.mkdir(parents=True)
        for index in range(2):
            write_tone(folder / f"{index}.wav")
        (folder / "metadata.csv").write_text("file_name,label\n0.wav,tit;wren\n1.wav,wren\n")
    exec(code("tasks").replace(AST, str(base_folder)), names := {})
    assert names["config"].label_names == ["tit", "wren"] == list(names["test"].label_names)


def test_an_encoder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained, loaded = (code("own").rpartition("model = ")[index] for index in (0, 2))
    exec(trained, names := {})
    clips = names["spectrograms"], names["mask"].index_fill(1, torch.arange(50, 100), 0)
    short = names["spectrograms"][:, :50], torch.ones(8, 50, dtype=torch.bool)
    with torch.no_grad():
        expected = names["model"](*clips)
        torch.testing.assert_close(names["model"](*short), expected)
        base = names["load_pretrained"]()
        base.head.load_state_dict(names["model"].get_base_model().head.modules_to_save["default"].state_dict())
        exec("model = " + loaded, names)
        assert torch.equal(names["model"](*clips), expected)
        # What differs is not the head alone.
        assert not torch.allclose(base(*clips), expected)


def test_channels_in_a_model(tiny_ast):
    names = {"base": tiny_ast, "clips": torch.randn(3, 2, FRAMES, 128), "labels": torch.tensor([0, 1, 4])}
    exec(code("channels"), names)
    assert names["output"].logits.shape == (3, 5) and names["output"].loss > 0


def test_channels_in_recordings(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = np.random.default_rng(0).normal(size=(16_000, 3)).astype("f4") / 10
    soundfile.write(tmp_path / "room.flac", samples, 16_000)
    for label in ("kitchen", "hall"):
        (tmp_path / "rooms" / "train" / label).mkdir(parents=True)
        shutil.copy("room.flac", tmp_path / "rooms" / "train" / label / "0.flac")
    exec(code("read-channels").replace(AST, str(base_folder)), names := {})
    assert names["waveforms"].shape == (3, 16_000)
    assert np.shape(next(iter(names["stream"]))["input_values"])[0] == 2


def test_transcription(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # The pipeline asks for 256 tokens.
    options = {**WHISPER_TOKENS, "max_target_positions": 300}
    base = make_base(tmp_path / "base", "Whisper", "ForConditionalGeneration", whisper_tokenizer(), **options)
    model = get_peft_model(WhisperForConditionalGeneration.from_pretrained(base), SoftMoAConfig())
    model.save_pretrained("words-softmoa")
    whisper_tokenizer().save_pretrained("words-softmoa")
    AutoFeatureExtractor.from_pretrained(base).save_pretrained("words-softmoa")
    write_tone(tmp_path / "word.wav")
    exec(code("transcribe"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_length(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code("length").replace(AST, str(base_folder)), names)
    assert names["model"].config.max_length == 500
    assert AutoFeatureExtractor.from_pretrained("five-seconds").max_length == 500


def test_budgets(capsys):
    exec(code("budget"), {})
    assert capsys.readouterr().out == output("budget")


def test_targets(capsys, tmp_path, monkeypatch):
    exec(code("targets"), {})
    assert capsys.readouterr().out == output("targets")
    # The command prints the same.
    config = WhisperConfig(architectures=["WhisperForConditionalGeneration"])
    config.save_pretrained(tmp_path / "openai/whisper-tiny")
    monkeypatch.chdir(tmp_path)
    main(re.search(r"`peft-softmoa (targets openai/whisper-tiny .*?)`", PAGES["models.md"]).group(1).split())
    assert capsys.readouterr().out == output("targets")


def test_every_model_is_in_the_table():
    """`make models` writes it, from the outcome of the tests."""
    rows = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {name}" for name in FAMILIES]
    assert f"[{len(FAMILIES)} models](" in README


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_lists_every_field_with_its_default_and_help(hooks):
    own = {field.name: field for field in dataclasses.fields(SoftMoAConfig)}
    for field in dataclasses.fields(PeftConfig):
        del own[field.name]
    table = hooks.options_table()
    assert table in hooks.on_page_markdown(PAGES["options.md"], {"repo_url": ""})
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table.replace("\\", ""), re.MULTILINE))
    assert set(rows) == set(own)
    for name, field in own.items():
        assert rows[name].startswith(f"`{field.default!r}` | {field.metadata['help']}")


def test_links_out_of_the_pages_lead_to_the_repository(hooks):
    config = {"repo_url": "https://example.org/here"}
    text = "[a](../examples/__init__.py) ![b](../examples/inspection/c.png) [d](e.md#f)"
    with pytest.raises(FileNotFoundError, match=r"links to examples/inspection/c\.png"):
        hooks.on_page_markdown(text, config)
    text = text.replace("![b](../examples/inspection/c.png)", "![b](../README.md) ![c](../examples/__init__.py)")
    assert hooks.on_page_markdown(text, config) == (
        "[a](https://example.org/here/blob/main/examples/__init__.py) [![b](pictures/README.md)](pictures/README.md) "
        "[![c](pictures/examples-__init__.py)](pictures/examples-__init__.py) [d](e.md#f)"
    )


COMMANDS = {
    page: re.findall(r"(?:^|\| )(peft-softmoa [a-z-]+ .*?)(?: \||$)", block.replace("\\\n", ""), re.MULTILINE)
    for page, text in PAGES.items()
    for block in ["\n".join(re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL))]
}


@pytest.mark.parametrize("page", [page for page, shown in COMMANDS.items() if shown])
def test_the_commands_of_each_page_are_understood(page):
    assert page != "README.md" or len(COMMANDS[page]) == 5
    for _, verb, *arguments in map(shlex.split, COMMANDS[page]):
        if verb != "recipes":
            module = importlib.import_module(f"peft_softmoa.commands.{verb.replace('-', '_')}")
            assert module.make_parser().parse(arguments)


def test_the_site_shows_the_help_of_every_command():
    shown = re.findall(r'^--8<-- "(.*)\.txt"$', PAGES["commands.md"], re.MULTILINE)
    assert shown[0] == "peft-softmoa" and set(shown[1:]) == set(VERBS)
    assert re.findall(r"^## peft-softmoa (.*)$", PAGES["commands.md"], re.MULTILINE) == shown[1:]


def test_the_address_of_the_repository_is_one():
    project = (ROOT / "pyproject.toml").read_text()
    repository = re.search(r'^Repository = "(.*)"$', project, re.MULTILINE).group(1)
    site = re.search(r'^Documentation = "(.*)"$', project, re.MULTILINE).group(1)
    mkdocs = ROOT / "mkdocs.yml"
    if mkdocs.exists():
        assert f"repo_url: {repository}\n" in mkdocs.read_text() and f"site_url: {site}\n" in mkdocs.read_text()
    notebooks = {path.name: path.read_text() for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    for page, text in {**PAGES, **notebooks}.items():
        for url in re.findall(r"https://github\.com/peft-softmoa[^)\s`\"]*", text):
            assert url.startswith(repository), (page, url)
        for url in re.findall(r"https://peft-softmoa\.github\.io[^)\s`\"]*", text):
            path, _, anchor = url.removeprefix(site).partition("#")
            assert url.startswith(site), (page, url)
            target = PAGES[f"{path.strip('/') or 'index'}.md"]
            headings = re.findall(r"^#+ (.*)$", target, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, (page, url)


def test_the_readme_is_a_door():
    """It is the page on the package index too, where relative links lead nowhere."""
    assert len(README.split()) <= 1200
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]*)\)", README))
    for path in re.findall(r"peft-softmoa/(?:raw|blob)/main/([^)\s]*)\)", README):
        assert path.startswith("examples/") or (ROOT / path).exists(), path


RESULT = re.compile(r"examples/method_comparison/results/([\w-]+)/RESULTS\.md")
NUMBER = re.compile(r"[+-]?[\d.]+ ± [\d.]+")


def is_quoted(text, study):
    """Whether all numbers with an interval in the tables of a text are cells of the page of a study."""
    page = (ROOT / "examples/method_comparison/results" / study / "RESULTS.md").read_text()
    numbers = [number for line in text.splitlines() if line.startswith("|") for number in NUMBER.findall(line)]
    return len(numbers) > 5 and all(f"| {number} |" in page for number in numbers)


def test_the_evidence_is_that_of_the_studies():
    sections = [part for part in PAGES["evidence.md"].split("\n## ") if RESULT.search(part)]
    studies = [RESULT.search(part).group(1) for part in sections]
    committed = {path.parent.name for path in (ROOT / "examples/method_comparison/results").glob("*/RESULTS.md")}
    assert set(studies) == committed, "a section for each study"
    assert all(is_quoted(part, study) for part, study in zip(sections, studies, strict=True))
    quoted = README.partition("<!-- evidence")[2].partition("<!-- end of evidence -->")[0]
    assert is_quoted(quoted, RESULT.search(quoted).group(1))
