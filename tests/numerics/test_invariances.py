"""Changes of the input that must not change the results, and those that must change them accordingly.

The direction and denoising heads predict in the coordinate frame of the file and are not equivariant under rotation.
They are invariant under translation; the denoising head, because it sums displacements.
"""

from __future__ import annotations

import dataclasses

import molecule_zoo as zoo
import numpy as np
import pytest
import torch

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend, BlendConfig, draw_blend
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.moleblend import MoleBlendModel

CONFIG = ModelConfig(
    num_layers=2, dim=32, ffn_dim=48, num_heads=4, num_kernels=8, pair_dim=8, distance_head=True
)


@pytest.fixture(scope="module", params=["mask", "origin"])
def model(request: pytest.FixtureRequest) -> MoleBlendModel:
    one = (
        MoleBlendModel(dataclasses.replace(CONFIG, missing_positions=request.param)).double().eval()
    )
    zoo.spread_weights(one)
    return one


def predictions(
    model: MoleBlendModel, batch: MoleculeBatch, blend: Blend, row: int
) -> dict[str, torch.Tensor]:
    """All predictions of one molecule, without padding."""
    output = model(batch, blend)
    n = int(batch.num_atoms[row])
    pairs = {
        "spd": output.spd_logits,
        "edge": output.edge_logits,
        "direction": output.direction,
        "distance": output.distance,
    }
    return {
        "states": batch.pad_tokens(output.tokens)[row, : n + 1],
        "noise": output.noise[row, :n],
        **{name: value[row, :n, :n] for name, value in pairs.items()},
    }


def double(batch: MoleculeBatch, seed: int = 0) -> tuple[MoleculeBatch, Blend]:
    batch = zoo.in_double(batch)
    blend = draw_blend(batch, BlendConfig(), seed)
    return batch, dataclasses.replace(blend, noise=blend.noise.double())


def same(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], but: tuple[str, ...] = ()
) -> None:
    assert one.keys() == other.keys()
    assert len(one) == 6
    for name in one.keys() - set(but):
        torch.testing.assert_close(one[name], other[name], rtol=1e-8, atol=1e-9, msg=name)


def test_other_molecules_of_the_batch_and_padding_change_nothing(model: MoleBlendModel) -> None:
    molecule = zoo.ring(5, tail=2).without_positions([6])
    alone = predictions(model, *double(zoo.batch([molecule], ids=[5])), 0)
    company = [zoo.single_atom(), molecule, zoo.chain(15), zoo.salt().without_positions()]
    company.sort(key=lambda one: one.num_atoms)
    batch, blend = double(zoo.batch(company, ids=[1, 5, 2, 3]))
    same(alone, predictions(model, batch, blend, 1))


def test_predictions_do_not_notice_a_translation(model: MoleBlendModel) -> None:
    molecule = zoo.ring(6, tail=3)
    # By a power of two, so that adding it loses no relevant bits in float64.
    batch, blend = double(zoo.batch([molecule]))
    moved = dataclasses.replace(batch, positions=batch.positions + 64.0)
    same(predictions(model, batch, blend, 0), predictions(model, moved, blend, 0))


def test_all_but_the_coordinate_frame_heads_do_not_notice_a_rotation(model: MoleBlendModel) -> None:
    batch, blend = double(zoo.batch([zoo.chain(4), zoo.ring(6, tail=3)]))
    turn = torch.from_numpy(zoo.rotation(3))
    turned = dataclasses.replace(batch, positions=batch.positions @ turn.T)
    with_noise = dataclasses.replace(blend, noise=blend.noise @ turn.T)
    one, other = predictions(model, batch, blend, 1), predictions(model, turned, with_noise, 1)
    # The direction head sees invariant states only, so its predictions do not turn. The denoising head sums
    # displacements, which turn, with weights for each axis, which do not.
    same(one, other, but=("noise",))
    assert (one["noise"] - other["noise"]).abs().max() > 1e-3


def test_float32_agrees_with_float64_after_a_rotation() -> None:
    exact = MoleBlendModel(CONFIG).double().eval()
    zoo.spread_weights(exact)
    rounded = MoleBlendModel(CONFIG).eval()
    rounded.load_state_dict(exact.state_dict())
    batch = zoo.batch([zoo.ring(6, tail=3)])
    turn = torch.from_numpy(zoo.rotation(1)).float()
    turned = dataclasses.replace(batch, positions=batch.positions @ turn.T)
    stretched = dataclasses.replace(batch, positions=batch.positions * 1.01)
    expected = exact.embed(zoo.in_double(batch)).float()
    torch.testing.assert_close(rounded.embed(turned), expected, rtol=1e-5, atol=1e-5)
    # Other distances would show.
    assert (rounded.embed(stretched) - expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    "molecule", [zoo.chain(9), zoo.ring(5, tail=4), zoo.salt()], ids=["chain", "odd ring", "salt"]
)
def test_numbering_atoms_differently_permutes_the_predictions(
    model: MoleBlendModel, molecule: zoo.ZooMolecule
) -> None:
    """For molecules without ties between shortest paths: ties are broken by the numbering."""
    order = np.random.default_rng(0).permutation(molecule.num_atoms)
    batch, blend = double(zoo.batch([molecule]))
    permuted, _ = double(zoo.batch([molecule.permuted(order)]))
    index = torch.from_numpy(order)
    with_blend = Blend(
        pair_choice=blend.pair_choice[:, index][:, :, index],
        atom_choice=blend.atom_choice[:, index],
        noise=blend.noise[:, index],
    )
    one, other = predictions(model, batch, blend, 0), predictions(model, permuted, with_blend, 0)
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), index + 1])
    expected = {
        name: value[tokens]
        if name == "states"
        else value[index]
        if name == "noise"
        else value[index][:, index]
        for name, value in one.items()
    }
    same(expected, other)


def test_graph_token_does_not_depend_on_numbering_when_everything_is_visible() -> None:
    model = MoleBlendModel(CONFIG).double().eval()
    zoo.spread_weights(model)
    molecule = zoo.ring(7, tail=5)
    order = np.random.default_rng(1).permutation(molecule.num_atoms)
    one, other = (zoo.in_double(zoo.batch([m])) for m in (molecule, molecule.permuted(order)))
    torch.testing.assert_close(model.embed(one), model.embed(other), rtol=1e-8, atol=1e-9)


def test_hidden_relations_do_not_reach_the_encoder() -> None:
    """A pair that shows its distance in bonds reveals neither the types of its bonds nor its coordinates."""
    model = MoleBlendModel(CONFIG).double().eval()
    zoo.spread_weights(model)
    molecule = zoo.ring(6, tail=2)
    batch, blend = double(zoo.batch([molecule]))
    only_spd = dataclasses.replace(
        blend,
        pair_choice=torch.zeros_like(blend.pair_choice),
        atom_choice=torch.zeros_like(blend.atom_choice),
    )
    elsewhere = molecule.moved(molecule.positions * 3.0)
    elsewhere.bond_features[:] = (3, 2, 1)
    other, _ = double(zoo.batch([elsewhere]))
    assert torch.equal(model(batch, only_spd).tokens, model(other, only_spd).tokens)
    assert not torch.equal(model(batch, blend).tokens, model(other, blend).tokens)
