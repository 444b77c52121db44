"""What reading and parsing exchange."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.chemistry.molecule import Rejection, SourceRecord

Format = Literal["sdf", "csv", "tsv", "smi", "xyz", "parquet"]
"""``smi``: lines of a SMILES and a name. ``xyz``: files in the layout of QM9, in an archive."""

Container = Literal["tar", "zip"]

EXCERPT_CHARACTERS: Final = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnConfig:
    """Which columns (or SD properties) mean what."""

    smiles_column: str = "smiles"
    """Column with the SMILES in tables."""
    id_column: str | None = None
    """Column or SD property with the molecule's id. None: ``mol_id`` of a Parquet table that has it, the title
    of an SD record, the name after a SMILES, the id column of a known published table, else file name and row."""
    label_columns: tuple[str, ...] | None = None
    """Columns or SD properties to keep as labels. None: every other numeric one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of a source, or the members of one archive that hold molecules, read one after the other."""

    uri: str
    format: Format
    """Of the records; of an archive, of its members."""
    size: int
    """Bytes, those of ``geometry`` included."""
    probe: str
    """SHA-256 of the first and last 64 KiB and the size: tells whether the file, or one that it is read with, has
    changed."""
    container: Container | None = None
    """Kind of archive, None for a plain file. Compression by gzip, bzip2, xz or zstd is seen in the content."""
    members: str = "*"
    """Glob of the members of an archive that are meant."""
    geometry: SourceFile | None = None
    """SD records that belong to the rows of this table, record i to row i; there may be fewer of them."""
    exclusions: str | None = None
    """URI of the publisher's list of molecules not to use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLayout:
    """How to read and parse one file; small, and sent to every process that does."""

    file: SourceFile
    columns: tuple[str, ...]
    """Columns of a table in order, or the SD properties seen in the sample."""
    smiles_column: str | None
    """None where the file needs none: SD files and tables with geometry only."""
    id_column: str | None
    labels: tuple[str, ...]
    """Labels of the whole source, in the order of the shards' columns; this file may lack some."""
    own_labels: tuple[str, ...]
    """Those that this file has."""
    has_geometry: bool
    """A Parquet table with atoms, bonds and positions."""

    @property
    def is_plain_text(self) -> bool:
        """Whether a record is one run of bytes as it stands in the file."""
        file = self.file
        return file.format not in ("parquet", "xyz") and not (file.geometry or file.exclusions)


class LabelColumn(NamedTuple):
    """A label found in a source."""

    name: str
    unit: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSet:
    """All files of a source with what is known before reading them."""

    layouts: tuple[SourceLayout, ...]
    labels: tuple[LabelColumn, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowChunk:
    """Consecutive raw records of one file."""

    file_index: int
    """Index of the file in the source."""
    chunk_index: int
    """Index of the chunk in its file."""
    first_row: int
    """Index of the first record in the file."""
    num_rows: int
    payload: bytes
    """Records as they stand in the file (without the header) if ``SourceLayout.is_plain_text``, else an Arrow stream:
    of Parquet rows, or of ``reading.RECORD_SCHEMA``."""

    def digest(self) -> str:
        """Identity of the raw content."""
        return hashlib.blake2b(self.payload, digest_size=16).hexdigest()


class RawRecord(NamedTuple):
    """One source record, not yet a molecule."""

    row: int
    """Index in the file."""
    mol_id: str | None
    """None if the record gives none."""
    content: SourceRecord | Rejection
    """What the molecule is to be made of, or why there is nothing."""
    labels: NDArray[np.float64]
    """(L,) in the order of ``SourceLayout.labels``; NaN where missing."""
    unreadable: tuple[str, ...]
    """Labels whose cell holds something that is not a finite number."""
    excerpt: str
    """The record's SMILES, or its beginning."""
