from __future__ import annotations

import csv
import gzip
import random
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem, rdBase
from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

from moleblend_ray.chemistry.scaffolds import (
    ScaffoldVariant,
    Split,
    murcko_scaffold,
    scaffold_split,
    split_hash,
)
from moleblend_ray.errors import ConfigError, DataError

VARIANTS: list[ScaffoldVariant] = ["deepchem", "chemprop-balanced"]


def molecules() -> list[str]:
    """60 benzenes, 10 pyridines, 6 furans, 4 chains and 20 unique rings, mixed in a fixed order."""
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


def second_scaffolds(smiles: Sequence[str]) -> list[str]:
    """Scaffolds by RDKit's own shortcut from SMILES to scaffold."""
    return [MurckoScaffoldSmiles(smiles=text, includeChirality=False) for text in smiles]


def second_split(
    scaffolds: Sequence[str],
    variant: ScaffoldVariant,
    seed: int,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> list[set[int]]:
    """A second implementation of both rules on the molecules' scaffolds, as each package states its own."""
    rows = sorted(range(len(scaffolds)), key=lambda row: (scaffolds[row], row))
    members = {name: list(group) for name, group in groupby(rows, key=scaffolds.__getitem__)}
    order = sorted(members, key=lambda name: members[name][0])
    total = len(scaffolds)
    if variant == "deepchem":
        # Stable sorts from the least to the most important key.
        order.sort(key=lambda name: -members[name][0])
        order.sort(key=lambda name: -len(members[name]))
        limits = [fractions[0] * total, (fractions[0] + fractions[1]) * total, total]
    else:
        limits = [share * total for share in fractions]
        common = [name for name in order if 2 * len(members[name]) > min(limits[1:])]
        rare = [name for name in order if name not in set(common)]
        generator = random.Random(seed)
        generator.shuffle(common)
        generator.shuffle(rare)
        order = common + rare
    parts: list[set[int]] = [set(), set(), set()]
    for name in order:
        for number, part in enumerate(parts):
            # DeepChem's limits include the parts before.
            held = sum(map(len, parts[: number + 1])) if variant == "deepchem" else len(part)
            if number == 2 or held + len(members[name]) <= limits[number] + 1e-9:
                part.update(members[name])
                break
    return parts


def real_molecules(folder: Path, name: str) -> list[str]:
    with gzip.open(folder / "moleculenet" / f"{name}.csv.gz", "rt") as file, rdBase.BlockLogs():
        smiles = [row["smiles"] for row in csv.DictReader(file)]
        return [text for text in smiles if Chem.MolFromSmiles(text) is not None]


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["bbbp", "esol"])
def test_real_files_are_split_as_by_a_second_implementation_and_share_no_scaffold(
    name: str, shared_data: Path
) -> None:
    smiles = real_molecules(shared_data, name)
    scaffolds = second_scaffolds(smiles)
    ways: list[tuple[ScaffoldVariant, int]] = [
        *((variant, 0) for variant in VARIANTS),
        ("chemprop-balanced", 7),
    ]
    for variant, seed in ways:
        split = scaffold_split(smiles, variant=variant, seed=seed)
        assert [set(part.tolist()) for part in split] == second_split(scaffolds, variant, seed)
        train, valid, test = ({scaffolds[index] for index in part} for part in split)
        assert not train & valid
        assert not (train | valid) & test


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (0.75, 0.05, 0.2), (0.75, 0.2, 0.05)])
def test_made_up_molecules_are_split_as_by_a_second_implementation(
    variant: ScaffoldVariant, fractions: tuple[float, float, float]
) -> None:
    for smiles in (molecules(), many_scaffolds()):
        for seed in range(5):
            split = scaffold_split(smiles, fractions, variant=variant, seed=seed)
            expected = second_split(second_scaffolds(smiles), variant, seed, fractions)
            assert [set(part.tolist()) for part in split] == expected


def test_scaffold_keeps_rings_and_links_and_drops_the_rest() -> None:
    assert murcko_scaffold("CCc1ccc(CCc2ccccc2F)cc1") == "c1ccc(CCc2ccccc2)cc1"
    assert murcko_scaffold("CCCO") == ""


def test_scaffold_ignores_chirality() -> None:
    assert murcko_scaffold("O=C1CC[C@H]2CCCC[C@@H]2N1") == murcko_scaffold("O=C1CCC2CCCCC2N1")
    assert murcko_scaffold("O=C1CC[C@H]2CCCC[C@@H]2N1") == "O=C1CCC2CCCCC2N1"


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


def test_split_hash_never_changes_between_versions_and_tells_where_a_part_ends() -> None:
    train, valid, test = (np.array(part) for part in ([0, 1, 4], [2], [3]))
    assert split_hash(Split(train, valid, test)) == "b6a49a3fc4ea0b09"
    assert split_hash(Split(train[:2], np.array([4, 2]), test)) != "b6a49a3fc4ea0b09"


def test_unreadable_smiles_and_bad_fractions_are_named() -> None:
    with pytest.raises(DataError, match="c1cc"):
        murcko_scaffold("c1cc")
    for fractions in ((0.8, 0.3, 0.1), (0.8, 0.1, 0.0), (1.2, -0.1, -0.1)):
        with pytest.raises(ConfigError, match=re.escape(str(fractions))):
            scaffold_split(["CC"], fractions)


# RDKit writes the first one but cannot read it, and finds an impossible valence in the scaffold of the second.
WITHOUT_SCAFFOLD = ["[c-]1p[cH][Al][te]1", "O=C1C=CC=CC2=[O][Al]O12"]


def test_molecules_without_a_scaffold_are_not_kept_together_with_chains_or_each_other() -> None:
    split = scaffold_split(["CC", "CCC", *WITHOUT_SCAFFOLD], (0.5, 0.25, 0.25))
    assert [part.tolist() for part in split] == [[0, 1], [3], [2]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_molecule_without_a_scaffold_is_one_of_its_own_and_told(
    variant: ScaffoldVariant, caplog: pytest.LogCaptureFixture
) -> None:
    odd = WITHOUT_SCAFFOLD
    smiles = [*molecules(), *odd]
    split = scaffold_split(smiles, variant=variant)
    assert sorted(np.concatenate(split)) == list(range(len(smiles)))
    assert (
        "2 of 102 molecules count as scaffolds of their own: no scaffold of '[c-]1p" in caplog.text
    )
    with pytest.raises(DataError, match="valence"):
        murcko_scaffold(odd[1])


def test_splitting_nothing_gives_three_empty_parts() -> None:
    assert [len(part) for part in scaffold_split([])] == [0, 0, 0]
