"""Receipts -> the manifest, with which the files become a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.dataset.dataset_files import (
    MANIFEST_NAME,
    QUARANTINE_DIR,
    SPLITS,
    listed_shards,
)
from moleblend_ray.data.dataset.descriptors import DescriptorScaling
from moleblend_ray.data.dataset.manifest import (
    Counts,
    DescriptorInfo,
    LabelInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    fingerprint,
    format_version_of,
)
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.dataset.shards import DESCRIPTOR_FIELD, DUPLICATE
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.ahead import mapped_ahead
from moleblend_ray.data.files.scratch import scratch_folder
from moleblend_ray.data.preparation.claim import remove_work_files
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.receipts import (
    IDS,
    Receipt,
    Statistics,
    UnitReceipt,
    sum_statistics,
)
from moleblend_ray.data.sources import SourceSet
from moleblend_ray.errors import DataError, without_credentials
from moleblend_ray.vocabulary import FEATURIZER_VERSION, STORED_DESCRIPTORS

_MAX_HASHES_IN_MEMORY: Final = 1 << 23
"""64 MiB, and the same again while they are sorted."""
_PARTITIONS: Final = 256
"""Temporary files of hashes, one per leading byte."""
_THREADS: Final = 32

_SAMPLED_STRETCHES: Final = 32
_SAMPLED_ROWS: Final = 1 << 15
"""28 MB of descriptors. Among so many, one that a thousandth of the molecules have is seen 33 times."""


def write_manifest(
    out: str,
    sources: SourceSet,
    options: ConvertOptions,
    receipts: Iterable[Receipt],
    placed: Sequence[UnitReceipt] = (),
) -> Manifest:
    """Write the manifest of these receipts, then remove what only an unfinished data set needs.

    ``placed`` are the receipts of an exchange, in its order; the shards are then those of the exchange.
    """
    ordered = sorted(receipts, key=lambda receipt: (receipt.file_index, receipt.chunk_index))
    _require_every_chunk(ordered)
    units: list[Receipt | UnitReceipt] = [*ordered, *placed]
    statistics = sum_statistics(unit.statistics for unit in units)
    labels = _label_infos(sources, ordered, statistics)
    shards = tuple(
        file
        for split in (*SPLITS, QUARANTINE_DIR)
        for unit in units
        for file in unit.files
        if file.split == split
    )
    manifest = Manifest(
        format_version=format_version_of(sources.labels),
        featurizer_version=FEATURIZER_VERSION,
        options=options.to_json(),
        sources=_source_infos(sources, ordered),
        labels=labels,
        shards=shards,
        counts=_counts(out, ordered, shards, statistics),
        row_group_rows=options.row_group_rows,
        fingerprint=fingerprint(FEATURIZER_VERSION, options.to_json(), labels, shards),
    )
    if options.featurize.descriptors:
        manifest = _described(out, manifest)
    named = {storage.join(out, shard.path) for shard in shards}
    for uri in listed_shards(out):
        if uri not in named:
            storage.delete(uri)  # of a chunk that is no longer in the source, which has changed
    for folder in (*SPLITS, QUARANTINE_DIR):
        storage.delete_temporaries(storage.join(out, folder))
    storage.write_json(storage.join(out, MANIFEST_NAME), manifest.to_json())
    remove_work_files(out)
    return manifest


def _described(out: str, manifest: Manifest) -> Manifest:
    """The manifest with the scaling of the descriptors, from a sample of the molecules of the first split with any."""
    info = DescriptorInfo(names=STORED_DESCRIPTORS, scaling={})
    manifest = replace(manifest, descriptors=info)
    split = next((split for split in SPLITS if manifest.num_molecules(split)), SPLITS[0])
    reader = ShardReader(out, manifest, split, columns=[DESCRIPTOR_FIELD.name])
    table = reader.read(_sample(reader.num_rows, manifest.row_group_rows))
    values = table[DESCRIPTOR_FIELD.name].combine_chunks().flatten().to_numpy()
    if not len(values):  # everything is in the quarantine
        values = np.zeros(len(info.names))
    scaling = DescriptorScaling.fit(values.reshape(-1, len(info.names)))
    info = replace(info, scaling=scaling.to_json())
    return replace(
        manifest,
        descriptors=info,
        fingerprint=fingerprint(
            manifest.featurizer_version,
            manifest.options,
            manifest.labels,
            manifest.shards,
            format_version=manifest.format_version,
            descriptors=info,
        ),
    )


def _sample(num_rows: int, group_rows: int) -> NDArray[np.int64]:
    """Rows of at most ``_SAMPLED_STRETCHES`` stretches, evenly spread, of at most ``_SAMPLED_ROWS`` in all.

    A stretch is as long as a row group, which is read as a whole.
    """
    last = max(0, num_rows - 1) // group_rows
    chosen = group_rows * np.unique(np.linspace(0, last, _SAMPLED_STRETCHES).astype(np.int64))
    rows = (chosen[:, None] + np.arange(group_rows)).ravel()
    rows = rows[rows < num_rows]
    return rows[:: max(1, -(-len(rows) // _SAMPLED_ROWS))]


def _require_every_chunk(ordered: Sequence[Receipt]) -> None:
    """DataError if between the first and last chunk of a file one is missing, or is there twice."""
    expected = (-1, 0, 0)
    for receipt in ordered:
        if receipt.file_index != expected[0]:
            expected = (receipt.file_index, 0, 0)
        found = (receipt.file_index, receipt.chunk_index, receipt.first_row)
        if found != expected:
            raise DataError(
                f"Rows are lost: of source file {expected[0]}, chunk {expected[1]} should begin at row {expected[2]}, found "
                f"chunk {found[1]} at row {found[2]}. Run the same command again; please report it if it happens twice."
            )
        expected = (
            receipt.file_index,
            receipt.chunk_index + 1,
            receipt.first_row + receipt.rows_in,
        )


def _label_infos(
    sources: SourceSet, receipts: Sequence[Receipt], statistics: Statistics
) -> tuple[LabelInfo, ...]:
    unreadable: Counter[str] = Counter()
    for receipt in receipts:
        unreadable.update(receipt.unreadable_labels)
    return tuple(
        LabelInfo(
            name=label.name,
            unit=label.unit,
            count=statistics.label_counts.get(label.name, 0),
            num_unreadable=unreadable[label.name],
            num_bounds=statistics.bound_counts.get(label.name, 0) if label.censored else None,
        )
        for label in sources.labels
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
            members=layout.file.members,
        )
        for index, layout in enumerate(sources.layouts)
    )


def _counts(
    out: str, receipts: Sequence[Receipt], shards: Sequence[ShardInfo], statistics: Statistics
) -> Counts:
    reasons: Counter[str] = Counter()
    for receipt in receipts:
        reasons.update(receipt.quarantined_by_reason)
    quarantined = sum(shard.num_rows for shard in shards if shard.split == QUARANTINE_DIR)
    # The chunks' own rejections are counted in `reasons`; the rest of the quarantine comes from the exchange.
    duplicates = quarantined - reasons.total()
    if duplicates:
        reasons[DUPLICATE] = duplicates
    counts = Counts(
        rows_in=sum(receipt.rows_in for receipt in receipts),
        rows_out=sum(shard.num_rows for shard in shards if shard.split in SPLITS),
        rows_quarantined=quarantined,
        quarantined_by_reason=dict(sorted(reasons.items())),
        atoms_out=statistics.atoms,
        with_coordinates=statistics.with_coordinates,
        conformer_status=statistics.conformer_status,
        conformer_detail=statistics.conformer_detail,
        duplicate_ids=count_repeats(_id_hashes(out, receipts)),
        without_inchikey=sum(receipt.without_inchikey for receipt in receipts),
        atom_count_histogram=statistics.atom_count_histogram,
        elements=statistics.elements,
    )
    if not counts.rows_in - counts.rows_quarantined == counts.rows_out == statistics.molecules:
        raise DataError(
            f"Rows are lost: {counts.rows_in} read, {counts.rows_out} in shards, "
            f"{counts.rows_quarantined} in quarantine. Delete the output and prepare it again; "
            "please report it if it happens twice."
        )
    return counts


def _id_hashes(out: str, receipts: Sequence[Receipt]) -> Iterator[NDArray[np.uint64]]:
    """The hashes of the ids of each chunk's molecules, read a few chunks ahead."""
    uris = [storage.join(out, file.path) for receipt in receipts for file in receipt.files_of(IDS)]
    for content in mapped_ahead(storage.read_bytes, uris, _THREADS):
        yield np.frombuffer(content, "<u8")


def count_repeats(parts: Iterable[NDArray[np.uint64]]) -> int:
    """The number of values that repeat an earlier one.

    Exact, in bounded memory: more than 2^23 values go to temporary files, one per leading byte, which are counted one
    after the other. 10^9 values take 8 GB of the temporary directory.
    """
    held: list[NDArray[np.uint64]] = []
    num_held = repeats = 0
    with scratch_folder("ids") as folder:
        for part in parts:
            held.append(part)
            num_held += len(part)
            if num_held > _MAX_HASHES_IN_MEMORY:
                _spill(np.concatenate(held), folder)
                held, num_held = [], 0
        spilled = sorted(folder.iterdir())
        if spilled:
            _spill(np.concatenate([*held, np.empty(0, np.uint64)]), folder)
            held = []
        repeats = _repeats(np.concatenate([*held, np.empty(0, np.uint64)]))
        for path in sorted(folder.iterdir()):
            repeats += _repeats(np.fromfile(path, np.uint64))
    return repeats


def _spill(hashes: NDArray[np.uint64], folder: Path) -> None:
    ordered = np.sort(hashes)
    leading = np.arange(1, _PARTITIONS, dtype=np.uint64) << np.uint64(56)
    for number, part in enumerate(np.split(ordered, np.searchsorted(ordered, leading))):
        if len(part):
            with (folder / f"{number:03d}").open("ab") as file:
                part.tofile(file)


def _repeats(hashes: NDArray[np.uint64]) -> int:
    return len(hashes) - len(np.unique(hashes))
