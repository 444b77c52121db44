"""The report of a cross-validation, for chemists: scores over all folds beside those of baselines, and each fold's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moleblend_ray.data.files import storage
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.reports.report_figures import predictions_figure
from moleblend_ray.evaluation.reports.report_scores import (
    comparison,
    differences_section,
    other_scores_section,
    score_rows,
)
from moleblend_ray.evaluation.reports.report_sections import (
    MAX_COLUMN_ROWS,
    alternatives_section,
    bounds_remark,
    bounds_section,
    class_sets_section,
    count_text,
    distinct_line,
    facts,
    figure_remark,
    intervals_section,
    refit_sentence,
    remark_of_more,
    replicates_line,
    start_sentence,
    unreadable_line,
)
from moleblend_ray.evaluation.reports.score_text import metric_name, score_text, short, table_cell
from moleblend_ray.evaluation.results.result_files import OUT_OF_FOLD_NAME, REPORT_NAME
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions


def write_cross_validation_report(
    out: str, results: Mapping[str, Any], predictions: PartPredictions, rows: Sequence[slice]
) -> str:
    """Write ``report.md`` and its figure to ``out``; ``predictions`` are those of all molecules by models that they had no part in,
    of each fold in its ``rows``."""
    figure = predictions_figure(
        results["task"],
        predictions.labels,
        predictions.predictions,
        models=f"{len(results['folds'])} folds",
        intervals=results["final"].get("intervals"),
        bounds=predictions.bounds,
        folds=rows,
    )
    storage.write_bytes(storage.join(out, "figures", "test.png"), figure)
    uri = storage.join(out, REPORT_NAME)
    storage.write_bytes(uri, _text(results).encode())
    return uri


def _text(results: Mapping[str, Any]) -> str:
    task, data, final = results["task"], results["data"], results["final"]
    split, folds = data["split"], results["folds"]
    direction = "higher is better" if task["higher_is_better"] else "lower is better"
    lines = [
        f"# {task['name']}: cross-validation",
        "",
        f"{metric_name(task)} ({direction}), mean over {len(folds)} folds. Each of the {split['test']:,} molecules was tested once, "
        f"by models that were trained on {len(folds) - 2} other fold{'s' * (len(folds) > 3)} and chosen by one more."
        + _left_out_remark(task, final)
        + bounds_remark(final.get("bounds")),
        "",
        *_seen_lines(data),
        "| model | validation | test, mean ± std | 95 % interval | test, each fold |",
        "|---|---|---|---|---|",
        *score_rows(task, final, results["baselines"]),
        "",
        *comparison(task, final, results["baselines"]),
        *differences_section(results),
        *other_scores_section(task, (final, *results["baselines"])),
        *intervals_section(task, final.get("intervals"), of_folds=True),
        *class_sets_section(final.get("class_sets"), of_folds=True),
        *alternatives_section(final.get("alternatives")),
        *bounds_section(task, data["labels"], final.get("bounds")),
        "![test molecules](figures/test.png)",
        *(["", "One curve for each fold."] if task["kind"] == "classification" else []),
        *figure_remark(final),
        "",
        *_folds_section(folds),
        "## Molecules",
        "",
        f"- {data['molecules']:,} molecules ({data['with_coordinates']:,} with coordinates), "
        f"{len(task['columns'])} label column(s); {data['unlabelled']:,} without a label and "
        f"{data['quarantined']:,} unusable rows left out",
        *unreadable_line(data["unreadable_labels"], task, final),
        *distinct_line(data),
        *replicates_line(task, data["replicates"]),
        f"- folds by split {split['kind']}, hash `{split['hash']}`",
        f"- data fingerprint `{data['fingerprint']}`",
        f"- source: {task['citation']}",
        "",
        *_columns_section(task, data["labels"], final),
        "## Models",
        "",
        *_models_section(results),
        "",
        "## Versions",
        "",
        *facts(results["versions"]),
        "",
    ]
    return "\n".join(lines)


def _left_out_remark(task: Mapping[str, Any], final: Mapping[str, Any]) -> str:
    """Says that the score is not of all columns in all folds, if so."""
    if not any(seed["columns_left_out"] for seed in final["seeds"]):
        return ""
    return (
        f" In some folds it is the mean over fewer than the {len(task['columns'])} label columns, as the others cannot be scored there "
        "([label columns](#label-columns))."
    )


def _seen_lines(data: Mapping[str, Any]) -> list[str]:
    """Says that scores are of molecules that other folds have, too."""
    seen = data["repeats"]["test_seen"]
    if not seen:
        return []
    return [
        f"**{seen:,} of the {data['split']['test']:,} molecules are also in other folds**, as they are or as another salt, "
        "protonation state or tautomer. Their scores may be better than those of new ones.",
        "",
    ]


def _folds_section(folds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sizes of the parts and the scores of each fold."""
    names = [
        name
        for name in folds[0]["test_scores"]
        if all(name in fold["test_scores"] for fold in folds)
    ]
    lines = [
        "## Folds",
        "",
        f"Each fold has a report of its own. The predictions of all molecules are in `{OUT_OF_FOLD_NAME}`.",
        "",
        f"| fold | training | validation | test | {' | '.join(names)} |",
        "|---" * (len(names) + 4) + "|",
    ]
    for fold in folds:
        cells = [
            f"[{fold['fold']}]({fold['results']}/{REPORT_NAME})",
            *(f"{fold[part]:,}" for part in ("train", "valid", "test")),
            *(score_text(fold["test_scores"][name]) for name in names),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _columns_section(
    task: Mapping[str, Any], labels: Mapping[str, Any], final: Mapping[str, Any]
) -> list[str]:
    """How many labels each column has, and its score."""
    counted = "labels (of these, class 1)" if task["kind"] == "classification" else "labels"
    lines = [
        "## Label columns",
        "",
        f"The {counted}, and the test score of {final['name']}, mean over folds and seeds.",
        "",
        f"| column | labels | {table_cell(metric_name(task))} | folds without a score |",
        "|---|---|---|---|",
    ]
    num_folds = len({seed["fold"] for seed in final["seeds"]})
    for column, parts in list(labels.items())[:MAX_COLUMN_ROWS]:
        scored = [seed for seed in final["seeds"] if column in seed["test_columns"]]
        scores = [seed["test_columns"][column] for seed in scored]
        cells = [
            table_cell(column),
            count_text(parts["test"]),
            score_text(float(np.mean(scores))) if scores else "none",
            str(num_folds - len({seed["fold"] for seed in scored})),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *remark_of_more(labels), ""]


def _models_section(results: Mapping[str, Any]) -> list[str]:
    """What the models were trained with, how to use them, and which baselines are missing."""
    folds, chosen = results["folds"], results["chosen"]
    use = (
        f"`moleblend predict` with this directory gives the mean of all {len(results['final']['seeds'])} models. No molecule here is new "
        "to all of them, so this mean has no score of its own; it is usually better than that of a single one."
    )
    lines = [start_sentence(results["checkpoint"]), ""]
    if chosen is None:
        lines += [*_chosen_in_each(folds), "", use]
    else:
        lines += [*facts(chosen), "", f"{use} {refit_sentence(results['data']['molecules'])}"]
    absent = results["baselines_absent"]
    if absent:
        lines += [""]
    lines += [f"- {BaselineKind(kind).label}: absent, {reason}" for kind, reason in absent.items()]
    return lines


def _chosen_in_each(folds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that the search of each fold chose: one column for each fold."""
    lines = [
        f"| {' | '.join(['fold', *(str(fold['fold']) for fold in folds)])} |",
        "|---" * (len(folds) + 1) + "|",
        f"| {' | '.join(['trials', *(str(fold['trials']) for fold in folds)])} |",
    ]
    for name in folds[0]["chosen"]:
        values = (short(fold["chosen"][name]) for fold in folds)
        lines.append(f"| {' | '.join([table_cell(name), *values])} |")
    return lines
