"""The files of a prepared data set: their Parquet schemas, and how they are written and checked.

See ``docs/data-format.md``. Needs neither RDKit nor ``chemistry``.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from moleblend_ray.data.dataset.manifest import LabelColumn, Manifest, ShardInfo, format_version_of
from moleblend_ray.data.files import storage
from moleblend_ray.errors import DataError

LABEL_PREFIX: Final = "label:"
AT_LEAST_PREFIX: Final = "at_least:"
"""Of a column with lower bounds of a label, null for molecules that have none (or a label)."""
AT_MOST_PREFIX: Final = "at_most:"
"""Of a column with upper bounds."""

DUPLICATE: Final = "duplicate"
"""Quarantine reason: another record of the same InChIKey is kept (``deduplicate``)."""

NOT_IN_SPLIT_FILE: Final = "not_in_split_file"
"""Quarantine reason: the split file names the record in no split."""

MOLECULE_FIELDS: Final = (
    pa.field("mol_id", pa.string()),
    pa.field("source_row", pa.int64()),
    pa.field("smiles", pa.string()),
    pa.field("conformer_status", pa.string()),
    pa.field("conformer_detail", pa.string()),
    pa.field("conformer_energies", pa.list_(pa.float32()), metadata={"unit": "kcal/mol"}),
    pa.field("num_atoms", pa.uint16()),
    pa.field("atom_features", pa.list_(pa.uint8())),
    pa.field("bonds", pa.list_(pa.uint16())),
    pa.field("bond_features", pa.list_(pa.uint8())),
    pa.field("num_conformers", pa.uint8()),
    pa.field("positions", pa.list_(pa.float32()), metadata={"unit": "angstrom"}),
    pa.field("position_mask", pa.list_(pa.bool_())),
)
"""Columns of every shard, before its label columns. The graph columns are adjacent, so one range read fetches them."""

_SINCE_VERSION_2: Final = frozenset({"conformer_detail", "conformer_energies"})

DESCRIPTOR_FIELD: Final = pa.field("descriptors", pa.list_(pa.float32()))
"""``vocabulary.NUM_DESCRIPTORS`` numbers per molecule, NaN where unknown; in data sets with ``featurize.descriptors``."""

GRAPH_COLUMNS: Final = (
    "num_atoms",
    "atom_features",
    "bonds",
    "bond_features",
    "num_conformers",
    "positions",
    "position_mask",
)
"""The columns that a model needs."""

QUARANTINE_SCHEMA: Final = pa.schema(
    [
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("mol_id", pa.string()),
        pa.field("excerpt", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
    ]
)
"""One row per source row that is in no shard: where it is, what it looks like, why it was rejected."""

_DICTIONARY_COLUMNS: Final = (
    "conformer_status",
    "conformer_detail",
    "num_atoms",
    "atom_features.list.element",
    "bonds.list.element",
    "bond_features.list.element",
    "num_conformers",
)
"""Columns with few distinct values: with a dictionary they are smaller and decode in two thirds of the time."""

_EXCERPT_CHARACTERS: Final = 200

PARQUET_MAGIC: Final = b"PAR1"
"""The last bytes of every Parquet file."""


def training_columns(manifest: Manifest) -> tuple[str, ...]:
    """The columns that pretraining reads: those of the graph, and descriptors if the data set has them."""
    return (*GRAPH_COLUMNS, *([DESCRIPTOR_FIELD.name] if manifest.descriptors else []))


def manifest_schema(manifest: Manifest) -> pa.Schema:
    """The schema of the shards of a data set."""
    return shard_schema(
        [label.column for label in manifest.labels],
        manifest.format_version,
        descriptors=manifest.descriptors is not None,
    )


def shard_schema(
    labels: Sequence[LabelColumn],
    format_version: int | None = None,
    *,
    descriptors: bool = False,
) -> pa.Schema:
    """The schema of a shard with these labels in a version of the format; None: that of new data sets."""
    if format_version is None:
        format_version = format_version_of(labels)
    prefixed = [(LABEL_PREFIX, label) for label in labels]
    for prefix in (AT_LEAST_PREFIX, AT_MOST_PREFIX):
        prefixed += [(prefix, label) for label in labels if label.censored]
    label_fields = [
        pa.field(
            prefix + label.name, pa.float64(), metadata={"unit": label.unit} if label.unit else None
        )
        for prefix, label in prefixed
    ]
    absent = _SINCE_VERSION_2 if format_version < 2 else ()
    fields = [field for field in MOLECULE_FIELDS if field.name not in absent]
    # Next to the graph columns, so that one range read fetches these as well.
    fields += [DESCRIPTOR_FIELD] if descriptors else []
    return pa.schema(
        [*fields, *label_fields],
        metadata={"moleblend.format_version": str(format_version)},
    )


def encode_shard(table: pa.Table, row_group_rows: int) -> bytes:
    """The table as the bytes of a Parquet file, the same for equal tables and the same version of pyarrow."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        compression="zstd",
        write_statistics=False,
        write_page_checksum=True,
        use_dictionary=list(_DICTIONARY_COLUMNS) if "num_atoms" in table.column_names else False,
        store_schema=True,
    )
    return bytes(sink.getvalue())


def read_file(uri: str, shard: ShardInfo) -> bytes:
    """The content of a file of the data set ``uri``; DataError if size or SHA-256 are not those of the manifest."""
    content = read_shard_range(uri, shard, 0, shard.num_bytes + 1)
    if len(content) != shard.num_bytes:
        raise damaged_shard(uri, shard, f"it has not the {shard.num_bytes} bytes of the manifest")
    found = storage.sha256_bytes(content)
    if found != shard.sha256:
        raise damaged_shard(uri, shard, f"its SHA-256 is {found}, not {shard.sha256}")
    return content


def read_shard_range(uri: str, shard: ShardInfo, offset: int, length: int) -> bytes:
    """Up to ``length`` bytes of a file of the data set ``uri``; DataError if it does not exist."""
    try:
        return storage.read_range(storage.join(uri, shard.path), offset, length)
    except storage.NotFoundError as error:
        raise damaged_shard(uri, shard, "it does not exist") from error


def damaged_shard(uri: str, shard: ShardInfo, reason: str) -> DataError:
    """The error about a file of the data set ``uri`` that is not as its manifest says."""
    return DataError(
        f"Shard {shard.path} of {uri} is missing or damaged: {reason}. "
        "Restore it, or prepare the data set again in an empty directory."
    )


def footer_crc32(content: bytes) -> int | None:
    """CRC-32 of a Parquet file from its footer to its end; None for other files.

    ``content`` is the file, or its end from the footer on at least. Parquet's own checksums cover pages only, and
    Arrow does not check the footer: a flipped bit there can end the process (an exception that its C++ threads do not
    catch) or change numbers without an error.
    """
    if content[-4:] != PARQUET_MAGIC:
        return None
    return zlib.crc32(content[-footer_bytes(content) :])


def footer_bytes(content: bytes) -> int:
    """Bytes of a Parquet file from its footer to its end, as the file itself states."""
    return int.from_bytes(content[-8:-4], "little") + 8


def quarantined_molecules(
    molecules: pa.Table, source_uris: Sequence[str], reason: str, details: Sequence[str]
) -> pa.Table:
    """Rows of the quarantine for molecules that are sound, but left out of the data set."""
    count = molecules.num_rows
    excerpts = [text[:_EXCERPT_CHARACTERS] for text in molecules["smiles"].to_pylist()]
    columns = {
        "source_uri": list(source_uris),
        "source_row": molecules["source_row"],
        "mol_id": molecules["mol_id"],
        "excerpt": excerpts,
        "reason": [reason] * count,
        "detail": list(details),
    }
    return pa.table(columns, schema=QUARANTINE_SCHEMA)
