"""Calls over a network that are repeated after an outage."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Optional, TypeVar

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem
from huggingface_hub.utils import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_before_delay
from tenacity.wait import wait_exponential

TRIES = 6
DEADLINE = 300.0  # seconds
# A request that failed with one of these may succeed the next time. All other statuses below 500 are final.
TEMPORARY = (408, 425, 429)
NO_RESPONSE = (
    httpx.TransportError,
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    # `ConnectionError` itself is also what the Hub's client raises when it is told to stay offline.
    ConnectionAbortedError,
    ConnectionRefusedError,
    ConnectionResetError,
    BrokenPipeError,
    TimeoutError,
    asyncio.TimeoutError,
)
Result = TypeVar("Result")


class _Response(NamedTuple):
    status: int
    headers: Mapping[str, str]


def retry(call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call a function that uses the Hub; retry while the network or the server fails.

    The Hub's clients retry many of their requests, but not the first and the last requests of a run. There are six
    tries, with pauses of 1, 2, 4, 8 and 16 seconds, or longer ones if the server asks for them with `Retry-After`, but
    no more than five minutes of pauses.

    Args:
        call (callable): the function.
        *args (Any): its arguments.
        **kwargs (Any): its arguments by name.

    Returns:
        what the function returns.

    Raises:
        Exception: what the function raises; at once if it is no outage, such as a repository that does not exist.
    """
    # The call itself may take hours, such as a download.
    return _retrying(lambda state: state.idle_for + state.upcoming_sleep > DEADLINE)(call, *args, **kwargs)


def read_url(url: str) -> bytes:
    """Read a URL; retry with the pauses of `retry`, for no more than five minutes in all.

    Args:
        url (str): the URL, in any form that fsspec knows.

    Returns:
        bytes: the content.

    Raises:
        FileNotFoundError: at once, if the URL does not exist.
        PermissionError: at once, if access is denied.
        ConnectionError: if it cannot be read for another reason.
        ImportError: if fsspec needs another package for such URLs.
    """
    start = time.monotonic()

    def read() -> bytes:
        system, path = fsspec.core.url_to_fs(url)
        if isinstance(system, AsyncFileSystem):
            content: bytes = system.cat_file(path, timeout=start + DEADLINE - time.monotonic())
        else:
            with system.open(path, "rb") as file:
                content = file.read()
        return content

    retrying = _retrying(stop_before_delay(DEADLINE))
    try:
        return retrying(read)
    except ImportError:
        raise
    except Exception as error:
        # fsspec raises FileNotFoundError for any request that fails, and has the reason as its cause.
        response = _last_response(error)
        status = response and response.status
        is_final = response is None and not _is_outage(error)
        if status in (404, 410) or (is_final and isinstance(error, FileNotFoundError)):
            raise FileNotFoundError(f"{url} does not exist. Correct its row, or leave it out.") from error
        if status in (401, 403) or (is_final and isinstance(error, PermissionError)):
            raise PermissionError(f"Access to {url} is denied. Log in there, or leave its row out.") from error
        tries, seconds = retrying.statistics["attempt_number"], time.monotonic() - start
        raise ConnectionError(
            f"{url} could not be read. Tries: {tries} in {seconds:.0f} s. The last one: {error!r}"
        ) from error


def _retrying(stop: Callable[[RetryCallState], bool]) -> Retrying:
    def is_last(state: RetryCallState) -> bool:
        return stop_after_attempt(TRIES)(state) or stop(state)

    return Retrying(retry=retry_if_exception(_is_outage), wait=_pause, stop=is_last, reraise=True)


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try: doubled each time, or as many as the server asks for, if that is longer."""
    error = state.outcome.exception() if state.outcome else None
    response = _last_response(error)
    asked = _seconds(response.headers.get("Retry-After", "")) if response else 0.0
    return max(wait_exponential()(state), asked)


def _seconds(retry_after: str) -> float:
    """`Retry-After` has a number of seconds or a date."""
    try:
        if retry_after.strip().isdigit():
            return float(retry_after)
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return 0.0


def _is_outage(error: BaseException) -> bool:
    for each in _causes(error):
        response = _response(each)
        if response is not None:
            return response.status >= 500 or response.status in TEMPORARY
        if isinstance(each, NO_RESPONSE):
            return True
    return False


def _response(error: BaseException) -> Optional[_Response]:
    """The response that an error of a client is about."""
    given = error if isinstance(error, aiohttp.ClientResponseError) else getattr(error, "response", None)
    status = getattr(given, "status", getattr(given, "status_code", None))
    return _Response(status, getattr(given, "headers", None) or {}) if isinstance(status, int) else None


def _last_response(error: Optional[BaseException]) -> Optional[_Response]:
    return next((response for each in _causes(error) if (response := _response(each))), None)


def _causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An error and those that it comes from; libraries that use a client raise errors of their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
