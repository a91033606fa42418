"""What goes to the Hub: every push of an adapter has its card, which says how to load it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from transformers.utils.hub import PushToHubMixin

from ..registration import SOFTMOA
from .card import write_model_card

CARD = "README.md"


def complete_card(folder: str | os.PathLike[str]) -> None:
    """Give the card in a folder the section on its Soft-MoA adapter.

    Args:
        folder (str or PathLike): the folder; nothing is written if it holds no Soft-MoA adapter.
    """
    if not _has_adapter(folder):
        return
    config: Any = PeftConfig.from_pretrained(os.fspath(folder))
    write_model_card({**config.to_dict(), **config.resolved_fields()}, folder)


def complete_pushed_cards() -> None:
    """Let `push_to_hub` of models complete the card.

    It saves the adapter with its card, and then saves a card of its own in its place. Nothing else lies between that
    and the upload, so this is the one method of another library that is replaced.
    """
    upload: Callable[..., Any] = PushToHubMixin._upload_modified_files
    if hasattr(upload, "__wrapped__"):
        return

    @functools.wraps(upload)
    def complete_and_upload(self: Any, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if _has_adapter(working_dir) and isinstance(self, PeftModel):
            self.create_or_update_model_card(os.fspath(working_dir))  # names the base model
        complete_card(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    PushToHubMixin._upload_modified_files = complete_and_upload  # type: ignore[method-assign]


def _has_adapter(folder: str | os.PathLike[str]) -> bool:
    return Path(folder, CONFIG_NAME).is_file() and PeftConfig._get_peft_type(os.fspath(folder)) == SOFTMOA
