from __future__ import annotations

import numpy as np
import pytest

from moleblend_ray.chemistry.scaffolds import (
    ScaffoldVariant,
    murcko_scaffold,
    scaffold_split,
    split_hash,
)
from moleblend_ray.errors import ConfigError, DataError

VARIANTS: list[ScaffoldVariant] = ["deepchem", "chemprop-balanced"]


def molecules() -> list[str]:
    """60 benzenes, 10 pyridines, 6 furans, 4 chains, 20 rings of a kind, mixed in a fixed order."""
    smiles = [f"c1ccccc1{'C' * k}" for k in range(1, 61)]
    smiles += [f"c1ccncc1{'C' * k}" for k in range(1, 11)]
    smiles += [f"c1ccoc1{'C' * k}" for k in range(1, 7)]
    smiles += ["C" * k for k in range(1, 5)]
    smiles += [f"C1{'C' * k}1" for k in range(2, 22)]
    order = np.random.default_rng(5).permutation(len(smiles))
    return [smiles[index] for index in order]


def many_scaffolds() -> list[str]:
    rings = [f"C1{'C' * k}1" for k in range(2, 32)]
    return [f"{ring}{'C' * chain}" for chain in range(4) for ring in rings]


def test_scaffold_keeps_rings_and_links_and_drops_the_rest() -> None:
    assert murcko_scaffold("CCc1ccc(CCc2ccccc2F)cc1") == "c1ccc(CCc2ccccc2)cc1"
    assert murcko_scaffold("CCCO") == ""


def test_scaffold_ignores_chirality_unless_asked() -> None:
    smiles = "C[C@H]1CC[C@@H](c2ccccc2)CC1"
    assert "@" not in murcko_scaffold(smiles)
    chiral = "O=C1CC[C@H]2CCCC[C@@H]2N1"
    assert "@" in murcko_scaffold(chiral, include_chirality=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_split_covers_every_molecule_once_and_separates_scaffolds(
    variant: ScaffoldVariant,
) -> None:
    smiles = many_scaffolds()
    split = scaffold_split(smiles, variant=variant)
    assert sorted(np.concatenate(split).tolist()) == list(range(len(smiles)))
    assert [len(part) for part in split] == [96, 12, 12]
    parts = [{murcko_scaffold(smiles[index]) for index in part} for part in split]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_deepchem_variant_deals_the_largest_scaffolds_to_train_first() -> None:
    smiles = molecules()
    split = scaffold_split(smiles, (0.6, 0.1, 0.3), variant="deepchem")
    expected = [murcko_scaffold(text) for text in smiles]
    assert split.train.tolist() == [k for k, s in enumerate(expected) if s == "c1ccccc1"]
    assert split.valid.tolist() == [k for k, s in enumerate(expected) if s == "c1ccncc1"]
    assert len(split.test) == 30


def test_deepchem_variant_deals_equal_scaffolds_latest_first() -> None:
    smiles = ["C1CC1", "C1CCC1", "C1CCCC1", "C1CCCCC1", "C1CCCCCC1"]
    split = scaffold_split(smiles, (0.6, 0.2, 0.2), variant="deepchem")
    assert split.train.tolist() == [2, 3, 4]
    assert split.valid.tolist() == [1]
    assert split.test.tolist() == [0]


def test_balanced_variant_puts_scaffolds_too_big_for_valid_and_test_into_train() -> None:
    smiles = molecules()
    for seed in range(3):
        split = scaffold_split(smiles, variant="chemprop-balanced", seed=seed)
        benzenes = [k for k, text in enumerate(smiles) if text.startswith("c1ccccc1")]
        assert set(benzenes) <= set(split.train.tolist())


def test_only_the_balanced_variant_depends_on_the_seed_and_both_are_repeatable() -> None:
    smiles = many_scaffolds()
    hashes = {
        variant: [
            split_hash(scaffold_split(smiles, variant=variant, seed=seed)) for seed in (0, 0, 1)
        ]
        for variant in VARIANTS
    }
    assert len(set(hashes["deepchem"])) == 1
    assert hashes["chemprop-balanced"][0] == hashes["chemprop-balanced"][1]
    assert hashes["chemprop-balanced"][0] != hashes["chemprop-balanced"][2]


def test_split_hash_changes_when_one_molecule_changes_sides() -> None:
    split = scaffold_split(many_scaffolds())
    moved = split._replace(
        train=split.train[:-1], valid=np.sort(np.append(split.valid, split.train[-1]))
    )
    assert split_hash(moved) != split_hash(split)


def test_unreadable_smiles_and_bad_fractions_are_named() -> None:
    with pytest.raises(DataError, match="c1cc"):
        scaffold_split(["CC", "c1cc"])
    with pytest.raises(ConfigError, match=r"\(0\.8, 0\.3, 0\.1\)"):
        scaffold_split(["CC"], (0.8, 0.3, 0.1))


def test_splitting_nothing_gives_three_empty_parts() -> None:
    assert [len(part) for part in scaffold_split([])] == [0, 0, 0]
