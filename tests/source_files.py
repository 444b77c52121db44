"""Files of molecules, and what is read of them: for tests of sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from moleblend_ray.chemistry.records import SmilesText
from moleblend_ray.chemistry.rejection import Rejection
from moleblend_ray.data.sources import (
    ColumnConfig,
    RawRecord,
    SourceSet,
    find_sources,
    inspect_sources,
    parse_chunk,
    read_chunks,
)

METHANE = """{title}
     RDKit          3D

  1  0  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
M  END
"""


def sd_record(title: str, **properties: object) -> str:
    tags = "".join(f">  <{name}>\n{value}\n\n" for name, value in properties.items())
    return METHANE.format(title=title) + tags + "$$$$\n"


def inspected(uri: Path | str, **columns: object) -> SourceSet:
    return inspect_sources(find_sources(str(uri)), ColumnConfig(**columns))  # type: ignore[arg-type]


def records_of(uri: Path | str, rows_per_chunk: int = 1000, **columns: object) -> list[RawRecord]:
    """All records of a source, through chunks."""
    found = []
    for index, layout in enumerate(inspected(uri, **columns).layouts):
        for chunk in read_chunks(layout, index, rows_per_chunk):
            parsed = list(parse_chunk(chunk, layout))
            assert len(parsed) == chunk.num_rows
            assert parsed[0].row == chunk.first_row
            found += parsed
    return found


def smiles_of(records: list[RawRecord]) -> list[str | None]:
    return [record.content.smiles for record in records if isinstance(record.content, SmilesText)]


def geometry_table(num_rows: int = 3, **columns: object) -> pa.Table:
    """Rows of two atoms each, in the documented layout."""
    return pa.table(
        {
            "mol_id": [f"m{row}" for row in range(num_rows)],
            "smiles": ["C=O"] * num_rows,
            "n_atoms": pa.array([2] * num_rows, pa.int16()),
            "atomic_numbers": pa.array([[6, 8]] * num_rows, pa.list_(pa.uint8())),
            "formal_charges": pa.array([[0, 0]] * num_rows, pa.list_(pa.int8())),
            "positions": pa.array([[0.0, 0, 0, 1.2, 0, 0]] * num_rows, pa.list_(pa.float32())),
            "bond_begin": pa.array([[0]] * num_rows, pa.list_(pa.int32())),
            "bond_end": pa.array([[1]] * num_rows, pa.list_(pa.int32())),
            "bond_order": pa.array([[2]] * num_rows, pa.list_(pa.int32())),
            **columns,
        }
    )


def with_unit(table: pa.Table, name: str, unit: str) -> pa.Table:
    index = table.schema.get_field_index(name)
    field = table.schema.field(name).with_metadata({"unit": unit})
    return table.cast(table.schema.set(index, field))


LIMIT = 1 << 20
"""Of these tests."""


def assert_too_large(record: RawRecord, size: str) -> None:
    assert isinstance(record.content, Rejection)
    assert record.content.code == "invalid_record"
    expected = f"the record has {size} MiB, more than the 1 MiB that a record may have"
    assert record.content.detail == expected
    assert np.isnan(record.labels).all()
