"""Who reads which rows, in which order, and how many batches."""

import collections
import io
import itertools
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from conftest import SAMPLING_RATE, write_parquet
from datasets import IterableDataset
from torch.utils.data import DataLoader, default_collate

from peft_softmoa.training import (
    AudioStream,
    DataOptions,
    DatasetSummary,
    ExtractFeatures,
    load_stream,
    make_loader,
    open_source,
    summarize_rows,
)
from peft_softmoa.training.tasks import SingleLabel


class Length:
    """In place of a feature extractor: the clip's number of samples, by which it is known."""

    sampling_rate, model_input_names = SAMPLING_RATE, ["input_values"]

    def __call__(self, waveform, **options):
        return {"input_values": np.array([[len(waveform)]])}


def clip(index):
    """A clip that is known by its length; those with a negative index cannot be read."""
    if index < 0:
        return b"no audio"
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(100 + index), SAMPLING_RATE, format="WAV")
    return buffer.getvalue()


def shards(sizes, bad=()):
    """Clips 0, 1, 2, … in shards of some sizes; some of them cannot be read."""
    indices = iter(range(sum(sizes)))
    parts = [[next(indices) for _ in range(size)] for size in sizes]
    rows = IterableDataset.from_generator(_clips, gen_kwargs={"parts": parts, "bad": set(bad)})
    assert rows.num_shards == len(sizes)
    return rows


def _clips(parts, bad):
    for part in parts:
        for index in part:
            yield {"audio": {"bytes": clip(-1 if index in bad else index), "path": str(index)}, "label": "x"}


def batches_of(rows, num_processes, num_workers, batch_size, epoch=0, shuffle_buffer=0):
    """The clips of each batch, in each process, as a DataLoader gives them."""
    summary = summarize_rows(rows, ["label"], SingleLabel())
    stream = AudioStream(rows, ExtractFeatures(Length(), SingleLabel(["x"])), summary, shuffle_buffer=shuffle_buffer)
    stream.set_epoch(epoch)
    given = []
    for process in range(num_processes):
        loader = DataLoader(
            stream.for_process(process, num_processes, batch_size, num_workers), batch_size, num_workers=num_workers
        )
        batches = [(batch["input_values"][:, 0] - 100).tolist() for batch in loader]
        assert len(batches) == len(loader)
        given.append(batches)
    return given


def clips_of(batches):
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize("num_processes, num_workers", [(1, 0), (1, 2), (2, 0), (2, 2), (3, 1), (4, 1), (5, 0)])
@pytest.mark.parametrize("sizes", [(6, 6, 6, 6), (7, 6, 6, 5), (24,), (1, 2, 20, 1), (25,)])
def test_each_row_is_used_once_in_an_epoch(sizes, num_processes, num_workers):
    """But for those that complete the last batches, when processes have unequal parts."""
    rows = shards(sizes)
    for epoch in range(2):
        given = batches_of(rows, num_processes, num_workers, 4, epoch, shuffle_buffer=5)
        assert len({len(batches) for batches in given}) == 1
        counts = collections.Counter(clips_of(clips_of(given)))
        assert set(counts) == set(range(sum(sizes)))
        again = sum(counts.values()) - sum(sizes)
        assert again < 4 * num_processes and (again == 0 or num_processes > 1)


def test_shards_belong_to_one_reader():
    given = batches_of(shards((6, 6, 6, 6)), 2, 0, 6)
    assert given == [[list(range(6)), list(range(12, 18))], [list(range(6, 12)), list(range(18, 24))]]
    # Where they are too few or too uneven, each reader takes every third row.
    assert [clips_of(batches) for batches in batches_of(shards((12, 12)), 3, 0, 4)] == [
        list(range(process, 24, 3)) for process in range(3)
    ]
    assert [clips_of(batches) for batches in batches_of(shards((20, 4)), 2, 0, 4)] == [
        list(range(process, 24, 2)) for process in range(2)
    ]


def test_workers_end_with_smaller_batches_and_no_row_is_left_out():
    """Three workers with four rows each give six batches of 3 and 1, where a loader would count four of 3."""
    [batches] = batches_of(shards((4, 4, 4)), 1, 3, 3)
    assert sorted(map(len, batches)) == [1, 1, 1, 3, 3, 3]


def test_the_order_repeats_with_the_seed_and_differs_between_epochs():
    rows = shards((6, 6))
    first, again, second = (clips_of(*batches_of(rows, 1, 0, 4, epoch, shuffle_buffer=6)) for epoch in (0, 0, 1))
    assert first == again != second and sorted(first) == sorted(second) == list(range(12)) != first


def test_processes_with_unreadable_clips_still_get_as_many_batches():
    rows = shards((4, 4), bad=(0, 1, 2, 5))
    given = batches_of(rows, 2, 0, 2)
    assert given == [[[3, 3], [4, 6]], [[4, 6], [7]]]  # the first goes on with the other's


def test_a_part_has_the_batches_that_it_was_counted_with():
    """A run that goes on from a checkpoint counts them: two of eight clips are skipped, and it still has four."""
    rows = shards((8,), bad=(2, 3))
    [batches] = batches_of(rows, 1, 0, 2)
    assert batches[:3] == [[0, 1], [4, 5], [6, 7]] and batches[3:] == [[0, 1]]
    # Without a part, as in evaluation, nothing is used again.
    stream = AudioStream(
        rows, ExtractFeatures(Length(), SingleLabel(["x"])), summarize_rows(rows, ["label"], SingleLabel())
    )
    assert len(list(stream)) == 6 and len(stream) == 8


def test_fewer_rows_than_readers():
    stream = AudioStream(shards((3,)), ExtractFeatures(Length(), SingleLabel(["x"])), DatasetSummary(3, ("x",), (3,)))
    with pytest.raises(ValueError, match="has 3 rows, fewer than its 4 readers: 2 processes with 2 workers"):
        stream.for_process(0, 2, 1, 2)


def test_a_stream_without_length():
    stream = AudioStream(shards((3,)), ExtractFeatures(Length(), SingleLabel(["x"])))
    with pytest.raises(TypeError, match="number of rows"):
        len(stream)
    # For training it goes on for ever, so that a run that goes on finds its place.
    batches = itertools.islice(make_loader(stream, 2, Accelerator(cpu=True)), 4)
    assert clips_of((batch["input_values"][:, 0] - 100).tolist() for batch in batches) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(list(stream)) == 3


def test_random_cuts_repeat_with_the_seed_the_epoch_and_the_row():
    class Samples(Length):
        def __call__(self, waveform, **options):
            return {"input_values": waveform[None]}

    ramp = io.BytesIO()
    soundfile.write(ramp, np.linspace(0, 1, 16_000), SAMPLING_RATE, format="WAV", subtype="FLOAT")
    rows = IterableDataset.from_generator(lambda: iter([{"audio": ramp.getvalue(), "label": "x"}] * 10))
    extract = ExtractFeatures(Samples(), SingleLabel(["x"]), DataOptions(max_length_seconds=0.01), random_crop=True)

    def starts(epoch, seed=0):
        stream = AudioStream(rows, extract, seed=seed)
        stream.set_epoch(epoch)
        return [float(example["input_values"][0]) for example in stream]

    first = starts(0)
    assert len(set(first)) == 10 and first == starts(0)
    assert first != starts(1) and first != starts(0, seed=1)


def test_the_loader_is_prepared_once():
    accelerator = Accelerator(cpu=True)
    rows = shards((5,))
    stream = AudioStream(
        rows,
        ExtractFeatures(Length(), SingleLabel(["x"])),
        summarize_rows(rows, ["label"], SingleLabel()),
        shuffle_buffer=5,
    )
    loader = make_loader(stream, 2, accelerator, collate_fn=default_collate)
    assert accelerator.prepare(loader) is loader and len(loader) == 3
    epochs = [torch.cat([batch["input_values"] for batch in loader]).flatten().tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]  # it counts its epochs


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_learn_of_the_epoch(persistent):
    rows = shards((6,))
    stream = AudioStream(
        rows,
        ExtractFeatures(Length(), SingleLabel(["x"])),
        summarize_rows(rows, ["label"], SingleLabel()),
        shuffle_buffer=6,
    )
    loader = make_loader(stream, 6, Accelerator(cpu=True), num_workers=1, persistent_workers=persistent)
    epochs = [list(loader)[0]["input_values"].flatten().tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]


def test_what_datasets_declare(tmp_path, tones_folder):
    source = open_source(str(tones_folder), "train")
    assert source.reads_single_columns and source.columns == ("file_name", "label", "fold", "audio")
    assert source.declared_summary("label") is None
    source = open_source(str(write_parquet(tmp_path / "parquet", tones_folder)), "train")
    assert source.reads_single_columns and source.columns == ("audio", "label", "fold")
    assert source.classes == {"label": ["high", "low"]} and source.declared_summary("label") is None
    assert replace(source, num_rows=16).declared_summary("label") == DatasetSummary(16, ("high", "low"))
    assert replace(source, num_rows=16).declared_summary("fold") is None
    # A tar file has to be read whole.
    with tarfile.open(tmp_path / "train.tar", "w") as file:
        for name, content in (("0.wav", clip(3)), ("0.cls", b"1"), ("1.wav", clip(4)), ("1.cls", b"0")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    (tmp_path / "parquet" / "train.parquet").unlink()
    assert not open_source(str(tmp_path), "train").reads_single_columns


def test_labels_that_are_chosen_are_the_classes(tones_folder, tmp_path):
    """Of those that the dataset declares; by their name or index."""
    folder = str(write_parquet(tmp_path / "parquet", tones_folder))
    for chosen, names in (
        ("label=high", ["high"]),
        ("label=1", ["low"]),
        ("fold=1", ["high", "low"]),
        (None, ["high", "low"]),
    ):
        stream = load_stream(folder, "train", Length(), rows=chosen)
        assert stream.label_names == names and set(stream.summary.labels) <= set(names)


def test_labels_of_several_columns(tones_folder, tmp_path):
    folder = str(write_parquet(tmp_path / "parquet", tones_folder))
    options = DataOptions(label_column="label,fold")
    stream = load_stream(folder, "train", Length(), options, training=False)
    assert stream.label_names == ["high 1", "high 2", "low 1", "low 2"]
    assert [example["labels"] for example in stream] == [2] * 4 + [0] * 4 + [3] * 4 + [1] * 4
    with pytest.raises(ValueError, match="labels that are none of the classes low 1: high 1, high 2, low 2"):
        load_stream(folder, "train", Length(), options, label_names=["low 1"])


def seed_of_worker(rows):
    return torch.initial_seed()


def test_the_seed_of_a_stream_is_the_seed_of_its_workers():
    """And the generator of the training, which draws the dropout, is not used."""
    rows = shards((2,))
    before = torch.get_rng_state()

    def seeds(seed):
        stream = AudioStream(
            rows, ExtractFeatures(Length(), SingleLabel(["x"])), DatasetSummary(2, ("x",), (2,)), seed=seed
        )
        loader = make_loader(stream, 2, Accelerator(cpu=True), num_workers=1, collate_fn=seed_of_worker)
        return [batch for _ in range(2) for batch in loader]

    first = seeds(0)
    assert first == seeds(0) and len(set(first)) == 2 and not set(first) & set(seeds(1))
    assert torch.equal(torch.get_rng_state(), before)
