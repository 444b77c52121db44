"""Amounts as Kubernetes writes them: 500m, 3Gi, 2."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Final

_FACTORS: Final = {
    "": Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9),
    "T": Decimal(10**12), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
}  # fmt: skip


def amount(value: Any) -> Decimal | None:
    """The number that ``value`` denotes, in cores or bytes; None if it is not a quantity."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)", str(value))
    if found is None or found[2] not in _FACTORS:
        return None
    return Decimal(found[1]) * _FACTORS[found[2]]


def text(value: Decimal) -> str:
    """Bytes as Gi or Mi, other numbers unchanged."""
    for unit in ("Gi", "Mi"):
        if value >= _FACTORS[unit]:
            return f"{value / _FACTORS[unit]:.4g}{unit}"
    return f"{value.normalize():f}"
