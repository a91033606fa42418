"""Calls over a network, again after an outage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Optional, TypeVar

import fsspec
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds
Result = TypeVar("Result")


def patiently(call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call something that uses the Hub, again after 1, 2, 4, 8 and 16 seconds while the network or the server fails.

    The Hub's clients try many of their requests again by themselves, but not those that a run begins and ends with.

    Args:
        call (callable): what is called.
        args, kwargs: its arguments.

    Returns:
        what the call returns.

    Raises:
        Exception: what the call raises, at once if it is no outage, such as a repository that does not exist.
    """
    for pause in PAUSES:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if not _is_outage(error):
                raise
            time.sleep(pause)
    return call(*args, **kwargs)


def _is_outage(error: Optional[BaseException]) -> bool:
    # Libraries that use the Hub's client raise errors of their own, which say something else.
    while error is not None:
        if isinstance(error, httpx.TransportError) or (
            isinstance(error, HfHubHTTPError) and error.response.status_code >= 500
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def read_url(url: str) -> bytes:
    """Read what is behind a URL, again after 1, 2, 4, 8 and 16 seconds if that fails.

    Args:
        url (str): in any form that fsspec knows.

    Returns:
        bytes: the content.

    Raises:
        FileNotFoundError: if there is nothing.
        ConnectionError: if it cannot be read.
    """
    for pause in (*PAUSES, 0.0):
        try:
            with fsspec.open(url, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise
        except Exception as error:  # noqa: BLE001 - each client has errors of its own
            failure = error
            time.sleep(pause)
    raise ConnectionError(f"{url} could not be read after {len(PAUSES) + 1} tries: {failure!r}") from failure
