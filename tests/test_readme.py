"""The README's code is run, with a local checkpoint and dataset in place of those on the Hub."""

import dataclasses
import re
import shutil
from pathlib import Path

from conftest import FRAMES, write_parquet, write_tone
from families import FAMILIES
from models_table import BEGIN, END
from peft import PeftConfig
from transformers import AutoFeatureExtractor, WhisperConfig

from peft_softmoa import SoftMoAConfig
from peft_softmoa.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()


def code(name):
    return re.search(rf"<!-- {name} -->\n```python\n(.*?)```", README, re.DOTALL).group(1)


def test_quickstart_and_loading(base_folder, tones_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    local = {
        "MIT/ast-finetuned-audioset-10-10-0.4593": str(base_folder),
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


def test_length(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code("length").replace("MIT/ast-finetuned-audioset-10-10-0.4593", str(base_folder)), names)
    assert names["model"].config.max_length == 500
    assert AutoFeatureExtractor.from_pretrained("five-seconds").max_length == 500


def test_budgets(capsys):
    exec(code("budget"), {})
    shown = re.search(r"<!-- budget -->.*?```\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    assert capsys.readouterr().out == shown


def test_targets(capsys, tmp_path, monkeypatch):
    exec(code("targets"), {})
    shown = re.search(r"<!-- targets -->.*?```\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    assert capsys.readouterr().out == shown
    # The command prints the same.
    config = WhisperConfig(architectures=["WhisperForConditionalGeneration"])
    config.save_pretrained(tmp_path / "openai/whisper-tiny")
    monkeypatch.chdir(tmp_path)
    main(re.search(r"`peft-softmoa (targets openai/whisper-tiny .*?)`", README).group(1).split())
    assert capsys.readouterr().out == shown


def test_every_model_is_in_the_table():
    """`make models` writes it, from the outcome of the tests."""
    rows = README.partition(BEGIN)[2].partition(END)[0].splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {name}" for name in FAMILIES]


def test_table_lists_every_field_with_its_default():
    table = README.partition("| field | default | meaning |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|", table, re.MULTILINE)
    listed = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    own = {field.name: field.default for field in dataclasses.fields(SoftMoAConfig)}
    for field in dataclasses.fields(PeftConfig):
        del own[field.name]
    assert set(listed) == set(own)
    for name, default in own.items():
        if default is not None:
            shown = listed[name].strip("`")
            assert shown == (f'"{default}"' if isinstance(default, str) else str(default)), name
