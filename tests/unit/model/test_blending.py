from __future__ import annotations

import math
from typing import Any

import molecule_zoo as zoo
import numpy as np
import pytest
import torch

from moleblend_ray.errors import ConfigError
from moleblend_ray.model import blending
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import (
    AtomFeature,
    Blend,
    BlendConfig,
    Relation,
    View,
    draw_blend,
    philox,
)

# Known answers of Philox4x32-10 in the Random123 distribution (kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox(tuple(torch.tensor([word]) for word in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in words) == expected


def only(view: View) -> BlendConfig:
    blended, topology, geometry, everything = (float(view == other) for other in View)
    return BlendConfig(view_probabilities=(blended, topology, geometry, everything))


def views(blend: Blend) -> torch.Tensor:
    assert blend.view is not None
    return blend.view


def big_batch(count: int = 60, step: int = 0) -> MoleculeBatch:
    return zoo.batch([zoo.chain(20, seed=k) for k in range(count)], step=step)


def test_relations_are_shown_with_their_probabilities() -> None:
    blend = draw_blend(big_batch(), BlendConfig(pair_probabilities=(0.1, 0.3, 0.6)), seed=5)
    share = np.bincount(blend.pair_choice.flatten().numpy(), minlength=3) / 60 / 400
    # 24,000 draws: 5 standard errors are below 0.016.
    np.testing.assert_allclose(share, (0.1, 0.3, 0.6), atol=0.016)
    assert blend.atom_choice.float().mean().item() == pytest.approx(0.6, abs=0.07)


def test_choices_of_a_pair_and_of_its_mirror_are_independent() -> None:
    choice = draw_blend(big_batch(), BlendConfig(), seed=5).pair_choice
    upper = torch.triu_indices(20, 20, 1)
    same = choice[:, upper[0], upper[1]] == choice[:, upper[1], upper[0]]
    assert same.float().mean().item() == pytest.approx(0.04 + 0.04 + 0.36, abs=0.025)


def test_choices_of_pairs_that_share_an_atom_are_independent() -> None:
    choice = draw_blend(big_batch(), BlendConfig(), seed=5).pair_choice
    for same in (choice[:, 1:] == choice[:, :-1], choice[:, :, 1:] == choice[:, :, :-1]):
        assert same.float().mean().item() == pytest.approx(0.04 + 0.04 + 0.36, abs=0.025)


def test_draws_for_different_purposes_are_independent() -> None:
    """With one number for two purposes, atoms that show their 3D feature would, say, have less noise."""
    batch = zoo.batch([zoo.single_atom(seed=k) for k in range(2000)])
    config = BlendConfig(
        pair_probabilities=(0.5, 0.0, 0.5),
        atom_probabilities=(0.5, 0.5),
        view_probabilities=(0.5, 0.5, 0.0, 0.0),
    )
    blend = draw_blend(batch, config, seed=5)
    radius = blend.noise[:, 0, :2].norm(dim=-1)
    draws = (
        blend.pair_choice[:, 0, 0] == Relation.GEOMETRY,
        blend.atom_choice[:, 0] == AtomFeature.GEOMETRY,
        views(blend) == View.TOPOLOGY,
        radius > radius.median(),
    )
    # Five standard errors of a correlation.
    np.testing.assert_allclose(np.corrcoef(torch.stack(draws)), np.eye(4), atol=0.11)


def test_noise_is_standard_normal_times_its_size() -> None:
    noise = (
        draw_blend(big_batch(), BlendConfig(noise_std_angstrom=0.5), seed=1).noise.double() / 0.5
    )
    assert noise.mean().item() == pytest.approx(0.0, abs=0.08)
    assert noise.std().item() == pytest.approx(1.0, abs=0.06)
    assert (noise**4).mean().item() == pytest.approx(3.0, abs=0.6)
    axes = noise.flatten(0, 1).T.numpy()
    # Of the squares too: axes may share a radius and still be uncorrelated.
    for values in (axes, axes**2):
        np.testing.assert_allclose(np.corrcoef(values), np.eye(3), atol=0.15)


def test_draws_depend_on_molecule_step_and_seed_but_not_on_the_batch() -> None:
    molecules = [zoo.chain(4), zoo.ring(6), zoo.ring(7, tail=2)]
    together = draw_blend(zoo.batch(molecules, ids=[7, 2**33 + 7, 9], step=3), BlendConfig(), 1)
    alone = draw_blend(zoo.batch(molecules[1:2], ids=[2**33 + 7], step=3), BlendConfig(), 1)
    assert torch.equal(together.pair_choice[1, :6, :6], alone.pair_choice[0])
    assert torch.equal(together.atom_choice[1, :6], alone.atom_choice[0])
    assert torch.equal(together.noise[1, :6], alone.noise[0])
    for ids, step, seed in (([7], 3, 1), ([2**33 + 7], 4, 1), ([2**33 + 7], 3, 2**40 + 1)):
        other = draw_blend(zoo.batch(molecules[1:2], ids=ids, step=step), BlendConfig(), seed)
        assert not torch.equal(other.pair_choice, alone.pair_choice)
        assert not torch.equal(other.noise, alone.noise)


def test_every_draw_is_that_of_the_documented_counter() -> None:
    molecule_id, step, seed = (5 << 32) + 7, 3, 2**40 + 9
    quarters = (0.25, 0.25, 0.25, 0.25)
    config = BlendConfig(
        pair_probabilities=(0.25, 0.25, 0.5),
        atom_probabilities=(0.5, 0.5),
        view_probabilities=quarters,
        noise_std_angstrom=1.0,
    )
    found = draw_blend(zoo.batch([zoo.chain(6)], ids=[molecule_id], step=step), config, seed)

    def uniforms(purpose: int, first: int = 0, second: int = 0) -> list[float]:
        words = (first << 16 | second, 7, purpose << 24 | 5, step)
        drawn = philox(tuple(torch.tensor(word) for word in words), seed)
        return [word.item() / 2**32 for word in drawn]

    for first in range(6):
        for second in range(6):
            uniform, *_ = uniforms(0, first, second)
            assert found.pair_choice[0, first, second] == (uniform >= 0.25) + (uniform >= 0.5)
        assert found.atom_choice[0, first] == (uniforms(1, first)[0] >= 0.5)
        pairs = uniforms(2, first)
        sizes = [math.sqrt(-2 * math.log(uniform + 2**-32)) for uniform in pairs[::2]]
        turns = [2 * math.pi * uniform for uniform in pairs[1::2]]
        normal = [
            sizes[0] * math.cos(turns[0]),
            sizes[0] * math.sin(turns[0]),
            sizes[1] * math.cos(turns[1]),
        ]
        assert found.noise[0, first].tolist() == pytest.approx(normal, rel=1e-5)
    assert views(found).tolist() == [int(4 * uniforms(3)[0])]


def test_paper_mode_shares_one_map_among_all_molecules_of_a_step() -> None:
    config = BlendConfig(per_batch=True)
    first = draw_blend(zoo.batch([zoo.chain(9), zoo.ring(9, seed=2)], ids=[3, 8]), config, 0)
    second = draw_blend(zoo.batch([zoo.chain(4)], ids=[77]), config, 0)
    assert torch.equal(first.pair_choice[0], first.pair_choice[1])
    assert torch.equal(first.pair_choice[0, :4, :4], second.pair_choice[0])
    assert not torch.equal(first.atom_choice[0], first.atom_choice[1])


def test_missing_coordinates_never_show_3d_and_keep_the_proportion_of_the_graph_relations() -> None:
    molecules = [zoo.chain(20, seed=k).without_positions() for k in range(40)]
    config = BlendConfig(pair_probabilities=(0.3, 0.1, 0.6))
    blend = draw_blend(zoo.batch(molecules), config, seed=3)
    share = np.bincount(blend.pair_choice.flatten().numpy(), minlength=3) / 16_000
    np.testing.assert_allclose(share, (0.75, 0.25, 0.0), atol=0.02)
    assert (blend.atom_choice == AtomFeature.DEGREE).all()
    assert not blend.noise.any()


def test_one_missing_atom_changes_only_its_own_pairs() -> None:
    whole, holed = zoo.chain(8), zoo.chain(8).without_positions([3])
    before = draw_blend(zoo.batch([whole]), BlendConfig(), 0)
    after = draw_blend(zoo.batch([holed]), BlendConfig(), 0)
    others = torch.arange(8) != 3
    assert torch.equal(
        before.pair_choice[:, others][:, :, others], after.pair_choice[:, others][:, :, others]
    )
    assert (after.pair_choice[:, 3] != Relation.GEOMETRY).all()
    assert (after.pair_choice[:, :, 3] != Relation.GEOMETRY).all()


def test_only_3d_asked_for_and_none_there_falls_back_to_the_graph() -> None:
    config = BlendConfig(pair_probabilities=(0.0, 0.0, 1.0), atom_probabilities=(0.0, 1.0))
    blend = draw_blend(zoo.batch([zoo.chain(12).without_positions(), zoo.chain(12)]), config, 0)
    assert set(blend.pair_choice[0].unique().tolist()) == {0, 1}
    assert (blend.pair_choice[1] == Relation.GEOMETRY).all()
    assert (blend.atom_choice[1] == AtomFeature.GEOMETRY).all()


@pytest.mark.parametrize(
    "change",
    [
        {"pair_probabilities": (0.2, 0.2, 0.5)},
        {"pair_probabilities": (1.2, -0.2, 0.0)},
        {"pair_probabilities": (0.5, 0.5)},
        {"pair_probabilities": (float("nan"), 0.5, 0.5)},
        {"atom_probabilities": (0.4, 0.5)},
        {"view_probabilities": (0.5, 0.5)},
        {"view_probabilities": (0.5, 0.5, 0.5, -0.5)},
        {"noise_std_angstrom": -1.0},
    ],
)
def test_impossible_probabilities_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        BlendConfig(**change)


def test_what_has_probability_0_is_not_drawn_though_rounding_left_the_sum_below_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest = torch.tensor((1 << 32) - 1)
    monkeypatch.setattr(
        blending,
        "philox",
        lambda counter, seed: (largest.expand_as(sum(counter[1:], counter[0])),) * 4,
    )
    config = BlendConfig(
        pair_probabilities=(0.5, 0.4999999, 0.0),
        atom_probabilities=(0.9999999, 0.0),
        view_probabilities=(0.5, 0.4999999, 0.0, 0.0),
    )
    blend = draw_blend(big_batch(2), config, seed=0)
    assert (blend.pair_choice == Relation.EDGE).all()
    assert (blend.atom_choice == AtomFeature.DEGREE).all()
    assert (views(blend) == View.TOPOLOGY).all()


@pytest.mark.parametrize(
    ("view", "relations", "features"),
    [
        (View.TOPOLOGY, {Relation.SPD, Relation.EDGE}, {AtomFeature.DEGREE}),
        (View.GEOMETRY, {Relation.GEOMETRY}, {AtomFeature.GEOMETRY}),
        (View.ALL, set(Relation), set(AtomFeature)),
    ],
)
def test_a_view_differs_from_blending_by_the_choices_alone(
    view: View, relations: set[Relation], features: set[AtomFeature]
) -> None:
    batch = big_batch(4)
    blended = draw_blend(batch, BlendConfig(), seed=5)
    found = draw_blend(batch, only(view), seed=5)
    assert torch.equal(found.noise, blended.noise)
    for relation in Relation:
        assert (found.shows_pair(relation) == (relation in relations)).all()
    for feature in AtomFeature:
        assert (found.shows_atom(feature) == (feature in features)).all()
    shown = torch.stack([blended.shows_pair(relation) for relation in Relation])
    assert (shown.sum(0) == 1).all()


def test_views_are_drawn_with_their_probabilities_and_leave_blended_molecules_as_they_were() -> (
    None
):
    batch = zoo.batch([zoo.chain(2, seed=k) for k in range(4000)])
    config = BlendConfig(view_probabilities=(0.4, 0.3, 0.1, 0.2))
    found = draw_blend(batch, config, seed=5)
    share = np.bincount(views(found).numpy(), minlength=4) / 4000
    # 5 standard errors of a share of 0.4 are 0.039.
    np.testing.assert_allclose(share, (0.4, 0.3, 0.1, 0.2), atol=0.039)
    blended = found.view == View.BLENDED
    before = draw_blend(batch, BlendConfig(), seed=5)
    for relation in Relation:
        kept = found.shows_pair(relation)[blended], before.shows_pair(relation)[blended]
        assert torch.equal(*kept)


def test_a_view_belongs_to_the_molecule_and_the_step() -> None:
    config = BlendConfig(view_probabilities=(0.25, 0.25, 0.25, 0.25))
    together = views(draw_blend(big_batch(40), config, seed=5))
    alone = [
        views(draw_blend(zoo.batch([zoo.chain(20, seed=k)], ids=[k]), config, seed=5))
        for k in range(40)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, views(draw_blend(big_batch(40, step=1), config, seed=5)))


def test_a_molecule_without_all_coordinates_shows_its_graph_instead_of_nothing() -> None:
    batch = zoo.batch([zoo.chain(4), zoo.chain(4).without_positions([2])])
    found = draw_blend(batch, only(View.GEOMETRY), seed=0)
    assert views(found).tolist() == [View.GEOMETRY, View.TOPOLOGY]
    found = draw_blend(batch, only(View.ALL), seed=0)
    assert views(found).tolist() == [View.ALL, View.ALL]
