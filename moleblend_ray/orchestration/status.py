"""`moleblend status`: how far a command is, from the files that it writes. Needs neither Ray nor torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.describe import redact
from moleblend_ray.config.status import StatusConfig
from moleblend_ray.data.files import storage
from moleblend_ray.data.status import DataStatus, data_status, has_data_set
from moleblend_ray.errors import DataError, StorageError
from moleblend_ray.evaluation.results.result_files import LEADERBOARD_NAME, command_of
from moleblend_ray.evaluation.results.status import (
    PARTS_KINDS,
    REFIT_JOB,
    TRAINING_JOBS,
    BegunStatus,
    PartsStatus,
    RefitStatus,
    SweepStatus,
    TasksStatus,
    begun_status,
    parts_status,
    refit_status,
    sweep_status,
    tasks_status,
)
from moleblend_ray.orchestration.progress.terminal import (
    facts_table,
    headed_table,
    stacked,
    utc_text,
)
from moleblend_ray.quantities import bytes_text, duration_text
from moleblend_ray.training.commits import CONFIG_NAME
from moleblend_ray.training.status import RunStatus, run_status

Status = (
    RunStatus | SweepStatus | RefitStatus | TasksStatus | PartsStatus | BegunStatus | DataStatus
)

_STATE_STYLES: Final = {
    "finished": "bold green",
    "running": "bold cyan",
    "started": "bold yellow",
    "stopped": "bold yellow",
    "unfinished": "bold yellow",
    "stalled": "bold red",
    "damaged": "bold red",
    "failed": "bold red",
}
_TREND_SIGNS: Final = {"falling": "↘", "rising": "↗", "level": "→", "unknown": ""}
_BARS: Final = "▁▂▃▄▅▆▇█"
_MAX_CHECKPOINTS: Final = 8
_MAX_SOURCES: Final = 3
_PROGRESS_WIDTH: Final = 24
_WAIT_SHARE: Final = 0.1
"""Share of a step spent on waiting for data from which on it is highlighted."""


def status(config: StatusConfig) -> Status:
    """The state of the command that writes ``config.run``. Raises DataError if there is none."""
    uri = accepted(config, StatusConfig).run
    if has_data_set(uri):
        return data_status(uri)
    document = _document(uri)
    settings = document.get("config")
    job = str(settings.get("job")) if isinstance(settings, Mapping) else ""
    if job in PARTS_KINDS:
        return parts_status(uri, document)
    if job in TRAINING_JOBS:
        return sweep_status(uri, document)
    if job == REFIT_JOB:
        return refit_status(uri, document)
    if command_of(settings) == "pretrain":
        return run_status(uri, document)
    if storage.exists(storage.join(uri, f"{LEADERBOARD_NAME}.json")):
        return tasks_status(uri)
    if (begun := begun_status(uri)) is not None:
        return begun
    raise DataError(
        f"{uri} holds nothing that a command of moleblend began: expected the `out` of prepare, pretrain, sweep, "
        "finetune, refit, embed or predict. For a run give its own folder, not that of a checkpoint"
    )


def _document(uri: str) -> Mapping[str, Any]:
    """What the file of the settings holds; nothing if there is none, or one of another program."""
    try:
        value = storage.read_json(storage.join(uri, CONFIG_NAME))
    except storage.NotFoundError:
        return {}
    except StorageError as error:
        # A path below a file: there is nothing.
        if isinstance(error.__cause__, NotADirectoryError):
            return {}
        raise
    return value if isinstance(value, Mapping) else {}


def show_status(report: Status) -> RenderableType:
    """The report of :func:`status` for a terminal."""
    if isinstance(report, RunStatus):
        return _run(report)
    if isinstance(report, SweepStatus):
        return _sweep(report)
    if isinstance(report, RefitStatus):
        return _refit(report)
    if isinstance(report, TasksStatus):
        return _tasks(report)
    if isinstance(report, PartsStatus):
        return _parts(report)
    if isinstance(report, BegunStatus):
        return _overview_table("out", report.uri, report.state, report.detail)
    return _data_set(report)


# ------------------------------------------------------------------------------------------- pretraining


def _run(report: RunStatus) -> RenderableType:
    parts: list[RenderableType] = [_run_overview(report)]
    if report.losses:
        parts.append(_run_losses(report))
    if report.checkpoints:
        parts.append(_run_checkpoints(report))
    return stacked(*parts)


def _run_overview(report: RunStatus) -> Table:
    table = _overview_table("run", report.uri, report.state, report.detail)
    table.add_row("progress", _progress(report))
    if report.last_commit is not None and report.age_s is not None:
        due = f", one is due every {duration_text(report.expected_interval_s)}"
        table.add_row(
            "last commit",
            f"step {report.step:,}, {duration_text(report.age_s)} ago ({utc_text(report.last_commit)} UTC)"
            + (due if report.expected_interval_s and report.state != "finished" else ""),
        )
    if report.workers:
        more = report.worker_groups - 1
        restarts = f"; started anew at least {_times(more)}" if more > 0 else ""
        table.add_row("workers", f"{report.workers}{restarts}")
    rates = report.rates
    if rates:
        table.add_row("speed", _speed(report))
    if "peak_memory_mib" in rates:
        peak = f"{rates['peak_memory_mib']:,.0f} MiB at most in the first worker"
        table.add_row("memory", peak)
    table.add_row("data", _data(report.data))
    if report.skipped_steps or report.anomalies:
        table.add_row(
            "bad steps",
            f"[yellow]{report.skipped_steps} skipped, {report.anomalies} written to anomalies/[/]",
        )
    if report.validation:
        values = ", ".join(f"{value:.4g} at {step:,}" for step, value in report.validation)
        table.add_row("validation", values)
    settings = report.settings
    table.add_row(
        "settings",
        ", ".join(
            f"{name} {escape(str(settings[name]))}"
            for name in ("num_layers", "dim", "global_batch_size", "strategy", "precision", "seed")
            if settings.get(name) is not None
        ),
    )
    return table


def _progress(report: RunStatus) -> str:
    if not report.num_steps:
        return f"{report.step:,} steps"
    if report.step > report.num_steps:
        return f"{report.step:,} steps; the last command asked for {report.num_steps:,}"
    share = report.step / report.num_steps
    done = round(share * _PROGRESS_WIDTH)
    bar = f"[cyan]{'━' * done}[/][dim]{'━' * (_PROGRESS_WIDTH - done)}[/]"
    text = f"{bar} {report.step:,} of {report.num_steps:,} steps ({100 * share:.3g} %)"
    if report.eta_s is None or report.state not in ("running", "stopped", "stalled"):
        return text
    left = "to go" if report.state == "running" else "to go once it continues"
    return f"{text}, {duration_text(report.eta_s)} {left}"


def _speed(report: RunStatus) -> str:
    rates = report.rates
    parts = []
    if "molecules_per_s" in rates:
        parts.append(f"{rates['molecules_per_s']:,.4g} molecules/s")
    if report.seconds_a_step is not None:
        parts.append(f"{duration_text(report.seconds_a_step)} per step")
    if "mfu" in rates:
        parts.append(f"MFU {rates['mfu']:.2f}")
    if "padding_share" in rates:
        parts.append(f"{100 * rates['padding_share']:.0f} % padding")
    wait = rates.get("data_wait_share")
    if wait is not None:
        colour = "yellow" if wait > _WAIT_SHARE else "default"
        parts.append(f"[{colour}]{100 * wait:.1f} % of the time waiting for data[/]")
    return ", ".join(parts) + f" [dim](last {report.window} steps)[/]"


def _data(data: Mapping[str, Any]) -> str:
    text = escape(str(redact(data.get("uri") or "unknown")))
    if "molecules" in data:
        text += f": {data['molecules']:,} molecules"
        if data.get("epochs") is not None:
            text += f", each seen {data['epochs']:.3g} times"
        quarantined = data.get("quarantined") or 0
        share = 100 * quarantined / max(1, data.get("rows_in") or 1)
        text += f"; {quarantined:,} rows quarantined ({share:.2g} %)"
    elif "problem" in data:
        text += f" [dim]({escape(str(data['problem']))})[/]"
    return text


def _run_losses(report: RunStatus) -> Table:
    table = headed_table("loss", "first", "now", "change", "", numbers=(1, 2, 3))
    for one in report.losses:
        name = one.name.removeprefix("loss_") if one.name != "loss" else "all, weighted"
        change = f"{100 * (one.last / one.first - 1):+.1f} %" if one.first else ""
        trend = f"{_TREND_SIGNS[one.trend]} {one.trend if one.trend != 'unknown' else ''}".strip()
        colour = {"rising": "yellow", "falling": "green"}.get(one.trend, "dim")
        curve = f"  [cyan]{_sparkline(report.curve)}[/]" if one.name == "loss" else ""
        table.add_row(
            name, f"{one.first:.4g}", f"{one.last:.4g}", change, f"[{colour}]{trend}[/]{curve}"
        )
    return table


def _run_checkpoints(report: RunStatus) -> RenderableType:
    table = headed_table(
        "checkpoint", "state", "size", "workers", "written (UTC)", numbers=(0, 2, 3)
    )
    for one in report.checkpoints[:_MAX_CHECKPOINTS]:
        colour = (
            "green" if one.state == "whole" else "yellow" if one.state == "incomplete" else "red"
        )
        table.add_row(
            f"{one.step:,}",
            f"[{colour}]{one.state}[/]",
            bytes_text(one.num_bytes) if one.num_bytes else "",
            str(one.workers or ""),
            utc_text(one.created),
        )
    more = len(report.checkpoints) - _MAX_CHECKPOINTS
    lines = [one.detail for one in report.checkpoints if one.detail]
    lines += [f"and {more} more"] if more > 0 else []
    if not lines:
        return table
    return Group(table, Text("\n".join(lines), style="red" if more <= 0 else ""))


# ------------------------------------------------------------------------------------------------ others


def _sweep(report: SweepStatus) -> RenderableType:
    table = _overview_table(report.kind, report.uri, report.state, report.detail)
    table.add_row("task", escape(report.task))
    if report.trials is not None:
        best = report.best_valid_score
        table.add_row(
            "trials",
            f"{report.trials_done} of {report.trials} over"
            + (f", {report.trials_begun} begun" if report.trials_begun > report.trials_done else "")
            + (
                f"; best on validation {best:.4g} {escape(report.metric)}"
                if best is not None
                else ""
            ),
        )
    if report.folds is not None:
        table.add_row("folds", f"{report.folds_done} of {report.folds} have results")
    table.add_row(
        "seeds" if report.folds is None else "models",
        f"{report.seeds_done} of {report.seeds} trained",
    )
    if report.baselines:
        table.add_row("baselines", escape(", ".join(report.baselines)))
    for index, (name, value) in enumerate(sorted(report.test.items(), key=lambda item: item[1])):
        label = f"test {escape(report.metric)}" if index == 0 else ""
        table.add_row(label, f"{value:.4g}  {escape(name)}")
    return table


def _refit(report: RefitStatus) -> RenderableType:
    table = _overview_table(report.kind, report.uri, report.state, report.detail)
    table.add_row("of", escape(str(redact(report.results))))
    table.add_row("models", f"{report.models_done:,}")
    if report.molecules is not None:
        table.add_row("molecules", f"{report.molecules:,}, for each model")
    return table


def _tasks(report: TasksStatus) -> RenderableType:
    overview = _overview_table("tasks", report.uri, report.state, report.detail)
    table = headed_table("task", "state", "", numbers=())
    for task in report.tasks:
        style = _STATE_STYLES.get(task.state, "dim")
        table.add_row(escape(task.name), f"[{style}]{escape(task.state)}[/]", escape(task.reason))
    return stacked(overview, table)


def _parts(report: PartsStatus) -> RenderableType:
    table = _overview_table(report.kind, report.uri, report.state, report.detail)
    parts = f"of {report.parts:,} parts" if report.parts is not None else "parts"
    table.add_row("parts", f"{report.parts_done:,} {parts}, {bytes_text(report.bytes)}")
    if report.molecules is not None:
        rejected = "" if report.rejected is None else f", {report.rejected:,} rows rejected"
        table.add_row("molecules", f"{report.molecules:,}{rejected}")
    if report.molecules_per_s:
        table.add_row("speed", f"{report.molecules_per_s:,.4g} molecules/s")
    return table


def _data_set(report: DataStatus) -> RenderableType:
    table = _overview_table("data set", report.uri, report.state, report.detail)
    about = "about " if report.is_estimate else ""
    if report.chunks_done is not None:
        table.add_row(
            "chunks", f"{report.chunks_done:,} converted, {bytes_text(report.bytes)} written"
        )
    table.add_row(
        "rows",
        f"{about}{report.rows_in:,} in = {report.rows_out:,} molecules + {report.rows_quarantined:,} quarantined",
    )
    if report.molecules:
        splits = ", ".join(f"{count:,} {split}" for split, count in report.molecules.items())
        table.add_row("holds", f"{splits}; {bytes_text(report.bytes)}")
    for index, source in enumerate(report.sources[:_MAX_SOURCES]):
        table.add_row("" if index else "made of", escape(str(redact(source))))
    if report.state in ("finished", "damaged"):
        table.add_row("more", "moleblend data shows sizes, elements, labels and quarantined rows")
    return table


# ------------------------------------------------------------------------------------------------- writing


def _overview_table(what: str, uri: str, state: str, detail: str) -> Table:
    table = facts_table()
    table.add_row(what, f"[bold]{escape(str(redact(uri)))}[/]")
    table.add_row("state", f"[{_STATE_STYLES[state]}]{state}[/]: {escape(detail)}")
    return table


def _sparkline(values: tuple[float, ...]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _BARS[round(scale * (value - low))] if math.isfinite(value) else " " for value in values
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
