import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
assert not new & {"av", "datasets", "evaluate", "matplotlib", "soundfile", "soxr"}, new
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# What is in one row does not import what is in the same row, apart from within a folder.
RANKS = [
    {"registration", "dependent_fields", "expressions", "method", "recipes", "quiet"},
    {"calls", "fields"},
    {"config_file"},
    {"config"},
    {"targets"},
    {"layer", "arguments", "saving"},
    {"adapter_hooks", "averaging", "strength", "training"},
    {"model", "inference"},
    {"inspection"},
    {"demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
# Calls that need what is built on them.
IMPORTED_WHEN_CALLED = {("config", "targets"), ("config", "saving"), ("training", "inspection")}


def test_imports_point_one_way():
    rank = {name: index for index, names in enumerate(RANKS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == len(path.relative_to(PACKAGE).parts):
                for imported in [node.module] if node.module else [alias.name for alias in node.names]:
                    imported = imported.split(".")[0]
                    is_deferred = node not in tree.body and (name, imported) in IMPORTED_WHEN_CALLED
                    assert is_deferred or rank[imported] < rank[name], f"{path} imports {imported}"
    assert set(rank) == {path.stem for path in PACKAGE.iterdir()} - {"__init__", "py", "__pycache__"}


def test_the_method_knows_neither_peft_nor_models():
    for path in (PACKAGE / "method").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "peft"], path
            assert set(names) <= {"transformers.activations"} | {n for n in names if not n.startswith("transformers")}


def test_imports_within_inspection_point_one_way():
    rank = {name: index for index, name in enumerate(
        [
            "metrics", "records", "blocks", "confusion", "findings", "maps", "streams", "report", "callback",
            "figures", "clip_plots", "stream_plots", "plots", "page", "spectrograms", "clips", "clip_view", "sections",
            "inspect_adapter",
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


def imported(*folders):
    """The distributions that the files of some folders import, without what is their own and Python's."""
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    own = {"peft_softmoa", "peft_softmoa_cli"} | {path.stem for path in paths} | {path.parent.name for path in paths}
    distributions = packages_distributions()
    return {
        canonicalize_name(distributions.get(name, [name])[0]) for name in names - own - set(sys.stdlib_module_names)
    }


def declared(requirements):
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def test_what_is_imported_is_declared():
    """The package needs its dependencies, and extras for sound, plots and ONNX; tests and examples may use them all."""
    tomllib = pytest.importorskip("tomllib", reason="Python reads TOML since 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: declared(requirements) for name, requirements in project["optional-dependencies"].items()}
    needed = declared(project["dependencies"])
    assert imported(PACKAGE) <= needed | extras["audio"] | extras["plot"] | extras["export"]
    assert imported(ROOT / "tests", ROOT / "examples") <= needed.union(*extras.values())


def test_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_public_names_have_docstrings():
    import peft_softmoa.inference
    import peft_softmoa.inspection
    import peft_softmoa.training

    for module in (peft_softmoa, peft_softmoa.training, peft_softmoa.inference, peft_softmoa.inspection):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name


def test_only_the_command_names_flags():
    """An error of the library is also read by those who call it from Python."""
    found = {
        f"{path.name}: {flag}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and path.parent.name != "commands"
        and path.name != "cli.py"
        for flag in re.findall(r"--[a-z]\w+", node.value)
    }
    assert not found
