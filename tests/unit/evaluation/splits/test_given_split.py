"""A split that comes with the data is read from tables, SD files, split files and prepared datasets alike."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moleblend_ray.data.dataset.dataset_files import SPLITS
from moleblend_ray.data.preparation.assembly import write_manifest
from moleblend_ray.data.preparation.claim import claim_output
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.shard_writer import convert_chunk
from moleblend_ray.data.preparation.split_file import splits_of_file
from moleblend_ray.data.preparation.splits import UNNAMED, NamedSplits, SplitsOfData, TimeSplit
from moleblend_ray.data.sources import ColumnConfig, find_sources, inspect_sources, read_chunks
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.evaluation.molecules.dataset import load_labelled
from moleblend_ray.evaluation.splits.given_split import (
    groups_of_column,
    rows_of_column,
    splits_of_column,
    times_of_column,
)
from moleblend_ray.evaluation.tasks import Task, TaskKind, resolve_task

ROWS = (
    ("CCO", "1", "train"),
    ("CCN", "2", "validation"),
    ("not a molecule", "3", "test"),
    ("CCC", "", "train"),
    ("CCF", "5", "Test"),
    ("CCCl", "6", " train "),
)
EXPECTED = {"CCO": "train", "CCN": "valid", "CCF": "test", "CCCl": "train"}
"""Of the molecules with a label."""


def write_csv(folder: Path, rows: Sequence[tuple[str, str, str]] = ROWS) -> str:
    path = folder / "table.csv"
    lines = [",".join(("smiles", "y", "part")), *(",".join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("name", "delimiter", "end", "before"),
    [
        ("trailing.csv", ",", ",", ""),
        ("semicolons.csv", ";", "", ""),
        ("excel.csv", ";", "", "sep=;\n"),
        ("table.smi", ",", "", ""),
        ("table.txt", "\t", "", ""),
    ],
)
def test_the_column_is_found_in_every_table_that_molecules_are_read_from(
    tmp_path: Path, name: str, delimiter: str, end: str, before: str
) -> None:
    lines = [delimiter.join(row) for row in (("smiles", "y", "part"), *ROWS)]
    path = tmp_path / name
    path.write_text(before + lines[0] + "\n" + "".join(f"{line}{end}\n" for line in lines[1:]))
    assert {word: rows.tolist() for word, rows in rows_of_column(str(path), "part").items()} == {
        "train": [0, 3, 5],
        "validation": [1],
        "test": [2],
        "Test": [4],
    }


def prepare(source: str, out: Path, splits: NamedSplits | None = None) -> str:
    """In this process; the dataset's folder."""
    options = ConvertOptions(
        columns=ColumnConfig(label_columns=("y",)), rows_per_chunk=4, row_group_rows=2
    )
    sources = inspect_sources(find_sources(source), options.columns)
    claim_output(str(out), sources, options)
    receipts = [
        convert_chunk(chunk, layout, sources.labels, options, str(out), splits)
        for index, layout in enumerate(sources.layouts)
        for chunk in read_chunks(layout, index, 4)
    ]
    write_manifest(str(out), sources, options, receipts)
    return str(out)


def parts_of(uri: str, named: SplitsOfData | None) -> dict[str, str]:
    molecules = load_labelled(uri, task(), named)
    assert molecules.parts is not None
    names = [SPLITS[code] for code in molecules.parts]
    return dict(zip(molecules.smiles, names, strict=True))


def task() -> Task:
    return resolve_task("own", columns=("y",), kind=TaskKind.REGRESSION)


def test_a_column_gives_each_labelled_molecule_its_part_whatever_else_the_rows_are(
    tmp_path: Path,
) -> None:
    source = write_csv(tmp_path)
    named = splits_of_column(source, "part")
    assert parts_of(prepare(source, tmp_path / "data"), named) == EXPECTED


def test_parts_stay_with_their_molecules_when_some_are_taken(tmp_path: Path) -> None:
    source = write_csv(tmp_path)
    data = prepare(source, tmp_path / "data")
    molecules = load_labelled(data, task(), splits_of_column(source, "part"))
    assert molecules.parts is not None
    order = molecules.parts.argsort()[::-1].astype("int64")
    taken = molecules.take(order)
    assert taken.parts is not None
    assert {s: SPLITS[p] for s, p in zip(taken.smiles, taken.parts, strict=True)} == EXPECTED


def test_parquet_and_sd_files_give_the_rows_that_a_table_gives(tmp_path: Path) -> None:
    expected = {"train": [0, 3, 5], "validation": [1], "test": [2], "Test": [4]}
    parquet, in_bytes = tmp_path / "table.parquet", tmp_path / "bytes.parquet"
    smiles, _, words = zip(*ROWS, strict=True)
    pq.write_table(pa.table({"smiles": smiles, "part": words}), parquet)
    # As some writers have text.
    pq.write_table(pa.table({"smiles": smiles, "part": [w.encode() for w in words]}), in_bytes)
    block = (
        "\n\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n" + "    0.0000" * 3 + " C   0  0\nM  END\n"
    )
    sdf = tmp_path / "table.sdf"
    sdf.write_text("".join(f"{block}>  <part>\n{word}\n\n$$$$\n" for word in words))
    for source in (write_csv(tmp_path), str(parquet), str(in_bytes), str(sdf)):
        found = rows_of_column(source, "part")
        assert {word: rows.tolist() for word, rows in found.items()} == expected


def test_a_split_file_by_id_and_a_dataset_s_own_splits_give_the_same(tmp_path: Path) -> None:
    source = write_csv(tmp_path)
    data = prepare(source, tmp_path / "data")
    ids = dict(
        zip(load_labelled(data, task()).smiles, load_labelled(data, task()).mol_ids, strict=True)
    )
    lines = ["id,split", *(f"{ids[smiles]},{part}" for smiles, part in EXPECTED.items())]
    (tmp_path / "split.csv").write_text("\n".join(lines) + "\n")
    by_id = splits_of_file(str(tmp_path / "split.csv"))
    assert parts_of(data, by_id) == EXPECTED
    own = prepare(source, tmp_path / "split_data", splits_of_column(source, "part"))
    assert parts_of(own, None) == EXPECTED


def test_a_molecule_that_the_split_leaves_out_is_told(tmp_path: Path) -> None:
    source = write_csv(tmp_path, [(*row[:2], "" if row[0] == "CCF" else row[2]) for row in ROWS])
    data = prepare(source, tmp_path / "data")
    with pytest.raises(DataError, match=r"leaves out 1 of 4 .*row 4 of the source"):
        load_labelled(data, task(), splits_of_column(source, "part"))


def test_ids_of_which_the_source_has_none_lead_to_their_column(tmp_path: Path) -> None:
    data = prepare(write_csv(tmp_path), tmp_path / "data")
    with pytest.raises(DataError, match=r"leaves out 4 of 4 .*set task\.id_column"):
        load_labelled(data, task(), NamedSplits(None, {"a": "train"}, "s.csv"))
    with pytest.raises(DataError, match=r"leaves out 3 of 4 ") as raised:
        load_labelled(data, task(), NamedSplits(None, {"table_0": "train"}, "s.csv"))
    assert "id_column" not in str(raised.value)


def test_a_split_of_more_rows_than_the_source_has_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = prepare(write_csv(tmp_path), tmp_path / "data")
    rows = np.arange(len(ROWS) + 2)
    load_labelled(data, task(), NamedSplits({"train": rows[:-2]}, None, "s.json"))
    assert not caplog.text
    load_labelled(data, task(), NamedSplits({"train": rows}, None, "s.json"))
    assert "s.json names 2 rows after the last of the source, which has 6" in caplog.text


def test_a_column_that_is_not_there_or_says_something_else_is_refused(tmp_path: Path) -> None:
    source = write_csv(tmp_path)
    with pytest.raises(DataError, match=r"no column 'split'; its columns: smiles, y, part"):
        splits_of_column(source, "split")
    with pytest.raises(
        ConfigError,
        match=r"^task\.split_column: column 'y' of .* says '1' in row 0.* 5 such words in all.*train, valid",
    ):
        splits_of_column(source, "y")


def test_a_column_of_dates_is_answered_with_the_split_by_time(tmp_path: Path) -> None:
    rows = [("CCO", "1", "train"), ("CCN", "2", "2024-05-01"), ("CCF", "3", "2023-01-07")]
    with pytest.raises(
        ConfigError, match=r"says '2024-05-01' in row 1 .* 2 such words .*split=time"
    ):
        splits_of_column(write_csv(tmp_path, rows), "part")


TIMES: dict[str, list[Any]] = {
    "years": [2001 + row for row in range(20)],
    "numbers": [0.5 * row - 3 for row in range(20)],
    "days": [f"2024-05-{row + 1:02}" for row in range(20)],
    "months": [f"{2023 + row // 12}-{row % 12 + 1:02}" for row in range(20)],
    "moments": [f"2024-05-01T00:{row:02}:00" for row in range(20)],
    "zones": [f"2024-05-01 {row:02}:30:00+02:00" for row in range(20)],
}
"""Ascending."""


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("seed", range(3))
def test_the_newest_tenth_is_for_testing_and_that_before_it_for_validation(
    tmp_path: Path, kind: str, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(20)
    smiles = ["C" * (row + 1) for row in range(20)]
    lines = [f"{smiles[row]},{row},{TIMES[kind][row]}" for row in order]
    # Neither what is no molecule nor what has no label takes part.
    lines.insert(3, "not a molecule,1,")
    lines.insert(9, f"CCN,,{TIMES[kind][19]}")
    source = tmp_path / "table.csv"
    source.write_text("\n".join(["smiles,y,when", *lines]) + "\n")
    named = times_of_column(str(source), "when")
    found = parts_of(prepare(str(source), tmp_path / "data"), named)
    expected = ["train"] * 16 + ["valid"] * 2 + ["test"] * 2
    assert [found[text] for text in smiles] == expected


def test_times_in_parquet_files_are_read_too(tmp_path: Path) -> None:
    days = [date(2024, 1, day + 1) for day in range(20)]
    moments = [datetime(2024, 1, day + 1, 12) for day in range(20)]
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"smiles": ["C"] * 20, "day": days, "moment": moments}), path)
    expected = [0] * 16 + [1] * 2 + [2] * 2
    for column in ("day", "moment"):
        named = times_of_column(str(path), column)
        assert named.codes(np.arange(20), [""] * 20).tolist() == expected


def test_numbers_that_are_nan_in_parquet_files_are_missing(tmp_path: Path) -> None:
    """Some libraries write NaN where pandas writes null; all such rows are not of one group."""
    path = tmp_path / "table.parquet"
    years = pa.array(np.array([2019, np.nan, 2020, np.nan, 2019]))
    pq.write_table(pa.table({"smiles": ["C"] * 5, "year": years}), path)
    rows, ids = np.arange(5), [""] * 5
    assert groups_of_column(str(path), "year").codes(rows, ids).tolist() == [0, -1, 1, -1, 0]
    codes = times_of_column(str(path), "year").codes(rows, ids)
    assert (codes == UNNAMED).tolist() == [False, True, False, True, False]


def test_molecules_of_one_time_stay_together_in_the_newer_part() -> None:
    years = np.array([2001.0] * 7 + [2002.0] * 2 + [2003.0])
    rows = np.arange(10)
    split = TimeSplit(years, (0.8, 0.1, 0.1))
    assert split.codes(rows, [""] * 10).tolist() == [0] * 7 + [1] * 2 + [2]
    # With one time more, the limit of validation moves, and that of the test part stays.
    assert split.codes(rows[:-1], [""] * 9).tolist() == [0] * 7 + [2] * 2
    assert split.codes(np.array([0, 10]), [""] * 2).tolist() == [2, UNNAMED]


def test_equal_orders_of_time_have_equal_digests() -> None:
    share = (0.8, 0.1, 0.1)
    one = TimeSplit(np.array([2001.0, np.nan, 2003.0, 2003.0]), share)
    assert one.digest == TimeSplit(np.array([0.5, np.nan, 7.0, 7.0]), share).digest
    for other in ([2001.0, 2002.0, 2003.0, 2003.0], [2001.0, np.nan, 2003.0, 2004.0]):
        assert one.digest != TimeSplit(np.array(other), share).digest


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("31/05/2024", r"says '31/05/2024' in row 1 .*a date \(such as 2024-05-31\) or a number"),
        ("unknown", r"says 'unknown' in row 1 "),
        ("nan", r"says 'nan' in row 1 "),
    ],
)
def test_what_is_no_time_is_named(tmp_path: Path, word: str, told: str) -> None:
    rows = [("CCO", "1", "2024-05-01"), ("CCN", "2", word), ("CCF", "3", "2023-01-07")]
    with pytest.raises(
        ConfigError, match=rf"^task\.split_column: column 'part' .*{told}.*split=time"
    ):
        times_of_column(write_csv(tmp_path, rows), "part")


def test_years_and_dates_do_not_mix(tmp_path: Path) -> None:
    rows = [("CCO", "1", "2024"), ("CCN", "2", "2024-05-01")]
    with pytest.raises(ConfigError, match=r"says '2024-05-01' in row 1 .* a number, as in other"):
        times_of_column(write_csv(tmp_path, rows), "part")


def test_a_molecule_without_a_time_is_told(tmp_path: Path) -> None:
    source = write_csv(tmp_path, [(*row[:2], "" if row[0] == "CCF" else "7") for row in ROWS])
    data = prepare(source, tmp_path / "data")
    with pytest.raises(DataError, match=r"leaves out 1 of 4 .*row 4 .* Say a date or a number for"):
        load_labelled(data, task(), times_of_column(source, "part"))


def test_a_column_of_groups_gives_each_labelled_molecule_its_group(tmp_path: Path) -> None:
    projects = ["A", " B", "A", "C", "B ", "C"]
    source = write_csv(tmp_path, [(*row[:2], of) for row, of in zip(ROWS, projects, strict=True)])
    named = groups_of_column(source, "part")
    data = prepare(source, tmp_path / "data")
    molecules = load_labelled(data, task(), named)
    assert molecules.parts is None
    assert molecules.groups is not None
    expected = {row[0]: "ABC".index(of.strip()) for row, of in zip(ROWS, projects, strict=True)}
    found = dict(zip(molecules.smiles, molecules.groups.tolist(), strict=True))
    assert found == {smiles: expected[smiles] for smiles in found}
    assert set(found.values()) == {0, 1, 2}
    last = molecules.take(np.array([len(molecules) - 1]))
    assert last.groups is not None
    assert last.groups.tolist() == [molecules.groups[-1]]


def test_equal_groups_have_equal_digests_whatever_their_names(tmp_path: Path) -> None:
    def digest(*names: str) -> str:
        rows = [("CCO", "1", name) for name in names]
        return groups_of_column(write_csv(tmp_path, rows), "part").digest

    assert digest("x", "y", "x") == digest("a", "b", "a")
    assert len({digest(*names) for names in ("xyx", "xyy", "xxy", "xyz", ["x", "", "x"])}) == 5


def test_a_molecule_without_a_group_is_told(tmp_path: Path) -> None:
    source = write_csv(tmp_path, [(*row[:2], "" if row[0] == "CCF" else "7") for row in ROWS])
    data = prepare(source, tmp_path / "data")
    with pytest.raises(DataError, match=r"leaves out 1 of 4 .*row 4 .* Say a group for"):
        load_labelled(data, task(), groups_of_column(source, "part"))


def test_rows_of_several_files_and_of_prepared_datasets_are_refused(tmp_path: Path) -> None:
    source = write_csv(tmp_path)
    data = prepare(source, tmp_path / "data" / "prepared")
    with pytest.raises(ConfigError, match=r"is a prepared dataset.*task\.split=given"):
        splits_of_column(data, "part")
    (tmp_path / "more").mkdir()
    write_csv(tmp_path / "more")
    (tmp_path / "more/other.csv").write_text("smiles,part\nC,train\n")
    with pytest.raises(ConfigError, match="has 2"):
        splits_of_column(str(tmp_path / "more"), "part")


def test_equal_splits_have_equal_digests_and_others_do_not(tmp_path: Path) -> None:
    digest = splits_of_column(write_csv(tmp_path), "part").digest
    assert splits_of_column(write_csv(tmp_path), "part").digest == digest
    changed = [*ROWS[:-1], (*ROWS[-1][:2], "test")]
    assert splits_of_column(write_csv(tmp_path, changed), "part").digest != digest
