"""The notebooks run, and what they show is what their code gives: `make notebooks` writes it."""

import hashlib
import os
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "examples" / "notebooks"
# Variables that name the folders of what is not in this repository.
NEEDS = {"whisper_words": ("SOFTMOA_WHISPER", "SOFTMOA_COMMANDS")}
NAMES = [
    pytest.param(path.stem, marks=pytest.mark.real_audio if path.stem in NEEDS else ())
    for path in sorted(NOTEBOOKS.glob("*.ipynb"))
]
# Without bars of progress, the hint that a package draws them nicer, and a network.
ENVIRONMENT = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found", "HF_HUB_OFFLINE": "1"}
# A path of this or any other machine; what begins a URL, closes an element of HTML or is a fraction is none.
ABSOLUTE = re.compile(r"(?<![\w.:/<])/\w[\w.-]*/\w|\b[A-Za-z]:\\")
DRAWN = "<IPython.core.display.HTML object>"
MOST_BYTES = 300_000


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook):
    """Of all code, to say later which code has run."""
    return hashlib.sha256("\n\n".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()


def texts(notebook):
    """What the outputs say, without pictures."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {"text": output.get("text", "")})
            yield from (value for kind, value in data.items() if not kind.startswith("image/"))


def problems(notebook):
    """Errors, warnings, and what names a path of a machine."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    failed = [each for each in outputs if each.output_type == "error" or each.get("name") == "stderr"]
    return failed + [text for text in texts(notebook) if ABSOLUTE.search(text)]


def kinds(notebook):
    """For each cell of code, of which kind its outputs are."""
    return {
        cell.id: [(output.output_type, output.get("name"), *sorted(output.get("data", ()))) for output in cell.outputs]
        for cell in code_cells(notebook)
    }


def run(notebook, folder):
    """Run a notebook in a folder, in a kernel of this Python, and keep of the outputs what another run repeats."""
    own = KernelSpecManager(kernel_dirs=[])  # no kernel of the user or the system
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=own)
    client = NotebookClient(
        notebook,
        manager,
        timeout=840,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    metadata = dict(notebook.metadata)
    client.execute(env={**os.environ, **ENVIRONMENT, "IPYTHONDIR": str(folder / ".ipython")}, cleanup_kc=True)
    for cell in code_cells(notebook):
        # What the Trainer draws while it runs says how long it took.
        cell.outputs = [each for each in cell.outputs if each.get("data", {}).get("text/plain") != DRAWN]
    notebook.metadata = {**metadata, "code_sha256": digest(notebook)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_runs(name, tmp_path, request):
    if missing := [variable for variable in NEEDS.get(name, ()) if not os.environ.get(variable)]:
        pytest.skip(f"needs a real Whisper and real speech: set {' and '.join(missing)} to their folders")
    notebook = read(name)
    run(notebook, tmp_path)
    assert not problems(notebook)
    if request.config.getoption("--notebooks"):
        nbformat.write(notebook, NOTEBOOKS / f"{name}.ipynb")
    # Numbers and pictures differ a little from machine to machine.
    assert kinds(notebook) == kinds(read(name))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored(name, tmp_path):
    notebook = read(name)
    assert digest(notebook) == notebook.metadata.get("code_sha256"), f"the code of {name} has changed: make notebooks"
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert not problems(notebook)
    assert ABSOLUTE.search(f"[PosixPath('{tmp_path}')]") and not ABSOLUTE.search("<td>3/4</td> https://a.org/b/c")
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < MOST_BYTES
    written = "".join(cell.source for cell in notebook.cells)
    linked = re.findall(r"/peft-softmoa/blob/main/([^)\s]*)\)", written)
    assert all((ROOT / path).exists() for path in linked) and "https://peft-softmoa.github.io/" in written
    # What a cell is for stands in front of it.
    is_code = [cell.cell_type == "code" for cell in notebook.cells]
    assert not is_code[0] and not any(map(bool.__and__, is_code, is_code[1:]))
