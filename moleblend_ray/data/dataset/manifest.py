"""The manifest of a prepared data set: which files belong to it, what they hold, and their fingerprint.

See ``docs/data-format.md``. A data set consists of what its ``manifest.json`` names and nothing else; the manifest is
written last, so a directory without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME, SPLITS
from moleblend_ray.data.dataset.descriptors import DescriptorScaling
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.documents import require_types
from moleblend_ray.errors import DataError
from moleblend_ray.vocabulary import STORED_DESCRIPTORS

FORMAT_VERSION: Final = 5
"""Increased whenever older code could not read what newer code writes. All versions up to this one can be read."""

_VERSION_WITHOUT_BOUNDS: Final = 4


class LabelColumn(NamedTuple):
    """A label of a source or a data set."""

    name: str
    unit: str | None = None
    """As the source states it; None if it states none."""
    censored: bool = False
    """Whether bounds (``>10``) are kept beside it."""


def format_version_of(labels: Sequence[LabelColumn]) -> int:
    """Version of the format of a data set with these labels: older installations read those without bounds."""
    return FORMAT_VERSION if any(label.censored for label in labels) else _VERSION_WITHOUT_BOUNDS


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelInfo:
    """A label of the data set."""

    name: str
    """Name in the source; the column of the shards is ``label:<name>``."""

    unit: str | None
    """Unit as the source states it (Parquet field metadata ``unit``), None if it states none."""

    count: int
    """Molecules that have a value."""

    num_unreadable: int = 0
    """Molecules whose cell in the source holds something that is not a number; their label is null."""

    num_bounds: int | None = None
    """Molecules of which the source tells only a bound (``>10``), in the columns ``at_least:<name>`` and
    ``at_most:<name>``; their label is null. None if the data set does not keep bounds."""

    @property
    def column(self) -> LabelColumn:
        """How it is stored."""
        return LabelColumn(self.name, self.unit, self.num_bounds is not None)

    def to_json(self) -> dict[str, Any]:
        """As a JSON value; of a data set without bounds as earlier versions wrote it."""
        value = asdict(self)
        if self.num_bounds is None:
            value.pop("num_bounds")
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceInfo:
    """A source file as it was when the data set was prepared."""

    uri: str
    """Without credentials."""
    format: str
    size: int
    """Bytes."""
    probe: str
    """SHA-256 of the file's first and last 64 KiB and its size, which detects most changes without reading the file."""
    rows: int
    """Records read from it."""
    members: str | None = None
    """Pattern of the members of an archive that were read; None in manifests of before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One Parquet file of the data set."""

    path: str
    """Path within the data set, such as ``train/00000-000003.parquet``."""
    split: str
    """``train``, ``valid``, ``test`` or ``quarantine``."""
    num_rows: int
    num_bytes: int
    sha256: str
    footer_crc32: int | None = None
    """CRC-32 of the file's end, from its Parquet footer on; None in data sets of earlier versions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Where the source's rows went; ``rows_in == rows_out + rows_quarantined``."""

    rows_in: int
    rows_out: int
    rows_quarantined: int
    quarantined_by_reason: dict[str, int]
    """Rejection code -> rows."""
    atoms_out: int
    with_coordinates: int
    """Molecules with at least one conformer that has a coordinate for some atom."""
    conformer_status: dict[str, int]
    """Conformer status -> molecules out."""
    duplicate_ids: int
    """Molecules with the ``mol_id`` of an earlier molecule, including those in the quarantine as duplicates."""
    conformer_detail: dict[str, int] = field(default_factory=dict)
    """Kind of statement in ``conformer_detail`` (the words before the colon) -> molecules out."""
    without_inchikey: int = 0
    """With ``deduplicate``: molecules for which InChI makes no key, and which therefore never count as duplicates."""
    atom_count_histogram: dict[str, int] = field(default_factory=dict)
    """Number of atoms, as a decimal string -> molecules out; empty in data sets of earlier versions."""
    elements: dict[str, int] = field(default_factory=dict)
    """Element symbol (``*`` for a dummy atom) -> molecules out that contain it; empty in data sets of earlier
    versions."""

    @property
    def molecules_by_atoms(self) -> dict[int, int]:
        """Number of atoms -> molecules out; without a histogram, all molecules with the mean number of atoms."""
        if self.atom_count_histogram:
            return {int(atoms): count for atoms, count in self.atom_count_histogram.items()}
        return {round(self.atoms_out / max(1, self.rows_out)): self.rows_out}


@dataclass(frozen=True, kw_only=True, slots=True)
class DescriptorInfo:
    """The descriptors of the data set."""

    names: tuple[str, ...]
    """RDKit's names, in the order of the numbers in the column ``descriptors``."""
    scaling: dict[str, list[float]]
    """``median``, ``mean`` and ``scale`` of each, of a sample of the training molecules (:class:`DescriptorScaling`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The files of a prepared data set, and how they were made; the only way to find its files."""

    format_version: int
    featurizer_version: int
    options: dict[str, Any]
    """The settings that decided the content, as JSON values."""
    sources: tuple[SourceInfo, ...]
    labels: tuple[LabelInfo, ...]
    shards: tuple[ShardInfo, ...]
    """Files of train, then valid, test and quarantine; within each in source order, or in the order of the shuffle."""
    counts: Counts
    row_group_rows: int
    """Rows of each row group of a shard, except the last one."""
    fingerprint: str
    """SHA-256 over versions, options, labels, descriptors and the checksums of train, valid and test shards."""
    descriptors: DescriptorInfo | None = None
    """None if the shards hold no descriptors."""

    @property
    def descriptor_scaling(self) -> DescriptorScaling | None:
        """How descriptors become targets of pretraining; None if the shards hold none."""
        if self.descriptors is None:
            return None
        return DescriptorScaling.from_json(self.descriptors.scaling)

    def shards_of(self, split: str) -> tuple[ShardInfo, ...]:
        """The files of a split, in the order that defines the positions of its molecules."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def num_molecules(self, split: str) -> int:
        """Rows of a split."""
        return sum(shard.num_rows for shard in self.shards_of(split))

    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, in the order of their columns."""
        return tuple(label.name for label in self.labels)

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return {**asdict(self), "labels": [label.to_json() for label in self.labels]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """From a JSON value; KeyError, TypeError or ValueError if it does not have the form of this version."""
        fields = dict(value)
        fields["sources"] = tuple(SourceInfo(**source) for source in value["sources"])
        fields["labels"] = tuple(LabelInfo(**label) for label in value["labels"])
        fields["shards"] = tuple(ShardInfo(**shard) for shard in value["shards"])
        fields["counts"] = Counts(**value["counts"])
        fields["descriptors"] = _descriptor_info(value.get("descriptors"))
        manifest = cls(**fields)
        require_types(manifest)
        for atoms in manifest.counts.atom_count_histogram:
            int(atoms)
        # The manifest of a data set from elsewhere could name any file of this machine.
        foreign = [shard.path for shard in manifest.shards if _leads_out(shard.path)]
        if foreign:
            raise TypeError(f"{foreign[0]!r} lies outside of the data set")
        return manifest


def _descriptor_info(value: Mapping[str, Any] | None) -> DescriptorInfo | None:
    if value is None:
        return None
    info = DescriptorInfo(names=tuple(value["names"]), scaling=dict(value["scaling"]))
    lengths = {name: len(numbers) for name, numbers in info.scaling.items()}
    if info.names != STORED_DESCRIPTORS or set(lengths.values()) != {len(STORED_DESCRIPTORS)}:
        raise TypeError(
            f"it has {len(info.names)} descriptors, with numbers {lengths}; this version of moleblend-ray reads its own "
            f"{len(STORED_DESCRIPTORS)}"
        )
    DescriptorScaling.from_json(info.scaling)
    return info


def _leads_out(path: str) -> bool:
    return path.startswith(("/", "\\")) or "://" in path or ".." in re.split(r"[/\\]", path)


def fingerprint(
    featurizer_version: int,
    options: Mapping[str, Any],
    labels: Sequence[LabelInfo],
    shards: Sequence[ShardInfo],
    *,
    format_version: int | None = None,
    descriptors: DescriptorInfo | None = None,
) -> str:
    """The identity of a data set's molecules, wherever the data set and its sources are stored.

    The quarantine, which names the sources, is not included. A ``format_version`` of None is that of new data sets.
    """
    if format_version is None:
        format_version = format_version_of([label.column for label in labels])
    content = {
        "format_version": format_version,
        "featurizer_version": featurizer_version,
        "options": dict(options),
        "labels": [label.to_json() for label in labels],
        "shards": [
            [shard.path, shard.num_rows, shard.sha256] for shard in shards if shard.split in SPLITS
        ],
    }
    if descriptors is not None:
        content["descriptors"] = asdict(descriptors)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_manifest(uri: str, *, expected: str | None = None) -> Manifest:
    """The manifest of the data set in directory ``uri``; DataError if it is missing, damaged or of a newer version, or if its
    fingerprint is not the ``expected`` one."""
    manifest_uri = storage.join(uri, MANIFEST_NAME)
    try:
        value = storage.read_json(manifest_uri)
    except storage.NotFoundError as error:
        raise DataError(
            f"{uri} holds no {MANIFEST_NAME}: it is not a prepared data set (the `out` of `moleblend prepare`), or its "
            "preparation has not finished. Molecules in SDF, CSV, SMILES or Parquet are prepared by "
            "`moleblend prepare source=FILE out=FOLDER`; the same command continues an unfinished preparation."
        ) from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if not isinstance(version, int):
        raise DataError(f"{manifest_uri} is not a data set manifest: it has no format_version.")
    if version > FORMAT_VERSION:
        raise DataError(
            f"{manifest_uri} has format version {version}; this installation reads up to {FORMAT_VERSION}. "
            "Upgrade moleblend-ray."
        )
    try:
        manifest = Manifest.from_json(value)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{manifest_uri} is damaged: {error!s}. Prepare the data set again."
        ) from error
    found = fingerprint(
        manifest.featurizer_version,
        manifest.options,
        manifest.labels,
        manifest.shards,
        format_version=manifest.format_version,
        descriptors=manifest.descriptors,
    )
    if found != manifest.fingerprint:
        raise DataError(
            f"{manifest_uri} was changed after it was written: its fingerprint is {manifest.fingerprint}, "
            f"its content gives {found}. Restore it or prepare the data set again."
        )
    if expected is not None and found != expected:
        raise DataError(
            f"{uri} was replaced by another data set while it was in use: its fingerprint was {expected}, now it is {found}. "
            "Put the former one back, or train on the new one under another `out`."
        )
    return manifest
