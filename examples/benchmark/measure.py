"""Measuring: times of functions that run in turn, memory, floating-point operations, and where all that was."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PACKAGES = ("torch", "transformers", "peft", "peft-softmoa")
# glibc gives the memory of large tensors back to the system whenever they are freed. The page faults when it is taken
# again are most of the noise of short measurements, so they are made without.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}


def keep_memory() -> None:
    """Start this process again with an allocator that keeps what it has, once, where that is glibc's."""
    if platform.libc_ver()[0] == "glibc" and any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP_MEMORY})


def in_turn(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str,
    note: Optional[Callable[[str], None]] = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time functions one after another, round by round, so that what disturbs the machine disturbs all of them.

    Each round has an order of its own, for each function leaves its traces in caches and memory for the next. One
    more round comes first and does not count.

    Args:
        functions (mapping): what to run, by name.
        rounds (int): how often.
        device (str): which device they use.
        note (callable, optional): is told each function's name before it runs. Default: None.
        clock (callable): tells the seconds. Default: those of the clock on the wall.

    Returns:
        dict[str, list[float]]: seconds, by name and round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for name in order.sample(list(functions), len(functions)):
            if note is not None:
                note(name)
            synchronize(device)
            start = clock()
            functions[name]()
            synchronize(device)
            if turn > 0:
                seconds[name].append(clock() - start)
    return seconds


def synchronize(device: str) -> None:
    """Wait until a device has done what it was told to."""
    if device != "cpu":
        torch.accelerator.synchronize()


def memory_of(forward: Callable[[], Tensor], step: Callable[[], None], model: nn.Module, device: str) -> int:
    """Bytes that a training step needs besides the model.

    On a CUDA device they are the growth of the allocator's peak, with gradients and the optimizer's state. Elsewhere
    they are what autograd keeps for the backward pass, each storage once, without the model's own parameters and
    buffers.

    Args:
        forward (callable): runs the forward pass and returns the loss.
        step (callable): runs a whole training step.
        model (nn.Module): the model that they run.
        device (str): which device.

    Returns:
        int: bytes.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    # They are held, for a freed one's address would be used again, but here only, and without their graph: what the
    # graph itself held would hold it in turn, and nothing of it would ever be freed. There is no backward pass.
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> None:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions, two for each multiplication and sum."""
    # The counter does not know the CPU's fused attention, but what it is made of.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def import_seconds(rounds: int) -> list[float]:
    """Seconds that `import peft_softmoa` takes after `import peft`, each in a new process."""
    script = "import time, peft; start = time.perf_counter(); import peft_softmoa; print(time.perf_counter() - start)"
    return [float(subprocess.check_output([sys.executable, "-c", script])) for _ in range(rounds)]


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions, threads and commit."""
    commit, changed = commit_of(Path(__file__).parent)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "allocator keeps memory": all(os.environ.get(name) == value for name, value in KEEP_MEMORY.items()),
        "commit": commit,
        "uncommitted changes": changed,
    }


def commit_of(folder: Path) -> tuple[Optional[str], Optional[bool]]:
    """The commit of a folder's repository, and whether any file but results has changed since.

    Args:
        folder (Path): anywhere in the repository.

    Returns:
        tuple: both None in a copy without its history.
    """
    git = ["git", "-C", str(folder)]
    # A comparison adds to results that are committed: they are no code.
    but_results = [":(top)", ":(top,exclude)examples/*/results/*"]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        return commit, bool(subprocess.check_output([*git, "status", "--porcelain", "-uno", "--", *but_results]))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def processor() -> str:
    """Name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def ratio(seconds: list[float], reference: list[float]) -> float:
    """The median over the rounds of one time as a multiple of another of the same round."""
    return statistics.median(one / other for one, other in zip(seconds, reference, strict=True))


def note(name: str) -> None:
    """Show what runs, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\033[K{name}", end="\r", file=sys.stderr, flush=True)
