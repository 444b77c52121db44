"""The figures of a report: predictions against labels of the test molecules, and the trials of a sweep."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.reports.score_text import figure_text


def predictions_figure(
    task: Mapping[str, Any],
    labels: NDArray[np.float64],
    predictions: NDArray[np.float64],
    *,
    models: str,
    intervals: Mapping[str, Any] | None = None,
    bounds: LabelBounds | None = None,
    folds: Sequence[slice] = (slice(None),),
) -> bytes:
    """The (M, T) labels and predictions of the test molecules as a PNG: curves of classes, or points.

    ``folds`` are the rows that were predicted by the same models, and have a curve each: scores of different models need not be on
    one scale. ``models`` says in the title whose predictions they are. The ``intervals`` of a single property are drawn, and labels of
    which only ``bounds`` are known, as triangles that point to where they are.
    """
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    if task["kind"] == "classification":
        _draw_roc(axes, task["columns"], labels, predictions, folds)
    else:
        ends = _draw_parity(axes, task, labels, predictions, bounds)
        if intervals and len(task["columns"]) == 1:
            _draw_interval(axes, intervals["columns"][task["columns"][0]]["half_width"], *ends)
    axes.set_title(f"{figure_text(task['name'])}: test molecules, {models}")
    return _png(figure)


def _draw_roc(
    axes: Axes,
    columns: Sequence[str],
    labels: NDArray[np.float64],
    predictions: NDArray[np.float64],
    folds: Sequence[slice],
) -> None:
    few = len(columns) <= 6
    for index, column in enumerate(columns):
        label = figure_text(column) if few else None
        for rows in folds:
            own, predicted = labels[rows, index], predictions[rows, index]
            known = ~np.isnan(own)
            if len(np.unique(own[known])) < 2:
                continue
            false_rate, true_rate, _ = roc_curve(own[known], predicted[known])
            axes.plot(
                false_rate,
                true_rate,
                color=f"C{index % 10}",
                label=label,
                alpha=(1.0 if few else 0.3) / len(folds) ** 0.25,
                linewidth=1.5 if len(folds) == 1 else 1.0,
            )
            label = None
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    if few:
        axes.legend(loc="lower right", fontsize=8)


def _draw_parity(
    axes: Axes,
    task: Mapping[str, Any],
    labels: NDArray[np.float64],
    predictions: NDArray[np.float64],
    bounds: LabelBounds | None,
) -> tuple[float, float]:
    """Points, and a line where labels equal predictions; returns its ends."""
    shown = [labels] if bounds is None else [labels, bounds.at_least, bounds.at_most]
    for index, column in enumerate(task["columns"]):
        label = figure_text(column)
        points = axes.scatter(labels[:, index], predictions[:, index], s=8, alpha=0.6, label=label)
        for side, marker in ((bounds.at_least, ">"), (bounds.at_most, "<")) if bounds else ():
            axes.scatter(
                side[:, index],
                predictions[:, index],
                s=12,
                alpha=0.6,
                marker=marker,
                facecolors="none",
                edgecolors=points.get_facecolor(),
            )
    low = float(min(np.nanmin(shown), predictions.min()))
    high = float(max(np.nanmax(shown), predictions.max()))
    axes.plot([low, high], [low, high], color="grey", linestyle=":", linewidth=1)
    unit = f" ({figure_text(task['unit'])})" if task["unit"] else ""
    axes.set(xlabel=f"measured{unit}", ylabel=f"predicted{unit}")
    if 1 < len(task["columns"]) <= 6:
        axes.legend(fontsize=8)
    return low, high


def _draw_interval(axes: Axes, half_width: float | None, low: float, high: float) -> None:
    """Where labels are inside the intervals of their predictions."""
    if half_width is not None:
        ends = np.array([low, high])
        axes.fill_between(
            ends, ends - half_width, ends + half_width, color="grey", alpha=0.12, lw=0
        )


def trials_figure(
    trials: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], score_name: str
) -> bytes:
    """The validation scores of trials by each of their settings, with the ``chosen`` ones marked, as a PNG."""
    scored = [trial for trial in trials if trial["valid_score"] is not None]
    names = list(dict.fromkeys(name for trial in scored for name in trial["settings"]))
    figure = Figure(figsize=(3.2 * len(names), 3.2), layout="constrained")
    row = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(row, names, strict=True):
        place = _placing([trial["settings"][name] for trial in scored])
        for status, colour in (("finished", "tab:blue"), ("stopped", "tab:orange")):
            shown = [t for t in scored if (t["status"] == "stopped") == (status == "stopped")]
            values = [place(trial["settings"][name]) for trial in shown]
            scores = [trial["valid_score"] for trial in shown]
            if shown:
                axes.scatter(values, scores, c=colour, s=14, label=status)
        axes.axvline(place(chosen[name]), color="grey", linestyle=":", linewidth=1, label="chosen")
        axes.set_xlabel(name)
        set_scale(axes, name, [trial["settings"][name] for trial in scored])
    row[0].set_ylabel(f"validation {figure_text(score_name)}")
    row[0].legend(fontsize="small")
    return _png(figure)


def set_scale(axes: Axes, name: str, values: Sequence[Any]) -> None:
    """Scale and ticks of the x axis for the ``values`` of the setting ``name``, so that each can be read off: whole numbers
    are marked where they are, and a logarithmic axis of little more than one decade has more than its power of ten."""
    numbers = [value for value in values if type(value) in (int, float)]
    if name in ("learning_rate", "weight_decay"):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        positive = [value for value in numbers if value > 0]
        if positive and max(positive) < 30 * min(positive):
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif numbers and all(type(value) is int for value in values):
        if len(set(numbers)) <= 6:
            axes.set_xticks(sorted(set(numbers)))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _placing(values: Sequence[Any]) -> Callable[[Any], Any]:
    """Positions on an axis: numbers at their values; words, and numbers with nulls among them, side by side."""
    is_numeric = all(type(value) in (int, float) for value in values)
    return (lambda value: value) if is_numeric else _written


def _written(value: Any) -> str:
    """As a configuration writes it, and the tables of the report."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _png(figure: Figure) -> bytes:
    # A Figure without pyplot uses Agg. The global state of pyplot is not safe in threads and workers.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
