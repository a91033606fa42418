"""What goes to the Hub: every push of an adapter has its card, which says how to load it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from transformers.utils.hub import PushToHubMixin

from ..config_file import read_json
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

    It saves the adapter with its card, and then saves a card of its own in its place. Nothing of this package runs
    between that and the upload.
    """
    upload: Callable[..., Any] = PushToHubMixin._upload_modified_files
    if hasattr(upload, "completes_softmoa_cards"):
        return

    @functools.wraps(upload)
    def complete_and_upload(self: Any, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if _has_adapter(working_dir) and isinstance(self, PeftModel):
            self.create_or_update_model_card(os.fspath(working_dir))  # names the base model
        complete_card(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    complete_and_upload.completes_softmoa_cards = True  # type: ignore[attr-defined]
    PushToHubMixin._upload_modified_files = complete_and_upload  # type: ignore[method-assign]


def _has_adapter(folder: str | os.PathLike[str]) -> bool:
    try:
        given = read_json(os.path.join(folder, CONFIG_NAME))
    except (OSError, ValueError):
        return False
    # Other libraries have a file of this name, too.
    return isinstance(given, dict) and given.get("peft_type") == SOFTMOA
