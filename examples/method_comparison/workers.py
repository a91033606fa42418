"""The processes that train, and what is left to do for them."""

from __future__ import annotations

import json
import os
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, Optional

from transformers.utils import logging

from ..benchmark.measure import environment
from . import records
from .data import Data, load_cached
from .measures import one_thread
from .records import CHOICE_SEED, choice_fold, chosen_rate
from .training import Run, train

# What the runs of a process share.
_shared: dict[str, Any] = {}


def prepare(cache: Path, protocol: dict[str, Any], data: Data, pooled: Optional[str], processes: int) -> None:
    """Tell a process what its runs share, and read the features from their files."""
    with one_thread():
        where = environment(protocol.get("device", "cpu")) | {"processes": processes}
    data = data._replace(inputs=load_cached(cache, data.digest))
    _shared.update(
        protocol=protocol, data=data, pooled=None if pooled is None else load_cached(cache, pooled), environment=where
    )


def prepare_process(*shared: Any) -> None:
    """The same, in a process of its own."""
    Thread(target=end_with_parent, daemon=True).start()
    be_quiet()
    prepare(*shared)


def end_with_parent() -> None:
    """Do not wait for ever for runs from a process that was killed."""
    parent_process().join()
    os._exit(1)


def be_quiet() -> None:
    """Let transformers say nothing of the models that it loads in each run."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def carry_out(run: Run) -> records.Record:
    """Train, and give the record as JSON has it: what JSON cannot hold fails this run, and not the comparison."""
    record = train(run, _shared["protocol"], _shared["data"], _shared["pooled"])
    record = {"settings": record.pop("settings"), "environment": _shared["environment"], **record}
    return json.loads(json.dumps(record, allow_nan=False))


class Here(Executor):
    """Runs in this process, at once."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 (it is reported where the result is asked for)
            future.set_exception(error)
        return future


class Workers:
    """Processes that are replaced if one of them dies.

    Args:
        number (int): how many; one is this process itself.
        protocol (dict): the settings that all runs share.
        data (Data): all clips.
        cache (Path): the folder with the features.
        pooled (str, optional): name of the cached outputs that a linear probe reads.
    """

    def __init__(
        self, number: int, protocol: dict[str, Any], data: Data, cache: Path, pooled: Optional[str] = None
    ) -> None:
        self.number, self.shared = number, (cache, protocol, data._replace(inputs=None), pooled, number)
        self.executor = self._start()

    def _start(self) -> Executor:
        if self.number == 1:
            prepare(*self.shared)
            return Here()
        return ProcessPoolExecutor(self.number, get_context("spawn"), prepare_process, self.shared)

    def submit(self, run: Run) -> Future:
        """Begin a run."""
        try:
            return self.executor.submit(carry_out, run)
        except BrokenProcessPool:
            self.executor.shutdown()
            self.executor = self._start()
            return self.executor.submit(carry_out, run)

    def close(self) -> None:
        """End the processes."""
        self.executor.shutdown()


def duration(seconds: float) -> str:
    """Such as `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Says after each run how much is done and how long the others will take.

    Args:
        total (int): number of runs.
        processes (int): how many run at a time.
    """

    def __init__(self, total: int, processes: int) -> None:
        self.total, self.processes = total, processes
        self.finished = 0
        self.seconds: dict[str, list[float]] = {}

    def add(self, method: str, seconds: float) -> None:
        """Learn how long a run of a method takes."""
        self.seconds.setdefault(method, []).append(seconds)

    def left(self, runs: list[Run]) -> float | None:
        """Seconds that runs will take: each as long as those of its method, or as all, if none has ended yet."""
        means = {method: sum(each) / len(each) for method, each in self.seconds.items()}
        if not means:
            return None
        usual = sum(means.values()) / len(means)
        return sum(means.get(run.method, usual) for run in runs) / self.processes

    def say(self, what: str, left: list[Run]) -> None:
        """Print a line."""
        remaining = self.left(left)
        rest = f"; about {duration(remaining)} left" if left and remaining is not None else ""
        print(f"[{self.finished}/{self.total}] {what}{rest}", flush=True)


def run_all(
    plan: list[Run], workers: Workers, found: list[records.Record], study: Path, protocol: dict[str, Any]
) -> list[str]:
    """Carry out all runs that are not there yet, and write the study whenever one ends.

    Args:
        plan (list[Run]): all runs.
        workers (Workers): carry them out.
        found (list[Record]): the records that are there; those of this call are added.
        study (Path): the file with the records.
        protocol (dict): the settings that all runs share.

    Returns:
        list[str]: what failed, one line each.
    """
    progress = Progress(len(plan), workers.number)
    present = set()
    for record in found:
        settings = record["settings"]
        options = tuple(settings["options"].items())
        run = Run(settings["method"], settings["fold"], settings["rate"], settings["seed"], options)
        present.add(run.name)
        progress.add(settings["method"], record["run_seconds"])
    pending, running, failures = list(plan), {}, []
    lost: set[tuple[Any, ...]] = set()  # the methods, options and folds whose rate cannot be chosen
    again: set[Run] = set()

    def ready() -> list[tuple[Run, Run]]:
        """The runs that can begin, as planned and with their rate; those that never will or are there are dropped."""
        able = []
        for run in list(pending):
            rate = run.rate
            if rate is None:
                if (run.method, run.options, choice_fold(protocol, run.fold)) in lost:
                    pending.remove(run)
                    failures.append(f"{run.name}: no rate can be chosen")
                    continue
                rate = chosen_rate(found, protocol, run)
                if rate is None:
                    continue
            chosen = replace(run, rate=rate)
            if chosen.name in present:
                pending.remove(run)
                progress.finished += 1
            else:
                able.append((run, chosen))
        return able

    while pending or running:
        for planned, run in ready()[: workers.number - len(running)]:
            pending.remove(planned)
            running[workers.submit(run)] = run
        if not running:
            continue
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool) and run not in again:
                # One process has died, and the others with it, whatever they did.
                again.add(run)
                pending.insert(0, run)
                continue
            progress.finished += 1
            if error is None:
                record = future.result()
                found.append(record)
                records.write(study, found)
                progress.add(run.method, record["run_seconds"])
                value = record["progress"]["validation"][-1]
                what = f"{run.name}: validation {value:.1%}, {record['run_seconds']:.0f} s"
            else:
                failures.append(f"{run.name}: {type(error).__name__}: {error}")
                what = f"{failures[-1]} — failed"
                if run.seed == CHOICE_SEED and run.fold in protocol["rate_folds"]:
                    lost.add((run.method, run.options, run.fold))
            progress.say(what, [*pending, *running.values()])
    workers.close()
    print(f"{progress.total - len(failures)} of {progress.total} runs are there.", flush=True)
    return failures
