"""A leaderboard as files to read: Markdown, CSV, one self-contained HTML page, a figure; JSON for programs."""

from __future__ import annotations

import base64
import csv
import html
import io
import urllib.parse
from collections.abc import Sequence

from moleblend_ray.data.files import storage
from moleblend_ray.errors import without_credentials
from moleblend_ray.evaluation.reports.leaderboard import (
    Leaderboard,
    ModelScore,
    Standing,
    Status,
    TaskRow,
    is_elsewhere,
)
from moleblend_ray.evaluation.reports.leaderboard_figure import gain_figure
from moleblend_ray.evaluation.reports.score_text import (
    mean_and_std_text,
    score_text,
    table_cell,
    values_text,
)
from moleblend_ray.evaluation.results.result_files import LEADERBOARD_NAME, REPORT_NAME
from moleblend_ray.evaluation.results.results import Spread
from moleblend_ray.evaluation.tasks import Metric

FIGURE_PATH = "figures/leaderboard.png"
"""Path of the figure, relative to the leaderboard."""

CSV_COLUMNS = (
    "task", "status", "metric", "unit", "higher_is_better", "molecules", "split", "split_hash", "model", "is_baseline",
    "valid_mean", "valid_std", "test_mean", "test_std", "test_values", "rank", "gain_percent", "reason", "test_molecules",
    "test_seen", "labels", "test_low", "test_high",
)  # fmt: skip
"""Columns of the CSV file. It has one line per task and model, and one without a model for a task without scores.
Values of seeds, or of the folds of a cross-validation, are separated by spaces."""

_RULES = (
    "Configurations were chosen on validation molecules; the test molecules were scored once, afterwards, with every "
    "seed. Scores are means ± sample standard deviations over seeds, of cross-validations over folds (bars in the figure), a single seed has none; ↑: higher is better, ↓: lower is "
    "better. The best mean of a task is marked. Ranks and wins go by the mean test score. A gain is relative to the "
    "baseline that is best on the validation molecules of the task. It counts as better or worse than this baseline beyond chance "
    "where the 95 % interval of the difference, over draws of the test molecules, does not contain 0; where there is no difference, "
    "about one task in twenty does so."
)

_STANDING_HEADS = (
    "model",
    "tasks",
    "wins",
    "mean rank",
    "mean gain",
    "better, worse beyond chance",
)


def write_leaderboard(out: str, board: Leaderboard) -> str:
    """Write the figure and ``leaderboard.csv``, ``.md``, ``.html`` and ``.json`` to ``out``; returns the URI of the
    page."""
    figure = gain_figure(board)
    if figure is not None:
        storage.write_bytes(storage.join(out, FIGURE_PATH), figure)
    texts = {
        "csv": csv_text(board),
        "md": markdown_text(board, None if figure is None else FIGURE_PATH),
        "html": html_text(board, figure),
    }
    uris = {end: storage.join(out, f"{LEADERBOARD_NAME}.{end}") for end in (*texts, "json")}
    for end, text in texts.items():
        storage.write_bytes(uris[end], text.encode())
    storage.write_json(uris["json"], board.to_json())
    return uris["html"]


def csv_text(board: Leaderboard) -> str:
    """The leaderboard as CSV with all digits."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in board.rows:
        common = {
            "task": row.name,
            "status": row.status.value,
            "metric": row.metric,
            "unit": row.unit,
            "reason": _shown(row.reason),
        }
        if not row.models:
            writer.writerow(common)
            continue
        common |= {
            "higher_is_better": str(row.higher_is_better).lower(),
            "molecules": str(row.molecules),
            "split": row.split,
            "split_hash": row.split_hash,
            "test_molecules": str(row.test_molecules),
            "test_seen": str(row.test_seen),
            "labels": row.labels,
        }
        writer.writerows({**common, **_csv_scores(row, model)} for model in row.models)
    return buffer.getvalue()


def _csv_scores(row: TaskRow, model: ModelScore) -> dict[str, str]:
    gain, rank = row.gain(model), row.ranks().get(model.name)
    return {
        "model": model.name,
        "is_baseline": str(model.is_baseline).lower(),
        "valid_mean": repr(model.valid.mean),
        "valid_std": repr(model.valid.std),
        "test_mean": repr(model.test.mean),
        "test_std": repr(model.test.std),
        "test_values": " ".join(map(repr, model.test.values)),
        "rank": "" if rank is None else f"{rank:g}",
        "gain_percent": "" if gain is None else repr(gain[0]),
        **dict(zip(("test_low", "test_high"), map(repr, model.test_interval or ()), strict=False)),
    }


def markdown_text(board: Leaderboard, figure: str | None) -> str:
    """The leaderboard as Markdown; ``figure`` is the path of its figure."""
    lines = [f"# {_cell(board.title)}", "", _summary(board), ""]
    standings = board.standings()
    if standings:
        lines += [
            f"| {' | '.join(_STANDING_HEADS)} |",
            "|---" + "|--:" * (len(_STANDING_HEADS) - 1) + "|",
            *(f"| {' | '.join(map(_cell, _standing_cells(item)))} |" for item in standings),
            "",
        ]
    models = board.models
    if models:
        names = [_cell(model.name) for model in models]
        lines += [
            "## Test scores",
            "",
            f"| task | metric | split | molecules | {' | '.join(names)} |",
            "|---|---|---|--:|" + "--:|" * len(models),
            *(_markdown_row(row, models) for row in board.finished),
            "",
        ]
        seen = _seen_note(board)
        lines += [_cell(seen).replace("*", "\\*"), ""] if seen else []
    if figure is not None:
        lines += [f"![gain over the best baseline]({figure})", ""]
    if models:
        lines += [
            "## Each seed or fold",
            "",
            "| task | split | model | validation | test | 95 % interval | each seed or fold |",
            "|---|---|---|--:|--:|--:|---|",
            *_markdown_seeds(board),
            "",
        ]
    lines += _markdown_others(board)
    return "\n".join([*lines, _RULES, ""])


def _markdown_row(row: TaskRow, models: Sequence[ModelScore]) -> str:
    cells = []
    for model in models:
        score = row.score_of(model.name)
        text = "" if score is None else _mean_and_std(score.test)
        cells.append(f"**{text}**" if model.name in row.best else text)
    described = _cell(row.name), _cell(_metric(row)), _cell(row.basis), _molecules(row)
    return f"| {' | '.join((*described, *cells))} |"


def _markdown_seeds(board: Leaderboard) -> list[str]:
    return [
        f"| {_cell(row.name)} | {row.basis} `{row.split_hash}` | {_cell(model.name)} | {score_text(model.valid.mean)} "
        f"| {_mean_and_std(model.test)} | {_limits(model)} | {_values(model.test)} |"
        for row in board.finished
        for model in row.models
    ]


def _markdown_others(board: Leaderboard) -> list[str]:
    rows = [row for row in board.rows if row.status is not Status.FINISHED]
    if not rows:
        return []
    return [
        "## Without scores",
        "",
        *(f"- {_cell(row.name)}: {row.status.value}{_cell(_because(row))}" for row in rows),
        "",
    ]


def html_text(board: Leaderboard, figure: bytes | None) -> str:
    """The leaderboard as one page that needs no other file; ``figure`` is a PNG."""
    parts = [f"<h1>{_text(board.title)}</h1>", f"<p>{_text(_summary(board))}</p>"]
    seen = _seen_note(board)
    if board.models:
        parts += [
            "<section><h2>Standings</h2>",
            _html_standings(board),
            "</section>",
            "<section><h2>Test scores</h2>",
            _html_scores(board),
            *([f"<p class='soft'>{_text(seen)}</p>"] if seen else []),
            "</section>",
        ]
    if figure is not None:
        encoded = base64.b64encode(figure).decode()
        alt = "gain of each model over the best baseline, task by task"
        parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{encoded}"></figure>')
    others = [row for row in board.rows if row.status is not Status.FINISHED]
    if others:
        parts += ["<section><h2>Without scores</h2>", _html_others(others), "</section>"]
    if board.models:
        cards = "".join(map(_html_card, board.finished))
        parts += [f'<section><h2>Each seed or fold</h2><div class="cards">{cards}</div></section>']
    parts.append(f'<footer class="soft">{_text(_RULES)}</footer>')
    return _PAGE.format(title=_text(board.title), style=_STYLE, body="\n".join(parts))


def _html_standings(board: Leaderboard) -> str:
    rows = "".join(
        f"<tr{_class('soft', item.is_baseline)}>"
        + "".join(f"<td>{_text(text)}</td>" for text in _standing_cells(item))
        + "</tr>"
        for item in board.standings()
    )
    return f'<div class="scroll"><table class="standings">{_html_head(_STANDING_HEADS)}<tbody>{rows}</tbody></table></div>'


def _html_scores(board: Leaderboard) -> str:
    models = board.models
    rows = []
    for row in board.finished:
        cells = [
            f"<td>{_link(row)}<br><small>{_text(_metric(row))} · {_text(row.basis)} · {_molecules(row)}</small></td>"
        ]
        for model in models:
            score = row.score_of(model.name)
            shown = "" if score is None else _html_spread(score.test)
            cells.append(f"<td{_class('best', model.name in row.best)}>{shown}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = ("task", *(model.name for model in models))
    return (
        f'<div class="scroll"><table class="matrix">{_html_head(heads)}'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _html_card(row: TaskRow) -> str:
    body = "".join(
        f"<tr{_class('soft', model.is_baseline)}><td>{_text(model.name)}</td>"
        f"<td{_class('best', model.name in row.best)}>{_html_spread(model.test)}"
        f"<br><small>{_values(model.test)}{_html_limits(model)}</small></td></tr>"
        for model in row.models
    )
    return (
        f"<article><h3>{_link(row)}</h3><p class='soft'>{_text(_metric(row))}, {row.molecules:,} molecules<br>"
        f"split {_text(row.basis)} <code>{_text(row.split_hash)}</code></p>"
        f"<table>{body}</table></article>"
    )


def _html_others(rows: Sequence[TaskRow]) -> str:
    items = (
        f"<li><b>{_text(row.name)}</b>: {row.status.value}{_text(_because(row))}</li>"
        for row in rows
    )
    return f"<ul>{''.join(items)}</ul>"


def _html_head(heads: Sequence[str]) -> str:
    cells = "".join(f"<th>{_text(head)}</th>" for head in heads)
    return f"<thead><tr>{cells}</tr></thead>"


def _html_spread(spread: Spread) -> str:
    mean, _, std = _mean_and_std(spread).partition(" ")
    small = f" <small>{std}</small>" if std else ""
    return f'<span class="score">{mean}{small}</span>'


def _html_limits(model: ModelScore) -> str:
    if model.test_interval is None:
        return ""
    return f"<br>95 %: {_limits(model)}"


def _limits(model: ModelScore) -> str:
    """The interval of the mean test score, if it is known."""
    return " to ".join(score_text(limit, model.test.mean) for limit in model.test_interval or ())


def _class(name: str, holds: bool) -> str:
    return f' class="{name}"' if holds else ""


def _link(row: TaskRow) -> str:
    """The name of the task; if its results are in a folder below the page, as a link to their report."""
    if is_elsewhere(row.results):
        return _text(row.name)
    folder = f"{row.results}/" if row.results else ""
    path = urllib.parse.quote(f"{folder}{REPORT_NAME}")
    return f'<a href="{path}">{_text(row.name)}</a>'


def _summary(board: Leaderboard) -> str:
    counts = {status: sum(row.status is status for row in board.rows) for status in Status}
    said = [f"{count} {status.value}" for status, count in counts.items() if count]
    return f"{len(board.rows)} task{'s' * (len(board.rows) != 1)}: {', '.join(said)}."


def _standing_cells(item: Standing) -> tuple[str, ...]:
    gain = "" if item.mean_gain is None else f"{item.mean_gain:+.1f} %"
    sure = "" if item.better is None else f"{item.better}, {item.worse}"
    return item.name, str(item.tasks), str(item.wins), f"{item.mean_rank:.2f}", gain, sure


def _metric(row: TaskRow) -> str:
    arrow = "↑" if row.higher_is_better else "↓"
    unit = f", {row.unit}" if row.unit else ""
    return f"{Metric(row.metric).shown_name} {arrow}{unit}"


def _molecules(row: TaskRow) -> str:
    """Their number, with the mark that :func:`_seen_note` explains."""
    return f"{row.molecules:,}{'*' * bool(row.test_seen)}"


def _seen_note(board: Leaderboard) -> str:
    """Says which scores are partly of molecules that took part in training or in choices; empty if none are."""
    said = [
        f"{row.test_seen:,} of {row.test_molecules:,} in {row.name}"
        for row in board.finished
        if row.test_seen
    ]
    if not said:
        return ""
    return (
        f"* Test molecules that are also among those for training or validation, as they are or in another form: "
        f"{', '.join(said)}. Scores may be better than those of new molecules."
    )


def _because(row: TaskRow) -> str:
    return f": {_shown(row.reason)}" if row.reason else ""


def _mean_and_std(spread: Spread) -> str:
    return mean_and_std_text(spread.mean, spread.std, len(spread.values))


def _values(spread: Spread) -> str:
    return values_text(spread.mean, spread.values)


def _shown(text: str) -> str:
    """The text on one line, without credentials."""
    return " ".join(without_credentials(text).split())


def _cell(text: str) -> str:
    return table_cell(_shown(text))


def _text(text: str) -> str:
    return html.escape(_shown(text))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #666; --mark: #3b8bc433; }
@media (prefers-color-scheme: dark) { :root { --soft: #999; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; }
a { color: inherit; text-decoration-color: var(--soft); }
small, .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: right; vertical-align: top; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.matrix th { min-width: 6.5rem; }
.matrix td, .score, .standings td + td { white-space: nowrap; }
.matrix td:first-child { min-width: 8rem; white-space: normal; }
.best { background: var(--mark); font-weight: 600; }
figure { margin: 2rem 0; overflow-x: auto; }
img { height: auto; max-width: 48rem; min-width: 24rem; width: 100%; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; }
article p { margin: .2rem 0 .5rem; }
article table { width: 100%; }
article td { padding-inline: .3rem; }
article td:last-child { min-width: 10rem; }
code { overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; }
footer { margin-top: 2rem; }
@media (max-width: 30rem) { th, td { padding: .3rem; } }
"""
