"""The table of all predictions."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from moleblend_ray.orchestration.library.predict import _write_csv


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Both files have a row 0, and ids may repeat.
        (["a.sdf", "b.sdf"], ["a.sdf", "a.sdf", "b.sdf", "b.sdf"]),
        (["a.sdf", "a.sdf"], None),
        ([None, None], None),
    ],
)
def test_rows_of_several_files_are_told_apart(
    tmp_path: Path, files: list[str | None], expected: list[str] | None
) -> None:
    table = pa.table({"mol_id": ["x", "y"], "source_row": [0, 1], "prediction:y": [1.5, 2.5]})
    parts = []
    for number, file in enumerate(files):
        pq.write_table(table, tmp_path / f"part-{number}.parquet")
        parts.append({"path": f"part-{number}.parquet", "source_uri": file})
    _write_csv(str(tmp_path), {"parts": parts})
    written = pa.csv.read_csv(tmp_path / "predictions.csv")
    assert written["source_row"].to_pylist() == [0, 1, 0, 1]
    if expected is None:
        assert written.column_names == table.column_names
    else:
        assert written.column_names[:3] == ["mol_id", "source_uri", "source_row"]
        assert written["source_uri"].to_pylist() == expected
