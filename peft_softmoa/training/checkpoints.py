"""Runs that can be cut off at any moment and go on: whole checkpoints, and what has to stay the same."""

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
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# Where a checkpoint is while it is written, and what a run notes of itself, in its output folder; an adapter in a
# checkpoint of Accelerate.
STAGING = "unfinished-checkpoint"
RUN = "run.json"
ADAPTER = "adapter.safetensors"
CHECKPOINT = re.compile(r"checkpoint-\d+")


def newest_checkpoint(folder: Union[str, os.PathLike]) -> Optional[str]:
    """The checkpoint of the last step.

    Args:
        folder (str or PathLike): the output folder of a run.

    Returns:
        str, optional: the checkpoint's folder; None if there is none.
    """
    steps = {path: CHECKPOINT.fullmatch(path.name) for path in Path(folder).glob("checkpoint-*")}
    return max(
        (str(path) for path, match in steps.items() if match),
        key=lambda path: int(path.rpartition("-")[2]),
        default=None,
    )


@contextmanager
def whole_checkpoint(
    folder: Union[str, os.PathLike], name: str, is_main: bool = True, wait: Callable[[], Any] = lambda: None
) -> Iterator[str]:
    """Write a checkpoint elsewhere, and move it to its place when it is whole.

    Args:
        folder (str or PathLike): the output folder.
        name (str): of the checkpoint, such as `"checkpoint-100"`.
        is_main (bool): whether this process, of several that write one checkpoint, moves it. Default: True.
        wait (callable): waits until all processes call it. Default: there is one process.

    Yields:
        str: the folder to write into, whose last part is `name`.

    Raises:
        OSError: if it could not be written, as when the disk is full. What was written of it is gone, and the
            checkpoints before it are still there.
    """
    staging, place = Path(folder, STAGING), Path(folder, name)
    try:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / name).mkdir(parents=True)
        wait()
        yield str(staging / name)
        wait()
        if is_main:
            for path in (*staging.rglob("*"), staging / name):
                _sync(path)  # on the disk before it gets its name, should the machine go down
            if place.exists():  # of the same step, by an earlier run
                os.replace(place, staging / "earlier")
            os.replace(staging / name, place)
            _sync(Path(folder))
            shutil.rmtree(staging)
        wait()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        newest = newest_checkpoint(folder)
        raise OSError(
            f"{name} could not be saved in '{folder}': {error}. The newest checkpoint is still {newest or 'none'}. "
            "Make room if the disk is full, and start the same command again: it goes on from there."
        ) from error


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def begin_run(
    folder: Union[str, os.PathLike],
    settings: Mapping[str, Any],
    resume: Union[str, bool, None] = None,
    *,
    longer: Collection[str] = (),
    is_main: bool = True,
) -> Optional[str]:
    """Decide whether a run starts or goes on, and note what it is.

    A run that was cut off goes on from its newest checkpoint, by itself. What it computes has to stay the same.

    Args:
        folder (str or PathLike): the output folder.
        settings (mapping): what has to stay the same, as JSON.
        resume (str or bool, optional): a checkpoint in this folder, or True for the newest, to train a finished run
            longer or to go back; the checkpoints after it get names that begin with `later-`. False starts a run, and
            only that. Default: none of these.
        longer (collection of str): names of settings that may change if `resume` is given, such as the number of
            epochs. Default: none.
        is_main (bool): whether this process, of several, writes. Default: True.

    Returns:
        str, optional: the checkpoint to go on from; None for a start.

    Raises:
        ValueError: if the folder holds a model, a finished run, or one with other settings; the message says which.
    """
    path = Path(folder, RUN)
    settings = json.loads(json.dumps(settings))
    patterns = ("config.json", "adapter_*", "model*", "pytorch_model*", "checkpoint-*")
    present = sorted(path.name for pattern in patterns for path in Path(folder).glob(pattern))
    if isinstance(resume, str):
        given = Path(resume).resolve()
        if given.parent != Path(folder).resolve() or not CHECKPOINT.fullmatch(given.name):
            raise ValueError(
                f"--resume_from_checkpoint must be a checkpoint in the output folder '{folder}', got '{resume}'."
            )
        resume = str(Path(folder, given.name))
    noted = json.loads(path.read_text()) if path.is_file() else None
    if present and not resume and (noted is None or resume is False):
        raise ValueError(
            f"The output folder '{folder}' already holds a model ({', '.join(present)}). Choose another --output_dir"
            f"{', or go on from one of its checkpoints with --resume_from_checkpoint' if longer else ''}."
        )
    if noted:
        before = noted["settings"]
        changed = [
            f"{name} was {before[name]!r} and is {value!r}"
            for name, value in settings.items()
            if name in before and before[name] != value and not (resume and name in longer)
        ]
        if changed and present:
            raise ValueError(
                f"The output folder '{folder}' holds a run with other settings: {'; '.join(changed)}. Go on with its "
                "settings, or choose another --output_dir."
            )
        if noted["finished"] and not resume:
            raise ValueError(
                f"The run in the output folder '{folder}' is finished. Choose another --output_dir"
                f"{', or train it longer with --resume_from_checkpoint True' if longer else ''}."
            )
    # The command that went back to an earlier checkpoint goes on from the newest, if it is started again.
    goes_back = isinstance(resume, str) and not (noted and noted.get("resume") == resume and not noted["finished"])
    checkpoint = str(resume) if goes_back else newest_checkpoint(folder)
    if resume and (checkpoint is None or not os.path.isdir(checkpoint)):
        raise ValueError(
            f"There is no checkpoint {resume if isinstance(resume, str) else f'in {folder}'} to go on from."
        )
    if is_main:
        if goes_back and checkpoint:
            for later in Path(folder).glob("checkpoint-*"):
                if CHECKPOINT.fullmatch(later.name) and _step(later) > _step(checkpoint):
                    shutil.rmtree(later.with_name(f"later-{later.name}"), ignore_errors=True)
                    os.replace(later, later.with_name(f"later-{later.name}"))
        note_run(folder, settings, finished=False, resume=resume)
    return checkpoint


def note_run(
    folder: Union[str, os.PathLike],
    settings: Mapping[str, Any],
    *,
    finished: bool,
    resume: Union[str, bool, None] = None,
) -> None:
    """Note what a run is, and whether it is finished.

    Args:
        folder (str or PathLike): the output folder; it is made.
        settings (mapping): what has to stay the same, as JSON.
        finished (bool): whether all of it was saved.
        resume (str or bool, optional): with what it was asked to go on. Default: none.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = Path(folder, f"{RUN}.unfinished")
    noted = {"finished": finished, "resume": resume, "settings": dict(settings)}
    written.write_text(json.dumps(noted, indent=2) + "\n")
    os.replace(written, Path(folder, RUN))


def _step(checkpoint: Union[str, os.PathLike]) -> int:
    return int(os.fspath(checkpoint).rpartition("-")[2])


def checkpoint_only_adapters(accelerator: Accelerator) -> None:
    """Leave the frozen base model out of what `accelerator.save_state` writes and `load_state` reads.

    Under FSDP and DeepSpeed, which save their parts of a model by themselves, nothing changes.

    Args:
        accelerator (Accelerator): to which a PEFT model will be given.
    """

    def save(models: list, weights: list, folder: str) -> None:
        if weights:
            weights.clear()
            if accelerator.is_main_process:
                save_file(get_peft_model_state_dict(accelerator.unwrap_model(models[0])), Path(folder, ADAPTER))

    def load(models: list, folder: str) -> None:
        if Path(folder, ADAPTER).exists():
            set_peft_model_state_dict(accelerator.unwrap_model(models.pop()), load_file(Path(folder, ADAPTER)))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
