"""The heavy atoms in the text of a record, to see whether a SMILES and a geometry can be of the same molecule.

Parsing both with RDKit would take as long as making the molecule. Counting element symbols takes microseconds, and is
enough to notice that rows and geometries do not match.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

_SMILES_ATOM: Final = re.compile(
    r"\[\d*(?P<bracket>[A-Z][a-z]?|[a-z][a-z]?|\*)[^\]]*\]|(?P<organic>Cl|Br|[BCNOPSFIbcnops*])"
)
_HYDROGENS: Final = frozenset({"H", "D", "T"})


def formula_of_smiles(smiles: str) -> str:
    """The heavy atoms of a SMILES as a formula in alphabetical order, such as ``C2 O1``."""
    text = smiles.split(None, 1)[0] if smiles.strip() else ""  # a name or an extension may follow
    return _formula(match["bracket"] or match["organic"] for match in _SMILES_ATOM.finditer(text))


def num_heavy_atoms(smiles: str) -> int:
    """The number of heavy atoms of a SMILES without name."""
    symbols = (match["bracket"] or match["organic"] for match in _SMILES_ATOM.finditer(smiles))
    return sum(symbol.capitalize() not in _HYDROGENS for symbol in symbols)


def formula_of_molblock(block: str) -> str | None:
    """The same formula of a V2000 or V3000 block; None if it is malformed."""
    lines = block.split("\n", 4)
    if len(lines) < 5:
        return None
    if "V3000" in lines[3]:
        atoms = lines[4].partition("BEGIN ATOM\n")[2].partition("M  V30 END ATOM")[0].splitlines()
        return _formula(line.split()[3] for line in atoms if len(line.split()) > 3)
    try:
        num_atoms = int(lines[3][:3])
    except ValueError:
        return None
    # Columns of the CTfile format: ten characters each for x, y and z, a space, three for the symbol.
    return _formula(line[31:34].strip() for line in lines[4].split("\n", num_atoms)[:num_atoms])


def _formula(symbols: Iterable[str]) -> str:
    counts = Counter(symbol.capitalize() for symbol in symbols)
    return " ".join(
        f"{symbol}{counts[symbol]}" for symbol in sorted(counts) if symbol not in _HYDROGENS
    )
