"""The figure of a leaderboard: the gain of each model over the best baseline, task by task."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moleblend_ray.evaluation.reports.leaderboard import Leaderboard, ModelScore, TaskRow
from moleblend_ray.evaluation.reports.score_text import figure_text

_GREY = "#808080"
# Distinct for colour-blind readers, and of medium lightness for white and black backgrounds.
_COLOURS = ("#3b8bc4", "#dd8a2e", "#3fa36d", "#b277c9", "#cf5f5a", "#a08a3c", "#5aa9b8", "#8c8c8c")
_MARKERS = "oDs^vPX*"

_LOWEST_GAIN = -100.0
"""Lowest gain shown, in percent: with a model that is many times worse the others would look alike."""


def gain_figure(board: Leaderboard) -> bytes | None:
    """:func:`draw_gains` as a PNG."""
    figure = draw_gains(board)
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, transparent=True)
    return buffer.getvalue()


def draw_gains(board: Leaderboard) -> Figure | None:
    """The gain of each model over the best baseline, with tasks on the y axis; None if no task has a baseline."""
    rows = [row for row in board.finished if row.reference is not None]
    models = board.models
    if not rows or not models:
        return None
    height = 1.4 + len(rows) * (0.26 + 0.09 * len(models))
    figure = Figure(figsize=(6, height), layout="constrained")
    axes = figure.subplots()
    for index, model in enumerate(models):
        _draw_model(axes, rows, model, index, len(models))
    axes.axvline(0.0, color=_GREY, linewidth=1)
    axes.set_yticks(range(len(rows)), [figure_text(name) for name in _names(rows)])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for line in range(1, len(rows)):
        axes.axhline(line - 0.5, color=_GREY, linewidth=0.4, alpha=0.5)
    label = "gain in the test score over the baseline that is best on validation, %"
    if axes.get_xlim()[0] < _LOWEST_GAIN:
        axes.set_xlim(left=1.03 * _LOWEST_GAIN)
        label += f"\n(models below {_LOWEST_GAIN:g} % stand at the edge)"
    axes.set_xlabel(label)
    _make_neutral(axes)
    figure.legend(
        loc="outside upper left", ncols=2, frameon=False, fontsize="small", labelcolor=_GREY
    )
    return figure


def _names(rows: Sequence[TaskRow]) -> list[str]:
    """The name of each task; where a task has several rows, also what tells them apart."""
    counts = Counter(row.name for row in rows)
    return [row.name if counts[row.name] == 1 else f"{row.name}\n{row.basis}" for row in rows]


def _draw_model(
    axes: Axes, rows: Sequence[TaskRow], model: ModelScore, index: int, count: int
) -> None:
    """The dots of one model with its standard deviation over seeds as bars, next to those of the other models."""
    points = [
        (place, gain)
        for place, row in enumerate(rows)
        if (score := row.score_of(model.name)) and (gain := row.gain(score)) is not None
    ]
    if not points:
        return
    offset = 0.0 if count == 1 else 0.6 * (index / (count - 1) - 0.5)
    axes.errorbar(
        [max(gain[0], _LOWEST_GAIN) for _, gain in points],
        [place + offset for place, _ in points],
        xerr=[gain[1] for _, gain in points],
        fmt=_MARKERS[index % len(_MARKERS)],
        markersize=4.5 if model.is_baseline else 6.5,
        color=_COLOURS[index % len(_COLOURS)],
        elinewidth=1.2,
        label=figure_text(model.name),
    )


def _make_neutral(axes: Axes) -> None:
    """Text and lines in a grey that is visible on a light and on a dark page."""
    axes.tick_params(colors=_GREY, labelcolor=_GREY)
    axes.xaxis.label.set_color(_GREY)
    for name, spine in axes.spines.items():
        spine.set_color(_GREY)
        spine.set_visible(name == "bottom")
    axes.tick_params(axis="y", length=0)
