"""Each setting of fine-tuning does what its name says, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.chemistry.molecule import Molecule
from moleblend_ray.data.dataset.block import MoleculeBlock
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.models import finetune
from moleblend_ray.evaluation.models.atom_reference import element_counts, fit_reference
from moleblend_ray.evaluation.models.finetune import (
    FinetuneResult,
    StartingPoint,
    build_model,
    build_pretrained,
    finetune_once,
    predict,
    predict_mean,
)
from moleblend_ray.evaluation.models.layerwise_training import depth, lr_factors
from moleblend_ray.evaluation.models.losses import masked_loss, positive_weights
from moleblend_ray.evaluation.models.property_model import (
    Standardisation,
    TrainedProperty,
    load_property_model,
    save_property_model,
)
from moleblend_ray.evaluation.molecules.conformer_set import ConformerSet
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.molecules.descriptor_inputs import DescriptorInputs, DescriptorTable
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Metric, Task, TaskKind, resolve_task
from moleblend_ray.model.encoder import Block
from moleblend_ray.model.moleblend import HYDROGEN, PropertyModel
from moleblend_ray.training.config import OptimConfig
from moleblend_ray.training.optim import (
    CutInvariantAdamW,
    build_optimizer,
    gradient_norm,
    set_learning_rate,
)

from ..conftest import MakeLabelled, all_smiles

CPU = torch.device("cpu")
NUMBER = resolve_task("number", columns=("y0",), kind=TaskKind.REGRESSION, metric=Metric.MAE)
CLASS = resolve_task("class", columns=("y0",), kind=TaskKind.CLASSIFICATION)
QUICK = FinetuneSettings(learning_rate=1e-3, batch_size=16, epochs=2, patience=9)


@pytest.fixture
def molecules(make_labelled: MakeLabelled) -> LabelledMolecules:
    """48 molecules labelled with their number of nitrogens."""
    smiles = all_smiles()[::2]
    return make_labelled(smiles, np.array([text.upper().count("N") for text in smiles], float))


@pytest.fixture
def pretrained(tiny_start: StartingPoint) -> StartingPoint:
    torch.manual_seed(7)
    state = build_pretrained(tiny_start).encoder.state_dict()
    return dataclasses.replace(tiny_start, encoder=state)


def train(
    molecules: LabelledMolecules,
    start: StartingPoint,
    settings: FinetuneSettings,
    task: Task = NUMBER,
) -> FinetuneResult:
    rows = np.arange(len(molecules))
    return finetune_once(
        molecules,
        rows[rows % 4 != 0],
        rows[rows % 4 == 0],
        task=task,
        start=start,
        settings=settings,
        seed=0,
        device=CPU,
    )


def changed(model: PropertyModel, start: StartingPoint) -> set[int]:
    """Depths at which a parameter differs from the pretrained one (the head counts as changed)."""
    assert start.encoder is not None
    before = {f"encoder.{name}": value for name, value in start.encoder.items()}
    blocks = model.config.num_layers
    return {
        depth(name, blocks)
        for name, value in model.named_parameters()
        if name not in before or not torch.equal(value.detach(), before[name])
    }


@pytest.mark.parametrize(
    ("frozen", "trained"), [(None, {0, 1, 2, 3}), (0, {1, 2, 3}), (1, {2, 3}), (2, {3})]
)
def test_frozen_blocks_stay_as_they_were_pretrained(
    molecules: LabelledMolecules, pretrained: StartingPoint, frozen: int | None, trained: set[int]
) -> None:
    result = train(molecules, pretrained, dataclasses.replace(QUICK, frozen_blocks=frozen))
    assert changed(result.model, pretrained) == trained


def test_more_blocks_than_there_are_are_errors_that_say_how_many(
    molecules: LabelledMolecules, pretrained: StartingPoint
) -> None:
    settings = dataclasses.replace(QUICK, frozen_blocks=3, fresh_blocks=4)
    expected = r"frozen_blocks: expected at most 2, .* found 3\n.*fresh_blocks: .* found 4"
    with pytest.raises(ConfigError, match=expected):
        train(molecules, pretrained, settings)


@pytest.mark.parametrize(("fresh", "new"), [(0, {3}), (1, {2, 3}), (2, {1, 2, 3})])
def test_fresh_blocks_are_drawn_anew_and_the_others_stay_as_they_were_pretrained(
    pretrained: StartingPoint, fresh: int, new: set[int]
) -> None:
    settings = dataclasses.replace(QUICK, fresh_blocks=fresh)
    model = build_model(pretrained, 1, settings, 0)
    assert changed(model, pretrained) == new
    again, other = (build_model(pretrained, 1, settings, seed) for seed in (0, 1))
    weight, same, another = (
        one.encoder.layers[-1].get_parameter("attention.qkv.weight")
        for one in (model, again, other)
    )
    assert torch.equal(weight, same)
    assert torch.equal(weight, another) == (fresh == 0)


def test_the_head_trains_alone_while_it_warms_up_and_all_does_afterwards(
    molecules: LabelledMolecules, pretrained: StartingPoint
) -> None:
    alone = dataclasses.replace(QUICK, head_warmup_epochs=2)
    assert changed(train(molecules, pretrained, alone).model, pretrained) == {3}
    # The last epoch is the best: a new head on a fixed encoder has only begun to fit.
    longer = dataclasses.replace(alone, epochs=8, learning_rate=1e-2)
    result = train(molecules, pretrained, longer)
    assert result.history[-1].best_epoch > 2
    assert changed(result.model, pretrained) == {0, 1, 2, 3}


def test_the_head_warms_up_for_exactly_the_epochs_asked_for(
    molecules: LabelledMolecules, pretrained: StartingPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "is_better", lambda *_: True)  # the last epoch is the best
    for epochs, expected in ((2, {3}), (3, {0, 1, 2, 3})):
        settings = dataclasses.replace(QUICK, head_warmup_epochs=2, epochs=epochs)
        assert changed(train(molecules, pretrained, settings).model, pretrained) == expected


def test_the_settings_of_the_optimizer_reach_it(
    molecules: LabelledMolecules, pretrained: StartingPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    clipped: list[float] = []
    decays: set[float] = set()

    def build(
        model: nn.Module, config: OptimConfig, lr_factor: Callable[[str], float]
    ) -> CutInvariantAdamW:
        optimizer = build_optimizer(model, config, lr_factor)
        decays.update(group["weight_decay"] for group in optimizer.param_groups)
        step = optimizer.step

        def noted_step() -> None:
            rates.append(optimizer.param_groups[0]["lr"])
            clipped.append(float(gradient_norm(list(model.parameters()))))
            step()

        monkeypatch.setattr(optimizer, "step", noted_step)
        return optimizer

    monkeypatch.setattr(finetune, "build_optimizer", build)
    settings = FinetuneSettings(
        learning_rate=1e-2, batch_size=6, epochs=2, warmup_fraction=0.5, weight_decay=0.03,
        clip_norm=1e-3,
    )  # fmt: skip
    train(molecules, pretrained, settings)
    # 36 training molecules make 12 steps, of which 6 warm up to the peak and 6 fall along a cosine.
    cosine = [0.5 * (1 + np.cos(np.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx(
        [1e-2 * step / 6 for step in range(1, 7)] + [1e-2 * c for c in cosine]
    )
    assert clipped == pytest.approx([1e-3] * 12, rel=1e-3)
    assert decays == {0.03, 0.0}


def test_dropout_acts_in_every_epoch(
    molecules: LabelledMolecules, pretrained: StartingPoint
) -> None:
    settings = dataclasses.replace(QUICK, learning_rate=1e-9, head_dropout=0.5, epochs=3)
    losses = [report.train_loss for report in train(molecules, pretrained, settings).history]
    # The weights hardly move, so other masks make the difference.
    assert abs(losses[1] - losses[2]) > 1e-6


def test_labels_of_the_validation_part_change_nothing_that_is_fitted(
    molecules: LabelledMolecules, pretrained: StartingPoint
) -> None:
    rows = np.arange(len(molecules))
    labels = molecules.labels.copy()
    labels[rows % 4 == 0] += 100.0
    for reference in (False, True):
        settings = dataclasses.replace(QUICK, epochs=1, atom_reference=reference)
        one, other = (
            train(data, pretrained, settings)
            for data in (molecules, dataclasses.replace(molecules, labels=labels))
        )
        assert one.trained.standardisation.mean == other.trained.standardisation.mean
        assert one.trained.standardisation.std == other.trained.standardisation.std
        for name, value in one.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[name]), name


def test_batches_without_any_label_update_nothing(
    molecules: LabelledMolecules, pretrained: StartingPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[float] = []
    monkeypatch.setattr(
        finetune, "clip_gradients", lambda parameters, norm, limit: updates.append(float(norm))
    )
    labels = molecules.labels.copy()
    labels[1::2] = np.nan  # 24 of the 36 training molecules
    settings = dataclasses.replace(QUICK, batch_size=1, epochs=1)
    train(dataclasses.replace(molecules, labels=labels), pretrained, settings)
    assert len(updates) == 12
    assert min(updates) > 0


def test_learning_rates_fall_from_block_to_block(pretrained: StartingPoint) -> None:
    settings = FinetuneSettings(learning_rate=1e-4, head_learning_rate=1e-3, layer_decay=0.5)
    model = build_model(pretrained, 1, settings, 0)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1), lr_factors(model, settings))
    set_learning_rate(optimizer, 1e-4)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates: dict[int, set[float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates.setdefault(depth(names[parameter], 2), set()).add(round(group["lr"], 12))
    assert rates == {0: {1.25e-5}, 1: {2.5e-5}, 2: {5e-5}, 3: {1e-3}}

    def decays(optimizer: CutInvariantAdamW) -> dict[str, float]:
        return {
            names[parameter]: group["weight_decay"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    assert decays(optimizer) == decays(build_optimizer(model, OptimConfig(weight_decay=0.1)))
    assert decays(optimizer)["encoder.layers.0.attention.qkv.weight"] == 0.1


def test_equal_rates_keep_the_two_usual_groups(pretrained: StartingPoint) -> None:
    model = build_model(pretrained, 1, QUICK, 0)
    assert lr_factors(model, QUICK) is None
    assert len(build_optimizer(model, OptimConfig()).param_groups) == 2


def test_a_lower_rate_below_moves_the_lower_blocks_less(
    molecules: LabelledMolecules, pretrained: StartingPoint
) -> None:
    def moved(layer_decay: float) -> float:
        result = train(molecules, pretrained, dataclasses.replace(QUICK, layer_decay=layer_decay))
        assert pretrained.encoder is not None
        before = pretrained.encoder["layers.0.ffn_in.weight"]
        after = result.model.encoder.get_parameter("layers.0.ffn_in.weight").detach()
        return float((after - before).norm())

    assert moved(0.1) < 0.1 * moved(1.0)


def test_dropout_of_fine_tuning_replaces_that_of_pretraining(pretrained: StartingPoint) -> None:
    settings = FinetuneSettings(attention_dropout=0.3, activation_dropout=0.2, drop_path=0.1)
    model = build_model(pretrained, 1, settings, 0)
    layer = model.encoder.layers[0]
    assert isinstance(layer, Block)
    assert layer.attention.dropout == 0.3
    assert layer.activation_dropout == 0.2
    assert model.encoder.drop_path == 0.1
    usual = build_model(pretrained, 1, FinetuneSettings(), 0)
    assert usual.config == pretrained.model


def test_a_positive_of_weight_two_counts_as_two(make_labelled: MakeLabelled) -> None:
    outputs = torch.tensor([[0.3], [-1.0], [0.7]])
    targets = torch.tensor([[1.0], [0.0], [0.0]])
    weighted = masked_loss(
        TaskKind.CLASSIFICATION, outputs, targets, positive_weight=torch.tensor([2.0])
    )
    twice = masked_loss(
        TaskKind.CLASSIFICATION,
        torch.cat([outputs, outputs[:1]]),
        torch.cat([targets, targets[:1]]),
    )
    torch.testing.assert_close(weighted, twice)


def test_balanced_weights_are_negatives_for_each_positive() -> None:
    nan = np.nan
    labels = np.array([[1, 0, nan, 1], [0, 0, nan, 1], [0, 0, nan, nan], [0, 1, nan, 1.0]])
    assert positive_weights(labels).tolist() == [3, 3, 1, 1]


def test_balanced_classes_weigh_alike_in_training(
    make_labelled: MakeLabelled, pretrained: StartingPoint
) -> None:
    smiles = all_smiles()[::2]
    labels = np.zeros(len(smiles))
    labels[:12] = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]  # one of the two is a validation molecule
    rare = make_labelled(smiles, labels)
    losses = []
    for weights in ("none", "balanced"):
        settings = dataclasses.replace(QUICK, class_weights=weights, epochs=1, learning_rate=1e-9)
        losses.append(train(rare, pretrained, settings, CLASS).history[0].train_loss)
    # A new head answers 0: each label loses log 2.
    assert losses[0] == pytest.approx(np.log(2), rel=0.01)
    assert losses[1] == pytest.approx(np.log(2) * 35 * 2 / 36, rel=0.01)


@pytest.mark.parametrize(
    ("loss", "expected"), [("mse", 9.0 + 0.25), ("l1", 3.0 + 0.5), ("huber", 2.5 + 0.125)]
)
def test_regression_losses_are_what_their_names_say(loss: str, expected: float) -> None:
    outputs, targets = (
        torch.tensor([[3.0], [0.5], [9.0]]),
        torch.tensor([[0.0], [0.0], [torch.nan]]),
    )
    found = masked_loss(TaskKind.REGRESSION, outputs, targets, regression_loss=loss)
    assert found.item() == pytest.approx(expected)


def test_an_atom_reference_is_the_fit_of_scikit_learn(molecules: LabelledMolecules) -> None:
    from sklearn.linear_model import LinearRegression

    counts = element_counts(molecules.block)
    rng = np.random.default_rng(0)
    labels = np.stack([counts @ rng.normal(size=119), rng.normal(size=len(counts))], axis=1)
    labels[::5, 0] = np.nan
    reference = fit_reference(counts, labels)
    for column in range(2):
        known = ~np.isnan(labels[:, column])
        line = LinearRegression().fit(counts[known], labels[known, column])
        found = counts @ reference[:, column]
        np.testing.assert_allclose(
            found - found.mean(), (line.predict(counts) - line.predict(counts).mean()), atol=1e-8
        )


def test_an_element_without_labels_of_a_column_adds_nothing_there(
    make_labelled: MakeLabelled,
) -> None:
    """By an exact 0 it is known later that predictions of this column lack the element."""
    smiles = [*all_smiles(), "CCCBr", "BrCCCCO"]
    counts = element_counts(make_labelled(smiles, np.zeros(len(smiles))).block)
    bromine, sulfur = 34, 15
    values = counts @ np.arange(1.0, 120.0)
    sparse = np.where(counts[:, bromine] > 0, np.nan, values)
    reference = fit_reference(counts, np.stack([values, sparse, np.full(len(values), 5.3)], axis=1))
    assert (reference[bromine] != 0).tolist() == [True, False, False]
    assert (reference[sulfur] != 0).tolist() == [True, True, False]
    # Labels that are all equal are the constant, and leave no rounding.
    np.testing.assert_array_equal(reference[:, 2], 0.0)


def test_elements_are_counted_with_their_hydrogens(make_labelled: MakeLabelled) -> None:
    counts = element_counts(make_labelled(["CCO", "c1ccncc1"], np.zeros(2)).block)
    assert counts[0, [HYDROGEN, 5, 6, 7]].tolist() == [6, 2, 0, 1]
    assert counts[1, [HYDROGEN, 5, 6, 7]].tolist() == [5, 5, 1, 0]


def test_what_atoms_add_up_to_needs_no_training_with_an_atom_reference(
    tmp_path: Path, make_labelled: MakeLabelled, pretrained: StartingPoint
) -> None:
    smiles = all_smiles()
    counts = element_counts(make_labelled(smiles, np.zeros(len(smiles))).block)
    energies = 1e4 - counts @ np.arange(1.0, 120.0) ** 2 + np.cos(np.arange(len(smiles)))
    molecules = make_labelled(smiles, energies)
    settings = dataclasses.replace(QUICK, learning_rate=1e-9, epochs=1)
    plain = train(molecules, pretrained, settings).valid_score
    result = train(molecules, pretrained, dataclasses.replace(settings, atom_reference=True))
    assert plain > 30
    assert result.valid_score < 1.5

    trained = result.trained
    save_property_model(result.model, trained, str(tmp_path))
    back = load_property_model(str(tmp_path))
    rows = np.arange(len(molecules))
    values = back.trained.readout(predict(back.model, molecules.block, rows, 32, CPU))
    assert np.abs(values[::4] - molecules.labels[::4]).mean() == pytest.approx(result.valid_score)


def test_a_column_that_elements_explain_does_not_drown_the_others(
    make_labelled: MakeLabelled, pretrained: StartingPoint
) -> None:
    """Three labels are fitted by elements up to rounding, which is no scale of what is left to learn."""
    smiles = all_smiles()
    labels = np.full((len(smiles), 2), np.nan)
    labels[:, 0] = [text.upper().count("N") for text in smiles]
    labels[1:4, 1] = 310.0, 275.0, 401.0
    labels[::4, 1] = 300.0
    task = resolve_task(
        "numbers", columns=("y0", "y1"), kind=TaskKind.REGRESSION, metric=Metric.MAE
    )
    settings = dataclasses.replace(QUICK, epochs=1, atom_reference=True)
    result = train(make_labelled(smiles, labels), pretrained, settings, task)
    assert result.history[0].train_loss < 2.0
    assert 1e-5 < result.trained.standardisation.std[1] < 1e-2


def test_classes_have_no_atom_reference(
    molecules: LabelledMolecules, pretrained: StartingPoint
) -> None:
    classes = dataclasses.replace(molecules, labels=(molecules.labels > 0).astype(float))
    with pytest.raises(ConfigError, match="atom_reference"):
        train(classes, pretrained, dataclasses.replace(QUICK, atom_reference=True), CLASS)


def test_bfloat16_trains_nearly_as_float32_and_is_judged_in_float32(
    molecules: LabelledMolecules, pretrained: StartingPoint
) -> None:
    settings = dataclasses.replace(QUICK, head_dropout=0.0, epochs=4)
    full = train(molecules, pretrained, settings)
    half = train(molecules, pretrained, dataclasses.replace(settings, precision="bf16"))
    assert half.history[0].train_loss != full.history[0].train_loss
    assert half.history[0].train_loss == pytest.approx(full.history[0].train_loss, rel=0.03)
    rows = np.arange(0, len(molecules), 4)
    outputs = predict(half.model, molecules.block, rows, 32, CPU)
    errors = half.trained.readout(outputs) - molecules.labels[rows]
    assert np.abs(errors).mean() == pytest.approx(half.valid_score, rel=1e-6)


def test_a_saved_model_remembers_what_it_sees_and_reads(
    tmp_path: Path, molecules: LabelledMolecules, pretrained: StartingPoint
) -> None:
    settings = dataclasses.replace(QUICK, relations="2d", readout="token+mean", epochs=1)
    result = train(molecules, pretrained, settings)
    trained = result.trained
    save_property_model(result.model, trained, str(tmp_path))
    back = load_property_model(str(tmp_path)).model
    assert back.readout == result.model.readout
    assert (back.readout.relations, back.readout.readout) == ("2d", "token+mean")


def test_models_of_the_first_format_are_read(
    tmp_path: Path, molecules: LabelledMolecules, pretrained: StartingPoint
) -> None:
    result = train(molecules, pretrained, dataclasses.replace(QUICK, epochs=1))
    del result.model.reference
    result.model.register_buffer("reference", None)
    trained = result.trained
    save_property_model(result.model, trained, str(tmp_path))
    path = tmp_path / "property.json"
    document = json.loads(path.read_text())
    del document["readout"]
    path.write_text(json.dumps({**document, "format_version": 1, "head_dropout": 0.25}))
    back = load_property_model(str(tmp_path)).model
    assert back.readout.dropout == 0.25
    assert not back.reference.any()


@pytest.fixture
def flexible(make_labelled: MakeLabelled) -> LabelledMolecules:
    """Eight molecules with up to three conformers each; the first has none and stays flat."""
    from moleblend_ray.chemistry.molecule import molecule_from_smiles

    smiles = [f"{'C' * (length + 2)}OCCN" for length in range(8)]
    molecules = make_labelled(smiles, np.arange(8.0))
    featurize = FeaturizeConfig(conformers=ConformerConfig(generate=True, count=3))
    counts = np.array([1, 2, 3, 1, 3, 2, 3, 3])
    positions = np.zeros((3, len(molecules.block.positions), 3), np.float32)
    mask = np.zeros(positions.shape[:2], bool)
    start = 0
    for text, count in zip(smiles, counts, strict=True):
        molecule = molecule_from_smiles(text, featurize)
        assert isinstance(molecule, Molecule)
        end = start + molecule.num_atoms
        if start > 0:
            for number in range(3):
                positions[number, start:end] = molecule.positions[number % count]
                mask[number, start:end] = True
        start = end
    return dataclasses.replace(
        molecules,
        block=dataclasses.replace(molecules.block, positions=positions[0], position_mask=mask[0]),
        conformers=ConformerSet(positions=positions, position_mask=mask, counts=counts),
    )


@pytest.mark.parametrize("task", [NUMBER, CLASS])
def test_predictions_are_the_mean_value_or_probability_over_the_conformers_that_a_molecule_has(
    flexible: LabelledMolecules, pretrained: StartingPoint, task: Task
) -> None:
    scale = Standardisation(mean=np.array([3.0]), std=np.array([2.0]))
    trained = TrainedProperty.of(
        task, flexible.columns, scale, conformers=3, molecules=flexible.form
    )
    model = build_model(pretrained, 1, QUICK, 0).eval()
    # At their initial size the coordinates would hardly show in the outputs.
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    rows = np.array([6, 0, 1, 2])
    found = predict_mean(model, trained, flexible, rows, 3, CPU)
    assert flexible.conformers is not None
    for row, value in zip(rows, found, strict=True):
        singles = [
            predict(
                model,
                dataclasses.replace(
                    flexible.posed(np.array([row]), np.array([number])), molecule_ids=np.array([0])
                ),
                np.array([0]),
                8,
                CPU,
            )[0]
            for number in range(flexible.conformers.counts[row])
        ]
        expected = np.mean([trained.readout(single) for single in singles], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    first = trained.readout(predict(model, flexible.block, rows, 3, CPU))
    assert abs(found[0] - first[0]) > 1e-5


def test_each_molecule_keeps_its_descriptors_whatever_its_conformers(
    flexible: LabelledMolecules, pretrained: StartingPoint
) -> None:
    values = np.random.default_rng(2).normal(0, 1, (len(flexible), 3))
    table = DescriptorTable(("a", "b", "c"), values)
    described = dataclasses.replace(flexible, descriptors=table)
    inputs = DescriptorInputs.fit(table)
    scale = Standardisation(mean=np.zeros(1), std=np.ones(1))
    trained = TrainedProperty.of(
        NUMBER,
        flexible.columns,
        scale,
        conformers=3,
        molecules=flexible.form,
        descriptors=inputs,
    )
    model = build_model(pretrained, 1, QUICK, 0, num_descriptors=3).eval()
    rows = np.array([6, 0, 1, 2])
    encoder = predict_mean(model, trained, described, rows, 3, CPU)
    model.set_linear(torch.ones(1, 3), torch.zeros(1), torch.full((1,), 0.25))
    found = predict_mean(model, trained, described, rows, 3, CPU)
    linear = inputs.of(table).sum(1, keepdims=True)[rows]
    np.testing.assert_allclose(found, 0.75 * encoder + 0.25 * linear, atol=1e-5)


def test_taking_molecules_takes_their_conformers(flexible: LabelledMolecules) -> None:
    rows = np.array([5, 2])
    taken = flexible.take(rows)
    for number in range(2):
        numbers = np.array([number, number])
        np.testing.assert_array_equal(
            taken.posed(np.array([0, 1]), numbers).positions,
            flexible.posed(rows, numbers).positions,
        )


def test_training_draws_conformers_anew_each_epoch_by_the_seed(
    flexible: LabelledMolecules, pretrained: StartingPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[tuple[int, int]]] = []
    posed = LabelledMolecules.posed

    def record(
        self: LabelledMolecules, indices: np.ndarray, numbers: np.ndarray | None = None
    ) -> MoleculeBlock:
        drawn[-1] += zip(
            indices.tolist(), [] if numbers is None else numbers.tolist(), strict=False
        )
        return posed(self, indices, numbers)

    monkeypatch.setattr(LabelledMolecules, "posed", record)
    monkeypatch.setattr(finetune, "predict_mean", lambda *_: np.zeros((2, 1)))
    for _ in range(2):
        drawn.append([])
        train(flexible, pretrained, dataclasses.replace(QUICK, batch_size=4, epochs=12))
    assert drawn[0] == drawn[1]
    numbers = {row: {number for other, number in drawn[0] if other == row} for row in range(8)}
    assert numbers == {
        0: set(), 4: set(),  # validation molecules
        1: {0, 1}, 2: {0, 1, 2}, 3: {0}, 5: {0, 1}, 6: {0, 1, 2}, 7: {0, 1, 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"layer_decay": 1.5}, "layer_decay"),
        ({"frozen_blocks": -1}, "frozen_blocks"),
        ({"fresh_blocks": -1}, "fresh_blocks"),
        ({"head_warmup_epochs": -1}, "head_warmup_epochs"),
        ({"head_learning_rate": 0.0}, "head_learning_rate"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        FinetuneSettings(**change)
