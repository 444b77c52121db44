"""Vectors of molecules: the encoder's graph token, and the predictions of a fine-tuned model if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.dataset.shards import MOLECULE_FIELDS
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.models.batches import (
    MOLECULE_COLUMNS,
    batches_by_size,
    descriptors_of_views,
    molecules_at_once,
    views_of,
    without_coordinates,
)
from moleblend_ray.evaluation.models.finetune import StartingPoint, build_pretrained
from moleblend_ray.evaluation.models.property_model import SavedProperty, distances_alone
from moleblend_ray.model.blending import only_geometry
from moleblend_ray.model.moleblend import MoleBlendModel


def part_schema(dim: int, predictions: Sequence[str]) -> pa.Schema:
    """Columns of a part: vectors of length ``dim``, and one column per property that a fine-tuned model predicts."""
    return pa.schema(
        [
            *(field for field in MOLECULE_FIELDS if field.name in MOLECULE_COLUMNS),
            pa.field("embedding", pa.list_(pa.float32(), dim)),
            *(pa.field(f"prediction:{name}", pa.float64()) for name in predictions),
        ]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedder:
    """A model and how to run it: with the stored first conformer or 2D relations alone, without dropout."""

    model: MoleBlendModel
    """The encoder, in evaluation mode on `device`."""
    fine_tuned: SavedProperty | None
    """The fine-tuned model that predicts, in evaluation mode on `device`; None for a pretrained encoder."""
    form: MoleculeForm | None
    """The form of the molecules of training; None: unknown."""
    uri: str
    """URI that the model comes from."""
    fingerprint: str
    """SHA-256 of the encoder, or of the whole fine-tuned model."""
    batch_size: int
    """Molecules computed at once."""
    device: torch.device
    """Device on which they are computed."""
    coordinates: bool
    """Whether the model sees the coordinates of a molecule that has some."""

    @classmethod
    def build(
        cls,
        start: StartingPoint,
        fine_tuned: SavedProperty | None,
        *,
        uri: str,
        fingerprint: str,
        batch_size: int | None,
        device: torch.device,
        coordinates: bool = True,
    ) -> Embedder:
        """Move the encoder ``start``, and the fine-tuned model that it comes from, to ``device``. ``batch_size`` None: as many molecules as
        suit it."""
        # Its relation heads are drawn, from PyTorch's generator, which is the caller's.
        with torch.random.fork_rng(devices=[]):
            model = build_pretrained(start)
        if fine_tuned is not None:
            fine_tuned = fine_tuned._replace(model=fine_tuned.model.to(device).eval())
        return cls(
            model=model.to(device).eval(),
            fine_tuned=fine_tuned,
            form=start.molecules,
            uri=uri,
            fingerprint=fingerprint,
            batch_size=molecules_at_once(batch_size, device),
            device=device,
            coordinates=coordinates,
        )

    @property
    def conformers(self) -> int:
        """Conformers of each molecule that the encoder should see: 1, or 0 if it was fine-tuned without coordinates."""
        return 1 if self.fine_tuned is None else min(1, self.fine_tuned.conformers)

    @property
    def needs_coordinates(self) -> bool:
        """Whether vectors of molecules without coordinates mean nothing, as the encoder was fine-tuned on distances alone."""
        return self.fine_tuned is not None and self.fine_tuned.sees_geometry_alone

    def require_coordinates(self, conformers: bool | int) -> None:
        """Raise ConfigError if no ``conformers`` are asked for, but the encoder needs coordinates."""
        if self.needs_coordinates and not conformers:
            raise ConfigError(distances_alone("conformers: expected true", self.uri))

    @property
    def predicted(self) -> tuple[str, ...]:
        """Columns that the fine-tuned model predicts."""
        return self.fine_tuned.trained.columns if self.fine_tuned else ()

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table that :meth:`part` returns."""
        return part_schema(self.model.config.dim, self.predicted)

    def describe(self) -> dict[str, Any]:
        """The part of ``embeddings.json`` that describes the vectors."""
        return {
            "dim": self.model.config.dim,
            "predictions": list(self.predicted),
            "checkpoint": {"uri": self.uri, "fingerprint": self.fingerprint},
        }

    def part(self, table: pa.Table) -> pa.Table:
        """The rows of a shard table in their order, with embeddings and, for a fine-tuned model, predictions."""
        if not self.coordinates:
            table = without_coordinates(table)
        embeddings, outputs = self._run(table)
        flat = pa.array(embeddings.reshape(-1), type=pa.float32())
        columns = [table[name] for name in MOLECULE_COLUMNS]
        columns.append(pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1]))
        if self.fine_tuned is not None:
            columns += list(self.fine_tuned.trained.readout(outputs).T)
        return pa.table(columns, schema=self.schema)

    @torch.no_grad()
    def _run(self, table: pa.Table) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        views = views_of(table, 1)
        embeddings = np.empty((len(views), self.model.config.dim), dtype=np.float32)
        outputs = np.empty((len(views), len(self.predicted)))
        models = [] if self.fine_tuned is None else [self.fine_tuned.trained.descriptors]
        shown = descriptors_of_views(models, table["smiles"].to_pylist(), views)
        for rows, batch in batches_by_size(table, views, self.batch_size, self.device):
            # Graphs that the encoder was tuned without would move its vectors to where it never was.
            blend = only_geometry(batch) if self.needs_coordinates else None
            embeddings[rows] = self.model.embed(batch, blend).float().cpu().numpy()
            if self.fine_tuned is not None:
                # The whole model, as its head may use the output of the encoder in another way than the embedding.
                inputs = shown[0].of(rows, self.device)
                outputs[rows] = self.fine_tuned.model(batch, inputs).double().cpu().numpy()
        return embeddings, outputs
