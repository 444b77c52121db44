"""A report for chemists: what was tried, what was chosen and why, test scores beside those of baselines, plots."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data import storage
from moleblend_ray.evaluation.baselines import BaselineKind
from moleblend_ray.evaluation.censoring import LabelBounds
from moleblend_ray.evaluation.report_figures import predictions_figure, trials_figure
from moleblend_ray.evaluation.result_files import REPORT_NAME
from moleblend_ray.evaluation.score_text import (
    mean_and_std_text,
    score_text,
    table_cell,
    values_text,
)
from moleblend_ray.evaluation.tasks import Metric

_MAX_TRIAL_ROWS = 50
_MAX_COLUMN_ROWS = 50

_WITHOUT_INTERVAL = (
    "None is given where it would look surer than it is: of fewer than ten different test molecules or about five of a class, of a "
    "score that is the same in all draws (a perfect one), and of one that is too high on average, as a mean PR-AUC of columns with few "
    "positives is."
)


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
        figures["trials.png"] = trials_figure(trials, results["chosen"], _metric_name(task))
    for name, image in figures.items():
        storage.write_bytes(storage.join(out, "figures", name), image)
    uri = storage.join(out, REPORT_NAME)
    storage.write_bytes(uri, _text(results, trials, tuple(figures)).encode())
    return uri


def _text(
    results: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], figures: Sequence[str]
) -> str:
    task, data, split = results["task"], results["data"], results["data"]["split"]
    metric = _metric_name(task)
    direction = "higher is better" if task["higher_is_better"] else "lower is better"
    lines = [
        f"# {task['name']}",
        "",
        f"{metric} ({direction}) on {split['test']} test molecules{_unseen_remark(data)}."
        + _left_out_remark(task, results["final"])
        + _bounds_remark(results["final"].get("bounds")),
        "",
        *_seen_lines(data),
        "| model | validation | test, mean ± std | 95 % interval | test, each seed |",
        "|---|---|---|---|---|",
        *_score_rows(task, results["final"], results["baselines"]),
        "",
        *_comparison(task, results["final"], results["baselines"]),
        *_differences(results),
        *_other_scores(task, (results["final"], *results["baselines"])),
        *_intervals(task, results["final"].get("intervals")),
        *_class_sets(results["final"].get("class_sets")),
        *_bounds(task, data.get("labels", {}), results["final"].get("bounds")),
        f"![test molecules](figures/{figures[0]})",
        *_figure_remark(results["final"]),
        "",
        "## Molecules",
        "",
        f"- {data['molecules']:,} molecules ({data['with_coordinates']:,} with coordinates), "
        f"{len(task['columns'])} label column(s); {data['unlabelled']:,} without a label and "
        f"{data['quarantined']:,} unusable rows left out",
        *_unreadable_line(data.get("unreadable_labels", 0), task, results["final"]),
        *_distinct_line(data),
        *_replicates_line(task, data.get("replicates")),
        f"- split {split['kind']}: {split['train']:,} / {split['valid']:,} / {split['test']:,}, hash `{split['hash']}`",
        *_similarity_line(data.get("similarity"), split["test"]),
        f"- data fingerprint `{data['fingerprint']}`",
        f"- source: {task['citation']}",
        "",
        *_columns_section(task, data.get("labels", {}), results["final"]),
        "## Model",
        "",
        _start_sentence(results["checkpoint"]),
        "",
        *_table(results["chosen"]),
    ]
    if results["baselines"] or results["baselines_absent"]:
        lines += ["", *_baselines_section(results["baselines"], results["baselines_absent"])]
    if trials:
        lines += ["", *_trials_section(task, trials, "trials.png" in figures)]
    lines += ["", "## Versions", "", *_table(results["versions"]), ""]
    return "\n".join(lines)


def _similarity_line(similarity: Mapping[str, Any] | None, num_test: int) -> list[str]:
    """How much the test molecules resemble those of training; results of earlier versions do not tell."""
    if similarity is None:
        return []
    return [
        f"- similarity of test molecules to the nearest training molecule (Tanimoto, ECFP4): median {similarity['median']:.2f}, 5th and "
        f"95th percentile {similarity['percentile_5']:.2f} and {similarity['percentile_95']:.2f}; {similarity['in_domain']:,} of "
        f"{num_test:,} reach {similarity['threshold']:.2f}, as 95 % of the training molecules do among themselves"
    ]


def _unreadable_line(count: int, task: Mapping[str, Any], final: Mapping[str, Any]) -> list[str]:
    if not count:
        return []
    are, advice = "are no numbers", ""
    if "bounds" in final:
        are = "are neither numbers nor bounds"
    elif task["kind"] == "regression":
        advice = "; `task.censored=true` trains on those that are bounds, such as `>10`"
    return [f"- {count:,} label(s) in the source {are} and count as missing{advice}"]


def _distinct_line(data: Mapping[str, Any]) -> list[str]:
    distinct = data.get("repeats", {}).get("distinct", data["molecules"])
    if distinct == data["molecules"]:
        return []
    return [
        f"- {distinct:,} of them are different: the others are repeats, or other salts, protonation states or tautomers"
    ]


def _replicates_line(task: Mapping[str, Any], replicates: Mapping[str, Any] | None) -> list[str]:
    """How many molecules have several rows, what became of these, and how far their labels are apart."""
    if not replicates or not replicates["molecules"]:
        return []
    rule = replicates["rule"]
    became = (
        "each of which counts; `task.replicates=median` makes one of them"
        if rule == "keep"
        else f"of which each molecule has one, with their {rule}"
        if task["kind"] == "regression"
        else "of which each molecule has one, with the more frequent class"
    )
    text = f"- {replicates['molecules']:,} molecules had {replicates['rows']:,} rows, {became}{_spread_text(task, replicates['columns'])}"
    if replicates["undecided"]:
        text += (
            f". {replicates['undecided']:,} label(s) contradict each other and count as missing, and "
            f"{replicates['dropped']:,} molecule(s) without any other are left out"
        )
    return [text]


def _spread_text(task: Mapping[str, Any], columns: Mapping[str, Mapping[str, Any]]) -> str:
    """How far the labels of molecules that have several are apart; nothing if no molecule has."""
    several = {name: found for name, found in columns.items() if found["molecules"]}
    if not several:
        return ""
    if task["kind"] == "classification":
        mixed, total = (
            sum(found[key] for found in several.values()) for key in ("contradictory", "molecules")
        )
        return f". Of {total:,} labels given several times, {mixed:,} have both classes"
    ordered = sorted(several.items(), key=lambda item: item[1]["std"])
    ends = [f"{score_text(found['std'])} ({table_cell(name)})" for name, found in ordered]
    shown = score_text(ordered[0][1]["std"]) if len(ordered) == 1 else f"{ends[0]} to {ends[-1]}"
    unit = f" {task['unit']}" if task["unit"] else ""
    return (
        f". Labels of one molecule have a standard deviation of {shown}{unit}: the RMSE on single measurements of a model "
        "that knew the true values"
    )


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


def _bounds_remark(bounds: Mapping[str, Any] | None) -> str:
    """Says that not all labels of these molecules are numbers."""
    count = sum(found["test_bounds"] for found in (bounds or {}).values())
    return f" Of {count:,} of their labels only a bound is known." if count else ""


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
        f"| column | training | validation | test | {table_cell(_metric_name(task))} |",
        "|---|---|---|---|---|",
    ]
    for column, parts in list(labels.items())[:_MAX_COLUMN_ROWS]:
        counts = [_count_text(parts[part]) for part in ("train", "valid", "test")]
        scores = [
            seed["test_columns"][column]
            for seed in final["seeds"]
            if column in seed["test_columns"]
        ]
        score = score_text(float(np.mean(scores))) if scores else "none"
        lines.append(f"| {' | '.join([table_cell(column), *counts, score])} |")
    return [*lines, *_remark_of_more(labels), ""]


def _remark_of_more(columns: Mapping[str, Any]) -> list[str]:
    """Says that a table has not all ``columns``, if it has not."""
    if len(columns) <= _MAX_COLUMN_ROWS:
        return []
    return ["", f"The first {_MAX_COLUMN_ROWS}; all {len(columns)} are in `results.json`."]


def _count_text(counts: Mapping[str, int]) -> str:
    positives = f" ({counts['positives']:,})" if "positives" in counts else ""
    return f"{counts['labels']:,}{positives}"


def _score_rows(
    task: Mapping[str, Any], final: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The model (in bold) and the baselines, sorted by validation score, best first."""
    ranked = sorted(
        (final, *baselines),
        key=lambda entry: _rank(entry["valid"]["mean"], task["higher_is_better"]),
    )
    rows = []
    for entry in ranked:
        rows.append(_score_row(entry, is_bold=entry is final))
        if entry is final and "ensemble" in final:
            rows.append(_ensemble_row(final))
    return rows


def _score_row(entry: Mapping[str, Any], *, is_bold: bool) -> str:
    test, valid = entry["test"], entry["valid"]
    cells = [
        entry["name"],
        score_text(valid["mean"]),
        _mean_and_std(test),
        _limits_text(entry.get("test_interval"), test["mean"]),
    ]
    if is_bold:
        cells = [f"**{cell}**" if cell else "" for cell in cells]
    cells.append(values_text(test["mean"], test["values"]))
    return f"| {' | '.join(cells)} |"


def _ensemble_row(final: Mapping[str, Any]) -> str:
    """All seeds together: what a user of the predictions gets."""
    together = final["ensemble"]
    name = f"{_ensemble_name(final)}, as `moleblend predict` gives it"
    limits = _limits_text(together.get("test_interval"), together["test"])
    return f"| {name} | {score_text(together['valid'])} | {score_text(together['test'])} | {limits} | |"


def _limits_text(limits: Sequence[float] | None, like: float) -> str:
    """The limits of an interval, with the digits of the score ``like``; nothing of results that have none."""
    return " to ".join(score_text(limit, like) for limit in limits) if limits else ""


def _ensemble_name(final: Mapping[str, Any]) -> str:
    return f"mean of these {len(final['seeds'])} models"


def _mean_and_std(spread: Mapping[str, Any]) -> str:
    return mean_and_std_text(spread["mean"], spread["std"], len(spread["values"]))


def _comparison(
    task: Mapping[str, Any], final: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The model compared with the baseline that a user would have chosen without the test part."""
    if not baselines:
        return []
    best = min(baselines, key=lambda entry: _rank(entry["valid"]["mean"], task["higher_is_better"]))
    gain = _gain(task, final, best)
    verdict = "better" if gain > 0 else "worse"
    means = [entry["test"]["mean"] for entry in (best, final)]
    smallest = min(filter(None, means), key=abs, default=0.0)
    than = f"{score_text(abs(gain), smallest)} {verdict} in {_metric_name(task)} than"
    if gain == 0:
        than = f"as good in {_metric_name(task)} as"
    limits = best.get("model_is_better_by")
    is_unsure = limits is not None and limits[0] <= 0 <= limits[1]
    remark = (
        " With other test molecules it might be the other way round, see below."
        if is_unsure
        else ""
    )
    return [
        f"On the test molecules {final['name']} is {than} {best['name']}, the best of the baselines by validation.{remark}",
        "",
    ]


def _gain(task: Mapping[str, Any], final: Mapping[str, Any], baseline: Mapping[str, Any]) -> float:
    """By how much the model is better than a baseline on the test molecules; negative if it is worse."""
    difference: float = final["test"]["mean"] - baseline["test"]["mean"]
    return difference if task["higher_is_better"] else -difference


def _differences(results: Mapping[str, Any]) -> list[str]:
    """By how much the model is better than each baseline, and how sure that is; nothing of results of earlier versions."""
    task, final = results["task"], results["final"]
    if not results.get("resampling"):
        return []
    how = _about_intervals(results)
    compared = list(filter(_is_compared, results["baselines"]))
    if not compared:
        return [how, ""]
    lines = [
        f"{how} Differences are on the same draws, and so surer than the scores:",
        "",
        f"| {final['name']} compared with | better by (negative: worse) | 95 % interval |",
        "|---|---|---|",
    ]
    for entry in compared:
        gain, limits = _gain(task, final, entry), entry["model_is_better_by"]
        smallest = min(
            filter(None, (final["test"]["mean"], entry["test"]["mean"])), key=abs, default=0.0
        )
        lines.append(
            f"| {entry['name']} | {score_text(gain, smallest)} | {_limits_text(limits, smallest)} |"
        )
    return [*lines, ""]


def _about_intervals(results: Mapping[str, Any]) -> str:
    """What the intervals of scores and of differences are, and why some or all are absent."""
    entries = results["final"], results["final"].get("ensemble"), *results["baselines"]
    of_scores = [bool(entry.get("test_interval")) for entry in entries if entry]
    if not any(of_scores) and not any(map(_is_compared, results["baselines"])):
        return f"There are no 95 % intervals of scores. {_WITHOUT_INTERVAL}"
    resampling = results["resampling"]
    drawn = f"{resampling['units']:,} test molecules"
    if resampling["of"] == "scaffolds":
        drawn = f"{resampling['units']:,} scaffolds of the test molecules (one without rings counts as its own)"
    how = (
        f"95 % intervals are those of the scores on {resampling['draws']:,} draws of the {drawn}, with replacement: what other "
        "test molecules of this kind might have given. The deviation over seeds comes on top."
    )
    return how if all(of_scores) else f"{how} {_WITHOUT_INTERVAL}"


def _is_compared(baseline: Mapping[str, Any]) -> bool:
    """Whether there is an interval of the difference to it."""
    return bool(baseline.get("model_is_better_by"))


def _other_scores(task: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the other metrics say of the test part; nothing was chosen by them."""
    metrics = list(
        dict.fromkeys(name for entry in entries for name in entry.get("test_others", {}))
    )
    if not metrics:
        return []
    rows = []
    for entry in entries:
        others = entry.get("test_others", {})
        cells = [_mean_and_std(others[name]) if name in others else "" for name in metrics]
        rows.append(f"| {' | '.join([entry['name'], *cells])} |")
        if "ensemble" in entry:
            together = entry["ensemble"]["test_others"]
            cells = [score_text(together[name]) if name in together else "" for name in metrics]
            rows.append(f"| {' | '.join([_ensemble_name(entry), *cells])} |")
    # A unit such as log|S| must not end a cell.
    heads = [table_cell(_metric_name({**task, "metric": name})) for name in metrics]
    return [
        "Other scores of the same test predictions, by which nothing was chosen:",
        "",
        f"| model | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
        *rows,
        "",
    ]


def _intervals(task: Mapping[str, Any], intervals: Mapping[str, Any] | None) -> list[str]:
    """How wide the intervals of predictions are, and whether they hold what they say for the test part."""
    if not intervals:
        return []
    share = f"{intervals['coverage']:.0%}".replace("%", " %")
    unit = f", {table_cell(task['unit'])}" if task["unit"] else ""
    lines = [
        f"`moleblend predict` gives intervals that hold {share} of the labels of molecules like those of validation. The last "
        "column tells how many labels of the test part are inside; they had no part in the widths.",
        "",
        f"| column | prediction ±{unit} | validation labels | test labels inside |",
        "|---|---|---|---|",
    ]
    columns = intervals["columns"]
    lines += [
        _interval_row(name, found) for name, found in list(columns.items())[:_MAX_COLUMN_ROWS]
    ]
    return [*lines, *_remark_of_more(columns), ""]


def _class_sets(sets: Mapping[str, Any] | None) -> list[str]:
    """How often the sets of classes tell something, and whether they hold what they say for the test part."""
    if not sets:
        return []
    share = f"{sets['coverage']:.0%}".replace("%", " %")
    lines = [
        f"`moleblend predict` gives each molecule the classes that it goes with, so that {share} of those like the validation "
        "molecules of each class have it in their set. The last columns tell how many of the test part do; they had no part in this.",
        "",
        "| column | validation labels 0, 1 | sets of one class | both | neither | test 0 inside | test 1 inside |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = sets["columns"]
    for name, found in list(columns.items())[:_MAX_COLUMN_ROWS]:
        words = found["test_sets"]
        inside = zip(found["test_inside"], found["test_labels"], strict=True)
        cells = [
            table_cell(name),
            ", ".join(f"{count:,}" for count in found["valid_labels"]),
            *(f"{count:,}" for count in (words["0"] + words["1"], words["both"], words["neither"])),
            *(_share_text(*counts) for counts in inside),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *_remark_of_more(columns), ""]


def _bounds(
    task: Mapping[str, Any], labels: Mapping[str, Any], bounds: Mapping[str, Any] | None
) -> list[str]:
    """How many labels are bounds, and what predictions make of those of the test part."""
    if not bounds:
        return []
    unit = f", {table_cell(task['unit'])}" if task["unit"] else ""
    lines = [
        "Of some labels only a bound is known, such as `>10`. A prediction respects it if it is on the side where the label is; "
        "otherwise its distance to the bound is its error, in training and in scores. Correlations and intervals are of measured "
        "labels alone. The distance below is the root mean square over all bounds of the test part, 0 for those respected.",
        "",
        f"| column | training bounds | validation | test | test bounds respected | distance{unit} |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in list(bounds.items())[:_MAX_COLUMN_ROWS]:
        counts = [f"{labels[name][part]['bounds']:,}" for part in ("train", "valid", "test")]
        distance = found["test_distance"]
        told = [
            _share_text(found["test_respected"], found["test_bounds"]),
            "" if distance is None else score_text(distance),
        ]
        lines.append(f"| {' | '.join([table_cell(name), *counts, *told])} |")
    return [*lines, *_remark_of_more(bounds), ""]


def _share_text(part: int, total: int) -> str:
    return f"{part:,} of {total:,} ({100 * part / total:.0f} %)" if total else "none"


def _figure_remark(final: Mapping[str, Any]) -> list[str]:
    """What the grey band and the triangles of the figure are, if it has them."""
    parts = []
    intervals = (final.get("intervals") or {}).get("columns", {})
    widths = [found["half_width"] for found in intervals.values()]
    if len(widths) == 1 and widths[0] is not None:
        parts.append("Grey: labels inside their interval.")
    if any(found["test_bounds"] for found in final.get("bounds", {}).values()):
        parts.append("Triangles: bounds, which point to where the label is.")
    return ["", " ".join(parts)] if parts else []


def _interval_row(name: str, found: Mapping[str, Any]) -> str:
    width, inside, total = (found[key] for key in ("half_width", "test_inside", "test_labels"))
    cells = [table_cell(name), "too few labels", f"{found['valid_labels']:,}", ""]
    if width is not None:
        cells[1] = score_text(width)
        cells[3] = _share_text(inside, total)
    return f"| {' | '.join(cells)} |"


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
    return ", ".join(f"{name}={_short(entry['chosen'][name])}" for name in varied)


def _start_sentence(checkpoint: Mapping[str, Any]) -> str:
    if checkpoint["uri"] is None:
        return "Trained from scratch with these settings:"
    return f"Fine-tuned from `{checkpoint['uri']}` (weights `{checkpoint['fingerprint']}`) with these settings:"


def _table(values: Mapping[str, Any]) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        *(f"| {table_cell(name)} | {_short(value)} |" for name, value in values.items()),
    ]


def _trials_section(
    task: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], has_figure: bool
) -> list[str]:
    names = list(dict.fromkeys(name for trial in trials for name in trial["settings"]))
    ranked = sorted(trials, key=lambda trial: _rank(trial["valid_score"], task["higher_is_better"]))
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
        settings = " | ".join(_short(trial["settings"].get(name, "")) for name in names)
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


def _rank(score: float | None, higher_is_better: bool) -> float:
    if score is None:
        return np.inf
    return -score if higher_is_better else score


def _short(value: object) -> str:
    """A setting, for a cell of a table, as it is written in a configuration, numbers with three digits."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:.3g}" if isinstance(value, float) else table_cell(str(value))


def _metric_name(task: Mapping[str, Any]) -> str:
    metric = Metric(task["metric"])
    unit = f" in {task['unit']}" if task["unit"] and metric.is_error else ""
    return f"{metric.shown_name}{unit}"
