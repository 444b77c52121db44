"""Forms of one molecule are recognised, and counted where they are in two parts."""

from __future__ import annotations

import numpy as np
import pytest

from moleblend_ray.chemistry.inchi import parent_keys
from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.evaluation.dataset import split_molecules
from moleblend_ray.evaluation.repeats import Repeats
from moleblend_ray.evaluation.tasks import SplitKind

from .conftest import all_smiles

FORMS = [
    ("NCc1ccccc1", "NCc1ccccc1.Cl", "[NH3+]Cc1ccccc1.[Cl-]", "NCc1ccccc1.NCc1ccccc1.OS(=O)(=O)O"),
    ("CC(=O)O", "CC(=O)[O-].[Na+]", "[K+].CC(=O)[O-]"),
    ("O=c1cccc[nH]1", "Oc1ccccn1"),
    ("Cc1c[nH]cn1", "Cc1cnc[nH]1"),
    ("C[C@H](N)C(=O)O", "C[C@H]([NH3+])C(=O)[O-]"),
    ("C[C@@H](N)C(=O)O",),
    ("CC(N)C(=O)O",),
    ("C1CCCCC1",),
    ("c1ccccc1",),
    ("C[N+](C)(C)C.[Br-]", "C[N+](C)(C)C.[I-]"),
    ("[Na+].[Cl-]", "[Cl-].[Na+]"),
    # The counterion is larger.
    ("Cc1ccoc1", "Cc1ccoc1.OS(=O)(=O)c1ccccc1", "Cc1ccoc1.[O-]S(=O)(=O)c1ccccc1"),
    ("CCN", "CC[NH3+].OC(=O)/C=C/C(=O)[O-]", "CCN.OC(=O)[C@H](O)[C@@H](O)C(=O)O"),
    ("OS(=O)(=O)c1ccccc1", "[O-]S(=O)(=O)c1ccccc1.[Na+]", "OS(=O)(=O)c1ccccc1.OC(=O)C(=O)O"),
    # There is no InChIKey of these.
    ("*CC", "*CC.Cl"),
]


def test_forms_of_a_molecule_have_one_key_and_different_molecules_different_ones() -> None:
    keys = [set(parent_keys(forms)) for forms in FORMS]
    assert [len(found) for found in keys] == [1] * len(FORMS)
    assert len(set.union(*keys)) == len(FORMS)


def test_forms_in_two_parts_are_counted_with_an_example() -> None:
    smiles = ["CCN", "CCO", "CCN.Cl", "CCC", "CC[NH3+]", "CCN", "CCF", "CCCl"]
    split = Split(*map(np.array, ([0, 1], [2, 3], [4, 5, 6])))
    found = Repeats.of(smiles, split)
    assert found == Repeats(distinct=4, test_seen=2, valid_seen=1, example=(4, 0))
    alone = Repeats.of(smiles, Split(*map(np.array, ([0, 5, 4, 2], [1], [3]))))
    assert alone == Repeats(distinct=3, test_seen=0, valid_seen=0, example=None)


@pytest.mark.parametrize("kind", [SplitKind.RANDOM, SplitKind.SCAFFOLD])
def test_computed_splits_keep_copies_together_but_not_salts(kind: SplitKind) -> None:
    smiles = all_smiles()[:40]
    copies = Repeats.of(smiles * 3, split_molecules(smiles * 3, kind, 0))
    assert copies == Repeats(distinct=40, test_seen=0, valid_seen=0, example=None)
    forms = [text + salt for text in smiles for salt in ("", ".Cl", ".OS(=O)(=O)c1ccccc1")]
    assert Repeats.of(forms, split_molecules(forms, kind, 0)).test_seen > 0
