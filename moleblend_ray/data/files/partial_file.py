"""File objects that get their content from elsewhere, such as range by range."""

from __future__ import annotations

import abc
import io
from typing import Any


class ReadableFile(io.RawIOBase):
    """A file of which a subclass gives ``read``, ``seek`` and ``tell``."""

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def readall(self) -> bytes:
        """All bytes that follow."""
        content = self.read()
        assert content is not None, "nothing here is non-blocking"
        return content

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with the next bytes; returns how many there were."""
        view = memoryview(buffer).cast("B")
        content = self.read(len(view))
        assert content is not None, "nothing here is non-blocking"
        view[: len(content)] = content
        return len(content)


class PartialFile(ReadableFile):
    """A readable file of ``size`` bytes; a subclass fetches them in :meth:`_range`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._position = 0

    @abc.abstractmethod
    def _range(self, start: int, end: int) -> bytes:
        """Bytes ``[start, end)``, where 0 <= start < end <= size."""

    def tell(self) -> int:
        """The position of the next byte that is read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to ``offset`` from the beginning, the position or the end; returns the new position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} is before the beginning of the file")
        self._position = base + offset
        return self._position

    def read(self, length: int | None = -1) -> bytes:
        """The next ``length`` bytes, fewer at the end of the file; all that follow if negative or None."""
        rest = max(0, self._size - self._position)
        count = rest if length is None or length < 0 else min(length, rest)
        if not count:
            return b""
        content = self._range(self._position, self._position + count)
        self._position += count
        return content
