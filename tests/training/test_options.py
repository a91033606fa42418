"""The options of a dataset, and how scripts take them and name them."""

from dataclasses import dataclass, fields
from typing import Optional

import pytest
from transformers import HfArgumentParser

from peft_softmoa.training import DataOptions, collect_options, flag_names, name_flags, option
from peft_softmoa.training.arguments import make_run


@dataclass
class Arguments:
    label_column_name: Optional[str] = option("label_column", default="category")
    shuffle_buffer_size: int = option("shuffle_buffer")
    streaming: bool = option("streaming")
    output_dir: str = "out"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_length_seconds": 0}, "`max_length_seconds` must be positive, got 0"),
        ({"on_bad_audio": "ignore"}, "`on_bad_audio` must be 'skip' or 'raise', got 'ignore'"),
        ({"shuffle_buffer": -1}, "`shuffle_buffer` must not be negative, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)


def test_each_option_is_explained():
    assert all(entry.metadata["help"].endswith(".") for entry in fields(DataOptions))


def test_arguments_of_a_script_become_options(capsys):
    parser = HfArgumentParser(Arguments)
    [arguments] = parser.parse_args_into_dataclasses(["--shuffle_buffer_size", "7", "--streaming", "False"])
    assert collect_options(arguments) == DataOptions(label_column="category", shuffle_buffer=7, streaming=False)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--help"])
    [entry] = [entry for entry in fields(DataOptions) if entry.name == "streaming"]
    assert entry.metadata["help"] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "message, wanted",
    [
        ("`shuffle_buffer` must not be negative.", "--shuffle_buffer_size must not be negative."),
        ("Give `streaming=False`, or another `output_dir`.", "Give --streaming False, or another --output_dir."),
        ("The number of `rows` is `needs_length=False`.", "The number of `rows` is --max_steps."),
    ],
)
def test_errors_name_the_flags_of_a_script(message, wanted):
    flags = flag_names(Arguments) | {"needs_length=False": "--max_steps"}
    with pytest.raises(ValueError) as caught, name_flags(flags):
        raise ValueError(message)
    assert str(caught.value) == wanted


def test_what_chooses_the_best_checkpoint_stays_the_same(tmp_path):
    """Where one is chosen: a stored best value would be compared with values of another kind."""

    def settings(**options):
        return make_run(dataset_name="sounds", output_dir=str(tmp_path), report_to="none", **options).settings()

    best = {"load_best_model_at_end": True, "metric_for_best_model": "wer"}
    for name, value in {"normalize_text": True, "generation_max_length": 4, "eval_rows": "fold=1"}.items():
        assert settings() == settings(**{name: value})
        assert settings(**best)[name] != settings(**best, **{name: value})[name] == value
    assert settings(token="hf_secret", test_rows="fold=2") == settings()
