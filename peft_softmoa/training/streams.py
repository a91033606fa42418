"""Streams of model inputs, divided among the processes and workers that read them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import count, islice
from typing import Any, Optional

import fsspec.asyn
import numpy as np
import torch
from datasets import IterableDataset
from torch import nn
from torch.utils.data import get_worker_info

from .channels import check_levels, most_channels, resolve_channels
from .features import ExtractFeatures
from .frames import shortest_clip
from .rows import DatasetSummary, check_columns, column_names, name_some
from .tasks import Task

BATCH = 8  # rows that are decoded at a time


class AudioStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """A stream of model inputs and, if there are any, `labels`: shuffled if asked, decoded, and turned into features.

    A `DataLoader` or a Trainer takes it as it is; the workers divide it among them. `make_loader` also divides it among
    processes. With K readers in all, reader k reads the shards k, k + K, k + 2K, …. If there are fewer shards than
    readers, or the shards are too uneven, it goes through all rows and uses the rows k, k + K, k + 2K, …. Each row is
    used once either way. The seed, the epoch and K determine the order and the places of random cuts.

    Args:
        rows (IterableDataset): undecoded rows, from `load_rows`.
        extract (ExtractFeatures): makes model inputs of them.
        summary (DatasetSummary, optional): size and labels, from `summarize_rows`. Default: none; then the stream has
            no length.
        shuffle_buffer (int): number of undecoded rows from which the next one is drawn; 0 keeps the order. Default: 0.
        seed (int): seed of the shuffling and of the random cuts, which differ from epoch to epoch. Default: 0.
        name (str): name of the dataset, for errors.

    Raises:
        ValueError: if the dataset has no such audio or label column.
    """

    def __init__(
        self,
        rows: IterableDataset,
        extract: ExtractFeatures,
        summary: Optional[DatasetSummary] = None,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        name: str = "the dataset",
    ) -> None:
        if shuffle_buffer < 0:
            raise ValueError(f"`shuffle_buffer` must not be negative, got {shuffle_buffer}.")
        columns = [extract.options.audio_column, *(extract.options.label_columns if extract.task else ())]
        check_columns(column_names(rows), columns, name)
        self.rows = rows.select_columns(columns)
        self.extract = extract
        self.summary = summary
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.name = name
        # Of its rows and their audio, from `load_stream`.
        self.fingerprint: dict[str, str] = {}
        self.process_index, self.num_processes, self.num_workers = 0, 1, 0
        self.batch_size: Optional[int] = None
        # Shared, for workers that live for several epochs.
        epoch: Any = torch.zeros((), dtype=torch.int64)
        self._epoch = epoch.share_memory_()

    @property
    def task(self) -> Optional[Task]:
        """What the labels are; None if the stream has none."""
        return self.extract.task

    @property
    def label_names(self) -> list[str]:
        """The classes, in the order of the model's outputs."""
        return list(self.task.label_names) if self.task else []

    def prepare(self, model: nn.Module) -> None:
        """Learn what a model takes: its channels, and that clips that are too short for it cannot be used.

        `AudioTrainer` does it. In a loop of one's own, call it before the stream is read.

        Args:
            model (nn.Module): the model, with or without an adapter.

        Raises:
            ValueError: if the channels that are chosen do not go with the adapter or the feature extractor.
        """
        extract = self.extract
        self.choose_channels(model)
        extract.min_samples = shortest_clip(model, extract.feature_extractor)
        if extract.task is not None:
            extract.task.prepare(model, extract.feature_extractor)

    def choose_channels(self, model: nn.Module) -> None:
        """Learn which channels a model reads, as a part of `prepare`.

        Args:
            model (nn.Module): the model, with or without an adapter.

        Raises:
            ValueError: if the channels that are chosen do not go with the adapter or the feature extractor.
        """
        self.extract.channels = resolve_channels(self.extract.options.channels, model)
        self.extract.most_channels = most_channels(model)
        if self.extract.channels != "mono":
            check_levels(self.extract.feature_extractor)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which determines the order.

        Args:
            epoch (int): number of the epoch, from 0.
        """
        self._epoch.fill_(epoch)

    def for_process(self, process_index: int, num_processes: int, batch_size: int, num_workers: int) -> AudioStream:
        """The part of the stream that a process reads for training, with a number of batches that is known before.

        Processes wait for each other in every step, and a resumed run counts batches. So a process repeats its first
        rows if it has fewer rows than another, or if it skips so many that a batch is missing. Accelerate completes a
        last batch the same way. A stream without length never ends: it continues from epoch to epoch.

        Args:
            process_index (int): number of the process, from 0.
            num_processes (int): number of processes.
            batch_size (int): batch size of each process.
            num_workers (int): number of workers of each process's `DataLoader`.

        Returns:
            AudioStream: the part. With several readers, its length counts a smaller last batch of each as a full one.

        Raises:
            ValueError: if there are fewer rows than readers.
        """
        part = copy.copy(self)
        part.process_index, part.num_processes = process_index, num_processes
        part.batch_size, part.num_workers = batch_size, num_workers
        readers = num_processes * max(num_workers, 1)
        if self.summary and self.summary.num_rows < readers and num_processes > 1:
            raise ValueError(
                f"{self.name} has {self.summary.num_rows} rows, fewer than its {readers} readers: {num_processes} "
                f"processes with {max(num_workers, 1)} workers each. Start fewer."
            )
        return part

    def __len__(self) -> int:
        if self.summary is None:
            raise TypeError(f"The number of rows of {self.name} is not known.")
        workers = max(self.num_workers, 1)
        if self.batch_size is None or workers * self.num_processes == 1:
            return self.summary.num_rows
        batches = sum(
            math.ceil(self._num_rows(self.summary, worker, workers) / self.batch_size) for worker in range(workers)
        )
        return batches * self.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            fsspec.asyn.reset_lock()  # a forked process would wait forever for the lock of its parent
        reader, readers = self.process_index * workers + index, self.num_processes * workers
        epoch, skipped = int(self._epoch), self.extract.skipped
        skipped.clear()
        num_rows = self._num_rows(self.summary, index, workers) if self.batch_size and self.summary else None
        yielded = 0
        try:
            for example in islice(self._read(reader, readers, epoch), num_rows):
                yield example
                yielded += 1
        finally:  # training may stop within a pass
            # A worker does not remember the warnings of earlier epochs.
            if not (worker and epoch):
                self.extract.warn_of_skipped(self.summary.num_rows if self.summary else None)
        if yielded == 0 and skipped and readers == 1:
            raise ValueError(
                f"None of the {len(skipped)} audio files can be used: {name_some(map(str, skipped), separator='; ')}"
            )
        if self.batch_size and num_rows is not None:
            while math.ceil(yielded / self.batch_size) < math.ceil(num_rows / self.batch_size):
                before = yielded
                # Its own first rows again and, as none of them may be usable, those of the other readers.
                for turn in range(readers):
                    again = self._read((reader + turn) % readers, readers, epoch)
                    for example in islice(again, num_rows - yielded):
                        yield example
                        yielded += 1
                if yielded == before:
                    raise ValueError(
                        f"None of the rows of {self.name} can be used: {name_some(map(str, skipped), separator='; ')}"
                    )
        elif self.batch_size:
            while yielded:
                epoch += 1
                yield from self._read(reader, readers, epoch)

    def _read(self, reader: int, readers: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Examples of one reader's rows."""
        rows = self.rows
        by_shards = self._by_shards(readers)
        if by_shards:
            rows = rows.shard(readers, reader, contiguous=False)
        # All readers have the same order, so that they can take turns.
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
        """Rows drawn at random from a buffer, which is filled from the shards in random order.

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
        """Whether each reader reads its own shards, instead of some rows of all shards."""
        if readers == 1:
            return True
        if self.batch_size is None:
            num_shards: int = self.rows.num_shards
            return num_shards >= readers
        shards = self.summary.rows_per_shard if self.summary else None
        if shards is None or len(shards) < readers:
            return False
        workers = readers // self.num_processes
        counts = [sum(shards[reader::readers]) for reader in range(readers)]
        # The rows that are repeated to make processes equal must be fewer than one batch of all processes.
        most = sum(max(counts[worker::workers]) for worker in range(workers))
        repeated: int = self.num_processes * most - sum(counts)
        return self.num_processes == 1 or (min(counts) > 0 and repeated < self.batch_size * self.num_processes)

    def _num_rows(self, summary: DatasetSummary, worker: int, workers: int) -> int:
        """Number of rows that a worker reads: the most that the workers with its number have in any process."""
        num_rows, shards = summary.num_rows, summary.rows_per_shard
        readers = self.num_processes * workers
        if self._by_shards(readers):
            shards = shards or (num_rows,)
            return max(sum(shards[reader::readers]) for reader in range(worker, readers, workers))
        # The rows go to the readers in turn, so the first process has most.
        return len(range(worker, num_rows, readers))


def _rows(rows: IterableDataset) -> Iterator[dict[str, Any]]:
    """All rows. Iteration over `rows` itself would divide them among workers once more."""
    for batch in rows.iter(BATCH):
        for index in range(len(next(iter(batch.values())))):
            yield {name: column[index] for name, column in batch.items()}
