"""`moleblend data`: what a prepared data set holds, and how it is shown on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.describe import redact
from moleblend_ray.config.inspect import InspectConfig
from moleblend_ray.data.dataset.shards import DESCRIPTOR_FIELD
from moleblend_ray.data.inspect import (
    DataSetReport,
    QuarantineReason,
    UnfinishedReport,
    inspect_data_set,
)
from moleblend_ray.orchestration.progress.terminal import (
    facts_table,
    headed_table,
    progress_bar,
    stacked,
)
from moleblend_ray.quantities import bytes_text
from moleblend_ray.vocabulary import NUM_DESCRIPTORS

Report = DataSetReport | UnfinishedReport

_BAR_WIDTH: Final = 32
_MAX_BARS: Final = 16
_MAX_ELEMENTS: Final = 12
_MAX_LABELS: Final = 12
_MAX_DAMAGES: Final = 20
_MAX_SOURCES: Final = 5
_EXCERPT_CHARACTERS: Final = 40


def inspect_data(config: InspectConfig) -> Report:
    """What the prepared data set ``config.data`` holds; with ``config.verify`` every file is read."""
    config = accepted(config, InspectConfig)
    with progress_bar("verify", enabled=config.verify, show=bytes_text, unit="B") as progress:
        return inspect_data_set(
            config.data, verify=config.verify, num_examples=config.examples, progress=progress
        )


def show_data(report: Report) -> RenderableType:
    """The report of :func:`inspect_data` for a terminal."""
    if isinstance(report, UnfinishedReport):
        return _unfinished(report)
    parts: list[RenderableType | None] = [
        _overview(report),
        _histogram(report.counts.atom_count_histogram),
        _labels(report),
        _quarantine(report.quarantine),
    ]
    return stacked(*(part for part in parts if part is not None), _damages(report))


def _overview(report: DataSetReport) -> Table:
    counts = report.counts
    table = facts_table()
    table.add_row("data set", f"[bold]{escape(str(redact(report.uri)))}[/]")
    table.add_row(
        "identity", f"fingerprint {report.fingerprint[:16]}, format version {report.format_version}"
    )
    for index, source in enumerate(report.sources[:_MAX_SOURCES]):
        table.add_row(
            "" if index else "made of",
            f"{escape(source.uri)} ({escape(source.format)}, {source.rows:,} rows, {bytes_text(source.size)})",
        )
    if len(report.sources) > _MAX_SOURCES:
        table.add_row("", f"and {len(report.sources) - _MAX_SOURCES} more files")
    for index, (split, size) in enumerate(report.splits.items()):
        what = "row" if split == "quarantine" else "molecule"
        table.add_row(
            "" if index else "holds",
            f"{split}: {_count(size.molecules, what)} in {_count(size.shards, 'file')}, {bytes_text(size.bytes)}",
        )
    table.add_row(
        "accounts",
        f"{counts.rows_in:,} rows in = {counts.rows_out:,} molecules out + {counts.rows_quarantined:,} quarantined"
        + (f"; {counts.duplicate_ids:,} ids repeat" if counts.duplicate_ids else ""),
    )
    table.add_row("conformers", _shares(counts.conformer_status, counts.rows_out))
    if DESCRIPTOR_FIELD.name in report.schema:
        table.add_row("descriptors", f"{NUM_DESCRIPTORS} of RDKit for each molecule")
    elements = sorted(counts.elements.items(), key=lambda item: -item[1])
    shown = dict(elements[:_MAX_ELEMENTS])
    more = f" and {len(elements) - len(shown)} more" if len(elements) > len(shown) else ""
    if elements or not counts.rows_out:
        table.add_row("elements", _shares(shown, counts.rows_out) + more)
    changed = {
        key: value
        for key, value in report.options.items()
        if key in ("shuffle", "deduplicate", "canonical_order") and value not in (False, "none")
    }
    if changed:
        made = ", ".join(f"{key}={value}" for key, value in changed.items())
        table.add_row("made with", escape(made))
    return table


def _histogram(histogram: Mapping[str, int]) -> Table | None:
    """Molecules by number of atoms, in bins of equal width, as bars."""
    sizes = {int(size): count for size, count in histogram.items()}
    if not sizes:
        return None
    first, last = min(sizes), max(sizes)
    width = max(1, -(-(last - first + 1) // _MAX_BARS))
    bins = [
        (low, min(low + width - 1, last), sum(sizes.get(s, 0) for s in range(low, low + width)))
        for low in range(first, last + 1, width)
    ]
    total, most = sum(sizes.values()), max(count for _, _, count in bins)
    mean = sum(size * count for size, count in sizes.items()) / total
    table = Table(
        show_edge=False,
        pad_edge=False,
        box=None,
        title=f"atoms per molecule: {first} to {last}, mean {mean:.1f}",
        title_justify="left",
        title_style="bold",
        show_header=False,
    )
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for low, high, count in bins:
        label = str(low) if low == high else f"{low}-{high}"
        table.add_row(label, f"[cyan]{_bar(count / most)}[/]", f"{count:,}")
    return table


def _bar(share: float) -> str:
    """A bar in steps of an eighth of a character; any share above 0 has at least one step."""
    eighths = max(round(share * _BAR_WIDTH * 8), 1 if share > 0 else 0)
    full, rest = divmod(eighths, 8)
    return "█" * full + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[rest]


def _labels(report: DataSetReport) -> Table | None:
    if not report.labels:
        return None
    # Most data sets keep no bounds.
    kept = ["bounds"] if any(label.num_bounds is not None for label in report.labels) else []
    names = ("label", "unit", "molecules", "share", *kept, "unreadable")
    table = headed_table(*names, numbers=range(2, len(names)))
    for label in report.labels[:_MAX_LABELS]:
        table.add_row(
            escape(label.name),
            escape(label.unit or ""),
            f"{label.count:,}",
            _percent(label.count, report.counts.rows_out),
            *(f"{label.num_bounds or 0:,}" for _ in kept),
            f"{label.num_unreadable:,}" if label.num_unreadable else "",
        )
    if len(report.labels) > _MAX_LABELS:
        table.add_row(f"and {len(report.labels) - _MAX_LABELS} more", *[""] * (len(names) - 1))
    return table


def _quarantine(reasons: Mapping[str, QuarantineReason]) -> Table | None:
    if not reasons:
        return None
    table = headed_table("quarantined for", "rows", "row", "looks like", "detail", numbers=(1, 2))
    for reason, found in reasons.items():
        if not found.examples:
            table.add_row(reason, f"{found.rows:,}", "", "", "")
        for index, row in enumerate(found.examples):
            excerpt = " ".join(row.excerpt.split())
            if len(excerpt) > _EXCERPT_CHARACTERS:
                excerpt = excerpt[: _EXCERPT_CHARACTERS - 1] + "…"
            table.add_row(
                "" if index else reason,
                "" if index else f"{found.rows:,}",
                f"{row.source_row:,}",
                escape(excerpt),
                escape(row.detail),
            )
    return table


def _damages(report: DataSetReport) -> Text:
    if not report.damages:
        what = "every file has its checksum" if report.verified else "every file is there"
        hint = "" if report.verified else " with its size (--verify compares checksums)"
        return Text(f"{what}{hint}", style="green")
    shown = list(report.damages[:_MAX_DAMAGES])
    if len(report.damages) > len(shown):
        shown.append(f"and {len(report.damages) - len(shown)} more")
    lines = [f"{_count(len(report.damages), 'file')} damaged:", *(f"  {line}" for line in shown)]
    lines.append("Restore them, or delete the data set and prepare it again.")
    return Text("\n".join(lines), style="bold red")


def _unfinished(report: UnfinishedReport) -> Table:
    table = facts_table()
    table.add_row("data set", f"[bold]{escape(str(redact(report.uri)))}[/]")
    table.add_row("state", "[yellow]unfinished[/]: there is a plan but no manifest")
    for index, source in enumerate(report.sources[:_MAX_SOURCES]):
        table.add_row("" if index else "made of", escape(source))
    table.add_row(
        "so far",
        f"{_count(report.chunks_done, 'chunk')} of {_count(report.rows_in, 'row')}, {report.rows_quarantined:,} quarantined",
    )
    table.add_row("to finish", "the `moleblend prepare` command that began it, typed again")
    return table


def _shares(counts: Mapping[str, int], total: int) -> str:
    parts = [f"{escape(name)} {_percent(count, total)}" for name, count in counts.items()]
    return ", ".join(parts) or "none"


def _percent(count: int, total: int) -> str:
    if not total:
        return "0 %"
    share = 100 * count / total
    return f"{share:.3g} %" if count < total else "100 %"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
