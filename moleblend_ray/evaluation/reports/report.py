"""A report for chemists: what was tried, what was chosen and why, test scores beside those of baselines, plots."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.files import storage
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.reports.report_figures import predictions_figure, trials_figure
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
from moleblend_ray.evaluation.reports.score_text import (
    metric_name,
    rank_key,
    score_text,
    short,
    table_cell,
)
from moleblend_ray.evaluation.results.result_files import REPORT_NAME

_MAX_TRIAL_ROWS = 50


def write_report(
    out: str,
    results: Mapping[str, Any],
    test_labels: NDArray[np.float64],
    test_predictions: NDArray[np.float64],
    test_bounds: LabelBounds | None = None,
) -> str:
    """Write ``report.md`` and its figures to ``out``; of the test molecules (M, T) labels, means of the predictions of all
    seeds, and bounds of labels that have no number."""
    task, final = results["task"], results["final"]
    seeds = final["seeds"]
    models = f"mean of {len(seeds)} models" if len(seeds) > 1 else f"seed {seeds[0]['seed']}"
    drawn = predictions_figure(
        task,
        test_labels,
        test_predictions,
        models=models,
        intervals=final.get("intervals"),
        bounds=test_bounds,
    )
    figures = {"test.png": drawn}
    trials = results.get("trials", [])
    if sum(trial["valid_score"] is not None for trial in trials) > 1:
        figures["trials.png"] = trials_figure(trials, results["chosen"], metric_name(task))
    for name, image in figures.items():
        storage.write_bytes(storage.join(out, "figures", name), image)
    uri = storage.join(out, REPORT_NAME)
    storage.write_bytes(uri, _text(results, trials, tuple(figures)).encode())
    return uri


def _text(
    results: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], figures: Sequence[str]
) -> str:
    task, data, split = results["task"], results["data"], results["data"]["split"]
    metric = metric_name(task)
    direction = "higher is better" if task["higher_is_better"] else "lower is better"
    lines = [
        f"# {task['name']}",
        "",
        f"{metric} ({direction}) on {split['test']} test molecules{_unseen_remark(data)}."
        + _left_out_remark(task, results["final"])
        + bounds_remark(results["final"].get("bounds")),
        "",
        *_seen_lines(data),
        "| model | validation | test, mean ± std | 95 % interval | test, each seed |",
        "|---|---|---|---|---|",
        *score_rows(task, results["final"], results["baselines"]),
        "",
        *comparison(task, results["final"], results["baselines"]),
        *differences_section(results),
        *other_scores_section(task, (results["final"], *results["baselines"])),
        *intervals_section(task, results["final"].get("intervals")),
        *class_sets_section(results["final"].get("class_sets")),
        *alternatives_section(results["final"].get("alternatives")),
        *bounds_section(task, data.get("labels", {}), results["final"].get("bounds")),
        f"![test molecules](figures/{figures[0]})",
        *figure_remark(results["final"]),
        "",
        "## Molecules",
        "",
        f"- {data['molecules']:,} molecules ({data['with_coordinates']:,} with coordinates), "
        f"{len(task['columns'])} label column(s); {data['unlabelled']:,} without a label and "
        f"{data['quarantined']:,} unusable rows left out",
        *unreadable_line(data.get("unreadable_labels", 0), task, results["final"]),
        *distinct_line(data),
        *replicates_line(task, data.get("replicates")),
        f"- split {split['kind']}: {split['train']:,} / {split['valid']:,} / {split['test']:,}, hash `{split['hash']}`",
        *_similarity_line(data.get("similarity"), split["test"]),
        f"- data fingerprint `{data['fingerprint']}`",
        f"- source: {task['citation']}",
        "",
        *_columns_section(task, data.get("labels", {}), results["final"]),
        "## Model",
        "",
        start_sentence(results["checkpoint"]),
        "",
        *facts(results["chosen"]),
    ]
    if "fold" not in split:
        lines += ["", _use_text(results)]
    if results["baselines"] or results["baselines_absent"]:
        lines += ["", *_baselines_section(results["baselines"], results["baselines_absent"])]
    if trials:
        lines += ["", *_trials_section(task, trials, "trials.png" in figures)]
    lines += ["", "## Versions", "", *facts(results["versions"]), ""]
    return "\n".join(lines)


def _use_text(results: Mapping[str, Any]) -> str:
    """What predicts, and what it has not learned from."""
    data, seeds = results["data"], results["final"]["seeds"]
    models = (
        f"the mean of all {len(seeds)} models" if len(seeds) > 1 else "predictions of the model"
    )
    return (
        f"`moleblend predict` with this directory gives {models}, trained on {data['split']['train']:,} molecules. "
        + refit_sentence(data["molecules"])
    )


def _similarity_line(similarity: Mapping[str, Any] | None, num_test: int) -> list[str]:
    """How much the test molecules resemble those of training; results of earlier versions do not tell."""
    if similarity is None:
        return []
    return [
        f"- similarity of test molecules to the nearest training molecule (Tanimoto, ECFP4): median {similarity['median']:.2f}, 5th and "
        f"95th percentile {similarity['percentile_5']:.2f} and {similarity['percentile_95']:.2f}; {similarity['in_domain']:,} of "
        f"{num_test:,} reach {similarity['threshold']:.2f}, as 95 % of the training molecules do among themselves"
    ]


def _unseen_remark(data: Mapping[str, Any]) -> str:
    if data.get("repeats", {}).get("test_seen"):
        return ""
    return " that took no part in training or in any choice"


def _seen_lines(data: Mapping[str, Any]) -> list[str]:
    """Says that scores are of molecules that took part in training or in choices."""
    repeats, split = data.get("repeats", {}), data["split"]
    lines = []
    if repeats.get("test_seen"):
        lines.append(
            f"**{repeats['test_seen']:,} of the {split['test']:,} test molecules are also among those for training or "
            "validation**, as they are or as another salt, protonation state or tautomer. Their scores may be better than those of new ones."
        )
    if repeats.get("valid_seen"):
        lines.append(
            f"{repeats['valid_seen']:,} of the {split['valid']:,} validation molecules are among those for training in "
            "this way."
        )
    return [*lines, ""] if lines else []


def _left_out_remark(task: Mapping[str, Any], final: Mapping[str, Any]) -> str:
    """Says how many columns the score is of, if not of all."""
    num_left_out = len(final["seeds"][0]["columns_left_out"])
    if not num_left_out:
        return ""
    total = len(task["columns"])
    return (
        f" It is the mean over {total - num_left_out} of the {total} label columns; the others cannot be scored there "
        "([label columns](#label-columns))."
    )


def _columns_section(
    task: Mapping[str, Any], labels: Mapping[str, Any], final: Mapping[str, Any]
) -> list[str]:
    """How many labels each column has in each part, and its test score; missing labels make both differ by column."""
    if not labels:
        return []
    counted = "labels (of these, class 1)" if task["kind"] == "classification" else "labels"
    lines = [
        "## Label columns",
        "",
        f"The {counted} of each part, and the test score of {final['name']}, mean over seeds.",
        "",
        f"| column | training | validation | test | {table_cell(metric_name(task))} |",
        "|---|---|---|---|---|",
    ]
    for column, parts in list(labels.items())[:MAX_COLUMN_ROWS]:
        counts = [count_text(parts[part]) for part in ("train", "valid", "test")]
        scores = [
            seed["test_columns"][column]
            for seed in final["seeds"]
            if column in seed["test_columns"]
        ]
        score = score_text(float(np.mean(scores))) if scores else "none"
        lines.append(f"| {' | '.join([table_cell(column), *counts, score])} |")
    return [*lines, *remark_of_more(labels), ""]


def _baselines_section(
    baselines: Sequence[Mapping[str, Any]], absent: Mapping[str, str]
) -> list[str]:
    """How the settings of the baselines were chosen, and which baselines are missing."""
    lines = ["## Baselines", ""]
    if baselines:
        lines += ["| baseline | settings chosen on validation | tried |", "|---|---|---|"]
        lines += [
            f"| {entry['name']} | {_chosen_text(entry)} | {len(entry['candidates']) or 1} |"
            for entry in baselines
        ]
        # Else renderers other than GitHub's take what follows for rows of the table.
        lines += [""] if absent else []
    lines += [f"- {BaselineKind(kind).label}: absent, {reason}" for kind, reason in absent.items()]
    return lines


def _chosen_text(entry: Mapping[str, Any]) -> str:
    """The chosen settings among which there was a choice."""
    varied = dict.fromkeys(name for one in entry["candidates"] for name in one["settings"])
    if not varied:
        return "those of the model"
    return ", ".join(f"{name}={short(entry['chosen'][name])}" for name in varied)


def _trials_section(
    task: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], has_figure: bool
) -> list[str]:
    names = list(dict.fromkeys(name for trial in trials for name in trial["settings"]))
    ranked = sorted(
        trials, key=lambda trial: rank_key(trial["valid_score"], task["higher_is_better"])
    )
    lines = [
        "## Trials",
        "",
        f"{len(trials)} configuration{'s' * (len(trials) != 1)}, judged on the validation molecules. "
        "`stopped`: worse than others after the same number of epochs.",
        "",
    ]
    if has_figure:
        lines += ["![trials](figures/trials.png)", ""]
    lines += [
        f"| trial | {' | '.join(map(table_cell, names))} | epochs done | status | validation |",
        "|---" * (len(names) + 4) + "|",
    ]
    for trial in ranked[:_MAX_TRIAL_ROWS]:
        settings = " | ".join(short(trial["settings"].get(name, "")) for name in names)
        score = "" if trial["valid_score"] is None else score_text(trial["valid_score"])
        lines.append(
            f"| {trial['number']} | {settings} | {trial['epochs']} | {trial['status']} | {score} |"
        )
    if len(ranked) > _MAX_TRIAL_ROWS:
        lines += ["", f"The best {_MAX_TRIAL_ROWS}; all {len(ranked)} are in `results.json`."]
    errors = [trial for trial in trials if trial["error"]]
    return lines + [_failure(trial) for trial in errors]


def _failure(trial: Mapping[str, Any]) -> str:
    """What a trial ended with, word for word: an indented block, in which nothing is Markdown."""
    error = textwrap.indent(trial["error"].strip(), "    ")
    return f"\nTrial {trial['number']} failed:\n\n{error}"
