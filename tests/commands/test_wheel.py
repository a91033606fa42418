"""The wheel, installed outside of the clone: every verb runs there, as the documentation calls some of them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from peft_softmoa.commands import VERBS

pytest.importorskip("hatchling", reason="needs hatchling: pip install hatchling")
from hatchling.builders.wheel import WheelBuilder

# Training in processes of their own.
pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "inspection.md").read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What runs a verb of the installed wheel, in a folder outside of the clone; it has the words that were run."""
    folder = tmp_path_factory.mktemp("wheel")
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(folder / "site")]
    subprocess.run([*pip, wheel], check=True)
    (folder / "work").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "HF_HUB_OFFLINE": "1"}

    def run(*words):
        run.words.add(words[0])
        command = [str(folder / "site" / "bin" / "peft-softmoa"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder / "work", env=environment)
        assert done.returncode == 0, done.stderr
        return done

    run.folder, run.words, run.environment = folder, set(), environment
    return run


@pytest.fixture(scope="module")
def demo(installed):
    """The folder of the demo, and what it printed, called as on the page."""
    return installed.folder / "work" / "demo", installed(*readme_commands()[0])


def readme_commands():
    shown = re.search(r"<!-- inspect -->\n```\n(.*?)```", PAGE, re.DOTALL).group(1).replace("\\\n", "")
    demo, inspect = (shlex.split(line) for line in shown.splitlines())
    assert demo[0] == inspect[0] == "peft-softmoa"
    return demo[1:], inspect[1:]


def test_it_is_what_runs(installed):
    script = "import peft_softmoa, peft_softmoa_cli; print(peft_softmoa.__file__, peft_softmoa_cli.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd="/", env=installed.environment, check=True
    )
    site = installed.folder / "site"
    assert done.stdout.split() == [f"{site}/peft_softmoa/__init__.py", f"{site}/peft_softmoa_cli/__init__.py"]


def test_demo(demo):
    folder, done = demo
    before, after = re.search(r"(\d+)% before, (\d+)% after", done.stdout).groups()
    assert int(before) < 50 and int(after) > 80
    assert re.search(r"Trainable parameters: [\d,]+\n", done.stdout)
    assert re.search(r"Size of the adapter on disk: \d+ KiB", done.stdout)
    assert "A fresh WAV file with a siren: the reloaded adapter says siren" in done.stdout
    assert "LOAD REPORT" not in done.stderr and "mel filter" not in done.stderr
    assert {path.name for path in folder.iterdir()} == {"adapter", "siren.wav", "sounds"}


def test_inspect(installed, demo):
    folder, _ = demo
    done = installed(*readme_commands()[1])
    assert "LOAD REPORT" not in done.stderr and "mel filter" not in done.stderr
    picture = Path(re.search(r"!\[.*?\]\(\.\./(examples/inspection/.*?)\)", PAGE).group(1)).name
    assert (folder / "inspection" / picture).exists()


def test_train_and_evaluate(installed, demo):
    """The list of parts of the demo's dataset has folds for no cross-validation: the table gets some."""
    folder, _ = demo
    table = folder / "sounds" / "metadata.csv"
    first, *rows = table.read_text().splitlines()
    folds = [f"{row},{1 + index % 2}" for index, row in enumerate(rows)]
    table.write_text("\n".join([f"{first},fold", *folds]) + "\n")
    few = ["--model_name_or_path", installed.folder / "site" / "peft_softmoa" / "demo" / "ast-small"]
    few += ["--dataset_name", folder / "sounds", "--max_steps", 1, "--per_device_train_batch_size", 4]
    few += ["--report_to", "none", "--save_strategy", "no", "--eval_strategy", "no"]
    recipe = ["--config", "esc50", "--label_column_name", "label", "--load_best_model_at_end", "False"]
    done = installed("train", *recipe, *few, "--output_dir", "trained")
    assert "LOAD REPORT" not in done.stderr and "mel filter" not in done.stderr
    test = ["--dataset_name", folder / "sounds", "--split", "train", "--rows", "part=test"]
    done = installed("evaluate", "trained", *test)
    assert re.search(r"^accuracy: 0\.\d{4}$", done.stdout, re.MULTILINE)
    done = installed("cross-validate", "--num_folds", 2, *few, "--output_dir", "folds")
    assert re.search(r"^f1_macro 0\.\d{4} ± 0\.\d{4} ", done.stdout, re.MULTILINE)


def test_classify(installed, demo):
    done = installed("classify", demo[0] / "adapter", demo[0] / "siren.wav")
    assert "siren" in done.stdout


def test_export(installed, demo):
    pytest.importorskip("onnxruntime", reason="needs ONNX: pip install 'peft-softmoa[export]'")
    installed("export", demo[0] / "adapter", "--output_dir", "onnx")
    assert (installed.folder / "work" / "onnx" / "model.onnx").exists()


def test_check(installed, demo):
    assert "softmoa" in installed("check", demo[0] / "adapter").stdout.lower()


def test_targets(installed):
    model = installed.folder / "site" / "peft_softmoa" / "demo" / "ast-small"
    assert "attention" in installed("targets", model).stdout


def test_recipes(installed):
    assert {"esc50", "accelerate/ddp"} <= {line.split()[0] for line in installed("recipes").stdout.splitlines()}
    assert installed("recipes", "esc50").stdout == (ROOT / "peft_softmoa" / "recipes" / "esc50.yaml").read_text()


def test_every_verb_has_run(installed):
    """The last test of this file."""
    assert installed.words == set(VERBS)
