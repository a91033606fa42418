"""What the source distribution and the wheel hold."""

from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="needs hatchling: pip install hatchling")
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = str(Path(__file__).parents[2])


def files_of(builder):
    return {Path(file.distribution_path) for file in builder.recurse_included_files()}


def test_the_source_distribution_holds_no_results():
    files = files_of(SdistBuilder(ROOT))
    modules = [
        "demo.py",
        "benchmark/__main__.py",
        "method_comparison/__main__.py",
        "backbone/ast-small/model.safetensors",
    ]
    assert {Path("examples", name) for name in modules} | {Path("Makefile")} <= files
    assert not [path for path in files if "results" in path.parts or path.suffix in (".jsonl", ".png")]
    # The weights come with what their card is made from.
    assert {path.parent.name for path in files if path.suffix == ".json" and path.parts[0] == "examples"} == {
        "ast-small"
    }


def test_the_wheel_holds_the_package_only():
    files = files_of(WheelBuilder(ROOT))
    assert Path("peft_softmoa/__init__.py") in files and {path.parts[0] for path in files} == {"peft_softmoa"}
