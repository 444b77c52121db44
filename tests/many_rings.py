"""Molecules of many rings, some of which take RDKit very long, and the comparison of their outcomes."""

from __future__ import annotations

from typing import Final

import numpy as np

from moleblend_ray.chemistry.molecule import Molecule, Outcome
from moleblend_ray.chemistry.rejection import Rejection

C60: Final = (
    "c12c3c4c5c1c1c6c7c2c2c8c3c3c9c4c4c%10c5c5c1c1c6c6c%11c7c2c2c7c8c3c3c8c9c4c4c9c%10c5c5c1c1c6"
    "c6c%11c2c2c7c3c3c8c4c4c9c5c1c1c6c2c3c41"
)

DODECAHEDRANE: Final = "C12C3C4C5C1C1C6C7C2C2C3C3C4C4C5C1C1C6C5C7C2C3C5C41"


def cycloparaphenylene(num_rings: int) -> str:
    """2^n smallest rings go around it; RDKit reads 14 benzenes in a second, each more takes four times as long."""
    return "c1%99ccc(cc1)" + "-c1ccc(cc1)" * (num_rings - 1) + "-%99"


def cyclodextrin(num_sugars: int) -> str:
    """2^n smallest rings go around it, too. RDKit reads 14 sugars in 0.1 s, and counts bridgeheads for hours."""
    return "C1%99" + "OC(CO)C(C(O)C1O)OC1" * (num_sugars - 1) + "OC(CO)C(C(O)C1O)O%99"


def assert_identical(there: Outcome, here: Outcome) -> None:
    """Check that both are the same rejection, or molecules with the same bytes in every array."""
    if isinstance(here, Rejection):
        assert there == here
        return
    assert isinstance(there, Molecule)
    for name in Molecule.__slots__:
        first, second = getattr(there, name), getattr(here, name)
        if isinstance(second, np.ndarray):
            assert (first.dtype, first.shape) == (second.dtype, second.shape)
            assert first.tobytes() == second.tobytes(), name
        else:
            assert first == second
