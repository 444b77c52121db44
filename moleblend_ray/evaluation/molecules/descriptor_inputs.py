"""RDKit's descriptors as inputs of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.dataset.descriptors import DescriptorScaling
from moleblend_ray.errors import CheckpointError


class DescriptorTable(NamedTuple):
    """Descriptors of M molecules."""

    names: tuple[str, ...]
    """(D,) RDKit's names of the descriptors."""
    values: NDArray[np.float64]
    """(M, D), each in its own unit; some are NaN or infinite."""

    @classmethod
    def of(cls, smiles: Sequence[str]) -> DescriptorTable:
        """All descriptors of RDKit; about 5 ms per drug-like molecule."""
        # Here, as models that read no descriptors need no RDKit.
        from moleblend_ray.chemistry.descriptors import DESCRIPTOR_NAMES, descriptors

        return cls(DESCRIPTOR_NAMES, descriptors(smiles))

    def take(self, rows: NDArray[np.int64]) -> DescriptorTable:
        """The molecules at ``rows``."""
        return self._replace(values=self.values[rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class DescriptorInputs:
    """Which descriptors a model reads, and how they are scaled."""

    names: tuple[str, ...]
    """(D,) RDKit's names, in the order of the model's inputs."""
    scaling: DescriptorScaling
    """Fitted to the training part."""

    @classmethod
    def fit(cls, training: DescriptorTable) -> DescriptorInputs:
        """All descriptors, scaled by these molecules."""
        return cls(names=training.names, scaling=DescriptorScaling.fit(training.values))

    def of(self, table: DescriptorTable) -> NDArray[np.float32]:
        """(M, D) inputs; CheckpointError if a descriptor is not in ``table``."""
        values = table.values
        if table.names != self.names:
            place = {name: index for index, name in enumerate(table.names)}
            lacking = [name for name in self.names if name not in place]
            if lacking:
                raise CheckpointError(
                    f"the model reads descriptors {lacking[:5]}, which this RDKit does not have; use the release with which "
                    "it was fine-tuned"
                )
            values = values[:, [place[name] for name in self.names]]
        return self.scaling.apply(values).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return {"names": list(self.names), **self.scaling.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> DescriptorInputs:
        """From what :meth:`to_json` gave; KeyError, TypeError or ValueError for anything else."""
        return cls(names=tuple(document["names"]), scaling=DescriptorScaling.from_json(document))
