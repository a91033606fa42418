"""Streams of model inputs, divided among the processes and workers that read them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, Literal, Optional

import fsspec.asyn
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import IterableDataset
from torch.utils.data import DataLoader, get_worker_info
from transformers import SequenceFeatureExtractor

from .data import (
    ExtractFeatures,
    Survey,
    check_columns,
    class_names,
    label_name,
    load_rows,
    parse_selection,
    reads_single_columns,
    select_rows,
    survey_metadata,
    survey_rows,
)

BATCH = 8  # rows that are decoded at a time


class AudioStream(torch.utils.data.IterableDataset):
    """A stream of model inputs and, if there are any, `labels`: shuffled if asked, decoded, and turned into features.

    It can be given to a `DataLoader` or a Trainer as it is; its workers divide it among them. `make_loader` divides it
    among processes, too. With K readers in all, reader k reads the shards k, k + K, k + 2K, …, or, if they are fewer
    or too uneven, goes through all rows and uses k, k + K, k + 2K, … of them. Either way each row is used once, and the
    seed, the epoch and K settle the order and the places of random cuts.

    Args:
        rows (IterableDataset): undecoded rows, from `load_rows`.
        extract (ExtractFeatures): what is done with them.
        survey (Survey, optional): what `survey_rows` has found. Default: none, and the stream has no length.
        shuffle_buffer (int): how many undecoded rows are held to draw from; 0 keeps the order. Default: 0.
        seed (int): of the shuffling and of random cuts, which differ from epoch to epoch. Default: 0.
        name (str): name of the dataset, for errors.

    Raises:
        ValueError: if the dataset has no such audio or label column.
    """

    def __init__(
        self,
        rows: IterableDataset,
        extract: ExtractFeatures,
        survey: Optional[Survey] = None,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        name: str = "the dataset",
    ) -> None:
        if shuffle_buffer < 0:
            raise ValueError(f"`shuffle_buffer` must not be negative, got {shuffle_buffer}.")
        columns = [each for each in (extract.audio_column, extract.label_column) if each is not None]
        check_columns(rows, columns, name)
        self.rows = rows.select_columns(columns)
        self.extract = extract
        self.survey = survey
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.name = name
        self.process_index, self.num_processes, self.num_workers = 0, 1, 0
        self.batch_size: Optional[int] = None
        # Shared, for workers that live for several epochs.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch.

        Args:
            epoch (int): its number.
        """
        self._epoch.fill_(epoch)

    def part(self, process_index: int, num_processes: int, batch_size: int, num_workers: int) -> AudioStream:
        """What a process reads for training, in a number of batches that is known before.

        Processes wait for each other in every step, and a run that goes on from a checkpoint counts batches. So one
        that has fewer rows than another, or skips so many that a batch is missing, goes on with its first ones again,
        as Accelerate does to complete a last batch. A stream without length goes on for ever, from epoch to epoch.

        Args:
            process_index (int): which process.
            num_processes (int): how many there are.
            batch_size (int): of each process.
            num_workers (int): of each process's `DataLoader`.

        Returns:
            AudioStream: the part. With several readers its length counts a smaller last batch of each as a full one.

        Raises:
            ValueError: if there are fewer rows than readers.
        """
        part = copy.copy(self)
        part.process_index, part.num_processes = process_index, num_processes
        part.batch_size, part.num_workers = batch_size, num_workers
        readers = num_processes * max(num_workers, 1)
        if self.survey and self.survey.num_rows < readers and num_processes > 1:
            raise ValueError(
                f"{self.name} has {self.survey.num_rows} rows, fewer than its {readers} readers: {num_processes} "
                f"processes with {max(num_workers, 1)} workers each. Start fewer."
            )
        return part

    def __len__(self) -> int:
        if self.survey is None:
            raise TypeError(f"The number of rows of {self.name} is not known.")
        workers = max(self.num_workers, 1)
        if self.batch_size is None or workers * self.num_processes == 1:
            return self.survey.num_rows
        batches = sum(
            math.ceil(self._quota(self.survey, worker, workers) / self.batch_size) for worker in range(workers)
        )
        return batches * self.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            fsspec.asyn.reset_lock()  # a forked process would wait for its parent's for ever
        reader, readers = self.process_index * workers + index, self.num_processes * workers
        epoch, skipped = int(self._epoch), self.extract.skipped
        skipped.clear()
        quota = self._quota(self.survey, index, workers) if self.batch_size and self.survey else None
        given = 0
        try:
            for example in islice(self._read(reader, readers, epoch), quota):
                yield example
                given += 1
        finally:  # training may stop within a pass
            # A worker forgets with each epoch what it has said.
            if not (worker and epoch):
                self.extract.report(self.survey.num_rows if self.survey else None)
        if given == 0 and skipped and readers == 1:
            raise ValueError(f"None of the {len(skipped)} audio files can be used: {'; '.join(skipped)}")
        if self.batch_size and quota is not None:
            while math.ceil(given / self.batch_size) < math.ceil(quota / self.batch_size):
                before = given
                # Its own first rows again and, as it may have none that can be used, those of the others.
                for turn in range(readers):
                    again = self._read((reader + turn) % readers, readers, epoch)
                    for example in islice(again, quota - given):
                        yield example
                        given += 1
                if given == before:
                    raise ValueError(f"None of the rows of {self.name} can be used: {'; '.join(skipped)}")
        elif self.batch_size:
            while given:
                epoch += 1
                yield from self._read(reader, readers, epoch)

    def _read(self, reader: int, readers: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Examples of one reader's rows."""
        rows = self.rows
        by_shards = self._by_shards(readers)
        if by_shards:
            rows = rows.shard(readers, reader, contiguous=False)
        # The same order for all readers, so that they can take turns.
        ordered = (
            self._shuffled(rows, np.random.default_rng([self.seed, epoch])) if self.shuffle_buffer else _rows(rows)
        )
        own = ordered if by_shards else islice(ordered, reader, None, readers)
        for number in count():
            batch = list(islice(own, BATCH))
            if not batch:
                break
            generator = np.random.default_rng([self.seed, epoch, reader, number])
            features = self.extract({name: [row[name] for row in batch] for name in batch[0]}, generator)
            for index in range(len(next(iter(features.values())))):
                yield {name: column[index] for name, column in features.items()}

    def _shuffled(self, rows: IterableDataset, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Rows that are drawn from a buffer, which is filled from the shards in random order.

        `IterableDataset.shuffle` does the same, and then sleeps for five seconds at the end of each pass over Parquet.
        """
        buffer: list[dict[str, Any]] = []
        for shard in generator.permutation(rows.num_shards):
            for row in _rows(rows.shard(rows.num_shards, int(shard))):
                if len(buffer) < self.shuffle_buffer:
                    buffer.append(row)
                else:
                    index = generator.integers(self.shuffle_buffer)
                    yield buffer[index]
                    buffer[index] = row
        for index in generator.permutation(len(buffer)):
            yield buffer[index]

    def _by_shards(self, readers: int) -> bool:
        """Whether each reader gets shards of its own, instead of rows of all shards."""
        if readers == 1:
            return True
        if self.batch_size is None:
            return self.rows.num_shards >= readers
        shards = self.survey.rows_per_shard if self.survey else None
        if shards is None or len(shards) < readers:
            return False
        workers = readers // self.num_processes
        counts = [sum(shards[reader::readers]) for reader in range(readers)]
        # What would be used again to make processes equal has to be less than a batch of all.
        again = sum(self.num_processes * max(counts[worker::workers]) for worker in range(workers)) - sum(counts)
        return self.num_processes == 1 or (min(counts) > 0 and again < self.batch_size * self.num_processes)

    def _quota(self, survey: Survey, worker: int, workers: int) -> int:
        """How many rows a worker reads, or the one of its number in another process, if that is more."""
        num_rows, _, shards = survey
        readers = self.num_processes * workers
        if self._by_shards(readers):
            shards = shards or (num_rows,)
            return max(sum(shards[reader::readers]) for reader in range(worker, readers, workers))
        # They are dealt out in turn, so that the first process has most.
        return len(range(worker, num_rows, readers))


def make_loader(
    stream: AudioStream, batch_size: int, accelerator: Accelerator, *, num_workers: int = 0, **options: Any
) -> DataLoader:
    """A `DataLoader` that reads this process's part of a stream.

    Accelerate by itself would have the first process read everything for all. It still does so for a stream without
    length, of which the parts could not be made equal; then without workers, whose smaller batches it would cut.

    Args:
        stream (AudioStream): the stream.
        batch_size (int): of each process.
        accelerator (Accelerator): knows the processes and devices; `accelerator.prepare` leaves the loader as it is.
        num_workers (int): processes that decode for each training process. Default: 0.
        options: other arguments of `torch.utils.data.DataLoader`.

    Returns:
        DataLoader: prepared for training; its length is the number of batches in an epoch.
    """
    if stream.survey is None and accelerator.num_processes > 1:
        return accelerator.prepare(DataLoader(stream.part(0, 1, batch_size, 0), batch_size, **options))
    options = {"batch_size": batch_size, "num_workers": num_workers, **options}
    part = stream.part(accelerator.process_index, accelerator.num_processes, batch_size, num_workers)
    # Workers' seeds are drawn when an epoch begins. If dropout's generator did that, a run that goes on within an epoch
    # would have other draws.
    options.setdefault("generator", torch.Generator().manual_seed(stream.seed))
    loader: Any = prepare_data_loader(
        DataLoader(part, **options),
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        dispatch_batches=False,
    )
    loader._is_accelerate_prepared = True
    return loader


def make_eval_loader(
    stream: AudioStream, batch_size: int, accelerator: Accelerator, *, num_workers: int = 0, **options: Any
) -> DataLoader:
    """A `DataLoader` that reads each row of a stream once, for evaluation.

    With several processes the first one reads for all, so that `gather_for_metrics` knows which samples it has added to
    the last batch; then without workers, whose smaller batches Accelerate would cut.

    Args:
        stream (AudioStream): the stream.
        batch_size (int): of each process.
        accelerator (Accelerator): knows the processes and devices.
        num_workers (int): processes that decode, if there is one that evaluates. Default: 0.
        options: other arguments of `torch.utils.data.DataLoader`.

    Returns:
        DataLoader: prepared for evaluation.
    """
    if accelerator.num_processes == 1:
        options["num_workers"] = num_workers
    return accelerator.prepare(DataLoader(stream, batch_size, **options))


def load_stream(
    dataset: str,
    split: str,
    feature_extractor: SequenceFeatureExtractor,
    *,
    rows: Optional[str] = None,
    label_names: Optional[Sequence[str]] = None,
    audio_column: str = "audio",
    label_column: Optional[str] = "label",
    config_name: Optional[str] = None,
    streaming: bool = True,
    training: bool = True,
    needs_length: bool = True,
    max_length_seconds: Optional[float] = None,
    on_bad_audio: Literal["skip", "raise"] = "skip",
    shuffle_buffer: int = 500,
    seed: int = 0,
    **hub: Any,
) -> AudioStream:
    """A split of a dataset as a stream of model inputs: what `load_rows`, `survey_rows` and `ExtractFeatures` do.

    Rows and labels are counted before, where that does not read the audio, or are what the dataset says of itself.

    Args:
        dataset (str): id on the Hub or local folder.
        split (str): name of the split.
        feature_extractor (SequenceFeatureExtractor): the model's feature extractor.
        rows (str, optional): which rows, such as `"fold=1,2,3"`. Default: all.
        label_names (Sequence[str], optional): the classes, in the order of the model's outputs. Default: those that the
            dataset declares or, if it declares none, those that occur, in order; if `rows` chooses labels, only these.
            `stream.extract.label_ids` has them.
        audio_column (str): name of the column with the audio. Default: `"audio"`.
        label_column (str, optional): name of the column with the labels, or several such as
            `"action,object,location"`, whose values together are the label; None to read no labels, and count no rows.
            Default: `"label"`.
        config_name (str, optional): configuration of the dataset.
        streaming (bool): read while training instead of downloading first. Default: True.
        training (bool): shuffle, and cut long clips at random places. Default: True.
        needs_length (bool): whether it is an error if the rows cannot be counted without their audio. Default: True.
        max_length_seconds (float, optional): longer clips are cut to this length. Default: they are not.
        on_bad_audio ("skip" or "raise"): what happens to audio that cannot be used. Default: `"skip"`.
        shuffle_buffer (int): how many undecoded rows are held to draw from in training. Default: 500.
        seed (int): of the shuffling and of random cuts. Default: 0.
        hub: `revision`, `token` and `cache_dir`, as for `load_rows`.

    Returns:
        AudioStream: the stream.

    Raises:
        ValueError: if there is no such split, column or row, a label is none of the classes, or the rows cannot be
            counted.
    """
    where = f"{dataset} ({split}{f', {rows}' if rows else ''})"
    label_columns = label_column.split(",") if label_column else []
    columns = [*label_columns, *([parse_selection(rows)[0]] if rows else [])]

    def load(*more: str) -> IterableDataset:
        given = load_rows(
            dataset,
            split,
            audio_column=audio_column,
            columns=list(dict.fromkeys([*more, *columns])),
            config_name=config_name,
            streaming=streaming,
            **hub,
        )
        given = select_rows(given, rows, dataset) if rows else given
        if len(label_columns) < 2:
            return given
        names_of = {column: class_names(given, column) for column in label_columns}
        return given.map(_join_labels, fn_kwargs={"names_of": names_of, "name": label_column, "where": where})

    names: Optional[list[str]] = None
    survey: Optional[Survey] = None
    if label_column is not None:
        labels = load()
        names = class_names(labels, label_column)
        if names is None or reads_single_columns(dataset, config_name, **hub):
            survey = survey_rows(labels, label_column, where)
        elif not rows:
            survey = survey_metadata(labels, label_column)
    if survey is None and needs_length:
        raise ValueError(
            f"{where} does not say how many rows it has, and counting them would read all of its audio: train a "
            "number of steps instead of epochs, with --max_steps, or here with needs_length=False."
        )
    if label_names is None:
        label_names = names or (survey.labels if survey else ())
        column, chosen = parse_selection(rows) if rows else (None, ())
        if names and column == label_column:
            label_names = [name for index, name in enumerate(names) if {name, str(index)} & set(chosen)]
    label_names = list(label_names)
    unseen = sorted(set(survey.labels) - set(label_names)) if survey else []
    if unseen:
        raise ValueError(
            f"{where} has labels that are none of the classes {', '.join(label_names)}: {', '.join(unseen)}."
        )
    extract = ExtractFeatures(
        feature_extractor,
        label_names,
        audio_column=audio_column,
        label_column=label_column,
        class_names=names,
        max_length_seconds=max_length_seconds,
        random_crop=training,
        on_bad_audio=on_bad_audio,
    )
    return AudioStream(
        load(audio_column), extract, survey, shuffle_buffer=shuffle_buffer if training else 0, seed=seed, name=dataset
    )


def _rows(rows: IterableDataset) -> Iterator[dict[str, Any]]:
    """All rows; iterating over `rows` itself would divide them among workers once more."""
    for batch in rows.iter(BATCH):
        for index in range(len(next(iter(batch.values())))):
            yield {name: column[index] for name, column in batch.items()}


def _join_labels(
    row: dict[str, Any], names_of: dict[str, Optional[list[str]]], name: str, where: str
) -> dict[str, str]:
    return {name: " ".join(label_name(row[column], names, where) for column, names in names_of.items())}
