"""Lines and SD records are read whatever their ends; one that is too large costs no other."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_files import LIMIT, METHANE, assert_too_large, records_of, sd_record, smiles_of

from moleblend_ray.chemistry.records import MolBlock
from moleblend_ray.data.sources import (
    text,
)
from moleblend_ray.data.sources.text import Beginning, lines_of, sd_records, size_of


def test_a_delimiter_line_of_an_sd_file_may_go_on(tmp_path: Path) -> None:
    path = tmp_path / "x.sdf"
    path.write_text("".join(sd_record(f"m{i}").replace("$$$$", "$$$$ 1") for i in range(3)))
    assert len(records_of(path)) == 3


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["$$$$\n", "$$$$", ""])
def test_line_ends_and_a_missing_last_delimiter_do_not_matter(
    tmp_path: Path, ending: str, last: str
) -> None:
    text = (sd_record("a", y=1) + sd_record("b", y=2)).removesuffix("$$$$\n") + last
    path = tmp_path / "m.sdf.gz"
    path.write_bytes(gzip.compress(text.replace("\n", ending).encode()))
    records = records_of(path)
    assert [record.mol_id for record in records] == ["a", "b"]
    assert [record.labels.tolist() for record in records] == [[1.0], [2.0]]
    assert records[1].content == MolBlock(METHANE.format(title="b"))


def test_a_record_without_end_is_passed_on_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.sdf"
    path.write_text("junk\n$$$$\n" + sd_record("fine"))
    junk, fine = records_of(path)
    assert junk.content == MolBlock("junk\n")
    assert fine.mol_id == "fine"


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 10])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["m.sdf", "m.sdf.gz"])
def test_an_sd_record_that_is_too_large_costs_no_other(
    tmp_path: Path, name: str, ending: str, rows_per_chunk: int
) -> None:
    image = "A" * LIMIT + "\n" + "$$$$ is not at the beginning of a line here: $$$$\n".rjust(LIMIT)
    records = [
        sd_record("a", mu=1),
        sd_record("b", mu="no number", image=image),
        sd_record("c", mu=3),
        sd_record("d", image=image, mu=4),
        sd_record("e", mu=5),
    ]
    raw = "".join(records).replace("\n", ending).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    found = records_of(tmp_path / name, rows_per_chunk)
    assert [record.row for record in found] == [0, 1, 2, 3, 4]
    assert [record.mol_id for record in found] == ["a", "b", "c", "d", "e"]
    for index in (0, 2, 4):
        title = found[index].mol_id
        assert found[index].content == MolBlock(METHANE.format(title=title))
    # The label is found although the records that are too large seem to have something else in it, or nothing.
    assert [found[index].labels.tolist() for index in (0, 2, 4)] == [[1], [3], [5]]
    for index in (1, 3):
        assert_too_large(found[index], "2.1")
        assert found[index].excerpt == records[index][:200]


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("num_bytes", [LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 5])
@pytest.mark.parametrize("end", ["$$$$\n", "$$$$", "\n", ""])
def test_the_limit_is_that_of_the_record_whatever_the_blocks_and_the_end_of_the_file(
    tmp_path: Path, num_bytes: int, end: str
) -> None:
    record = METHANE.format(title="m") + ">  <note>\n"
    record += "x" * (num_bytes - len(record) - len(end)) + end
    for before in ("", sd_record("a"), sd_record("a", note="y" * 1000)):
        (tmp_path / "m.sdf").write_text(before + record)
        last = records_of(tmp_path / "m.sdf")[-1]
        if num_bytes <= LIMIT:
            assert last.content == MolBlock(METHANE.format(title="m"))
        else:
            assert_too_large(last, "1.1")


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("before", ["", sd_record("a")])
@pytest.mark.parametrize("content", ["not an SD file\n" * 300_000, "\0" * 4_500_000])
def test_what_is_too_large_and_goes_on_to_the_end_of_an_sd_file_is_one_record(
    tmp_path: Path, before: str, content: str
) -> None:
    (tmp_path / "m.sdf").write_text(before + content)
    *others, last = records_of(tmp_path / "m.sdf")
    assert [record.mol_id for record in others] == (["a"] if before else [])
    assert_too_large(last, "4.3")
    assert last.excerpt == content[:200]


sd_pieces = st.sampled_from(["$$$$", "$", "\n", "\r\n", "x", "a longer piece", "\n$$$$\n"])


@given(st.lists(sd_pieces, max_size=40), st.integers(1, 30), st.integers(1, 20))
def test_sd_records_are_the_same_with_and_without_a_limit(
    pieces: list[str], block_bytes: int, max_bytes: int
) -> None:
    raw = "".join(pieces).encode() + b"end"
    blocks = [raw[start : start + block_bytes] for start in range(0, len(raw), block_bytes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_KEPT_BYTES", 5)
        found = list(sd_records(blocks, max_bytes))
    whole = list(sd_records([raw], len(raw)))
    assert list(map(size_of, found)) == list(map(len, whole))
    for record, expected in zip(found, whole, strict=True):
        is_too_large = len(expected) > max_bytes
        assert isinstance(record, Beginning) == is_too_large
        assert record == (expected[:5] if is_too_large else expected)


@pytest.mark.parametrize("line_bytes", [80, 64 << 20])
def test_of_a_record_that_is_too_large_no_more_than_the_limit_is_held(line_bytes: int) -> None:
    line = b"x" * (line_bytes - 1) + b"\n"
    content = line * ((64 << 20) // line_bytes) + b"$$$$\n"

    def blocks() -> Iterator[bytes]:
        for start in range(0, len(content), 1 << 18):
            yield content[start : start + (1 << 18)]

    for read in (sd_records, lines_of):
        tracemalloc.start()
        sizes = [size_of(record) for record in read(blocks(), LIMIT)]
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sum(sizes) == len(content)
        assert peak_bytes < 4 * LIMIT + 200 * len(sizes)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 10])
@pytest.mark.parametrize(
    ("name", "header"), [("t.csv", "smiles,y\n"), ("t.tsv", "smiles\ty\n"), ("t.smi", "")]
)
def test_a_line_that_is_too_large_costs_no_other(
    tmp_path: Path, name: str, header: str, rows_per_chunk: int
) -> None:
    mark = "\t" if name == "t.tsv" else "," if header else " "
    lines = [f"{smiles}{mark}{y}\n" for y, smiles in enumerate(["C", "N" * LIMIT, "CC", "CCC"])]
    blank = " " * (LIMIT + 1)
    (tmp_path / name).write_text(header + "".join(lines) + blank)
    records = records_of(tmp_path / name, rows_per_chunk)
    assert [record.row for record in records] == [0, 1, 2, 3, 4]
    assert smiles_of(records) == ["C", "CC", "CCC"]
    assert_too_large(records[1], "1.1")
    assert (records[1].mol_id, records[1].excerpt) == (None, "N" * 200)
    assert_too_large(records[4], "1.1")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_may_end_in_carriage_returns_alone(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    suffix = "" if pack is bytes else ".gz"
    table = b"smiles,y\rCCO,1\rCCN,2\r"
    (tmp_path / f"a.csv{suffix}").write_bytes(pack(table))
    record = sd_record("x", mu=3).encode().replace(b"\n", b"\r")
    (tmp_path / f"b.sdf{suffix}").write_bytes(pack(record * 2))
    assert [record.mol_id for record in records_of(tmp_path)] == [None, None, "x", "x"]
    labels = np.array([record.labels for record in records_of(tmp_path)])
    nan = np.nan
    np.testing.assert_array_equal(labels, [[1, nan], [2, nan], [nan, 3], [nan, 3]])
