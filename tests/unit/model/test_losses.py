from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

import molecule_zoo as zoo
import numpy as np
import pytest
import torch

from moleblend_ray.errors import ConfigError
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend, BlendConfig, draw_blend
from moleblend_ray.model.config import LOSS_NAMES, LossConfig, ModelConfig, check_objective
from moleblend_ray.model.environments import environment_counts
from moleblend_ray.model.losses import (
    IGNORE,
    count_other_bonds,
    edge_targets,
    has_direction,
    loss_counts,
    loss_means,
    pretraining_loss_sums,
    spd_targets,
    total_loss,
)
from moleblend_ray.model.moleblend import MoleBlendModel, MoleBlendOutput
from moleblend_ray.vocabulary import NUM_DESCRIPTORS

TINY = ModelConfig(
    num_layers=2, dim=16, ffn_dim=24, num_heads=2, num_kernels=4, pair_dim=4, distance_head=True
)


ALL = (0.0, 0.0, 0.0, 1.0)


def nothing_predicted(batch: MoleculeBatch, edge_classes: int = 25) -> MoleBlendOutput:
    B, N = batch.atom_mask.shape
    return MoleBlendOutput(
        tokens=torch.zeros(len(batch.token_index), 4),
        spd=torch.zeros(B, N, N, 11),
        edge=torch.zeros(B, N, N, 5, edge_classes),
        direction=torch.zeros(B, N, N, 3),
        distance=torch.zeros(B, N, N),
        noise=torch.zeros(B, N, 3),
        environments=None,
        descriptors=None,
    )


def full_blend(batch: MoleculeBatch, choice: int = 2) -> Blend:
    B, N = batch.atom_mask.shape
    return Blend(
        pair_choice=torch.full((B, N, N), choice, dtype=torch.uint8),
        atom_choice=torch.ones(B, N, dtype=torch.uint8),
        noise=torch.ones(B, N, 3).masked_fill(~batch.position_mask[..., None], 0.0),
    )


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def means(
    output: MoleBlendOutput, batch: MoleculeBatch, blend: Blend, config: LossConfig | None = None
) -> dict[str, float]:
    config = config or LossConfig()
    sums = pretraining_loss_sums(output, batch, blend, config)
    return {k: v.item() for k, v in loss_means(sums, loss_counts(batch, blend, config)).items()}


def test_uniform_logits_cost_the_logarithm_of_the_number_of_classes() -> None:
    batch = zoo.batch([zoo.chain(3), zoo.ring(6)])
    found = means(nothing_predicted(batch), batch, full_blend(batch))
    assert found["spd"] == pytest.approx(math.log(11))
    assert found["edge"] == pytest.approx(math.log(25))
    assert found["direction"] == found["denoise"] == pytest.approx(1.0)


def test_cross_entropy_by_hand_on_a_chain_of_three() -> None:
    batch = zoo.batch([zoo.chain(3)])
    logits = torch.zeros(1, 3, 3, 11)
    logits[0, 0, 1, 0] = 2.0  # right for the bonded pair (0, 1)
    logits[0, 0, 2, 0] = 2.0  # wrong for the pair at distance 2
    output = dataclasses.replace(nothing_predicted(batch), spd=logits)
    flat, normalizer = math.log(11), math.log(math.e**2 + 10)
    expected = (normalizer - 2.0 + normalizer + 4 * flat) / 6
    assert means(output, batch, full_blend(batch))["spd"] == pytest.approx(expected)


def test_direction_is_a_mean_over_pairs_of_a_molecule_and_then_over_molecules() -> None:
    two, three = zoo.chain(2), zoo.chain(3)
    batch = zoo.batch([two, three])
    direction = torch.zeros(2, 3, 3, 3)
    # Both pairs of the first molecule right; one of six pairs of the second opposite.
    delta = batch.positions[:, None] - batch.positions[:, :, None]
    direction[0, :2, :2] = 3.0 * delta[0, :2, :2]
    direction[1, 0, 1] = -delta[1, 0, 1]
    output = dataclasses.replace(nothing_predicted(batch), direction=direction)
    assert means(output, batch, full_blend(batch))["direction"] == pytest.approx((0 + 7 / 6) / 2)


def test_denoising_is_a_mean_over_atoms_of_the_whole_batch() -> None:
    batch = zoo.batch([zoo.chain(2), zoo.chain(4).without_positions([3])])
    blend = full_blend(batch)
    blend.atom_choice[1, 0] = 0
    noise = torch.zeros(2, 4, 3)
    noise[0, :2] = 5.0  # right
    noise[1, 0] = noise[1, 3] = -1.0  # not counted: one shows its degree, one has no position
    output = dataclasses.replace(nothing_predicted(batch), noise=noise)
    assert means(output, batch, blend)["denoise"] == pytest.approx(2 / 4)
    assert loss_counts(batch, blend, LossConfig())[LOSS_NAMES.index("denoise")] == 4


def test_atoms_without_positioned_partner_are_denoised_only_on_demand() -> None:
    molecules = [zoo.single_atom(), zoo.chain(3).without_positions([0, 2]), zoo.chain(3)]
    batch = zoo.batch(molecules)
    blend = full_blend(batch)
    for config, expected in ((LossConfig(), 3), (LossConfig(denoise_lone_atoms=True), 5)):
        assert loss_counts(batch, blend, config)[LOSS_NAMES.index("denoise")] == expected


def test_one_atom_molecules_do_not_blow_up_the_gradient_of_a_new_model() -> None:
    torch.manual_seed(0)
    model = MoleBlendModel(TINY)
    batch = zoo.batch([zoo.single_atom(seed=k) for k in range(6)] + [zoo.ring(6)])
    blend = full_blend(batch)
    sums = pretraining_loss_sums(model(batch, blend), batch, blend, LossConfig())
    total_loss(sums, loss_counts(batch, blend, LossConfig()), LossConfig()).backward()
    assert max(gradient_of(p).abs().max().item() for p in model.parameters()) < 1e4


def test_distance_is_an_absolute_error_in_angstrom() -> None:
    molecule = zoo.chain(2).moved(np.array([[0, 0, 0], [0, 3, 4]]))
    batch = zoo.batch([molecule])
    output = dataclasses.replace(nothing_predicted(batch), distance=torch.full((1, 2, 2), 3.0))
    assert means(output, batch, full_blend(batch))["distance"] == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["direction", "noise"])
def test_a_prediction_without_a_target_has_no_influence_even_if_it_is_infinite(name: str) -> None:
    batch = zoo.batch([zoo.chain(2), zoo.chain(4).without_positions([3])])
    blend = full_blend(batch)
    known = batch.position_mask if name == "noise" else has_direction(batch)
    shape = getattr(nothing_predicted(batch), name).shape
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = []
    for hidden in (0.0, math.inf):
        given = drawn.masked_fill(~known[..., None], hidden).requires_grad_()
        output = dataclasses.replace(nothing_predicted(batch), **{name: given})
        loss = pretraining_loss_sums(output, batch, blend, LossConfig())[
            "denoise" if name == "noise" else name
        ]
        found.append((loss, *torch.autograd.grad(loss, given)))
    for expected, ours in zip(*found, strict=True):
        assert torch.equal(ours, expected)


def test_spd_classes_merge_long_paths_and_ignore_self_and_unreachable() -> None:
    target = spd_targets(zoo.batch([zoo.chain(24)]), 11)[0]
    assert target[0].tolist() == [IGNORE, *range(10), *[10] * 13]
    salt = zoo.batch([zoo.salt()])
    assert (spd_targets(salt, 11)[0, 7] == IGNORE).all()
    assert (spd_targets(zoo.batch([zoo.chain(2), zoo.chain(4)]), 11)[0, 2:] == IGNORE).all()


def test_edge_classes_follow_the_paper_and_other_bonds_have_their_own() -> None:
    molecule = zoo.chain(4)
    molecule.bond_features[:] = [(1, 2, 1), (4, 2, 1), (0, 3, 0)]
    batch = zoo.batch([molecule])
    assert edge_targets(batch, LossConfig())[0, 0, 3].tolist() == [11, 24, 24, IGNORE, IGNORE]
    paper = edge_targets(batch, LossConfig(ignore_other_bonds=True))
    assert paper[0, 0, 3].tolist() == [11, *[IGNORE] * 4]
    assert paper[0, 3, 0].tolist() == [IGNORE, IGNORE, 11, IGNORE, IGNORE]
    # Ordered pairs whose path holds bond 2 or 3: bond 2 in 8, bond 3 in 6.
    assert count_other_bonds(batch).item() == 14


def test_counts_are_what_the_sums_are_divided_by() -> None:
    molecules = [zoo.single_atom(), zoo.chain(3), zoo.salt(), zoo.ring(5).without_positions()]
    batch = zoo.batch(molecules)
    blend = draw_blend(batch, BlendConfig(), 0)
    counts = dict(zip(LOSS_NAMES, loss_counts(batch, blend, LossConfig()).tolist(), strict=True))
    assert counts["spd"] == 6 + 7 * 6 + 20
    assert counts["direction"] == counts["distance"] == 2
    assert counts["denoise"] == (blend.atom_choice[1:][batch.position_mask[1:]] == 1).sum()


def test_counts_add_up_exactly_however_a_step_is_cut_into_micro_batches() -> None:
    # A tenth is no number of float32: sums of it in that type depend on their order, and with it on the cut.
    config = LossConfig(visible_pair_weight=0.1)
    molecules = [*zoo.drug_like(40), zoo.salt(), zoo.ring(6).without_positions()]

    def counts(indices: range) -> torch.Tensor:
        batch = zoo.batch([molecules[i] for i in indices], list(indices))
        return loss_counts(batch, draw_blend(batch, BlendConfig(), 0), config)

    whole = counts(range(42))
    for size in (1, 4, 21):
        parts = [counts(range(first, min(first + size, 42))) for first in range(0, 42, size)]
        assert torch.equal(torch.stack(parts).sum(0), whole)


def test_visible_pairs_can_weigh_less() -> None:
    batch = zoo.batch([zoo.chain(3)])
    blend = full_blend(batch, choice=1)
    blend.pair_choice[0, 0, 1] = 0  # the only pair that shows its distance
    logits = torch.zeros(1, 3, 3, 11)
    logits[0, 0, 1, 5] = 9.0
    output = dataclasses.replace(nothing_predicted(batch), spd=logits)
    wrong, flat = math.log(math.e**9 + 10), math.log(11)
    for weight in (0.0, 0.25, 1.0):
        expected = (weight * wrong + 5 * flat) / (weight + 5)
        found = means(output, batch, blend, LossConfig(visible_pair_weight=weight))["spd"]
        assert found == pytest.approx(expected)


def test_a_pair_weighs_less_in_the_losses_of_the_relation_that_it_shows_alone() -> None:
    batch = zoo.batch([zoo.chain(3)])
    blend = full_blend(batch)
    blend.pair_choice[0] = torch.tensor([[2, 0, 1], [2, 2, 0], [1, 2, 2]])
    x_axis = torch.tensor([1.0, 0.0, 0.0]).expand(1, 3, 3, 3)
    output = dataclasses.replace(nothing_predicted(batch), direction=x_axis)
    config = LossConfig(visible_pair_weight=0.25)
    sums = pretraining_loss_sums(output, batch, blend, config)
    counts = dict(zip(LOSS_NAMES, loss_counts(batch, blend, config).tolist(), strict=True))

    places = batch.positions[0].numpy()
    found = dict.fromkeys(("spd", "edge", "direction", "distance"), 0.0)
    divisor = 0.0
    for a, b in ((0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0)):
        spd, edge, geometry = (
            0.25 if blend.pair_choice[0, a, b] == relation else 1.0 for relation in range(3)
        )
        step = places[b] - places[a]
        length = float(np.linalg.norm(step))
        found["spd"] += spd
        found["edge"] += edge * abs(a - b)  # bonds of a path
        found["direction"] += geometry * (1.0 - step[0] / length)
        found["distance"] += geometry * length
        divisor += geometry
    assert (counts["spd"], counts["edge"]) == (found["spd"], found["edge"])
    assert sums["spd"].item() == pytest.approx(math.log(11) * found["spd"])
    assert sums["edge"].item() == pytest.approx(math.log(25) * found["edge"])
    for name in ("direction", "distance"):
        assert sums[name].item() == pytest.approx(found[name] / divisor, rel=1e-5)
        assert counts[name] == 1


def test_direction_and_distance_count_no_molecule_whose_pairs_weigh_nothing() -> None:
    batch = zoo.batch([zoo.chain(2), zoo.chain(3)])
    blend = full_blend(batch)
    blend.pair_choice[1, 0, 1] = 0
    counts = loss_counts(batch, blend, LossConfig(visible_pair_weight=0.0))
    assert counts[LOSS_NAMES.index("direction")] == 1


def test_nothing_to_predict_costs_nothing_and_has_finite_gradients() -> None:
    batch = zoo.batch([zoo.single_atom(), zoo.single_atom(seed=2)])
    batch = dataclasses.replace(batch, position_mask=torch.zeros_like(batch.position_mask))
    model = MoleBlendModel(TINY)
    blend = draw_blend(batch, BlendConfig(), 0)
    sums = pretraining_loss_sums(model(batch, blend), batch, blend, LossConfig())
    total = total_loss(sums, loss_counts(batch, blend, LossConfig()), LossConfig())
    total.backward()
    assert total.item() == 0.0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_step_loss_and_gradient_do_not_depend_on_how_molecules_are_cut_into_micro_batches() -> None:
    molecules = sorted(zoo.drug_like(6), key=lambda one: one.num_atoms)
    molecules[2] = molecules[2].without_positions()
    model = MoleBlendModel(
        dataclasses.replace(TINY, attention_dropout=0.0, activation_dropout=0.0, drop_path=0.0)
    ).double()
    zoo.spread_weights(model)
    config = LossConfig(distance_weight=0.2)

    def step(cuts: list[int]) -> tuple[float, list[torch.Tensor]]:
        parts = [
            zoo.in_double(zoo.batch(molecules[a:b], ids=list(range(a, b))))
            for a, b in pairwise(cuts)
        ]
        blends = [draw_blend(part, BlendConfig(), 1) for part in parts]
        counted = [loss_counts(p, b, config) for p, b in zip(parts, blends, strict=True)]
        counts = torch.stack(counted).sum(0)
        model.zero_grad()
        total = 0.0
        for part, blend in zip(parts, blends, strict=True):
            sums = pretraining_loss_sums(model(part, blend), part, blend, config)
            loss = total_loss(sums, counts, config)
            loss.backward()
            total += loss.item()
        return total, [gradient_of(p).clone() for p in model.parameters()]

    whole, whole_gradients = step([0, 6])
    cut, cut_gradients = step([0, 1, 3, 6])
    assert cut == pytest.approx(whole, rel=1e-9)
    for one, other in zip(whole_gradients, cut_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_total_is_the_weighted_sum_of_means() -> None:
    sums = {name: torch.tensor(float(k + 1)) for k, name in enumerate(LOSS_NAMES)}
    counts = torch.tensor([2.0, 4.0, 1.0, 0.0, 10.0, 0.0, 0.0], dtype=torch.float64)
    total = total_loss(sums, counts, LossConfig(distance_weight=3.0))
    assert total.item() == pytest.approx(0.1 * 0.5 + 0.1 * 0.5 + 0.5 * 3.0 + 0.0 + 6 * 0.5)


def test_objective_that_the_model_cannot_serve_is_refused_naming_every_problem() -> None:
    model = ModelConfig(edge_other_class=False, direction_head=False)
    with pytest.raises(ConfigError) as caught:
        check_objective(
            model, LossConfig(distance_weight=1.0, environment_weight=1.0, descriptor_weight=1.0)
        )
    weights = ("direction", "distance", "environment", "descriptor")
    parts = (*(f"{name}_weight" for name in weights), "ignore_other_bonds")
    for part in (f"loss.{part}" for part in parts):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="edge_weight"):
        LossConfig(edge_weight=-1.0)


def test_without_blending_every_atom_with_noise_is_denoised_and_every_pair_is_visible() -> None:
    batch = zoo.batch([zoo.ring(5), zoo.chain(3).without_positions([0])])
    blend = draw_blend(batch, BlendConfig(view_probabilities=ALL), 0)
    usual = loss_counts(batch, blend, LossConfig())
    halved = loss_counts(batch, blend, LossConfig(visible_pair_weight=0.5))
    names = dict(zip(LOSS_NAMES, zip(usual.tolist(), halved.tolist(), strict=True), strict=True))
    assert names["denoise"][0] == 5 + 2
    assert names["spd"][1] == names["spd"][0] / 2
    assert names["edge"][1] == names["edge"][0] / 2


def test_without_blending_the_encoder_sees_what_it_sees_in_fine_tuning() -> None:
    batch = zoo.batch([zoo.ring(5), zoo.chain(3)])
    blend = draw_blend(batch, BlendConfig(view_probabilities=ALL, noise_std_angstrom=0.0), 0)
    model = MoleBlendModel(TINY).eval()
    assert torch.equal(model(batch, blend).tokens, model(batch).tokens)


def test_molecules_that_show_no_coordinates_are_not_denoised() -> None:
    batch = zoo.batch([zoo.ring(5), zoo.chain(3)])
    blend = draw_blend(batch, BlendConfig(view_probabilities=(0.0, 1.0, 0.0, 0.0)), 0)
    counts = dict(zip(LOSS_NAMES, loss_counts(batch, blend, LossConfig()).tolist(), strict=True))
    assert counts["denoise"] == 0
    assert counts["distance"] == 2  # predicted from the graph


def test_environments_cost_the_squared_error_of_the_logarithm_of_their_counts() -> None:
    batch = zoo.batch([zoo.ring(5), zoo.chain(3)])
    counts = environment_counts(batch, 8)
    output = dataclasses.replace(nothing_predicted(batch), environments=counts.log1p())
    blend, config = full_blend(batch), LossConfig(environment_weight=0.5)
    assert means(output, batch, blend, config)["environment"] == 0.0
    off = counts.log1p().clone()
    off[1, 3] += 2.0
    output = dataclasses.replace(output, environments=off)
    assert means(output, batch, blend, config)["environment"] == pytest.approx(4.0 / 2)


def test_the_graph_token_learns_from_the_environments_alone() -> None:
    batch = zoo.batch([zoo.ring(5), zoo.chain(3)])
    model = MoleBlendModel(dataclasses.replace(TINY, environment_bins=8)).eval()
    blend = draw_blend(batch, BlendConfig(), 0)
    sums = pretraining_loss_sums(model(batch, blend), batch, blend, LossConfig())
    sums["environment"].backward()
    assert gradient_of(model.encoder.atoms.graph_token).abs().sum() > 0
    assert model.environment_head is not None
    assert gradient_of(model.environment_head.weight).abs().sum() > 0
    assert model.spd_head.weight.grad is None


def described(batch: MoleculeBatch, unknown: Sequence[tuple[int, int]] = ()) -> MoleculeBatch:
    """The molecules with random descriptors, of which those at ``unknown`` are not known."""
    drawn = torch.randn(batch.num_molecules, NUM_DESCRIPTORS, generator=torch.manual_seed(1)).half()
    for place in unknown:
        drawn[place] = math.nan
    return dataclasses.replace(batch, descriptors=drawn)


def test_descriptors_cost_the_mean_squared_error_of_those_that_are_known() -> None:
    batch = described(zoo.batch([zoo.ring(5), zoo.chain(3)]), unknown=[(0, 7), (1, 0)])
    predicted = batch.descriptors.float().nan_to_num(100.0)
    output = dataclasses.replace(nothing_predicted(batch), descriptors=predicted)
    blend, config = full_blend(batch), LossConfig(descriptor_weight=0.5)
    assert loss_counts(batch, blend, config)[-1] == 2 * NUM_DESCRIPTORS - 2
    assert means(output, batch, blend, config)["descriptor"] == 0.0
    off = predicted.clone()
    off[1, 3] += 2.0
    output = dataclasses.replace(output, descriptors=off)
    expected = 4.0 / (2 * NUM_DESCRIPTORS - 2)
    assert means(output, batch, blend, config)["descriptor"] == pytest.approx(expected)


def test_the_graph_token_learns_from_the_descriptors_alone_and_not_from_unknown_ones() -> None:
    batch = described(zoo.batch([zoo.ring(5), zoo.chain(3)]), unknown=[(0, 7), (1, 7)])
    model = MoleBlendModel(dataclasses.replace(TINY, descriptor_head=True)).eval()
    blend = draw_blend(batch, BlendConfig(), 0)
    sums = pretraining_loss_sums(model(batch, blend), batch, blend, LossConfig())
    sums["descriptor"].backward()
    assert gradient_of(model.encoder.atoms.graph_token).abs().sum() > 0
    assert model.descriptor_head is not None
    gradient = gradient_of(model.descriptor_head.weight)
    assert gradient.isfinite().all()
    assert gradient[7].abs().sum() == 0
    assert (gradient.abs().sum(1) > 0).sum() == NUM_DESCRIPTORS - 1
    assert model.spd_head.weight.grad is None


def test_a_model_of_descriptors_refuses_molecules_without() -> None:
    batch = zoo.batch([zoo.ring(5)])
    model = MoleBlendModel(dataclasses.replace(TINY, descriptor_head=True)).eval()
    blend = draw_blend(batch, BlendConfig(), 0)
    assert loss_counts(batch, blend, LossConfig())[-1] == 0
    with pytest.raises(
        ConfigError, match=r"featurize\.descriptors=true, or .*descriptor_head=false"
    ):
        pretraining_loss_sums(model(batch, blend), batch, blend, LossConfig())
