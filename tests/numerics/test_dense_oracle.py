"""The model compared with a plain second implementation, in float64, on batches that break naive code."""

from __future__ import annotations

import dataclasses
from typing import Literal

import dense_oracle
import molecule_zoo as zoo
import numpy as np
import pytest
import torch
from torch.func import functional_call

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend, BlendConfig, draw_blend
from moleblend_ray.model.config import LossConfig
from moleblend_ray.model.hub import import_official
from moleblend_ray.model.losses import loss_counts, loss_means, pretraining_loss_sums, total_loss
from moleblend_ray.model.moleblend import MoleBlendModel

ORIGIN_ATOM = zoo.ring(6, seed=3).positions.copy()
ORIGIN_ATOM[2] = 0.0
COINCIDENT = zoo.chain(4, seed=5).positions.copy()
COINCIDENT[1] = COINCIDENT[3]
OTHER_BONDS = zoo.ring(6, seed=8)
OTHER_BONDS.bond_features[0] = (4, 0, 0)
OTHER_BONDS.bond_features[3] = (1, 5, 1)

BATCHES = {
    "two ordinary molecules": [zoo.ring(5, tail=2), zoo.ring(6, tail=4, seed=1)],
    "cage with ties": [zoo.chain(3), zoo.cage()],
    "salt": [zoo.chain(2), zoo.salt()],
    "chains of 14 and 22": [zoo.chain(14), zoo.chain(22)],
    "single atom among others": [zoo.single_atom(), zoo.ring(4)],
    "only single atoms": [zoo.single_atom(), zoo.single_atom(seed=1)],
    "only short paths": [zoo.chain(2), zoo.ring(3), zoo.ring(3, seed=4)],
    "one molecule without coordinates": [zoo.ring(4).without_positions(), zoo.ring(5, tail=1)],
    "no coordinates at all": [zoo.chain(3).without_positions(), zoo.ring(4).without_positions()],
    "some atoms without coordinates": [zoo.chain(3), zoo.ring(5, tail=2).without_positions([1, 5])],
    "one atom with coordinates": [zoo.chain(2), zoo.ring(4).without_positions([0, 1, 2])],
    "atom at the origin, known": [zoo.chain(3), zoo.ring(6, seed=3).moved(ORIGIN_ATOM)],
    "atom at the origin, unknown": [
        zoo.chain(3),
        zoo.ring(6, seed=3).moved(ORIGIN_ATOM).without_positions([2]),
    ],
    "two atoms at one point": [zoo.chain(2), zoo.chain(4, seed=5).moved(COINCIDENT)],
    "bonds outside the 24 classes": [zoo.chain(3), OTHER_BONDS],
}
Missing = Literal["mask", "origin"]
PAPER_LOSS = LossConfig(ignore_other_bonds=True, denoise_lone_atoms=True)
SIZES = {"layers": 2, "dim": 24, "ffn": 36, "heads": 4, "kernels": 6, "pair": 5}


@pytest.mark.parametrize(
    ("missing_positions", "official_blend"), [("mask", False), ("mask", True), ("origin", True)]
)
@pytest.mark.parametrize("name", BATCHES)
def test_outputs_losses_and_gradients_equal_the_dense_computation(
    name: str, missing_positions: Missing, official_blend: bool
) -> None:
    molecules = BATCHES[name]
    batch = zoo.in_double(zoo.batch(molecules))
    blend = paper_blend(batch) if official_blend else keyed_blend(batch)
    compare(molecules, batch, blend, missing_positions)


def test_hop_axis_of_a_batch_may_be_shorter_than_five() -> None:
    """As in the official code for a batch of short paths: hops beyond the axis do not count as missing either."""
    molecules = BATCHES["only short paths"]
    batch = zoo.in_double(zoo.batch(molecules))
    batch = dataclasses.replace(batch, path_codes=batch.path_codes[..., :2])
    compare(molecules, batch, paper_blend(batch), "origin", num_hops=2)


def compare(
    molecules: list[zoo.ZooMolecule],
    batch: MoleculeBatch,
    blend: Blend,
    missing_positions: Missing,
    num_hops: int = 5,
) -> None:
    parameters = dense_oracle.official_parameters(**SIZES, seed=1)
    oracle = dense_oracle.run_oracle(
        parameters,
        molecules,
        choices_of(blend, batch.num_atoms.tolist()),
        missing_positions,
        num_hops,
    )
    oracle.total.backward()
    expected = {key: value.grad for key, value in parameters.items()}
    for value in parameters.values():
        value.grad = None

    config, state = import_official(parameters)
    config = dataclasses.replace(
        config,
        missing_positions=missing_positions,
        attention_dropout=0.0,
        activation_dropout=0.0,
        drop_path=0.0,
    )
    model = MoleBlendModel(config).double().train()
    output = functional_call(model, state, (batch, blend))
    sums = pretraining_loss_sums(output, batch, blend, PAPER_LOSS)
    counts = loss_counts(batch, blend, PAPER_LOSS)
    total_loss(sums, counts, PAPER_LOSS).backward()

    states = batch.pad_tokens(output.tokens)
    predicted = {
        "spd": output.spd_logits,
        "edge": output.edge_logits,
        "direction": output.direction,
        "noise": output.noise,
    }
    for row, n in enumerate(batch.num_atoms.tolist()):
        close(states[row, : n + 1], oracle.states[row], "states")
        for key in ("spd", "edge", "direction"):
            close(predicted[key][row, :n, :n], getattr(oracle, key)[row], key)
        close(output.noise[row, :n], oracle.noise[row], "noise")
    means = loss_means(sums, counts)
    # The paper does not have the other two losses.
    assert oracle.losses.keys() == means.keys() - {"distance", "environment", "descriptor"}
    for key in oracle.losses:
        close(means[key], oracle.losses[key], key)
    for key, value in parameters.items():
        theirs = expected[key]
        if theirs is None or not theirs.any():
            assert value.grad is None or value.grad.abs().max() < 1e-12, key
        elif not key.endswith("k_proj.bias"):
            assert value.grad is not None, key
            close(value.grad, theirs, key)


def keyed_blend(batch: MoleculeBatch) -> Blend:
    blend = draw_blend(batch, BlendConfig(), seed=4)
    return dataclasses.replace(blend, noise=blend.noise.double())


def paper_blend(batch: MoleculeBatch) -> Blend:
    """One map of choices for the whole batch; atoms without coordinates may show 3D, as in the official code."""
    generator = torch.Generator().manual_seed(9)
    B, N = batch.atom_mask.shape
    pair = torch.multinomial(torch.tensor([0.2, 0.2, 0.6]), N * N, True, generator=generator)
    atom = torch.rand(B, N, generator=generator) < 0.6
    noise = 0.2 * torch.randn(B, N, 3, generator=generator, dtype=torch.float64)
    return Blend(
        pair_choice=pair.view(N, N).to(torch.uint8).expand(B, N, N),
        atom_choice=atom.to(torch.uint8),
        noise=noise.masked_fill(~batch.position_mask[..., None], 0.0),
    )


def choices_of(blend: Blend, sizes: list[int]) -> list[dense_oracle.Choice]:
    return [
        dense_oracle.Choice(
            pair=blend.pair_choice[row, :n, :n].numpy().astype(np.int64),
            atom=blend.atom_choice[row, :n].numpy().astype(np.int64),
            noise=blend.noise[row, :n].numpy().astype(np.float64),
        )
        for row, n in enumerate(sizes)
    ]


def close(ours: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    scale = max(float(expected.detach().abs().max()), 1e-9)
    assert ours.shape == expected.shape, name
    assert float((ours - expected).detach().abs().max()) <= 1e-9 * scale, name
