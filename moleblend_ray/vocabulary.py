"""Integer vocabularies shared by featurizer, relation kernels and model.

They stand apart from ``chemistry`` so that training from prepared shards needs neither RDKit nor ``chemistry``.
Codes are those of OGB 1.3.6 (``ogb.utils.features``), the last code of an open vocabulary meaning "other".
"""

from __future__ import annotations

from typing import Final

FEATURIZER_VERSION: Final = 1
"""Raised whenever the same input would give other codes; part of every data-set fingerprint."""

ATOM_FEATURE_NAMES: Final = (
    "atomic_number",
    "chirality",
    "degree",
    "formal_charge",
    "num_hydrogens",
    "num_radical_electrons",
    "hybridization",
    "is_aromatic",
    "is_in_ring",
)
"""The 9 OGB atom categories, in column order."""

ATOM_VOCAB_SIZES: Final = (119, 5, 12, 12, 10, 6, 6, 2, 2)
"""Number of codes of each atom category. Atomic number Z has code Z - 1; 118 means other."""

BOND_FEATURE_NAMES: Final = ("bond_type", "stereo", "is_conjugated")
"""The 3 OGB bond categories, in column order."""

BOND_VOCAB_SIZES: Final = (5, 6, 2)
"""Number of codes of each bond category: type (4 = other), stereo (5 = STEREOANY), conjugated."""

NUM_BOND_CODES: Final = 1 + 5 * 6 * 2
"""Codes of one hop of a path: 0 for no hop, else ``1 + (type * 6 + stereo) * 2 + conjugated``."""

NO_HOP: Final = 0
"""Path code where the path has no such hop (also the diagonal and unreachable pairs)."""

NUM_HOPS: Final = 5
"""Hops of a path that the edge relation keeps (paper, appendix; ``multi_hop_max_dist`` in the official code)."""

UNREACHABLE: Final = 255
"""Shortest-path distance of atoms in different fragments (510 in the official code)."""

MAX_SPD: Final = 254
"""Longest shortest-path distance kept; longer ones, only possible beyond 255 atoms in a chain, are stored as this."""

_SYMBOLS = """
    H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb
    Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au
    Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts
    Og
"""
ELEMENT_SYMBOLS: Final = (*_SYMBOLS.split(), "*")
"""Symbol of each code of the first atom category: code Z - 1 is the element of atomic number Z, the last is none."""
