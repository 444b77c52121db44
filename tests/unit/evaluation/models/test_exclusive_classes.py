"""Of the classes of one column a molecule has one: their probabilities add up to 1, and are trained so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from moleblend_ray.data.sources.classes import Alternatives
from moleblend_ray.errors import CheckpointError
from moleblend_ray.evaluation.models.finetune import (
    FinetuneResult,
    StartingPoint,
    finetune_once,
    predict_mean,
)
from moleblend_ray.evaluation.models.linear_model import fit_linear
from moleblend_ray.evaluation.models.losses import Targets, masked_loss, positive_weights
from moleblend_ray.evaluation.models.property_model import (
    Standardisation,
    TrainedProperty,
    load_property_model,
    save_property_model,
)
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import TaskKind, resolve_task

from ..conftest import MakeLabelled, all_smiles

NAN = float("nan")
CPU = torch.device("cpu")
CLASSES = TaskKind.CLASSIFICATION
PLACES = [2, 3, 0]
"""Of the classes low, mid and high of a column, beside a label of its own in column 1."""
LABELS = ("y=high", "other", "y=low", "y=mid")
ALTERNATIVES = (Alternatives("y", ("y=low", "y=mid", "y=high"), ("low", "mid", "high")),)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(40, 4) logits and labels, and (40,) the class, an index in PLACES."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(40, 4, generator=generator, dtype=torch.float64) * 3
    classes = torch.randint(0, 3, (40,), generator=generator)
    labels = torch.zeros(40, 4, dtype=torch.float64)
    labels[:, PLACES] = F.one_hot(classes, 3).double()
    labels[:, 1] = torch.randint(0, 2, (40,), generator=generator)
    return outputs, labels, classes


def test_the_loss_is_the_cross_entropy_beside_that_of_other_labels(
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    outputs, labels, classes = batch
    labels[:5, PLACES], labels[7, 1] = NAN, NAN
    weights = torch.tensor([0.5, 3.0, 2.0, 0.7], dtype=torch.float64)
    for weight in (None, weights):
        given = outputs.clone().requires_grad_()
        found = masked_loss(CLASSES, given, labels, positive_weight=weight, exclusive=(PLACES,))
        expected_of = outputs.clone().requires_grad_()
        expected = F.cross_entropy(
            expected_of[5:, PLACES],
            classes[5:],
            weight=None if weight is None else weight[PLACES],
            reduction="sum",
        ) + masked_loss(
            CLASSES,
            expected_of[:, 1:2],
            labels[:, 1:2],
            positive_weight=None if weight is None else weight[1:2],
        )
        torch.testing.assert_close(found, expected)
        gradients = [
            torch.autograd.grad(*pair)[0] for pair in ((found, given), (expected, expected_of))
        ]
        torch.testing.assert_close(*gradients)
        assert not gradients[0][:5, PLACES].any()


def test_repeats_that_contradict_each_other_tell_that_it_is_one_of_their_classes() -> None:
    outputs = torch.tensor([[0.3, -1.0, 2.0], [5.0, 1.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[NAN, NAN, 0.0], [0.0, 0.0, 0.0]])
    found = masked_loss(CLASSES, outputs, labels, exclusive=([0, 1, 2],))
    either = outputs[0].softmax(dim=0)[:2].sum()
    torch.testing.assert_close(found, -either.log())
    (gradient,) = torch.autograd.grad(found, outputs)
    assert gradient[0].abs().min() > 0
    assert not gradient[1].any()


def test_a_class_counts_as_one_label() -> None:
    labels = np.array(
        [[0, 1, 1, 0], [NAN] * 4, [1, NAN, 0, 0], [NAN, 0, NAN, NAN], [NAN, 1, 0, NAN]]
    )
    targets = Targets.of(labels, None, (PLACES,))
    assert [targets.num_known(np.array([row])) for row in range(5)] == [2, 0, 1, 1, 2]
    assert Targets.of(labels, None).num_known(np.arange(5)) == 10


def test_balanced_weights_give_each_class_the_same_in_all() -> None:
    classes = np.array([0] * 12 + [1] * 3 + [2] * 6)
    labels = np.zeros((21, 4))
    labels[np.arange(21), np.array(PLACES)[classes]] = 1.0
    labels[:7, 1] = 1.0
    weights = positive_weights(labels, (PLACES,))
    assert weights[1] == pytest.approx(2.0)
    own = weights[PLACES]
    np.testing.assert_allclose(own * [12, 3, 6], 7.0)
    # A class that no molecule has takes nothing from the others.
    labels[classes == 1] = NAN
    np.testing.assert_allclose(positive_weights(labels, (PLACES,))[PLACES], [0.75, 1.0, 1.5])


def trained_property() -> TrainedProperty:
    return TrainedProperty(
        task="mine",
        kind=CLASSES,
        columns=LABELS,
        unit="",
        standardisation=Standardisation(mean=np.zeros(4), std=np.ones(4)),
        alternatives=ALTERNATIVES,
    )


def test_probabilities_of_classes_are_the_softmax_and_those_of_others_their_own() -> None:
    outputs = np.random.default_rng(0).normal(0, 4, (2, 30, 4))
    given = outputs.copy()
    found = trained_property().readout(outputs)
    np.testing.assert_array_equal(outputs, given)
    expected = torch.from_numpy(outputs[..., PLACES]).softmax(dim=-1).numpy()
    np.testing.assert_allclose(found[..., PLACES], expected, rtol=1e-9)
    np.testing.assert_allclose(found[..., 1], 1 / (1 + np.exp(-outputs[..., 1])), rtol=1e-9)
    far = trained_property().readout(np.array([[-900.0, 0.0, 900.0, 0.0]]))
    np.testing.assert_array_equal(far[0, PLACES], [1.0, 0.0, 0.0])


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("present", [3, 2])
def test_the_linear_model_is_the_multinomial_one_of_scikit_learn(
    present: int, balanced: bool
) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(150, 5))
    classes = (inputs[:, :present] + rng.normal(size=(150, present))).argmax(axis=1)
    labels = np.full((150, 4), NAN)
    labels[:, PLACES] = np.eye(3)[classes]
    labels[:, 1] = inputs[:, 4] > 0
    labels[:10, PLACES] = NAN
    found = fit_linear(CLASSES, inputs, labels, {"C": 0.5}, balanced=balanced, exclusive=(PLACES,))
    reference = LogisticRegression(
        C=0.5, tol=1e-10, max_iter=10_000, class_weight="balanced" if balanced else None
    )
    expected = reference.fit(inputs[10:], classes[10:]).predict_proba(inputs)
    logits = torch.from_numpy(found(inputs)[:, PLACES[:present]])
    np.testing.assert_allclose(logits.softmax(dim=1).numpy(), expected, atol=1e-4)
    if present < 3:
        assert not found.weight[PLACES[2]].any()
    alone = fit_linear(CLASSES, inputs, labels[:, 1:2], {"C": 0.5}, balanced=balanced)
    np.testing.assert_array_equal(found.weight[1], alone.weight[0])


@pytest.fixture
def sized(make_labelled: MakeLabelled) -> LabelledMolecules:
    """48 molecules of three classes by their number of atoms, and a label of whether they have nitrogen."""
    smiles = all_smiles()[::2]
    found = make_labelled(smiles, np.zeros((48, 4)))
    heavy = found.block.num_atoms
    classes = np.digitize(heavy, [7, 9])
    labels = np.zeros((48, 4))
    labels[np.arange(48), np.array(PLACES)[classes]] = 1.0
    labels[:, 1] = ["N" in text.upper() for text in smiles]
    return dataclasses.replace(found, labels=labels, columns=LABELS, alternatives=ALTERNATIVES)


def train(
    molecules: LabelledMolecules,
    start: StartingPoint,
    settings: FinetuneSettings,
    *,
    seen: bool = False,
) -> FinetuneResult:
    rows = np.arange(len(molecules))
    is_valid = rows % 4 == 0
    task = resolve_task("mine", columns=LABELS, kind=CLASSES)
    return finetune_once(
        molecules, rows[seen | ~is_valid], rows[seen | is_valid],
        task=task, start=start, settings=settings, seed=0, device=CPU,
    )  # fmt: skip


def test_scores_of_a_part_know_which_labels_are_classes_of_one_column(
    sized: LabelledMolecules,
) -> None:
    rows = np.array([3, 5, 9])
    labels, columns, bounds, exclusive = sized.known(rows)
    np.testing.assert_array_equal(labels, sized.labels[rows])
    assert (columns, bounds, exclusive) == (LABELS, None, (PLACES,))


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_a_new_head_loses_the_logarithm_of_the_number_of_classes(
    sized: LabelledMolecules, tiny_start: StartingPoint, weights: Literal["none", "balanced"]
) -> None:
    settings = FinetuneSettings(
        epochs=1, learning_rate=1e-9, batch_size=16, class_weights=weights, head_dropout=0.0
    )
    no_other = sized.labels.copy()
    no_other[:, 1] = NAN
    # Two labels of which nothing is known but in validation.
    no_other[:2, 1] = [0.0, 1.0]
    no_other[4, 1] = 1.0
    found = train(dataclasses.replace(sized, labels=no_other), tiny_start, settings)
    # 36 classes, and one other label of which both are not in training.
    expected = (36 * np.log(3) + np.log(2)) / 37
    assert found.history[0].train_loss == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("descriptors", [False, True])
def test_classes_are_learnt_stored_and_read_back(
    sized: LabelledMolecules, tiny_start: StartingPoint, tmp_path: Path, descriptors: bool
) -> None:
    settings = FinetuneSettings(
        epochs=30,
        learning_rate=5e-3,
        batch_size=16,
        head_dropout=0.0,
        readout="sum",
        patience=30,
        descriptors=descriptors,
    )
    result = train(sized, tiny_start, settings, seen=True)
    rows = np.arange(48)
    probabilities = predict_mean(result.model, result.trained, sized, rows, 16, CPU)
    np.testing.assert_allclose(probabilities[:, PLACES].sum(axis=1), 1.0, rtol=1e-9)
    right = probabilities[:, PLACES].argmax(axis=1) == sized.labels[:, PLACES].argmax(axis=1)
    assert right.mean() > 0.8
    if descriptors:
        # Weights of a softmax with a penalty add up to 0, those of a model for each class do not.
        assert result.model.linear is not None
        weights = result.model.linear.weight[PLACES].detach().numpy()
        np.testing.assert_allclose(weights.sum(axis=0), 0.0, atol=1e-6)
        assert np.abs(weights).max() > 1e-3

    save_property_model(result.model, result.trained, f"{tmp_path}/model")
    back = load_property_model(f"{tmp_path}/model")
    assert back.trained.alternatives == ALTERNATIVES
    again = predict_mean(back.model, back.trained, sized, rows, 16, CPU)
    np.testing.assert_allclose(again, probabilities, rtol=1e-6)


def test_a_model_of_classes_that_do_not_exclude_each_other_is_refused(
    sized: LabelledMolecules, tiny_start: StartingPoint, tmp_path: Path
) -> None:
    result = train(sized, tiny_start, FinetuneSettings(epochs=1))
    save_property_model(result.model, result.trained, f"{tmp_path}/model")
    path = tmp_path / "model" / "property.json"
    document = json.loads(path.read_text())
    assert document["format_version"] == 4
    old = {"format_version": 2, "alternatives": {"y": list(LABELS)}}
    path.write_text(json.dumps(document | old))
    with pytest.raises(CheckpointError, match=r"do not exclude each other\. Fine-tune it again"):
        load_property_model(f"{tmp_path}/model")
