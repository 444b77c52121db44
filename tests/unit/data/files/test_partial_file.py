"""A file that is fetched range by range reads like any other file."""

from __future__ import annotations

import io

import pytest

from moleblend_ray.data.files.partial_file import PartialFile

CONTENT = bytes(range(100))


class Fetched(PartialFile):
    """``CONTENT``, with a record of the ranges that were fetched."""

    def __init__(self) -> None:
        super().__init__(len(CONTENT))
        self.ranges: list[tuple[int, int]] = []

    def _range(self, start: int, end: int) -> bytes:
        self.ranges.append((start, end))
        return CONTENT[start:end]


def test_reads_and_seeks_are_those_of_a_file_in_memory() -> None:
    file, expected = Fetched(), io.BytesIO(CONTENT)
    for offset, whence, length in [
        *((0, io.SEEK_SET, 10), (5, io.SEEK_CUR, 3), (-4, io.SEEK_END, 2), (-2, io.SEEK_CUR, 9)),
        *(
            (90, io.SEEK_SET, 50),
            (100, io.SEEK_SET, 1),
            (120, io.SEEK_SET, 1),
            (30, io.SEEK_SET, -1),
        ),
        *((7, io.SEEK_SET, 0), (0, io.SEEK_END, None)),
    ]:
        assert file.seek(offset, whence) == expected.seek(offset, whence)
        assert file.read(length) == expected.read(length)
        assert file.tell() == expected.tell()
    file.seek(98)
    buffer = bytearray(b"..xx")
    assert file.readinto(buffer) == 2
    assert bytes(buffer) == CONTENT[98:] + b"xx"
    file.seek(40)
    assert file.readall() == CONTENT[40:]


def test_only_bytes_of_the_file_are_fetched() -> None:
    file = Fetched()
    file.seek(95)
    assert file.read(50) == CONTENT[95:]
    assert file.read(50) == b""
    assert file.ranges == [(95, 100)]


def test_a_buffered_reader_fetches_what_it_reads_ahead() -> None:
    file = Fetched()
    with io.BufferedReader(file, 32) as buffered:
        assert buffered.read(3) + buffered.read(4) == CONTENT[:7]
        assert file.ranges == [(0, 32)]
        assert buffered.read() == CONTENT[7:]


def test_a_position_before_the_beginning_is_an_error() -> None:
    with pytest.raises(ValueError, match="position -1 is before the beginning"):
        Fetched().seek(-101, io.SEEK_END)
