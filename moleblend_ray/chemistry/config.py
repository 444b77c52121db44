"""Settings of the chemistry layer, without RDKit so that the configuration of a job is composed quickly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from moleblend_ray.checks import above, at_least, check_all, within
from moleblend_ray.settings import typed

ATOM_LIMIT = 65_535
"""Most atoms of a molecule, as bonds store atom indices as uint16."""


MAX_CONFORMERS: Final = 255
"""Conformers of one molecule at most."""

SMILES_COLUMN: Final = "smiles"
"""Column of a table that holds the SMILES, unless a setting names another."""

MAX_ATOMS: Final = 256
"""Most kept atoms of a molecule, unless a setting says otherwise: relation matrices grow with the square of it."""


TIMEOUT_S: Final = 30.0
"""Seconds for each step of RDKit with a molecule of many rings, unless a setting says otherwise."""


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class ConformerConfig:
    """How to make coordinates if the source has none: ETKDGv3, then MMFF94, or UFF if MMFF94 lacks parameters."""

    generate: bool = False
    """Make conformers of molecules whose source has no coordinates."""
    count: int = 1
    """Conformers to make per molecule; they are stored in the order of their energies, lowest first."""
    prune_rms_angstrom: float | None = None
    """Leave out a conformer if its heavy atoms are closer than this (RMSD after alignment, angstrom) to those of one
    with lower energy; null keeps all."""
    energy_window_kcal_mol: float | None = None
    """Leave out conformers whose energy is more than this (kcal/mol) above the lowest; null keeps all. Has no effect if
    no force field ran."""
    seed: int = 7
    """Seeds the embedding together with the canonical SMILES, so that the result does not depend on the order of the
    file."""
    timeout_s: float = 3.0
    """Seconds for all conformers of a molecule: embedding, force field and pruning. By this limit the result
    can depend on the speed of the machine; the molecule's ``conformer_detail`` then says so."""
    mmff_max_iterations: int = 200
    """Force-field iterations per conformer; 0 leaves the embedded geometry as it is."""
    on_failure: Literal["keep_2d", "reject"] = "keep_2d"
    """What to do with a molecule that could not be embedded: keep it, with status ``failed`` and no coordinates, or
    reject it."""

    @classmethod
    def of_count(cls, count: int) -> ConformerConfig:
        """Settings for ``count`` conformers of each molecule without coordinates, 0 for none; the time limit grows with it."""
        most = max(1, count)
        return cls(generate=count > 0, count=most, timeout_s=most * cls().timeout_s)

    def __post_init__(self) -> None:
        check_all(
            *within(self, 1, MAX_CONFORMERS, "count"),
            *above(self, 0, "timeout_s", "prune_rms_angstrom", "energy_window_kcal_mol"),
            *at_least(self, 0, "mmff_max_iterations"),
        )


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturizeConfig:
    """How a source record becomes a molecule: which atoms are kept, and which records are rejected."""

    explicit_hydrogens: bool = False
    """Keep every hydrogen as an atom. By default only hydrogens that carry information are kept, by the rules of
    RDKit's ``RemoveHs``: isotopes, molecular hydrogen, and the one that defines the stereo of an imine ``C=N-H``."""
    max_atoms: int = MAX_ATOMS
    """Molecules with more kept atoms are rejected, as relation matrices grow with the square of this number."""
    require_coordinates: bool = False
    """Reject molecules for which there are no coordinates."""
    salts: Literal["keep", "largest_fragment", "reject"] = "keep"
    """What to do with records of several fragments. The largest fragment is the one with most heavy atoms; among
    these, the heaviest; among these, the first."""
    dummy_atoms: Literal["reject", "other"] = "reject"
    """Atoms without an element (``*``, R-groups, query atoms): reject the record, or give them the code "other" as OGB
    does."""
    canonical_order: bool = False
    """Number the atoms as in the canonical SMILES instead of as in the source."""
    conformers: ConformerConfig = field(default_factory=ConformerConfig)
    """How to make coordinates for records that have none."""
    descriptors: bool = False
    """Store RDKit's descriptors of each molecule, as targets of pretraining (``model.descriptor_head``); about 5 ms each."""
    timeout_s: float = TIMEOUT_S
    """Seconds that RDKit may take to read a record of many rings, without conformers, and as many for its descriptors and
    for its InChIKey. A record that takes longer is rejected (``too_complex``). Only by this limit and that of conformers
    can the result depend on the speed of the machine; ordinary molecules take less than a millisecond."""

    def __post_init__(self) -> None:
        check_all(*within(self, 1, ATOM_LIMIT, "max_atoms"), *above(self, 0, "timeout_s"))
