"""One rule for pickled weights: they are neither read nor written, unless a user asks for it.

Unpickling can run a program. PEFT reads pickles where it finds nothing else, and writes them on request.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..registration import SOFTMOA
from .card import remove_form

# The environment variable with which a user lets PEFT read and write pickled weights.
ALLOW_PICKLE = "SOFTMOA_ALLOW_PICKLE"


class Saving(NamedTuple):
    """When PEFT began to save an adapter, and a field of its config that it changes meanwhile."""

    began: float
    inference_mode: bool


def are_allowed() -> bool:
    """Whether the user lets PEFT read and write pickled weights."""
    return bool(os.environ.get(ALLOW_PICKLE))


def refuse_pickle(model_id: str) -> ValueError:
    """The error for an adapter that has no weights but pickled ones.

    Args:
        model_id (str): the adapter's folder, or its id on the Hub.

    Returns:
        ValueError: it says what to do.
    """
    return ValueError(
        f"'{model_id}' has its weights in '{WEIGHTS_NAME}' only. That is a pickle, which is not read: it could hold a "
        f"program. Ask its author for '{SAFETENSORS_WEIGHTS_NAME}', or, if you trust its author, set the environment "
        f"variable {ALLOW_PICKLE}=1."
    )


def begin_saving(config: Any) -> None:
    """Note that PEFT begins to save an adapter: it then writes the weights and, last, the config.

    Args:
        config (SoftMoAConfig): the adapter's config.
    """
    config.saving = Saving(time.time(), config.inference_mode)


def refuse_written(config: Any, folder: str | os.PathLike[str]) -> None:
    """Refuse pickled weights that PEFT has written just now, and remove them.

    Nothing of this package runs between the user's `safe_serialization=False` and the file.

    Args:
        config (SoftMoAConfig): the adapter's config, which PEFT is about to write.
        folder (str or PathLike): where.

    Raises:
        ValueError: if there are such weights; it says what to do instead.
    """
    saving, config.saving = getattr(config, "saving", None), None
    pickle, whole = Path(folder, WEIGHTS_NAME), Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if saving is None or are_allowed() or not pickle.exists():
        return
    written = pickle.stat().st_mtime
    # A file's time may be a little behind.
    if written < saving.began - 1 or (whole.exists() and whole.stat().st_mtime > written):
        return
    pickle.unlink()
    remove_form(folder)
    config.inference_mode = saving.inference_mode
    raise ValueError(
        f"`safe_serialization` must be True, got False: '{WEIGHTS_NAME}' is a pickle, which this library does not "
        f"read, as it could hold a program. Leave it out to write '{SAFETENSORS_WEIGHTS_NAME}' or, if you need a "
        f"pickle, set the environment variable {ALLOW_PICKLE}=1."
    )


def check_loading(check: Any) -> None:
    """Let `PeftModel.load_adapter` check a file before it reads it, and leave no adapter behind that it fails to load.

    Where a config is given, or the adapter is there already, PEFT asks nothing of this package before it reads.

    Args:
        check (callable): takes the adapter's folder or id, the subfolder, and arguments of `hf_hub_download`.
    """
    load_adapter = PeftModel.load_adapter
    if hasattr(load_adapter, "checks_softmoa"):
        return

    @functools.wraps(load_adapter)
    def load_checked(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config: Any = self.peft_config.get(adapter_name)
        failed = True
        try:
            if config is not None and config.peft_type == SOFTMOA:
                hub, _, _ = config._split_kwargs(kwargs)
                check(os.fspath(model_id), hub.pop("subfolder", None), **hub)
            result = load_adapter(self, model_id, adapter_name, *args, **kwargs)
            failed = False
        finally:
            tuner: Any = self.base_model
            if hasattr(tuner, "end_loading"):
                tuner.end_loading(adapter_name, failed)
        return result

    load_checked.checks_softmoa = True  # type: ignore[attr-defined]
    PeftModel.load_adapter = load_checked  # type: ignore[method-assign]
