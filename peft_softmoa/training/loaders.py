"""Data loaders of streams, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset

from .streams import AudioStream

# Arguments of a DataLoader that concern the batches. The others concern the workers.
OF_BATCHES = ("collate_fn", "drop_last", "pin_memory", "pin_memory_device")


def make_loader(
    stream: AudioStream, batch_size: int, accelerator: Accelerator, *, num_workers: int = 0, **options: Any
) -> DataLoader[dict[str, Any]]:
    """Make a `DataLoader` that reads this process's part of a stream, for training.

    Accelerate alone would let the first process read everything for all. This still happens for a stream without
    length, whose parts cannot be made equal. There are no workers then: Accelerate would cut their smaller batches.

    Args:
        stream (AudioStream): the stream.
        batch_size (int): batch size of each process.
        accelerator (Accelerator): knows the processes and devices; `accelerator.prepare` does not change the loader.
        num_workers (int): number of processes that decode for each training process. Default: 0.
        options: other arguments of `torch.utils.data.DataLoader`.

    Returns:
        DataLoader: prepared for training; its length is the number of batches in an epoch.
    """
    if stream.summary is None and accelerator.num_processes > 1:
        whole: DataLoader[dict[str, Any]] = accelerator.prepare(
            DataLoader(stream.for_process(0, 1, batch_size, 0), batch_size, **options)
        )
        return whole
    options = {"batch_size": batch_size, "num_workers": num_workers, **options}
    part = stream.for_process(accelerator.process_index, accelerator.num_processes, batch_size, num_workers)
    # The seeds of workers are drawn when an epoch begins. If dropout's generator drew them, a run that resumes within
    # an epoch would draw other numbers.
    options.setdefault("generator", torch.Generator().manual_seed(stream.seed))
    loader: DataLoader[dict[str, Any]] = prepare_data_loader(
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
) -> DataLoader[dict[str, Any]]:
    """Make a `DataLoader` that reads each row of a stream once, for evaluation.

    All batches but the last are full, with any number of workers: a loss that is averaged over batches, as by the
    Trainer, would count small batches as full ones. With several processes the first one reads for all, so that
    `gather_for_metrics` knows which samples it has added to the last batch.

    Args:
        stream (AudioStream): the stream.
        batch_size (int): batch size of each process.
        accelerator (Accelerator): knows the processes and devices.
        num_workers (int): number of processes that decode. Default: 0.
        options: other arguments of `torch.utils.data.DataLoader`.

    Returns:
        DataLoader: prepared for evaluation.
    """
    dataset: IterableDataset[dict[str, Any]] = stream
    if num_workers:
        of_batches = {name: options.pop(name) for name in OF_BATCHES if name in options}
        dataset = _DecodedByWorkers(DataLoader(stream, batch_size, num_workers=num_workers, collate_fn=list, **options))
        options = of_batches
    loader: DataLoader[dict[str, Any]] = accelerator.prepare(DataLoader(dataset, batch_size, **options))
    return loader


class _DecodedByWorkers(IterableDataset[dict[str, Any]]):
    """The rows of a stream one by one; each worker ends with a smaller batch of its own."""

    def __init__(self, loader: DataLoader[dict[str, Any]]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rows in self.loader:
            yield from rows
