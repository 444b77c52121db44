"""The rows of a table are the same whatever its quotes; one that is damaged or too large costs no other."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_files import LIMIT, assert_too_large, records_of, smiles_of

from moleblend_ray.chemistry.rejection import Rejection
from moleblend_ray.data.sources.rows import csv_records
from moleblend_ray.data.sources.text import Beginning, size_of


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3, 10])
@pytest.mark.parametrize(
    ("bad", "kept"),
    [
        (['"CCC,x,3'], ["C", "CC", "CCCC"]),  # never closed
        (['CCC,"5-foo,3', "CN,a,4", 'CO,"bar,5'], ["C", "CC", "CN", "CCCC"]),  # another row's cell
        (['CCC,"x"\ry,3'], ["C", "CC", "CCCC"]),
        (["CCC,x,3\rCN,x,3\rCO,x,3"], ["C", "CC", "CCCC"]),  # lines of another system
    ],
)
def test_a_row_with_a_stray_quote_or_carriage_return_costs_no_other(
    tmp_path: Path, bad: list[str], kept: list[str], rows_per_chunk: int
) -> None:
    path = tmp_path / "t.csv"
    lines = ["smiles,name,y", 'C,"a, b",1', 'CC,"two\nlines",2', *bad, "CCCC,x,4"]
    path.write_bytes("\n".join(lines).encode() + b"\n")
    records = records_of(path, rows_per_chunk)
    assert smiles_of(records) == kept
    rejected = [record for record in records if isinstance(record.content, Rejection)]
    assert len(rejected) == len(records) - len(kept) > 0
    for record in rejected:
        assert isinstance(record.content, Rejection)
        assert record.content.code == "invalid_record"
        assert "a quote is not closed, or a carriage return" in record.content.detail


@given(st.text(st.sampled_from('a,"\n\r'), max_size=40), st.integers(1, 4))
def test_rows_are_divided_alike_in_a_file_and_in_its_chunks_and_keep_every_line(
    content: str, rows_per_chunk: int
) -> None:
    raw = content.encode()
    rows = list(csv_records([raw], ",", 1 << 20))
    for first in range(0, len(rows), rows_per_chunk):
        chunk = rows[first : first + rows_per_chunk]
        assert list(csv_records([b"".join(chunk)], ",", 1 << 20)) == chunk
    lines = [line for line in raw.split(b"\n") if line.strip(b"\r")]
    found = [line for row in rows for line in row.split(b"\n") if line.strip(b"\r")]
    assert found == lines


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=12), st.integers(1, 5))
def test_any_table_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], rows_per_chunk: int
) -> None:
    import csv

    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows([("smiles", "name"), *rows])
    path = tmp_path_factory.mktemp("any") / "t.csv"
    path.write_bytes(buffer.getvalue().encode())
    records = records_of(path, rows_per_chunk, id_column="name", label_columns=())
    assert smiles_of(records) == [smiles.strip() for smiles, _ in rows]
    assert [record.mol_id or "" for record in records] == [name.strip() for _, name in rows]


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 10])
@pytest.mark.parametrize(
    ("before", "large", "kept"),
    [
        (['CN,"a', 'b",2'], "CO,{large},3", ["C", "CN", "CC", "CCC"]),
        ([], 'CO,"{large},3', ["C", "CC", "CCC"]),  # never closed
        (['CN,"a'], '{large}",3', ["C", "CC", "CCC"]),  # opened before
        (['CN,"a', "b"], "{large}", ["C", "CC", "CCC"]),
    ],
)
def test_a_line_that_is_too_large_is_a_row_of_its_own_whatever_its_quotes(
    tmp_path: Path, before: list[str], large: str, kept: list[str], rows_per_chunk: int
) -> None:
    lines = ["smiles,name,y", "C,x,1", *before, large.format(large="z" * LIMIT)]
    lines += ['CC,"two\nlines",4', "CCC,x,5"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    records = records_of(tmp_path / "t.csv", rows_per_chunk)
    assert smiles_of(records) == kept
    assert_too_large(records[-3], "1.1")
    assert sum(isinstance(record.content, Rejection) for record in records) == len(records) - len(
        kept
    )


ROW_OF_MANY_LINES = '{smiles},"' + '","'.join(["a\nb" + "z" * (LIMIT // 4)] * 7) + '"\n'
"""A row of 1.8 MiB in lines of a quarter of that."""


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 10])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_row_whose_cells_together_are_too_large_costs_no_other(
    tmp_path: Path, num_rows: int, rows_per_chunk: int
) -> None:
    header = "smiles," + ",".join(f"c{number}" for number in range(7)) + "\n"
    small = ROW_OF_MANY_LINES.replace("z", "")
    large = "".join(ROW_OF_MANY_LINES.format(smiles="CO") for _ in range(num_rows))
    (tmp_path / "t.csv").write_text(
        header + small.format(smiles="C") + large + small.format(smiles="CC")
    )
    records = records_of(tmp_path / "t.csv", rows_per_chunk, label_columns=())
    assert [record.row for record in records] == list(range(num_rows + 2))
    assert smiles_of(records) == ["C", "CC"]
    for record in records[1:-1]:
        assert_too_large(record, "1.8")
        assert record.excerpt == large[:200]


@pytest.mark.parametrize("num_cells", [3, 12, 200])
def test_of_a_row_of_many_lines_no_more_than_the_limit_is_held(num_cells: int) -> None:
    cell = b"x" * (LIMIT // 2) + b'\n"'
    row = b'CO,"' + b',"'.join([cell] * num_cells) + b"\n"

    def blocks() -> Iterator[bytes]:
        yield b'C,1\nCO,"'
        for number in range(num_cells):
            yield (b',"' if number else b"") + cell
        yield b"\nCC,2\n"

    tracemalloc.start()
    first, large, last = csv_records(blocks(), ",", LIMIT)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (first, last) == (b"C,1\n", b"CC,2\n")
    assert isinstance(large, Beginning)
    assert (large, large.num_bytes) == (row[:800], len(row))
    assert peak_bytes < 16 * LIMIT


@pytest.mark.parametrize("letter", ["x", "\N{CJK UNIFIED IDEOGRAPH-6C34}"])
def test_a_quote_that_is_not_closed_before_many_rows_costs_one_row(letter: str) -> None:
    line = f"CC,{letter * 20},2\n".encode()
    lines = [b'CO,"two\nlines",1\n', b'CO,"x,1\n', *[line] * (4 * LIMIT // len(line))]
    assert list(csv_records([b"".join(lines)], ",", LIMIT)) == lines


@pytest.mark.parametrize("rest", ["z,1\n", ""])
def test_a_row_too_large_that_turns_out_to_be_none_ends_before_its_last_part(rest: str) -> None:
    half = "x" * (LIMIT // 2) + "\n"
    large = 'CO,"' + '","'.join([half] * 5)
    tail = ['z"z,2\n', *["C,3\n"] * 3]
    found = list(csv_records([(large + rest + "".join(tail)).encode()], ",", LIMIT))
    assert isinstance(found[0], Beginning)
    assert 2 * LIMIT < found[0].num_bytes <= len(large)
    assert found[-3:] == [b"C,3\n"] * 3
    assert sum(map(size_of, found)) == len(large + rest + "".join(tail))
