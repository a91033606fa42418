"""Calls over a network that are repeated after an outage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Optional, TypeVar

import fsspec
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds
Result = TypeVar("Result")


def retry(call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call a function that uses the Hub; retry after 1, 2, 4, 8 and 16 seconds while the network or the server fails.

    The Hub's clients retry many of their requests, but not the first and the last requests of a run.

    Args:
        call (callable): the function.
        *args (Any): its arguments.
        **kwargs (Any): its arguments by name.

    Returns:
        what the function returns.

    Raises:
        Exception: what the function raises; at once if it is no outage, such as a repository that does not exist.
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
    # Libraries that use the Hub's client raise other errors, with the client's error as their cause.
    while error is not None:
        if isinstance(error, httpx.TransportError) or (
            isinstance(error, HfHubHTTPError) and error.response.status_code >= 500
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def read_url(url: str) -> bytes:
    """Read a URL; retry after 1, 2, 4, 8 and 16 seconds if that fails.

    Args:
        url (str): the URL, in any form that fsspec knows.

    Returns:
        bytes: the content.

    Raises:
        FileNotFoundError: if the URL does not exist.
        ConnectionError: if it cannot be read.
    """
    for pause in (*PAUSES, 0.0):
        try:
            with fsspec.open(url, "rb") as file:
                content: bytes = file.read()
                return content
        except FileNotFoundError:
            raise
        except Exception as error:  # noqa: BLE001 - each client has its own errors
            failure = error
            time.sleep(pause)
    raise ConnectionError(f"{url} could not be read after {len(PAUSES) + 1} tries: {failure!r}") from failure
