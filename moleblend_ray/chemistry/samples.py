"""A generated collection of drug-like molecules for the demo and the tests, without download or licence.

Molecules are combined from the fragments below (a ring system with two substituents, some of which are a linker with
another group), embedded, and labelled with properties that RDKit computes. Molecule k depends on the seed and k only,
so the collection is the same for any number of processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from joblib.externals.loky import ProcessPoolExecutor
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import rdMolDescriptors

from moleblend_ray.chemistry.config import ConformerConfig
from moleblend_ray.chemistry.conformers import ConformerStatus, embed_conformers
from moleblend_ray.errors import ConfigError
from moleblend_ray.host import available_cpus

logger = logging.getLogger(__name__)

SAMPLES_VERSION = 1
"""Increased whenever the same settings would give other molecules."""

# Ring systems with ring digits 1 and 2; {a} and {b} are replaced by a substituent each.
_CORES = (
    "c1cc({a})ccc1{b}",
    "c1cc({a})cc({b})c1",
    "c1ccc({a})c({b})c1",
    "c1cc({a})cnc1{b}",
    "c1cc({a})ncc1{b}",
    "c1nc({a})ncc1{b}",
    "n1nc({a})ccc1{b}",
    "c1cc({a})sc1{b}",
    "c1cc({a})oc1{b}",
    "c1nc({a})sc1{b}",
    "n1oc({a})nc1{b}",
    "n1nc({a})oc1{b}",
    "n1(C)nc({a})cc1{b}",
    "[nH]1c({a})cc2cc({b})ccc12",
    "[nH]1c({a})nc2cc({b})ccc12",
    "n1c({a})ccc2cc({b})ccc12",
    "o1c({a})cc2cc({b})ccc12",
    "n1c({a})nc2ccccc2c1{b}",
    "C1CC({a})CCC1{b}",
    "C1CC({a})CN1C(=O){b}",
    "C1CN(C(=O){a})CCC1{b}",
    "N1(C(=O){a})CCN(Cc2ccc({b})cc2)CC1",
    "C1C({a})CC1{b}",
    "O=C1CC({a})CN1c2ccc({b})cc2",
)

# Short substituents, with ring digit 3; the first atom binds to the ring system.
_SIMPLE = (
    "F",
    "Cl",
    "Br",
    "C",
    "CC",
    "C(C)C",
    "C3CC3",
    "C(F)(F)F",
    "C#N",
    "C#C",
    "CO",
    "CCO",
    "CN(C)C",
    "C(=O)N",
    "C(=O)NC",
    "C(=O)OC",
    "C(C)=O",
    "c3ccccc3",
    "c3ccccn3",
    "c3cc[nH]n3",
    "[C@@H](C)O",
    "[C@H](C)OC",
)

# Linkers between a ring system and a terminal group {x}.
_LINKERS = (
    "C(=O)N{x}",
    "CC(=O)N{x}",
    "C(=O)N(C){x}",
    "CNC(=O){x}",
    "CNS(=O)(=O){x}",
    "S(=O)(=O)N{x}",
    "S(=O)(=O)N(C){x}",
    "CS(=O)(=O){x}",
    "CO{x}",
    "COC{x}",
    "CN(C)C{x}",
    "/C=C/C(=O)N{x}",
    "/C=C\\{x}",
    "C#C{x}",
    "C(=O)N3CCN({x})CC3",
    "C(=O)N[C@@H](C){x}",
)

# Terminal groups, with ring digits 5 and 6; the first atom, a carbon, binds to the linker.
_TERMINALS = (
    "c5ccccc5",
    "c5ccc(F)cc5",
    "c5cccc(Cl)c5",
    "c5ccc(OC)cc5",
    "c5ccccc5C",
    "c5ccc([N+](=O)[O-])cc5",
    "c5ccc(S(C)(=O)=O)cc5",
    "c5cccnc5",
    "c5ccncc5",
    "c5ccco5",
    "c5cccs5",
    "c5ccn(C)n5",
    "c5ccc6OCOc6c5",
    "C5CC5",
    "C5CCCC5",
    "C5CCCCC5",
    "C5CCOCC5",
    "C5CCN(C)CC5",
    "CC",
    "CC(C)C",
    "CC(F)(F)F",
    "[C@H](C)c5ccccc5",
)

_GROUPS = (
    *_SIMPLE,
    *(linker.format(x=end) for linker, end in itertools.product(_LINKERS, _TERMINALS)),
)

MAX_HEAVY_ATOMS = 26
"""Larger combinations are left out, so that the collection takes seconds and not minutes."""
MIN_HEAVY_ATOMS = 9
MAX_LOGP = 6.0

_SULFONAMIDE = Chem.MolFromSmarts("[#6][SX4](=O)(=O)[NX3]")
_CONFORMERS = ConformerConfig(generate=True, timeout_s=30.0, mmff_max_iterations=100)
_BLOCK = 256
"""Molecules that are given to the processes at a time."""
_LOG_EVERY = 1000
"""Molecules between two log lines."""


_SCHEMA = pa.schema(
    [
        ("mol_id", pa.string()),
        ("smiles", pa.string()),
        ("n_atoms", pa.int16()),
        ("n_heavy", pa.int16()),
        ("atomic_numbers", pa.list_(pa.uint8())),
        ("formal_charges", pa.list_(pa.int8())),
        pa.field("positions", pa.list_(pa.float32()), metadata={"unit": "angstrom"}),
        ("bond_begin", pa.list_(pa.int32())),
        ("bond_end", pa.list_(pa.int32())),
        ("bond_order", pa.list_(pa.int32())),
        pa.field("logp", pa.float64(), metadata={"unit": "log10"}),
        pa.field("tpsa", pa.float64(), metadata={"unit": "angstrom^2"}),
        pa.field("sulfonamide", pa.float64(), metadata={"unit": "class"}),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleMolecule:
    """A molecule of the collection, with geometry and labels; heavy atoms in the order of ``smiles``."""

    mol_id: str = ""
    """``sample_<n>``, counted from 0; set when the molecule's place in the collection is known."""
    smiles: str
    """Canonical isomeric SMILES."""
    atomic_numbers: NDArray[np.uint8]
    """(N,)"""
    formal_charges: NDArray[np.int8]
    """(N,)"""
    positions: NDArray[np.float32]
    """(N, 3), angstrom: ETKDGv3, then MMFF94."""
    bonds: NDArray[np.int32]
    """(E, 3), begin, end and Kekule order."""
    logp: float
    """Crippen's octanol-water partition coefficient (log10)."""
    tpsa: float
    """Topological polar surface area, square angstrom."""
    sulfonamide: int
    """1 if it has a sulfonamide group, else 0."""


def make_samples(
    num_molecules: int, seed: int = 0, num_processes: int | None = None
) -> Iterator[SampleMolecule]:
    """Yield ``num_molecules`` distinct molecules; ``num_processes`` (default: one per core) changes only the speed."""
    if num_molecules < 1:
        raise ConfigError(f"num_molecules must be 1 or more, found {num_molecules}")
    processes = num_processes or available_cpus()
    # Starting processes takes longer than a hundred molecules do.
    processes = min(processes, max(1, num_molecules // 50))
    candidates = _candidates(seed)
    if processes == 1:
        yield from _numbered(map(_embed, candidates), num_molecules)
        return
    # Its processes do not import the caller's script, as those of `multiprocessing` do, which without an
    # `if __name__ == "__main__"` would start the script again, and processes without end.
    with ProcessPoolExecutor(processes) as pool:
        results = itertools.chain.from_iterable(
            pool.map(_embed, list(itertools.islice(candidates, size)), chunksize=8)
            for size in itertools.repeat(min(_BLOCK, num_molecules))
        )
        yield from _numbered(results, num_molecules)


def write_samples(
    path: str | os.PathLike[str],
    num_molecules: int = 5000,
    seed: int = 0,
    num_processes: int | None = None,
) -> int:
    """Write the collection to one Parquet file and return its number of rows; a file that holds it already is kept.

    The columns are those of :class:`moleblend_ray.chemistry.records.GeometryRow`, ``mol_id``, ``n_atoms`` and
    ``n_heavy`` (which are equal, as hydrogens are implicit), and the labels ``logp``, ``tpsa`` and ``sulfonamide``.
    """
    target = Path(path)
    stamp = _stamp(num_molecules, seed)
    if _is_written(target, stamp):
        logger.info("%s already holds these %d molecules", target, num_molecules)
        return num_molecules
    table = _table(list(make_samples(num_molecules, seed, num_processes)))
    metadata = {**(table.schema.metadata or {}), **stamp}
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    pq.write_table(table.replace_schema_metadata(metadata), unfinished)
    unfinished.replace(target)
    logger.info("wrote %d molecules to %s", num_molecules, target)
    return num_molecules


def _candidates(seed: int) -> Iterator[str]:
    """Distinct canonical SMILES without end, in an order that depends on the seed only."""
    seen: set[str] = set()
    for index in itertools.count():
        smiles = _candidate(seed, index)
        if smiles is not None and smiles not in seen:
            seen.add(smiles)
            yield smiles


def _candidate(seed: int, index: int) -> str | None:
    """Combination ``index``; None if it is too small, too large or too lipophilic."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    core, first, second = (int.from_bytes(digest[k : k + 4], "little") for k in (0, 4, 8))
    # Half of the second substituents are short, as otherwise most combinations would be too large.
    others = _SIMPLE if digest[12] % 2 else _GROUPS
    text = _CORES[core % len(_CORES)].format(
        a=_GROUPS[first % len(_GROUPS)], b=others[second % len(others)]
    )
    mol = Chem.MolFromSmiles(text)
    if not MIN_HEAVY_ATOMS <= mol.GetNumHeavyAtoms() <= MAX_HEAVY_ATOMS:
        return None
    if _logp(mol) > MAX_LOGP:
        return None
    return Chem.MolToSmiles(mol)


def _logp(mol: Chem.Mol) -> float:
    logp, _refractivity = rdMolDescriptors.CalcCrippenDescriptors(mol)
    return float(logp)


def _numbered(
    results: Iterator[SampleMolecule | None], num_molecules: int
) -> Iterator[SampleMolecule]:
    """The first ``num_molecules`` that could be embedded, numbered; progress is logged."""
    made = 0
    for molecule in results:
        if molecule is None:
            continue
        yield dataclasses.replace(molecule, mol_id=f"sample_{made:06d}")
        made += 1
        if made % _LOG_EVERY == 0 or made == num_molecules:
            logger.info("made %d of %d sample molecules", made, num_molecules)
        if made == num_molecules:
            return


def _embed(smiles: str) -> SampleMolecule | None:
    """The molecule with geometry and labels; None if it cannot be embedded."""
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
        embedding = embed_conformers(mol, smiles, _CONFORMERS)
    if embedding.status is ConformerStatus.FAILED:
        return None
    logp = _logp(mol)
    tpsa = rdMolDescriptors.CalcTPSA(mol)
    sulfonamide = int(mol.HasSubstructMatch(_SULFONAMIDE))
    Chem.Kekulize(mol, clearAromaticFlags=True)
    return SampleMolecule(
        smiles=smiles,
        atomic_numbers=np.array([a.GetAtomicNum() for a in mol.GetAtoms()], dtype=np.uint8),
        formal_charges=np.array([a.GetFormalCharge() for a in mol.GetAtoms()], dtype=np.int8),
        positions=embedding.positions[0],
        bonds=np.array(
            [
                (b.GetBeginAtomIdx(), b.GetEndAtomIdx(), int(b.GetBondTypeAsDouble()))
                for b in mol.GetBonds()
            ],
            dtype=np.int32,
        ),
        logp=logp,
        tpsa=tpsa,
        sulfonamide=sulfonamide,
    )


def _table(molecules: Sequence[SampleMolecule]) -> pa.Table:
    """The molecules in the column layout of a geometry table."""
    num_atoms = [len(molecule.atomic_numbers) for molecule in molecules]
    columns = {
        "mol_id": [molecule.mol_id for molecule in molecules],
        "smiles": [molecule.smiles for molecule in molecules],
        "n_atoms": num_atoms,
        "n_heavy": num_atoms,
        "atomic_numbers": [molecule.atomic_numbers for molecule in molecules],
        "formal_charges": [molecule.formal_charges for molecule in molecules],
        "positions": [molecule.positions.ravel() for molecule in molecules],
        "bond_begin": [molecule.bonds[:, 0] for molecule in molecules],
        "bond_end": [molecule.bonds[:, 1] for molecule in molecules],
        "bond_order": [molecule.bonds[:, 2] for molecule in molecules],
        "logp": [molecule.logp for molecule in molecules],
        "tpsa": [molecule.tpsa for molecule in molecules],
        "sulfonamide": [float(molecule.sulfonamide) for molecule in molecules],
    }
    return pa.table(columns, schema=_SCHEMA)


def _stamp(num_molecules: int, seed: int) -> dict[bytes, bytes]:
    """Metadata that identifies the collection; conformers and labels depend on the RDKit release."""
    return {
        b"samples_version": str(SAMPLES_VERSION).encode(),
        b"num_molecules": str(num_molecules).encode(),
        b"seed": str(seed).encode(),
        b"rdkit": rdBase.rdkitVersion.encode(),
    }


def _is_written(target: Path, stamp: dict[bytes, bytes]) -> bool:
    if not target.is_file():
        return False
    try:
        metadata = pq.read_schema(target).metadata or {}
    except (pa.ArrowInvalid, OSError):  # not a Parquet file, or a part of one
        return False
    return all(metadata.get(key) == value for key, value in stamp.items())
