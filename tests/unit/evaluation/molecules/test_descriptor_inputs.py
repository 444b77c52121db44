"""Models that read descriptors beside their encoder: what they learn from them, and that each molecule gets its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import moleblend_ray as mb
from moleblend_ray.chemistry.descriptors import DESCRIPTOR_NAMES, descriptors
from moleblend_ray.config.downstream import FinetuneConfig, SweepConfig, TaskConfig
from moleblend_ray.data.dataset.descriptors import DESCRIPTOR_LIMIT
from moleblend_ray.errors import CheckpointError, ConfigError
from moleblend_ray.evaluation.models.atom_reference import element_counts
from moleblend_ray.evaluation.models.finetune import (
    LINEAR_SHARE,
    FinetuneResult,
    StartingPoint,
    finetune_once,
    predict_mean,
)
from moleblend_ray.evaluation.models.linear_model import fit_linear
from moleblend_ray.evaluation.models.property_model import load_property_model, save_property_model
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.molecules.descriptor_inputs import DescriptorInputs, DescriptorTable
from moleblend_ray.evaluation.search import SearchSpace
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Metric, TaskKind, resolve_task
from moleblend_ray.inference import _featurize
from moleblend_ray.orchestration.downstream.downstream import may_read_descriptors

from ..conftest import MakeLabelled, all_smiles

CPU = torch.device("cpu")
TASK = resolve_task("number", columns=("y0",), kind=TaskKind.REGRESSION, metric=Metric.MAE)
SETTINGS = FinetuneSettings(
    learning_rate=1e-3,
    head_learning_rate=3e-2,
    head_dropout=0.0,
    batch_size=16,
    epochs=40,
    patience=40,
    frozen_blocks=2,
    descriptors=True,
)


def made_up(num_molecules: int) -> DescriptorTable:
    """Five descriptors that no encoder can know, one of them constant and one often missing."""
    values = np.random.default_rng(1).normal(3.0, 10.0, (num_molecules, 5))
    values[:, 3] = 7.0
    values[::3, 4] = np.nan
    return DescriptorTable(("a", "b", "c", "d", "e"), values)


@pytest.fixture
def molecules(make_labelled: MakeLabelled) -> LabelledMolecules:
    """96 molecules whose label is a sum of made-up descriptors."""
    smiles = all_smiles()
    table = made_up(len(smiles))
    labels = 2.0 * table.values[:, 0] - table.values[:, 1]
    return dataclasses.replace(make_labelled(smiles, labels), descriptors=table)


def train(
    molecules: LabelledMolecules, start: StartingPoint, settings: FinetuneSettings = SETTINGS
) -> FinetuneResult:
    rows = np.arange(len(molecules))
    return finetune_once(
        molecules,
        rows[rows % 4 != 0],
        rows[rows % 4 == 0],
        task=TASK,
        start=start,
        settings=settings,
        seed=0,
        device=CPU,
    )


def test_predictions_are_means_of_the_encoder_and_the_linear_model(
    molecules: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    found = train(molecules, tiny_start, dataclasses.replace(SETTINGS, epochs=3))
    rows = np.arange(len(molecules))

    def predicted(share: float) -> np.ndarray:
        found.model.linear_share.fill_(share)
        return predict_mean(found.model, found.trained, molecules, rows, 8, CPU)

    mean, encoder, linear = (predicted(share) for share in (LINEAR_SHARE, 0.0, 1.0))
    np.testing.assert_allclose(mean, 0.5 * encoder + 0.5 * linear, rtol=1e-4, atol=1e-4)
    blind = dataclasses.replace(found.trained, descriptors=None)
    with pytest.raises(ConfigError, match="predicts from 5 descriptors of each molecule"):
        predict_mean(found.model, blind, molecules, rows, 8, CPU)
    # What the descriptors tell is known to the linear model, and to the encoder not at all.
    errors = [
        np.abs(values - molecules.labels)[rows % 4 == 0].mean() for values in (linear, encoder)
    ]
    assert errors[0] < 1.0
    assert errors[1] > 10.0
    assert found.valid_score == pytest.approx(
        np.abs(mean - molecules.labels)[rows % 4 == 0].mean(), rel=1e-4
    )


def test_training_changes_the_encoder_as_if_there_were_no_linear_model(
    molecules: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    settings = dataclasses.replace(SETTINGS, epochs=1, frozen_blocks=0)
    ours, plain = (
        train(molecules, tiny_start, dataclasses.replace(settings, descriptors=reads)).model
        for reads in (True, False)
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_the_scaling_comes_from_the_training_part_alone(
    molecules: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    found = train(molecules, tiny_start, dataclasses.replace(SETTINGS, epochs=1)).trained
    assert found.descriptors is not None
    assert molecules.descriptors is not None
    rows = np.arange(len(molecules))
    training = molecules.descriptors.take(rows[rows % 4 != 0])
    scaled = found.descriptors.of(training)
    np.testing.assert_allclose(scaled[:, :3].mean(0), 0.0, atol=1e-6)
    np.testing.assert_allclose(scaled[:, :3].std(0), 1.0, atol=1e-6)
    assert not scaled[:, 3].any()
    assert np.isfinite(scaled).all()
    assert np.abs(scaled).max() <= DESCRIPTOR_LIMIT


# No step changes anything.
STILL = dataclasses.replace(SETTINGS, learning_rate=1e-12, head_learning_rate=1e-12, epochs=1)


@pytest.mark.parametrize(("noise", "best"), [(0.1, 1.0), (1000.0, 10000.0)])
def test_the_linear_model_has_the_penalty_that_validation_prefers(
    molecules: LabelledMolecules, tiny_start: StartingPoint, noise: float, best: float
) -> None:
    drawn = np.random.default_rng(2).normal(0.0, noise, molecules.labels.shape)
    molecules = dataclasses.replace(molecules, labels=molecules.labels + drawn)
    found = train(molecules, tiny_start, STILL)
    assert found.trained.descriptors is not None
    assert molecules.descriptors is not None
    inputs, labels = found.trained.descriptors.of(molecules.descriptors), molecules.labels[:, 0]
    rows = np.arange(len(molecules))
    training, valid = rows[rows % 4 != 0], rows[rows % 4 == 0]
    models = {
        penalty: Ridge(alpha=penalty).fit(inputs[training], labels[training])
        for penalty in (1.0, 10.0, 100.0, 1000.0, 10000.0)
    }
    errors = {
        penalty: np.abs(model.predict(inputs[valid]) - labels[valid]).mean()
        for penalty, model in models.items()
    }
    assert min(errors, key=errors.__getitem__) == best
    found.model.linear_share.fill_(1.0)
    values = predict_mean(found.model, found.trained, molecules, rows, 8, CPU)[:, 0]
    np.testing.assert_allclose(values, models[best].predict(inputs), rtol=1e-4, atol=1e-3)


def test_the_linear_model_tells_only_what_an_element_reference_leaves(
    molecules: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    counts = element_counts(molecules.block)
    elements = counts @ np.linspace(-500.0, 500.0, counts.shape[1])[:, None]
    molecules = dataclasses.replace(molecules, labels=molecules.labels + elements)
    found = train(molecules, tiny_start, dataclasses.replace(STILL, atom_reference=True))
    found.model.linear_share.fill_(1.0)
    rows = np.arange(len(molecules))
    values = predict_mean(found.model, found.trained, molecules, rows, 8, CPU)
    # 72 molecules do not determine the reference exactly beside what descriptors add.
    error = np.abs(values - molecules.labels)[rows % 4 == 0].mean()
    assert error < 0.5 * np.std(molecules.labels - elements)


def test_balanced_classes_weigh_alike_in_the_linear_model() -> None:
    labels = np.zeros((20, 1))
    labels[0] = 1.0
    # Inputs that tell next to nothing of the class: what is left is how common each class counts.
    inputs = np.random.default_rng(0).normal(0.0, 1e-3, (20, 3))
    for balanced, expected in ((True, 0.5), (False, 0.05)):
        model = fit_linear(TaskKind.CLASSIFICATION, inputs, labels, {"C": 1.0}, balanced=balanced)
        assert 1 / (1 + np.exp(-model(inputs[:1]))) == pytest.approx(expected, abs=1e-3)


def test_a_column_of_one_class_is_left_to_the_encoder(
    molecules: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    labels = np.stack([(molecules.labels[:, 0] > 5.0), np.ones(len(molecules))], 1).astype(float)
    classes = dataclasses.replace(molecules, labels=labels, columns=("y0", "y1"))
    task = resolve_task("classes", columns=("y0", "y1"), kind=TaskKind.CLASSIFICATION)
    rows = np.arange(len(classes))
    choices: tuple[Literal["none", "balanced"], ...] = ("none", "balanced")
    for weights in choices:
        settings = dataclasses.replace(STILL, class_weights=weights)
        found = finetune_once(
            classes, rows[rows % 4 != 0], rows[rows % 4 == 0],
            task=task, start=tiny_start, settings=settings, seed=0, device=CPU,
        )  # fmt: skip
        assert found.valid_score > 0.95
        assert found.model.linear_share.tolist() == [LINEAR_SHARE, 0.0]
        both = predict_mean(found.model, found.trained, classes, rows, 8, CPU)
        found.model.linear_share.zero_()
        encoder = predict_mean(found.model, found.trained, classes, rows, 8, CPU)
        np.testing.assert_allclose(both[:, 1], encoder[:, 1], rtol=1e-6)
        assert not np.allclose(both[:, 0], encoder[:, 0], rtol=0.1)


def test_each_molecule_gets_its_own_descriptors_in_any_order(
    molecules: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    result = train(molecules, tiny_start)
    rows = np.array([40, 3, 77, 12])

    def found(rows: np.ndarray) -> np.ndarray:
        return predict_mean(result.model, result.trained, molecules, rows, 3, CPU)

    one_by_one = np.concatenate([found(row[None]) for row in rows])
    assert one_by_one.std() > 2.0
    np.testing.assert_allclose(found(rows), one_by_one, rtol=1e-4, atol=1e-3)
    taken = molecules.take(rows)
    again = predict_mean(result.model, result.trained, taken, np.arange(4), 3, CPU)
    np.testing.assert_allclose(again, one_by_one, rtol=1e-4, atol=1e-3)


def test_a_saved_model_predicts_the_same_from_smiles(
    tmp_path: Path, make_labelled: MakeLabelled, tiny_start: StartingPoint
) -> None:
    smiles = all_smiles()
    values = descriptors(smiles)
    labels = values[:, DESCRIPTOR_NAMES.index("MolWt")]
    molecules = make_labelled(smiles, labels)
    result = train(molecules, tiny_start, dataclasses.replace(SETTINGS, epochs=3))
    assert result.trained.num_descriptors == len(DESCRIPTOR_NAMES)
    rows = np.arange(0, 96, 7)
    expected = predict_mean(result.model, result.trained, molecules, rows, 8, CPU)
    assert expected.std() > 1.0
    uri = str(tmp_path)
    save_property_model(result.model, result.trained, uri)
    asked = [molecules.smiles[row] for row in rows]
    table = mb.PropertyPredictor.from_pretrained(uri, conformers=0).predict(asked)
    np.testing.assert_allclose(
        table["prediction:y0"].to_numpy(), expected[:, 0], rtol=1e-4, atol=1e-3
    )
    embedder = mb.MoleculeEncoder.from_pretrained(uri).embedder
    part = embedder.part(_featurize(asked, 0, embedder, 200).molecules)
    np.testing.assert_allclose(
        part["prediction:y0"].to_numpy(), expected[:, 0], rtol=1e-4, atol=1e-3
    )


def test_the_file_says_what_a_model_reads_and_has_the_older_version_if_it_reads_nothing(
    tmp_path: Path, molecules: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    for reads, version in ((False, 2), (True, 3)):
        settings = dataclasses.replace(SETTINGS, epochs=1, descriptors=reads)
        result = train(molecules, tiny_start, settings)
        folder = tmp_path / str(reads)
        save_property_model(result.model, result.trained, str(folder))
        document = json.loads((folder / "property.json").read_text())
        assert document["format_version"] == version
        back = load_property_model(str(folder)).trained.descriptors
        assert (back is not None) == reads
        if back is not None:
            assert back.names == ("a", "b", "c", "d", "e")
            table = made_up(7)
            assert result.trained.descriptors is not None
            np.testing.assert_array_equal(back.of(table), result.trained.descriptors.of(table))


def test_descriptors_are_found_by_name_and_a_missing_one_is_named() -> None:
    table = made_up(20)
    inputs = DescriptorInputs.fit(table)
    order = [4, 0, 2, 1, 3]
    shuffled = DescriptorTable(
        (*(table.names[index] for index in order), "new"),
        np.column_stack([table.values[:, order], np.zeros(20)]),
    )
    np.testing.assert_array_equal(inputs.of(shuffled), inputs.of(table))
    with pytest.raises(CheckpointError, match=r"descriptors \['e'\], which this RDKit"):
        inputs.of(DescriptorTable(table.names[:4], table.values[:, :4]))


def test_descriptors_are_computed_beforehand_if_a_model_may_read_them() -> None:
    task = TaskConfig(name="esol", source="esol.csv")
    plain, reading = FinetuneSettings(), FinetuneSettings(descriptors=True)
    assert not may_read_descriptors(FinetuneConfig(task=task, out="o", finetune=plain))
    assert may_read_descriptors(FinetuneConfig(task=task, out="o", finetune=reading))
    for choices, expected in (
        ({}, False),
        ({"descriptors": (True, False)}, True),
        ({"descriptors": (False,)}, False),
    ):
        search = SearchSpace(choices=choices)
        assert may_read_descriptors(SweepConfig(task=task, out="o", search=search)) == expected
