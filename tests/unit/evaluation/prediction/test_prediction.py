"""A row of predictions says what the models say of that molecule, whatever else is predicted beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.chemistry.molecule import Molecule, molecule_from_smiles
from moleblend_ray.data.dataset.block import GraphColumns, block_from_table, gather
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.sources.classes import Alternatives
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.models.batches import MOLECULE_COLUMNS, without_coordinates
from moleblend_ray.evaluation.models.finetune import predict
from moleblend_ray.evaluation.models.property_model import (
    SavedProperty,
    Standardisation,
    TrainedProperty,
)
from moleblend_ray.evaluation.molecules.applicability import ApplicabilityDomain
from moleblend_ray.evaluation.molecules.similarity import packed_ecfp
from moleblend_ray.evaluation.prediction.ensemble import Member
from moleblend_ray.evaluation.prediction.panel import Panel, build_predictor
from moleblend_ray.evaluation.prediction.prediction import Predictor
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions
from moleblend_ray.evaluation.tasks import TaskKind
from moleblend_ray.model.config import ModelConfig, ReadoutConfig
from moleblend_ray.model.moleblend import HYDROGEN, MoleBlendModel, PropertyModel

CPU = torch.device("cpu")
TINY = ModelConfig(num_layers=2, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)
TRAINING = ("CCCO", "CCCN", "OCc1ccccc1", "c1ccccc1")
# Flexible ones, one that has a single atom, and one that stays 2D.
FLEXIBLE = ("CCCCO", "NCCC(=O)O", "CCOCC", "OCCc1ccccc1", "C")
FLAT = ("c1ccncc1", "CC(C)CO")


def molecules(smiles: Sequence[str], conformers: ConformerConfig) -> list[Molecule]:
    config = FeaturizeConfig(conformers=conformers)
    found = []
    for text in smiles:
        outcome = molecule_from_smiles(text, config)
        assert isinstance(outcome, Molecule), outcome
        found.append(outcome)
    return found


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Rows as of a shard: five molecules of three conformers, two of none."""
    found = [
        *molecules(FLEXIBLE, ConformerConfig(generate=True, count=3, timeout_s=60.0)),
        *molecules(FLAT, ConformerConfig(generate=False)),
    ]
    names = ("atom_features", "bonds", "bond_features", "positions", "position_mask")
    columns = {name: [getattr(m, name).reshape(-1).tolist() for m in found] for name in names}
    return pa.table(
        {
            "mol_id": [f"id-{row}" for row in range(len(found))],
            "source_row": np.arange(len(found)),
            "smiles": [molecule.smiles for molecule in found],
            "conformer_status": ["relaxed"] * len(FLEXIBLE) + ["none"] * len(FLAT),
            "num_atoms": np.array([molecule.num_atoms for molecule in found], np.uint16),
            "num_conformers": np.array([len(molecule.positions) for molecule in found], np.uint8),
            "atom_features": pa.array(columns["atom_features"], pa.list_(pa.uint8())),
            "bonds": pa.array(columns["bonds"], pa.list_(pa.uint16())),
            "bond_features": pa.array(columns["bond_features"], pa.list_(pa.uint8())),
            "positions": pa.array(columns["positions"], pa.list_(pa.float32())),
            "position_mask": pa.array(columns["position_mask"], pa.list_(pa.bool_())),
        }
    )


def member(
    seed: int,
    *,
    kind: TaskKind = TaskKind.REGRESSION,
    training: Sequence[str] | None = TRAINING,
) -> Member:
    torch.manual_seed(seed)
    model = PropertyModel(MoleBlendModel(TINY), 2).eval()
    # Weights as a model has them that was trained: those drawn at first hardly tell molecules apart.
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(20.0)
    scale = 1.0 + seed if kind is TaskKind.REGRESSION else 1.0
    trained = TrainedProperty(
        task="esol",
        kind=kind,
        columns=("a", "b"),
        unit="kcal/mol" if kind is TaskKind.REGRESSION else "",
        standardisation=Standardisation(mean=np.zeros(2), std=np.full(2, scale)),
    )
    domain = None if training is None else ApplicabilityDomain.of(training)
    return Member(
        uri=f"model-{seed}", saved=SavedProperty(model, trained), fingerprint="", domain=domain
    )


def predictor(
    *members: Member,
    conformers: int | None = 3,
    threshold: float | None = None,
    batch_size: int = 64,
    interval: float | None = None,
) -> Predictor:
    return Predictor.build(
        members,
        conformers=conformers,
        threshold=threshold,
        batch_size=batch_size,
        device=CPU,
        interval=interval,
    )


def numbers(table: pa.Table, statistic: str) -> np.ndarray:
    """(M, 2) of the columns a and b; null as NaN."""
    columns = (table[f"{statistic}:{name}"] for name in "ab")
    return np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1)


def by_hand(member: Member, table: pa.Table, conformer: int) -> np.ndarray:
    """(M, 2) predictions from one conformer of each molecule, by the loop that fine-tuning uses."""
    rows = np.arange(table.num_rows)
    columns, group = GraphColumns.from_table(table), np.zeros_like(rows)
    block = gather([columns], group, rows, rows, np.full_like(rows, conformer))
    outputs = predict(member.saved.model, block, rows, 4, CPU)
    return member.saved.trained.readout(outputs)


@pytest.mark.parametrize("kind", list(TaskKind))
def test_an_ensemble_over_conformers_is_the_mean_of_each_model_on_each_conformer(
    table: pa.Table, kind: TaskKind
) -> None:
    members = [member(seed, kind=kind) for seed in range(3)]
    found = predictor(*members).part(table)
    single = np.stack([[by_hand(m, table, c) for c in range(3)] for m in members])
    np.testing.assert_allclose(
        numbers(found, "prediction"), single.mean(axis=(0, 1)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        numbers(found, "std"), single.mean(axis=1).std(axis=0, ddof=1), rtol=1e-3, atol=1e-6
    )
    spread = single.mean(axis=0).std(axis=0, ddof=1)
    flexible = slice(0, len(FLEXIBLE))
    np.testing.assert_allclose(
        numbers(found, "conformer_std")[flexible], spread[flexible], rtol=1e-2, atol=1e-6
    )
    assert spread[flexible].max() > 1e-4, "the conformers of these molecules tell nothing apart"
    assert np.isnan(numbers(found, "conformer_std")[len(FLEXIBLE) :]).all()
    assert found["prediction:a"].null_count == 0
    if kind is TaskKind.CLASSIFICATION:
        assert ((numbers(found, "prediction") > 0) & (numbers(found, "prediction") < 1)).all()


def test_with_one_conformer_the_first_counts_and_there_is_no_column_of_spreads(
    table: pa.Table,
) -> None:
    one = member(0)
    found = predictor(one, conformers=1).part(table)
    np.testing.assert_allclose(
        numbers(found, "prediction"), by_hand(one, table, 0), rtol=1e-4, atol=1e-6
    )
    assert found["std:a"].null_count == table.num_rows
    assert "conformer_std:a" not in found.column_names


def test_models_tuned_without_coordinates_do_not_see_those_of_the_source(table: pa.Table) -> None:
    one = member(0)
    trained = dataclasses.replace(one.saved.trained, conformers=0)
    flat = dataclasses.replace(one, saved=SavedProperty(one.saved.model, trained))
    without = without_coordinates(table)
    expected = by_hand(one, without, 0)
    assert np.abs(expected - by_hand(one, table, 0))[: len(FLEXIBLE)].max() > 1e-4
    for asked in (predictor(one, conformers=0), predictor(flat, conformers=None)):
        found = asked.part(table)
        np.testing.assert_allclose(numbers(found, "prediction"), expected, rtol=1e-4, atol=1e-6)
        assert set(found["conformer_status"].to_pylist()) == {"none"}
        assert "conformer_std:a" not in found.column_names
    seeing = predictor(flat, conformers=1).part(table)
    np.testing.assert_allclose(
        numbers(seeing, "prediction"), by_hand(one, table, 0), rtol=1e-4, atol=1e-6
    )


def test_without_coordinates_the_rest_of_a_table_stays(table: pa.Table) -> None:
    flat = without_coordinates(table)
    assert flat.schema.equals(table.schema)
    coordinates = ["num_conformers", "positions", "position_mask", "conformer_status"]
    assert flat.drop_columns(coordinates).equals(table.drop_columns(coordinates))
    block = block_from_table(flat, np.arange(len(flat)))
    assert not block.position_mask.any()


def test_what_stands_beside_a_molecule_does_not_matter(table: pa.Table) -> None:
    members = [member(0), member(1)]
    whole = predictor(*members).part(table)
    for batch_size in (1, 5):
        asked = predictor(*members, batch_size=batch_size)
        cut = [asked.part(table.slice(start, 2)) for start in range(0, table.num_rows, 2)]
        for other in (asked.part(table), pa.concat_tables(cut)):
            assert other.drop_columns(values := measured(other)).equals(whole.drop_columns(values))
            for name in ("prediction", "std", "conformer_std"):
                np.testing.assert_allclose(
                    numbers(other, name), numbers(whole, name), rtol=1e-3, atol=1e-5
                )


def measured(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if ":" in name]


def test_columns_are_the_source_s_then_each_property_s_with_its_unit(table: pa.Table) -> None:
    found = predictor(member(0), member(1)).part(table)
    assert found.column_names == [
        *("mol_id", "source_row", "smiles", "conformer_status"),
        *(f"{what}:{name}" for name in "ab" for what in ("prediction", "std", "conformer_std")),
        *("similarity", "in_domain"),
    ]
    assert found["mol_id"].to_pylist() == table["mol_id"].to_pylist()
    assert found.schema.field("std:b").metadata == {b"unit": b"kcal/mol"}
    classes = predictor(member(0, kind=TaskKind.CLASSIFICATION)).schema
    assert classes.field("prediction:a").metadata == {b"unit": b"probability"}


def test_similarity_is_to_the_nearest_training_molecule_of_every_model(table: pa.Table) -> None:
    smiles = table["smiles"].to_pylist()
    other = ("CCCCO", "CC(C)C")
    domains = [ApplicabilityDomain.of(training) for training in (TRAINING, other)]
    nearest = np.stack([domain.similarity(packed_ecfp(smiles)) for domain in domains])
    assert (nearest.argmin(axis=0) == 0).any()
    assert (nearest.argmin(axis=0) == 1).any()

    mixed = predictor(member(0), member(1), member(2, training=other)).part(table)
    np.testing.assert_array_equal(mixed["similarity"].to_numpy(), nearest.min(axis=0))
    inside = [values >= domain.threshold for values, domain in zip(nearest, domains, strict=True)]
    assert mixed["in_domain"].to_pylist() == (inside[0] & inside[1]).tolist()

    # At least as similar as the threshold says, so what was trained on is inside, if all models were trained on it.
    first, second = member(0, training=smiles[:3]), member(1, training=smiles[2:5])
    for members in ((first, second), (second, first)):
        common = predictor(*members, threshold=1.0).part(table)["in_domain"]
        assert common.to_pylist() == [row == 2 for row in range(len(smiles))]

    alike = predictor(member(0), threshold=0.3).part(table)
    np.testing.assert_array_equal(alike["similarity"].to_numpy(), nearest[0])
    assert alike["in_domain"].to_pylist() == (nearest[0] >= 0.3).tolist()
    assert len(set(alike["in_domain"].to_pylist())) == 2


def test_an_element_that_the_element_reference_lacks_is_outside(table: pa.Table) -> None:
    """The energy of its atoms is not in the prediction, however similar the molecule is."""
    plain, referenced = member(0), member(1)
    carbon, oxygen = 5, 7
    referenced.saved.model.reference[[HYDROGEN, carbon, oxygen]] = torch.tensor(
        [[-0.5], [-38.0], [-75.0]]
    )
    inside = [
        predictor(*members, conformers=1, threshold=0.0).part(table)["in_domain"].to_pylist()
        for members in ((plain,), (plain, referenced))
    ]
    has_nitrogen = ["n" in text.lower() for text in (*FLEXIBLE, *FLAT)]
    assert inside == [[True] * len(table), [not has for has in has_nitrogen]]


def test_an_element_that_one_property_lacks_is_outside(table: pa.Table) -> None:
    """Labels of the other property tell nothing of what its atoms add to this one."""
    referenced = member(0)
    hydrogen, carbon, nitrogen, oxygen = HYDROGEN, 5, 6, 7
    reference = referenced.saved.model.reference
    reference[[hydrogen, carbon, nitrogen, oxygen]] = -1.0
    reference[nitrogen, 1] = 0.0
    has_nitrogen = ["n" in text.lower() for text in (*FLEXIBLE, *FLAT)]
    found = predictor(referenced, conformers=1, threshold=0.0).part(table)
    assert found["in_domain"].to_pylist() == [not has for has in has_nitrogen]
    # A property without a reference (labels that are all equal) lacks nothing.
    reference[:, 1] = 0.0
    found = predictor(referenced, conformers=1, threshold=0.0).part(table)
    assert all(found["in_domain"].to_pylist())


def test_without_the_training_molecules_of_one_model_likeness_is_not_known(
    table: pa.Table,
) -> None:
    found = predictor(member(0), member(1, training=None), threshold=0.3).part(table)
    assert found["similarity"].null_count == found["in_domain"].null_count == table.num_rows
    assert found["prediction:a"].null_count == 0


def test_the_fingerprint_covers_models_and_training_molecules() -> None:
    first, second = (dataclasses.replace(member(seed), fingerprint=str(seed)) for seed in range(2))
    elsewhere = dataclasses.replace(first, domain=ApplicabilityDomain.of(["CC", "CO"]))
    without = dataclasses.replace(first, domain=None)
    sets = ([first], [second], [first, second], [second, first], [elsewhere], [without])
    assert len({predictor(*members).fingerprint for members in sets}) == len(sets)
    assert predictor(first, batch_size=2).fingerprint == predictor(first).fingerprint


def validated(one: Member, errors: np.ndarray, *, shift: float = 0.0) -> Member:
    """With predictions for molecules whose labels are 0 (+ ``shift``), which are wrong by (M, 2) ``errors``."""
    names = tuple(f"C{row}" for row in range(len(errors)))
    known = PartPredictions(
        mol_ids=names,
        smiles=names,
        labels=np.full_like(errors, shift),
        predictions=errors + shift,
    )
    return dataclasses.replace(one, validation=known)


def test_an_interval_is_around_the_mean_of_all_models(table: pa.Table) -> None:
    errors = np.tile(np.arange(1.0, 20.0)[:, None], (1, 2))
    errors[10:, 1] = np.nan
    members = [validated(member(0), errors), validated(member(1), 3 * errors)]
    asked = predictor(*members, conformers=1, interval=0.9)
    found = asked.part(table)
    assert found.column_names[4:8] == ["prediction:a", "lower:a", "upper:a", "std:a"]
    assert found.schema.field("upper:b").metadata == {b"unit": b"kcal/mol"}
    centre = numbers(found, "prediction")
    # The mean of both models is wrong by 2 to 38, of which 36 is not exceeded by 90 %; of b it is 20 of ten.
    np.testing.assert_allclose(numbers(found, "lower"), centre - np.array([36.0, 20.0]))
    np.testing.assert_allclose(numbers(found, "upper"), centre + np.array([36.0, 20.0]))
    assert asked.describe()["half_widths"] == {"a": 36.0, "b": 20.0}
    narrower = predictor(*members, conformers=1, interval=0.5)
    assert narrower.describe()["half_widths"] == {"a": 20.0, "b": 12.0}
    assert narrower.fingerprint != asked.fingerprint


def test_intervals_that_are_not_known_are_empty_and_a_warning_says_why(
    table: pa.Table, caplog: pytest.LogCaptureFixture
) -> None:
    errors = np.ones((19, 2))
    few = np.ones((19, 2))
    few[8:, 1] = np.nan
    one = validated(member(0), errors)
    cases = {
        "it is not known how wrong": (one, member(1)),
        "or they had different molecules": (one, validated(member(1), errors, shift=1.0)),
        "empty for b: there are too few validation labels to tell what holds 0.9": (
            validated(member(0), few),
        ),
    }
    for reason, members in cases.items():
        caplog.clear()
        found = predictor(*members, conformers=1, interval=0.9).part(table)
        assert reason in caplog.text
        assert found["upper:b"].null_count == found["lower:b"].null_count == table.num_rows
        assert found["prediction:b"].null_count == 0
    assert found["lower:a"].null_count == 0


def test_errors_with_other_conformers_tell_nothing_of_these_predictions(
    table: pa.Table, caplog: pytest.LogCaptureFixture
) -> None:
    one = validated(member(0), np.ones((19, 2)))
    flat = PropertyModel(MoleBlendModel(TINY), 2, ReadoutConfig(relations="2d")).eval()
    without = dataclasses.replace(one, saved=SavedProperty(flat, one.saved.trained))
    # A model of 2D relations alone sees the same of any conformer.
    for members in ([one], [one, without]):
        asked = predictor(*members, conformers=3, interval=0.9)
        assert "known for 1 conformers, and these predictions are from 3" in caplog.text
        assert asked.part(table)["lower:a"].null_count == table.num_rows
        caplog.clear()
    for members, conformers in (([one, without], 1), ([without], 3), ([without], 0)):
        asked = predictor(*members, conformers=conformers, interval=0.9)
        assert asked.describe()["half_widths"] == {"a": 1.0, "b": 1.0}
    assert not caplog.records


def classified(one: Member, labels: Sequence[float], probabilities: np.ndarray) -> Member:
    """With (M, 2) probabilities for molecules that have these classes in both columns."""
    names = tuple(f"C{row}" for row in range(len(labels)))
    known = PartPredictions(
        mol_ids=names,
        smiles=names,
        labels=np.tile(np.array(labels)[:, None], (1, 2)),
        predictions=probabilities,
    )
    return dataclasses.replace(one, validation=known)


def test_classes_have_sets_by_the_mean_of_all_models(table: pa.Table) -> None:
    labels = [0.0] * 19 + [1.0] * 19
    steps = np.linspace(0.0, 1.0, 38)[:, None]
    members = [
        classified(member(seed, kind=TaskKind.CLASSIFICATION), labels, steps * scale)
        for seed, scale in ((0, [1.0, 1.0]), (1, [1.0, 0.5]))
    ]
    asked = predictor(*members, conformers=1, interval=0.9)
    found = asked.part(table)
    names = ["prediction:a", "p0:a", "p1:a", "classes:a", "std:a"]
    assert found.column_names[4:9] == names
    assert found.schema.field("p0:a").metadata is None
    assert found.schema.field("prediction:a").metadata == {b"unit": b"probability"}
    means = numbers(found, "prediction")
    for column, scale in enumerate((1.0, 0.75)):
        expected = steps[:, 0] * scale
        of_0 = (1 + (expected[:19] >= means[:, [column]]).sum(axis=1)) / 20
        of_1 = (1 + (expected[19:] <= means[:, [column]]).sum(axis=1)) / 20
        np.testing.assert_allclose(numbers(found, "p0")[:, column], of_0)
        np.testing.assert_allclose(numbers(found, "p1")[:, column], of_1)
        words = ["neither", "0", "1", "both"]
        codes = (of_0 > 0.1 + 1e-9).astype(int) + 2 * (of_1 > 0.1 + 1e-9)
        assert found[f"classes:{'ab'[column]}"].to_pylist() == [words[code] for code in codes]
    assert asked.describe()["half_widths"] == {}
    other = [classified(one, labels, 0.9 * steps * np.ones(2)) for one in members]
    assert predictor(*other, conformers=1, interval=0.9).fingerprint != asked.fingerprint


def test_sets_that_are_not_known_or_tell_little_are_told(
    table: pa.Table, caplog: pytest.LogCaptureFixture
) -> None:
    one = member(0, kind=TaskKind.CLASSIFICATION)
    found = predictor(one, conformers=1, interval=0.9).part(table)
    assert "p-values and sets of classes stay empty: it is not known" in caplog.text
    for name in ("p0:a", "p1:b", "classes:a"):
        assert found[name].null_count == table.num_rows
    assert found.schema.field("classes:a").type == pa.string()
    caplog.clear()
    labels = [0.0] * 19 + [1.0] * 5
    few = classified(one, labels, np.ones((24, 1)) * [0.5, 0.5])
    found = predictor(few, conformers=1, interval=0.9).part(table)
    assert "with 0.9, these classes are in every set" in caplog.text
    assert "a (1), b (1)" in caplog.text
    assert set(found["classes:a"].to_pylist()) <= {"1", "both"}
    caplog.clear()
    assert predictor(few, conformers=3, interval=0.9).part(table)["p0:a"].null_count == 7
    assert "known for 1 conformers, and these predictions are from 3" in caplog.text


def test_intervals_and_sets_are_there_only_if_asked(table: pa.Table) -> None:
    classes = classified(
        member(0, kind=TaskKind.CLASSIFICATION), [0.0, 1.0], np.array([[0.1, 0.1], [0.9, 0.9]])
    )
    for one in (classes, validated(member(0), np.ones((19, 2)))):
        without = predictor(one, interval=None)
        assert without.describe()["half_widths"] == {}
        absent = ("lower", "upper", "p0", "p1", "classes")
        assert not any(name.startswith(absent) for name in without.schema.names)
        assert without.part(table).num_rows == table.num_rows
        alone = dataclasses.replace(one, validation=None)
        assert without.fingerprint == predictor(alone).fingerprint


def of_task(one: Member, task: str, **changes: object) -> Member:
    """The model, as if it had been trained for another task."""
    trained = dataclasses.replace(one.saved.trained, task=task, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(one, saved=SavedProperty(one.saved.model, trained))


def panel(*members: Member, **settings: Any) -> Predictor | Panel:
    defaults: dict[str, Any] = {
        "conformers": None,
        "threshold": None,
        "batch_size": 64,
        "device": CPU,
    }
    return build_predictor(members, **{**defaults, **settings})


def test_a_panel_says_of_each_task_what_its_models_alone_say(table: pa.Table) -> None:
    esol = [of_task(member(seed), "esol", conformers=3) for seed in (0, 1)]
    flat = of_task(member(2, kind=TaskKind.CLASSIFICATION, training=FLAT), "herg", conformers=0)
    found = panel(esol[0], flat, esol[1], interval=0.9)
    assert isinstance(found, Panel)
    assert (found.conformers, len(found.members)) == (3, 3)
    part = found.part(table)
    assert part.schema.equals(found.schema, check_metadata=True)
    assert part["conformer_status"] == table["conformer_status"]
    for task, members in (("esol", esol), ("herg", [flat])):
        alone = predictor(*members, conformers=None, interval=0.9).part(table)
        own = [name for name in part.column_names if task in name]
        assert len(own) == alone.num_columns - len(MOLECULE_COLUMNS)
        for name, field in zip(own, list(alone.schema)[len(MOLECULE_COLUMNS) :], strict=True):
            statistic, _, column = field.name.partition(":")
            assert name == (f"{statistic}:{task}/{column}" if column else f"{statistic}:{task}")
            assert part[name].equals(alone[field.name])
            assert part.schema.field(name).metadata == field.metadata
    assert "conformer_std:esol/a" in part.column_names
    assert "classes:herg/a" in part.column_names
    assert part["similarity:esol"] != part["similarity:herg"]


def test_the_most_probable_class_of_a_column_is_named_also_in_a_panel(table: pa.Table) -> None:
    one = of_task(
        member(0, kind=TaskKind.CLASSIFICATION),
        "assay",
        columns=("y=low", "y=high"),
        alternatives=(Alternatives("y", ("y=low", "y=high"), ("low", "high")),),
    )
    alone = predictor(one).part(table)
    chances = [alone[f"prediction:y={word}"].to_numpy() for word in ("low", "high")]
    expected = np.where(chances[0] >= chances[1], "low", "high").tolist()
    assert set(expected) == {"low", "high"}
    assert alone["class:y"].to_pylist() == expected
    assert alone.column_names[-3:] == ["class:y", "similarity", "in_domain"]
    # A softmax.
    np.testing.assert_allclose(chances[0] + chances[1], 1.0, rtol=1e-9)
    both = panel(one, of_task(member(1), "esol")).part(table)
    assert both["class:assay/y"].to_pylist() == expected
    two = of_task(
        member(0, kind=TaskKind.CLASSIFICATION), "assay", columns=("y", "z"),
        alternatives=(Alternatives("z", ("z",), ("no", "yes")),),
    )  # fmt: skip
    part = predictor(two).part(table)
    is_one = part["prediction:z"].to_numpy() > 0.5
    assert part["class:z"].to_pylist() == np.where(is_one, "yes", "no").tolist()
    assert part.column_names[-3:] == ["class:z", "similarity", "in_domain"]
    assert not any(
        name.startswith("class:") for name in predictor(member(1)).part(table).column_names
    )


def test_a_panel_describes_all_of_its_models() -> None:
    esol = [of_task(member(seed), "esol") for seed in (0, 1)]
    herg = of_task(member(2, kind=TaskKind.CLASSIFICATION), "herg")
    found = panel(*esol, herg)
    told = found.describe()
    assert told["columns"] == ["esol/a", "esol/b", "herg/a", "herg/b"]
    assert told["units"] == {"esol/a": "kcal/mol", "esol/b": "kcal/mol", "herg/a": "", "herg/b": ""}
    assert told["unit"] == "kcal/mol"
    assert [model["uri"] for model in told["models"]] == ["model-0", "model-1", "model-2"]
    assert [len(one["models"]) for one in told["tasks"].values()] == [2, 1]
    others = [panel(esol[0], herg), panel(*esol, of_task(herg, "hERG"))]
    assert len({one.fingerprint for one in (found, *others)}) == 3


def test_two_properties_of_one_name_make_no_panel() -> None:
    several = of_task(member(0), "tox")  # columns a and b
    single = of_task(member(1), "tox/a", columns=("y",))
    with pytest.raises(ConfigError, match=r"'tox' and 'tox/a' both predict what is called 'tox/a'"):
        panel(several, single)
    assert isinstance(panel(several, of_task(member(1), "tox/A", columns=("y",))), Panel)


def test_the_form_of_molecules_is_that_of_any_task_that_tells_it() -> None:
    earlier = of_task(member(0), "esol")
    hydrogens = of_task(member(1), "gap", molecules=MoleculeForm(explicit_hydrogens=True))
    found = panel(earlier, hydrogens, conformers=0)
    assert found.form == MoleculeForm(explicit_hydrogens=True)
    ordered = MoleculeForm(explicit_hydrogens=True, canonical_order=True)
    assert found.with_contributions(asked=True).form == ordered


def test_models_of_one_task_are_no_panel() -> None:
    assert isinstance(panel(member(0), member(1)), Predictor)


def test_the_contributions_of_a_panel_are_those_of_its_models(table: pa.Table) -> None:
    one, two = of_task(member(0), "esol"), of_task(member(1), "logp")
    found = panel(one, two, conformers=0).with_contributions(asked=True)
    assert found.form is not None
    assert found.form.canonical_order
    part = found.part(table)
    for task, single in (("esol", one), ("logp", two)):
        alone = predictor(single, conformers=0).with_contributions(asked=True).part(table)
        assert part[f"atom_contributions:{task}/b"].equals(alone["atom_contributions:b"])
    again = found.with_contributions(asked=False)
    assert not [name for name in again.schema.names if name.startswith("atom_")]


def test_tasks_that_need_other_molecules_make_no_panel() -> None:
    seeing = of_task(member(0), "esol")
    model = PropertyModel(MoleBlendModel(TINY), 2, ReadoutConfig(relations="3d"))
    distances = of_task(
        dataclasses.replace(seeing, saved=SavedProperty(model, seeing.saved.trained)), "gap"
    )
    with pytest.raises(ConfigError, match=r"those of gap see distances alone.*those of esol can"):
        panel(seeing, distances)
    salty = of_task(member(1), "logp", molecules=MoleculeForm(salts="largest_fragment"))
    plain = of_task(seeing, "esol", molecules=MoleculeForm())
    with pytest.raises(ConfigError, match="different forms"):
        panel(plain, salty)
