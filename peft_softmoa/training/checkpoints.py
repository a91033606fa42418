"""Runs that can be interrupted at any moment and resume: complete checkpoints, and settings that must stay the same."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

from accelerate import Accelerator
from filelock import FileLock, Timeout
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# In the output folder: a checkpoint while it is written, those after one that a run went back to, and the state of the
# run. The Trainer's pushes leave out what begins with an underscore.
STAGING = "_unfinished-checkpoint"
LATER = "_later-"
RUN_STATE = "run.json"
LOCK = "_lock"
# In a checkpoint of Accelerate: the adapter.
ADAPTER = "adapter.safetensors"
CHECKPOINT = re.compile(r"checkpoint-\d+")


def newest_checkpoint(output_dir: Union[str, os.PathLike[str]]) -> Optional[str]:
    """Find the checkpoint of the last step.

    Args:
        output_dir (str or PathLike): the output folder of a run.

    Returns:
        str, optional: the checkpoint's folder; None if there is none.
    """
    return max(map(str, _checkpoints(output_dir)), key=_step, default=None)


@contextmanager
def atomic_checkpoint(
    output_dir: Union[str, os.PathLike[str]],
    name: str,
    is_main: bool = True,
    wait: Callable[[], Any] = lambda: None,
) -> Iterator[str]:
    """Write a checkpoint in another place, and move it when it is complete.

    Args:
        output_dir (str or PathLike): the output folder.
        name (str): name of the checkpoint, such as `"checkpoint-100"`.
        is_main (bool): whether this process moves the checkpoint; one of several does. Default: True.
        wait (callable): waits until all processes call it. Default: there is one process.

    Yields:
        str: the folder to write into; its last part is `name`.

    Raises:
        OSError: if the checkpoint could not be written, for example because the disk is full. The incomplete checkpoint
            is removed; earlier checkpoints remain.
    """
    staging, place = Path(output_dir, STAGING), Path(output_dir, name)
    try:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / name).mkdir(parents=True)
        wait()
        yield str(staging / name)
        wait()
        if is_main:
            for path in (*staging.rglob("*"), staging / name):
                _sync(path)  # onto the disk before it is renamed, in case the machine goes down
            if place.exists():  # from an earlier run
                os.replace(place, staging / "earlier")
            os.replace(staging / name, place)
            _sync(Path(output_dir))
            shutil.rmtree(staging)
        wait()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own errors
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        newest = newest_checkpoint(output_dir)
        raise OSError(
            f"{name} could not be saved in '{output_dir}': {error}. The newest checkpoint is still {newest or 'none'}. "
            "Make room if the disk is full, and run the same command again: it resumes from there."
        ) from error


@contextmanager
def lock_run(output_dir: Union[str, os.PathLike[str]], is_main: bool = True) -> Iterator[None]:
    """Keep an output folder to one run; a process that ends, in whatever way, gives it free.

    Args:
        output_dir (str or PathLike): the output folder; it is created.
        is_main (bool): whether this process locks the folder; one of several does. Default: True.

    Yields:
        None: while the folder is locked.

    Raises:
        ValueError: if another run has locked the folder.
    """
    if not is_main:
        yield
        return
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(output_dir, LOCK), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"Another run writes into the output folder '{output_dir}' now. Wait until it ends, or choose another "
            "`output_dir`."
        ) from None
    try:
        yield
    finally:
        lock.release()


def start_or_resume(
    output_dir: Union[str, os.PathLike[str]],
    settings: Mapping[str, Any],
    resume_from_checkpoint: Union[str, bool, None] = None,
    *,
    may_change: Collection[str] = (),
    is_main: bool = True,
) -> Optional[str]:
    """Decide whether a run starts or resumes, and write its state.

    An interrupted run resumes from its newest checkpoint by default. Its settings must stay the same.

    Args:
        output_dir (str or PathLike): the output folder.
        settings (mapping): the settings that must stay the same, as JSON.
        resume_from_checkpoint (str or bool, optional): a checkpoint in this folder, or True for the newest, to train a
            finished run longer or to go back; later checkpoints are renamed to `_later-checkpoint-…`. False starts a
            run and never resumes one. Default: resume an interrupted run, otherwise start.
        may_change (collection of str): names of settings that may change if `resume_from_checkpoint` is given, such as
            the number of epochs. Default: none.
        is_main (bool): whether this process writes; one of several does. Default: True.

    Returns:
        str, optional: the checkpoint to resume from; None for a start.

    Raises:
        ValueError: if the folder holds a model, a finished run, or a run with other settings; the message says which.
    """
    resume = resume_from_checkpoint
    settings = json.loads(json.dumps(settings))
    patterns = ("config.json", "adapter_*", "model*", "pytorch_model*", "checkpoint-*")
    present = sorted(path.name for pattern in patterns for path in Path(output_dir).glob(pattern))
    if isinstance(resume, str):
        given = Path(resume).resolve()
        if given.parent != Path(output_dir).resolve() or not CHECKPOINT.fullmatch(given.name):
            raise ValueError(
                f"`resume_from_checkpoint` must be a checkpoint in the output folder '{output_dir}', got '{resume}'."
            )
        resume = str(Path(output_dir, given.name))
    state = read_run_state(output_dir)
    if present and not resume and (state is None or resume is False):
        resuming = ", or resume from one of its checkpoints with `resume_from_checkpoint`" if may_change else ""
        raise ValueError(
            f"The output folder '{output_dir}' already holds a model ({', '.join(present)}). Choose another "
            f"`output_dir`{resuming}."
        )
    if state:
        before = state["settings"]
        changed = [
            f"{name} was {before[name]!r} and is {value!r}"
            for name, value in settings.items()
            if name in before and before[name] != value and not (resume and name in may_change)
        ]
        if changed and present:
            raise ValueError(
                f"The output folder '{output_dir}' holds a run with other settings: {'; '.join(changed)}. Use the "
                "settings of that run, or choose another `output_dir`."
            )
        if state["finished"] and not resume:
            raise ValueError(
                f"The run in the output folder '{output_dir}' is finished. Choose another `output_dir`"
                f"{', or train it longer with `resume_from_checkpoint=True`' if may_change else ''}."
            )
    # A command that went back to an earlier checkpoint resumes from the newest one when it runs again.
    name = Path(resume).name if isinstance(resume, str) else resume  # the folder may have been moved
    goes_back = isinstance(resume, str) and not (state and state.get("resume") == name and not state["finished"])
    checkpoint = str(resume) if goes_back else newest_checkpoint(output_dir)
    if resume and (checkpoint is None or not os.path.isdir(checkpoint)):
        raise ValueError(
            f"There is no checkpoint {resume if isinstance(resume, str) else f'in {output_dir}'} to resume from."
        )
    if is_main:
        if goes_back and checkpoint:
            for later in _checkpoints(output_dir):
                if _step(later) > _step(checkpoint):
                    shutil.rmtree(later.with_name(f"{LATER}{later.name}"), ignore_errors=True)
                    os.replace(later, later.with_name(f"{LATER}{later.name}"))
        write_run_state(output_dir, settings, finished=False, resume_from_checkpoint=name)
    return checkpoint


def read_run_state(output_dir: Union[str, os.PathLike[str]]) -> Optional[dict[str, Any]]:
    """Read what `write_run_state` has written.

    Args:
        output_dir (str or PathLike): the output folder.

    Returns:
        dict, optional: `finished`, `resume` and `settings`; None if there is no run.
    """
    path = Path(output_dir, RUN_STATE)
    state: Optional[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else None
    return state


def write_run_state(
    output_dir: Union[str, os.PathLike[str]],
    settings: Mapping[str, Any],
    *,
    finished: bool,
    resume_from_checkpoint: Union[str, bool, None] = None,
) -> None:
    """Write the settings of a run and whether it is finished into `run.json`.

    Args:
        output_dir (str or PathLike): the output folder; it is created.
        settings (mapping): the settings that must stay the same, as JSON.
        finished (bool): whether all of the run is saved.
        resume_from_checkpoint (str or bool, optional): as the run got it, but of a checkpoint the name only. Default:
            None.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    written = Path(output_dir, f"{RUN_STATE}.unfinished")
    state = {"finished": finished, "resume": resume_from_checkpoint, "settings": dict(settings)}
    written.write_text(json.dumps(state, indent=2) + "\n")
    os.replace(written, Path(output_dir, RUN_STATE))


def checkpoint_only_adapters(accelerator: Accelerator) -> None:
    """Leave the frozen base model out of the checkpoints that `accelerator.save_state` writes and `load_state` reads.

    Nothing changes under FSDP and DeepSpeed, which save their parts of a model themselves.

    Args:
        accelerator (Accelerator): the accelerator that will prepare a PEFT model.
    """

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if weights:
            weights.clear()
            if accelerator.is_main_process:
                model = accelerator.unwrap_model(models[0])
                save_file(get_peft_model_state_dict(model, save_embedding_layers=False), Path(folder, ADAPTER))

    def load(models: list[Any], folder: str) -> None:
        if Path(folder, ADAPTER).exists():
            set_peft_model_state_dict(accelerator.unwrap_model(models.pop()), load_file(Path(folder, ADAPTER)))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _checkpoints(output_dir: Union[str, os.PathLike[str]]) -> list[Path]:
    return [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]


def _step(checkpoint: Union[str, os.PathLike[str]]) -> int:
    return int(os.fspath(checkpoint).rpartition("-")[2])


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
