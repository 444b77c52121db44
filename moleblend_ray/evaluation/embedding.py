"""Molecules to vectors: the encoder's graph token, and a fine-tuned head's predictions where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from moleblend_ray.data.batch import build_micro_batches
from moleblend_ray.data.block import block_from_table
from moleblend_ray.data.shards import MOLECULE_FIELDS
from moleblend_ray.evaluation.finetune import StartingPoint, build_pretrained
from moleblend_ray.evaluation.property_model import SavedProperty
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.moleblend import MoleBlendModel

MOLECULE_COLUMNS = ("mol_id", "source_row", "smiles", "conformer_status")
"""Columns of a shard that stand beside the embeddings."""

CHUNK = 1024
"""Molecules whose relation matrices are in memory at once."""


def part_schema(dim: int, predictions: Sequence[str]) -> pa.Schema:
    """Columns of a part: vectors of length ``dim``, and a column for each name that a fine-tuned head predicts."""
    return pa.schema(
        [
            *(field for field in MOLECULE_FIELDS if field.name in MOLECULE_COLUMNS),
            pa.field("embedding", pa.list_(pa.float32(), dim)),
            *(pa.field(f"prediction:{name}", pa.float64()) for name in predictions),
        ]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedder:
    """A model and how to run it; every relation visible, the stored first conformer, no dropout."""

    model: MoleBlendModel
    """In evaluation mode, on `device`."""
    fine_tuned: SavedProperty | None
    """The fine-tuned model whose head predicts, in evaluation mode on `device`; None for a pretrained encoder."""
    batch_size: int
    """Molecules computed at once."""
    device: torch.device
    """Where."""

    @classmethod
    def build(
        cls,
        start: StartingPoint,
        fine_tuned: SavedProperty | None,
        batch_size: int,
        device: torch.device,
    ) -> Embedder:
        """Put the encoder ``start``, and the head that goes with it, on ``device``."""
        if fine_tuned is not None:
            fine_tuned = fine_tuned._replace(model=fine_tuned.model.to(device).eval())
        return cls(
            model=build_pretrained(start).to(device).eval(),
            fine_tuned=fine_tuned,
            batch_size=batch_size,
            device=device,
        )

    def part(self, table: pa.Table) -> pa.Table:
        """The rows of a shard table, in their order, with embeddings and, if trained, a prediction for each column."""
        embeddings, outputs = self._run(table)
        flat = pa.array(embeddings.reshape(-1), type=pa.float32())
        columns = [table[name] for name in MOLECULE_COLUMNS]
        columns.append(pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1]))
        predicted: tuple[str, ...] = ()
        if self.fine_tuned is not None:
            predicted = self.fine_tuned.trained.columns
            columns += list(self.fine_tuned.trained.readout(outputs).T)
        return pa.table(columns, schema=part_schema(embeddings.shape[1], predicted))

    @torch.no_grad()
    def _run(self, table: pa.Table) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        block = block_from_table(table, np.arange(table.num_rows, dtype=np.int64))
        by_size = np.argsort(block.num_atoms, kind="stable")
        embeddings = np.empty((len(block), self.model.config.dim), dtype=np.float32)
        num_targets = len(self.fine_tuned.trained.columns) if self.fine_tuned else 0
        outputs = np.empty((len(block), num_targets))
        for start in range(0, len(block), CHUNK):
            chunk = block.take(by_size[start : start + CHUNK])
            for micro in build_micro_batches(chunk, 0, 0, self.batch_size):
                batch = MoleculeBatch.from_micro_batch(micro, device=self.device)
                vectors = self.model.embed(batch)
                embeddings[micro.molecule_ids] = vectors.float().cpu().numpy()
                if self.fine_tuned is not None:
                    predicted = self.fine_tuned.model.head(vectors)
                    outputs[micro.molecule_ids] = predicted.double().cpu().numpy()
        return embeddings, outputs
