"""The types that finding, reading and parsing of sources exchange."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.chemistry.config import SMILES_COLUMN
from moleblend_ray.chemistry.records import SourceRecord
from moleblend_ray.chemistry.rejection import Rejection
from moleblend_ray.data.dataset.manifest import LabelColumn
from moleblend_ray.data.sources.classes import ClassLabel

Format = Literal["sdf", "csv", "tsv", "semicolon", "smi", "xyz", "parquet"]
"""``semicolon``: CSV with semicolons, as spreadsheets write it in many countries. ``smi``: lines with a SMILES and a
name. ``xyz``: files in the layout of QM9, in an archive."""

Container = Literal["tar", "zip"]

EXCERPT_CHARACTERS: Final = 200
"""Most characters of a record that the quarantine shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnConfig:
    """Which columns (or SD properties) hold SMILES, identifiers and labels."""

    smiles_column: str = SMILES_COLUMN
    """Column of a table with the SMILES."""
    id_column: str | None = None
    """Column or SD property with the molecule's id. None: the title of an SD record, the name after a SMILES, the id
    column of a known published table, or ``mol_id`` of a Parquet table; where there is none, file name and row."""
    label_columns: tuple[str, ...] | None = None
    """Columns or SD properties to keep as labels. None: all other numeric ones."""
    censored_labels: bool = False
    """Whether to keep bounds such as ``>10`` in label columns, beside the labels."""
    relation_column: str | None = None
    """With ``censored_labels``: column or SD property that says of all labels of a record whether they are bounds (``>``,
    ``<``, ``=``)."""
    classes: tuple[str, ...] = ()
    """Words of classes that ``label_columns`` hold instead of numbers; () if they hold numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of a source: a plain file, or the members with molecules of an archive, read one after the other."""

    uri: str
    format: Format
    """Format of the file, or of the members of the archive."""
    size: int
    """Bytes, including those of ``geometry``."""
    probe: str
    """SHA-256 of the first and last 64 KiB and the size, which detects most changes of the file and of those that are
    read with it."""
    container: Container | None = None
    """Kind of archive; None for a plain file. (Compression by gzip, bzip2, xz or zstd is detected in the content.)"""
    members: str = "*"
    """Glob that selects members of an archive."""
    geometry: SourceFile | None = None
    """SD records that belong to the rows of this table, record i to row i; there may be fewer records than rows."""
    exclusions: str | None = None
    """URI of the publisher's list of molecules that should not be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLayout:
    """How to read and parse one file; small, as it is sent to every process that does so."""

    file: SourceFile
    columns: tuple[str, ...]
    """Columns of a table in order, or the SD properties in the sample."""
    smiles_column: str | None
    """None if the file needs none: for SD files, and for tables with geometry but no SMILES."""
    id_column: str | None
    labels: tuple[str, ...]
    """Labels of the whole source, in the order of the shards' columns; this file may lack some."""
    own_labels: tuple[str, ...]
    """The labels that this file has."""
    has_geometry: bool
    """Whether the file is a Parquet table with atoms, bonds and positions."""
    censored: bool = False
    """Whether bounds are kept beside labels."""
    relation_column: str | None = None
    """Column that says which labels are bounds; None: only their cells do."""
    class_labels: tuple[ClassLabel, ...] = ()
    """How each of ``labels`` follows from classes; () if columns hold the labels themselves."""

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of this file that hold labels."""
        if not self.class_labels:
            return self.own_labels
        own = set(self.own_labels)
        return tuple(dict.fromkeys(one.column for one in self.class_labels if one.name in own))

    @property
    def holds_atoms(self) -> bool:
        """Whether records hold atoms and bonds, perhaps with positions, and are much longer than a SMILES."""
        file = self.file
        return file.format in ("sdf", "xyz") or file.geometry is not None or self.has_geometry

    @property
    def is_plain_text(self) -> bool:
        """Whether a record is a piece of the file's text and nothing else."""
        file = self.file
        return file.format not in ("parquet", "xyz") and not (file.geometry or file.exclusions)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSet:
    """All files of a source with their layouts and labels."""

    layouts: tuple[SourceLayout, ...]
    labels: tuple[LabelColumn, ...]
    labels_without_values: tuple[str, ...] = ()
    """Labels of which no record of any file holds a number, or a class, as far as the files are short enough to tell before they
    are read."""
    words: tuple[str, ...] = ()
    """Some different texts that the columns of these labels hold instead."""
    classes: tuple[str, ...] = ()
    """As asked for."""


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
    is_text: bool
    """Whether the payload is the text of its records, one after the other."""
    payload: bytes
    """The bytes of the file (without the header) if ``is_text``, else an Arrow stream of Parquet rows or of
    ``reading.RECORD_SCHEMA``."""

    def digest(self, layout: SourceLayout) -> str:
        """Digest of all that decides what is made of the chunk: its bytes, its place in the file, and how they are read."""
        read_as: tuple[Any, ...] = (
            self.first_row,
            self.num_rows,
            self.is_text,
            layout.columns,
            layout.smiles_column,
            layout.id_column,
            layout.labels,
            layout.own_labels,
            layout.has_geometry,
        )
        # Chunks without bounds have the digests of earlier versions, whose unfinished data sets can be continued.
        if layout.censored:
            read_as += (layout.relation_column,)
        if layout.class_labels:
            read_as += tuple((one.column, list(one.values.items())) for one in layout.class_labels)
        content = hashlib.blake2b(json.dumps(read_as).encode(), digest_size=16)
        content.update(self.payload)
        return content.hexdigest()


class RawRecord(NamedTuple):
    """One source record, not yet a molecule."""

    row: int
    """Index in the file."""
    mol_id: str | None
    """None if the record has none."""
    content: SourceRecord | Rejection
    """What the molecule is made from, or why the record is rejected."""
    labels: NDArray[np.float64]
    """(L,), in the order of ``SourceLayout.labels``; NaN where missing."""
    unreadable: tuple[str, ...]
    """Labels whose cell holds something that is not a finite number."""
    excerpt: str
    """The record's SMILES, or the beginning of the record."""
    bounds: NDArray[np.float64] | None = None
    """(2, L) the least and the greatest value that labels can have of which the record tells only a bound, NaN where it
    tells none; None if the layout does not keep bounds."""
