"""One file from a URL into a partial file: resumed after interruptions, retried, limited in size and time.

The partial file has the bytes so far, and a small file beside it says which URL and which version they are of. Whether
the complete file is the right one is for the caller to verify.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any, Final, NamedTuple
from urllib.parse import urlsplit

from moleblend_ray.checks import above, at_least, check_all
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.retry import TRANSIENT_STATUS, backoff_seconds
from moleblend_ray.errors import StorageError, without_credentials
from moleblend_ray.settings import typed

logger = logging.getLogger(__name__)

SCHEMES: Final = ("http", "https", "file", "s3", "gs")
"""Schemes of URLs from which files can be had."""
_WEB: Final = ("http", "https")
"""Those that are fetched over HTTP; the others are the storage layer's."""
BLOCK_BYTES: Final = 1 << 20
_MAX_REDIRECTS: Final = 5
_MIN_BYTES_PER_SECOND: Final = 64
"""A server that sends less than this for ``timeout_s`` has stalled."""
_LONGEST_WAIT_S: Final = 60.0
"""Longest wait between two attempts, unless the server asks for more."""
_LONGEST_ASKED_WAIT_S: Final = 120.0
"""Longest wait that a server can ask for."""

Report = Callable[[str, int, int | None], None]
"""Called with the name of the file, its bytes so far, and its total bytes or None."""


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class TransferOptions:
    """Timeouts and retries of downloads."""

    timeout_s: float = 60.0
    """Seconds without a response, or with almost no data, after which a connection is closed and a new one made."""
    attempts: int = 8
    """Attempts in a row without new data after which a source is given up."""
    first_wait_s: float = 1.0
    """Seconds before the second attempt; doubled for each further one, up to a minute, and partly random."""

    def __post_init__(self) -> None:
        check_all(
            *above(self, 0, "timeout_s"),
            *at_least(self, 1, "attempts"),
            *at_least(self, 0, "first_wait_s"),
        )


class _RetriedError(Exception):
    """An attempt failed, but the next one may succeed."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        """How long the server asks to wait."""


@dataclass(kw_only=True, slots=True)
class Transfer:
    """The transfer of one file, from one URL or, where that fails, from others."""

    name: str
    """Of the file, for reports."""
    partial: Path
    """Where its bytes go."""
    num_bytes: int | None
    """Published size; None if there is none."""
    has_checksum: bool
    """Whether a checksum was published, with which the caller will verify the file."""
    options: TransferOptions
    report: Report
    received: int = 0
    """Bytes received so far, those that were discarded included."""

    def run(self, url: str) -> bool:
        """Complete the partial file; StorageError if that is not possible from ``url``.

        Returns whether the partial file existed and was continued.
        """
        shown = without_credentials(url)
        failures = 0
        while True:
            before = self._size()
            try:
                return self._attempt(url)
            except _RetriedError as error:
                now = self._size()
                failures = 1 if now > before else failures + 1
                if failures >= self.options.attempts:
                    raise StorageError(
                        f"Cannot download {shown}: {error}; given up after {failures} attempts that brought "
                        "nothing new. What was fetched is kept: the same command continues."
                    ) from error
                wait_s = max(
                    backoff_seconds(failures, self.options.first_wait_s, _LONGEST_WAIT_S),
                    min(error.wait_s or 0.0, _LONGEST_ASKED_WAIT_S),
                )
                logger.info("%s: %s at byte %d; trying again in %.1f s", shown, error, now, wait_s)
                time.sleep(wait_s)

    def discard(self) -> None:
        """Delete the partial file, and what is known of it."""
        self.partial.unlink(missing_ok=True)
        self._state_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the partial file: two processes that write it would mix their bytes."""
        lock = self.partial.with_name(self.partial.name + ".lock")
        with open(lock, "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The download that held it may have removed it in between, and another one have made and locked a new one.
                is_current = os.path.samestat(os.fstat(handle.fileno()), os.stat(lock))
            except OSError as error:
                raise self._in_use() from error
            if not is_current:
                raise self._in_use()
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    def _in_use(self) -> StorageError:
        return StorageError(
            f"{self.partial} is being written by another download. Wait for it, or stop it."
        )

    def _size(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def _attempt(self, url: str) -> bool:
        """Make one request; returns whether it continued an existing partial file."""
        offset, validator = self._resumable(url)
        if self.num_bytes is not None and offset == self.num_bytes:
            return True  # complete, but interrupted before it was verified
        source = _open_web if scheme_of(url) in _WEB else _open_storage
        with source(url, offset, validator, self.options.timeout_s) as answer:
            if answer.is_complete:
                return True
            if answer.offset and _differ(validator, answer.validator):
                # The server has ranges, but does not heed If-Range.
                self.discard()
                raise _RetriedError("the file changed")
            if self.num_bytes is not None and answer.total not in (None, self.num_bytes):
                raise StorageError(
                    f"Cannot download {without_credentials(url)}: it has {answer.total} bytes, expected "
                    f"{self.num_bytes}. It is another file or another version."
                )
            state = {"url": without_credentials(url), "validator": answer.validator}
            with open(self.partial, "ab" if answer.offset else "wb") as handle:
                # Only now that no bytes of another version are there: a kill in between must not leave them under this name.
                self._state_path.write_text(json.dumps(state))
                self._copy(answer, handle)
            return answer.offset > 0

    def _copy(self, answer: _Answer, handle: IO[bytes]) -> None:
        """Write the body to the partial file; ``_RetriedError`` if it ends early or is far too slow."""
        position = answer.offset
        limit = self.num_bytes if self.num_bytes is not None else answer.total
        window_s, window_bytes = time.monotonic(), 0
        while True:
            try:
                block = answer.read(BLOCK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _RetriedError(f"the connection broke ({_reason(error)})") from error
            if not block:
                break
            position += len(block)
            window_bytes += len(block)
            self.received += len(block)
            if limit is not None and position > limit:
                raise StorageError(
                    f"Cannot download {self.name}: the server sends more than the {limit} bytes it should have."
                )
            handle.write(block)
            self.report(self.name, position, limit)
            elapsed_s = time.monotonic() - window_s
            if elapsed_s >= self.options.timeout_s:
                if window_bytes < _MIN_BYTES_PER_SECOND * elapsed_s:
                    raise _RetriedError(f"only {window_bytes} bytes came in {elapsed_s:.0f} s")
                window_s, window_bytes = time.monotonic(), 0
        if answer.total is not None and position < answer.total:
            raise _RetriedError(f"the transfer ended at byte {position} of {answer.total}")

    @property
    def _state_path(self) -> Path:
        return self.partial.with_name(self.partial.name + ".json")

    def _resumable(self, url: str) -> _Beginning:
        """Where to continue; at the beginning if it is not certain that the parts fit together."""
        if not self.partial.exists():
            return _FROM_START
        offset = self._size()
        state: Any = None
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(self._state_path.read_text())
        if not isinstance(state, dict) or (self.num_bytes is not None and offset > self.num_bytes):
            return _FROM_START
        is_same_url = state.get("url") == without_credentials(url)
        validator = state.get("validator") if is_same_url else None
        if isinstance(validator, str):
            return _Beginning(offset, validator)
        # Without a validator, only a published checksum can tell whether both parts belong to the same version.
        return _Beginning(offset, None) if self.has_checksum else _FROM_START


class _Beginning(NamedTuple):
    """Where a request begins."""

    offset: int
    """Position of the first byte that is asked for."""
    validator: str | None
    """ETag or time of the version that the bytes before it are of."""


_FROM_START: Final = _Beginning(0, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """A response whose body can be read."""

    read: Callable[[int], bytes]
    offset: int
    """Position of its first byte in the file."""
    total: int | None
    """Bytes of the whole file."""
    validator: str | None
    """Tells this version from others, also by ``If-Range`` in the next attempt: an ETag, or the time of the last change."""
    is_complete: bool = False
    """Whether the partial file was complete already."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a few redirects, only to http and https, and never from https to http."""

    max_redirections = _MAX_REDIRECTS
    max_repeats = 1

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        target = scheme_of(newurl)
        if target not in _WEB or (scheme_of(req.full_url) == "https" and target == "http"):
            raise StorageError(
                f"Cannot download {without_credentials(req.full_url)}: refused to follow it to "
                f"{without_credentials(newurl)}."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


@contextlib.contextmanager
def _open_web(url: str, offset: int, validator: str | None, timeout_s: float) -> Iterator[_Answer]:
    headers = {"User-Agent": "moleblend-ray", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if validator is not None:
            headers["If-Range"] = validator
    opener = urllib.request.build_opener(_Redirects)
    request = urllib.request.Request(url, headers=headers)
    try:
        response = opener.open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            yield _after_status(url, error, offset)
            return
    except (OSError, http.client.HTTPException) as error:
        raise _RetriedError(f"no answer ({_reason(error)})") from error
    with response:
        yield _answer(url, response, offset)


def _answer(url: str, response: Any, offset: int) -> _Answer:
    headers: Message = response.headers
    encoding = headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise StorageError(
            f"Cannot download {without_credentials(url)}: the server sends it in encoding {encoding}."
        )
    start, total = 0, _integer(headers.get("Content-Length"))
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if match is None or int(match[1]) != offset:
            raise StorageError(
                f"Cannot download {without_credentials(url)}: asked for bytes from {offset}, the server "
                f"answers {headers.get('Content-Range')!r}."
            )
        start, total = offset, _integer(match[2])
    etag = headers.get("ETag")
    # A weak ETag does not guarantee identical bytes.
    strong = etag if etag and not etag.startswith("W/") else None
    return _Answer(
        read=response.read1,
        offset=start,
        total=total,
        validator=strong or headers.get("Last-Modified"),
    )


def _after_status(url: str, error: urllib.error.HTTPError, offset: int) -> _Answer:
    """The answer for an error status: raises, except if the partial file is complete or too long."""
    if error.code == 416 and offset:
        match = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if match is not None and int(match[1]) == offset:
            return _Answer(
                read=lambda _: b"", offset=offset, total=offset, validator=None, is_complete=True
            )
        return _Answer(read=_too_short, offset=0, total=None, validator=None)
    reason = f"HTTP {error.code} {error.reason}"
    if error.code in TRANSIENT_STATUS:
        wait = _integer(error.headers.get("Retry-After"))
        raise _RetriedError(reason, None if wait is None else float(wait)) from error
    raise StorageError(f"Cannot download {without_credentials(url)}: {reason}.") from error


def _too_short(_: int) -> bytes:
    # The partial file has been truncated, so the next attempt starts over.
    raise OSError("the file is shorter than what was fetched of it before")


@contextlib.contextmanager
def _open_storage(
    url: str,
    offset: int,
    validator: str | None,
    timeout_s: float,  # noqa: ARG001 - the storage layer has its own
) -> Iterator[_Answer]:
    """A file in a directory or an object store."""
    size, version = storage.size_and_version(url)
    start = offset if validator in (None, version) and offset <= size else 0
    with storage.translate_errors("read", url), storage.open_read(url) as stream:
        stream.seek(start)
        yield _Answer(read=stream.read, offset=start, total=size, validator=version)


def scheme_of(url: str) -> str:
    """The scheme of a URL, in lower case; empty for a path."""
    return urlsplit(url).scheme.lower()


def _differ(validator: str | None, other: str | None) -> bool:
    """Whether both are known to be of different versions: an ETag, which is quoted, says nothing about a time."""
    if not validator or not other or (validator[0] == '"') != (other[0] == '"'):
        return False
    return validator != other


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return " ".join(str(cause).split()) or type(cause).__name__


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
