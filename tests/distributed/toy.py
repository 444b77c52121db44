"""Random tree-shaped molecules and a very small model: enough to train for real, without chemistry or files.

Imported by tests, and by ``worker.py`` which runs as a script of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from moleblend_ray.data.batches.batch import StepBatch, build_micro_batches
from moleblend_ray.data.batches.order import DataOrder
from moleblend_ray.data.config import OrderConfig
from moleblend_ray.data.dataset.block import MoleculeBlock, undescribed
from moleblend_ray.model.blending import BlendConfig
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.losses import LossConfig
from moleblend_ray.training.config import OptimConfig, Strategy, TrainConfig
from moleblend_ray.training.learner import Learner, build_learner
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.metrics import Record
from moleblend_ray.training.ranks import Ranks

NUM_MOLECULES = 50
ORDER = OrderConfig(seed=3, global_batch_size=16, num_streams=4, shuffle_window=50, chunk_rows=8)
MICRO_BATCH_SIZE = 2
"""Half of a stream's share of a step: gradients accumulate over two micro-batches a stream."""

MODEL = ModelConfig(
    num_layers=2,
    dim=32,
    ffn_dim=32,
    num_heads=4,
    num_kernels=8,
    pair_dim=4,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    drop_path=0.0,
)
DROPOUT_MODEL = ModelConfig(
    num_layers=2, dim=32, ffn_dim=32, num_heads=4, num_kernels=8, pair_dim=4, dropout=0.1
)


def molecule(molecule_id: int) -> MoleculeBlock:
    """A random tree of 3 to 12 atoms; every fifth molecule has no coordinates."""
    rng = np.random.default_rng(molecule_id)
    atoms = int(rng.integers(3, 13))
    features = rng.integers(0, [9, 4, 5, 12, 5, 5, 6, 2, 2], (atoms, 9)).astype(np.uint8)
    parents = np.array([rng.integers(0, child) for child in range(1, atoms)])
    bonds = np.stack([parents, np.arange(1, atoms)], 1).astype(np.uint16)
    return MoleculeBlock(
        molecule_ids=np.array([molecule_id], np.int64),
        num_atoms=np.array([atoms], np.int32),
        num_bonds=np.array([atoms - 1], np.int32),
        atom_features=features,
        bonds=bonds,
        bond_features=rng.integers(0, [4, 3, 2], (atoms - 1, 3)).astype(np.uint8),
        positions=rng.normal(0, 2, (atoms, 3)).astype(np.float32),
        position_mask=np.full(atoms, molecule_id % 5 != 0),
        descriptors=undescribed(1),
    )


def concat(blocks: Sequence[MoleculeBlock]) -> MoleculeBlock:
    """One block of all molecules, in order."""
    return MoleculeBlock(
        **{
            field.name: np.concatenate([getattr(block, field.name) for block in blocks])
            for field in fields(MoleculeBlock)
        }
    )


def steps(
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    *,
    num_molecules: int = NUM_MOLECULES,
    micro_batch_size: int = MICRO_BATCH_SIZE,
    num_streams: int = ORDER.num_streams,
) -> Iterator[StepBatch]:
    """This rank's share of each step, from step ``start`` on, without end."""
    order = DataOrder(num_molecules, replace(ORDER, num_streams=num_streams))
    step = start
    while True:
        micro_batches = [
            micro
            for stream in range(rank, num_streams, world_size)
            for micro in build_micro_batches(
                concat([molecule(int(i)) for i in order.stream_batches(step, 1, stream)[0]]),
                step,
                stream,
                micro_batch_size,
            )
        ]
        yield StepBatch(step=step, micro_batches=tuple(micro_batches))
        step += 1


def learner(
    ranks: Ranks | None = None,
    *,
    strategy: Strategy = "none",
    num_steps: int = 8,
    model: ModelConfig = MODEL,
    loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
    seed: int = 11,
    **train: Any,
) -> Learner:
    """A new learner of the toy model; the same parameters each time for a seed."""
    return build_learner(
        model,
        train=TrainConfig(num_steps=num_steps, strategy=strategy, **train),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.01),
        blend=BlendConfig(),
        loss=loss,
        seed=seed,
        ranks=ranks or Ranks(),
    )


def records(learner: Learner, steps: Iterator[StepBatch], **options: Any) -> list[Record]:
    """Train, and collect the record of every step."""
    found: list[Record] = []
    fit(learner, steps, **options, hooks=Hooks(report=found.append))
    return found
