import ast
import re
import subprocess
import sys
from pathlib import Path

import peft_softmoa

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_softmoa"


def test_import_loads_no_data_or_plotting_library():
    script = """
import sys, peft
before = set(sys.modules)
import peft_softmoa
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert "peft_softmoa.training" not in sys.modules and "peft_softmoa.inspection" not in sys.modules
assert not new & {"datasets", "evaluate", "matplotlib", "soundfile", "soxr"}, new
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_imports_point_one_way():
    """routing, experts -> mixture -> layer -> model -> training -> inspection; the core imports neither of the last."""
    rank = {name: index for index, name in enumerate(
        [
            "registration", "loading", "routing", "kernels", "experts", "card", "checkpointing", "structure", "shapes",
            "masking", "head", "mixed_batch", "mixture", "placement", "describe", "budget", "config", "layer",
            "averaging", "load_balancing", "model", "arguments", "training", "inspection", "cli",
        ]
    )}  # fmt: skip
    for name, position in rank.items():
        module = PACKAGE / f"{name}.py"
        for path in [module] if module.exists() else (PACKAGE / name).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == len(path.relative_to(PACKAGE).parts):
                    assert rank[node.module.split(".")[0]] < position, f"{path} imports {node.module}"
    assert set(rank) == {path.stem for path in PACKAGE.iterdir()} - {"__init__", "py", "__pycache__"}


def test_imports_within_inspection_point_one_way():
    rank = {name: index for index, name in enumerate(
        [
            "arguments", "metrics", "records", "blocks", "maps", "report", "callback", "figures", "clip_plots", "plots",
            "page", "clips", "sections", "inspect_adapter",
        ]
    )}  # fmt: skip
    for name, position in rank.items():
        for node in ast.walk(ast.parse((PACKAGE / "inspection" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for module in [node.module] if node.module else [alias.name for alias in node.names]:
                    assert rank[module] < position, f"{name} imports {module}"
    assert set(rank) == {path.stem for path in (PACKAGE / "inspection").glob("*.py")} - {"__init__"}


def test_version_is_the_one_of_the_project():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert peft_softmoa.__version__ == version


def test_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_public_names_have_docstrings():
    import peft_softmoa.inspection
    import peft_softmoa.training

    for module in (peft_softmoa, peft_softmoa.training, peft_softmoa.inspection):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name


def test_only_the_command_names_flags():
    """An error of the library is also read by those who call it from Python."""
    found = {
        f"{path.name}: {flag}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "cli.py"
        for flag in re.findall(r"--[a-z]\w+", node.value)
    }
    assert not found
