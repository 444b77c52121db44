"""Batches of the molecules of a shard for prediction: similar sizes together, every relation visible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from moleblend_ray.data.batches.batch import build_micro_batches
from moleblend_ray.data.config import CPU_MICRO_BATCH, GPU_MICRO_BATCH
from moleblend_ray.data.dataset.block import GraphColumns, gather
from moleblend_ray.evaluation.molecules.descriptor_inputs import DescriptorInputs, DescriptorTable
from moleblend_ray.model.batch import MoleculeBatch

MOLECULE_COLUMNS = ("mol_id", "source_row", "smiles", "conformer_status")
"""Columns of a shard that are copied to the output of a model."""

_TWO_DIMENSIONAL: Final = "none"
"""Status of a molecule without coordinates."""

CHUNK = 1024
"""Conformers whose relation matrices are in memory at once."""


def views_of(table: pa.Table, most_conformers: int) -> NDArray[np.int64]:
    """(M,) number of views of each molecule of a shard table: one per conformer, at most ``most_conformers`` (at least
    1), and one if it has no conformer."""
    stored = table["num_conformers"].to_numpy().astype(np.int64)
    views: NDArray[np.int64] = np.clip(stored, 1, max(1, most_conformers))
    return views


def without_coordinates(table: pa.Table) -> pa.Table:
    """The rows of a shard table as of molecules that have 2D relations alone, whatever coordinates the source has."""
    replaced = {
        "conformer_status": _TWO_DIMENSIONAL,
        "num_conformers": 0,
        "positions": [],
        "position_mask": [],
    }
    for name, value in replaced.items():
        place, field = table.schema.get_field_index(name), table.schema.field(name)
        table = table.set_column(place, field, pa.array([value] * len(table), field.type))
    return table


def molecules_at_once(asked: int | None, device: torch.device) -> int:
    """``asked``, or where it is None as many as suit the device: the host of a GPU launches all kernels again for each batch, and on
    CPUs small batches have less padding."""
    if asked is not None:
        return asked
    return CPU_MICRO_BATCH if device.type == "cpu" else GPU_MICRO_BATCH


def batches_by_size(
    table: pa.Table, views: NDArray[np.int64], batch_size: int, device: torch.device
) -> Iterator[tuple[NDArray[np.int64], MoleculeBatch]]:
    """Every view of every molecule once, as (rows, batch of B) with B at most ``batch_size``.

    ``views`` is (M,) as from :func:`views_of`. Row (B,) ``sum(views[:m]) + c`` is conformer c of molecule m.
    """
    columns = GraphColumns.from_table(table)
    first_row = np.cumsum(views) - views
    by_size = np.argsort(columns.rows[:, 0], kind="stable")
    step = max(1, CHUNK // int(views.max(initial=1)))
    for start in range(0, len(by_size), step):
        chunk = by_size[start : start + step]
        taken = views[chunk]
        molecule = np.repeat(chunk, taken)
        conformer = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        block = gather(
            [columns],
            np.zeros_like(molecule),
            molecule,
            first_row[molecule] + conformer,
            conformer,
        )
        for micro in build_micro_batches(block, 0, 0, batch_size):
            batch = MoleculeBatch.from_micro_batch(micro, device=device)
            yield micro.molecule_ids, batch


class ViewDescriptors(NamedTuple):
    """What one model reads beside the views (conformers) of the molecules of a table."""

    inputs: NDArray[np.float32] | None
    """(M, D) of the molecules; None if the model reads no descriptors."""
    molecule: NDArray[np.int64]
    """(R,) the molecule of each view."""

    def of(self, rows: NDArray[np.int64], device: torch.device) -> Tensor | None:
        """(B, D) float32 of the views ``rows`` (B,)."""
        if self.inputs is None:
            return None
        return torch.from_numpy(self.inputs[self.molecule[rows]]).to(device)


def descriptors_of_views(
    models: Sequence[DescriptorInputs | None], smiles: Sequence[str], views: NDArray[np.int64]
) -> list[ViewDescriptors]:
    """What each of ``models`` reads; the descriptors of ``smiles`` (M,), with ``views`` (M,) each, are computed once, if at
    all."""
    table = DescriptorTable.of(smiles) if any(models) else None
    molecule = np.repeat(np.arange(len(views)), views)
    return [
        ViewDescriptors(None if model is None or table is None else model.of(table), molecule)
        for model in models
    ]
