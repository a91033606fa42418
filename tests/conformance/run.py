"""Run PEFT's own tests of custom models, with Soft-MoA's cases in place of the built-in ones.

    python tests/conformance/run.py [pytest's options]

The tests are those of the installed version. They come with PEFT's source distribution, which pip downloads into
`.conformance/`; nothing of them is in this repository. `softmoa_cases.py` says what is run, what is skipped, and why.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import peft

HERE = Path(__file__).parent
FOLDER = HERE.parent.parent / ".conformance"


def download(version: str, folder: Path) -> Path:
    """Get PEFT's source distribution.

    Args:
        version (str): the version of PEFT.
        folder (Path): where it is kept.

    Returns:
        Path: the folder with its contents.
    """
    source = folder / f"peft-{version}"
    if not source.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*pip, "--dest", folder, f"peft=={version}"], check=True)
        with tarfile.open(folder / f"peft-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    # Its tests are a package, whose empty file is not in the distribution.
    (source / "tests" / "__init__.py").touch()
    return source


def main() -> int:
    source = download(peft.__version__, FOLDER)
    # One of the tests saves and loads pickled weights.
    environment = {**os.environ, "PYTHONPATH": str(HERE), "SOFTMOA_ALLOW_PICKLE": "1"}
    options = ["-p", "softmoa_cases", "-p", "no:cacheprovider", "--rootdir", source, "-c", os.devnull, "-q"]
    tests = source / "tests" / "test_custom_models.py"
    command = [sys.executable, "-m", "pytest", *options, *sys.argv[1:], tests]
    return subprocess.run(command, cwd=source, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
