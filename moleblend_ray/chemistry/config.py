"""Settings of the chemistry layer, free of RDKit so that a job's configuration composes quickly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moleblend_ray.errors import check_all

ATOM_LIMIT = 65_535
"""Most atoms a record can hold: bonds store atom indices as uint16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConformerConfig:
    """How to make coordinates where the source has none (ETKDGv3, then MMFF94, or UFF where that lacks parameters)."""

    generate: bool = False
    """Embed molecules whose source has no coordinates."""
    count: int = 1
    """Conformers tried for each molecule; stored by energy, the lowest first."""
    prune_rms_angstrom: float | None = None
    """Leave out a conformer whose heavy atoms, best aligned, are closer than this (RMSD, angstrom) to
    one of lower energy; None keeps all."""
    energy_window_kcal_mol: float | None = None
    """Leave out conformers whose energy is more than this (kcal/mol) above the lowest; None keeps all.
    Has no effect where no force field ran."""
    seed: int = 7
    """With the canonical SMILES, seeds the embedding: the result does not depend on the file's order."""
    timeout_s: float = 3.0
    """Seconds a molecule's conformers may take, embedding, force field and pruning together. It is the
    only thing by which the outcome depends on the machine, and the molecule's detail then says so."""
    mmff_max_iterations: int = 200
    """Force-field iterations for each conformer; 0 leaves the embedded geometry as it is."""
    on_failure: Literal["keep_2d", "reject"] = "keep_2d"
    """Keep a molecule that could not be embedded, with status ``failed`` and no coordinates, or reject it."""

    def __post_init__(self) -> None:
        check_all(
            (1 <= self.count <= 255, f"count: expected 1 to 255, found {self.count}"),
            (self.timeout_s > 0, f"timeout_s: expected > 0 seconds, found {self.timeout_s}"),
            (
                self.prune_rms_angstrom is None or self.prune_rms_angstrom > 0,
                f"prune_rms_angstrom: expected > 0 angstrom or null, found {self.prune_rms_angstrom}",
            ),
            (
                self.energy_window_kcal_mol is None or self.energy_window_kcal_mol > 0,
                "energy_window_kcal_mol: expected > 0 kcal/mol or null, "
                f"found {self.energy_window_kcal_mol}",
            ),
            (
                self.mmff_max_iterations >= 0,
                f"mmff_max_iterations: expected >= 0, found {self.mmff_max_iterations}",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturizeConfig:
    """What becomes of one source record: which atoms are kept and what is turned away."""

    explicit_hydrogens: bool = False
    """Keep every hydrogen as an atom. By default only those stay that carry information, by the rules
    of RDKit's ``RemoveHs``: isotopes, molecular hydrogen, and the one that says which way an imine
    ``C=N-H`` points."""
    max_atoms: int = 256
    """Molecules with more kept atoms are rejected: relation matrices grow with the square."""
    require_coordinates: bool = False
    """Reject molecules that end up without coordinates."""
    salts: Literal["keep", "largest_fragment", "reject"] = "keep"
    """What to do with records of several fragments. The largest has most atoms, then most mass,
    then comes first."""
    dummy_atoms: Literal["reject", "other"] = "reject"
    """Atoms without an element (``*``, R-groups, query atoms): reject the record, or give them the
    code "other" as OGB does."""
    canonical_order: bool = False
    """Number atoms as in the canonical SMILES instead of as in the source."""
    conformers: ConformerConfig = field(default_factory=ConformerConfig)
    """Coordinates for records that have none."""

    def __post_init__(self) -> None:
        check_all(
            (
                1 <= self.max_atoms <= ATOM_LIMIT,
                f"max_atoms: expected 1 to {ATOM_LIMIT}, found {self.max_atoms}",
            )
        )
