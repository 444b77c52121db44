"""A chart of the hours and cost of pretraining for different numbers of trainers, with what limits each."""

from __future__ import annotations

import io
import textwrap
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from moleblend_ray.planning.plan import Plan, ScalePoint

_COLOURS: Final = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")


def plan_chart(plan: Plan, workers: int, kind: str) -> bytes:
    """The chart as a PNG; ``kind`` names the trainers ("GPUs")."""
    has_cost = any(point.cost for point in plan.scaling)
    figure = Canvas(figsize=(9.0 if has_cost else 5.0, 4.4), layout="constrained")
    axes = figure.subplots(1, 2 if has_cost else 1, squeeze=False)[0]
    hours = [point.hours for point in plan.scaling]
    _draw(axes[0], plan.scaling, hours, "hours of pretraining", workers, kind)
    first = plan.scaling[0]
    ideal = [first.hours * first.workers / point.workers for point in plan.scaling]
    axes[0].plot(
        [point.workers for point in plan.scaling],
        ideal,
        color="0.7",
        linestyle="--",
        linewidth=1,
        zorder=0,
        label="in proportion",
    )
    axes[0].legend(fontsize=8, frameon=False)
    if has_cost:
        costs = [point.cost or 0.0 for point in plan.scaling]
        _draw(axes[1], plan.scaling, costs, "cost of pretraining", workers, kind)
    rests = textwrap.fill(
        "assumed: " + ("; ".join(plan.assumptions) or "nothing"), 150 if has_cost else 84
    )
    figure.suptitle(f"{plan.title}\n{rests}", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def _draw(
    axes: Axes,
    points: tuple[ScalePoint, ...],
    values: list[float],
    label: str,
    workers: int,
    kind: str,
) -> None:
    sizes = [point.workers for point in points]
    axes.plot(sizes, values, color="0.4", linewidth=1, zorder=1)
    for index, binding in enumerate(dict.fromkeys(point.binding for point in points)):
        chosen = [
            (point.workers, value)
            for point, value in zip(points, values, strict=True)
            if point.binding == binding
        ]
        axes.scatter(
            [size for size, _ in chosen],
            [value for _, value in chosen],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            s=42,
            zorder=2,
            label=f"limited by {binding}",
        )
    axes.axvline(workers, color="0.85", linewidth=6, zorder=-1)
    axes.set_xscale("log", base=2)
    if min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.tick_params(axis="x", labelrotation=45 if len(sizes) > 8 else 0, labelsize=8)
    axes.set_xlabel(kind)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
