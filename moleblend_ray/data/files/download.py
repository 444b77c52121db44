"""Published files -> a directory or object store: downloads are resumed after interruptions, and verified.

A file gets its name only when its size and checksum are the published ones. Until then it is a partial file beside it
(for an object store, in a local directory), which the next attempt continues by an HTTP range request. If nothing was
published, the SHA-256 of the first download is recorded, and later downloads must agree with it (trust on first use).
Nothing is executed or unpacked: archives are read as they are.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from moleblend_ray.checks import above, check_all
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.transfer import (
    BLOCK_BYTES,
    SCHEMES,
    Report,
    Transfer,
    TransferOptions,
    scheme_of,
)
from moleblend_ray.errors import (
    ConfigError,
    DataError,
    MoleBlendError,
    StorageError,
    without_credentials,
)
from moleblend_ray.settings import typed

logger = logging.getLogger(__name__)

RECORD_NAME: Final = "download.json"
"""File in the output with the origin, size and checksum of each file, the licence and the citation."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@typed
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
        bad = [url for url in self.urls if scheme_of(url) not in SCHEMES]
        check_all(
            (
                _NAME.fullmatch(self.name) is not None and self.name != RECORD_NAME,
                f"name: expected a plain file name, found {self.name!r}",
            ),
            (bool(self.urls), "urls: expected at least one"),
            (not bad, f"urls: expected {', '.join(SCHEMES)} URLs, found {bad}"),
            *above(self, 0, "bytes"),
            (_is_hex(self.md5, 32), f"md5: expected 32 hexadecimal digits, found {self.md5!r}"),
            (
                _is_hex(self.sha256, 64),
                f"sha256: expected 64 hexadecimal digits, found {self.sha256!r}",
            ),
        )


@typed
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One call of :func:`download_collection`."""

    collection: Collection
    out: str
    mirrors: tuple[str, ...]
    options: TransferOptions
    spool: str | None
    report: Report
    record: Mapping[str, Mapping[str, Any]]
    """File name -> what earlier calls recorded of it."""


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
        if scheme_of(mirror) not in SCHEMES:
            raise ConfigError(
                f"mirrors: expected {', '.join(SCHEMES)} URLs of directories, found {mirror!r}"
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
    transfer = Transfer(
        name=file.name,
        partial=_partial_path(file, job),
        num_bytes=file.bytes,
        has_checksum=file.md5 is not None or file.sha256 is not None,
        options=job.options,
        report=job.report,
    )
    recorded = _recorded(file, job)
    problems: list[MoleBlendError] = []
    with storage.translate_errors("write", str(transfer.partial)):
        transfer.partial.parent.mkdir(parents=True, exist_ok=True)
        with transfer.lock():
            for url in _sources(file, job):
                try:
                    digests = _from_source(url, transfer, file, recorded)
                except (StorageError, DataError) as error:
                    logger.warning("%s", error)
                    problems.append(error)
                    continue
                _publish(transfer, target)
                return FetchedFile(
                    name=file.name,
                    url=without_credentials(url),
                    bytes=digests.bytes,
                    sha256=digests.sha256,
                    verified_by=_basis(file, recorded),
                    transferred=transfer.received,
                )
    kind = (
        DataError if any(isinstance(problem, DataError) for problem in problems) else StorageError
    )
    reasons = "\n  ".join(map(str, problems))
    raise kind(f"{file.name} of {job.collection.name} was not had from any source:\n  {reasons}")


def _from_source(url: str, transfer: Transfer, file: RemoteFile, recorded: str | None) -> _Digests:
    """Complete the partial file from ``url``; DataError if it is not the published file."""
    for is_last in (False, True):
        is_continued = transfer.run(url)
        with open(transfer.partial, "rb") as stream:
            digests = _digests(stream)
        mismatch = _mismatch(file, digests, recorded)
        if mismatch is None:
            return digests
        # The two parts may be of different versions of the file: start over.
        transfer.discard()
        if is_last or not is_continued:
            break
        logger.info("%s: what was continued does not fit; it is fetched anew", file.name)
    raise DataError(f"{without_credentials(url)} is not what was published: {mismatch}.")


def _check_present(file: RemoteFile, target: str, job: _Job) -> FetchedFile:
    """Verify a file that is there already; it is never replaced."""
    with storage.translate_errors("read", target), storage.open_read(target) as stream:
        digests = _digests(stream)
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


def _publish(transfer: Transfer, target: str) -> None:
    """Give the verified file its name in the output, atomically."""
    if storage.is_local(target):
        with open(transfer.partial, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(transfer.partial, storage.absolute(target))
    else:
        storage.upload(transfer.partial, target)
    transfer.discard()


# -- checksums --------------------------------------------------------------------------------------------


class _Digests(NamedTuple):
    bytes: int
    md5: str
    sha256: str


def _digests(stream: BinaryIO) -> _Digests:
    # Some publishers state MD5 only, which protects against damage but not against forgery.
    size, md5, sha256 = 0, hashlib.md5(usedforsecurity=False), hashlib.sha256()
    while block := stream.read(BLOCK_BYTES):
        size += len(block)
        md5.update(block)
        sha256.update(block)
    return _Digests(size, md5.hexdigest(), sha256.hexdigest())


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
    if not storage.exists(uri) or storage.read_json(uri) != value:
        storage.write_json(uri, value)


def _is_hex(text: str | None, length: int) -> bool:
    return text is None or re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", text) is not None
