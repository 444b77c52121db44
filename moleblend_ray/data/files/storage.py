"""Files by URI: ``s3://``, ``gs://``, ``file://``, ``https://`` and plain paths, in one way for the whole project.

Every function takes a URI (a plain path is a local file) and turns whatever the backend raises into a
:class:`StorageError` that says what was tried, on which URI, and what to do. Writes are atomic: a local file appears
by rename, an object by one PUT or one completed multipart upload. Listings are never cached. Operations on remote
storage that fail transiently are retried (:mod:`moleblend_ray.data.files.retry`).

Below this module: ``storage_clients`` (URI -> client), ``storage_errors`` (what a failure means) and ``remote_files``
(file objects).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

from moleblend_ray.data.files import storage_clients
from moleblend_ray.data.files.documents import lack
from moleblend_ray.data.files.remote_files import (
    READ_AHEAD_BYTES,
    RangedFile,
    WebFile,
    read_web_range,
)
from moleblend_ray.data.files.retry import is_beyond_end, is_conflict, retried, s3_error
from moleblend_ray.data.files.storage_clients import (
    RANGED,
    is_web,
    part_options,
    protocol_of,
    with_protocol,
)
from moleblend_ray.data.files.storage_clients import is_local as is_local
from moleblend_ray.data.files.storage_errors import NotFoundError as NotFoundError
from moleblend_ray.data.files.storage_errors import translate_errors as translate_errors
from moleblend_ray.data.files.storage_errors import unmasked
from moleblend_ray.errors import DataError, StorageError

logger = logging.getLogger(__name__)

_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{8}")
"""Names of local files before they get the names they are written for."""
_NOT_IMPLEMENTED: Final = 501
"""HTTP status: the store knows no conditional writes."""
_WITHOUT_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""What a file system answers that has no hard links."""
_GLOB_CHARACTERS: Final = frozenset("*?[")
_FOREIGN: Final = "it is damaged, or another program wrote it."


class FileInfo(NamedTuple):
    """A file found by :func:`list_files`."""

    uri: str
    """URI of the file; an absolute path if local."""

    size: int
    """Bytes."""


def local_path(uri: str) -> Path:
    """The path of a URI for which :func:`is_local` holds."""
    return Path(storage_clients.resolve(uri)[1])


def join(uri: str, *parts: str) -> str:
    """The URI of ``parts`` below ``uri``, with single slashes between; the query of a web address stays at its end."""
    query = ""
    if is_web(uri):
        uri, mark, query = uri.partition("?")
        query = mark + query
    pieces = [uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts)]
    return "/".join(piece for index, piece in enumerate(pieces) if piece or index == 0) + query


def name_of(uri: str) -> str:
    """The last component of a URI, for a web address without its query."""
    if is_web(uri):
        uri = uri.partition("?")[0]
    return uri.rstrip("/").rsplit("/", 1)[-1]


def absolute(uri: str) -> str:
    """The URI as it appears in listings: a local path is made absolute."""
    return with_protocol(uri, storage_clients.resolve(uri)[1])


def exists(uri: str) -> bool:
    """Whether there is a file, a directory, or a prefix with objects below it."""
    filesystem, path = storage_clients.resolve(uri)
    try:
        with translate_errors("look at", uri):
            _call("look at", uri, filesystem.info, path)
    except NotFoundError:
        return False
    return True


def size(uri: str) -> int:
    """The size of a file in bytes."""
    return size_and_version(uri)[0]


def size_and_version(uri: str) -> tuple[int, str]:
    """The size of a file in bytes, and its ETag or, without one, the time of its last change."""
    filesystem, path = storage_clients.resolve(uri)
    with translate_errors("look at", uri):
        info = _call("look at", uri, filesystem.info, path)
    if info["type"] == "directory":
        raise StorageError(f"{uri} is a directory, where a file is expected.")
    version = info.get("ETag") or info.get("etag") or info.get("mtime")
    return _size(uri, info), str(version)


def read_bytes(uri: str) -> bytes:
    """The whole content of a file."""
    filesystem, path = storage_clients.resolve(uri)
    with translate_errors("read", uri):
        return bytes(_call("read", uri, filesystem.cat_file, path))


def read_range(uri: str, offset: int, length: int) -> bytes:
    """Bytes ``[offset, offset + length)`` of a file, fewer if it ends earlier."""
    filesystem, path = storage_clients.resolve(uri)
    with translate_errors("read", uri):
        try:
            if is_web(uri):
                return bytes(_call("read", uri, read_web_range, uri, offset, length))
            return bytes(
                _call("read", uri, filesystem.cat_file, path, start=offset, end=offset + length)
            )
        except Exception as error:  # each client has classes of its own
            if is_beyond_end(error):
                return b""
            raise


def open_read(uri: str) -> BinaryIO:
    """A binary file object; wrap its reads in :func:`translate_errors`, as they can fail later."""
    filesystem, path = storage_clients.resolve(uri)
    with translate_errors("open", uri):
        if protocol_of(uri) in RANGED:
            remote = RangedFile(uri, size(uri))
            return cast(BinaryIO, io.BufferedReader(remote, READ_AHEAD_BYTES))
        stream = _call("open", uri, filesystem.open, path, "rb", block_size=READ_AHEAD_BYTES)
        return cast(BinaryIO, WebFile(uri, stream) if is_web(uri) else stream)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically: a reader sees the old content or all of the new."""
    filesystem, path = storage_clients.resolve(uri)
    with translate_errors("write", uri):
        if is_local(uri):
            with _local_replacement(path) as temporary:
                temporary.write_bytes(data)
        else:
            _call("write", uri, filesystem.pipe_file, path, data, **part_options(uri))


def create_json(uri: str, value: Any) -> bool:
    """Write a JSON document unless there is a file; whether the file is now this document.

    Of several processes that create different documents at the same time, one succeeds. In a store that knows no
    conditional writes the last one does, and one that was faster may not learn of it here.
    """
    filesystem, path = storage_clients.resolve(uri)
    data = _json_bytes(value)
    with translate_errors("write", uri):
        try:
            if is_local(uri):
                _create_local(path, data)
            else:
                _call("write", uri, filesystem.pipe_file, path, data, mode="create")
        except Exception as error:
            # Each client has classes of its own; what is neither of these two is raised again.
            if s3_error(error)[1] == _NOT_IMPLEMENTED:
                if not exists(uri):
                    write_bytes(uri, data)
            elif not is_conflict(error):
                raise
    # A repeated request may meet the file that the first one made.
    return read_bytes(uri) == data


def upload(local_path: str | Path, uri: str) -> None:
    """Copy a local file to a URI atomically."""
    filesystem, path = storage_clients.resolve(uri)
    with translate_errors("write", uri):
        if is_local(uri):
            with _local_replacement(path) as temporary:
                shutil.copyfile(local_path, temporary)
        else:
            options = part_options(uri)
            _call("write", uri, filesystem.put_file, str(local_path), path, **options)


def download(uri: str, local_path: str | Path) -> None:
    """Copy a file to a local path atomically."""
    filesystem, path = storage_clients.resolve(uri)
    with translate_errors("read", uri), _local_replacement(local_path) as temporary:
        _call("read", uri, filesystem.get_file, path, str(temporary))


def read_json(uri: str) -> Any:
    """A JSON document; DataError if the file is not one."""
    content = read_bytes(uri)
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{uri} is not a JSON document ({error}): {_FOREIGN}") from error


def read_object(uri: str, members: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object with these ``members`` (:func:`require_members`)."""
    value = read_json(uri)
    require_members(uri, value, members or {})
    found: dict[str, Any] = value
    return found


def require_members(uri: str, value: Any, members: Mapping[str, Any]) -> None:
    """DataError unless the JSON document ``value`` of the file ``uri`` is an object that has all ``members``, each of its type.

    ``{"task.name": str}`` asks for the member ``name`` of the object ``task``; types are those of :mod:`.documents`.
    """
    if problem := lack(value, members):
        raise DataError(f"{uri} {problem}: {_FOREIGN}")


def write_json(uri: str, value: Any) -> None:
    """Write a JSON document; equal values give the same bytes."""
    write_bytes(uri, _json_bytes(value))


def _json_bytes(value: Any) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def list_files(uri: str) -> list[FileInfo]:
    """The files of a directory (recursively) or of a glob, or the file itself; sorted by URI.

    Hidden files are left out: those whose name begins with a dot, or the name of a folder between. A URI with ``*``,
    ``?`` or ``[`` that exists literally is that file or directory, not a pattern.
    """
    filesystem, path = storage_clients.resolve(uri)
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
        FileInfo(file := with_protocol(uri, name), _size(file, info))
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
    filesystem, path = storage_clients.resolve(uri)
    try:
        with translate_errors("delete", uri):
            _call("delete", uri, filesystem.rm_file, path)
    except NotFoundError:
        return


def delete_tree(uri: str) -> None:
    """Delete a directory or prefix with everything below it, if it exists."""
    filesystem, path = storage_clients.resolve(uri)
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


def _size(uri: str, info: Mapping[str, Any]) -> int:
    """Bytes of the file that its storage describes by ``info``.

    A web server need not say how large a file is, or may say 0 of one that it makes only when it is asked for. Such a
    file is read once, and its bytes are counted: it must not be taken for an empty one.
    """
    if info["size"] or not is_web(uri):
        return int(info["size"] or 0)
    with translate_errors("read", uri):
        return int(_call("read", uri, _count_bytes, uri))


def _count_bytes(uri: str) -> int:
    filesystem, path = storage_clients.resolve(uri)
    with filesystem.open(path, "rb", block_size=0) as stream:  # 0: no range requests
        return sum(map(len, iter(partial(stream.read, 1 << 20), b"")))


def _call(action: str, uri: str, function: Any, *arguments: Any, **options: Any) -> Any:
    """One idempotent operation of a backend, retried on remote storage."""
    if is_local(uri):
        return function(*arguments, **options)
    return retried(action, uri, lambda: unmasked(uri, partial(function, *arguments, **options)))


def delete_temporaries(uri: str) -> None:
    """Delete what writers that were killed left in a local folder; object stores have no such files.

    Nobody may be writing there.
    """
    if is_local(uri):
        folder = local_path(uri)
        for path in folder.iterdir() if folder.is_dir() else ():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def _create_local(path: str, data: bytes) -> None:
    """Make a local file with all its content at once; FileExistsError if there is one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(data)
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _WITHOUT_LINKS:
            raise
        with target.open("xb") as stream:
            stream.write(data)
    finally:
        temporary.unlink(missing_ok=True)


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
