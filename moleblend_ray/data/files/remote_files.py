"""Remote files as file objects: range by range, or as a web server gives them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final

from fsspec.asyn import sync

from moleblend_ray.data.files import storage_clients
from moleblend_ray.data.files.partial_file import PartialFile, ReadableFile
from moleblend_ray.data.files.retry import ShortReadError, retried
from moleblend_ray.errors import StorageError

READ_AHEAD_BYTES: Final = 8 << 20
"""Bytes that one request of a streamed read fetches from remote storage."""


class RangedFile(PartialFile):
    """A remote file that is read by range requests: a broken connection costs one request, not the whole stream."""

    def __init__(self, uri: str, size: int) -> None:
        super().__init__(size)
        self._uri = uri

    def _range(self, start: int, end: int) -> bytes:
        filesystem, path = storage_clients.resolve(self._uri)

        def read() -> bytes:
            content = bytes(filesystem.cat_file(path, start=start, end=end))
            if len(content) != end - start:
                raise ShortReadError(f"{len(content)} of {end - start} bytes at {start} were given")
            return content

        return retried("read", self._uri, read)


def read_web_range(uri: str, offset: int, length: int) -> bytes:
    """Bytes ``[offset, offset + length)`` of a file of a web server, fewer if it ends earlier.

    A server without range requests sends the whole file: what lies before the range is dropped as it comes, and what
    lies behind it is not waited for.
    """
    if not length:
        return b""
    filesystem, path = storage_clients.resolve(uri)

    async def read() -> bytes:
        session = await filesystem.set_session()
        options = dict(filesystem.kwargs)  # of fsspec's own configuration
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}"}
        options["headers"] = {**options.get("headers", {}), **wanted}
        async with session.get(filesystem.encode_url(path), **options) as response:
            filesystem._raise_not_found_for_status(response, path)
            start = 0 if response.status == HTTPStatus.PARTIAL_CONTENT else offset
            content, position = bytearray(), 0
            async for piece in response.content.iter_any():
                content += piece[max(0, start - position) : start + length - position]
                position += len(piece)
                if len(content) == length:
                    break
            return bytes(content)

    return bytes(sync(filesystem.loop, read))


class WebFile(ReadableFile):
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
            f"and files of more than {READ_AHEAD_BYTES >> 20} MiB needs. Download the file first (curl -O '{uri}') and "
            "give its path, or put it into object storage."
        ) from error
