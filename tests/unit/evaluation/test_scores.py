"""Scores agree with scikit-learn and treat missing labels as published benchmarks do."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, mean_squared_error, roc_auc_score

from moleblend_ray.errors import DataError, TrainingError
from moleblend_ray.evaluation.results import Candidate
from moleblend_ray.evaluation.scores import best_candidate, is_better, score, worst_score
from moleblend_ray.evaluation.tasks import Metric


def random_task(seed: int, *, classes: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(200, 3))
    if classes:
        labels = (labels > 0.5).astype(np.float64)
    labels[rng.random(labels.shape) < 0.3] = np.nan
    # Rounded, so that predictions have ties.
    return labels, np.round(np.nan_to_num(labels) + rng.normal(size=labels.shape), 1)


@pytest.mark.parametrize("seed", range(5))
def test_roc_auc_is_the_mean_over_columns_of_scikit_learns_on_known_labels(seed: int) -> None:
    labels, predictions = random_task(seed, classes=True)
    found = score(Metric.ROC_AUC, predictions, labels, ("a", "b", "c"))
    expected = []
    for column in range(3):
        known = ~np.isnan(labels[:, column])
        expected.append(roc_auc_score(labels[known, column], predictions[known, column]))
    assert list(found.columns.values()) == pytest.approx(expected, abs=1e-12)
    assert found.value == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("metric", [Metric.RMSE, Metric.MAE])
def test_errors_are_the_mean_over_columns_of_scikit_learns_on_known_labels(metric: Metric) -> None:
    labels, predictions = random_task(0, classes=False)
    found = score(metric, predictions, labels, ("a", "b", "c"))
    expected = []
    for column in range(3):
        known = ~np.isnan(labels[:, column])
        pair = labels[known, column], predictions[known, column]
        expected.append(
            np.sqrt(mean_squared_error(*pair))
            if metric is Metric.RMSE
            else mean_absolute_error(*pair)
        )
    assert found.value == pytest.approx(np.mean(expected), abs=1e-12)


def test_columns_with_one_class_or_no_label_are_left_out_of_roc_auc_and_named() -> None:
    labels = np.array([[0.0, 1.0, np.nan], [1.0, 1.0, np.nan], [0.0, 1.0, np.nan]])
    predictions = np.array([[0.1, 0, 0], [0.9, 0, 0], [0.2, 0, 0]])
    found = score(Metric.ROC_AUC, predictions, labels, ("both", "one", "none"))
    assert found.value == 1.0
    assert found.columns_left_out == ("one", "none")


def test_no_scorable_column_is_an_error_that_says_what_is_needed() -> None:
    with pytest.raises(DataError, match="labels of both classes"):
        score(Metric.ROC_AUC, np.zeros((3, 1)), np.ones((3, 1)), ("y",))


def test_predictions_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(DataError, match="1 of 2 predictions are not finite"):
        score(Metric.MAE, np.array([[np.nan], [0.0]]), np.zeros((2, 1)), ("y",))


@pytest.mark.parametrize("metric", list(Metric))
def test_any_score_beats_the_worst_one_and_equal_scores_beat_nothing(metric: Metric) -> None:
    assert is_better(metric, 0.5, worst_score(metric))
    assert not is_better(metric, 0.5, 0.5)
    assert is_better(metric, 0.6, 0.5) == (metric is Metric.ROC_AUC)


def test_the_best_candidate_is_the_first_of_the_best_that_did_not_fail() -> None:
    candidates = [
        Candidate(settings={"name": name}, valid_score=value)
        for name, value in (("a", None), ("b", 0.5), ("c", 0.9), ("d", 0.9), ("e", 0.5))
    ]
    assert best_candidate(Metric.ROC_AUC, candidates).settings == {"name": "c"}
    assert best_candidate(Metric.RMSE, candidates).settings == {"name": "b"}


def test_candidates_that_all_failed_have_no_best_one() -> None:
    failed = [Candidate(settings={}, valid_score=None)] * 2
    with pytest.raises(TrainingError, match="none of 2 candidates has a validation score"):
        best_candidate(Metric.MAE, failed)
