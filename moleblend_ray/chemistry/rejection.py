"""Why a source record is not a molecule of the data set."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RejectionCode(StrEnum):
    """Why a source record is not a molecule of the data set."""

    MISSING_SMILES = "missing_smiles"
    """The SMILES is null, empty or not a text."""
    UNPARSABLE_SMILES = "unparsable_smiles"
    """RDKit rejects the SMILES, because of its syntax or its chemistry."""
    INVALID_RECORD = "invalid_record"
    """An SDF record or geometry row is malformed, or a record of a text is too large to be read."""
    SANITIZATION_FAILED = "sanitization_failed"
    """The record is well formed but chemically impossible (valence, kekulization)."""
    EMPTY_MOLECULE = "empty_molecule"
    """The record has no atoms."""
    TOO_MANY_ATOMS = "too_many_atoms"
    """More kept atoms than ``FeaturizeConfig.max_atoms``."""
    TOO_COMPLEX = "too_complex"
    """RDKit takes longer than ``FeaturizeConfig.timeout_s`` or too much memory to read the record, or crashes."""
    UNSUPPORTED_ATOM = "unsupported_atom"
    """A dummy, query or unknown element."""
    MULTIPLE_FRAGMENTS = "multiple_fragments"
    """Several fragments while ``FeaturizeConfig.salts`` is "reject"."""
    NON_FINITE_COORDINATES = "non_finite_coordinates"
    """A coordinate is NaN or infinite."""
    IMPLAUSIBLE_COORDINATES = "implausible_coordinates"
    """An atom is farther than 10^6 angstrom from the origin."""
    NO_COORDINATES = "no_coordinates"
    """No coordinates while ``FeaturizeConfig.require_coordinates`` is on."""
    OVERLAPPING_ATOMS = "overlapping_atoms"
    """Two atoms are closer than in any bond; this is found when rows become shards."""
    GEOMETRY_MISMATCH = "geometry_mismatch"
    """The coordinates and the SMILES of the record are of different molecules."""
    EXCLUDED = "excluded"
    """A list published with the collection advises against the molecule."""
    CONFORMER_FAILED = "conformer_failed"
    """No conformer could be made, and the configuration says to reject such molecules."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A record that was rejected."""

    code: RejectionCode
    detail: str
    """One sentence for the quarantine that says what was found."""


class RejectedError(Exception):
    """Carries a rejection out of nested calls of the featurizer, which returns it and raises nothing."""

    def __init__(self, code: RejectionCode, detail: str) -> None:
        self.rejection = Rejection(code=code, detail=detail)


def one_line(message: object, limit: int = 200) -> str:
    """The message on one line, cut to ``limit`` characters, that can be stored as UTF-8."""
    text = " ".join(str(message).split())
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 3] + "..."
