"""Published files -> a directory or object store: downloads are resumed after interruptions, and verified.

A file gets its name only when its size and checksum are the published ones. Until then it is a partial file beside it
(for an object store, in a local directory), which the next attempt continues by an HTTP range request. If nothing was
published, the SHA-256 of the first download is recorded, and later downloads must agree with it (trust on first use).
Nothing is executed or unpacked: archives are read as they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import IO, Any, Final, NamedTuple
from urllib.parse import urlsplit

from moleblend_ray.checks import above, at_least, check_all
from moleblend_ray.data import storage
from moleblend_ray.data.retry import TRANSIENT_STATUS, backoff_seconds
from moleblend_ray.errors import (
    ConfigError,
    DataError,
    MoleBlendError,
    StorageError,
    without_credentials,
)

logger = logging.getLogger(__name__)

RECORD_NAME: Final = "download.json"
"""File in the output with the origin, size and checksum of each file, the licence and the citation."""

_SCHEMES: Final = ("http", "https", "file", "s3", "gs")
_WEB: Final = ("http", "https")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BLOCK_BYTES: Final = 1 << 20
_MAX_REDIRECTS: Final = 5
_MIN_BYTES_PER_SECOND: Final = 64
"""A server that sends less than this for ``timeout_s`` has stalled."""
_LONGEST_WAIT_S: Final = 60.0
"""Longest wait between two attempts, unless the server asks for more."""
_LONGEST_ASKED_WAIT_S: Final = 120.0
"""Longest wait that a server can ask for."""

Report = Callable[[str, int, int | None], None]
"""Called with the name of the file, its bytes so far, and its total bytes or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A published file."""

    name: str
    """Its name in the output, by which `prepare` recognises the collection."""
    urls: tuple[str, ...]
    """Where it is published (http, https, file, s3 or gs); tried in this order."""
    bytes: int | None = None
    """Published size; null if there is none."""
    md5: str | None = None
    """Published MD5 in hexadecimal; null if there is none."""
    sha256: str | None = None
    """Published SHA-256 in hexadecimal; null if there is none."""

    def __post_init__(self) -> None:
        bad = [url for url in self.urls if _scheme(url) not in _SCHEMES]
        check_all(
            (
                _NAME.fullmatch(self.name) is not None and self.name != RECORD_NAME,
                f"name: expected a plain file name, found {self.name!r}",
            ),
            (bool(self.urls), "urls: expected at least one"),
            (not bad, f"urls: expected {', '.join(_SCHEMES)} URLs, found {bad}"),
            *above(self, 0, "bytes"),
            (_is_hex(self.md5, 32), f"md5: expected 32 hexadecimal digits, found {self.md5!r}"),
            (
                _is_hex(self.sha256, 64),
                f"sha256: expected 64 hexadecimal digits, found {self.sha256!r}",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """A published data set: its files and how to cite it."""

    name: str
    """Short name."""
    title: str
    """What it is, in one line."""
    homepage: str
    """Where it is described."""
    licence: str
    """As stated by its publisher."""
    citation: str
    """The publication to cite."""
    files: tuple[RemoteFile, ...]
    """The files to download."""

    def __post_init__(self) -> None:
        names = [file.name for file in self.files]
        check_all(
            (bool(names), "files: expected at least one"),
            (len(set(names)) == len(names), f"files: expected distinct names, found {names}"),
        )


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


class FetchedFile(NamedTuple):
    """A verified file of the collection in the output."""

    name: str
    url: str
    """Where it was downloaded from, without credentials; empty if it was there without a record."""
    bytes: int
    sha256: str
    verified_by: str
    """``published sha256``, ``published md5``, ``recorded sha256`` (of an earlier download) or ``first download``
    (nothing to compare with)."""
    transferred: int
    """Bytes downloaded by this call, 0 if the file was there."""


@dataclass(kw_only=True, slots=True)
class _Job:
    """One call of :func:`download_collection`."""

    collection: Collection
    out: str
    mirrors: tuple[str, ...]
    options: TransferOptions
    spool: str | None
    report: Report
    record: dict[str, Any] = field(default_factory=dict)
    transferred: int = 0
    """Bytes downloaded so far."""


def download_collection(
    collection: Collection,
    out: str,
    *,
    mirrors: tuple[str, ...] = (),
    options: TransferOptions | None = None,
    spool: str | None = None,
    report: Report | None = None,
) -> list[FetchedFile]:
    """Download the files of ``collection`` to the directory or prefix ``out``; files that are there are verified.

    Each of ``mirrors`` is the URL of a directory that contains the files under their names; mirrors are tried before
    the published URLs. ``spool`` is the local directory for partial files if ``out`` is not local. DataError if a file
    is not what was published; StorageError if no source can be reached.
    """
    for mirror in mirrors:
        if _scheme(mirror) not in _SCHEMES:
            raise ConfigError(
                f"mirrors: expected {', '.join(_SCHEMES)} URLs of directories, found {mirror!r}"
            )
    job = _Job(
        collection=collection,
        out=out,
        mirrors=mirrors,
        options=options or TransferOptions(),
        spool=spool,
        report=report or (lambda *_: None),
        record=_read_record(out),
    )
    fetched = []
    for file in collection.files:
        fetched.append(_fetch(file, job))
        _write_record(job, fetched)
    return fetched


# -- one file -------------------------------------------------------------------------------------------


def _fetch(file: RemoteFile, job: _Job) -> FetchedFile:
    target = storage.join(job.out, file.name)
    if storage.exists(target):
        return _check_present(file, target, job)
    partial = _partial_path(file, job)
    before = job.transferred
    problems: list[MoleBlendError] = []
    with storage.translate_errors("write", str(partial)):
        partial.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            for url in _sources(file, job):
                try:
                    digests = _from_source(url, partial, file, job)
                except (StorageError, DataError) as error:
                    logger.warning("%s", error)
                    problems.append(error)
                    continue
                _publish(partial, target)
                return FetchedFile(
                    name=file.name,
                    url=without_credentials(url),
                    bytes=digests.bytes,
                    sha256=digests.sha256,
                    verified_by=_basis(file, _recorded(file, job)),
                    transferred=job.transferred - before,
                )
    kind = (
        DataError if any(isinstance(problem, DataError) for problem in problems) else StorageError
    )
    reasons = "\n  ".join(map(str, problems))
    raise kind(f"{file.name} of {job.collection.name} was not had from any source:\n  {reasons}")


def _from_source(url: str, partial: Path, file: RemoteFile, job: _Job) -> _Digests:
    """Complete the partial file from ``url``; DataError if it is not the published file."""
    for is_last in (False, True):
        is_continued = _transfer(url, partial, file, job)
        digests = _digests(_file_blocks(partial))
        mismatch = _mismatch(file, digests, _recorded(file, job))
        if mismatch is None:
            return digests
        # The two parts may be of different versions of the file: start over.
        _discard(partial)
        if is_last or not is_continued:
            break
        logger.info("%s: what was continued does not fit; it is fetched anew", file.name)
    raise DataError(f"{without_credentials(url)} is not what was published: {mismatch}.")


def _check_present(file: RemoteFile, target: str, job: _Job) -> FetchedFile:
    """Verify a file that is there already; it is never replaced."""
    with storage.translate_errors("read", target), storage.open_read(target) as stream:
        digests = _digests(iter(lambda: stream.read(_BLOCK_BYTES), b""))
    recorded = _recorded(file, job)
    mismatch = _mismatch(file, digests, recorded)
    if mismatch is not None:
        raise DataError(
            f"{target} is there, but {mismatch}. Delete it to download it again, or give another `out`."
        )
    url = str(job.record.get(file.name, {}).get("url", ""))
    return FetchedFile(file.name, url, digests.bytes, digests.sha256, _basis(file, recorded), 0)


def _sources(file: RemoteFile, job: _Job) -> list[str]:
    return [*(storage.join(mirror, file.name) for mirror in job.mirrors), *file.urls]


def _partial_path(file: RemoteFile, job: _Job) -> Path:
    if storage.is_local(job.out):
        return Path(storage.absolute(job.out)) / f".{file.name}.part"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    spool = Path(job.spool) if job.spool else Path(cache) / "moleblend-ray" / "download"
    key = hashlib.sha256(without_credentials(job.out).encode()).hexdigest()[:16]
    return spool / key / f"{file.name}.part"


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Lock the partial file: two processes that write it would mix their bytes."""
    lock = partial.with_name(partial.name + ".lock")
    with open(lock, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(
                f"{partial} is being written by another download. Wait for it, or stop it."
            ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _publish(partial: Path, target: str) -> None:
    """Give the verified file its name in the output, atomically."""
    if storage.is_local(target):
        with open(partial, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, storage.absolute(target))
    else:
        storage.upload(partial, target)
    _discard(partial)


def _discard(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _state_path(partial).unlink(missing_ok=True)


# -- checksums --------------------------------------------------------------------------------------------


class _Digests(NamedTuple):
    bytes: int
    md5: str
    sha256: str


def _digests(blocks: Iterator[bytes]) -> _Digests:
    # Some publishers state MD5 only, which protects against damage but not against forgery.
    size, md5, sha256 = 0, hashlib.md5(usedforsecurity=False), hashlib.sha256()
    for block in blocks:
        size += len(block)
        md5.update(block)
        sha256.update(block)
    return _Digests(size, md5.hexdigest(), sha256.hexdigest())


def _file_blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK_BYTES):
            yield block


def _mismatch(file: RemoteFile, found: _Digests, recorded: str | None) -> str | None:
    """The first difference from what was published or recorded; None if there is none."""
    expected = [
        ("size", file.bytes, found.bytes),
        ("MD5", file.md5 and file.md5.lower(), found.md5),
        ("SHA-256", file.sha256 and file.sha256.lower(), found.sha256),
    ]
    if file.md5 is None and file.sha256 is None:
        expected.append(("SHA-256 of the first download", recorded, found.sha256))
    for what, published, actual in expected:
        if published is not None and published != actual:
            return f"its {what} is {actual}, expected {published}"
    return None


def _basis(file: RemoteFile, recorded: str | None) -> str:
    if file.sha256 is not None:
        return "published sha256"
    if file.md5 is not None:
        return "published md5"
    return "recorded sha256" if recorded is not None else "first download"


# -- the record ---------------------------------------------------------------------------------------------


def _read_record(out: str) -> dict[str, Any]:
    """File name -> the record of an earlier download."""
    uri = storage.join(out, RECORD_NAME)
    if not storage.exists(uri):
        return {}
    value = storage.read_json(uri)
    files = value.get("files") if isinstance(value, Mapping) else None
    if not isinstance(files, list) or not all(
        isinstance(file, Mapping) and isinstance(file.get("name"), str) for file in files
    ):
        raise DataError(
            f"{uri} is no record of a download. Delete it, or give another `out`; a file without a "
            "published checksum then counts as fetched for the first time."
        )
    return {file["name"]: dict(file) for file in files}


def _recorded(file: RemoteFile, job: _Job) -> str | None:
    value = job.record.get(file.name, {}).get("sha256")
    return value if isinstance(value, str) else None


def _write_record(job: _Job, fetched: list[FetchedFile]) -> None:
    """Record the files so far, so that an interruption loses no checksum; equal files give an equal record."""
    done = {
        file.name: {
            "name": file.name,
            "url": file.url,
            "bytes": file.bytes,
            "sha256": file.sha256,
            "verified_by": file.verified_by,
        }
        for file in fetched
    }
    for name, entry in done.items():
        first = job.record.get(name)
        # Comparing a file with its recorded checksum does not verify it better than before.
        if first is not None and entry["verified_by"] == "recorded sha256":
            entry["verified_by"] = first.get("verified_by", entry["verified_by"])
    collection = job.collection
    value = {
        "collection": collection.name,
        "title": collection.title,
        "homepage": collection.homepage,
        "licence": collection.licence,
        "citation": collection.citation,
        "files": [*({**job.record, **done}).values()],
    }
    uri = storage.join(job.out, RECORD_NAME)
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    if not storage.exists(uri) or storage.read_bytes(uri) != text:
        storage.write_bytes(uri, text)


# -- transfer -----------------------------------------------------------------------------------------------


class _RetriedError(Exception):
    """An attempt failed, but the next one may succeed."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        """How long the server asks to wait."""


def _transfer(url: str, partial: Path, file: RemoteFile, job: _Job) -> bool:
    """Complete the partial file; StorageError if that is not possible from ``url``.

    Returns whether the partial file existed and was continued.
    """
    options = job.options
    shown = without_credentials(url)
    failures = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            return _attempt(url, partial, file, job)
        except _RetriedError as error:
            now = partial.stat().st_size if partial.exists() else 0
            failures = 1 if now > before else failures + 1
            if failures >= options.attempts:
                raise StorageError(
                    f"Cannot download {shown}: {error}; given up after {failures} attempts that brought "
                    "nothing new. What was fetched is kept: the same command continues."
                ) from error
            wait_s = max(
                backoff_seconds(failures, options.first_wait_s, _LONGEST_WAIT_S),
                min(error.wait_s or 0.0, _LONGEST_ASKED_WAIT_S),
            )
            logger.info("%s: %s at byte %d; trying again in %.1f s", shown, error, now, wait_s)
            time.sleep(wait_s)


def _attempt(url: str, partial: Path, file: RemoteFile, job: _Job) -> bool:
    """Make one request; returns whether it continued an existing partial file."""
    offset, validator = _resumable(url, partial, file)
    if file.bytes is not None and offset == file.bytes:
        return True  # complete, but interrupted before it was verified
    source = _open_web if _scheme(url) in _WEB else _open_storage
    with source(url, offset, validator, job.options.timeout_s) as answer:
        if answer.is_complete:
            return True
        if file.bytes is not None and answer.total not in (None, file.bytes):
            raise StorageError(
                f"Cannot download {without_credentials(url)}: it has {answer.total} bytes, expected "
                f"{file.bytes}. It is another file or another version."
            )
        state = {"url": without_credentials(url), "validator": answer.validator}
        _state_path(partial).write_text(json.dumps(state))
        with open(partial, "ab" if answer.offset else "wb") as handle:
            _copy(answer, handle, file, job)
        return answer.offset > 0


def _copy(answer: _Answer, handle: IO[bytes], file: RemoteFile, job: _Job) -> None:
    """Write the body to the partial file; ``_RetriedError`` if it ends early or is far too slow."""
    position = answer.offset
    limit = file.bytes if file.bytes is not None else answer.total
    window_s, window_bytes = time.monotonic(), 0
    while True:
        try:
            block = answer.read(_BLOCK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _RetriedError(f"the connection broke ({_reason(error)})") from error
        if not block:
            break
        position += len(block)
        window_bytes += len(block)
        job.transferred += len(block)
        if limit is not None and position > limit:
            raise StorageError(
                f"Cannot download {file.name}: the server sends more than the {limit} bytes it should have."
            )
        handle.write(block)
        job.report(file.name, position, limit)
        elapsed_s = time.monotonic() - window_s
        if elapsed_s >= job.options.timeout_s:
            if window_bytes < _MIN_BYTES_PER_SECOND * elapsed_s:
                raise _RetriedError(f"only {window_bytes} bytes came in {elapsed_s:.0f} s")
            window_s, window_bytes = time.monotonic(), 0
    if answer.total is not None and position < answer.total:
        raise _RetriedError(f"the transfer ended at byte {position} of {answer.total}")


def _state_path(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _resumable(url: str, partial: Path, file: RemoteFile) -> tuple[int, str | None]:
    """Where to continue, and the validator (ETag or date) of the partial file; (0, None) to start over."""
    if not partial.exists():
        return 0, None
    offset = partial.stat().st_size
    state: Any = None
    with contextlib.suppress(OSError, ValueError):
        state = json.loads(_state_path(partial).read_text())
    if not isinstance(state, dict) or (file.bytes is not None and offset > file.bytes):
        return 0, None
    is_same_url = state.get("url") == without_credentials(url)
    validator = state.get("validator") if is_same_url else None
    # Without a validator, only a published checksum can tell whether both parts belong to the same version.
    is_checked = file.md5 is not None or file.sha256 is not None
    if isinstance(validator, str) or is_checked:
        return offset, validator if isinstance(validator, str) else None
    return 0, None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """A response whose body can be read."""

    read: Callable[[int], bytes]
    offset: int
    """Position of its first byte in the file."""
    total: int | None
    """Bytes of the whole file."""
    validator: str | None
    """For ``If-Range`` in the next attempt: a strong ETag, or the date of the last change."""
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
        target = _scheme(newurl)
        if target not in _WEB or (_scheme(req.full_url) == "https" and target == "http"):
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
    """A file in a directory or an object store, where the validator is its size."""
    size = storage.size(url)
    start = offset if validator in (None, str(size)) and offset <= size else 0
    with storage.translate_errors("read", url), storage.open_read(url) as stream:
        stream.seek(start)
        yield _Answer(read=stream.read, offset=start, total=size, validator=str(size))


def _scheme(url: str) -> str:
    return urlsplit(url).scheme.lower()


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return " ".join(str(cause).split()) or type(cause).__name__


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _is_hex(text: str | None, length: int) -> bool:
    return text is None or re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", text) is not None
