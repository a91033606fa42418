"""Groups of options, config files and errors of `CommandParser`."""

from dataclasses import dataclass, field
from typing import Literal, Optional

import pytest

from peft_softmoa.commands.parser import CommandParser
from peft_softmoa.recipes import FOLDER, find_recipe, list_recipes


@dataclass
class Model:
    """A group of its own."""

    rate: float = field(default=0.5, metadata={"help": "How fast it learns, in 100%% of cases."})
    names: list[str] = field(default_factory=lambda: ["a", "b"], metadata={"help": "Names."})
    strategy: Literal["no", "epoch"] = field(default="epoch", metadata={"help": "When it is saved."})
    quick: bool = field(default=False, metadata={"help": "Whether it hurries."})
    keep: bool = field(default=True, metadata={"help": "Whether it is kept."})
    token: Optional[str] = field(default=None, metadata={"help": "A token. Default: the user's."})


@dataclass
class Trainer:
    """A group that is mostly hidden."""

    output_dir: str = field(metadata={"help": "Where to."})
    steps: int = field(default=3, metadata={"help": "How many steps."})
    options: Optional[str] = field(default=None, metadata={"help": "JSON."})


def parser():
    made = CommandParser("check", {"Model": Model}, hidden={"Trainer": Trainer}, takes_config=True)
    made.add_argument("dataset", help="The data.")
    return made


def parse(*words):
    return parser().parse(list(map(str, words)))


def test_options_are_parsed_into_their_groups():
    model, trainer, rest = parse("data", "--rate", "2", "--names", "x", "--output-dir", "out", "--quick")
    assert model == Model(rate=2.0, names=["x"], quick=True)
    assert trainer == Trainer("out") and vars(rest) == {"dataset": "data"}
    assert not parse("data", "--output_dir", "out", "--no_keep")[0].keep


def test_help_shows_the_hidden_options_only_if_asked(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    page = capsys.readouterr().out
    assert end.value.code == 0
    assert page == parser().format_help()
    assert page.index("\n  DATASET  ") < page.index("\nModel:\n") < page.index("\nOther options:\n")
    assert "--steps" not in page and "`peft-softmoa check --help-all` shows all options of Trainer." in page
    lines = page.splitlines()
    assert "  --rate NUMBER           How fast it learns, in 100% of cases. Default: 0.5." in lines
    assert "  --names TEXT ...        Names. Default: a b." in lines
    assert "  --strategy {no,epoch}   When it is saved. Default: epoch." in lines
    assert "  --quick [True|False]    Whether it hurries. Default: False." in lines
    assert "  --token TEXT            A token. Default: the user's." in lines
    with pytest.raises(SystemExit) as end:
        parse("--help-all")
    everything = capsys.readouterr().out
    assert end.value.code == 0
    assert "  --output_dir TEXT       Where to. Required." in everything.splitlines()
    assert everything.index("\nModel:\n") < everything.index("\nTrainer:\n") < everything.index("\n  --output_dir TEXT")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data", "--output_dri", "out"], "there is no option --output_dri. Do you mean --output_dir?"),
        (["data", "--output_dir", "out", "--zzz=1"], "there is no option --zzz."),
        (["data"], "the following arguments are required: --output_dir/--output-dir"),
        (["data", "--output_dir", "out", "--rate"], "argument --rate: expected one argument"),
        (["data", "--output_dir", "out", "-x"], "unrecognized arguments: -x"),
    ],
)
def test_errors_are_one_line_and_a_pointer(words, says, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*words)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"peft-softmoa check: {says}\nSee `peft-softmoa check --help`.\n"


def test_the_command_line_overrides_a_config_file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("rate: 1e-2\nnames: [x, y]\nstrategy: no\nquick: true\nsteps: 5\noptions: {a: 1}\ntoken: null\n")
    model, trainer, rest = parse("data", "--config", path, "--rate", "3", "--output_dir", "out")
    assert model == Model(rate=3.0, names=["x", "y"], strategy="no", quick=True)
    assert trainer == Trainer("out", steps=5, options='{"a": 1}') and vars(rest) == {"dataset": "data"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("rtae: 1\nsteps: 2", "has rtae, which this command does not take"),
        ("dataset: data", "has dataset, which this command does not take"),
        ("config: other.yaml", "has config, which"),
        ("- 1", "has no fields at all"),
    ],
)
def test_config_files_that_do_not_fit(content, says, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=says):
        parse("data", "--output_dir", "out", "--config", path)


def test_recipes_have_names(tmp_path, monkeypatch):
    files = {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")}
    assert set(list_recipes()) == files and {"esc50", "accelerate/ddp"} <= files
    # The list shows the first line alone.
    for name, purpose in list_recipes().items():
        assert purpose.endswith("."), name
    with pytest.raises(ValueError, match="'esc50' has .*dataset_name.*, which this command does not take"):
        parse("data", "--config", "esc50")
    with pytest.raises(FileNotFoundError, match="'esc5' is neither a file nor a recipe. Do you mean esc50"):
        parse("data", "--config", "esc5")
    # A file of one's own comes first.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "esc50").write_text("steps: 7")
    assert find_recipe("esc50").read_text() == "steps: 7"
