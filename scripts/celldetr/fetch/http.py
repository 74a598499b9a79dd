"""HTTP requests of all downloads: one time limit, one retry policy, one error."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import requests
import urllib3

log = logging.getLogger(__name__)

TIMEOUT = (15, 60)  # seconds to connect, and between two pieces of data
TRIES = 5
PAUSE = 2.0  # seconds before the second try; doubled for each further one
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}

T = TypeVar("T")


class TransferError(Exception):
    """A source did not deliver; `again`: another try may help."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


@contextlib.contextmanager
def get(
    url: str, headers: Mapping[str, str] | None = None, session: requests.Session | None = None
) -> Iterator[requests.Response]:
    """Send a GET request and yield the response, whose body has not been read.

    Status 416 (range not satisfiable) is yielded too: only the caller knows whether the file is complete.

    Raises
    ------
    TransferError
        The address is not valid, the connection failed, here or while the caller reads the body, or the server answered
        with an error.
    """
    sent = {"Accept-Encoding": "identity", **(headers or {})}
    try:
        response = (session or requests).get(url, headers=sent, stream=True, timeout=TIMEOUT)
    except ValueError as error:  # of the URL, or of one that the server redirects to
        raise TransferError(f"the address is not valid ({error})", again=False) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _failed(error) from error
    with response:
        status = response.status_code
        if status >= 400 and status != 416:
            raise TransferError(f"HTTP {status} {response.reason}", again=status in _TRANSIENT)
        try:
            yield response
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _failed(error) from error


def _failed(error: Exception) -> TransferError:
    return TransferError(f"the connection failed ({type(error).__name__}: {error})", again=True)


def retry(action: Callable[[], T], url: str) -> T:
    """Return what `action` returns; repeat it after a `TransferError` that may pass, at most `TRIES` times in all."""
    for attempt in range(1, TRIES):
        try:
            return action()
        except TransferError as failure:
            if not failure.again:
                raise
            wait = PAUSE * 2 ** (attempt - 1)
            log.warning("%s: %s; try %d of %d in %.0f s", url, failure, attempt + 1, TRIES, wait)
            time.sleep(wait)
    return action()
