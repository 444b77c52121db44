"""A molecule for which RDKit takes too long, too much memory or its own process fails alone, with a reason."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from many_rings import C60, DODECAHEDRANE, assert_identical, cyclodextrin, cycloparaphenylene
from rdkit import Chem
from rdkit.Chem import rdDepictor

from moleblend_ray.chemistry import limited as module
from moleblend_ray.chemistry import molecule as featurizer
from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.chemistry.cost import may_be_slow, smiles_may_be_slow
from moleblend_ray.chemistry.descriptors import descriptors, descriptors_of_one, stored_descriptors
from moleblend_ray.chemistry.inchi import inchi_key, inchi_keys
from moleblend_ray.chemistry.killable import KillableWorker, WorkerStartError
from moleblend_ray.chemistry.limited import GIB, LimitExceededError, limited
from moleblend_ray.chemistry.molecule import Molecule, molecule_from_smiles, molecules_from_records
from moleblend_ray.chemistry.records import GeometryRow, MolBlock, SmilesText, SourceRecord
from moleblend_ray.chemistry.rejection import Rejection, RejectionCode
from moleblend_ray.chemistry.scaffolds import murcko_scaffold, scaffold_or_error, scaffold_split
from moleblend_ray.chemistry.xyz import XyzRecord, bonded_geometry
from moleblend_ray.errors import DataError

ENDLESS = cycloparaphenylene(18)
"""RDKit takes minutes to read it."""
HASTY = FeaturizeConfig(timeout_s=0.3)


@pytest.fixture(autouse=True)
def warm_child() -> None:
    limited(math.sqrt, 4.0)


# -- calls --------------------------------------------------------------------------------------------


def test_a_call_has_the_value_that_it_has_here_and_happens_elsewhere() -> None:
    assert limited(math.hypot, 3.0, 4.0) == 5.0
    assert limited(os.getpid) == module._worker().pid != os.getpid()


def test_a_call_that_hangs_ends_at_its_limit_and_the_next_has_its_value() -> None:
    began = time.monotonic()
    with pytest.raises(LimitExceededError, match=r"^timeout: not done after 0\.2 s$"):
        limited(sum, range(10**12), timeout_s=0.2)
    assert time.monotonic() - began < 2
    assert limited(math.sqrt, 4.0) == 2.0


def test_a_call_that_ends_its_process_says_how() -> None:
    with pytest.raises(LimitExceededError, match=r"^crashed: exit status 3$"):
        limited(os._exit, 3)


@pytest.mark.parametrize("bytes_wanted", [7 * GIB // 4, 64 * GIB])
def test_a_call_gets_no_more_memory_than_it_may_take(bytes_wanted: int) -> None:
    with pytest.raises(LimitExceededError, match=r"^memory: more than 1\.5 GiB$"):
        limited(eval, f"len(b'x' * {bytes_wanted})")
    assert limited(math.sqrt, 4.0) == 2.0


def test_a_child_that_took_much_memory_is_replaced_and_another_is_kept() -> None:
    first = limited(os.getpid)
    assert limited(eval, f"len(b'x' * {GIB // 2})") == GIB // 2
    assert limited(os.getpid) != first
    assert limited(os.getpid) == limited(os.getpid)


# -- records ------------------------------------------------------------------------------------------


def forms(smiles: str) -> list[SourceRecord]:
    """The molecule as SMILES, molblock, and rows with and without geometry, written without RDKit's knowledge of it."""
    mol = Chem.MolFromSmiles(smiles.replace("c", "C"), sanitize=False)
    circle = np.linspace(0.0, 6.0, mol.GetNumAtoms())
    positions = 30 * np.stack([np.cos(circle), np.sin(circle), circle / 40], axis=1)
    row = GeometryRow(
        atomic_numbers=[atom.GetAtomicNum() for atom in mol.GetAtoms()],
        formal_charges=[0] * mol.GetNumAtoms(),
        positions=positions,
        bond_begin=[bond.GetBeginAtomIdx() for bond in mol.GetBonds()],
        bond_end=[bond.GetEndAtomIdx() for bond in mol.GetBonds()],
        bond_order=[1] * mol.GetNumBonds(),
        smiles=smiles,
    )
    lines = [
        "",
        "     RDKit          3D",
        "",
        f"{mol.GetNumAtoms():3d}{mol.GetNumBonds():3d}  0 V2000",
    ]
    for atom, place in zip(mol.GetAtoms(), positions, strict=True):
        lines.append("".join(f"{value:10.4f}" for value in place) + f" {atom.GetSymbol():<3} 0  0")
    for begin, end in zip(row.bond_begin, row.bond_end, strict=True):
        lines.append(f"{begin + 1:3d}{end + 1:3d}  1  0")
    block = "\n".join([*lines, "M  END", ""])
    return [SmilesText(smiles), MolBlock(block), row, row._replace(positions=None)]


def test_a_record_that_hangs_rdkit_is_rejected_in_its_time_and_its_neighbours_are_molecules() -> (
    None
):
    began = time.monotonic()
    outcomes = molecules_from_records(
        [SmilesText(smiles) for smiles in ("CCO", ENDLESS, "C1CC", ENDLESS, C60)], HASTY
    )
    assert time.monotonic() - began < 20  # with two new children
    rejection = Rejection(code=RejectionCode.TOO_COMPLEX, detail="timeout: not done after 0.3 s")
    ethanol, first, open_ring, second, fullerene = outcomes
    assert first == second == rejection
    assert isinstance(open_ring, Rejection)
    assert open_ring.code is RejectionCode.UNPARSABLE_SMILES
    assert isinstance(ethanol, Molecule)
    assert isinstance(fullerene, Molecule)
    assert (ethanol.smiles, fullerene.num_atoms) == ("CCO", 60)


@pytest.mark.parametrize("form", range(4))
def test_a_record_of_any_form_is_rejected_at_its_limit(form: int) -> None:
    # 2^20 rings: a second passes before they are listed.
    record = forms(cyclodextrin(20))[form]
    (outcome,) = molecules_from_records([record], HASTY)
    assert isinstance(outcome, Rejection)
    assert outcome.code is RejectionCode.TOO_COMPLEX


def crashing_worker() -> KillableWorker:
    program = (
        "import os, signal\n"
        "from moleblend_ray.chemistry.killable import serve\n"
        "serve(lambda request: os.kill(os.getpid(), signal.SIGSEGV))"
    )
    return KillableWorker(("-c", program))


def test_a_crash_of_rdkit_rejects_the_record_and_not_its_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = crashing_worker()
    monkeypatch.setattr(module, "_worker", lambda: worker)
    records = [SmilesText(C60), SmilesText("CCO")]
    crashed, ethanol = molecules_from_records(records, FeaturizeConfig())
    assert crashed == Rejection(code=RejectionCode.TOO_COMPLEX, detail="crashed: SIGSEGV")
    assert isinstance(ethanol, Molecule)


def test_memory_that_rdkit_lacks_is_the_reason_and_not_the_chemistry() -> None:
    outcome = molecule_from_smiles(cycloparaphenylene(30), FeaturizeConfig())
    assert isinstance(outcome, Rejection)
    assert outcome.code is RejectionCode.TOO_COMPLEX
    assert outcome.detail.startswith("memory: ")


def test_a_child_that_cannot_start_is_no_fault_of_the_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = KillableWorker(("-m", "no_such_module"))
    monkeypatch.setattr(module, "_worker", lambda: broken)
    with pytest.raises(WorkerStartError):
        molecule_from_smiles(C60, FeaturizeConfig())


def with_hydrogens(smiles: str) -> MolBlock:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDepictor.Compute2DCoords(mol)
    return MolBlock(Chem.MolToMolBlock(mol))


@pytest.mark.parametrize(
    "config",
    [
        FeaturizeConfig(),
        FeaturizeConfig(explicit_hydrogens=True, max_atoms=200),
        FeaturizeConfig(canonical_order=True),
        FeaturizeConfig(salts="largest_fragment", require_coordinates=True),
        FeaturizeConfig(conformers=ConformerConfig(generate=True, count=2)),
        FeaturizeConfig(canonical_order=True, conformers=ConformerConfig(generate=True, count=2)),
    ],
)
def test_the_outcome_is_the_same_as_in_this_process_bit_for_bit(
    config: FeaturizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        *forms(DODECAHEDRANE),
        *forms(C60)[:1],
        *forms(cyclodextrin(9) + ".O")[:1],
        with_hydrogens(cycloparaphenylene(9)),
        SmilesText("C[C@H](N)C(=O)O.[Na+]"),
        SmilesText("C1CC"),
        with_hydrogens("C/C=C\\[C@H](N)C(=O)[O-].[2H]O"),
        MolBlock("\n\n\n 30 40  0\n"),
    ]
    if config.conformers.generate:  # embedding the large ones takes long
        del records[4:7]
    sent: list[Callable[..., Any]] = []

    def watched(function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        sent.append(function)
        return limited(function, *arguments, **settings)

    monkeypatch.setattr(featurizer, "limited", watched)
    outcomes = []
    for is_slow in (True, False):
        monkeypatch.setattr(featurizer, "may_be_slow", lambda record, is_slow=is_slow: is_slow)
        outcomes.append(molecules_from_records(records, config))
    assert len(sent) == len(records)
    for there, here in zip(*outcomes, strict=True):
        assert_identical(there, here)


# -- what is computed of molecules --------------------------------------------------------------------


def test_descriptors_that_take_too_long_are_missing_and_those_of_others_are_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sugars = cyclodextrin(14)
    assert isinstance(molecule_from_smiles(sugars, FeaturizeConfig()), Molecule)
    with caplog.at_level(logging.WARNING):
        values = stored_descriptors(["CCO", sugars, C60], 1.0)
    assert np.isnan(values).all(axis=1).tolist() == [False, True, False]
    assert "1 of 3 SMILES" in caplog.text
    assert "timeout: not done after 1 s" in caplog.text


@pytest.mark.parametrize("smiles", [C60, DODECAHEDRANE, cyclodextrin(8), "C1CC" * 20])
def test_descriptors_keys_and_scaffolds_are_the_same_as_in_this_process(smiles: str) -> None:
    assert smiles_may_be_slow(smiles)
    here = descriptors_of_one(smiles)
    width = descriptors(["C"]).shape[1]
    expected = np.array(here if here is not None else [math.nan] * width)
    np.testing.assert_array_equal(descriptors([smiles])[0], expected)
    assert inchi_keys([smiles]) == [inchi_key(smiles)]
    scaffold = scaffold_or_error(smiles)
    if isinstance(scaffold, str):
        assert murcko_scaffold(smiles) == scaffold
    else:
        with pytest.raises(DataError, match=r"not a SMILES that RDKit can read"):
            murcko_scaffold(smiles)


def test_a_molecule_whose_key_takes_too_long_has_none() -> None:
    assert inchi_keys([cycloparaphenylene(14), "CCO"], 1.0) == [None, "LFQSCWFLJHTTHZ-UHFFFAOYSA-N"]


def test_a_molecule_whose_scaffold_takes_too_long_counts_as_a_scaffold_of_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = crashing_worker()
    monkeypatch.setattr(module, "_worker", lambda: worker)
    with pytest.raises(DataError, match="too complex for RDKit"):
        murcko_scaffold(C60)
    with caplog.at_level(logging.WARNING):
        split = scaffold_split([C60, "c1ccccc1", "Cc1ccccc1"])
    assert "1 of 3 molecules" in caplog.text
    assert sorted(np.concatenate(split).tolist()) == [0, 1, 2]


def test_a_geometry_whose_bonds_take_too_long_to_find_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = crashing_worker()
    monkeypatch.setattr(module, "_worker", lambda: worker)
    record = XyzRecord(1, np.full(60, 6, np.int32), np.eye(60, 3), {}, (C60,))
    assert bonded_geometry(record) == Rejection(
        code=RejectionCode.TOO_COMPLEX, detail="crashed: SIGSEGV"
    )


def test_ordinary_molecules_need_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> KillableWorker:
        raise AssertionError("a child is asked")

    monkeypatch.setattr(module, "_worker", refuse)
    smiles = [
        "CC(C)Cc1ccc(C(C)C(=O)O)cc1",
        "CN1CC[C@]23c4c5ccc(O)c4O[C@H]2[C@@H](O)C=C[C@H]3[C@H]1C5",
    ]
    assert not any(may_be_slow(SmilesText(text)) for text in smiles)
    for text in smiles:
        assert isinstance(molecule_from_smiles(text, FeaturizeConfig()), Molecule)
        murcko_scaffold(text)
    assert np.isfinite(descriptors(smiles)).any(axis=1).all()
    assert None not in inchi_keys(smiles)
