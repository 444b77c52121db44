"""Random molecules that obey the schema but no chemistry: for tests of relations, batches and the stream."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from moleblend_ray.data.dataset.block import MoleculeBlock, undescribed
from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME
from moleblend_ray.data.dataset.descriptors import DescriptorScaling
from moleblend_ray.data.dataset.manifest import (
    Counts,
    DescriptorInfo,
    Manifest,
    ShardInfo,
    fingerprint,
    format_version_of,
)
from moleblend_ray.data.dataset.shards import encode_shard, shard_schema
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.receipts import shard_info
from moleblend_ray.vocabulary import (
    ATOM_VOCAB_SIZES,
    BOND_VOCAB_SIZES,
    NUM_DESCRIPTORS,
    STORED_DESCRIPTORS,
)


def random_bonds(rng: np.random.Generator, num_atoms: int, extra: float = 0.15) -> np.ndarray:
    """(E, 2) uint16 bonds in random order and direction: a random forest and some ring closures."""
    numbering = rng.permutation(num_atoms)
    pairs = {(int(rng.integers(max(0, i - 3), i)), i) for i in range(1, num_atoms)}
    # About one molecule in eight falls into fragments.
    if rng.random() < 0.125:
        pairs = {pair for pair in pairs if rng.random() < 0.8}
    for _ in range(int(extra * num_atoms)):
        a, b = sorted(rng.integers(0, num_atoms, 2).tolist())
        if a != b:
            pairs.add((a, b))
    bonds = numbering[np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)]
    rng.shuffle(bonds)
    return rng.permuted(bonds, axis=1).astype(np.uint16)


def random_block(
    rng: np.random.Generator, num_molecules: int, max_atoms: int = 20
) -> MoleculeBlock:
    num_atoms = rng.integers(1, max_atoms + 1, num_molecules).astype(np.int32)
    bonds = [random_bonds(rng, int(n)) for n in num_atoms]
    num_bonds = np.array([len(b) for b in bonds], np.int32)
    atoms, total_bonds = int(num_atoms.sum()), int(num_bonds.sum())
    return MoleculeBlock(
        molecule_ids=np.arange(num_molecules, dtype=np.int64),
        num_atoms=num_atoms,
        num_bonds=num_bonds,
        atom_features=rng.integers(0, ATOM_VOCAB_SIZES, (atoms, 9)).astype(np.uint8),
        bonds=np.concatenate(bonds),
        bond_features=rng.integers(0, BOND_VOCAB_SIZES, (total_bonds, 3)).astype(np.uint8),
        positions=rng.normal(size=(atoms, 3)).astype(np.float32),
        position_mask=rng.random(atoms) < 0.9,
        descriptors=undescribed(num_molecules),
    )


def with_random_descriptors(
    rng: np.random.Generator, block: MoleculeBlock
) -> tuple[MoleculeBlock, DescriptorInfo]:
    """The block with descriptors of several sizes, a tenth of them unknown, and their scaling."""
    shape = len(block), NUM_DESCRIPTORS
    values = rng.normal(rng.normal(size=NUM_DESCRIPTORS), 10.0 ** rng.uniform(-2, 3), shape)
    values[rng.random(shape) < 0.1] = np.nan
    scaling = DescriptorScaling.fit(values).to_json()
    info = DescriptorInfo(names=STORED_DESCRIPTORS, scaling=scaling)
    return replace(block, descriptors=values.astype(np.float32)), info


def shard_table(block: MoleculeBlock, conformers: np.ndarray) -> pa.Table:
    """The block as shard rows; conformer c of a molecule is the block's moved by ``c`` angstrom."""
    schema = shard_schema([], descriptors=block.descriptors.shape[1] > 0)
    atom_ends, bond_ends = np.cumsum(block.num_atoms), np.cumsum(block.num_bonds)
    columns: dict[str, list[object]] = {field.name: [] for field in schema}
    for i, molecule in enumerate(block.molecule_ids):
        atoms = slice(atom_ends[i] - block.num_atoms[i], atom_ends[i])
        bonds = slice(bond_ends[i] - block.num_bonds[i], bond_ends[i])
        positions = [block.positions[atoms] + c for c in range(conformers[i])]
        row = {
            "mol_id": f"mol{molecule}",
            "source_row": int(molecule),
            "smiles": "C",
            "conformer_status": "source",
            "conformer_detail": "",
            "conformer_energies": np.full(conformers[i], np.nan, np.float32),
            "num_atoms": int(block.num_atoms[i]),
            "atom_features": block.atom_features[atoms].ravel(),
            "bonds": block.bonds[bonds].ravel(),
            "bond_features": block.bond_features[bonds].ravel(),
            "num_conformers": int(conformers[i]),
            "positions": np.array(positions, np.float32).ravel(),
            "position_mask": np.tile(block.position_mask[atoms], conformers[i]),
            "descriptors": block.descriptors[i],
        }
        for name, values in columns.items():
            values.append(row[name])
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def write_dataset(
    uri: str,
    num_molecules: int,
    *,
    seed: int = 0,
    max_conformers: int = 1,
    max_atoms: int = 20,
    shard_rows: int = 300,
    row_group_rows: int = 64,
    far_molecule: int | None = None,
    described: bool = False,
) -> MoleculeBlock:
    """Write a prepared data set with one split ``train`` at ``uri`` and return its molecules; ``described``: with random
    descriptors, some of them unknown.

    The coordinates of ``far_molecule`` are so large that their distances overflow.
    """
    rng = np.random.default_rng(seed)
    block = random_block(rng, num_molecules, max_atoms)
    if far_molecule is not None:
        block.positions[np.repeat(block.molecule_ids, block.num_atoms) == far_molecule] *= 1e30
    info = None
    if described:
        block, info = with_random_descriptors(rng, block)
    conformers = rng.integers(min(1, max_conformers), max_conformers + 1, num_molecules)
    table = shard_table(block, conformers)
    shards: list[ShardInfo] = []
    for start in range(0, num_molecules, shard_rows):
        part = table.slice(start, shard_rows)
        content = encode_shard(part, row_group_rows)
        path = f"train/{len(shards):05d}.parquet"
        storage.write_bytes(storage.join(uri, path), content)
        shards.append(shard_info(path, "train", len(part), content))
    counts = Counts(
        rows_in=num_molecules,
        rows_out=num_molecules,
        rows_quarantined=0,
        quarantined_by_reason={},
        atoms_out=int(block.num_atoms.sum()),
        with_coordinates=num_molecules,
        conformer_status={"source": num_molecules},
        duplicate_ids=0,
    )
    manifest = Manifest(
        format_version=format_version_of(()),
        featurizer_version=1,
        options={},
        sources=(),
        labels=(),
        shards=tuple(shards),
        counts=counts,
        row_group_rows=row_group_rows,
        fingerprint=fingerprint(1, {}, (), shards, descriptors=info),
        descriptors=info,
    )
    storage.write_json(storage.join(uri, MANIFEST_NAME), manifest.to_json())
    return block
