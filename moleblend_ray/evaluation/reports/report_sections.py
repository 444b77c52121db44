"""What reports of a split and of a cross-validation tell of molecules, labels, intervals and models, in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from moleblend_ray.evaluation.reports.score_text import score_text, share_text, short, table_cell

_PART_NAMES: Final = {"train": "training", "valid": "validation", "test": "test"}

MAX_COLUMN_ROWS: Final = 50
"""Label columns of which a report tells; ``results.json`` has all."""


def unreadable_line(count: int, task: Mapping[str, Any], final: Mapping[str, Any]) -> list[str]:
    """How many cells of the source hold something else than a number."""
    if not count:
        return []
    are, advice = "are no numbers", ""
    if "bounds" in final:
        are = "are neither numbers nor bounds"
    elif task["kind"] == "regression":
        advice = "; `task.censored=true` trains on those that are bounds, such as `>10`"
    return [f"- {count:,} label(s) in the source {are} and count as missing{advice}"]


def distinct_line(data: Mapping[str, Any]) -> list[str]:
    """How many molecules are different, if not all are."""
    distinct = data.get("repeats", {}).get("distinct", data["molecules"])
    if distinct == data["molecules"]:
        return []
    return [
        f"- {distinct:,} of them are different: the others are repeats, or other salts, protonation states or tautomers"
    ]


def replicates_line(task: Mapping[str, Any], replicates: Mapping[str, Any] | None) -> list[str]:
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


def bounds_remark(bounds: Mapping[str, Any] | None) -> str:
    """Says that not all labels of these molecules are numbers."""
    count = sum(found["test_bounds"] for found in (bounds or {}).values())
    return f" Of {count:,} of their labels only a bound is known." if count else ""


def remark_of_more(columns: Mapping[str, Any]) -> list[str]:
    """Says that a table has not all ``columns``, if it has not."""
    if len(columns) <= MAX_COLUMN_ROWS:
        return []
    return ["", f"The first {MAX_COLUMN_ROWS}; all {len(columns)} are in `results.json`."]


def refit_sentence(molecules: int) -> str:
    """What to do for models that know all molecules; the scored ones know those of training."""
    return (
        f"`moleblend refit results=OUT out=NEW`, with the address of this directory for OUT, trains the chosen settings on all {molecules:,} "
        "molecules, for use once the score is known."
    )


def count_text(counts: Mapping[str, int]) -> str:
    """Number of labels, and of classes that of ones."""
    positives = f" ({counts['positives']:,})" if "positives" in counts else ""
    return f"{counts['labels']:,}{positives}"


def intervals_section(
    task: Mapping[str, Any], intervals: Mapping[str, Any] | None, *, of_folds: bool = False
) -> list[str]:
    """How wide the intervals of predictions are, and whether they hold what they say for the test part, or, ``of_folds``, those from
    the other folds of a cross-validation for each."""
    if not intervals:
        return []
    share = f"{intervals['coverage']:.0%}".replace("%", " %")
    unit = f", {table_cell(task['unit'])}" if task["unit"] else ""
    lines = [
        f"`moleblend predict` gives intervals that hold {share} of the labels of molecules like those of validation. The last "
        + (
            "column tells how many labels are inside if the width is that of the other folds, in which they had no part."
            if of_folds
            else "column tells how many labels of the test part are inside; they had no part in the widths."
        ),
        "",
        f"| column | prediction ±{unit} | validation labels | test labels inside |",
        "|---|---|---|---|",
    ]
    columns = intervals["columns"]
    lines += [_interval_row(name, found) for name, found in list(columns.items())[:MAX_COLUMN_ROWS]]
    return [*lines, *remark_of_more(columns), ""]


def class_sets_section(sets: Mapping[str, Any] | None, *, of_folds: bool = False) -> list[str]:
    """How often the sets of classes tell something, and whether they hold what they say for the test part, or, ``of_folds``, those
    from the other folds of a cross-validation for each."""
    if not sets:
        return []
    share = f"{sets['coverage']:.0%}".replace("%", " %")
    lines = [
        f"`moleblend predict` gives each molecule the classes that it goes with, so that {share} of those like the validation "
        "molecules of each class have it in their set. "
        + (
            "The other columns are of sets from the other folds, in which a molecule had no part."
            if of_folds
            else "The last columns tell how many of the test part do; they had no part in this."
        ),
        "",
        "| column | validation labels 0, 1 | sets of one class | both | neither | test 0 inside | test 1 inside |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = sets["columns"]
    for name, found in list(columns.items())[:MAX_COLUMN_ROWS]:
        words = found["test_sets"]
        inside = zip(found["test_inside"], found["test_labels"], strict=True)
        cells = [
            table_cell(name),
            ", ".join(f"{count:,}" for count in found["valid_labels"]),
            *(f"{count:,}" for count in (words["0"] + words["1"], words["both"], words["neither"])),
            *(share_text(*counts) for counts in inside),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *remark_of_more(columns), ""]


def alternatives_section(alternatives: Mapping[str, Any] | None) -> list[str]:
    """How often the most probable class is right, of columns of classes in words, and which are taken for which."""
    lines: list[str] = []
    for name, found in (alternatives or {}).items():
        words, counts = found["classes"], found["test_confusion"]
        right = sum(row[index] for index, row in enumerate(counts))
        recalls = [row[index] / sum(row) for index, row in enumerate(counts) if any(row)]
        balanced = sum(recalls) / len(recalls) if recalls else 0.0
        lines += [
            f"`moleblend predict` also names the most probable class of {table_cell(name)}, by the mean of all models. It is right for "
            f"{share_text(right, sum(map(sum, counts)))} of the test molecules of which the class is known; the mean over classes "
            f"(balanced accuracy) is {100 * balanced:.0f} %, and by chance {100 / len(words):.0f} %:",
            "",
            f"| class | {' | '.join(f'predicted {table_cell(word)}' for word in words)} |",
            "|---" * (len(words) + 1) + "|",
            *(
                f"| {table_cell(word)} | {' | '.join(f'{count:,}' for count in row)} |"
                for word, row in zip(words, counts, strict=True)
            ),
            "",
        ]
    return lines


def bounds_section(
    task: Mapping[str, Any], labels: Mapping[str, Any], bounds: Mapping[str, Any] | None
) -> list[str]:
    """How many labels are bounds, and what predictions make of those of the test part."""
    if not bounds:
        return []
    unit = f", {table_cell(task['unit'])}" if task["unit"] else ""
    # A cross-validation tests on all molecules.
    parts = list(next(iter(labels.values())))
    lines = [
        "Of some labels only a bound is known, such as `>10`. A prediction respects it if it is on the side where the label is; "
        "otherwise its distance to the bound is its error, in training and in scores. Correlations and intervals are of measured "
        "labels alone. The distance below is the root mean square over all bounds of the test part, 0 for those respected.",
        "",
        f"| column | {' | '.join(f'{_PART_NAMES[part]} bounds' for part in parts)} | test bounds respected | distance{unit} |",
        "|---" * (len(parts) + 3) + "|",
    ]
    for name, found in list(bounds.items())[:MAX_COLUMN_ROWS]:
        counts = [f"{labels[name][part]['bounds']:,}" for part in parts]
        distance = found["test_distance"]
        told = [
            share_text(found["test_respected"], found["test_bounds"]),
            "" if distance is None else score_text(distance),
        ]
        lines.append(f"| {' | '.join([table_cell(name), *counts, *told])} |")
    return [*lines, *remark_of_more(bounds), ""]


def figure_remark(final: Mapping[str, Any]) -> list[str]:
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
        cells[3] = share_text(inside, total)
    return f"| {' | '.join(cells)} |"


def start_sentence(checkpoint: Mapping[str, Any]) -> str:
    """What the models started from; their settings follow."""
    if checkpoint["uri"] is None:
        return "Trained from scratch with these settings:"
    return f"Fine-tuned from `{checkpoint['uri']}` (weights `{checkpoint['fingerprint']}`) with these settings:"


def facts(values: Mapping[str, Any]) -> list[str]:
    """A table of names and values."""
    return [
        "| | |",
        "|---|---|",
        *(f"| {table_cell(name)} | {short(value)} |" for name, value in values.items()),
    ]
