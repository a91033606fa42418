"""Labels that are none, and selections that would choose other rows than they say."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_parquet
from datasets import ClassLabel, Features, IterableDataset
from transformers import ASTFeatureExtractor

from peft_softmoa.training import load_stream, parse_selection, select_rows, summarize_rows
from peft_softmoa.training.tasks import SingleLabel


def rows_of(*values, features=None):
    return IterableDataset.from_generator(lambda: iter([{"label": value} for value in values]), features=features)


def parquet_of(folder, **columns):
    folder.mkdir()
    clips = [{"path": f"{index}.wav", "bytes": b""} for index in range(len(next(iter(columns.values()))))]
    pq.write_table(pa.table({"audio": clips, **columns}), folder / "train.parquet", row_group_size=1)
    return str(folder)


def stream(folder, rows=None):
    return load_stream(str(folder), "train", ASTFeatureExtractor(), rows=rows)


@pytest.mark.parametrize(
    "value, message",
    [
        (["dog", "rain"], r"label \['dog', 'rain'\] is a list, but a class is a string.*`label_column`"),
        (0.5, "label 0.5 is a float, but a class is a string"),
        (1.0, "label 1.0 is a float"),
        ({"a": 1}, "is a dict"),
        (float("nan"), "a row has no label"),
        (None, "a row has no label"),
        (" ", "a row has no label"),
    ],
)
def test_labels_that_name_no_class(value, message):
    with pytest.raises(ValueError, match=message):
        summarize_rows(rows_of("cat", value), ["label"], SingleLabel())


def test_labels_without_the_spaces_around_them():
    assert summarize_rows(rows_of("cat", " cat", "cat ", "black cat"), ["label"], SingleLabel()).labels == (
        "black cat",
        "cat",
    )
    assert summarize_rows(rows_of(1, 10, True), ["label"], SingleLabel()).labels == ("1", "10", "True")


def test_labels_of_parquet_without_the_spaces_around_them(tmp_path):
    folder = parquet_of(tmp_path / "data", label=["cat", " cat", "dog "], fold=["1", " 1", "2"])
    assert stream(folder).label_names == ["cat", "dog"]
    assert len(stream(folder, "fold=1")) == 2


def test_folds_beside_a_missing_one_are_floats(tmp_path):
    """Which pandas makes of them."""
    folder = parquet_of(tmp_path / "data", label=["a", "b", "c"], fold=[1.0, 2.0, None])
    assert stream(folder, "fold=1").label_names == stream(folder, "fold=1.0").label_names == ["a"]


@pytest.mark.parametrize(
    "selection, values",
    [
        ('label="cat, small"', ("cat, small",)),
        ('label=dog, "cat, small"', ("dog", "cat, small")),
        ("fold = 1, 2", ("1", "2")),
        ('label="5"" pipe"', ('5" pipe',)),
    ],
)
def test_values_with_commas_stand_in_quotes(selection, values):
    assert parse_selection(selection)[1] == values


def test_a_value_that_no_row_has(tmp_path):
    """Half of a class may be another class."""
    folder = parquet_of(tmp_path / "data", label=["cat", "cat, small", "dog"])
    with pytest.raises(ValueError, match="has no row with label=small. A value with a comma .* double quotes"):
        stream(folder, "label=cat, small")
    chosen = stream(folder, 'label="cat, small",dog')
    assert chosen.label_names == ["cat, small", "dog"] and len(chosen) == 2


def test_a_value_that_is_no_declared_class(tones_folder, tmp_path):
    folder = write_parquet(tmp_path / "parquet", tones_folder)
    with pytest.raises(ValueError, match="has no row with label=middle"):
        stream(folder, "label=low,middle")
    assert len(stream(folder, "label=low")) == len(stream(folder, "label=1")) == 8


def test_a_missing_class_is_not_selected():
    rows = rows_of(0, None, 1, features=Features({"label": ClassLabel(names=["cat", "dog"])}))
    assert list(select_rows(rows, "label=dog")) == [{"label": 1}]
