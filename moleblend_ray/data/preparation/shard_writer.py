"""A chunk of raw records -> shards of featurized molecules, a part of the quarantine, and a receipt.

The content of a chunk's files depends only on its raw bytes, the layout and the options, so converting a chunk twice
gives the same bytes. The receipt is written after the files and states their sizes and checksums; a chunk with a valid
receipt is not converted again. If molecules of different chunks must be brought together (``shuffle``), the chunk's
molecules are staged instead of becoming shards. Module ``assembly`` makes the manifest of all receipts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.descriptors import stored_descriptors
from moleblend_ray.chemistry.inchi import inchi_keys
from moleblend_ray.chemistry.molecule import Molecule, molecules_from_records
from moleblend_ray.chemistry.rejection import Rejection, RejectionCode
from moleblend_ray.data.dataset.dataset_files import (
    QUARANTINE_DIR,
    SPLITS,
    ids_path,
    part_name,
    receipt_uri,
    shard_path,
    staged_path,
)
from moleblend_ray.data.dataset.manifest import LabelColumn, ShardInfo
from moleblend_ray.data.dataset.shards import (
    DESCRIPTOR_FIELD,
    NOT_IN_SPLIT_FILE,
    QUARANTINE_SCHEMA,
    quarantined_molecules,
    shard_schema,
)
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.receipts import (
    IDS,
    STAGED,
    Receipt,
    Statistics,
    shard_info,
    write_part,
)
from moleblend_ray.data.preparation.segments import encode_segment
from moleblend_ray.data.preparation.splits import UNNAMED, NamedSplits, hashed_splits, text_hashes
from moleblend_ray.data.preparation.staging import staged_table
from moleblend_ray.data.sources import (
    RawRecord,
    RowChunk,
    SourceFile,
    SourceLayout,
    parse_chunk,
)
from moleblend_ray.errors import DataError, without_credentials
from moleblend_ray.relations.geometry import closest_pair_distances

Tell = Callable[[int], None]
"""Hears of that many more records that were taken to be featurized."""

_TELL_S: Final = 1.0
"""Seconds between two such calls at least."""

OVERLAP_ANGSTROM: Final = 0.4
"""Atoms closer than this overlap: the shortest bond that exists, H-H, is 0.74 angstrom long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Featurized:
    """A chunk's records as molecules and rejections."""

    molecules: pa.Table
    """Schema ``shards.shard_schema``, in source order."""
    quarantine: pa.Table
    """Schema ``shards.QUARANTINE_SCHEMA``, in source order."""
    unreadable_labels: dict[str, int]
    """Label -> molecules whose cell held something that is not a number."""


def convert_chunk(
    chunk: RowChunk,
    layout: SourceLayout,
    labels: Sequence[LabelColumn],
    options: ConvertOptions,
    out: str,
    named_splits: NamedSplits | None = None,
    tell: Tell | None = None,
) -> Receipt:
    """Featurize a chunk and write its shards or staged molecules, its part of the quarantine, and last its receipt.

    ``named_splits`` is the content of the split file of ``options``. DataError if it does not name one of the
    molecules and ``options`` say that it must. ``tell`` hears of records while they are featurized.
    """
    done = featurize_chunk(chunk, layout, labels, options.featurize, tell)
    molecules, quarantine, codes = _into_splits(done, layout.file, options, named_splits)
    name = part_name(chunk.file_index, chunk.chunk_index)
    files = write_part(
        out, shard_path(QUARANTINE_DIR, name), QUARANTINE_DIR, quarantine, options.row_group_rows
    )
    files.append(_write_ids(out, name, molecules))
    keys: list[str | None] | None = None
    if options.deduplicate != "none":
        keys = inchi_keys(molecules["smiles"].to_pylist(), options.featurize.timeout_s)
    staged = None
    if options.needs_exchange:
        staged = staged_table(molecules, chunk.file_index, codes, keys, options.shuffle_seed)
        files.append(_write_staged(out, chunk, staged))
    else:
        for code, split in enumerate(SPLITS):
            part = molecules.filter(pa.array(codes == code))
            files += write_part(out, shard_path(split, name), split, part, options.row_group_rows)
    receipt = Receipt(
        file_index=chunk.file_index,
        chunk_index=chunk.chunk_index,
        first_row=chunk.first_row,
        digest=chunk.digest(layout),
        rows_in=chunk.num_rows,
        files=tuple(files),
        quarantined_by_reason=dict(Counter(quarantine["reason"].to_pylist())),
        unreadable_labels=done.unreadable_labels,
        without_inchikey=keys.count(None) if keys is not None else 0,
        memory_bytes=staged.nbytes if staged is not None else 0,
        statistics=Statistics.of(molecules) if staged is None else Statistics(),
    )
    storage.write_json(receipt_uri(out, chunk.file_index, chunk.chunk_index), receipt.to_json())
    return receipt


def _into_splits(
    done: Featurized,
    file: SourceFile,
    options: ConvertOptions,
    named_splits: NamedSplits | None,
) -> tuple[pa.Table, pa.Table, NDArray[np.uint8]]:
    """Molecules, quarantine and the split codes of the molecules; what the split file does not name may be moved."""
    molecules, quarantine = done.molecules, done.quarantine
    if named_splits is None:
        smiles = molecules["smiles"].to_pylist()
        codes = hashed_splits(
            smiles, options.valid_fraction, options.test_fraction, options.split_seed
        )
        return molecules, quarantine, codes
    rows, mol_ids = molecules["source_row"].to_numpy(), molecules["mol_id"].to_pylist()
    codes = named_splits.codes(rows, mol_ids)
    unnamed = codes == UNNAMED
    if not unnamed.any():
        return molecules, quarantine, codes
    if options.split_file_unnamed == "train":
        codes[unnamed] = SPLITS.index("train")
        return molecules, quarantine, codes
    if options.split_file_unnamed == "error":
        first = int(np.argmax(unnamed))
        raise named_splits.unnamed_error(f"row {rows[first]} of {file.uri}", mol_ids[first])
    refused = molecules.filter(pa.array(unnamed))
    uris = [without_credentials(file.uri)] * refused.num_rows
    details = ["the split file names it in no split"] * refused.num_rows
    added = quarantined_molecules(refused, uris, NOT_IN_SPLIT_FILE, details)
    quarantine = pa.concat_tables([quarantine, added]).sort_by("source_row")
    return molecules.filter(pa.array(~unnamed)), quarantine, codes[~unnamed]


def _write_ids(out: str, name: str, molecules: pa.Table) -> ShardInfo:
    """Write a hash (little-endian uint64) of each molecule's id, with which repeated ids are counted."""
    path = ids_path(name)
    content = text_hashes(molecules["mol_id"].to_pylist()).astype("<u8").tobytes()
    storage.write_bytes(storage.join(out, path), content)
    return shard_info(path, IDS, molecules.num_rows, content)


def _write_staged(out: str, chunk: RowChunk, staged: pa.Table) -> ShardInfo:
    path = staged_path(chunk.file_index, chunk.chunk_index)
    content = encode_segment(staged)
    storage.write_bytes(storage.join(out, path), content)
    return shard_info(path, STAGED, staged.num_rows, content)


def featurize_chunk(
    chunk: RowChunk,
    layout: SourceLayout,
    labels: Sequence[LabelColumn],
    config: FeaturizeConfig,
    tell: Tell | None = None,
) -> Featurized:
    """The chunk's records as rows of a shard, and the rejected ones, with reasons, as rows of the quarantine."""
    records = list(parse_chunk(chunk, layout))
    if len(records) != chunk.num_rows:
        raise DataError(
            f"{layout.file.uri}: the chunk at record {chunk.first_row} was read as {chunk.num_rows} records "
            f"and parsed as {len(records)}. Please report this with the file."
        )
    return featurize_records(records, layout.file.uri, labels, config, tell)


def featurize_records(
    parsed: Sequence[RawRecord],
    uri: str,
    labels: Sequence[LabelColumn],
    config: FeaturizeConfig,
    tell: Tell | None = None,
) -> Featurized:
    """Records of the source ``uri`` as rows of a shard, and the rejected ones as rows of the quarantine."""
    waiting = parsed if tell is None else _told(parsed, tell)
    outcomes = molecules_from_records((record.content for record in waiting), config)
    records: list[RawRecord] = []
    molecules: list[Molecule] = []
    rejected: list[tuple[RawRecord, Rejection]] = []
    for record, outcome in zip(parsed, outcomes, strict=True):
        if isinstance(outcome, Rejection):
            rejected.append((record, outcome))
        else:
            records.append(record)
            molecules.append(outcome)
    closest = _closest_distances(molecules)
    overlapping = closest < OVERLAP_ANGSTROM
    for index in np.flatnonzero(overlapping):
        detail = f"two atoms are {closest[index]:.3g} angstrom apart"
        rejection = Rejection(code=RejectionCode.OVERLAPPING_ATOMS, detail=detail)
        rejected.append((records[index], rejection))
    kept = np.flatnonzero(~overlapping)
    records, molecules = [records[i] for i in kept], [molecules[i] for i in kept]
    rejected.sort(key=lambda pair: pair[0].row)
    return Featurized(
        molecules=_molecule_table(records, molecules, uri, labels, config),
        quarantine=_quarantine_table(rejected, uri),
        unreadable_labels=dict(Counter(name for record in records for name in record.unreadable)),
    )


def _told(records: Sequence[RawRecord], tell: Tell) -> Iterator[RawRecord]:
    """The records, of which ``tell`` hears as they are taken."""
    told, told_s = 0, time.monotonic()
    for count, record in enumerate(records):
        if time.monotonic() - told_s >= _TELL_S:
            tell(count - told)
            told, told_s = count, time.monotonic()
        yield record
    tell(len(records) - told)


def _closest_distances(molecules: Sequence[Molecule]) -> NDArray[np.float32]:
    """(M,), the smallest distance between two atoms in any conformer of each molecule; inf if there is none."""
    conformers = [molecule.num_conformers for molecule in molecules]
    if not sum(conformers):
        return np.full(len(molecules), np.inf, dtype=np.float32)
    num_atoms = np.repeat([molecule.num_atoms for molecule in molecules], conformers)
    distances = closest_pair_distances(
        num_atoms.astype(np.int32),
        np.concatenate([molecule.positions.reshape(-1, 3) for molecule in molecules]),
        np.concatenate([molecule.position_mask.reshape(-1) for molecule in molecules]),
    )
    closest = np.full(len(molecules), np.inf, dtype=np.float32)
    np.minimum.at(closest, np.repeat(np.arange(len(molecules)), conformers), distances)
    return closest


def _row_id(record: RawRecord, uri: str) -> str:
    """The record's own id, or else one made of file name and row."""
    stem = storage.name_of(uri).split(".", 1)[0]
    return record.mol_id if record.mol_id is not None else f"{stem}_{record.row}"


def _molecule_table(
    records: Sequence[RawRecord],
    molecules: Sequence[Molecule],
    uri: str,
    labels: Sequence[LabelColumn],
    config: FeaturizeConfig,
) -> pa.Table:
    schema = shard_schema(labels, descriptors=config.descriptors)
    columns: dict[str, Any] = {
        "mol_id": [_row_id(record, uri) for record in records],
        "source_row": [record.row for record in records],
        "smiles": [molecule.smiles for molecule in molecules],
        "conformer_status": [str(molecule.conformer_status) for molecule in molecules],
        "conformer_detail": [molecule.conformer_detail for molecule in molecules],
        "conformer_energies": [molecule.conformer_energies for molecule in molecules],
        "num_atoms": [molecule.num_atoms for molecule in molecules],
        "atom_features": [molecule.atom_features for molecule in molecules],
        "bonds": [molecule.bonds for molecule in molecules],
        "bond_features": [molecule.bond_features for molecule in molecules],
        "num_conformers": [molecule.num_conformers for molecule in molecules],
        "positions": [molecule.positions for molecule in molecules],
        "position_mask": [molecule.position_mask for molecule in molecules],
    }
    if config.descriptors:
        # One row each, as the arrays of the other columns of lists.
        described = stored_descriptors(columns["smiles"], config.timeout_s)
        columns[DESCRIPTOR_FIELD.name] = list(described)
    arrays = [
        _list_array(columns[field.name], field.type)
        if pa.types.is_list(field.type)
        else pa.array(columns[field.name], field.type)
        for field in schema
        if field.name in columns
    ]
    values = np.array([record.labels for record in records]).reshape(len(records), len(labels))
    arrays += [pa.array(column, pa.float64(), from_pandas=True) for column in values.T]
    arrays += _bound_arrays(records, labels)
    return pa.table(arrays, schema=schema)


def _bound_arrays(records: Sequence[RawRecord], labels: Sequence[LabelColumn]) -> list[pa.Array]:
    """The columns of lower bounds of all labels that have bounds, then those of upper bounds."""
    censored = [index for index, label in enumerate(labels) if label.censored]
    # Records of formats without labels tell no bounds either.
    none = np.full((2, len(labels)), np.nan)
    found = [none if record.bounds is None else record.bounds for record in records]
    bounds = np.array(found).reshape(len(records), 2, len(labels))
    return [
        pa.array(bounds[:, side, index], pa.float64(), from_pandas=True)
        for side in range(2)
        for index in censored
    ]


def _list_array(parts: Sequence[NDArray[Any]], kind: pa.DataType) -> pa.Array:
    """A column of lists, one per array, which is flattened."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum([part.size for part in parts], out=offsets[1:])
    dtype = kind.value_type.to_pandas_dtype()
    flat = np.concatenate([part.reshape(-1) for part in parts]) if parts else np.empty(0, dtype)
    return pa.ListArray.from_arrays(offsets, pa.array(flat, kind.value_type), type=kind)


def _quarantine_table(rejected: Sequence[tuple[RawRecord, Rejection]], uri: str) -> pa.Table:
    rows = [
        {
            "source_uri": without_credentials(uri),
            "source_row": record.row,
            "mol_id": _row_id(record, uri),
            "excerpt": record.excerpt,
            "reason": str(rejection.code),
            "detail": rejection.detail,
        }
        for record, rejection in rejected
    ]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)
