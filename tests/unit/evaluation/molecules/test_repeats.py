"""Forms of one molecule are recognised, and counted where they are in two parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moleblend_ray.chemistry import inchi
from moleblend_ray.chemistry.inchi import parent_keys
from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.evaluation.molecules.repeats import Repeats
from moleblend_ray.evaluation.splits.split import split_molecules
from moleblend_ray.evaluation.tasks import SplitKind

from ..conftest import all_smiles, block_of, molecules_of

FORMS = [
    ("NCc1ccccc1", "NCc1ccccc1.Cl", "[NH3+]Cc1ccccc1.[Cl-]", "NCc1ccccc1.NCc1ccccc1.OS(=O)(=O)O"),
    ("CC(=O)O", "CC(=O)[O-].[Na+]", "[K+].CC(=O)[O-]"),
    ("O=c1cccc[nH]1", "Oc1ccccn1"),
    ("Cc1c[nH]cn1", "Cc1cnc[nH]1"),
    ("C[C@H](N)C(=O)O", "C[C@H]([NH3+])C(=O)[O-]"),
    ("C[C@@H](N)C(=O)O",),
    # Open stereo.
    ("CC(N)C(=O)O",),
    # Keto and enol.
    ("CC(=O)CC(C)=O",),
    ("CC(O)=CC(C)=O",),
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
    # Bonds to metals are drawn in several ways.
    ("NCC(=O)O[Zn]OC(=O)CN", "[NH2+]1CC(=O)O[Zn-]1OC(=O)CN"),
    ("C[Pt](N)(Cl)Cl",),
]


def repeats(
    smiles: Sequence[str], *parts: Sequence[int] | NDArray[np.int64], **settings: Any
) -> Repeats:
    split = Split(*(np.array(part, dtype=np.int64) for part in parts))
    return Repeats.of(smiles, block_of(molecules_of(smiles, **settings)), split)


def test_forms_of_a_molecule_have_one_key_and_different_molecules_different_ones() -> None:
    keys = [set(parent_keys(forms)) for forms in FORMS]
    assert [len(found) for found in keys] == [1] * len(FORMS)
    assert len(set.union(*keys)) == len(FORMS)


def test_forms_in_two_parts_are_counted_with_an_example() -> None:
    smiles = ["CCN", "CCO", "CCN.Cl", "CCC", "CC[NH3+]", "CCN", "CCF", "CCCl"]
    found = repeats(smiles, [0, 1], [2, 3], [4, 5, 6])
    assert found == Repeats(distinct=4, test_seen=2, valid_seen=1, example=(4, 0))
    alone = repeats(smiles, [0, 5, 4, 2], [1], [3])
    assert alone == Repeats(distinct=3, test_seen=0, valid_seen=0, example=None)


@pytest.mark.parametrize("explicit_hydrogens", [False, True])
def test_no_form_is_missed_among_other_molecules(explicit_hydrogens: bool) -> None:
    firsts, others = [forms[0] for forms in FORMS], [form for forms in FORMS for form in forms[1:]]
    smiles = [*firsts, *others, *all_smiles()]
    parts = np.split(np.arange(len(smiles)), [len(firsts), len(firsts) + len(others)])
    train, test, valid = (part.tolist() for part in parts)
    settings = {"dummy_atoms": "other", "explicit_hydrogens": explicit_hydrogens}
    found = repeats(smiles, train, valid, test, **settings)
    assert (found.test_seen, found.distinct) == (len(others), len(set(parent_keys(smiles))))


def test_keys_are_made_only_of_molecules_that_may_be_forms_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def noting(texts: Iterable[str]) -> list[str]:
        given = list(texts)
        asked.extend(given)
        return given

    monkeypatch.setattr(inchi, "parent_keys", noting)
    salts = ["CCCN.Cl", "CCCO.Cl", "CCCF.[Na+].[Cl-]"]
    like = ["CC(=O)CC", "CC(O)=CC", "Cl.CCCCN", "CCCC[NH3+]", "[Na+].[Cl-]", "[K+].[Cl-]"]
    smiles = [*salts, "CC#C", "CC#C", *like, "CC1CC1"]
    repeats(smiles, range(len(smiles)), [], [])
    assert asked == like


@pytest.mark.parametrize("kind", [SplitKind.RANDOM, SplitKind.SCAFFOLD])
def test_computed_splits_keep_copies_together_but_not_salts(kind: SplitKind) -> None:
    smiles = all_smiles()[:40]
    copies = repeats(smiles * 3, *split_molecules(smiles * 3, kind, 0))
    assert copies == Repeats(distinct=40, test_seen=0, valid_seen=0, example=None)
    forms = [text + salt for text in smiles for salt in ("", ".Cl", ".OS(=O)(=O)c1ccccc1")]
    assert repeats(forms, *split_molecules(forms, kind, 0)).test_seen > 0
