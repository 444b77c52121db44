"""Scores agree with scikit-learn and SciPy, and treat missing labels as published benchmarks do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    matthews_corrcoef,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)

from moleblend_ray.errors import DataError, TrainingError
from moleblend_ray.evaluation.results.results import Candidate
from moleblend_ray.evaluation.scoring.scores import (
    best_candidate,
    is_better,
    other_scores,
    require_scorable,
    score,
    worst_score,
)
from moleblend_ray.evaluation.tasks import Metric, TaskKind


def random_task(seed: int, *, classes: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(200, 3))
    if classes:
        labels = (labels > 0.5).astype(np.float64)
    labels[rng.random(labels.shape) < 0.3] = np.nan
    # Rounded, so that predictions have ties.
    return labels, np.round(np.nan_to_num(labels) + rng.normal(size=labels.shape), 1)


REFERENCES: dict[Metric, Callable[..., float]] = {
    Metric.ROC_AUC: roc_auc_score,
    Metric.PR_AUC: average_precision_score,
    Metric.BALANCED_ACCURACY: lambda labels, found: balanced_accuracy_score(labels, found > 0.5),
    Metric.MCC: lambda labels, found: matthews_corrcoef(labels, found > 0.5),
    Metric.RMSE: root_mean_squared_error,
    Metric.MAE: mean_absolute_error,
    Metric.R2: r2_score,
    Metric.SPEARMAN: lambda labels, predictions: spearmanr(labels, predictions).statistic,
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("metric", list(Metric))
def test_scores_are_the_mean_over_columns_of_another_implementation_on_known_labels(
    metric: Metric, seed: int
) -> None:
    labels, predictions = random_task(seed, classes=metric.kind is TaskKind.CLASSIFICATION)
    found = score(metric, predictions, labels, ("a", "b", "c"))
    expected = []
    for column in range(3):
        known = ~np.isnan(labels[:, column])
        expected.append(REFERENCES[metric](labels[known, column], predictions[known, column]))
    assert list(found.columns.values()) == pytest.approx(expected, abs=1e-12)
    assert found.value == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_of_several_classes_the_most_probable_one_is_decided_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, 80)
    probabilities = rng.dirichlet((1, 1, 1), 80)
    # Not in order, beside a label of its own; of some molecules the class is not known.
    places = [3, 0, 2]
    labels, predictions = np.zeros((80, 4)), np.empty((80, 4))
    labels[:, places], predictions[:, places] = np.eye(3)[classes], probabilities
    labels[:, 1] = rng.integers(0, 2, 80)
    predictions[:, 1] = rng.random(80)
    labels[:9, places] = np.nan
    columns = ("y=c", "other", "y=b", "y=a")
    found = score(Metric.BALANCED_ACCURACY, predictions, labels, columns, exclusive=(places,))
    decisions = probabilities.argmax(axis=1)
    of_classes = balanced_accuracy_score(classes[9:], decisions[9:])
    assert np.mean([found.columns[columns[place]] for place in places]) == pytest.approx(of_classes)
    assert found.columns["other"] == pytest.approx(
        balanced_accuracy_score(labels[:, 1], predictions[:, 1] > 0.5)
    )
    found = score(Metric.MCC, predictions, labels, columns, exclusive=(places,))
    for number, place in enumerate(places):
        assert found.columns[columns[place]] == pytest.approx(
            matthews_corrcoef(classes[9:] == number, decisions[9:] == number)
        )
    others = other_scores(Metric.ROC_AUC, predictions, labels, columns, None, (places,))
    assert others["mcc"] == found.value
    # The order alone does not know of groups.
    arguments = predictions, labels, columns
    assert score(Metric.ROC_AUC, *arguments, exclusive=(places,)) == score(
        Metric.ROC_AUC, *arguments
    )


def test_a_metric_with_the_labels_unit_is_an_error_of_which_less_is_better() -> None:
    assert {metric for metric in Metric if metric.is_error} == {Metric.RMSE, Metric.MAE}
    assert all(metric.higher_is_better != metric.is_error for metric in Metric)


def test_equal_predictions_have_no_order_and_explain_nothing() -> None:
    labels, constant = np.array([[1.0], [2.0], [6.0]]), np.full((3, 1), 3.0)
    assert score(Metric.SPEARMAN, constant, labels, ("y",)).value == 0.0
    assert score(Metric.R2, constant, labels, ("y",)).value == 0.0
    classes = np.array([[1.0], [0.0], [0.0]])
    assert score(Metric.ROC_AUC, constant, classes, ("y",)).value == 0.5
    assert score(Metric.PR_AUC, constant, classes, ("y",)).value == pytest.approx(1 / 3)
    assert score(Metric.BALANCED_ACCURACY, constant, classes, ("y",)).value == 0.5
    assert score(Metric.MCC, constant, classes, ("y",)).value == 0.0


@pytest.mark.parametrize("metric", [metric for metric in Metric if not metric.is_error])
def test_columns_with_equal_labels_or_no_label_are_left_out_and_named(metric: Metric) -> None:
    labels = np.array([[0.0, 1.0, np.nan], [1.0, 1.0, np.nan], [0.0, 1.0, np.nan]])
    found = score(metric, np.nan_to_num(labels), labels, ("both", "one", "none"))
    assert found.value == pytest.approx(1.0)
    assert found.columns_left_out == ("one", "none")


@pytest.mark.parametrize(
    ("metric", "needs"),
    [
        (Metric.ROC_AUC, "labels of both classes"),
        (Metric.PR_AUC, "labels of both classes"),
        (Metric.BALANCED_ACCURACY, "labels of both classes"),
        (Metric.MCC, "labels of both classes"),
        (Metric.R2, "labels that differ"),
    ],
)
def test_no_scorable_column_is_an_error_that_says_what_is_needed(
    metric: Metric, needs: str
) -> None:
    with pytest.raises(DataError, match=needs):
        score(metric, np.zeros((3, 1)), np.ones((3, 1)), ("y",))


@pytest.mark.parametrize("metric", [metric for metric in Metric if not metric.is_error])
def test_labels_that_allow_no_score_are_found_without_predictions(
    metric: Metric, caplog: pytest.LogCaptureFixture
) -> None:
    labels = np.array([[0.0, 1.0, np.nan], [1.0, 1.0, np.nan]])
    with caplog.at_level("INFO"):
        require_scorable(metric, labels, ("both", "one", "none"), "test")
    assert f"2 of 3 columns have no {metric.value} in the test part: one, none" in caplog.text
    with pytest.raises(
        DataError, match="2 molecules of the validation part: none of the 2 label"
    ) as error:
        require_scorable(metric, labels[:, 1:], ("one", "none"), "validation")
    # Another metric helps only where there is one that needs less.
    assert ("task.metric=mae" in str(error.value)) == (metric in (Metric.R2, Metric.SPEARMAN))
    require_scorable(Metric.MAE, labels[:, 1:], ("one", "none"), "test")


def test_the_other_scores_are_those_of_the_same_type_of_labels_that_can_be_computed() -> None:
    labels, predictions = random_task(0, classes=False)
    found = other_scores(Metric.RMSE, predictions, labels, ("a", "b", "c"))
    assert found == {
        name: score(Metric(name), predictions, labels, ("a", "b", "c")).value
        for name in ("mae", "r2", "spearman")
    }
    equal = other_scores(Metric.RMSE, np.array([[1.0], [3.0]]), np.ones((2, 1)), ("y",))
    assert equal == {"mae": 1.0}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_predictions_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(TrainingError, match="1 of 2 predictions are not finite"):
        score(Metric.MAE, np.array([[value], [0.0]]), np.zeros((2, 1)), ("y",))


@pytest.mark.parametrize("metric", [Metric.RMSE, Metric.MAE])
def test_one_label_is_enough_for_an_error(metric: Metric) -> None:
    labels = np.array([[2.0], [np.nan]])
    assert score(metric, np.array([[5.0], [9.0]]), labels, ("y",)).value == 3.0


@pytest.mark.parametrize("metric", list(Metric))
def test_any_score_beats_the_worst_one_and_equal_scores_beat_nothing(metric: Metric) -> None:
    # R2 has no lower bound.
    assert is_better(metric, 1e30 if metric.is_error else -1e30, worst_score(metric))
    assert not is_better(metric, 0.5, 0.5)
    assert is_better(metric, 0.6, 0.5) != metric.is_error


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
