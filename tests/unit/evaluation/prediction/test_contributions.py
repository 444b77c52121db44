"""A contribution is what the mean of all models loses without the atom, whoever asks and however the molecule is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from rdkit import Chem

import moleblend_ray as mb
from moleblend_ray.data.batches.batch import build_micro_batches
from moleblend_ray.data.dataset.block import GraphColumns, gather
from moleblend_ray.evaluation.models.property_model import (
    Standardisation,
    TrainedProperty,
    save_property_model,
)
from moleblend_ray.evaluation.prediction.contributions import atom_contributions
from moleblend_ray.evaluation.tasks import TaskKind
from moleblend_ray.inference import _featurize
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.moleblend import HYDROGEN, MoleBlendModel, PropertyModel

TINY = ModelConfig(num_layers=2, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)
COLUMNS = ("a", "b")
# Of several sizes, one of a single atom, one of two fragments, one with stereo.
SMILES = ["CCCCO", "NCCC(=O)O", "C", "OCCc1ccccc1", "CC(=O)[O-].[Na+]", "C[C@H](O)F"]


def saved(
    folder: Path,
    seed: int,
    *,
    kind: TaskKind = TaskKind.REGRESSION,
    conformers: int = 1,
) -> str:
    """The folder of a model whose weights tell molecules apart as trained ones do."""
    torch.manual_seed(seed)
    model = PropertyModel(MoleBlendModel(TINY), len(COLUMNS))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(20.0)
    std = np.array([2.0 + seed, 0.5]) if kind is TaskKind.REGRESSION else np.ones(2)
    trained = TrainedProperty(
        task="mine",
        kind=kind,
        columns=COLUMNS,
        unit="kcal/mol" if kind is TaskKind.REGRESSION else "",
        standardisation=Standardisation(mean=np.zeros(2), std=std),
        conformers=conformers,
    )
    save_property_model(model, trained, str(folder))
    return str(folder)


def lists(table: pa.Table, name: str) -> list[np.ndarray]:
    """For each molecule (N, 2) of the columns a and b, (0, 2) where both are null."""
    columns = [table[f"{name}:{column}"].to_pylist() for column in COLUMNS]
    assert not any((of_a is None) != (of_b is None) for of_a, of_b in zip(*columns, strict=True))
    return [np.stack([of_a or [], of_b or []], axis=1) for of_a, of_b in zip(*columns, strict=True)]


def by_hand(predictor: mb.PropertyPredictor, smiles: str, conformers: int) -> np.ndarray:
    """(S, C, N, 2): models, conformers, atoms; one forward pass for each."""
    asked = predictor.predictor.with_contributions(asked=True)
    table = _featurize([smiles], conformers, asked, 256).molecules
    taken = max(1, table["num_conformers"][0].as_py())
    zero = np.zeros(1, np.int64)
    found = []
    for member in asked.members:
        for conformer in range(taken):
            columns = [GraphColumns.from_table(table)]
            block = gather(columns, zero, zero, zero, np.array([conformer]))
            batch = MoleculeBatch.from_micro_batch(build_micro_batches(block, 0, 0, 1)[0])
            with torch.no_grad():
                whole = member.saved.model(batch)
                without = [
                    member.saved.model(batch.without_atom(torch.zeros(1).long(), torch.tensor([a])))
                    for a in range(batch.max_atoms)
                ]
            lost = (whole - torch.cat(without)).double().numpy()
            found.append(lost * member.saved.trained.standardisation.std)
    return np.stack(found).reshape(len(asked.members), taken, -1, 2)


@pytest.mark.parametrize("kind", list(TaskKind))
@pytest.mark.parametrize("conformers", [0, 3])
def test_each_atom_gets_what_the_mean_loses_without_it(
    tmp_path: Path, kind: TaskKind, conformers: int
) -> None:
    uris = [saved(tmp_path / str(seed), seed, kind=kind) for seed in range(2)]
    predictor = mb.PropertyPredictor.from_pretrained(uris, conformers=conformers, interval=None)
    table = predictor.predict(SMILES, atom_contributions=True)
    for name in ("atom_contributions", "atom_contributions_std"):
        unit = b"kcal/mol" if kind is TaskKind.REGRESSION else b"log-odds"
        assert table.schema.field(f"{name}:a").metadata == {b"unit": unit}
        assert table.schema.field(f"{name}:a").type == pa.list_(pa.float32())
    means, spreads = lists(table, "atom_contributions"), lists(table, "atom_contributions_std")
    for smiles, mean, spread in zip(SMILES, means, spreads, strict=True):
        if smiles == "C":
            assert len(mean) == len(spread) == 0  # without it there is no molecule
            continue
        expected = by_hand(predictor, smiles, conformers)
        tolerance = {"rtol": 1e-3, "atol": 1e-4 * np.abs(expected).max()}
        np.testing.assert_allclose(mean, expected.mean(axis=(0, 1)), **tolerance)
        np.testing.assert_allclose(spread, expected.mean(axis=1).std(axis=0, ddof=1), **tolerance)
        assert np.ptp(mean, axis=0).min() > 1e-2, "these atoms are all the same to the models"


def test_contributions_of_a_sum_over_atoms_are_its_terms(tmp_path: Path) -> None:
    uri = saved(tmp_path, 0)
    predictor = mb.PropertyPredictor.from_pretrained(uri, conformers=0, interval=None)
    model = predictor.predictor.members[0].saved.model
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
        model.reference.copy_(torch.randn(model.reference.shape))
    table = predictor.predict(SMILES[:2], atom_contributions=True)
    terms = (
        model.reference.numpy() * predictor.predictor.members[0].saved.trained.standardisation.std
    )
    for row, found in enumerate(lists(table, "atom_contributions")):
        atoms = Chem.MolFromSmiles(table["canonical_smiles"][row].as_py()).GetAtoms()
        expected = [
            terms[atom.GetAtomicNum() - 1] + atom.GetTotalNumHs() * terms[HYDROGEN]
            for atom in atoms
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        prediction = [table[f"prediction:{column}"][row].as_py() for column in COLUMNS]
        np.testing.assert_allclose(found.sum(axis=0), prediction, rtol=1e-4, atol=1e-4)


def test_a_molecule_has_the_same_contributions_however_it_is_written(tmp_path: Path) -> None:
    uri = saved(tmp_path, 0)
    predictor = mb.PropertyPredictor.from_pretrained(uri, conformers=1, interval=None)
    written = ["C[C@H](N)C(=O)Oc1ccccc1", "O(C([C@@H](N)C)=O)c1ccccc1", "c1cc(OC(=O)[C@H](C)N)ccc1"]
    table = predictor.predict(written, atom_contributions=True)
    assert table["smiles"].to_pylist() == written
    assert len(set(table["canonical_smiles"].to_pylist())) == 1
    first, *others = lists(table, "atom_contributions")
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-3, atol=1e-4)
    predictions = table["prediction:a"].to_numpy()
    np.testing.assert_allclose(predictions, predictions[0], rtol=1e-5)


def test_a_linear_model_of_descriptors_contributes_nothing(tmp_path: Path) -> None:
    uri = saved(tmp_path, 0)
    alone = mb.PropertyPredictor.from_pretrained(uri, conformers=0, interval=None)
    member = alone.predictor.members[0]
    mixed = PropertyModel(MoleBlendModel(TINY), 2, num_descriptors=3)
    mixed.load_state_dict(member.saved.model.state_dict(), strict=False)
    mixed.set_linear(torch.randn(2, 3), torch.randn(2), torch.tensor([0.25, 1.0]))
    mixed.eval()

    def ask(rows: np.ndarray, batch: MoleculeBatch) -> np.ndarray:
        descriptors = torch.arange(3.0).expand(len(rows), 3)
        with torch.no_grad():
            output: torch.Tensor = mixed(batch, descriptors)
        return output.double().numpy()[None]

    predictor = alone.predictor.with_contributions(asked=True)
    table = _featurize(SMILES[:1], 0, predictor, 256).molecules
    found = atom_contributions(
        table, np.ones(1, np.int64), ask, shape=(1, 2), batch_size=8, device=torch.device("cpu")
    )
    encoder = by_hand(alone, SMILES[0], 0)[0, 0] / member.saved.trained.standardisation.std
    np.testing.assert_allclose(found.mean, encoder * [0.75, 0.0], rtol=1e-3, atol=1e-4)


def test_what_stands_beside_a_molecule_does_not_matter(tmp_path: Path) -> None:
    uri = saved(tmp_path, 0)
    built = mb.PropertyPredictor.from_pretrained(uri, conformers=2, interval=None)
    whole = built.predict(SMILES * 60, atom_contributions=True)
    assert len(whole) > 256, "all molecules are in one slice"
    for batch_size in (1, 7):
        one = mb.PropertyPredictor.from_pretrained(
            uri, conformers=2, interval=None, batch_size=batch_size
        )
        alone = lists(one.predict(SMILES, atom_contributions=True), "atom_contributions")
        for row, found in enumerate(lists(whole, "atom_contributions")):
            np.testing.assert_allclose(found, alone[row % len(SMILES)], rtol=1e-3, atol=1e-3)


def test_they_are_there_only_if_asked_and_rows_without_a_molecule_have_none(tmp_path: Path) -> None:
    predictor = mb.PropertyPredictor.from_pretrained(saved(tmp_path, 0), interval=None)
    usual = predictor.predict(["CCO", "no molecule"])
    asked = predictor.predict(["CCO", "no molecule"], atom_contributions=True)
    new = [
        "canonical_smiles",
        *(f"atom_contributions{of}:{c}" for c in COLUMNS for of in ("", "_std")),
    ]
    assert sorted(new) == sorted(set(asked.column_names) - set(usual.column_names))
    assert asked.select(usual.column_names).equals(usual)
    assert len(asked["atom_contributions:a"][0].as_py()) == 3
    # One model has no spread over models.
    assert asked["atom_contributions_std:a"].to_pylist() == [None, None]
    assert asked["atom_contributions:a"][1].as_py() is None
    nothing = predictor.predict(["no molecule"], atom_contributions=True)
    assert nothing.schema.equals(asked.schema)
