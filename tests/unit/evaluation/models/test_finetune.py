"""One fine-tuning run: masking, standardisation, learning, choice of the epoch, determinism."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.sources.classes import Alternatives
from moleblend_ray.errors import DataError, TrainingError
from moleblend_ray.evaluation.models import finetune
from moleblend_ray.evaluation.models.finetune import (
    ChoiceRows,
    EpochReport,
    FinetuneResult,
    StartingPoint,
    build_pretrained,
    descriptors_of,
    finetune_once,
    predict,
    refit_once,
)
from moleblend_ray.evaluation.models.linear_model import LinearModel, fit_linear
from moleblend_ray.evaluation.models.losses import masked_loss
from moleblend_ray.evaluation.models.property_model import (
    Standardisation,
    load_property_model,
    require_learnable,
    save_property_model,
)
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Metric, Task, TaskKind, resolve_task

from ..conftest import MakeLabelled, all_smiles

CPU = torch.device("cpu")
ATOMS = resolve_task("atoms", columns=("y0",), kind=TaskKind.REGRESSION, metric=Metric.RMSE)
NITROGEN = resolve_task("nitrogen", columns=("y0", "y1"), kind=TaskKind.CLASSIFICATION)
SETTINGS = FinetuneSettings(
    learning_rate=2e-3, batch_size=16, epochs=25, patience=25, head_dropout=0.0
)


@pytest.fixture
def sized(make_labelled: MakeLabelled) -> LabelledMolecules:
    """Molecules labelled with their number of atoms, in a unit that makes the numbers large."""
    smiles = all_smiles()[::2]
    molecules = make_labelled(smiles, np.zeros(len(smiles)))
    labels = 1000.0 + 50.0 * molecules.block.num_atoms.astype(np.float64)
    return make_labelled(smiles, labels)


def run(
    molecules: LabelledMolecules,
    task: Task,
    start: StartingPoint,
    settings: FinetuneSettings = SETTINGS,
    seed: int = 0,
) -> tuple[FinetuneResult, list[EpochReport]]:
    reports: list[EpochReport] = []
    rows = np.arange(len(molecules))
    result = finetune_once(
        molecules,
        rows[rows % 4 != 0],
        rows[rows % 4 == 0],
        task=task,
        start=start,
        settings=settings,
        seed=seed,
        device=CPU,
        report=reports.append,
    )
    return result, reports


def test_training_labels_that_teach_nothing_are_found_before_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels = np.array([[0.0, 1.0, np.nan], [1.0, 1.0, np.nan]])
    columns = ("both", "one", "none")
    require_learnable(TaskKind.CLASSIFICATION, labels, columns)
    assert "2 of 3 columns do not have both classes" in caplog.text
    assert caplog.text.rstrip().endswith(": one, none")
    with pytest.raises(DataError, match="none of the 2 label columns has both classes among the 2"):
        require_learnable(TaskKind.CLASSIFICATION, labels[:, 1:], columns[1:])
    require_learnable(TaskKind.REGRESSION, labels[:, :2], columns[:2])
    assert "1 of 2 columns do not have labels that differ" in caplog.text
    with pytest.raises(DataError, match="label column 'one' does not have labels that differ"):
        require_learnable(TaskKind.REGRESSION, labels[:, 1:2], columns[1:2])
    with pytest.raises(DataError, match=r"\['none'\] have no value"):
        require_learnable(TaskKind.REGRESSION, labels, columns)


@pytest.mark.parametrize("kind", list(TaskKind))
def test_missing_labels_add_nothing_to_the_loss_and_its_gradient(kind: TaskKind) -> None:
    outputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.ones(5, 3)
    targets[1, 2] = targets[4, 0] = torch.nan
    loss = masked_loss(kind, outputs, targets)
    known = ~torch.isnan(targets)
    assert loss.item() == pytest.approx(masked_loss(kind, outputs[known], targets[known]).item())
    loss.backward()
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()
    assert (outputs.grad[~known] == 0).all()
    assert (outputs.grad[known] != 0).all()


def test_labels_are_standardised_on_the_training_part_alone() -> None:
    labels = np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, 5.0]])
    standardisation = Standardisation.fit(TaskKind.REGRESSION, labels, ("a", "b"))
    assert standardisation.mean.tolist() == [2.0, 5.0]
    assert standardisation.std.tolist() == [1.0, 1.0]  # a constant column keeps its scale
    np.testing.assert_allclose(standardisation.restore(standardisation.normalise(labels)), labels)


def test_equal_labels_keep_their_scale_though_their_mean_is_rounded() -> None:
    labels = np.full((3, 1), 0.1)
    assert labels.std() > 0
    assert Standardisation.fit(TaskKind.REGRESSION, labels, ("a",)).std.tolist() == [1.0]


def test_a_column_without_training_labels_is_named() -> None:
    with pytest.raises(DataError, match=r"\['b'\] have no value"):
        Standardisation.fit(TaskKind.REGRESSION, np.array([[1.0, np.nan]]), ("a", "b"))


def memorise(
    molecules: LabelledMolecules, task: Task, start: StartingPoint, epochs: int
) -> FinetuneResult:
    """Train on all molecules and judge on the same ones."""
    rows = np.arange(len(molecules))
    settings = FinetuneSettings(
        learning_rate=1e-2, batch_size=32, epochs=epochs, patience=epochs, head_dropout=0.0
    )
    return finetune_once(
        molecules, rows, rows, task=task, start=start, settings=settings, seed=0, device=CPU
    )


def test_a_small_set_is_learned_from_scratch_in_the_units_of_its_labels(
    sized: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    few = sized.take(np.arange(0, len(sized), 2))
    assert memorise(few, ATOMS, tiny_start, epochs=40).valid_score < 0.5 * few.labels.std()


def test_classes_with_missing_labels_are_learned(
    make_labelled: MakeLabelled, tiny_start: StartingPoint
) -> None:
    smiles = all_smiles()[::4]
    labels = np.array(
        [["n" in text.lower(), "o" in text.lower()] for text in smiles], dtype=np.float64
    )
    labels[::3, 1] = np.nan
    result = memorise(make_labelled(smiles, labels), NITROGEN, tiny_start, epochs=40)
    assert result.valid_score > 0.95


def test_the_kept_weights_are_those_of_the_best_validation_epoch(
    sized: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    settings = FinetuneSettings(learning_rate=2e-2, batch_size=16, epochs=8, patience=8)
    result, reports = run(sized, ATOMS, tiny_start, settings)
    scores = [report.valid_score for report in reports]
    assert result.valid_score == min(scores)
    assert reports[-1].best_epoch == 1 + scores.index(min(scores))
    rows = np.arange(0, len(sized), 4)
    outputs = predict(result.model, sized.block, rows, 32, CPU)
    errors = result.trained.readout(outputs) - sized.labels[rows]
    assert np.sqrt((errors**2).mean()) == pytest.approx(result.valid_score)


def test_a_run_stops_when_validation_no_longer_improves(
    sized: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    settings = FinetuneSettings(learning_rate=1e-9, epochs=30, patience=3)
    result, reports = run(sized, ATOMS, tiny_start, settings)
    assert len(reports) < 30
    assert reports[-1].epoch - reports[-1].best_epoch == 3
    assert result.history == tuple(reports)


def test_equal_seeds_give_equal_scores_and_other_seeds_others(
    sized: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    settings = FinetuneSettings(learning_rate=1e-3, batch_size=16, epochs=2)
    first, second, other = (
        [report.valid_score for report in run(sized, ATOMS, tiny_start, settings, seed)[1]]
        for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_micro_batches_do_not_change_the_training(
    sized: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    scores = []
    for size in (16, 5):
        settings = FinetuneSettings(
            learning_rate=1e-3, batch_size=16, epochs=2, micro_batch_size=size, head_dropout=0.0
        )
        scores.append(run(sized, ATOMS, tiny_start, settings)[1][-1].valid_score)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_predictions_do_not_depend_on_the_order_asked_for(
    sized: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    model = run(sized, ATOMS, tiny_start, FinetuneSettings(epochs=1))[0].model
    rows = np.random.default_rng(0).permutation(len(sized))
    forward = predict(model, sized.block, np.arange(len(sized)), 7, CPU)
    np.testing.assert_allclose(predict(model, sized.block, rows, 32, CPU), forward[rows], atol=1e-5)


def test_a_diverging_run_stops_with_an_error_that_names_step_and_remedy(
    sized: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    broken = StartingPoint(model=tiny_start.model, encoder=_poisoned(tiny_start), fingerprint=None)
    with pytest.raises(TrainingError, match=r"step 0: loss nan.*finetune\.learning_rate"):
        run(sized, ATOMS, broken)


@pytest.mark.parametrize(
    ("overflows", "told"),
    [
        ("gradient_norm", r"step 0: loss [\d.]+, gradient norm inf"),
        ("masked_loss", r"step 0: loss inf, gradient norm [\d.]+;"),
    ],
)
def test_a_loss_or_gradient_that_overflows_alone_stops_a_run_as_well(
    sized: LabelledMolecules,
    tiny_start: StartingPoint,
    monkeypatch: pytest.MonkeyPatch,
    overflows: str,
    told: str,
) -> None:
    usual = getattr(finetune, overflows)
    monkeypatch.setattr(
        finetune, overflows, lambda *given, **how: usual(*given, **how) + float("inf")
    )
    with pytest.raises(TrainingError, match=told):
        run(sized, ATOMS, tiny_start)


def test_a_saved_model_comes_back_with_its_weights_units_and_columns(
    tmp_path: Path, sized: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    form = MoleculeForm(explicit_hydrogens=True)
    alternatives = (Alternatives("y", ("y0",), ("no", "yes")),)
    prepared = dataclasses.replace(sized, form=form, alternatives=alternatives)
    result, _ = run(prepared, ATOMS, tiny_start, FinetuneSettings(epochs=1))
    trained = result.trained
    save_property_model(result.model, trained, f"{tmp_path}/model")
    back = load_property_model(f"{tmp_path}/model")
    rows = np.arange(len(sized))
    np.testing.assert_array_equal(
        back.trained.readout(predict(back.model, sized.block, rows, 32, CPU)),
        trained.readout(predict(result.model, sized.block, rows, 32, CPU)),
    )
    assert (back.trained.columns, back.trained.task) == (("y0",), "atoms")
    assert back.trained.molecules == form
    assert back.trained.alternatives == alternatives


@pytest.mark.parametrize(("metric", "epochs", "best"), [(Metric.MCC, 4, 3), (Metric.PR_AUC, 2, 1)])
def test_of_epochs_that_decide_alike_the_one_with_the_best_order_is_chosen(
    sized: LabelledMolecules,
    tiny_start: StartingPoint,
    monkeypatch: pytest.MonkeyPatch,
    metric: Metric,
    epochs: int,
    best: int,
) -> None:
    task = resolve_task("rare", columns=("y0",), kind=TaskKind.CLASSIFICATION, metric=metric)
    orders = iter([0.5, 0.6, 0.7, 0.7, 0.8])

    def scored(asked: Metric, *_: object) -> SimpleNamespace:
        return SimpleNamespace(value=next(orders) if asked is Metric.ROC_AUC else 0.0)

    monkeypatch.setattr(finetune, "score", scored)
    classes = dataclasses.replace(sized, labels=(sized.labels > 7).astype(float))
    result, _ = run(classes, task, tiny_start, FinetuneSettings(epochs=5, patience=1))
    last = result.history[-1]
    # With a patience of 1 it ends one epoch after the best.
    assert (last.epoch, last.best_epoch, last.best_valid_score) == (epochs, best, 0.0)


def _poisoned(start: StartingPoint) -> dict[str, torch.Tensor]:
    state = build_pretrained(start).encoder.state_dict()
    return {name: torch.full_like(value, torch.nan) for name, value in state.items()}


STEADY = FinetuneSettings(epochs=3, learning_rate=3e-3, batch_size=16, head_dropout=0.0)
"""With these, each epoch is better than the one before, judged on molecules of training."""


@pytest.mark.parametrize(
    "settings",
    [
        STEADY,
        dataclasses.replace(STEADY, descriptors=True),
        dataclasses.replace(STEADY, atom_reference=True, head_warmup_epochs=2),
    ],
    ids=["plain", "descriptors", "reference"],
)
def test_a_refit_on_what_a_run_was_trained_on_gives_the_model_that_it_chose(
    sized: LabelledMolecules, tiny_start: StartingPoint, settings: FinetuneSettings
) -> None:
    noise = np.random.default_rng(1).normal(0, 100, sized.labels.shape)
    sized = dataclasses.replace(sized, labels=sized.labels + noise)
    rows = np.arange(len(sized))
    shared: Any = {"task": ATOMS, "start": tiny_start, "seed": 5, "device": CPU}
    result = finetune_once(sized, rows, rows, settings=settings, **shared)
    assert result.history[-1].best_epoch == settings.epochs
    # Of a longer run that was best after so many epochs.
    longer = dataclasses.replace(settings, epochs=20)
    model, trained = refit_once(
        sized,
        epochs=settings.epochs,
        chosen_on=(ChoiceRows(rows, rows),),
        settings=longer,
        **shared,
    )
    for name, value in result.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    np.testing.assert_array_equal(trained.standardisation.mean, result.trained.standardisation.mean)


def test_a_refit_learns_from_all_molecules_with_the_penalty_that_validation_chose(
    sized: LabelledMolecules, tiny_start: StartingPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[tuple[int, float]] = []

    def fit(kind: Any, inputs: Any, labels: Any, penalty: Any, **settings: Any) -> LinearModel:
        fits.append((len(labels), penalty["alpha"]))
        return fit_linear(kind, inputs, labels, penalty, **settings)

    monkeypatch.setattr(finetune, "fit_linear", fit)
    noise = np.random.default_rng(0).normal(0, 100, sized.labels.shape)
    sized = dataclasses.replace(sized, labels=sized.labels + noise)
    rows = np.arange(len(sized))
    parts = [ChoiceRows(rows[rows % 4 != fold], rows[rows % 4 == fold]) for fold in range(2)]
    settings = dataclasses.replace(SETTINGS, descriptors=True)
    shared: Any = {
        "task": ATOMS,
        "start": tiny_start,
        "settings": settings,
        "seed": 0,
        "device": CPU,
    }
    model, trained = refit_once(sized, epochs=1, chosen_on=parts, **shared)
    size, chosen = fits.pop()
    assert size == len(sized)
    # Each penalty was tried on both parts, and the mean decides.
    assert len(fits) == 2 * len({alpha for _, alpha in fits})
    assert {size for size, _ in fits} == {len(part.train) for part in parts}
    labels = sized.labels
    assert trained.standardisation.mean == pytest.approx(labels.mean(axis=0))
    inputs = descriptors_of(trained, sized)
    assert inputs is not None
    normal = trained.standardisation.normalise(labels)
    table = inputs.double().numpy()
    errors = {}
    for alpha in {alpha for _, alpha in fits}:
        linears = [
            fit_linear(ATOMS.kind, table[p.train], normal[p.train], {"alpha": alpha}) for p in parts
        ]
        errors[alpha] = np.mean(
            [
                np.sqrt(np.mean((linear(table[p.valid]) - normal[p.valid]) ** 2))
                for linear, p in zip(linears, parts, strict=True)
            ]
        )
    assert chosen == min(errors, key=lambda alpha: errors[alpha])
    assert model.linear is not None
    expected = fit_linear(ATOMS.kind, table, normal, {"alpha": chosen})
    np.testing.assert_allclose(model.linear.weight.detach().numpy(), expected.weight, rtol=1e-5)
