"""Molecules that occur more than once among those of a task, as they are or in another form, and their parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.data.dataset.block import MoleculeBlock
from moleblend_ray.relations.skeletons import fragments


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeats:
    """How often molecules occur again. Salts, protonation states and tautomers of a molecule are forms of it; stereoisomers
    (one with open stereo, too) and tautomers that differ in hydrogens on carbon (keto and enol) are molecules of their
    own."""

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
    def of(cls, smiles: Sequence[str], graphs: MoleculeBlock, split: Split) -> Repeats:
        """Among the molecules of ``split``, by (M,) SMILES and graphs of all."""
        keys = _keys(smiles, graphs)
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


def _keys(smiles: Sequence[str], graphs: MoleculeBlock) -> list[str]:
    """(M,) texts that are equal for the forms of one molecule."""
    # Here, as results are read and written where there is no RDKit.
    from moleblend_ray.chemistry.inchi import parent_keys

    # A key takes RDKit half a millisecond, and most molecules are like no other.
    texts = _with_shared_skeletons(smiles, graphs)
    keys = dict(zip(texts, parent_keys(texts), strict=True))
    return [keys.get(text, text) for text in smiles]


def _with_shared_skeletons(smiles: Sequence[str], graphs: MoleculeBlock) -> list[str]:
    """The different SMILES, in order, that have a fragment whose skeleton occurs in another of them, too.

    Fragments of one heavy atom count in molecules that have no others: the fragment that a key is of is chosen likewise.
    """
    different = list(dict.fromkeys(smiles))
    number = {text: index for index, text in enumerate(different)}
    found = fragments(graphs.num_atoms, graphs.num_bonds, graphs.atom_features[:, 0], graphs.bonds)
    is_large = found.num_heavy > 1
    has_large = np.zeros(len(smiles), dtype=np.bool_)
    has_large[found.molecules[is_large]] = True
    counts = is_large | ~has_large[found.molecules]
    numbers = np.array([number[text] for text in smiles], dtype=np.int64)[found.molecules[counts]]
    # Each skeleton once in each SMILES.
    pairs = np.unique(np.stack([found.skeletons[counts], numbers.astype(np.uint64)]), axis=1)
    _, inverse, occurrences = np.unique(pairs[0], return_inverse=True, return_counts=True)
    return [different[index] for index in np.unique(pairs[1, occurrences[inverse] > 1])]
