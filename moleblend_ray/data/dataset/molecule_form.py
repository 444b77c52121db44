"""Which molecule a record becomes, so that a model meets later molecules in the form of those that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from moleblend_ray.data.dataset.differences import differences


@dataclass(frozen=True, kw_only=True, slots=True)
class MoleculeForm:
    """The settings of ``featurize`` that decide which atoms a molecule has, and in which order, with the same values and
    defaults."""

    explicit_hydrogens: bool = False
    """Every hydrogen is an atom."""
    salts: Literal["keep", "largest_fragment", "reject"] = "keep"
    """What becomes of records of several fragments."""
    dummy_atoms: Literal["reject", "other"] = "reject"
    """What becomes of atoms without an element."""
    canonical_order: bool = False
    """Atoms are in the order of the canonical SMILES. The codes of chiral atoms depend on the order of their neighbours. Models
    from before this was stored count as trained on molecules in the order of their source."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MoleculeForm:
        """From a JSON value, which may hold other settings as well; what it lacks has its default."""
        return cls(
            **{field.name: value[field.name] for field in fields(cls) if field.name in value}
        )

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> MoleculeForm:
        """That of a prepared data set, by the ``options`` of its manifest."""
        return cls.from_json(options.get("featurize", {}))

    def difference(self, other: MoleculeForm) -> str:
        """Each setting that differs, with the value here and that of ``other``; empty if none does."""
        return ", ".join(
            f"featurize.{name} {ours!r} and {theirs!r}"
            for name, (ours, theirs) in differences(asdict(self), asdict(other)).items()
        )
