"""`moleblend checkpoints`: the checkpoints of a run, or how two differ, and how they are shown on a terminal."""

from __future__ import annotations

from typing import Final

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.describe import redact
from moleblend_ray.config.inspect import CheckpointsConfig
from moleblend_ray.data.files.documents import member
from moleblend_ray.orchestration.progress.terminal import (
    facts_table,
    headed_table,
    progress_bar,
    stacked,
    utc_text,
)
from moleblend_ray.quantities import bytes_text
from moleblend_ray.training.inventory import (
    DifferenceReport,
    InventoryReport,
    compare_checkpoints,
    take_inventory,
)

_MAX_TENSORS: Final = 12


def inspect_checkpoints(config: CheckpointsConfig) -> InventoryReport | DifferenceReport:
    """The checkpoints of ``config.run``, or how two differ (``config.against``). Deletes only with ``keep_last``."""
    config = accepted(config, CheckpointsConfig)
    if config.against is not None:
        return compare_checkpoints(config.run, config.against)
    with progress_bar("verify", enabled=config.verify, show=str, unit=" checkpoints") as progress:
        return take_inventory(
            config.run,
            verify_content=config.verify,
            keep_last=config.keep_last,
            progress=progress,
        )


def show_checkpoints(report: InventoryReport | DifferenceReport) -> RenderableType:
    """The report of :func:`inspect_checkpoints` for a terminal."""
    if isinstance(report, DifferenceReport):
        return _difference(report)
    checked = (
        "all bytes were compared"
        if report.verified
        else "sizes were compared; --verify reads every byte"
    )
    foot = Text(
        "\n".join(report.damages) or f"no damage found ({checked})",
        style="red" if report.damages else "",
    )
    return stacked(_run_overview(report), _checkpoint_table(report), foot)


def _run_overview(report: InventoryReport) -> Table:
    overview = facts_table()
    overview.add_row("run", f"[bold]{escape(str(redact(report.uri)))}[/]")
    overview.add_row("state", _state(report))
    if data := member(report.identity, "data_fingerprint", str):
        seed = report.identity.get("seed", "?")
        overview.add_row("identity", escape(f"data {data[:16]}, seed {seed}"))
    found = {name: member(report.identity, f"model.{name}", int) for name in ("num_layers", "dim")}
    if sizes := [f"{name} {size}" for name, size in found.items() if size is not None]:
        overview.add_row("model", ", ".join(sizes))
    if report.deleted:
        overview.add_row("deleted", "steps " + ", ".join(map(str, report.deleted)))
    return overview


def _checkpoint_table(report: InventoryReport) -> Table:
    checkpoints = headed_table(
        "step",
        "state",
        "size",
        "files",
        "workers",
        "loss",
        "valid loss",
        "written (UTC)",
        numbers=(0, 2, 3, 4, 5, 6),
    )
    for one in report.checkpoints:
        checkpoints.add_row(
            f"{one.step:,}",
            one.state if one.state == "whole" else f"[bold red]{one.state}[/]",
            bytes_text(one.num_bytes) if one.num_files else "",
            str(one.num_files or ""),
            str(one.world_size or ""),
            "" if one.loss is None else f"{one.loss:.4g}",
            "" if one.valid_loss is None else f"{one.valid_loss:.4g}",
            utc_text(one.created),
        )
    return checkpoints


def _state(report: InventoryReport) -> str:
    if report.finished:
        return "finished"
    if report.continues_at is None:
        states = {one.state for one in report.checkpoints}
        if "newer" in states:
            return "a newer version wrote its newest checkpoint: its command asks for the upgrade"
        if "damaged" in states:
            return "all checkpoints are damaged: its command cannot continue"
        return "nothing committed yet: its command starts anew"
    return f"not finished; its command continues at step {report.continues_at:,}"


def _difference(report: DifferenceReport) -> RenderableType:
    overview = facts_table()
    overview.add_row("first", f"[bold]{escape(str(redact(report.first)))}[/]")
    overview.add_row("second", f"[bold]{escape(str(redact(report.second)))}[/]")
    for index, setting in enumerate(report.settings):
        overview.add_row("" if index else "settings", escape(str(redact(setting))))
    if not report.settings:
        overview.add_row("settings", "the same")
    equal = report.num_tensors - len(report.tensors)
    overview.add_row("weights", f"{equal} of {report.num_tensors} tensors are bit-identical")
    overview.add_row("optimizer", "bit-identical" if report.optimizer_equal else "differs")
    if not report.tensors:
        return overview
    tensors = headed_table("tensor", "relative difference", "largest absolute", numbers=(1, 2))
    for tensor in report.tensors[:_MAX_TENSORS]:
        tensors.add_row(escape(tensor.name), f"{tensor.relative:.3g}", f"{tensor.max_abs:.3g}")
    if len(report.tensors) > _MAX_TENSORS:
        tensors.add_row(f"and {len(report.tensors) - _MAX_TENSORS} more", "", "")
    return stacked(overview, tensors)
