"""Molecules that occur more than once among those of a task, as they are or in another form, and their parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moleblend_ray.chemistry.scaffolds import Split


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeats:
    """How often molecules occur again. Salts, protonation states and tautomers of a molecule are forms of it; stereoisomers
    are molecules of their own."""

    distinct: int
    """Number of different molecules in all parts."""
    test_seen: int
    """Test molecules that are also among those for training or validation, so that scores of them say little about new
    ones."""
    valid_seen: int
    """Validation molecules that are also among those for training."""
    example: tuple[int, int] | None
    """Indices of a test molecule that was seen and of one of its forms elsewhere; without, of such a validation molecule;
    None if there is none."""

    @classmethod
    def of(cls, smiles: Sequence[str], split: Split) -> Repeats:
        """Among the molecules of ``split``, by (M,) SMILES of all."""
        # Here, as results are read and written where there is no RDKit.
        from moleblend_ray.chemistry.inchi import parent_keys

        rows = [int(row) for part in split for row in part]
        keys = dict(zip(rows, parent_keys([smiles[row] for row in rows]), strict=True))
        first: dict[str, int] = {}
        seen: dict[str, list[tuple[int, int]]] = {}
        for name, part in split._asdict().items():
            seen[name] = [(int(row), first[keys[row]]) for row in part if keys[row] in first]
            for row in part:
                first.setdefault(keys[row], int(row))
        pairs = seen["test"] + seen["valid"]
        return cls(
            distinct=len(first),
            test_seen=len(seen["test"]),
            valid_seen=len(seen["valid"]),
            example=pairs[0] if pairs else None,
        )
