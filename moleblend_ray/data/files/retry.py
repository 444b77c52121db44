"""Which storage errors are transient, and retrying them within a time budget."""

from __future__ import annotations

import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from moleblend_ray.errors import ConfigError, without_credentials

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

RETRY_VARIABLE: Final = "MOLEBLEND_STORAGE_RETRY_S"
"""Environment variable: seconds for which one failing operation is retried; 0 means never."""
TIMEOUT_VARIABLE: Final = "MOLEBLEND_STORAGE_TIMEOUT_S"
"""Environment variable: seconds without data after which a connection counts as broken."""

_DEFAULT_RETRY_S: Final = 180.0
_DEFAULT_TIMEOUT_S: Final = 60.0
_FIRST_WAIT_S: Final = 0.2
_LONGEST_WAIT_S: Final = 15.0

_TRANSIENT_CODES: Final = frozenset(
    {
        "SlowDown",
        "InternalError",
        "ServiceUnavailable",
        "RequestTimeout",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "OperationAborted",
        # Another conditional request for the same key was not finished.
        "ConditionalRequestConflict",
        # The response to a completed multipart upload was lost: the whole upload is repeated.
        "NoSuchUpload",
    }
)
TRANSIENT_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes after which the same request may succeed later."""


class ShortReadError(OSError):
    """Storage returned fewer bytes than the file has."""


def retry_seconds() -> float:
    """The time budget of one operation; ConfigError if the variable is not a number >= 0."""
    return _seconds(RETRY_VARIABLE, _DEFAULT_RETRY_S)


def timeout_seconds() -> float:
    """The read timeout of a connection; ConfigError if the variable is not a number >= 0."""
    return _seconds(TIMEOUT_VARIABLE, _DEFAULT_TIMEOUT_S)


def backoff_seconds(num_failures: int, first_s: float, longest_s: float) -> float:
    """How long to wait after so many failures in a row: doubled each time, with a random reduction of up to half."""
    # The limit is far beyond any longest wait, and not an overflow.
    wait_s = first_s * 2.0 ** min(num_failures - 1, 64)
    return min(wait_s, longest_s) * random.uniform(0.5, 1.0)


def retried(action: str, uri: str, call: Callable[[], _T]) -> _T:
    """The result of ``call``, which is repeated after transient errors with exponential back-off.

    ``call`` must be idempotent. The last error is raised unchanged when the next wait would exceed the time budget.
    """
    deadline = time.monotonic() + retry_seconds()
    num_failures = 0
    while True:
        try:
            return call()
        except Exception as error:
            num_failures += 1
            pause_s = backoff_seconds(num_failures, _FIRST_WAIT_S, _LONGEST_WAIT_S)
            if not is_transient(error) or time.monotonic() + pause_s > deadline:
                raise
            logger.warning(
                "Cannot %s %s (%s); trying again in %.1f s",
                action,
                without_credentials(uri),
                type(error).__name__,
                pause_s,
            )
        time.sleep(pause_s)


def s3_error(error: BaseException) -> tuple[str, int]:
    """Code and HTTP status of the S3 response that caused an error; ``("", 0)`` if there was none."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return code, int(status or 0)
    return "", 0


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later; not so for denied access, wrong names and local failures."""
    code, status = s3_error(error)
    if code or status:
        return code in _TRANSIENT_CODES or status in TRANSIENT_STATUS
    if status := http_status(error):
        return status in TRANSIENT_STATUS
    return isinstance(error, _transient_types())


def is_conflict(error: BaseException) -> bool:
    """Whether a file was not created because there is one."""
    return isinstance(error, FileExistsError) or 412 in (s3_error(error)[1], http_status(error))


def is_beyond_end(error: BaseException) -> bool:
    """Whether a range was refused because the file ends before it."""
    return 416 in (s3_error(error)[1], http_status(error))


def http_status(error: BaseException) -> int:
    """Status of the HTTP response that an error of aiohttp or gcsfs is about; 0 if there was none."""
    for name in ("status", "code"):
        value = str(getattr(error, name, ""))
        if value.isdecimal():
            return int(value)
    return 0


def _transient_types() -> tuple[type[BaseException], ...]:
    types: tuple[type[BaseException], ...] = (ConnectionError, TimeoutError, ShortReadError)
    if "aiohttp" in sys.modules:
        types = (*types, sys.modules["aiohttp"].ClientError)
    if "botocore.exceptions" in sys.modules:
        botocore = sys.modules["botocore.exceptions"]
        types = (*types, botocore.HTTPClientError, botocore.IncompleteReadError)
    if "gcsfs.retry" in sys.modules:
        # What gcsfs gives up after six tries, and what its library for tokens raises.
        requests, tokens = sys.modules["requests.exceptions"], sys.modules["google.auth.exceptions"]
        broken = (requests.ConnectionError, requests.Timeout, requests.ChunkedEncodingError)
        types = (*types, *broken, tokens.TransportError, sys.modules["gcsfs.retry"].ChecksumError)
    return types


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{variable} is {text!r}; expected a number of seconds, 0 or more.")
    return value
