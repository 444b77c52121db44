"""A leaderboard shows the numbers of the results, whatever the format, and what has none with its reason."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.evaluation.reports.leaderboard import (
    Leaderboard,
    Status,
    TaskRow,
    compare,
    read_leaderboard,
    read_row,
    row_of_results,
    rows_of_states,
)
from moleblend_ray.evaluation.reports.leaderboard_figure import draw_gains, gain_figure
from moleblend_ray.evaluation.reports.leaderboard_page import (
    CSV_COLUMNS,
    csv_text,
    html_text,
    markdown_text,
    write_leaderboard,
)
from moleblend_ray.evaluation.results.results import Spread

MODEL, FOREST, MEAN = "MoleBLEND, fine-tuned", "ECFP4 + random forest", "mean of <train> | a&b"

VOID = {"meta", "br", "img"}


def entry(name: str, valid: list[float], test: list[float]) -> dict[str, Any]:
    spreads = {"valid": Spread.of(valid), "test": Spread.of(test)}
    return {"name": name, **{part: dataclasses.asdict(spread) for part, spread in spreads.items()}}


def results(
    task: str,
    metric: str,
    model: list[float],
    *baselines: dict[str, Any],
    split_hash: str = "5f" * 8,
) -> dict[str, Any]:
    """As ``results.json`` has them, as far as the leaderboard looks at it."""
    return {
        "task": {
            "name": task,
            "metric": metric,
            "higher_is_better": metric == "roc_auc",
            "unit": "" if metric == "roc_auc" else "log10(mol/L)",
        },
        "data": {"molecules": 1234, "split": {"kind": "scaffold", "hash": split_hash}},
        "final": entry(MODEL, model, model),
        "baselines": list(baselines),
    }


ESOL = results(
    "esol",
    "rmse",
    [0.9, 1.1],
    entry(FOREST, [1.4, 1.4], [1.2, 1.3]),
    entry(MEAN, [2.0], [2.0]),
)
BBBP = results(
    "bbbp",
    "roc_auc",
    [0.7123456789, 0.69],
    entry(FOREST, [0.8], [0.72]),
    entry(MEAN, [0.5], [0.5]),
)


def board() -> Leaderboard:
    return Leaderboard(
        title="sweeps <b>&",
        rows=(
            row_of_results(ESOL, "esol"),
            row_of_results(BBBP, "bbbp"),
            TaskRow(name="muv", status=Status.FAILED, reason="label <script>|2.5\nis none"),
            TaskRow(name="hiv", status=Status.ABSENT, reason="s3://key:secret@bucket has none"),
            TaskRow(name="bace", status=Status.WAITING),
        ),
    )


class Table(HTMLParser):
    """Texts of the page's cells, row by row; it fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("href", "src")]
        if tag in VOID:
            return
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.tags):
            self.rows[-1][-1] += data


def test_ranks_wins_and_gains_are_those_of_the_mean_test_scores() -> None:
    esol, bbbp = board().finished
    assert esol.ranks() == {MODEL: 1, FOREST: 2, MEAN: 3}
    assert bbbp.ranks() == {MODEL: 2, FOREST: 1, MEAN: 3}
    assert (esol.best, bbbp.best) == ((MODEL,), (FOREST,))
    standings = {item.name: item for item in board().standings()}
    assert [item.wins for item in board().standings()] == [1, 1, 0]
    assert {name: item.mean_rank for name, item in standings.items()} == {
        MODEL: 1.5, FOREST: 1.5, MEAN: 3.0,
    }  # fmt: skip
    # 20 % less error than 1.25, and 0.7011728 against 0.72.
    assert esol.gain(esol.models[0]) == pytest.approx((20.0, 11.3137), rel=1e-5)
    gain = bbbp.gain(bbbp.models[0])
    assert gain is not None
    assert gain[0] == pytest.approx(100 * (0.70117283945 / 0.72 - 1))
    assert standings[MODEL].mean_gain == pytest.approx((20.0 + gain[0]) / 2)


def test_the_reference_is_the_baseline_a_user_would_have_chosen_not_the_best_on_test() -> None:
    row = row_of_results(
        results("bbbp", "roc_auc", [0.7], entry("a", [0.9], [0.6]), entry("b", [0.8], [0.9])),
        "bbbp",
    )
    assert row.reference is not None
    assert row.reference.name == "a"
    assert row.best == ("b",)


def with_intervals(results: dict[str, Any], better_by: list[float] | None) -> dict[str, Any]:
    """The results with intervals of the scores, and of the difference to each baseline."""
    baselines = [
        {**entry, "test_interval": [0.5, 0.875], "model_is_better_by": better_by}
        for entry in results["baselines"]
    ]
    final = {**results["final"], "test_interval": [0.25, 1.0]}
    return {**results, "final": final, "baselines": baselines}


def test_a_difference_is_sure_where_its_interval_is_on_one_side() -> None:
    intervals: dict[str, list[float] | None] = {
        "a": [0.1, 0.5], "b": [-0.1, 0.5], "c": [-0.5, -0.1], "d": [0.01, 0.02], "e": None
    }  # fmt: skip
    rows = [
        row_of_results(with_intervals(ESOL, limits), name) for name, limits in intervals.items()
    ]
    assert [row.verdict(row.models[0]) for row in rows] == [1, 0, -1, 1, None]
    assert [row.verdict(row.models[1]) for row in rows] == [None] * 5
    board = Leaderboard(title="x", rows=(*rows, row_of_results(ESOL, "f")))
    model, *baselines = sorted(board.standings(), key=lambda item: item.is_baseline)
    assert (model.better, model.worse) == (2, 1)
    assert {(item.better, item.worse) for item in baselines} == {(None, None)}
    assert f"| {MODEL} | 6 | 6 | 1.00 | +20.0 % | 2, 1 |" in markdown_text(board, None)
    none_known = Leaderboard(title="x", rows=(row_of_results(ESOL, "f"),))
    assert none_known.standings()[0].better is None


def test_intervals_of_scores_are_in_every_format() -> None:
    row = row_of_results(with_intervals(ESOL, [0.1, 0.5]), "esol")
    board = Leaderboard(title="x", rows=(row,))
    assert "| 1.0000 ± 0.1414 | 0.2500 to 1.0000 | 0.9000, 1.1000 |" in markdown_text(board, None)
    assert "95 %: 0.2500 to 1.0000" in html_text(board, None)
    lines = list(csv.DictReader(io.StringIO(csv_text(board))))
    assert [line["test_low"] for line in lines] == ["0.25", "0.5", "0.5"]
    assert [line["test_high"] for line in lines] == ["1.0", "0.875", "0.875"]
    stored = json.loads(json.dumps(board.to_json()))["tasks"][0]["models"]
    assert stored[0]["better_by"][FOREST] == [0.1, 0.5]
    assert stored[1]["test_interval"] == [0.5, 0.875]


def test_differences_are_to_the_baseline_of_the_own_board_when_boards_are_compared() -> None:
    other = results("esol", "rmse", [0.8], entry(FOREST, [1.5], [1.6]))
    boards = {
        label: Leaderboard(
            title=label, rows=(row_of_results(with_intervals(found, limits), "esol"),)
        )
        for label, found, limits in (("one", ESOL, [0.1, 0.5]), ("two", other, [-0.4, -0.1]))
    }
    (row,) = compare(boards).rows
    models = {model.name: model for model in row.models}
    assert set(models[f"{MODEL} (one)"].better_by) == {f"{FOREST} (one)", MEAN}
    assert set(models[f"{MODEL} (two)"].better_by) == {f"{FOREST} (two)"}
    assert row.reference is not None
    assert row.reference.name == f"{FOREST} (one)"
    assert row.verdict(models[f"{MODEL} (one)"]) == 1
    assert row.verdict(models[f"{MODEL} (two)"]) is None


def test_equal_scores_share_rank_and_win() -> None:
    row = row_of_results(
        results("bbbp", "roc_auc", [0.7], entry("a", [0.9], [0.7]), entry("b", [0.8], [0.6])),
        "bbbp",
    )
    assert row.ranks() == {MODEL: 1.5, "a": 1.5, "b": 3.0}
    assert row.best == (MODEL, "a")


def test_a_model_alone_wins_nothing_and_has_no_gain() -> None:
    row = row_of_results(results("bbbp", "roc_auc", [0.7]), "bbbp")
    assert (row.ranks(), row.best, row.gain(row.models[0])) == ({}, (), None)
    alone = Leaderboard(title="x", rows=(row,))
    assert alone.standings()[0].wins == 0
    assert gain_figure(alone) is None
    assert "0.7000" in html_text(alone, None)


def test_results_with_a_single_baseline_under_its_former_name_are_read() -> None:
    former = {**ESOL, "baselines": None, "baseline": ESOL["baselines"][0]}
    assert [model.name for model in row_of_results(former, "").models] == [MODEL, FOREST]
    none = {**ESOL, "baselines": [], "baseline": None}
    assert [model.name for model in row_of_results(none, "").models] == [MODEL]


def test_csv_and_json_hold_every_digit_of_the_results() -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(board()))))
    assert tuple(lines[0]) == CSV_COLUMNS
    stored = json.loads(json.dumps(board().to_json()))
    for task, value in (("esol", ESOL), ("bbbp", BBBP)):
        for scores in (value["final"], *value["baselines"]):
            (line,) = [x for x in lines if (x["task"], x["model"]) == (task, scores["name"])]
            assert [float(number) for number in line["test_values"].split()] == list(
                scores["test"]["values"]
            )
            for part in ("valid", "test"):
                assert float(line[f"{part}_mean"]) == scores[part]["mean"]
                assert float(line[f"{part}_std"]) == scores[part]["std"]
            (row,) = [row for row in stored["tasks"] if row["name"] == task]
            (model,) = [model for model in row["models"] if model["name"] == scores["name"]]
            assert model["test"] == {**scores["test"], "values": list(scores["test"]["values"])}
            assert line["is_baseline"] == str(scores is not value["final"]).lower()
    assert [line["task"] for line in lines if not line["model"]] == ["muv", "hiv", "bace"]


def test_markdown_shows_the_results_rounded_with_the_best_in_bold() -> None:
    text = markdown_text(board(), "figures/x.png")
    cells = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines()]
    (esol,) = [row for row in cells if row[0] == "| esol" and "RMSE" in row[1]]
    assert esol[1:5] == ["RMSE ↓, log10(mol/L)", "scaffold", "1,234", "**1.0000 ± 0.1414**"]
    assert esol[5] == "1.2500 ± 0.0707"
    assert "| bbbp | scaffold `5f5f5f5f5f5f5f5f` | MoleBLEND, fine-tuned | 0.7012 |" in text
    assert "0.7123, 0.6900 |" in text
    assert "- muv: failed: label &lt;script>\\|2.5 is none" in text
    assert "mean of &lt;train> \\| a&b" in text


def test_test_molecules_that_were_seen_in_training_are_told_beside_the_scores() -> None:
    data = {
        "molecules": 1234,
        "split": {"kind": "scaffold", "hash": "5f" * 8, "test": 124},
        "repeats": {"distinct": 1200, "test_seen": 17, "valid_seen": 0},
    }
    rows = (row_of_results(ESOL, "esol"), row_of_results({**BBBP, "data": data}, "bbbp"))
    seen = Leaderboard(title="x", rows=rows)
    note = "in another form: 17 of 124 in bbbp. Scores may be better than those of new molecules."
    text = markdown_text(seen, None)
    assert "| esol | RMSE ↓, log10(mol/L) | scaffold | 1,234 |" in text
    assert "| bbbp | ROC-AUC ↑ | scaffold | 1,234* |" in text
    page = html_text(seen, None)
    assert "ROC-AUC ↑ · scaffold · 1,234*<" in page
    for shown in (text, page):
        assert note in shown
    assert "another form" not in markdown_text(board(), None) + html_text(board(), None)
    lines = list(csv.DictReader(io.StringIO(csv_text(seen))))
    assert [(x["task"], x["test_seen"], x["test_molecules"]) for x in lines[2:4]] == [
        ("esol", "0", "0"),
        ("bbbp", "17", "124"),
    ]
    assert compare({"a": seen, "b": seen}).rows[1].test_seen == 17


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.00512345, 0.00514321], "0.005133 ± 0.000014 |  | 0.005123, 0.005143 |"),
        ([0.054321], "| 0.05432 |  | 0.05432 |"),
        ([12.3456789], "| 12.346 |  | 12.346 |"),
        ([54321.9], "| 54322 |  | 54322 |"),
        ([0.0], "| 0.0000 |  | 0.0000 |"),
    ],
)
def test_scores_of_every_size_keep_their_digits(values: list[float], shown: str) -> None:
    row = row_of_results(results("qm9_gap", "mae", values), "qm9_gap")
    assert shown in markdown_text(Leaderboard(title="x", rows=(row,)), None)


def test_a_single_seed_has_no_spread_and_equal_seeds_have_none() -> None:
    row = row_of_results(results("esol", "rmse", [0.5], entry(FOREST, [0.6, 0.6], [0.6, 0.6])), "")
    board = Leaderboard(title="x", rows=(row,))
    (shown,) = [line for line in markdown_text(board, None).splitlines() if "| esol | RMSE" in line]
    assert shown.endswith("| **0.5000** | 0.6000 ± 0.0000 |")
    (cells,) = [cells for cells in Table(html_text(board, None)).rows if "RMSE" in cells[0]]
    assert cells[1:] == ["0.5000", "0.6000 ± 0.0000"]


def test_the_page_shows_the_results_and_is_well_formed_and_self_contained() -> None:
    text = html_text(board(), b"\x89PNG")
    page = Table(text)
    (esol,) = [row for row in page.rows if row[0].startswith("esolRMSE")]
    assert esol[1:] == ["1.0000 ± 0.1414", "1.2500 ± 0.0707", "2.0000"]
    standing = next(row for row in page.rows if row[0] == MEAN)
    assert standing[1:4] == ["2", "0", "3.00"]
    assert [link for link in page.links if not link.startswith("data:image/png;base64,")] == [
        "esol/report.md", "bbbp/report.md", "esol/report.md", "bbbp/report.md",
    ]  # fmt: skip
    assert not re.search(r"https?:|@import|url\(", text)


def test_links_lead_to_folders_whatever_their_names() -> None:
    (esol, *_) = board().rows
    folder = 'set #2: 50% "<b>"?'
    rows = (dataclasses.replace(esol, results=folder),)
    page = Table(html_text(Leaderboard(title="", rows=rows), None))
    assert {unquote(urlsplit(link).path) for link in page.links} == {f"{folder}/report.md"}


def test_nothing_of_a_name_or_a_reason_becomes_a_tag_and_no_secret_is_shown() -> None:
    text = html_text(board(), None)
    assert "<script" not in text
    assert html.escape("label <script>|2.5 is none") in text
    for shown in (text, markdown_text(board(), None), csv_text(board())):
        assert "secret" not in shown
        assert "s3://***@bucket has none" in shown


def test_the_figure_has_a_dot_for_each_model_and_task_with_a_baseline() -> None:
    figure = draw_gains(board())
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["esol", "bbbp"]
    for number, name in enumerate((MODEL, FOREST, MEAN)):
        points = axes.containers[number]
        assert isinstance(points, ErrorbarContainer)
        assert points.get_label() == name
        rows = [(row, row.models[number]) for row in board().finished]
        gains = [gain for row, model in rows if (gain := row.gain(model)) is not None]
        assert points.lines[0].get_xdata() == pytest.approx([mean for mean, _ in gains])
        assert np.asarray(points.lines[0].get_ydata(), float).round().tolist() == [0, 1]
        bars = [segment[:, 0] for segment in points.lines[2][0].get_segments()]
        assert [(high - low) / 2 for low, high in bars] == pytest.approx([std for _, std in gains])


def test_rows_of_one_task_are_told_apart_by_their_splits() -> None:
    by_cluster = {**ESOL["data"], "split": {"kind": "butina", "hash": "6e" * 8}}
    rows = (row_of_results(ESOL, "esol"), row_of_results(BBBP, "bbbp"))
    other = (row_of_results({**ESOL, "data": by_cluster}, "esol"),)
    both = compare(
        {"a": Leaderboard(title="a", rows=rows), "b": Leaderboard(title="b", rows=other)}
    )
    figure = draw_gains(both)
    assert figure is not None
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sorted(shown) == ["bbbp", "esol\nbutina", "esol\nscaffold"]
    text = markdown_text(both, None)
    assert "| esol | RMSE ↓, log10(mol/L) | butina |" in text
    assert "log10(mol/L) · butina ·" in html_text(both, None)


def test_dollars_in_names_are_no_formula_in_the_figure() -> None:
    rows = [row_of_results(ESOL, "esol")]
    labelled = compare({"$_$": Leaderboard(title="a", rows=tuple(rows)), "b": board()})
    named = [dataclasses.replace(row, name="price $_$") for row in labelled.rows]
    assert gain_figure(Leaderboard(title="a", rows=tuple(named)))


def write_results(out: Path, folder: str, value: dict[str, Any]) -> None:
    storage.write_json(str(out / folder / "results.json"), value)


def test_written_leaderboards_are_read_again_with_the_newest_results(tmp_path: Path) -> None:
    write_results(tmp_path, "esol", ESOL)
    states = (
        TaskRow(name="esol", status=Status.WAITING),
        TaskRow(name="bbbp", status=Status.WAITING),
        TaskRow(name="hiv", status=Status.ABSENT, reason="no file"),
    )
    first = Leaderboard(title=tmp_path.name, rows=rows_of_states(str(tmp_path), states))
    assert [row.status for row in first.rows] == ["finished", "waiting", "absent"]
    assert write_leaderboard(str(tmp_path), first) == str(tmp_path / "leaderboard.html")
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {f"leaderboard.{end}" for end in ("csv", "html", "json", "md")}
    assert (tmp_path / "figures/leaderboard.png").is_file()
    assert read_leaderboard(str(tmp_path)) == first
    write_results(tmp_path, "bbbp", BBBP)
    again = read_leaderboard(str(tmp_path))
    assert [row.status for row in again.rows] == ["finished", "finished", "absent"]
    assert again.rows[1] == row_of_results(BBBP, "bbbp")


def test_results_without_a_leaderboard_are_found_in_folders_or_in_the_directory_itself(
    tmp_path: Path,
) -> None:
    write_results(tmp_path, "all/esol", ESOL)
    write_results(tmp_path, "all/bbbp", BBBP)
    write_results(tmp_path, "all/bbbp/deeper/below", BBBP)
    found = read_leaderboard(str(tmp_path / "all"))
    assert [row.name for row in found.rows] == ["bbbp", "esol"]
    alone = read_leaderboard(str(tmp_path / "all/esol"))
    assert [row.name for row in alone.rows] == ["esol"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds neither .*nor finished results"):
        read_leaderboard(str(tmp_path / "empty"))


def test_results_that_came_after_a_leaderboard_are_on_the_next_one(tmp_path: Path) -> None:
    write_results(tmp_path, "second", ESOL)
    write_leaderboard(str(tmp_path), read_leaderboard(str(tmp_path)))
    write_results(tmp_path, "first", BBBP)
    found = read_leaderboard(str(tmp_path))
    assert [(row.name, row.results) for row in found.rows] == [
        ("esol", "second"),
        ("bbbp", "first"),
    ]
    # The directory of a single task has a leaderboard of itself.
    alone = str(tmp_path / "first")
    write_leaderboard(alone, read_leaderboard(alone))
    assert [(row.name, row.results) for row in read_leaderboard(alone).rows] == [("bbbp", "")]


@pytest.mark.parametrize("foreign", [[], {}, {"task": {"name": "x"}}, 3], ids=str)
def test_results_of_another_program_are_left_out_where_none_are_expected_and_else_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, foreign: Any
) -> None:
    write_results(tmp_path, "esol", ESOL)
    write_results(tmp_path, "other", foreign)
    assert [row.name for row in read_leaderboard(str(tmp_path)).rows] == ["esol"]
    assert "left out: " in caplog.text
    assert "other/results.json" in caplog.text
    with pytest.raises(DataError, match=r"other/results\.json .*another program wrote it"):
        read_row(str(tmp_path), "other")
    storage.write_json(str(tmp_path / "leaderboard.json"), foreign)
    with pytest.raises(DataError, match=r"leaderboard\.json .*another program wrote it"):
        read_leaderboard(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"baselines": [7]},
        {"baselines": [{"name": "x", "valid": {}, "test": {"mean": 1}}]},
        {"final": {"test": {"mean": 1}}},
    ],
    ids=str,
)
def test_results_that_were_changed_are_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_results(tmp_path, "esol", {**ESOL, **changes})
    with pytest.raises(DataError, match=r"esol/results\.json is not as .* writes it"):
        read_leaderboard(str(tmp_path))


def test_a_status_of_another_version_is_named(tmp_path: Path) -> None:
    row = {"name": "esol", "status": "paused", "reason": "", "results": ""}
    storage.write_json(str(tmp_path / "leaderboard.json"), {"tasks": [row]})
    with pytest.raises(DataError, match=r"expected a status of finished.*esol, found 'paused'"):
        read_leaderboard(str(tmp_path))


def test_a_gain_in_percent_is_given_where_it_means_something() -> None:
    with_gain = ("roc_auc", "balanced_accuracy", "mae")
    for metric in (*with_gain, "r2", "spearman", "mcc"):
        row = row_of_results(results("own", metric, [0.5], entry(FOREST, [0.1], [0.01])), "own")
        assert (row.gain(row.models[0]) is not None) == (metric in with_gain)


def test_equal_baselines_are_shown_once_and_others_with_the_label_of_their_board() -> None:
    scratch = "MoleBLEND, from scratch"

    def board_of(model: float, own: float) -> Leaderboard:
        entries = entry(FOREST, [0.6], [0.6]), entry(scratch, [own], [own])
        row = row_of_results(results("bbbp", "roc_auc", [model], *entries), "bbbp")
        return Leaderboard(title="b", rows=(row,))

    (row,) = compare({"mini": board_of(0.70, 0.65), "base": board_of(0.72, 0.74)}).rows
    assert {model.name: model.test.mean for model in row.models} == {
        f"{MODEL} (mini)": 0.70,
        f"{MODEL} (base)": 0.72,
        FOREST: 0.6,
        f"{scratch} (mini)": 0.65,
        f"{scratch} (base)": 0.74,
    }
    assert row.best == (f"{scratch} (base)",)
    gain = row.gain(row.models[1])
    assert gain is not None
    assert gain[0] == pytest.approx(-2.7, abs=0.01)


def test_a_question_that_a_board_answers_in_several_folders_keeps_all_answers() -> None:
    def row_in(folder: str, score: float) -> TaskRow:
        found = results("bbbp", "roc_auc", [score], entry(FOREST, [0.6], [0.6]))
        return row_of_results(found, folder)

    ours = Leaderboard(title="a", rows=(row_in("/runs/a/mini", 0.7), row_in("/runs/a/base", 0.8)))
    theirs = Leaderboard(title="b", rows=(row_in("/runs/b/bbbp", 0.9),))
    (row,) = compare({"a": ours, "b": theirs}).rows
    assert {model.name: model.test.mean for model in row.models} == {
        f"{MODEL} (a/mini)": 0.7,
        f"{MODEL} (a/base)": 0.8,
        f"{MODEL} (b)": 0.9,
        FOREST: 0.6,
    }


def test_a_baseline_without_randomness_is_the_same_for_any_number_of_seeds() -> None:
    def board_of(seeds: int) -> Leaderboard:
        fixed = entry(MEAN, [0.5] * seeds, [0.4] * seeds)
        drawn = entry(FOREST, [0.6, 0.7, 0.8][:seeds], [0.6, 0.7, 0.8][:seeds])
        found = results("bbbp", "roc_auc", [0.3] * seeds, fixed, drawn)
        return Leaderboard(title="b", rows=(row_of_results(found, "bbbp"),))

    (row,) = compare({"one": board_of(1), "three": board_of(3)}).rows
    names = [model.name for model in row.models if model.is_baseline]
    assert names == [MEAN, f"{FOREST} (one)", f"{FOREST} (three)"]


def test_boards_are_compared_task_by_task_where_their_splits_are_equal() -> None:
    other_split = results("bbbp", "roc_auc", [0.9], split_hash="00" * 8)
    better = results("esol", "rmse", [0.5], entry(FOREST, [9.0], [9.0]))
    boards = {
        "old": board(),
        "new": Leaderboard(
            title="new", rows=(row_of_results(better, "esol"), row_of_results(other_split, "bbbp"))
        ),
    }
    found = compare(boards)
    assert [row.name for row in found.rows] == ["esol", "bbbp", "bbbp", "muv", "hiv", "bace"]
    esol = found.rows[0]
    assert [model.name for model in esol.models] == [
        f"{MODEL} (old)", f"{MODEL} (new)", f"{FOREST} (old)", MEAN, f"{FOREST} (new)",
    ]  # fmt: skip
    assert esol.best == (f"{MODEL} (new)",)
    assert [model.test.mean for model in esol.models if FOREST in model.name] == [1.25, 9.0]
    assert {row.split_hash for row in found.rows[1:3]} == {"5f" * 8, "00" * 8}
    with pytest.raises(ConfigError, match="found 1"):
        compare({"old": board()})


def test_scores_of_other_label_columns_are_not_in_one_row() -> None:
    """Of one table and split, but one score is of two columns, the other of the easier one."""

    def board_of(score: float, *columns: str) -> Leaderboard:
        found = results("own", "rmse", [score])
        found["task"]["columns"] = list(columns)
        return Leaderboard(title="b", rows=(row_of_results(found, "own"),))

    found = compare(
        {"a": board_of(0.9, "x", "y"), "b": board_of(0.5, "y"), "c": board_of(0.8, "y", "x")}
    )
    scores = [[model.test.mean for model in row.models] for row in found.rows]
    assert scores == [[0.9, 0.8], [0.5]]


def test_scores_of_labels_that_were_merged_otherwise_are_not_in_one_row() -> None:
    """Of one split, as the molecules are the same: their labels are means in one and medians in the other."""

    def row_of(
        metric: str, score: float, rule: str | None, replicates: int = 3, bounds: int = 0
    ) -> TaskRow:
        found = results("own", metric, [score])
        if rule is not None:
            found["data"]["replicates"] = {"rule": rule, "molecules": replicates}
            found["final"]["bounds"] = {"x": {"test_bounds": bounds}}
        return row_of_results(found, "own")

    def compared(*rows: TaskRow) -> list[list[float]]:
        boards = {str(i): Leaderboard(title="b", rows=(row,)) for i, row in enumerate(rows)}
        return [[model.test.mean for model in row.models] for row in compare(boards).rows]

    mean, median = row_of("rmse", 0.9, "mean"), row_of("rmse", 0.5, "median")
    assert compared(mean, median, row_of("rmse", 0.7, "mean")) == [[0.9, 0.7], [0.5]]
    assert compared(row_of("rmse", 0.9, None), row_of("rmse", 0.5, "keep")) == [[0.9, 0.5]]
    # Nothing was merged, and of classes the more frequent one is taken by either rule.
    assert compared(row_of("rmse", 0.9, "mean", 0), row_of("rmse", 0.5, "median", 0)) == [
        [0.9, 0.5]
    ]
    assert compared(row_of("roc_auc", 0.9, "mean"), row_of("roc_auc", 0.5, "median")) == [
        [0.9, 0.5]
    ]
    # Errors are also of bounds, correlations are not.
    for metric, expected in (("rmse", [[0.9], [0.5]]), ("r2", [[0.9, 0.5]])):
        rows = row_of(metric, 0.9, "keep"), row_of(metric, 0.5, "keep", bounds=4)
        assert compared(*rows) == expected
    board = Leaderboard(title="b", rows=(row_of("rmse", 0.5, "median", bounds=4),))
    assert f"scaffold, median of replicates, with bounds `{'5f' * 8}`" in markdown_text(board, None)
