"""Where the weights of a model come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moleblend_ray.data.dataset.molecule_form import MoleculeForm


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What is known of the training of a model; it goes with the weights wherever they are stored."""

    uri: str | None = None
    """The pretraining run or the file of official parameters, without credentials."""
    step: int | None = None
    """Optimizer steps that the weights were trained for."""
    data_fingerprint: str | None = None
    """Fingerprint of the prepared data set."""
    molecules: MoleculeForm | None = None
    """The form of its molecules; None: unknown."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries that trained the model."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Origin:
        """From a JSON value; TypeError or KeyError if it is none of this class."""
        molecules = value["molecules"]
        form = None if molecules is None else MoleculeForm.from_json(molecules)
        return cls(**{**value, "molecules": form})
