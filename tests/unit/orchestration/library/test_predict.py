"""The table of all predictions."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from moleblend_ray.data.files import storage
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


def test_many_parts_are_read_at_the_same_time_and_written_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [{"path": f"{number}.parquet"} for number in range(4)]
    for number, part in enumerate(parts):
        pq.write_table(pa.table({"source_row": [number], "logp": [1.5]}), tmp_path / part["path"])
    together = threading.Barrier(4, timeout=10.0)
    read_bytes = storage.read_bytes

    def read(uri: str) -> bytes:
        together.wait()
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_bytes", read)
    _write_csv(str(tmp_path), {"parts": parts})
    assert pa.csv.read_csv(tmp_path / "predictions.csv")["source_row"].to_pylist() == [0, 1, 2, 3]
