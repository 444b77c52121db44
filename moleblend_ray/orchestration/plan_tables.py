"""The report of `moleblend plan` as tables for a terminal."""

from __future__ import annotations

from typing import Final

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moleblend_ray.config.compose import compose, group_choices
from moleblend_ray.config.describe import redact
from moleblend_ray.config.plan import PlanConfig
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.orchestration.plan import PlanReport
from moleblend_ray.orchestration.progress.terminal import (
    ExplainedTable,
    ShellCommand,
    facts_table,
    headed_table,
    stacked,
)
from moleblend_ray.planning.figures import Basis, Figure
from moleblend_ray.planning.plan import Plan, Stage
from moleblend_ray.quantities import bytes_text, duration_text, number_text
from moleblend_ray.settings import build, to_dict

_COLOURS: Final = {
    Basis.GIVEN: "cyan",
    Basis.MEASURED: "green",
    Basis.ASSUMED: "yellow",
    Basis.COMPUTED: "dim",
}


def show_plan(report: PlanReport) -> RenderableType:
    """The report of :func:`plan` for a terminal."""
    plan = report.plan
    return stacked(
        _summary(plan),
        *(_stage(stage) for stage in plan.stages),
        _resources(plan),
        _changes(plan),
        _scaling(plan),
        _command(plan, report.config),
        _foot(report),
    )


def _summary(plan: Plan) -> Table:
    table = facts_table()
    table.add_row("plan", f"[bold]{escape(plan.title)}[/]")
    table.add_row("rate", f"{_value(plan.rate)}, limited by [bold]{escape(plan.binding)}[/]")
    for row in plan.total:
        what = "time" if row.what == "hours" else row.what
        table.add_row(what, f"[bold]{_value(row.figure)}[/]  ({row.figure.source})")
    return table


def _stage(stage: Stage) -> ExplainedTable:
    table = ExplainedTable("", "value", "basis", "how", title=stage.name)
    rows: list[tuple[str, Figure, str]] = [("time", stage.hours, "")]
    rows += [("cost", stage.cost, "")] if stage.cost is not None else []
    rows += [(row.what, row.figure, row.remark) for row in stage.rows]
    for what, figure, remark in rows:
        how = "; ".join(filter(None, (figure.source, remark)))
        table.add_row(what, _value(figure), _basis(figure), escape(how))
    return table


def _resources(plan: Plan) -> ExplainedTable:
    title = "what could limit pretraining"
    table = ExplainedTable(
        "resource", "carries", "in use", "basis", "", numbers=(1, 2), title=title
    )
    for resource in plan.resources:
        table.add_row(
            resource.name,
            _value(resource.capacity),
            f"{100 * resource.use:.0f} %",
            _basis(resource.capacity),
            escape(resource.detail),
        )
    return table


def _changes(plan: Plan) -> Table:
    title = "effect of doubling one thing (the rest as above)"
    table = headed_table("doubled", "rate", "time", "cost", numbers=(1, 2, 3), title=title)
    for change in plan.changes:
        cost = "" if change.cost is None else f"x {change.cost:.2f}"
        table.add_row(change.what, f"x {change.rate:.2f}", f"x {change.hours:.2f}", cost)
    return table


def _scaling(plan: Plan) -> Table:
    table = headed_table(
        "trainers",
        "CPU nodes",
        "molecules/s",
        "time",
        "cost",
        "goodput",
        "limited by",
        numbers=range(6),
        title="other numbers of trainers, with as many CPU nodes as they need",
    )
    for point in plan.scaling:
        table.add_row(
            f"{point.workers:,}",
            f"{point.cpu_nodes:,}",
            number_text(point.molecules_per_s),
            _time(point.hours),
            "" if point.cost is None else number_text(point.cost),
            f"{100 * point.goodput:.1f} %",
            point.binding,
        )
    return table


def _command(plan: Plan, config: PlanConfig) -> Group:
    data = str(redact(config.data)) if config.data else "DATA"
    settings = [f"{name}={value}" for name, value in plan.settings.items()]
    words = ["moleblend", "pretrain", f"data={data}", "out=RUN", *_model_words(config.model)]
    title = Text("settings that the plan assumes", style="bold")
    return Group(title, ShellCommand(words=[*words, *settings]))


def _model_words(model: ModelConfig) -> list[str]:
    """The model as words of a command line: the most similar preset, and the settings that differ."""
    wanted = to_dict(model)
    presets = {
        name: compose("plan", [f"model={name}"]).get("model", {}) for name in group_choices("model")
    }
    full = {name: to_dict(build(ModelConfig, values)) for name, values in presets.items()}
    changes = {
        name: {key: value for key, value in wanted.items() if preset[key] != value}
        for name, preset in full.items()
    }
    nearest = min(changes, key=lambda name: len(changes[name]))
    words = [f"model.{key}={str(value).lower()}" for key, value in changes[nearest].items()]
    return [f"model={nearest}", *words]


def _foot(report: PlanReport) -> Text:
    plan = report.plan
    text = Text()
    if plan.assumptions:
        text.append("assumed, not measured: ", style="bold yellow")
        text.append("; ".join(plan.assumptions) + ".\n", style="yellow")
        if report.config.rate is None and not report.config.measure:
            text.append(
                "Measure one trainer (molecules_per_s of a short run) and give it as rate=.\n"
            )
    for line in plan.hints:
        text.append(f"hint: {line}\n", style="cyan")
    for line in plan.warnings:
        text.append(f"warning: {line}\n", style="bold red")
    text.append(
        "given: set by you. measured: by a benchmark of this project, or just now on this machine. computed: by a "
        "formula; computed*: rests on an assumption.",
        style="dim",
    )
    for uri in report.written:
        text.append(f"\nwritten: {redact(uri)}")
    return text


def _basis(figure: Figure) -> str:
    star = "*" if figure.basis is Basis.COMPUTED and figure.rests_on else ""
    colour = "yellow" if star else _COLOURS[figure.basis]
    return f"[{colour}]{figure.basis.value}{star}[/]"


def _value(figure: Figure) -> str:
    if figure.unit in ("B", "B/s"):
        return bytes_text(figure.value) + figure.unit[1:]
    if figure.unit == "s":
        return duration_text(figure.value, "never")
    if figure.unit == "h":
        return _time(figure.value)
    return f"{number_text(figure.value)} {figure.unit}".rstrip()


def _time(hours: float) -> str:
    return duration_text(3600 * hours, "never")
