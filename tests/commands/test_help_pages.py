"""The stored pages of `--help`: `make help-pages` writes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import peft_softmoa_cli
from peft_softmoa.cli import help_page
from peft_softmoa.commands import VERBS

PAGES = Path(peft_softmoa_cli.__file__).with_name("pages")
PINNED = (Path(__file__).parents[2] / "constraints.txt").read_text()
WITH_TRAINER = ("train", "cross-validate")
# Calls the start of the command, as the console script does.
START = [sys.executable, "-c", "from peft_softmoa_cli import main; main()"]


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_stored_pages_are_what_the_parsers_print(verb, request):
    if verb in WITH_TRAINER and f'transformers=={transformers.__version__}; python_version >= "3.11"' not in PINNED:
        pytest.skip("the Trainer of another version of transformers explains its arguments in other words")
    path = PAGES / f"{verb or 'peft-softmoa'}.txt"
    if request.config.getoption("--help-pages"):
        path.write_text(help_page(verb))
    assert path.read_text() == help_page(verb)
    assert all(len(line) <= 100 for line in help_page(verb).splitlines())


def test_no_page_is_left_of_a_verb_that_is_gone():
    assert {path.stem for path in PAGES.iterdir()} == {"peft-softmoa", *VERBS}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_loads_no_torch(words):
    done = subprocess.run([*START, *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(("usage: peft-softmoa ", "peft-softmoa 0"))
    assert not done.stderr
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", *START[1:], *words], capture_output=True, text=True, check=True
    )
    assert " torch" not in loaded.stderr and " peft_softmoa\n" not in loaded.stderr


def test_other_words_go_to_the_command():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*START, "recipes", "ddp"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "peft-softmoa recipes: 'ddp' is neither a file nor a recipe" in done.stderr
