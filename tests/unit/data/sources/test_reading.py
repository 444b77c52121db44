"""Where chunks end, and what their digest is of."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_files import LIMIT, inspected, sd_record

from moleblend_ray.data.sources import (
    read_chunks,
    reading,
)


@pytest.mark.usefixtures("small_limit")
def test_the_place_and_the_size_of_a_record_that_is_too_large_are_in_the_digest(
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.sdf"
    digests = []
    for size in (0, 1, 1, 2):
        path.write_text(sd_record("a") + sd_record("b", image="x" * (LIMIT + size)))
        (layout,) = inspected(path).layouts
        (chunk,) = read_chunks(layout, 0, 10)
        assert len(chunk.payload) < 10_000
        digests.append(chunk.digest(layout))
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3


@pytest.mark.usefixtures("small_limit")
def test_chunks_end_where_they_would_if_records_that_are_too_large_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_CHUNK_BYTES", 3 * LIMIT)
    path = tmp_path / "m.sdf"
    path.write_text("".join(sd_record(f"m{i}", image="x" * LIMIT) for i in range(7)))
    (layout,) = inspected(path).layouts
    assert [chunk.num_rows for chunk in read_chunks(layout, 0, 10)] == [3, 3, 1]


def test_chunks_end_by_rows_or_bytes_and_their_digest_is_of_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles\n" + "".join(f"{'C' * row}\n" for row in range(1, 11)))
    (layout,) = inspected(path).layouts
    assert [chunk.num_rows for chunk in read_chunks(layout, 0, 4)] == [4, 4, 2]
    monkeypatch.setattr(reading, "MAX_CHUNK_BYTES", 14)
    chunks = list(read_chunks(layout, 0, 4))
    assert [chunk.num_rows for chunk in chunks] == [4, 3, 2, 1]
    assert [chunk.first_row for chunk in chunks] == [0, 4, 7, 9]
    assert len({chunk.digest(layout) for chunk in chunks}) == 4
