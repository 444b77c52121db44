"""Results of all folds are made of those of each, and nothing that a fold lacks is said of all."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest

from moleblend_ray.data.files import storage
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.reports.cross_validation_report import write_cross_validation_report
from moleblend_ray.evaluation.results.cross_validation import (
    Fold,
    combine_folds,
    split_hash_of,
    write_out_of_fold,
)
from moleblend_ray.evaluation.results.result_files import fold_path
from moleblend_ray.evaluation.scoring.class_sets import ClassCalibration
from moleblend_ray.evaluation.scoring.intervals import Calibration
from moleblend_ray.evaluation.scoring.resampling import Resampling
from moleblend_ray.evaluation.scoring.scores import score
from moleblend_ray.evaluation.scoring.stored_predictions import read_predictions, write_predictions
from moleblend_ray.evaluation.tasks import Metric, TaskKind

SIZE = 20
FOLDS = 3
SEEDS = (0, 1)


def spread(*values: float) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "values": list(values)}


def stored(
    folder: Path, fold: int, seed: int, noise: float, *, kind: TaskKind, bounds: bool = False
) -> tuple[float, np.ndarray, np.ndarray]:
    """Write the predictions of one model of a fold; returns its test score, labels and predictions."""
    every = [f"{'C' * (row % 10 + 1)}{'O' * (row // 10 + 1)}" for row in range(FOLDS * SIZE)]
    labels = np.random.default_rng(0).normal(size=(len(every), 1))
    if kind is TaskKind.CLASSIFICATION:
        labels = (labels > 0).astype(np.float64)
    known = LabelBounds(at_least=np.full_like(labels, np.nan), at_most=np.full_like(labels, np.nan))
    if bounds:
        labels[::5], known.at_least[::5] = np.nan, 0.5
    errors = np.random.default_rng((fold, seed, int(100 * noise))).normal(size=labels.shape)
    # Of each fold on another scale, as probabilities of different models can be.
    truth = known.filled(labels) if bounds else labels
    predictions = 10 * fold + truth + noise * errors
    test = np.arange(SIZE) + SIZE * fold
    split = SimpleNamespace(valid=(test + SIZE) % len(every), test=test)
    molecules = SimpleNamespace(
        mol_ids=tuple(f"m{row}" for row in range(len(every))),
        smiles=tuple(every),
        labels=labels,
        columns=("y",),
        bounds=known if bounds else None,
    )
    write_predictions(str(folder), molecules, split, predictions)
    metric = Metric.ROC_AUC if kind is TaskKind.CLASSIFICATION else Metric.RMSE
    found = score(metric, predictions[test], labels[test], ["y"], known[test] if bounds else None)
    return found.value, labels[test], predictions[test]


def entry(
    out: Path, fold: int, name: str, noise: float, seeds: tuple[int, ...], **what: Any
) -> dict[str, Any]:
    """What the results of a fold say of a model."""
    folders = [f"{name}/seed-{seed}" for seed in seeds]
    scores = [
        stored(out / fold_path(fold) / folder, fold, seed, noise, **what)[0]
        for seed, folder in zip(seeds, folders, strict=True)
    ]
    runs: list[dict[str, Any]] = [
        {
            "seed": seed,
            "model": folder,
            "predictions": None,
            "test_columns": {"y": value},
            "columns_left_out": [],
        }
        for seed, folder, value in zip(seeds, folders, scores, strict=True)
    ]
    return {
        "name": name,
        "valid": spread(*scores),
        "test": spread(*scores),
        "test_others": {"mae": spread(float(fold))},
        "seeds": runs,
        "kind": "forest",
    }


def folds_in(
    out: Path,
    kind: TaskKind = TaskKind.REGRESSION,
    *,
    absent: dict[int, str] | None = None,
    bounds: bool = False,
) -> list[Fold]:
    """Folds with a model of two seeds and a baseline of one, which is ``absent`` in some with a reason."""
    is_class = kind is TaskKind.CLASSIFICATION
    task = {
        "name": "own",
        "kind": kind.value,
        "columns": ["y"],
        "unit": "",
        "citation": "none",
        "metric": "roc_auc" if is_class else "rmse",
        "higher_is_better": is_class,
    }
    found = []
    for fold in range(FOLDS):
        missing = (absent or {}).get(fold)
        what = {"kind": kind, "bounds": bounds}
        forest = [] if missing else [entry(out, fold, "forest", 2.0, (0,), **what)]
        results = {
            "task": task,
            "final": entry(out, fold, "model", 0.5, SEEDS, **what),
            "baselines": forest,
            "baselines_absent": {"forest": missing} if missing else {},
            "data": {"split": {"train": SIZE, "valid": SIZE, "test": SIZE, "hash": f"h{fold}"}},
            "chosen": {"epochs": 10 + fold},
            "trials": [],
        }
        found.append(Fold(number=fold, folder=fold_path(fold), results=results))
    return found


@pytest.mark.parametrize("kind", list(TaskKind))
def test_a_score_is_the_mean_of_folds_and_its_interval_surrounds_it(
    tmp_path: Path, kind: TaskKind
) -> None:
    folds = folds_in(tmp_path, kind)
    found = combine_folds(str(tmp_path), folds)
    final, (baseline,) = found.entries["final"], found.entries["baselines"]
    for found_of_all, of_fold in (
        (final, [fold.results["final"] for fold in folds]),
        (baseline, [fold.results["baselines"][0] for fold in folds]),
    ):
        values = [one["test"]["mean"] for one in of_fold]
        assert list(found_of_all["test"]["values"]) == values
        assert found_of_all["test"]["mean"] == pytest.approx(np.mean(values))
        low, high = found_of_all["test_interval"]
        assert low < found_of_all["test"]["mean"] < high
    assert final["test_others"]["mae"]["values"] == (0.0, 1.0, 2.0)
    # The model has less noise. By all predictions together, which are on the scales of the folds, neither would tell anything.
    low, high = baseline["model_is_better_by"]
    assert 0 < low < high
    assert [(seed["fold"], seed["seed"], seed["model"]) for seed in final["seeds"]] == [
        (fold, seed, f"folds/fold-{fold}/model/seed-{seed}")
        for fold in range(FOLDS)
        for seed in SEEDS
    ]


def test_most_probable_classes_are_counted_over_all_folds(tmp_path: Path) -> None:
    folds = folds_in(tmp_path, TaskKind.CLASSIFICATION)
    assert "alternatives" not in combine_folds(str(tmp_path), folds).entries["final"]
    counts = np.random.default_rng(0).integers(0, 9, (FOLDS, 2, 2))
    for fold, own in zip(folds, counts, strict=True):
        with_words(fold, ["a", "b"], own)
    found = combine_folds(str(tmp_path), folds).entries["final"]["alternatives"]
    assert found == {"y": {"classes": ["a", "b"], "test_confusion": counts.sum(axis=0).tolist()}}


def test_draws_of_folds_decide_for_one_of_several_classes(tmp_path: Path) -> None:
    """As the scores of the folds do, which lie in the middle of those of the draws."""
    words = ["a", "b", "c"]
    columns = tuple(f"y={word}" for word in words)
    rng = np.random.default_rng(0)
    every = [f"{'C' * (row % 10 + 1)}{'O' * (row // 10 + 1)}" for row in range(FOLDS * SIZE)]
    # Molecules of all classes in each fold; all probabilities below a half, and the greatest mostly right.
    labels = np.eye(3)[np.arange(len(every)) % 3]
    predictions = rng.uniform(0.0, 0.3, labels.shape) + 0.15 * labels
    folds = folds_in(tmp_path, TaskKind.CLASSIFICATION)
    for fold in folds:
        results = cast("dict[str, Any]", fold.results)
        results["task"] |= {"columns": list(columns), "metric": "balanced_accuracy"}
        with_words(fold, words, np.zeros((3, 3)))
        results["baselines"] = []
        test = np.arange(SIZE) + SIZE * fold.number
        split = SimpleNamespace(valid=test, test=test)
        molecules = SimpleNamespace(
            mol_ids=tuple(every), smiles=tuple(every), labels=labels, columns=columns, bounds=None
        )
        for seed in results["final"]["seeds"]:
            folder = str(tmp_path / fold.folder / seed["model"])
            write_predictions(folder, molecules, split, predictions)
        value = score(
            Metric.BALANCED_ACCURACY,
            predictions[test],
            labels[test],
            columns,
            exclusive=([0, 1, 2],),
        ).value
        assert 0.6 < value < 1.0
        results["final"]["test"] = spread(value)
    final = combine_folds(str(tmp_path), folds).entries["final"]
    low, high = final["test_interval"]
    assert 0.5 < low < final["test"]["mean"] < high


def with_words(fold: Fold, words: list[str], counts: np.ndarray) -> None:
    """Let the classes of a fold have words, and these ``counts`` of which is taken for which."""
    cast("dict[str, Any]", fold.results)["final"]["alternatives"] = {
        "y": {"classes": words, "test_confusion": counts.tolist()}
    }


def test_an_interval_is_of_means_over_folds_of_the_same_draws(tmp_path: Path) -> None:
    folds = folds_in(tmp_path)
    found = combine_folds(str(tmp_path), folds)
    resampling = Resampling.of(found.predictions.smiles, most_of_one=SIZE // 2)
    times = np.concatenate([chunk.T for chunk in resampling._drawn()])
    scores = []
    for fold in range(FOLDS):
        own = times[:, SIZE * fold : SIZE * (fold + 1)]
        for seed in SEEDS:
            _, labels, predictions = stored(
                tmp_path / "again", fold, seed, 0.5, kind=TaskKind.REGRESSION
            )
            errors = (predictions - labels)[:, 0] ** 2
            scores.append(np.sqrt(own @ errors / own.sum(axis=1)))
    expected = np.quantile(np.mean(scores, axis=0), [0.025, 0.975])
    assert found.entries["final"]["test_interval"] == pytest.approx(expected)


def test_folds_by_group_are_drawn_by_group(tmp_path: Path) -> None:
    folds = folds_in(tmp_path)
    groups = np.arange(FOLDS * SIZE) // 4
    found = combine_folds(str(tmp_path), folds, groups)
    drawn = Resampling.of(found.predictions.smiles, SIZE // 2, groups).to_json()
    assert found.entries["resampling"] == drawn
    assert (drawn["of"], drawn["units"]) == ("groups", 15)


def test_labels_inside_are_counted_with_widths_from_the_other_folds(tmp_path: Path) -> None:
    folds = folds_in(tmp_path)
    found = combine_folds(str(tmp_path), folds)
    tested = found.predictions
    errors = np.abs(tested.predictions - tested.labels)[:, 0]
    parts = [
        [
            read_predictions(str(tmp_path / fold_path(fold) / f"model/seed-{seed}"), "valid", ["y"])
            for seed in SEEDS
        ]
        for fold in range(FOLDS)
    ]
    inside = 0
    for fold in range(FOLDS):
        # Its molecules are those by which the fold before it was chosen.
        others = [
            part for number, of in enumerate(parts) if number != (fold - 1) % FOLDS for part in of
        ]
        calibration = Calibration.of(others)
        assert calibration is not None
        assert len(calibration.errors[0]) == (FOLDS - 1) * SIZE
        inside += int((errors[found.rows[fold]] <= calibration.half_widths(0.9)[0]).sum())
    column = found.entries["final"]["intervals"]["columns"]["y"]
    assert (column["test_inside"], column["test_labels"]) == (inside, FOLDS * SIZE)
    of_all = Calibration.of([part for of in parts for part in of])
    assert of_all is not None
    assert column["half_width"] == of_all.half_widths(0.9)[0]
    # All labels had a part in this width.
    assert inside != int((errors <= column["half_width"]).sum())


def test_sets_of_classes_are_counted_with_those_from_the_other_folds(tmp_path: Path) -> None:
    found = combine_folds(str(tmp_path), folds_in(tmp_path, TaskKind.CLASSIFICATION))
    tested = found.predictions
    parts = [
        [
            read_predictions(str(tmp_path / fold_path(fold) / f"model/seed-{seed}"), "valid", ["y"])
            for seed in SEEDS
        ]
        for fold in range(FOLDS)
    ]
    sets = []
    for fold in range(FOLDS):
        others = [
            part for number, of in enumerate(parts) if number != (fold - 1) % FOLDS for part in of
        ]
        calibration = ClassCalibration.of(others)
        assert calibration is not None
        sets.append(calibration.p_values(tested.predictions[found.rows[fold]]).sets(0.9))
    counts = np.bincount(np.concatenate(sets)[:, 0], minlength=4).tolist()
    column = found.entries["final"]["class_sets"]["columns"]["y"]
    assert list(column["test_sets"].values()) == counts


def test_every_molecule_has_the_mean_prediction_of_the_seeds_of_its_fold(tmp_path: Path) -> None:
    found = combine_folds(str(tmp_path), folds_in(tmp_path, bounds=True))
    write_out_of_fold(str(tmp_path), found, ["y"])
    table = pq.read_table(tmp_path / "out_of_fold.parquet")
    assert table["mol_id"].to_pylist() == [f"m{row}" for row in range(FOLDS * SIZE)]
    assert table["fold"].to_pylist() == np.repeat(range(FOLDS), SIZE).tolist()
    for fold in range(FOLDS):
        own = [
            stored(tmp_path / "again", fold, seed, 0.5, kind=TaskKind.REGRESSION, bounds=True)
            for seed in SEEDS
        ]
        mean = np.mean([predictions for _, _, predictions in own], axis=0)
        rows = table.slice(SIZE * fold, SIZE)
        np.testing.assert_allclose(rows["prediction:y"].to_numpy(), mean[:, 0])
        np.testing.assert_array_equal(rows["label:y"].to_numpy(), own[0][1][:, 0])
    assert table["at_least:y"].null_count == FOLDS * SIZE - 12
    assert found.entries["final"]["bounds"]["y"]["test_bounds"] == 12


def test_a_baseline_that_one_fold_lacks_is_absent_with_the_reason(tmp_path: Path) -> None:
    folds = folds_in(tmp_path, absent={1: "it diverged", 2: "it diverged, too"})
    found = combine_folds(str(tmp_path), folds).entries
    assert found["baselines"] == []
    assert found["baselines_absent"] == {"forest": "in fold 1: it diverged"}
    nowhere = folds_in(tmp_path, absent=dict.fromkeys(range(FOLDS), "starts from scratch"))
    found = combine_folds(str(tmp_path), nowhere).entries
    assert found["baselines_absent"] == {"forest": "starts from scratch"}


def test_damaged_results_of_a_fold_are_named(tmp_path: Path) -> None:
    (fold, *_) = folds_in(tmp_path)
    whole = json.loads(json.dumps(fold.results))
    whole["data"]["repeats"], whole["checkpoint"] = {"test_seen": 0}, {}
    file = tmp_path / "folds/fold-0/results.json"
    storage.write_json(str(file), whole)
    assert Fold.read(str(tmp_path), 0).results == whole
    documents: tuple[Any, ...] = (
        {**whole, "baselines": 3},
        {name: value for name, value in whole.items() if name != "trials"},
        {**whole, "final": {**whole["final"], "seeds": None}},
        {**whole, "baselines": [{"kind": "forest"}]},
        [],
    )
    for damaged in documents:
        storage.write_json(str(file), damaged)
        with pytest.raises(DataError, match=r"folds/fold-0/results\.json"):
            Fold.read(str(tmp_path), 0)


def test_the_hash_of_folds_is_that_of_all_their_splits(tmp_path: Path) -> None:
    folds = folds_in(tmp_path)
    assert split_hash_of(folds) == split_hash_of(folds_in(tmp_path))
    assert len({split_hash_of(folds), split_hash_of(folds[::-1]), split_hash_of(folds[:2])}) == 3


@pytest.mark.parametrize("chosen", [None, {"epochs": 10}])
def test_the_report_tells_of_all_folds_and_what_each_chose(
    tmp_path: Path, chosen: dict[str, Any] | None
) -> None:
    folds = folds_in(tmp_path, TaskKind.CLASSIFICATION)
    found = combine_folds(str(tmp_path), folds)
    data: dict[str, Any] = dict.fromkeys(
        ("molecules", "with_coordinates", "unlabelled", "quarantined", "unreadable_labels"), 60
    )
    data |= {
        "repeats": {"distinct": 60, "test_seen": 3},
        "replicates": None,
        "fingerprint": "f",
        "split": {"kind": "random", "hash": "h", "test": 60},
        "labels": {"y": {"test": {"labels": 60, "positives": 30}}},
    }
    results = {
        "task": folds[0].results["task"],
        "data": data,
        "chosen": chosen,
        "checkpoint": {"uri": None},
        "versions": {"python": "3"},
        **found.entries,
    }
    uri = write_cross_validation_report(str(tmp_path), results, found.predictions, found.rows)
    text = Path(uri).read_text()
    assert "**3 of the 60 molecules are also in other folds**" in text
    assert "One curve for each fold." in text
    assert "the mean of all 6 models" in text
    assert "are of sets from the other folds" in text
    model, forest = (
        f"{found.entries['folds'][1]['test_scores'][name]:.4f}" for name in ("model", "forest")
    )
    assert f"| [1](folds/fold-1/report.md) | 20 | 20 | 20 | {model} | {forest} |" in text
    assert "| y | 60 (30) |" in text
    assert ("| epochs | 10 | 11 | 12 |" in text) == (chosen is None)
    # Which is refused where each fold chose settings of its own.
    assert ("`moleblend refit" in text) == (chosen is not None)
    assert (tmp_path / "figures/test.png").stat().st_size > 1000
