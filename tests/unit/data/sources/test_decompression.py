"""Compressed files are read as others are, up to where they are damaged."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from source_files import inspected, records_of, sd_record, smiles_of

from moleblend_ray.data.sources import (
    RowChunk,
    SourceLayout,
    read_chunks,
)
from moleblend_ray.errors import DataError


@pytest.mark.parametrize("name", ["t.tsv", "t.tsv.gz", "T.TSV"])
def test_tab_separated_and_compressed_tables(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbfsmiles\ty\r\nC\t1\r\nCC\t2\r\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    records = records_of(tmp_path / name)
    assert smiles_of(records) == ["C", "CC"]
    assert [record.labels.tolist() for record in records] == [[1.0], [2.0]]


@pytest.mark.parametrize("suffix", ["sdf", "csv"])
def test_a_truncated_gzip_gives_its_complete_chunks_then_names_the_record(
    tmp_path: Path, suffix: str
) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.bytes(30).hex() for _ in range(2000)]
    if suffix == "sdf":
        text = "".join(sd_record(f"m{i}", noise=word) for i, word in enumerate(noise))
    else:
        text = "smiles,noise\n" + "".join(f"C,{word}\n" for word in noise)
    content = gzip.compress(text.encode(), mtime=0)
    path = tmp_path / f"t.{suffix}.gz"
    path.write_bytes(content)
    (layout,) = inspected(path).layouts
    whole = list(read_chunks(layout, 0, 100))
    path.write_bytes(content[: len(content) // 2])
    (layout,) = inspected(path).layouts
    found: list[RowChunk] = []
    with pytest.raises(
        DataError, match=rf"t\.{suffix}\.gz is damaged after record \d+.*truncated"
    ) as error:
        _collect(layout, found)
    assert 0 < len(found) < 20
    assert found == whole[: len(found)]
    record = int(str(error.value).split("after record ")[1].split(" ")[0])
    assert 100 * len(found) <= record < 100 * len(found) + 100


def _collect(layout: SourceLayout, into: list[RowChunk]) -> None:
    for chunk in read_chunks(layout, 0, 100):
        into.append(chunk)  # noqa: PERF402 - what comes before the error counts


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "damaged after record"),
        (lambda content: content[:5], "damaged after record 0"),
        (lambda _: b"smiles\nC\n", "is not a gzip file"),
    ],
)
def test_a_corrupt_gzip_is_told(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    rng = np.random.default_rng(0)
    text = "smiles,x\n" + "".join(f"C,{rng.bytes(30).hex()}\n" for _ in range(20_000))
    path = tmp_path / "t.csv.gz"
    path.write_bytes(damage(gzip.compress(text.encode())))
    with pytest.raises(DataError, match=message):
        records_of(path)
