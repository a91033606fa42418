"""Streams of model inputs, divided among the processes and workers that read them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Optional

import fsspec.asyn
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import IterableDataset
from torch.utils.data import DataLoader, get_worker_info

from .data import ExtractFeatures, Survey, check_columns

BATCH = 8  # rows that are decoded at a time


class AudioStream(torch.utils.data.IterableDataset):
    """A stream of model inputs and `labels`: shuffled if asked, decoded, and turned into features.

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
        columns = [extract.audio_column, extract.label_column]
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
        """What a process reads, in a number of batches that is known before.

        Processes wait for each other in every step, and a run that goes on from a checkpoint counts batches. So one
        that has fewer rows than another, or skips so many that a batch is missing, goes on with its first ones again,
        as Accelerate does to complete a last batch.

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
        batches = sum(math.ceil(self._quota(worker, workers) / self.batch_size) for worker in range(workers))
        return batches * self.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            fsspec.asyn.reset_lock()  # a forked process would wait for its parent's for ever
        reader, readers = self.process_index * workers + index, self.num_processes * workers
        skipped = self.extract.skipped
        skipped.clear()
        count = 0
        try:
            for example in self._read(reader, readers):
                yield example
                count += 1
        finally:  # training may stop within a pass
            # A worker forgets with each epoch what it has said.
            if not (worker and self._epoch):
                self.extract.report(self.survey.num_rows if self.survey else None)
        if count == 0 and skipped:
            raise ValueError(f"None of the {len(skipped)} audio files can be used: {'; '.join(skipped)}")
        if self.batch_size and self.survey:
            quota = self._quota(index, workers)
            while math.ceil(count / self.batch_size) < math.ceil(quota / self.batch_size):
                for example in islice(self._read(reader, readers), quota - count):
                    yield example
                    count += 1

    def _read(self, reader: int, readers: int) -> Iterator[dict[str, Any]]:
        """Examples of one reader's rows."""
        rows, epoch = self.rows, int(self._epoch)
        by_shards = self._by_shards(readers)
        if by_shards:
            rows = rows.shard(readers, reader, contiguous=False)
        if self.shuffle_buffer:
            rows = rows.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
            rows.set_epoch(epoch)
        step, first = (1, 0) if by_shards else (readers, reader)
        # Not by iterating over `rows` itself, which would divide them among workers once more.
        for number, batch in enumerate(rows.iter(BATCH * step)):
            generator = np.random.default_rng([self.seed, epoch, reader, number])
            features = self.extract({name: column[first::step] for name, column in batch.items()}, generator)
            for index in range(len(features["labels"])):
                yield {name: column[index] for name, column in features.items()}

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

    def _quota(self, worker: int, workers: int) -> int:
        """How many rows a worker reads, or the one of its number in another process, if that is more."""
        num_rows, _, shards = self.survey  # type: ignore[misc]
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
    length, of which the parts could not be made equal.

    Args:
        stream (AudioStream): the stream.
        batch_size (int): of each process.
        accelerator (Accelerator): knows the processes and devices; `accelerator.prepare` leaves the loader as it is.
        num_workers (int): processes that decode for each training process. Default: 0.
        options: other arguments of `torch.utils.data.DataLoader`.

    Returns:
        DataLoader: prepared for training; its length is the number of batches in an epoch.
    """
    options = {"batch_size": batch_size, "num_workers": num_workers, **options}
    if stream.survey is None and accelerator.num_processes > 1:
        return accelerator.prepare(DataLoader(stream, **options))
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
