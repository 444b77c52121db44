"""The report shows model and baselines as they did, and says what is absent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.reports import report_figures
from moleblend_ray.evaluation.reports.report import write_report
from moleblend_ray.evaluation.reports.report_figures import set_scale
from moleblend_ray.evaluation.results.results import (
    BaselineResult,
    Candidate,
    SeedResult,
    baseline_entry,
    labels_entry,
    seeds_entry,
)
from moleblend_ray.evaluation.scoring.resampling import Resampling
from moleblend_ray.evaluation.tasks import TaskKind

LABELS = np.array([[0.0], [1.0], [2.0]])


def seeds(valid: float, *tests: float, others: Sequence[float] = ()) -> list[SeedResult]:
    return [
        SeedResult(
            seed=seed,
            valid_score=valid,
            test_score=test,
            test_columns={"y": test},
            columns_left_out=(),
            epochs=1,
            best_epoch=1,
            seconds=1.0,
            model=None,
            test_others={"mae": others[seed], "r2": others[seed] / 2} if others else {},
        )
        for seed, test in enumerate(tests)
    ]


def baseline(kind: BaselineKind, valid: float, *tests: float) -> dict[str, Any]:
    tried = [Candidate(settings={"alpha": 10.0**n}, valid_score=valid + n) for n in range(3)]
    chosen = tried[0].settings
    if kind is BaselineKind.SCRATCH:
        tried, chosen = [], {"learning_rate": 1e-4, "epochs": 3}
    return baseline_entry(
        BaselineResult(
            kind=kind,
            chosen=chosen,
            candidates=tuple(tried),
            seeds=tuple(seeds(valid, *tests)),
        )
    )


def results_of(**changes: Any) -> dict[str, Any]:
    kind = changes.pop("kind", "regression")
    is_class = kind == "classification"
    split = {"kind": "scaffold", "train": 8, "valid": 1, "test": 3, "hash": "0f"}
    return {
        "task": {
            "name": "own",
            "kind": kind,
            "columns": ["y"],
            "metric": "roc_auc" if is_class else "rmse",
            "higher_is_better": is_class,
            "unit": "" if is_class else "eV",
            "citation": "here",
        },
        "data": {
            "molecules": 12,
            "with_coordinates": 0,
            "unlabelled": 0,
            "quarantined": 0,
            "fingerprint": "0f",
            "split": split,
        },
        "checkpoint": {"uri": "/run", "fingerprint": "0f"},
        "chosen": {"epochs": 3},
        "final": seeds_entry("MoleBLEND, fine-tuned", seeds(0.5, 0.6, 0.8)),
        "baselines": [
            baseline(BaselineKind.FOREST, 0.3, 0.8, 0.8),
            baseline(BaselineKind.DESCRIPTORS, 0.9, 0.1, 0.1),
            baseline(BaselineKind.SCRATCH, 0.4, 0.9, 0.9),
        ],
        "baselines_absent": {},
        "versions": {"python": "3"},
        **changes,
    }


def report_of(tmp_path: Path, results: dict[str, Any]) -> str:
    labels = np.tile(LABELS, len(results["task"]["columns"]))
    return Path(write_report(str(tmp_path), results, labels % 2, labels)).read_text()


def names_in_table(text: str) -> list[str]:
    rows = [line.split(" | ") for line in text.splitlines() if " ± " in line]
    return [row[0].removeprefix("| ") for row in rows[1:]]  # the first row is the heading


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_rows_are_sorted_by_validation_and_the_model_stands_out(tmp_path: Path, kind: str) -> None:
    names = names_in_table(report_of(tmp_path, results_of(kind=kind)))
    ascending = [
        "ECFP4 + random forest",
        "MoleBLEND, from scratch",
        "**MoleBLEND, fine-tuned**",
        "RDKit descriptors + linear model",
    ]
    assert names == (ascending if kind == "regression" else ascending[::-1])


def with_intervals(better_by: tuple[float, float] | None, **changes: Any) -> dict[str, Any]:
    """Results with intervals of scores; of the differences to the baselines, each has this one."""
    results = results_of(
        resampling=Resampling.of(["C" * length for length in range(1, 15)]).to_json(), **changes
    )
    results["final"] |= {"test_interval": [0.61234, 0.8]}
    for entry in results["baselines"]:
        entry |= {"test_interval": None, "model_is_better_by": better_by}
    return results


def test_scores_and_differences_have_intervals(tmp_path: Path) -> None:
    text = report_of(tmp_path, with_intervals((0.02, 0.19)))
    assert "| **0.7000 ± 0.1414** | **0.6123 to 0.8000** | 0.6000, 0.8000 |" in text
    assert "1,000 draws of the 14 scaffolds of the test molecules" in text
    assert "| ECFP4 + random forest | 0.1000 | 0.0200 to 0.1900 |" in text
    assert "| RDKit descriptors + linear model | -0.6000 | 0.0200 to 0.1900 |" in text
    assert "the other way round" not in text


def test_a_difference_that_may_be_chance_is_told_as_such(tmp_path: Path) -> None:
    text = report_of(tmp_path, with_intervals((-0.05, 0.19)))
    assert "by validation. With other test molecules it might be the other way round" in text


def test_what_has_no_interval_is_left_out(tmp_path: Path) -> None:
    text = report_of(tmp_path, with_intervals(None))
    assert "compared with" not in text
    assert "1,000 draws" in text
    alone = report_of(tmp_path, with_intervals(None, baselines=[]))
    assert "1,000 draws" in alone
    assert "draws" not in report_of(tmp_path, results_of())


def test_results_without_intervals_say_why_there_are_none(tmp_path: Path) -> None:
    results = with_intervals(None)
    results["final"]["test_interval"] = None
    text = report_of(tmp_path, results)
    assert "There are no 95 % intervals of scores. None is given where it would look surer" in text
    assert "1,000 draws" not in text


def test_differences_are_shown_where_scores_have_no_intervals(tmp_path: Path) -> None:
    results = with_intervals((0.02, 0.19))
    results["final"]["test_interval"] = None
    text = report_of(tmp_path, results)
    assert "| ECFP4 + random forest | 0.1000 | 0.0200 to 0.1900 |" in text
    assert "comes on top. None is given where it would look surer" in text
    for entry in (results["final"], *results["baselines"]):
        entry["test_interval"] = [0.1, 0.2]
    assert "None is given" not in report_of(tmp_path, results)


def test_the_difference_is_to_the_baseline_chosen_by_validation(tmp_path: Path) -> None:
    text = report_of(tmp_path, results_of())
    assert "fine-tuned is 0.1000 better in RMSE in eV than ECFP4 + random forest, the best" in text
    equal = results_of()
    for entry in equal["baselines"]:
        entry["test"] = equal["final"]["test"]
    assert "is as good in RMSE in eV as ECFP4 + random forest, the best" in report_of(
        tmp_path, equal
    )
    text = report_of(tmp_path, results_of(kind="classification"))
    assert "0.6000 better in ROC-AUC than RDKit descriptors + linear model, the best" in text
    text = report_of(tmp_path, results_of(baselines=[baseline(BaselineKind.FOREST, 0.1, 0.2)]))
    assert "fine-tuned is 0.5000 worse" in text


def test_the_mean_of_all_models_stands_below_them_wherever_they_are(tmp_path: Path) -> None:
    assert "as `moleblend predict`" not in report_of(tmp_path, results_of())
    final = seeds_entry("MoleBLEND, fine-tuned", seeds(0.5, 0.6, 0.8, others=(0.25, 0.75)))
    final["ensemble"] = {"valid": 0.45, "test": 0.55, "test_others": {"mae": 0.4}}
    lines = report_of(tmp_path, results_of(final=final)).splitlines()
    (row,) = (number for number, line in enumerate(lines) if "as `moleblend predict`" in line)
    assert lines[row].startswith("| mean of these 2 models, as ")
    assert lines[row].endswith(" | 0.4500 | 0.5500 |  | |")
    assert lines[row - 1].startswith("| **MoleBLEND, fine-tuned** |")
    assert lines[row + 1].startswith("| RDKit descriptors")
    assert "| mean of these 2 models | 0.4000 |  |" in lines


def test_intervals_are_shown_with_the_share_of_test_labels_inside(tmp_path: Path) -> None:
    columns = {
        "a|b": {"half_width": 1.5, "valid_labels": 1200, "test_labels": 40, "test_inside": 35},
        "c\n(nM)": {"half_width": None, "valid_labels": 8, "test_labels": 4, "test_inside": 0},
        "d": {"half_width": 2.0, "valid_labels": 30, "test_labels": 0, "test_inside": 0},
    }
    results = results_of()
    results["task"] |= {"unit": "log|S|", "columns": list(columns)}
    results["final"]["intervals"] = {"coverage": 0.9, "columns": columns}
    text = report_of(tmp_path, results)
    assert "hold 90 % of the labels" in text
    assert "| column | prediction ±, log\\|S\\| | validation labels | test labels inside |" in text
    assert "\n| a\\|b | 1.5000 | 1,200 | 35 of 40 (88 %) |\n" in text
    assert "\n| c (nM) | too few labels | 8 |  |\n" in text
    assert "\n| d | 2.0000 | 30 | none |\n" in text
    for absent in ({}, {"intervals": None}):
        results["final"] = {**results_of()["final"], **absent}
        assert "test labels inside" not in report_of(tmp_path, results)


def test_the_figure_of_one_property_shows_where_labels_are_inside(tmp_path: Path) -> None:
    results = results_of()
    column = {"half_width": 0.5, "valid_labels": 30, "test_labels": 3, "test_inside": 3}
    drawn = {}
    for name, intervals in (
        ("none", None),
        ("wide", {"coverage": 0.9, "columns": {"y": column}}),
        ("unknown", {"coverage": 0.9, "columns": {"y": {**column, "half_width": None}}}),
    ):
        results["final"]["intervals"] = intervals
        text = report_of(tmp_path / name, results)
        assert ("Grey: labels inside their interval." in text) == (name == "wide")
        drawn[name] = (tmp_path / name / "figures" / "test.png").read_bytes()
    assert drawn["none"] == drawn["unknown"] != drawn["wide"]


def test_other_scores_stand_below_with_their_own_units(tmp_path: Path) -> None:
    assert "Other scores" not in report_of(tmp_path, results_of())
    final = seeds_entry("MoleBLEND, fine-tuned", seeds(0.5, 0.6, 0.8, others=(0.25, 0.75)))
    text = report_of(tmp_path, results_of(final=final))
    assert "| model | MAE in eV | R² |" in text
    assert "| MoleBLEND, fine-tuned | 0.5000 ± 0.3536 | 0.2500 ± 0.1768 |" in text
    results = results_of(final=final)
    results["task"]["unit"] = "log|S|"
    assert "| model | MAE in log\\|S\\| | R² |" in report_of(tmp_path, results)
    # Results of before had only the score by which everything was chosen.
    assert "| ECFP4 + random forest |  |  |" in text


def test_labels_that_were_no_numbers_are_counted(tmp_path: Path) -> None:
    results = results_of()
    assert "no numbers" not in report_of(tmp_path, results)
    results["data"]["unreadable_labels"] = 1200
    assert "- 1,200 label(s) in the source are no numbers" in report_of(tmp_path, results)


def test_sets_of_classes_are_shown_with_what_they_hold_of_each_class(tmp_path: Path) -> None:
    results = results_of(kind="classification")
    assert "sets of one class" not in report_of(tmp_path, results)
    results["final"]["class_sets"] = {
        "coverage": 0.9,
        "columns": {
            "a|b": {
                "valid_labels": [1900, 19],
                "test_sets": {"neither": 1, "0": 20, "1": 10, "both": 9},
                "test_labels": [30, 10],
                "test_inside": [27, 9],
            },
            "c": {
                "valid_labels": [5, 0],
                "test_sets": {"neither": 0, "0": 0, "1": 0, "both": 2},
                "test_labels": [2, 0],
                "test_inside": [2, 0],
            },
        },
    }
    text = report_of(tmp_path, results)
    assert "so that 90 % of those like" in text
    assert "| a\\|b | 1,900, 19 | 30 | 9 | 1 | 27 of 30 (90 %) | 9 of 10 (90 %) |" in text
    assert "| c | 5, 0 | 0 | 2 | 0 | 2 of 2 (100 %) | none |" in text


def test_the_most_probable_class_is_told_with_what_is_taken_for_what(tmp_path: Path) -> None:
    results = results_of()
    assert "most probable class" not in report_of(tmp_path, results)
    results["final"]["alternatives"] = {
        "a|b": {
            "classes": ["low", "m|d", "high"],
            "test_confusion": [[1500, 300, 200], [0, 0, 0], [1, 2, 7]],
        },
        "empty": {"classes": ["x", "y", "z"], "test_confusion": [[0] * 3] * 3},
    }
    text = report_of(tmp_path, results)
    assert (
        "class of a\\|b, by the mean of all models. It is right for 1,507 of 2,010 (75 %) of"
        in text
    )
    # Of the classes that the test part has: 0.75 and 0.7.
    assert "(balanced accuracy) is 72 %, and by chance 33 %:" in text
    assert (
        "| class | predicted low | predicted m\\|d | predicted high |\n|---|---|---|---|\n" in text
    )
    assert "| low | 1,500 | 300 | 200 |\n| m\\|d | 0 | 0 | 0 |\n| high | 1 | 2 | 7 |\n" in text
    assert "It is right for none of the test molecules" in text


def test_bounds_are_told_with_those_that_predictions_respect(tmp_path: Path) -> None:
    results = results_of()
    assert "bound" not in report_of(tmp_path, results)
    counts = {"train": 1200, "valid": 30, "test": 40}
    parts = {part: {"labels": 5, "bounds": count} for part, count in counts.items()}
    results["data"]["labels"] = {"y|z": parts, "w": {**parts, "test": {"labels": 5, "bounds": 0}}}
    results["final"]["bounds"] = {
        "y|z": {"test_bounds": 40, "test_respected": 38, "test_distance": 0.25},
        "w": {"test_bounds": 0, "test_respected": 0, "test_distance": None},
    }
    text = report_of(tmp_path, results)
    assert "| y\\|z | 1,200 | 30 | 40 | 38 of 40 (95 %) | 0.2500 |" in text
    assert "| w | 1,200 | 30 | 0 | none |  |" in text
    assert "Of 40 of their labels only a bound is known." in text
    assert "in `results.json`" not in text
    names = [f"column {index}" for index in range(51)]
    results["final"]["bounds"] = dict.fromkeys(names, results["final"]["bounds"]["w"])
    results["data"]["labels"] = dict.fromkeys(names, parts)
    text = report_of(tmp_path, results)
    assert text.count("The first 50; all 51 are in `results.json`.") == 2
    assert "| column 50 |" not in text


def test_labels_that_may_be_bounds_have_advice_for_numbers_only(tmp_path: Path) -> None:
    for kind in ("regression", "classification"):
        results = results_of(kind=kind)
        results["data"]["unreadable_labels"] = 3
        assert ("task.censored=true" in report_of(tmp_path, results)) == (kind == "regression")
    results = results_of(kind="regression")
    results["data"]["unreadable_labels"] = 3
    results["final"]["bounds"] = {}
    text = report_of(tmp_path, results)
    assert (
        "- 3 label(s) in the source are neither numbers nor bounds and count as missing\n" in text
    )
    assert "task.censored=true" not in text


def test_the_labels_of_each_column_and_the_columns_without_a_score_are_told(tmp_path: Path) -> None:
    """With missing labels, a score over several columns is of fewer molecules than the test part has."""
    found = [
        dataclasses.replace(seed, test_columns={"a|b<c>": seed.test_score}, columns_left_out=("c",))
        for seed in seeds(0.5, 0.6, 0.8)
    ]
    results = results_of(kind="classification", final=seeds_entry("MoleBLEND", found))
    results["task"]["columns"] = ["a|b<c>", "c"]
    labels = np.array([[0, 1], [1, np.nan], [1, np.nan], [np.nan, 1], [0, np.nan], [1, 1]])
    split = Split(*map(np.array, ([0, 1, 2], [3], [4, 5])))
    molecules = SimpleNamespace(bounds=None, columns=("a|b<c>", "c"), labels=labels)
    results["data"]["labels"] = labels_entry(TaskKind.CLASSIFICATION, molecules, split._asdict())  # type: ignore[arg-type]
    assert results["data"]["labels"]["c"]["test"] == {"labels": 1, "positives": 1}
    text = report_of(tmp_path, results)
    assert "It is the mean over 1 of the 2 label columns; the others cannot be scored" in text
    assert "| a\\|b&lt;c> | 3 (2) | 0 (0) | 2 (1) | 0.7000 |" in text
    assert "| c | 1 (1) | 1 (1) | 1 (1) | none |" in text
    assert "cannot be scored" not in report_of(tmp_path, results_of())


def test_molecules_that_were_seen_in_another_part_are_told_beside_the_scores(
    tmp_path: Path,
) -> None:
    results = results_of()
    results["data"]["repeats"] = {"distinct": 12, "test_seen": 0, "valid_seen": 0}
    text = report_of(tmp_path, results)
    assert "on 3 test molecules that took no part in training" in text
    assert "different" not in text
    assert "among those" not in text
    results["data"]["repeats"] = {"distinct": 9, "test_seen": 2, "valid_seen": 1}
    text = report_of(tmp_path, results)
    assert "took no part" not in text
    assert "**2 of the 3 test molecules are also among those for training" in text
    assert text.index("2 of the 3") < text.index("| model |")
    assert "1 of the 1 validation molecules are" in text
    assert "\n- 9 of them are different" in text


def test_what_predicts_and_what_learns_from_all_molecules_is_told(tmp_path: Path) -> None:
    results = results_of()
    text = report_of(tmp_path, results)
    assert "gives the mean of all 2 models, trained on 8 molecules. `moleblend refit" in text
    assert "on all 12 molecules, for use once the score is known." in text
    # The models of one fold are for its score alone: those of all folds are refitted together.
    results["data"]["split"] |= {"folds": 5, "fold": 1}
    assert "moleblend refit" not in report_of(tmp_path, results)


def test_scores_of_small_units_keep_their_digits(tmp_path: Path) -> None:
    """Potencies in mol/L, or energies in hartree."""
    trial = {"number": 0, "settings": {"epochs": 3}, "epochs": 3, "status": "finished"}
    text = report_of(
        tmp_path,
        results_of(
            final=seeds_entry("MoleBLEND", seeds(5e-9, 6e-9, 8e-9, others=(4e-9, 4e-9))),
            baselines=[baseline(BaselineKind.FOREST, 3e-9, 8.5e-9, 8.5e-9)],
            trials=[{**trial, "valid_score": 5e-9, "error": None}],
        ),
    )
    assert (
        "| **MoleBLEND** | **5.000e-09** | **(7.000 ± 1.414)e-09** |  | 6.000e-09, 8.000e-09 |"
        in text
    )
    assert "is 1.500e-09 better in RMSE" in text
    assert "| MoleBLEND | (4.000 ± 0.000)e-09 |" in text
    assert "| 0 | 3 | 3 | finished | 5.000e-09 |" in text


def test_settings_are_shown_as_they_are_written_in_a_configuration(tmp_path: Path) -> None:
    chosen = {"epochs": 3, "learning_rate": 1e-4, "huber_delta": None, "balance": True}
    text = report_of(tmp_path, results_of(chosen=chosen))
    for row in ("| learning_rate | 0.0001 |", "| huber_delta | null |", "| balance | true |"):
        assert row in text


def test_the_chosen_settings_of_each_baseline_are_shown(tmp_path: Path) -> None:
    text = report_of(tmp_path, results_of())
    assert "| ECFP4 + random forest | alpha=1 | 3 |" in text
    assert "| MoleBLEND, from scratch | those of the model | 1 |" in text


def test_absent_baselines_are_named_with_their_reason(tmp_path: Path) -> None:
    reason = {"scratch": "the model itself starts from scratch"}
    told = "- MoleBLEND, from scratch: absent, the model itself starts from scratch\n"
    # Behind an empty line, or it would be a row of a table for some renderers.
    assert f"\n\n{told}" in report_of(tmp_path, results_of(baselines_absent=reason))
    text = report_of(tmp_path, results_of(baselines=[], baselines_absent=reason))
    assert f"\n\n{told}" in text
    assert names_in_table(text) == ["**MoleBLEND, fine-tuned**"]
    assert "than" not in text
    assert "## Baselines" not in report_of(tmp_path, results_of(baselines=[]))


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_dollars_in_names_and_units_are_no_formula(tmp_path: Path, kind: str) -> None:
    results = results_of(kind=kind)
    results["task"] |= {"name": "price $_$", "columns": ["$_$"], "unit": "$/mol_$"}
    results["trials"] = [
        {
            "number": n,
            "settings": {"epochs": n},
            "epochs": n,
            "status": "finished",
            "valid_score": n,
        }
        | {"error": None}
        for n in (3, 4)
    ]
    assert "# price $_$" in report_of(tmp_path, results)
    assert (tmp_path / "figures" / "test.png").stat().st_size > 0
    assert (tmp_path / "figures" / "trials.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "values", "shown"),
    [
        ("batch_size", [64, 128, 64], ["64", "128"]),
        ("epochs", [2, 3, 4], ["2", "3", "4"]),
        ("learning_rate", [1.3e-4, 1.07e-3], ["0.0002", "0.0005", "0.001"]),
    ],
)
def test_the_axis_of_a_setting_shows_where_its_values_are(
    name: str, values: list[float], shown: list[str]
) -> None:
    axes = Figure().subplots()
    axes.scatter(values, values)
    set_scale(axes, name, values)
    low, high = axes.get_xlim()
    labels = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    assert [label.get_text() for tick, label in labels if low <= tick <= high] == shown


def test_a_single_trial_is_listed_and_not_drawn(tmp_path: Path) -> None:
    results = results_of()
    trial = {"number": 0, "settings": {"epochs": 3}, "epochs": 3, "status": "finished"}
    results["trials"] = [trial | {"valid_score": 0.5, "error": None}]
    text = report_of(tmp_path, results)
    assert "\n1 configuration, judged" in text
    assert "trials.png" not in text
    assert not (tmp_path / "figures" / "trials.png").exists()


def test_text_from_elsewhere_is_shown_word_for_word(tmp_path: Path) -> None:
    results = results_of(chosen={"note": "a|b <b>"}, versions={"x|y": "1"})
    trial = {"number": 4, "settings": {"note": "c|d"}, "epochs": 0, "status": "failed"}
    error = "RuntimeError: of *two*\n  - shapes"
    results["trials"] = [trial | {"valid_score": None, "error": error}]
    text = report_of(tmp_path, results)
    for row in ("| note | a\\|b &lt;b> |", "| x\\|y | 1 |", "| 4 | c\\|d | 0 | failed |  |"):
        assert row in text
    # Indented by four: a block in which Markdown marks nothing.
    assert "\nTrial 4 failed:\n\n    RuntimeError: of *two*\n      - shapes" in text


def test_the_similarity_of_test_molecules_to_training_is_told(tmp_path: Path) -> None:
    results = results_of()
    assert "similarity of test" not in report_of(tmp_path, results)
    results["data"]["split"]["test"] = 1200
    results["data"]["similarity"] = {
        "percentile_5": 0.255,
        "median": 0.5,
        "percentile_95": 1.0,
        "threshold": 0.31,
        "in_domain": 1100,
    }
    text = report_of(tmp_path, results)
    assert "median 0.50, 5th and 95th percentile 0.26 and 1.00; 1,100 of 1,200 reach 0.31" in text


def replicates(**changes: Any) -> dict[str, Any]:
    columns = {"y": {"molecules": 2, "std": 0.25}}
    found = {"rule": "keep", "molecules": 2, "rows": 5, "undecided": 0, "dropped": 0}
    return {**found, "columns": columns, **changes}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {},
            "- 2 molecules had 5 rows, each of which counts; `task.replicates=median` makes one of them. Labels of one molecule "
            "have a standard deviation of 0.2500 eV: the RMSE",
        ),
        (
            {"rule": "mean", "columns": {"y": {"molecules": 0}}},
            "had 5 rows, of which each molecule has one, with their mean\n",
        ),
        (
            {
                "columns": {
                    "y": {"molecules": 2, "std": 0.5},
                    "none": {"molecules": 0},
                    "z": {"molecules": 1, "std": 0.25},
                }
            },
            "a standard deviation of 0.2500 (z) to 0.5000 (y) eV",
        ),
        (
            {"rule": "median", "undecided": 3, "dropped": 1},
            "3 label(s) contradict each other and count as missing, and 1 molecule(s) without any other are left out",
        ),
    ],
)
def test_rows_of_one_molecule_are_told_with_how_far_their_labels_are_apart(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    results = results_of()
    results["data"]["replicates"] = replicates(**changes)
    assert told in report_of(tmp_path, results)


def test_rows_of_one_molecule_with_both_classes_are_counted(tmp_path: Path) -> None:
    results = results_of(kind="classification")
    columns = {name: {"molecules": 4, "contradictory": 1} for name in ("y", "z")}
    results["data"]["replicates"] = replicates(rule="mean", columns=columns)
    text = report_of(tmp_path, results)
    assert (
        "one, with the more frequent class. Of 8 labels given several times, 2 have both classes\n"
        in text
    )
    results["data"]["replicates"] = replicates(molecules=0, rows=0)
    assert "replicates" not in report_of(tmp_path, results)


def test_the_figure_of_trials_writes_settings_as_a_configuration_does() -> None:
    place = report_figures._placing([None, 2, True, "l1"])
    assert [place(value) for value in (None, 2, True, "l1")] == ["null", "2", "true", "l1"]
    numbers = report_figures._placing([1, 2.5])
    assert numbers(2.5) == 2.5


def test_the_line_of_equal_values_is_as_long_as_bounds_on_both_sides_need() -> None:
    bounds = LabelBounds(at_least=np.array([[np.nan], [2.0]]), at_most=np.array([[np.nan], [9.0]]))
    task = {"columns": ["y"], "unit": ""}
    labels, predictions = np.array([[5.0], [np.nan]]), np.array([[4.0], [3.0]])
    ends = report_figures._draw_parity(Figure().subplots(), task, labels, predictions, bounds)
    assert ends == (2.0, 9.0)
