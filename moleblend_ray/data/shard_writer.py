"""A chunk of raw records -> featurized shard files, a quarantine part and a receipt; receipts -> manifest.

Everything a chunk's files hold depends only on its raw bytes, the layout and the options, so a chunk converted
twice gives the same bytes. Its receipt is written after its files and names their sizes and checksums; a chunk
whose receipt still holds is not converted again. The manifest is assembled from receipts and written last.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.molecule import (
    Molecule,
    Rejection,
    RejectionCode,
    molecules_from_records,
)
from moleblend_ray.data import storage
from moleblend_ray.data.shards import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    QUARANTINE_DIR,
    QUARANTINE_SCHEMA,
    SPLITS,
    Counts,
    LabelInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    encode_shard,
    fingerprint,
    load_manifest,
    shard_schema,
)
from moleblend_ray.data.sources import (
    ColumnConfig,
    LabelColumn,
    RawRecord,
    RowChunk,
    SourceFile,
    SourceLayout,
    SourceSet,
    parse_chunk,
)
from moleblend_ray.errors import ConfigError, DataError, without_credentials
from moleblend_ray.relations.geometry import closest_pair_distances
from moleblend_ray.vocabulary import FEATURIZER_VERSION

logger = logging.getLogger(__name__)

RECEIPTS_DIR: Final = "receipts"
"""Records of work in progress; removed when the manifest is written."""

PLAN_NAME: Final = f"{RECEIPTS_DIR}/plan.json"

OVERLAP_ANGSTROM: Final = 0.4
"""Atoms closer than this overlap: the shortest bond there is, H-H, has 0.74 angstrom."""

_THREADS: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """What decides the content of a data set besides its sources."""

    columns: ColumnConfig = field(default_factory=ColumnConfig)
    featurize: FeaturizeConfig = field(default_factory=FeaturizeConfig)
    rows_per_chunk: int = 8192
    """Source records that make one unit of work, and at most one shard of each split."""
    row_group_rows: int = 1024
    """Rows of each row group but the last of a shard."""
    valid_fraction: float = 0.05
    """Share of molecules, chosen by a hash of the canonical SMILES, in split ``valid``."""
    split_seed: int = 0
    """Part of that hash."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON value (tuples as lists), equal for equal options."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Featurized:
    """A chunk's records as molecules and rejections."""

    molecules: pa.Table
    """Schema ``shards.shard_schema(labels)``, in source order."""
    quarantine: pa.Table
    """Schema ``shards.QUARANTINE_SCHEMA``, in source order."""
    unreadable_labels: dict[str, int]
    """Label -> molecules whose cell held something that is not a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What became of one chunk."""

    file_index: int
    chunk_index: int
    digest: str
    """Of the raw content: a receipt for other content does not count."""
    rows_in: int
    files: tuple[ShardInfo, ...]
    quarantined_by_reason: dict[str, int]
    atoms_out: int
    with_coordinates: int
    conformer_status: dict[str, int]
    label_counts: dict[str, int]
    """Label -> molecules that have it."""
    unreadable_labels: dict[str, int]
    id_hashes: str
    """Base64 of a uint64 hash of each molecule's id, to count ids that repeat."""

    @property
    def rows_out(self) -> int:
        """Molecules in the chunk's shards."""
        return sum(file.num_rows for file in self.files if file.split in SPLITS)

    @property
    def rows_quarantined(self) -> int:
        """Records in the chunk's quarantine part."""
        return sum(file.num_rows for file in self.files if file.split not in SPLITS)

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Receipt:
        """From a JSON value; KeyError or TypeError if it is none."""
        files = tuple(ShardInfo(**file) for file in value["files"])
        return cls(**{**value, "files": files})


def part_name(file_index: int, chunk_index: int) -> str:
    """The stem of the names of a chunk's files."""
    return f"{file_index:05d}-{chunk_index:06d}"


def receipt_uri(out: str, file_index: int, chunk_index: int) -> str:
    """Where the receipt of a chunk is."""
    return storage.join(out, RECEIPTS_DIR, part_name(file_index, chunk_index) + ".json")


# --------------------------------------------------------------------------------------------------------------
# One chunk


def convert_chunk(
    chunk: RowChunk,
    layout: SourceLayout,
    labels: Sequence[LabelColumn],
    options: ConvertOptions,
    out: str,
) -> Receipt:
    """Featurize a chunk and write its shards, its quarantine part and last its receipt below ``out``."""
    done = featurize_chunk(chunk, layout, labels, options.featurize)
    in_valid = _in_valid(done.molecules["smiles"].to_pylist(), options)
    tables = {
        "train": done.molecules.filter(pa.array(~in_valid)),
        "valid": done.molecules.filter(pa.array(in_valid)),
        QUARANTINE_DIR: done.quarantine,
    }
    name = part_name(chunk.file_index, chunk.chunk_index) + ".parquet"
    files = []
    for split, table in tables.items():
        path = f"{split}/{name}"
        if table.num_rows:
            content = encode_shard(table, options.row_group_rows)
            storage.write_bytes(storage.join(out, path), content)
            files.append(_shard_info(path, split, table.num_rows, content))
        else:
            # A former attempt on other content may have left one.
            storage.delete(storage.join(out, path))
    receipt = _receipt(chunk, labels, done, files)
    uri = receipt_uri(out, chunk.file_index, chunk.chunk_index)
    storage.write_json(uri, receipt.to_json())
    return receipt


def featurize_chunk(
    chunk: RowChunk,
    layout: SourceLayout,
    labels: Sequence[LabelColumn],
    config: FeaturizeConfig,
) -> Featurized:
    """The chunk's records as rows of a shard, and those that cannot be with the reason."""
    parsed = list(parse_chunk(chunk, layout))
    outcomes = molecules_from_records((record.content for record in parsed), config)
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
    if len(records) + len(rejected) != chunk.num_rows:
        raise DataError(
            f"{layout.file.uri}: the chunk at record {chunk.first_row} was read as {chunk.num_rows} records "
            f"and parsed as {len(records) + len(rejected)}. Please report this with the file."
        )
    rejected.sort(key=lambda pair: pair[0].row)
    return Featurized(
        molecules=_molecule_table(records, molecules, layout.file, labels),
        quarantine=_quarantine_table(rejected, layout.file),
        unreadable_labels=dict(Counter(name for record in records for name in record.unreadable)),
    )


def _closest_distances(molecules: Sequence[Molecule]) -> NDArray[np.float32]:
    """Smallest distance between two atoms of any conformer of each molecule, (M,); inf without."""
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


def _in_valid(smiles: Sequence[str], options: ConvertOptions) -> NDArray[np.bool_]:
    """Which molecules are for validation; the same for the same molecule, wherever and whenever it is met."""
    threshold = options.valid_fraction * 2.0**64
    key = options.split_seed.to_bytes(8, "little", signed=True)
    return np.array([_hash(text, key) < threshold for text in smiles], dtype=np.bool_)


def _hash(text: str, key: bytes = b"") -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")


def _row_id(record: RawRecord, file: SourceFile) -> str:
    """The record's own id, else one made of file name and row."""
    stem = storage.name_of(file.uri).split(".", 1)[0]
    return record.mol_id if record.mol_id is not None else f"{stem}_{record.row}"


def _molecule_table(
    records: Sequence[RawRecord],
    molecules: Sequence[Molecule],
    file: SourceFile,
    labels: Sequence[LabelColumn],
) -> pa.Table:
    schema = shard_schema(labels)
    columns: dict[str, Any] = {
        "mol_id": [_row_id(record, file) for record in records],
        "source_row": [record.row for record in records],
        "smiles": [molecule.smiles for molecule in molecules],
        "conformer_status": [str(molecule.conformer_status) for molecule in molecules],
        "num_atoms": [molecule.num_atoms for molecule in molecules],
        "atom_features": [molecule.atom_features for molecule in molecules],
        "bonds": [molecule.bonds for molecule in molecules],
        "bond_features": [molecule.bond_features for molecule in molecules],
        "num_conformers": [molecule.num_conformers for molecule in molecules],
        "positions": [molecule.positions for molecule in molecules],
        "position_mask": [molecule.position_mask for molecule in molecules],
    }
    arrays = [
        _list_array(columns[field.name], field.type)
        if pa.types.is_list(field.type)
        else pa.array(columns[field.name], field.type)
        for field in schema
        if field.name in columns
    ]
    values = np.array([record.labels for record in records]).reshape(len(records), len(labels))
    arrays += [pa.array(column, pa.float64(), from_pandas=True) for column in values.T]
    return pa.table(arrays, schema=schema)


def _list_array(parts: Sequence[NDArray[Any]], kind: pa.DataType) -> pa.Array:
    """Each array, flattened, as one list."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum([part.size for part in parts], out=offsets[1:])
    dtype = kind.value_type.to_pandas_dtype()
    flat = np.concatenate([part.reshape(-1) for part in parts]) if parts else np.empty(0, dtype)
    return pa.ListArray.from_arrays(offsets, pa.array(flat, kind.value_type), type=kind)


def _quarantine_table(
    rejected: Sequence[tuple[RawRecord, Rejection]], file: SourceFile
) -> pa.Table:
    rows = [
        {
            "source_uri": without_credentials(file.uri),
            "source_row": record.row,
            "mol_id": _row_id(record, file),
            "excerpt": record.excerpt,
            "reason": str(rejection.code),
            "detail": rejection.detail,
        }
        for record, rejection in rejected
    ]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


def _shard_info(path: str, split: str, num_rows: int, content: bytes) -> ShardInfo:
    return ShardInfo(
        path=path,
        split=split,
        num_rows=num_rows,
        num_bytes=len(content),
        sha256=storage.sha256_bytes(content),
    )


def _receipt(
    chunk: RowChunk, labels: Sequence[LabelColumn], done: Featurized, files: Sequence[ShardInfo]
) -> Receipt:
    table = done.molecules
    hashes = np.array([_hash(mol_id) for mol_id in table["mol_id"].to_pylist()], dtype="<u8")
    num_conformers = table["num_conformers"].to_numpy()
    return Receipt(
        file_index=chunk.file_index,
        chunk_index=chunk.chunk_index,
        digest=chunk.digest(),
        rows_in=chunk.num_rows,
        files=tuple(files),
        quarantined_by_reason=dict(Counter(done.quarantine["reason"].to_pylist())),
        atoms_out=int(table["num_atoms"].to_numpy().sum(dtype=np.int64)),
        with_coordinates=int(np.count_nonzero(num_conformers)),
        conformer_status=dict(Counter(table["conformer_status"].to_pylist())),
        label_counts={
            label.name: table.num_rows - table[f"label:{label.name}"].null_count for label in labels
        },
        unreadable_labels=done.unreadable_labels,
        id_hashes=base64.b64encode(hashes.tobytes()).decode(),
    )


# --------------------------------------------------------------------------------------------------------------
# The data set


def finished_manifest(
    out: str, files: Sequence[SourceFile], options: ConvertOptions
) -> Manifest | None:
    """The manifest of ``out`` if it is finished; ConfigError if it was made of something else or otherwise."""
    if not storage.exists(storage.join(out, MANIFEST_NAME)):
        return None
    manifest = load_manifest(out)
    made_of = [_identity(source) for source in manifest.sources]
    wanted = [_identity(file) for file in files]
    differences = _option_differences(manifest.options, options.to_json())
    if manifest.featurizer_version != FEATURIZER_VERSION:
        differences.append(
            f"featurizer version: there {manifest.featurizer_version}, now {FEATURIZER_VERSION}"
        )
    if made_of != wanted:
        differences.append(f"sources: there {_shown(made_of)}; now {_shown(wanted)}")
    if differences:
        raise ConfigError(
            f"out: {out} holds a data set prepared otherwise. {'; '.join(differences)}. "
            "Give another `out`, or delete this one to prepare it anew."
        )
    _check_shards(out, manifest)
    return manifest


def _check_shards(out: str, manifest: Manifest) -> None:
    """DataError if a file of a finished data set is missing or has another size."""
    sizes = _listed(out, *SPLITS, QUARANTINE_DIR)
    damaged = []
    for shard in manifest.shards:
        size = sizes.get(storage.join(out, shard.path))
        if size != shard.num_bytes:
            state = "missing" if size is None else f"of {size} bytes, expected {shard.num_bytes}"
            damaged.append(f"{shard.path} is {state}")
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise DataError(
            f"{out} was prepared, but since then {len(damaged)} of its {len(manifest.shards)} files changed: "
            f"{'; '.join(damaged[:3])}{more}. Restore them, or delete all of {out} and prepare it again."
        )


def begin(out: str, sources: SourceSet, options: ConvertOptions) -> dict[tuple[int, int], Receipt]:
    """Claim ``out`` for this plan; returns receipts, by file and chunk, of what a former run has finished.

    The plan names files but not their content: a repaired file keeps the chunks that are the same.
    """
    plan = {
        "format_version": FORMAT_VERSION,
        "featurizer_version": FEATURIZER_VERSION,
        "options": options.to_json(),
        "sources": [without_credentials(layout.file.uri) for layout in sources.layouts],
    }
    uri = storage.join(out, PLAN_NAME)
    present = _listed(out)
    if uri in present:
        _check_plan(out, storage.read_json(uri), plan)
    elif any(f"/{split}/" in name for name in present for split in (*SPLITS, QUARANTINE_DIR)):
        raise ConfigError(
            f"out: {out} holds shards of which neither a manifest nor a plan tells anything. "
            "Give another `out`, or delete this one."
        )
    else:
        storage.write_json(uri, plan)
    return _valid_receipts(out, present)


def finish(
    out: str, sources: SourceSet, options: ConvertOptions, receipts: Iterable[Receipt]
) -> Manifest:
    """Write the manifest of these receipts, after it nothing but a clean-up."""
    ordered = sorted(receipts, key=lambda receipt: (receipt.file_index, receipt.chunk_index))
    labels = tuple(_label_info(label, ordered) for label in sources.labels)
    shards = tuple(
        file
        for split in (*SPLITS, QUARANTINE_DIR)
        for receipt in ordered
        for file in receipt.files
        if file.split == split
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        featurizer_version=FEATURIZER_VERSION,
        options=options.to_json(),
        sources=_source_infos(sources, ordered),
        labels=labels,
        shards=shards,
        counts=_counts(ordered),
        row_group_rows=options.row_group_rows,
        fingerprint=fingerprint(FEATURIZER_VERSION, options.to_json(), labels, shards),
    )
    named = {storage.join(out, shard.path) for shard in shards}
    for uri in _listed(out, *SPLITS, QUARANTINE_DIR):
        if uri not in named:
            storage.delete(uri)  # of a chunk that the source, changed since, no longer has
    storage.write_json(storage.join(out, MANIFEST_NAME), manifest.to_json())
    storage.delete_tree(storage.join(out, RECEIPTS_DIR))
    return manifest


def _identity(source: SourceFile | SourceInfo) -> tuple[str, int, str]:
    # Another signature or password does not make another file.
    return (without_credentials(source.uri), source.size, source.probe)


def _shown(identities: Sequence[tuple[str, int, str]]) -> str:
    texts = [f"{uri} ({size} bytes, probe {probe[:8]})" for uri, size, probe in identities[:3]]
    more = f" and {len(identities) - 3} more" if len(identities) > 3 else ""
    return ", ".join(texts) + more


def _option_differences(
    there: Mapping[str, Any], now: Mapping[str, Any], at: str = ""
) -> list[str]:
    """Settings that are not the same, by their dotted names."""
    found: list[str] = []
    for key in sorted(set(there) | set(now)):
        old, new = there.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _option_differences(old, new, f"{at}{key}.")
        elif old != new:
            found.append(f"{at}{key}: there {old!r}, now {new!r}")
    return found


def _check_plan(out: str, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = _option_differences(there, now)
    if differences:
        raise ConfigError(
            f"out: {out} holds an unfinished data set begun otherwise. {'; '.join(differences)}. "
            "Give another `out`, the former settings to finish it, or delete it."
        )


def _listed(out: str, *parts: str) -> dict[str, int]:
    """Size by URI of the files of these directories of ``out`` (none: of all)."""
    found: dict[str, int] = {}
    for directory in parts or ("",):
        # Files are named as the caller names `out`: a listing gives absolute paths.
        base = storage.join(out, directory)
        try:
            files = storage.list_files(base)
        except storage.NotFoundError:
            continue
        root = storage.absolute(base)
        found |= {storage.join(base, file.uri.removeprefix(root)): file.size for file in files}
    return found


def _valid_receipts(out: str, present: Mapping[str, int]) -> dict[tuple[int, int], Receipt]:
    """Receipts below ``out`` whose files are all there with the size they should have."""
    directory = storage.join(out, RECEIPTS_DIR) + "/"
    uris = [uri for uri in present if uri.startswith(directory) and not uri.endswith(PLAN_NAME)]
    with ThreadPoolExecutor(_THREADS) as pool:
        loaded = list(pool.map(_load_receipt, uris))
    valid = {}
    for receipt in loaded:
        if receipt is None:
            continue
        sizes = {file.path: present.get(storage.join(out, file.path)) for file in receipt.files}
        if all(sizes[file.path] == file.num_bytes for file in receipt.files):
            valid[receipt.file_index, receipt.chunk_index] = receipt
    return valid


def _load_receipt(uri: str) -> Receipt | None:
    try:
        return Receipt.from_json(storage.read_json(uri))
    except (DataError, KeyError, TypeError) as error:
        logger.warning("%s is damaged and does not count: %s", without_credentials(uri), error)
        return None


def _label_info(label: LabelColumn, receipts: Sequence[Receipt]) -> LabelInfo:
    return LabelInfo(
        name=label.name,
        unit=label.unit,
        count=sum(receipt.label_counts[label.name] for receipt in receipts),
        num_unreadable=sum(receipt.unreadable_labels.get(label.name, 0) for receipt in receipts),
    )


def _source_infos(sources: SourceSet, receipts: Sequence[Receipt]) -> tuple[SourceInfo, ...]:
    rows: Counter[int] = Counter()
    for receipt in receipts:
        rows[receipt.file_index] += receipt.rows_in
    return tuple(
        SourceInfo(
            uri=without_credentials(layout.file.uri),
            format=layout.file.format,
            size=layout.file.size,
            probe=layout.file.probe,
            rows=rows[index],
        )
        for index, layout in enumerate(sources.layouts)
    )


def _counts(receipts: Sequence[Receipt]) -> Counts:
    reasons: Counter[str] = Counter()
    status: Counter[str] = Counter()
    for receipt in receipts:
        reasons.update(receipt.quarantined_by_reason)
        status.update(receipt.conformer_status)
    counts = Counts(
        rows_in=sum(receipt.rows_in for receipt in receipts),
        rows_out=sum(receipt.rows_out for receipt in receipts),
        rows_quarantined=sum(receipt.rows_quarantined for receipt in receipts),
        quarantined_by_reason=dict(sorted(reasons.items())),
        atoms_out=sum(receipt.atoms_out for receipt in receipts),
        with_coordinates=sum(receipt.with_coordinates for receipt in receipts),
        conformer_status=dict(sorted(status.items())),
        duplicate_ids=_count_duplicates(receipts),
    )
    if counts.rows_in != counts.rows_out + counts.rows_quarantined:
        raise DataError(
            f"Rows are lost: {counts.rows_in} read, {counts.rows_out} in shards, "
            f"{counts.rows_quarantined} in quarantine. Delete the output and prepare it again; "
            "please report it if it happens twice."
        )
    return counts


def _count_duplicates(receipts: Sequence[Receipt]) -> int:
    parts = [np.frombuffer(base64.b64decode(receipt.id_hashes), "<u8") for receipt in receipts]
    hashes = np.concatenate([np.empty(0, "<u8"), *parts])
    return len(hashes) - len(np.unique(hashes))
