"""The files of a source have common labels; empty ones and units that do not agree are told."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from source_files import geometry_table, inspected, records_of, sd_record, smiles_of, with_unit

from moleblend_ray.data.sources import (
    find_sources,
    reading,
)
from moleblend_ray.errors import ConfigError, DataError


def test_directories_and_globs_are_read_in_order_with_all_labels(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.csv").write_text("smiles,y\nC,1\n")
    (tmp_path / "deep" / "c.sdf").write_text(sd_record("x", mu=3))
    (tmp_path / "a.tsv").write_text("smiles\tz\nN\t2\n")
    (tmp_path / "README.md").write_text("no molecules")
    source = inspected(tmp_path)
    assert [Path(layout.file.uri).name for layout in source.layouts] == ["a.tsv", "b.csv", "c.sdf"]
    assert [label.name for label in source.labels] == ["z", "y", "mu"]
    labels = np.array([record.labels for record in records_of(tmp_path)])
    nan = np.nan
    np.testing.assert_array_equal(labels, [[2, nan, nan], [nan, 1, nan], [nan, nan, 3]])
    assert len(find_sources(str(tmp_path / "*.csv"))) == 1


def test_one_label_in_two_units_is_refused(tmp_path: Path) -> None:
    for name, unit in (("a", "eV"), ("b", "hartree")):
        pq.write_table(
            with_unit(geometry_table(gap=[1.0] * 3), "gap", unit), tmp_path / f"{name}.parquet"
        )
    with pytest.raises(
        ConfigError, match=r"'gap' is in eV in .*a\.parquet and in hartree in .*b\.parquet"
    ):
        inspected(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.sdf", b""),
        ("m.sdf", b"\n\n"),
        ("m.csv", b""),
        ("m.csv", b"smiles,y\n"),
        ("m.csv.gz", gzip.compress(b"", mtime=0)),
        ("m.parquet", b""),
    ],
)
def test_an_empty_file_is_told(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: empty, no records"):
        inspected(tmp_path / name)


def test_an_empty_file_among_others_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.csv").write_bytes(b"")
    (tmp_path / "b.csv").write_bytes(b"smiles\nC\n")
    assert smiles_of(records_of(tmp_path)) == ["C"]
    assert "a.csv is empty" in caplog.text


def test_the_sample_of_a_file_with_huge_records_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_SAMPLE_BYTES", 3000)
    path = tmp_path / "m.sdf"
    records = [
        sd_record(f"m{i}", note="x" * 1000, **({"late": i} if i == 9 else {})) for i in range(10)
    ]
    path.write_text("".join(records))
    assert inspected(path).labels == ()
    # A property that is not in the sample may be asked for, as it may come later in the file.
    assert [label.name for label in inspected(path, label_columns=("late",)).labels] == ["late"]
    assert records_of(path, label_columns=("late",))[9].labels.tolist() == [9.0]
