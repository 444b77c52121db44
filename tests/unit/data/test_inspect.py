"""Inspecting a prepared data set shows its contents, and what is wrong with its files."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moleblend_ray.config.inspect import InspectConfig
from moleblend_ray.data import inspect
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.inspect import DataSetReport, UnfinishedReport, inspect_data_set
from moleblend_ray.data.preparation.assembly import write_manifest
from moleblend_ray.data.preparation.claim import claim_output
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.shard_writer import convert_chunk
from moleblend_ray.data.sources import ColumnConfig, find_sources, inspect_sources, read_chunks
from moleblend_ray.errors import DataError
from moleblend_ray.orchestration.data import show_data
from moleblend_ray.orchestration.progress.terminal import json_text
from moleblend_ray.settings import to_dict

TABLE = (
    "smiles,id,y\nCCO,a,1\nc1ccccc1O,b,>10\nC1CC,c,3\n,d,4\nCCN,e,\nC[Si](C)(C)C,f,6\nC1CCCCC,g,7\n"
)


@pytest.fixture
def prepared(tmp_path: Path) -> str:
    """4 molecules in 2 chunks; 3 rows in the quarantine for 2 reasons."""
    return prepare(tmp_path, finished=True)


def prepare(folder: Path, *, finished: bool, censored_labels: bool = False) -> str:
    source, out = folder / "table.csv", str(folder / "out")
    source.write_text(TABLE)
    options = ConvertOptions(
        columns=ColumnConfig(id_column="id", label_columns=("y",), censored_labels=censored_labels),
        rows_per_chunk=4,
        valid_fraction=0.0,
    )
    sources = inspect_sources(find_sources(str(source)), options.columns)
    claim_output(out, sources, options)
    (layout,) = sources.layouts
    chunks = list(read_chunks(layout, 0, options.rows_per_chunk))
    done = chunks if finished else chunks[:1]
    receipts = [convert_chunk(chunk, layout, sources.labels, options, out) for chunk in done]
    if finished:
        write_manifest(out, sources, options, receipts)
    return out


def test_a_chunk_that_is_missing_or_there_twice_is_no_data_set(tmp_path: Path) -> None:
    source, out = tmp_path / "table.csv", str(tmp_path / "out")
    source.write_text(TABLE)
    options = ConvertOptions(
        columns=ColumnConfig(id_column="id", label_columns=("y",)), rows_per_chunk=2
    )
    sources = inspect_sources(find_sources(str(source)), options.columns)
    (layout,) = sources.layouts
    receipts = [
        convert_chunk(chunk, layout, sources.labels, options, out)
        for chunk in read_chunks(layout, 0, options.rows_per_chunk)
    ]
    before = sorted((tmp_path / "out").rglob("*.parquet"))
    for wrong, told in (
        ([receipts[0], *receipts[2:]], r"chunk 1 should begin at row 2, found chunk 2 at row 4"),
        ([receipts[0], *receipts], r"chunk 1 should begin at row 2, found chunk 0 at row 0"),
        (receipts[1:], r"chunk 0 should begin at row 0, found chunk 1 at row 2"),
    ):
        with pytest.raises(DataError, match=f"Rows are lost: .*{told}"):
            write_manifest(out, sources, options, wrong)
        assert sorted((tmp_path / "out").rglob("*.parquet")) == before
    assert write_manifest(out, sources, options, receipts).counts.rows_in == 7


def report_of(uri: str, **options: object) -> DataSetReport:
    report = inspect_data_set(uri, **options)  # type: ignore[arg-type]
    assert isinstance(report, DataSetReport)
    return report


def shown(uri: str, **settings: object) -> str:
    screen = io.StringIO()
    config = InspectConfig(data=uri, **settings)  # type: ignore[arg-type]
    report = inspect_data_set(uri, verify=config.verify, num_examples=config.examples)
    Console(file=screen, width=100).print(show_data(report))
    return screen.getvalue()


def test_counts_histograms_and_labels_are_those_of_the_molecules(prepared: str) -> None:
    report = report_of(prepared)
    assert (report.counts.rows_in, report.counts.rows_out, report.counts.rows_quarantined) == (
        7,
        4,
        3,
    )
    assert report.splits["train"].molecules == 4
    assert report.splits["quarantine"].molecules == 3
    assert report.counts.atom_count_histogram == {"3": 2, "5": 1, "7": 1}
    assert report.counts.elements == {"C": 4, "N": 1, "O": 2, "Si": 1}
    (label,) = report.labels
    assert (label.name, label.count, label.num_unreadable) == ("y", 2, 1)
    assert report.fingerprint == load_manifest(prepared).fingerprint
    assert report.schema["positions"] == "list<item: float> (angstrom)"


def test_every_reason_of_the_quarantine_comes_with_its_first_rows(prepared: str) -> None:
    quarantine = report_of(prepared, num_examples=1).quarantine
    assert {reason: found.rows for reason, found in quarantine.items()} == {
        "unparsable_smiles": 2,
        "missing_smiles": 1,
    }
    (example,) = quarantine["unparsable_smiles"].examples
    assert (example.source_row, example.excerpt) == (2, "C1CC")
    assert quarantine["missing_smiles"].examples[0].source_row == 3
    assert report_of(prepared, num_examples=0).quarantine["missing_smiles"].examples == ()


def test_examples_of_rare_reasons_are_not_looked_for_in_all_of_a_large_quarantine(
    prepared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(report: DataSetReport) -> list[int]:
        return [row.source_row for row in report.quarantine["unparsable_smiles"].examples]

    assert rows(report_of(prepared)) == [2, 6]
    monkeypatch.setattr(inspect, "_MOST_SEARCHED", 1)
    report = report_of(prepared)
    assert rows(report) == [2]
    assert report.quarantine["unparsable_smiles"].rows == 2


def test_a_manifest_without_histograms_gets_them_from_the_shards(prepared: str) -> None:
    expected = report_of(prepared).counts
    path = Path(prepared) / "manifest.json"
    value = json.loads(path.read_text())
    del value["counts"]["atom_count_histogram"], value["counts"]["elements"]
    path.write_text(json.dumps(value))
    assert report_of(prepared).counts == expected


def test_whole_files_are_verified_on_request_and_sizes_always(prepared: str) -> None:
    train = sorted((Path(prepared) / "train").iterdir())
    content = bytearray(train[0].read_bytes())
    content[len(content) // 2] ^= 1
    train[0].write_bytes(content)
    assert report_of(prepared).damages == ()
    (damage,) = report_of(prepared, verify=True).damages
    assert damage.startswith(f"train/{train[0].name} has SHA-256 ")
    train[0].write_bytes(content[:-1])
    train[1].unlink()
    damages = report_of(prepared).damages
    assert [text.split(" ")[1] for text in damages] == ["has", "is"]
    assert "is missing" in damages[1]


def test_a_damaged_quarantine_does_not_hide_the_rest(prepared: str) -> None:
    for file in (Path(prepared) / "quarantine").iterdir():
        file.unlink()
    report = report_of(prepared)
    assert len(report.damages) == 2
    assert report.counts.rows_quarantined == 3


def test_a_quarantine_that_cannot_be_read_is_damage_beside_the_rest(prepared: str) -> None:
    first, *_ = sorted((Path(prepared) / "quarantine").iterdir())
    flipped = bytearray(first.read_bytes())
    flipped[-6] ^= 0xFF
    first.write_bytes(flipped)
    report = report_of(prepared)
    (damage,) = report.damages
    assert damage.startswith(f"quarantine/{first.name} cannot be read: ")
    assert report.counts.rows_quarantined == 3
    rows = [row.source_row for one in report.quarantine.values() for row in one.examples]
    assert rows
    assert min(rows) >= 4, "those of the file that is whole"


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_damage_in_a_data_set_without_histograms_is_reported(
    prepared: str, missing: bool, verify: bool
) -> None:
    path = Path(prepared) / "manifest.json"
    value = json.loads(path.read_text())
    del value["counts"]["atom_count_histogram"], value["counts"]["elements"]
    path.write_text(json.dumps(value))
    files = sorted((Path(prepared) / "train").iterdir())
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    if missing:
        files[0].unlink()
    report = report_of(prepared, verify=verify)
    damaged = files[:1] if missing and not verify else files
    assert [text.split(" ")[0] for text in report.damages] == [
        f"train/{file.name}" for file in damaged
    ]
    assert report.counts.rows_out == 4
    assert report.counts.elements == {}
    assert "elements" not in shown(prepared)


def test_verification_reports_its_progress_in_bytes(prepared: str) -> None:
    seen: list[tuple[int, int]] = []
    report = report_of(prepared, verify=True, progress=lambda *step: seen.append(step))
    total = sum(split.bytes for split in report.splits.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


def test_an_unfinished_data_set_says_how_far_it_came(tmp_path: Path) -> None:
    report = inspect_data_set(prepare(tmp_path, finished=False))
    assert isinstance(report, UnfinishedReport)
    assert (report.chunks_done, report.rows_in, report.rows_quarantined) == (1, 4, 2)
    text = shown(report.uri)
    assert "unfinished" in text
    assert "1 chunk of 4 rows" in text


def test_a_place_without_a_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a prepared data set"):
        inspect_data_set(str(tmp_path))


def test_the_report_for_people_shows_what_they_look_for(prepared: str) -> None:
    text = shown(prepared)
    for part in (
        "7 rows in = 4 molecules out + 3 quarantined",
        "atoms per molecule: 3 to 7, mean 4.5",
        "Si 25 %",
        "unparsable_smiles",
        "C1CCCCC",
        "every file is there",
    ):
        assert part in text


def test_bounds_have_a_column_where_they_are_kept(tmp_path: Path) -> None:
    (tmp_path / "censored").mkdir()
    for folder, kept in ((tmp_path, False), (tmp_path / "censored", True)):
        lines = shown(prepare(folder, finished=True, censored_labels=kept)).splitlines()
        cells = [line.split() for line in lines]
        (head,) = [row for row in cells if row[:2] == ["label", "unit"]]
        (row,) = [row for row in cells if row[:1] == ["y"]]
        # The column has no unit; of its 4 molecules 2 have a number, and one has >10.
        assert ("bounds" in head) == kept
        assert row == ["y", "2", "50", "%", "1"]


def test_damage_stands_at_the_end_of_the_report(prepared: str) -> None:
    next((Path(prepared) / "train").iterdir()).unlink()
    assert "1 file damaged" in shown(prepared).splitlines()[-3]


def test_json_holds_the_whole_report(prepared: str) -> None:
    assert json.loads(json_text(report_of(prepared))) == json.loads(
        json.dumps(to_dict(report_of(prepared)))
    )


def test_the_counts_of_a_report_are_a_manifest_s(prepared: str) -> None:
    manifest = load_manifest(prepared)
    assert dataclasses.asdict(report_of(prepared).counts) == dataclasses.asdict(manifest.counts)
