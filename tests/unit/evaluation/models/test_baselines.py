"""Baselines learn, from labels that are known and nothing else, and are chosen without the test part."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from moleblend_ray.chemistry.descriptors import descriptors
from moleblend_ray.chemistry.fingerprints import ecfp
from moleblend_ray.data.dataset.descriptors import DescriptorScaling
from moleblend_ray.evaluation.models import baselines
from moleblend_ray.evaluation.models.baselines import (
    FULL_GRID_LABELS,
    MAX_BOOSTING_LABELS,
    MAX_FOREST_LABELS,
    BaselineData,
    BaselineKind,
    FeatureKind,
    Settings,
    candidate_groups,
    predict_group,
    validation_scores,
)
from moleblend_ray.evaluation.results.baseline_runs import (
    fit_seed,
    fitted_seed,
    tried_settings,
    try_settings,
)
from moleblend_ray.evaluation.scoring.scores import score
from moleblend_ray.evaluation.scoring.stored_predictions import read_predictions
from moleblend_ray.evaluation.tasks import Metric, TaskKind, resolve_task

from ..conftest import all_smiles

KINDS = [kind for kind in BaselineKind if kind is not BaselineKind.SCRATCH]
TREES = [BaselineKind.FOREST, BaselineKind.BOOSTING]
SMILES = tuple(all_smiles())
FEATURES: dict[FeatureKind, np.ndarray] = {
    FeatureKind.FINGERPRINTS: ecfp(SMILES),
    FeatureKind.DESCRIPTORS: descriptors(SMILES),
}
ROWS = np.arange(len(SMILES))


def labels_of(kind: TaskKind) -> np.ndarray:
    """Two columns: of atoms (their number), of aromaticity; classes and numbers."""
    size = np.array([float(sum(c.isalpha() for c in text)) for text in SMILES])
    aromatic = np.array([float("c1" in text) for text in SMILES])
    if kind is TaskKind.REGRESSION:
        return np.stack([100.0 * size, size + 5.0 * aromatic], axis=1)
    return np.stack([(size > 7).astype(float), aromatic], axis=1)


def data_for(
    kind: BaselineKind, task_kind: TaskKind, labels: np.ndarray | None = None
) -> BaselineData:
    labels = labels_of(task_kind) if labels is None else labels
    names = tuple(f"y{column}" for column in range(labels.shape[1]))
    return BaselineData(
        task=resolve_task("own", columns=names, kind=task_kind),
        mol_ids=tuple(map(str, ROWS)),
        smiles=SMILES,
        features=FEATURES[kind.features],
        labels=labels,
        columns=names,
        train=ROWS[ROWS % 4 < 2],
        valid=ROWS[ROWS % 4 == 2],
        test=ROWS[ROWS % 4 == 3],
    )


def groups_for(data: BaselineData, kind: BaselineKind) -> list[list[Settings]]:
    return candidate_groups(
        kind, data.task.kind, data.labels[data.train], num_trees=20, num_rounds=24
    )


def one_of(data: BaselineData, kind: BaselineKind) -> Settings:
    """The settings in the middle of a grid."""
    group = groups_for(data, kind)[0]
    return group[len(group) // 2]


def predict(
    data: BaselineData, kind: BaselineKind, *, seed: int = 0, jobs: int = 1, rows: object = None
) -> np.ndarray:
    asked = ROWS if rows is None else np.asarray(rows)
    (found,) = predict_group(data, kind, [one_of(data, kind)], asked, seed, jobs)
    return found


@pytest.mark.parametrize("task_kind", list(TaskKind))
@pytest.mark.parametrize("kind", KINDS)
def test_every_baseline_learns_what_the_molecules_show(
    kind: BaselineKind, task_kind: TaskKind
) -> None:
    data = data_for(kind, task_kind)
    scores = [
        value
        for group in groups_for(data, kind)
        for value in validation_scores(data, kind, group, 0, 1)
    ]
    if task_kind is TaskKind.CLASSIFICATION:
        assert max(scores) > 0.9
    else:
        # The metric is the mean over columns, as is what a constant would have.
        assert min(scores) < 0.5 * data.labels[data.valid].std(axis=0).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_of_classes_are_probabilities(kind: BaselineKind) -> None:
    data = data_for(kind, TaskKind.CLASSIFICATION)
    for group in groups_for(data, kind):
        for found in predict_group(data, kind, group, ROWS, 0, 1):
            assert found.min() >= 0.0
            assert found.max() <= 1.0
            # As often in the mean as in what was learnt.
            shares = data.labels[data.train].mean(axis=0)
            np.testing.assert_allclose(found[data.train].mean(axis=0), shares, atol=0.1)
            assert score(Metric.BALANCED_ACCURACY, found, *data.known(ROWS)).value > 0.6


def test_settings_are_judged_by_the_most_probable_of_several_classes() -> None:
    kind = BaselineKind.DESCRIPTORS
    size = np.array([float(sum(c.isalpha() for c in text)) for text in SMILES])
    labels = np.eye(3)[np.digitize(size, [7, 9])]
    data = data_for(kind, TaskKind.CLASSIFICATION, labels)
    task = dataclasses.replace(data.task, metric=Metric.BALANCED_ACCURACY)
    data = dataclasses.replace(data, task=task, exclusive=([0, 1, 2],))
    (group,) = groups_for(data, kind)
    expected = []
    for found in predict_group(data, kind, group, data.valid, 0, 1):
        right = found.argmax(axis=1) == labels[data.valid].argmax(axis=1)
        expected.append(np.mean([right[of_class == 1].mean() for of_class in labels[data.valid].T]))
    assert validation_scores(data, kind, group, 0, 1) == pytest.approx(expected)


@pytest.mark.shared_data
@pytest.mark.parametrize("kind", KINDS)
def test_solubility_is_predicted_better_than_by_the_mean(
    kind: BaselineKind, shared_data: Path
) -> None:
    import pandas as pd

    table = pd.read_csv(shared_data / "moleculenet" / "esol.csv.gz").sample(240, random_state=0)
    task = resolve_task("esol")
    smiles = table["smiles"].tolist()
    features = (ecfp if kind.features is FeatureKind.FINGERPRINTS else descriptors)(smiles)
    rows = np.arange(len(smiles))
    data = BaselineData(
        task=task,
        mol_ids=tuple(map(str, rows)),
        smiles=tuple(smiles),
        features=features,
        labels=table[list(task.columns)].to_numpy(),
        columns=task.columns,
        train=rows[:180],
        valid=rows[180:],
        test=rows[:0],
    )
    scores = validation_scores(data, kind, groups_for(data, kind)[0], 0, 1)
    least = 0.5 if kind is BaselineKind.DESCRIPTORS else 0.85
    assert min(scores) < least * data.labels.std()


@pytest.mark.parametrize("kind", TREES)
def test_a_column_is_fitted_to_its_known_labels_alone(kind: BaselineKind) -> None:
    labels = labels_of(TaskKind.CLASSIFICATION)
    labels[::5, 1] = np.nan
    data = data_for(kind, TaskKind.CLASSIFICATION, labels)
    known = dataclasses.replace(data, train=data.train[~np.isnan(labels[data.train, 1])])
    np.testing.assert_array_equal(predict(data, kind)[:, 1], predict(known, kind)[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_teach_nothing_score_as_chance(kind: BaselineKind) -> None:
    data = data_for(kind, TaskKind.CLASSIFICATION)
    labels = np.concatenate([data.labels, data.labels, data.labels[:, :1]], axis=1)
    labels[data.train, 2], labels[data.train, 3], labels[data.train, 4] = 1.0, np.nan, 0.0
    data = dataclasses.replace(data, labels=labels, columns=("a", "b", "ones", "none", "zeros"))
    predictions = predict(data, kind)
    assert np.unique(predictions[:, 2:], axis=0).tolist() == [[1.0, 0.0, 0.0]]
    np.testing.assert_array_equal(predictions[:, :2], predict(data_for(kind, data.task.kind), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_predictions_and_other_seeds_others_where_anything_is_drawn(
    kind: BaselineKind,
) -> None:
    data = data_for(kind, TaskKind.REGRESSION)
    first = predict(data, kind, seed=1)
    np.testing.assert_array_equal(first, predict(data, kind, seed=1))
    assert np.array_equal(first, predict(data, kind, seed=2)) != kind.is_random


def test_threads_change_nothing_but_rounding() -> None:
    data = data_for(BaselineKind.FOREST, TaskKind.REGRESSION)
    one, two = (predict(data, BaselineKind.FOREST, jobs=jobs) for jobs in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_molecules_nor_labels_of_the_test_part_change_a_choice_or_another_prediction(
    kind: BaselineKind,
) -> None:
    data = data_for(kind, TaskKind.REGRESSION)
    labels, features = data.labels.copy(), data.features.copy()
    labels[data.test] = labels[data.test][::-1] * -3.0
    features[data.test] = 0 if kind in TREES else np.inf
    other = dataclasses.replace(data, labels=labels, features=features)
    for group in groups_for(data, kind):
        assert validation_scores(other.without_test(), kind, group, 0, 1) == validation_scores(
            data.without_test(), kind, group, 0, 1
        )
    seen = np.concatenate([data.train, data.valid])
    np.testing.assert_array_equal(predict(other, kind, rows=seen), predict(data, kind, rows=seen))


def test_what_choosing_sees_holds_no_test_molecule() -> None:
    data = data_for(BaselineKind.FOREST, TaskKind.REGRESSION)
    seen = data.without_test()
    rows = np.concatenate([data.train, data.valid])
    np.testing.assert_array_equal(seen.features, data.features[rows])
    np.testing.assert_array_equal(seen.labels[seen.valid], data.labels[data.valid])
    assert len(seen.test) == 0


def test_forests_on_sparse_bits_are_those_on_dense_ones() -> None:
    data = data_for(BaselineKind.FOREST, TaskKind.CLASSIFICATION)
    found = predict(data, BaselineKind.FOREST, seed=5)
    forest = RandomForestClassifier(**one_of(data, BaselineKind.FOREST), random_state=5)
    forest.fit(data.features[data.train], data.labels[data.train, 0].astype(int))
    np.testing.assert_allclose(found[:, 0], forest.predict_proba(data.features)[:, 1])


def test_boosting_without_useless_bits_and_bins_is_plain_boosting_round_by_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baselines, "BOOSTING_FEATURES", 1.0)
    data = data_for(BaselineKind.BOOSTING, TaskKind.REGRESSION)
    group: list[Settings] = [{"max_iter": n, "max_leaf_nodes": 4} for n in (3, 9)]
    least = int(0.05 * len(data.train))
    for settings, found in zip(
        group, predict_group(data, BaselineKind.BOOSTING, group, ROWS, 0, 1), strict=True
    ):
        plain = HistGradientBoostingRegressor(
            **settings, min_samples_leaf=least, early_stopping=False
        )
        plain.fit(data.features[data.train], data.labels[data.train, 0])
        np.testing.assert_allclose(found[:, 0], plain.predict(data.features))


def test_boosting_of_molecules_without_common_bits_predicts_their_mean() -> None:
    data = data_for(BaselineKind.BOOSTING, TaskKind.REGRESSION)
    data = dataclasses.replace(data, features=np.zeros_like(data.features))
    means = data.labels[data.train].mean(axis=0)
    np.testing.assert_allclose(predict(data, BaselineKind.BOOSTING), np.tile(means, (96, 1)))


def test_the_linear_model_is_scikit_learns_on_imputed_standardised_clipped_descriptors() -> None:
    data = data_for(BaselineKind.DESCRIPTORS, TaskKind.REGRESSION)
    features = data.features.copy()
    features[::7, ::3] = np.nan
    data = dataclasses.replace(data, features=features)
    imputer = SimpleImputer(strategy="median", keep_empty_features=True)
    scaler = StandardScaler()
    scaler.fit(imputer.fit_transform(features[data.train]))
    inputs = np.clip(scaler.transform(imputer.transform(features)), -5.0, 5.0)
    # What is constant in training says nothing; scikit-learn would only shift it.
    inputs[:, np.ptp(imputer.transform(features)[data.train], axis=0) == 0] = 0.0
    settings = one_of(data, BaselineKind.DESCRIPTORS)
    model = Ridge(**settings).fit(inputs[data.train], data.labels[data.train, 1])
    np.testing.assert_allclose(
        predict(data, BaselineKind.DESCRIPTORS)[:, 1], model.predict(inputs), rtol=1e-6
    )


def test_descriptors_that_are_missing_too_large_or_constant_do_no_harm() -> None:
    train = np.array(
        [[1.0, np.nan, 7.0, 1e300], [3.0, np.nan, 7.0, 2.0], [np.inf, np.nan, 7.0, 4.0]]
    )
    scaling = DescriptorScaling.fit(train)
    found = scaling.apply(np.concatenate([train, [[1e9, 5.0, 8.0, -np.inf]]]))
    deviation = float(np.std([1.0, 3.0, 2.0]))  # the median of 1 and 3 stands for the infinite one
    np.testing.assert_allclose(found[:, 0], [-1 / deviation, 1 / deviation, 0.0, 5.0])
    assert (found[:, 1:3] == 0).all()
    np.testing.assert_allclose(found[[0, 3], 3], 0.0, atol=1e-12)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("task_kind", list(TaskKind))
@pytest.mark.parametrize("kind", TREES)
def test_small_tasks_get_the_whole_grid_and_those_of_many_labels_stay_affordable(
    kind: BaselineKind, task_kind: TaskKind
) -> None:
    def grid(columns: int, molecules: int) -> list[Settings]:
        groups = candidate_groups(
            kind, task_kind, np.ones((molecules, columns)), num_trees=200, num_rounds=300
        )
        return [settings for group in groups for settings in group]

    name = "n_estimators" if kind is BaselineKind.FOREST else "max_iter"
    asked = 200 if kind is BaselineKind.FOREST else 300
    small, many = grid(1, 1000), grid(617, 2000)
    assert max(settings[name] for settings in small) == asked
    assert len(many) < len(small)
    limit = MAX_FOREST_LABELS if kind is BaselineKind.FOREST else MAX_BOOSTING_LABELS
    assert 20 <= max(int(settings[name]) for settings in many) <= limit / (617 * 2000)
    assert asked * 617 * 2000 > FULL_GRID_LABELS
    # A forest draws so many molecules for a tree and no more.
    if kind is BaselineKind.FOREST:
        assert grid(1, 2 * baselines.MAX_TREE_MOLECULES) == small


def test_a_tree_draws_no_more_than_its_share_of_a_large_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = data_for(BaselineKind.FOREST, TaskKind.REGRESSION)
    monkeypatch.setattr(baselines, "MAX_TREE_MOLECULES", 1)
    # A tree of one molecule predicts its label everywhere: the forest is a mean of labels.
    found = predict(data, BaselineKind.FOREST)
    assert (np.ptp(found, axis=0) < 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_finished_steps_are_found_again_for_their_own_settings_and_seed_alone(
    kind: BaselineKind, tmp_path: Path
) -> None:
    out = str(tmp_path)
    data = data_for(kind, TaskKind.REGRESSION)
    group = groups_for(data, kind)[-1]
    assert tried_settings(kind, group, 4, out) is None
    tried = try_settings(data.without_test(), kind, group, 4, 1, out)
    assert [candidate.settings for candidate in tried] == group
    assert tried_settings(kind, group, 4, out) == tried
    assert tried_settings(kind, group, 5, out) is None
    assert tried_settings(kind, [{**group[0], "more": 1}, *group[1:]], 4, out) is None

    found = fit_seed(data, kind, group[0], 4, 1, out)
    assert found.valid_score == pytest.approx(tried[0].valid_score)
    assert fitted_seed(kind, group[0], 4, out) == found
    assert fitted_seed(kind, group[0], 5, out) is None
    assert fitted_seed(kind, {**group[0], "more": 1}, 4, out) is None
    stored = Path(out) / str(found.predictions) / "predictions.parquet"
    for part, rows, told in (
        ("valid", data.valid, found.valid_score),
        ("test", data.test, found.test_score),
    ):
        read = read_predictions(str(stored.parent), part, data.columns)  # type: ignore[arg-type]
        assert read is not None
        assert read.smiles == tuple(data.smiles[row] for row in rows)
        assert read.mol_ids == tuple(data.mol_ids[row] for row in rows)
        assert score(data.task.metric, read.predictions, *data.known(rows)).value == told
    # Earlier versions stored none: such a seed is fitted again.
    stored.unlink()
    assert fitted_seed(kind, group[0], 4, out) is None
