"""Files by URI: the only module that knows ``s3://``, ``gs://``, ``file://``, ``https://`` and plain paths.

Every function takes a URI (a plain path is a local file) and turns whatever the backend raises into a
:class:`StorageError` that says what was tried, on which URI, and what to do. Writes are atomic: a local file appears
by rename, an object by one PUT or one completed multipart upload. Listings are never cached. Operations on remote
storage that fail transiently are retried (:mod:`moleblend_ray.data.retry`).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast
from urllib.parse import urlsplit

import fsspec

from moleblend_ray.data.partial_file import PartialFile, ReadableFile
from moleblend_ray.data.retry import (
    ShortReadError,
    http_status,
    retried,
    s3_error,
    timeout_seconds,
)
from moleblend_ray.errors import HIDDEN, DataError, StorageError

_S3_ENVIRONMENT: Final = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "MOLEBLEND_STORAGE_TIMEOUT_S",
)
"""Settings that an S3 client reads only when it is created: with other values, another client is needed."""

logger = logging.getLogger(__name__)

_READ_AHEAD_BYTES: Final = 8 << 20
"""Bytes that one request of a streamed read fetches from remote storage."""

_PART_BYTES: Final = 16 << 20
"""Size of the parts of a multipart upload; files of two or more parts are uploaded so."""

_PARALLEL_PARTS: Final = 4
"""Parts that are uploaded at the same time, which bounds the memory of an upload to 64 MiB."""

_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{8}")
"""Names of local files before they get the names they are written for."""
_GLOB_CHARACTERS: Final = frozenset("*?[")

_GOOGLE: Final = frozenset({"gs", "gcs"})

_GONE: Final = frozenset({404, 410})
"""HTTP status: there is no such file."""

_RANGED: Final = frozenset({"s3", "s3a"}) | _GOOGLE
"""Protocols whose servers all support range requests."""

_ADVICE: Final = {
    "InvalidAccessKeyId": "the access key is not known there. Check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL.",
    "SignatureDoesNotMatch": "the secret key does not fit the access key. Check AWS_SECRET_ACCESS_KEY.",
    "ExpiredToken": "the session token has expired. Get new temporary credentials and start again.",
    "InvalidToken": "the session token is not valid. Correct or unset AWS_SESSION_TOKEN.",
    "RequestTimeTooSkewed": "this machine's clock differs from the server's. Set it (NTP).",
    "AuthorizationHeaderMalformed": "the bucket is in another region. Set AWS_REGION or AWS_DEFAULT_REGION to its region.",
    "PermanentRedirect": "the bucket is in another region. Set AWS_REGION or AWS_DEFAULT_REGION to its region.",
}
"""S3 error code -> what it means and what to do."""


class NotFoundError(StorageError):
    """Nothing exists at the URI (the storage itself answered)."""


class FileInfo(NamedTuple):
    """A file found by :func:`list_files`."""

    uri: str
    """URI of the file; an absolute path if local."""

    size: int
    """Bytes."""


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine."""
    return _protocol(uri) == "file"


def local_path(uri: str) -> Path:
    """The path of a URI for which :func:`is_local` holds."""
    return Path(_resolve(uri)[1])


def join(uri: str, *parts: str) -> str:
    """The URI of ``parts`` below ``uri``, with single slashes between; the query of a web address stays at its end."""
    query = ""
    if _is_web(uri):
        uri, mark, query = uri.partition("?")
        query = mark + query
    pieces = [uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts)]
    return "/".join(piece for index, piece in enumerate(pieces) if piece or index == 0) + query


def name_of(uri: str) -> str:
    """The last component of a URI, for a web address without its query."""
    if _is_web(uri):
        uri = uri.partition("?")[0]
    return uri.rstrip("/").rsplit("/", 1)[-1]


def absolute(uri: str) -> str:
    """The URI as it appears in listings: a local path is made absolute."""
    return _with_protocol(uri, _resolve(uri)[1])


def exists(uri: str) -> bool:
    """Whether there is a file, a directory, or a prefix with objects below it."""
    filesystem, path = _resolve(uri)
    try:
        with translate_errors("look at", uri):
            _call("look at", uri, filesystem.info, path)
    except NotFoundError:
        return False
    return True


def size(uri: str) -> int:
    """The size of a file in bytes."""
    filesystem, path = _resolve(uri)
    with translate_errors("look at", uri):
        info = _call("look at", uri, filesystem.info, path)
    if info["type"] == "directory":
        raise StorageError(f"{uri} is a directory, where a file is expected.")
    return _size(uri, info)


def read_bytes(uri: str) -> bytes:
    """The whole content of a file."""
    filesystem, path = _resolve(uri)
    with translate_errors("read", uri):
        return bytes(_call("read", uri, filesystem.cat_file, path))


def read_range(uri: str, offset: int, length: int) -> bytes:
    """Bytes ``[offset, offset + length)`` of a file, fewer if it ends earlier."""
    filesystem, path = _resolve(uri)
    with translate_errors("read", uri):
        content = bytes(
            _call("read", uri, filesystem.cat_file, path, start=offset, end=offset + length)
        )
    # A web server without range requests sends the whole file.
    return content if len(content) <= length else content[offset : offset + length]


def open_read(uri: str) -> BinaryIO:
    """A binary file object; wrap its reads in :func:`translate_errors`, as they can fail later."""
    filesystem, path = _resolve(uri)
    with translate_errors("open", uri):
        if _protocol(uri) in _RANGED:
            remote = _RemoteFile(uri, size(uri))
            return cast(BinaryIO, io.BufferedReader(remote, _READ_AHEAD_BYTES))
        stream = _call("open", uri, filesystem.open, path, "rb", block_size=_READ_AHEAD_BYTES)
        return cast(BinaryIO, _WebFile(uri, stream) if _is_web(uri) else stream)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically: a reader sees the old content or all of the new."""
    filesystem, path = _resolve(uri)
    with translate_errors("write", uri):
        if is_local(uri):
            with _local_replacement(path) as temporary:
                temporary.write_bytes(data)
        else:
            _call("write", uri, filesystem.pipe_file, path, data, **_part_options(uri))


def upload(local_path: str | Path, uri: str) -> None:
    """Copy a local file to a URI atomically."""
    filesystem, path = _resolve(uri)
    with translate_errors("write", uri):
        if is_local(uri):
            with _local_replacement(path) as temporary:
                shutil.copyfile(local_path, temporary)
        else:
            options = _part_options(uri)
            _call("write", uri, filesystem.put_file, str(local_path), path, **options)


def download(uri: str, local_path: str | Path) -> None:
    """Copy a file to a local path atomically."""
    filesystem, path = _resolve(uri)
    with translate_errors("read", uri), _local_replacement(local_path) as temporary:
        _call("read", uri, filesystem.get_file, path, str(temporary))


def read_json(uri: str) -> Any:
    """A JSON document; DataError if the file is not one."""
    content = read_bytes(uri)
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(
            f"{uri} is not a JSON document ({error}): it is damaged, or another program wrote it."
        ) from error


def write_json(uri: str, value: Any) -> None:
    """Write a JSON document; equal values give the same bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(uri, text.encode() + b"\n")


def list_files(uri: str) -> list[FileInfo]:
    """The files of a directory (recursively) or of a glob, or the file itself; sorted by URI.

    Hidden files are left out: those whose name begins with a dot, or the name of a folder between. A URI with ``*``, ``?`` or ``[`` that exists literally is
    that file or directory, not a pattern.
    """
    filesystem, path = _resolve(uri)
    folder, hides = path, True
    if _GLOB_CHARACTERS & set(path) and not exists(uri):
        folder = path[: min(map(path.index, _GLOB_CHARACTERS & set(path)))].rpartition("/")[0]
        hides = not _is_hidden(path.removeprefix(folder))  # a pattern may ask for them
        with translate_errors("list", uri):
            found = _call("list", uri, filesystem.glob, path, detail=True)
    else:
        with translate_errors("list", uri):
            info = _call("list", uri, filesystem.info, path)
            if info["type"] == "directory":
                found = _call("list", uri, filesystem.find, path, detail=True)
                if is_local(uri):
                    found = _with_linked_folders(filesystem, found, [os.path.realpath(path)])
            else:
                found = {path: info}
    files = (
        FileInfo(file := _with_protocol(uri, name), _size(file, info))
        for name, info in found.items()
        # Some clients of object stores represent a folder by an empty object "prefix/".
        if info["type"] != "directory"
        and not name.endswith("/")
        and not (hides and _is_hidden(name.removeprefix(folder)))
    )
    return sorted(files)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _with_linked_folders(
    filesystem: Any, found: Mapping[str, Any], listed: list[str]
) -> dict[str, Any]:
    """``found`` with what lies in folders that are symbolic links, in place of the links, which fsspec lists as files.

    ``listed``: the real folders that are in it. A link into one of them adds nothing; one to a folder around them is not
    followed, with a warning.
    """
    links = {
        name: os.path.realpath(name)
        for name in found
        if os.path.islink(name) and os.path.isdir(name)
    }
    whole = {name: info for name, info in found.items() if name not in links}
    # Outer folders first, so that each file is listed once.
    for name, real in sorted(links.items(), key=lambda link: (len(link[1]), link)):
        if any(f"{real}/".startswith(f"{folder}/") for folder in listed):
            continue
        if any(folder.startswith(f"{real}/") for folder in listed):
            logger.warning("%s links to a folder around it: not followed", name)
            continue
        listed.append(real)
        below = {
            os.path.join(name, os.path.relpath(path, real)): info
            for path, info in filesystem.find(real, detail=True).items()
        }
        whole |= _with_linked_folders(filesystem, below, listed)
    return whole


def delete(uri: str) -> None:
    """Delete a file if it exists."""
    filesystem, path = _resolve(uri)
    try:
        with translate_errors("delete", uri):
            _call("delete", uri, filesystem.rm_file, path)
    except NotFoundError:
        return


def delete_tree(uri: str) -> None:
    """Delete a directory or prefix with everything below it, if it exists."""
    filesystem, path = _resolve(uri)
    if not path.strip("/") or (not is_local(uri) and "/" not in path.strip("/")):
        raise StorageError(f"Refused to delete {uri}: it is a whole file system or bucket.")
    try:
        with translate_errors("delete", uri):
            if is_local(uri) or not _GLOB_CHARACTERS & set(path):
                _call("delete", uri, filesystem.rm, path, recursive=True)
                return
            # Object stores take such a name for a pattern and would delete what lies beside it.
            for name in _call("list", uri, filesystem.find, path):
                _call("delete", uri, filesystem.rm_file, name)
    except NotFoundError:
        return


def sha256_bytes(data: bytes | bytearray | memoryview) -> str:
    """Hexadecimal SHA-256 of a buffer."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def translate_errors(action: str, uri: str) -> Iterator[None]:
    """Turn what a storage backend raises inside the block into a StorageError about ``uri``."""
    try:
        yield
    except StorageError:
        raise
    except _backend_errors() as error:
        raise _explain(action, uri, error) from error


def _backend_errors() -> tuple[type[Exception], ...]:
    """The exceptions of backends; only looked up after an exception, as botocore is slow to import."""
    # NotImplementedError: a read-only backend such as https asked to write.
    errors: tuple[type[Exception], ...] = (OSError, NotImplementedError)
    if "aiohttp" in sys.modules:
        errors = (*errors, sys.modules["aiohttp"].ClientError)
    if "gcsfs.retry" in sys.modules:
        gcsfs, tokens = sys.modules["gcsfs.retry"], sys.modules["google.auth.exceptions"]
        errors = (*errors, gcsfs.HttpError, gcsfs.ChecksumError, tokens.GoogleAuthError)
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return errors
    return (*errors, BotoCoreError, ClientError)


def _explain(action: str, uri: str, error: Exception) -> StorageError:
    """The StorageError for a failure: what was tried, where, why it failed, what to do."""
    kind = type(error).__name__
    reason = " ".join(str(error).split()) or kind
    # botocore repeats user:password@bucket without the scheme that `without_credentials` looks for.
    if user := re.match(r"\w+://([^/@]+)@", uri):
        reason = reason.replace(f"{user[1]}@", f"{HIDDEN}@")
    failed = f"Cannot {action} {uri}: "
    advice = _ADVICE.get(s3_error(error)[0])
    if advice is not None:
        return StorageError(failed + advice)
    if isinstance(error, FileNotFoundError):
        if "bucket" in reason.lower():
            return NotFoundError(
                failed + "the bucket does not exist. Create it or correct the URI."
            )
        return NotFoundError(failed + "it does not exist. Check the spelling of the URI.")
    if isinstance(error, NotADirectoryError):
        # As in object stores, where nothing stops a path from going on below a file: nothing is there.
        return NotFoundError(failed + "a part of this path is a file, not a directory.")
    if isinstance(error, IsADirectoryError):
        return StorageError(failed + "it is a directory, where a file is expected.")
    if kind in {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
        return StorageError(
            failed
            + "no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or give the machine a role."
        )
    status = http_status(error)
    if kind in {"DefaultCredentialsError", "RefreshError"} or (
        status == 401 and _protocol(uri) in _GOOGLE
    ):
        return StorageError(
            failed
            + f"no valid credentials were found ({reason}). Run `gcloud auth application-default login`, set "
            "GOOGLE_APPLICATION_CREDENTIALS, or give the machine a service account."
        )
    # gcsfs tells a refusal by the text of an OSError.
    is_refused = status in (401, 403) or reason.startswith("Forbidden:")
    if isinstance(error, PermissionError) and _protocol(uri) == "file":
        return StorageError(
            failed + f"access was denied ({reason}). Check the owner and the rights of the path."
        )
    if is_refused or isinstance(error, PermissionError):
        return StorageError(
            failed + f"access was denied ({reason}). Check the credentials, and whether they may "
            f"{action} there (the bucket may be read-only for them)."
        )
    if isinstance(error, NotImplementedError):
        return StorageError(failed + "this kind of storage does not support it.")
    if isinstance(error, ConnectionError | TimeoutError) or "Connect" in kind or "Timeout" in kind:
        return StorageError(
            failed
            + f"the storage cannot be reached ({reason}). Check the network and "
            + ("the address." if _is_web(uri) else "AWS_ENDPOINT_URL.")
        )
    return StorageError(failed + f"{kind}: {reason}")


class _RemoteFile(PartialFile):
    """A remote file that is read by range requests: a broken connection costs one request, not the whole stream."""

    def __init__(self, uri: str, size: int) -> None:
        super().__init__(size)
        self._uri = uri

    def _range(self, start: int, end: int) -> bytes:
        filesystem, path = _resolve(self._uri)

        def read() -> bytes:
            content = bytes(filesystem.cat_file(path, start=start, end=end))
            if len(content) != end - start:
                raise ShortReadError(f"{len(content)} of {end - start} bytes at {start} were given")
            return content

        return retried("read", self._uri, read)


class _WebFile(ReadableFile):
    """A file of a web server. StorageError if reading needs range requests and the server does not support them."""

    def __init__(self, uri: str, stream: Any) -> None:
        super().__init__()
        self._uri = uri
        self._stream = stream

    def tell(self) -> int:
        """The position of the next byte that is read."""
        return int(self._stream.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to ``offset`` from the beginning, the position or the end; returns the new position."""
        with _needing_ranges(self._uri):
            self._stream.seek(offset, whence)
        return self.tell()

    def read(self, length: int | None = -1) -> bytes:
        """The next ``length`` bytes, fewer at the end of the file; all that follow if negative or None."""
        with _needing_ranges(self._uri):
            return bytes(self._stream.read(-1 if length is None else length))

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
        super().close()


@contextmanager
def _needing_ranges(uri: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        # fsspec has no exception of its own for it; other ValueErrors are about the arguments.
        if not any(text in str(error) for text in ("range requests", "seek streaming HTTP file")):
            raise
        raise StorageError(
            f"Cannot read {uri}: the server does not support range requests, which reading Parquet files, zip archives "
            f"and files of more than {_READ_AHEAD_BYTES >> 20} MiB needs. Download the file first (curl -O '{uri}') and "
            "give its path, or put it into object storage."
        ) from error


def _size(uri: str, info: Mapping[str, Any]) -> int:
    """Bytes of the file that its storage describes by ``info``.

    A web server need not say how large a file is, or may say 0 of one that it makes only when it is asked for. Such a
    file is read once, and its bytes are counted: it must not be taken for an empty one.
    """
    if info["size"] or not _is_web(uri):
        return int(info["size"] or 0)
    with translate_errors("read", uri):
        return int(_call("read", uri, _count_bytes, uri))


def _count_bytes(uri: str) -> int:
    filesystem, path = _resolve(uri)
    with filesystem.open(path, "rb", block_size=0) as stream:  # 0: no range requests
        return sum(map(len, iter(partial(stream.read, 1 << 20), b"")))


def _call(action: str, uri: str, function: Any, *arguments: Any, **options: Any) -> Any:
    """One idempotent operation of a backend, retried on remote storage."""
    if is_local(uri):
        return function(*arguments, **options)
    return retried(action, uri, lambda: _unmasked(uri, partial(function, *arguments, **options)))


def _unmasked(uri: str, call: Callable[[], Any]) -> Any:
    """The result of ``call``. For fsspec, a web server that is down or refuses has no such file: raise what is behind it."""
    try:
        return call()
    except FileNotFoundError as error:
        cause = error.__cause__
        if not _is_web(uri) or not isinstance(cause, _backend_errors()):
            raise
        if http_status(cause) in _GONE:
            raise
        raise cause from None


def _part_options(uri: str) -> dict[str, int]:
    """How uploads to S3 are cut into parts; s3fs aborts an upload that fails, so that no parts are left over."""
    if _protocol(uri) not in {"s3", "s3a"}:
        return {}
    return {"chunksize": _PART_BYTES, "max_concurrency": _PARALLEL_PARTS}


def _is_web(uri: str) -> bool:
    return _protocol(uri) in {"http", "https"}


def _protocol(uri: str) -> str:
    protocol, separator, _ = uri.partition("://")
    return protocol if separator else "file"


def _resolve(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it."""
    if not uri:
        raise StorageError(
            "The URI is empty; expected a path or something like s3://bucket/prefix."
        )
    if _is_web(uri):
        try:
            urlsplit(uri)
        except ValueError as error:
            raise StorageError(f"{uri} is not a web address ({error}). Correct it.") from error
    protocol = _protocol(uri)
    is_s3 = protocol in {"s3", "s3a"}
    environment = tuple(os.environ.get(name) for name in _S3_ENVIRONMENT) if is_s3 else ()
    filesystem = _filesystem(protocol, environment, os.getpid())
    return filesystem, str(filesystem._strip_protocol(uri))


@lru_cache(maxsize=16)
def _filesystem(protocol: str, environment: tuple[str | None, ...], process: int) -> Any:
    """One client per protocol, environment and process (a client cannot be used after a fork)."""
    del environment, process  # only part of the cache's key
    options: dict[str, Any] = {"skip_instance_cache": True}
    if protocol in {"s3", "s3a"}:
        options |= {
            "use_listings_cache": False,
            "config_kwargs": {"connect_timeout": 10, "read_timeout": timeout_seconds()},
        }
        region = os.environ.get("AWS_REGION")
        # The client itself reads AWS_DEFAULT_REGION only; without a region it signs for us-east-1.
        if region and not os.environ.get("AWS_DEFAULT_REGION"):
            options["client_kwargs"] = {"region_name": region}
    elif protocol in _GOOGLE:
        options["use_listings_cache"] = False
    try:
        return fsspec.filesystem(protocol, **options)
    except ValueError as error:
        known = "a plain path, file://, s3://, gs://, https://"
        raise StorageError(f"Unknown kind of storage {protocol}://; expected {known}.") from error
    except (ImportError, OSError) as error:
        # OSError: a package that finds a library of the system missing (hdfs://).
        extra = " (pip install gcsfs)" if protocol in _GOOGLE else ""
        reason = str(error).partition("\n")[0]
        raise StorageError(
            f"{protocol}:// needs software that is not installed{extra}: {reason}"
        ) from error


def _with_protocol(asked: str, path: str) -> str:
    """A path that a backend found as a URI: plain if local, otherwise with the protocol of ``asked``."""
    return path if is_local(asked) else f"{_protocol(asked)}://{path.split('://', 1)[-1]}"


def delete_temporaries(uri: str) -> None:
    """Delete what writers that were killed left in a local folder; object stores have no such files.

    Nobody may be writing there.
    """
    if is_local(uri):
        folder = local_path(uri)
        for path in folder.iterdir() if folder.is_dir() else ():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


@contextmanager
def _local_replacement(path: str | Path) -> Iterator[Path]:
    """A temporary path, which replaces ``path`` when the block ends without an exception."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:  # including KeyboardInterrupt: leave no temporary file behind
        temporary.unlink(missing_ok=True)
        raise
