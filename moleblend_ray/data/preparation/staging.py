"""Staged molecules: rows of shards with the columns that will place them, or tell that they are duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.data.preparation.splits import seed_key, text_hashes
from moleblend_ray.relations.hashing import keyed_hash

KEY: Final = "_key"
POSITION: Final = "_position"
SPLIT: Final = "_split"
RANK: Final = "_rank"
INCHIKEY: Final = "_inchikey"

_PLACE_FIELDS: Final = (
    pa.field(KEY, pa.uint64()),
    pa.field(POSITION, pa.int64()),
    pa.field(SPLIT, pa.uint8()),
)
_IDENTITY_FIELDS: Final = (pa.field(RANK, pa.uint8()), pa.field(INCHIKEY, pa.string()))

IDENTITY_SCHEMA: Final = pa.schema(
    [pa.field("mol_id", pa.string()), *_PLACE_FIELDS[:2], *_IDENTITY_FIELDS]
)
"""The columns of staged molecules that tell which are duplicates."""

_ROW_BITS: Final = 40
"""A position is ``file_index << 40 | row``."""

_Rows = TypeVar("_Rows", int, NDArray[np.int64])


def position_of(file_index: int, rows: _Rows) -> _Rows:
    """Position in the source: a number that sorts by file, then by row."""
    return (file_index << _ROW_BITS) | rows


def place_of(position: int) -> tuple[int, int]:
    """File and row of a position in the source."""
    return divmod(position, 1 << _ROW_BITS)


def staged_table(
    molecules: pa.Table,
    file_index: int,
    split_codes: NDArray[np.uint8],
    inchikeys: Sequence[str | None] | None,
    seed: int,
) -> pa.Table:
    """Rows of a shard with the columns that place them; with ``inchikeys`` equal molecules get equal keys."""
    rows = molecules["source_row"].to_numpy()
    keys = keyed_hash(seed, file_index, rows)
    columns = [pa.array(position_of(file_index, rows)), pa.array(split_codes)]
    if inchikeys is not None:
        known = np.array([key is not None for key in inchikeys], dtype=np.bool_)
        keys = keys.copy()
        keys[known] = text_hashes([key for key in inchikeys if key is not None], seed_key(seed))
        columns += [pa.array(_ranks(molecules)), pa.array(inchikeys, pa.string())]
    schema = staged_schema(molecules.schema, deduplicate=inchikeys is not None)
    return pa.table([*molecules.columns, pa.array(keys), *columns], schema=schema)


def staged_schema(molecules: pa.Schema, *, deduplicate: bool) -> pa.Schema:
    """The schema of :func:`staged_table` for shards of the schema ``molecules``."""
    return pa.schema([*molecules, *_PLACE_FIELDS, *(_IDENTITY_FIELDS if deduplicate else ())])


def _ranks(molecules: pa.Table) -> NDArray[np.uint8]:
    """Which of equal molecules to keep, lowest rank first: with geometry from the source, made here, or without."""
    from_source = np.array(molecules["conformer_status"].to_pylist(), dtype=object) == "source"
    has_any = molecules["num_conformers"].to_numpy() > 0
    return np.where(from_source & has_any, 0, np.where(has_any, 1, 2)).astype(np.uint8)
