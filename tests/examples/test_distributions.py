"""What the source distribution and the wheel hold."""

from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="needs hatchling: pip install hatchling")
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = str(Path(__file__).parents[2])


WEIGHTS = "peft_softmoa/demo/ast-small/model.safetensors"


def files_of(builder):
    return {Path(file.distribution_path) for file in builder.recurse_included_files()}


def test_the_source_distribution_holds_no_results():
    files = files_of(SdistBuilder(ROOT))
    modules = ["train_no_trainer.py", "benchmark/__main__.py", "method_comparison/__main__.py"]
    assert {Path("examples", name) for name in modules} | {Path("Makefile"), Path(WEIGHTS)} <= files
    assert not [path for path in files if "results" in path.parts or path.suffix in (".jsonl", ".png")]


def test_the_wheel_holds_the_package_and_the_start_of_its_command_only():
    files = files_of(WheelBuilder(ROOT))
    held = [
        "peft_softmoa/__init__.py",
        "peft_softmoa_cli/pages/targets.txt",
        "peft_softmoa/recipes/esc50.yaml",
        WEIGHTS,
    ]
    assert set(map(Path, held)) <= files and {path.parts[0] for path in files} == {"peft_softmoa", "peft_softmoa_cli"}
