"""Leaderboards are made again from results on disk, and several compared, without touching a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moleblend_ray.config.downstream import LeaderboardConfig
from moleblend_ray.data.files import storage
from moleblend_ray.errors import DataError
from moleblend_ray.orchestration.leaderboard import leaderboard


def write_results(folder: Path, score: float) -> Path:
    def entry(name: str, value: float) -> dict[str, Any]:
        spread = {"mean": value, "std": 0.0, "values": [value]}
        return {"name": name, "valid": spread, "test": spread}

    results = {
        "task": {"name": "esol", "metric": "rmse", "higher_is_better": False, "unit": ""},
        "data": {"molecules": 60, "split": {"kind": "scaffold", "hash": "5f" * 8}},
        "final": entry("MoleBLEND, fine-tuned", score),
        "baselines": [entry("forest", 1.0)],
    }
    storage.write_json(str(folder / "esol/results.json"), results)
    return folder


def test_a_leaderboard_is_written_beside_its_results_with_links_to_them(tmp_path: Path) -> None:
    run = write_results(tmp_path / "run", 0.5)
    summary = leaderboard(LeaderboardConfig(run=str(run)))
    assert summary.leaderboard == str(run / "leaderboard.html")
    assert (summary.tasks_finished, summary.wins) == (1, {"MoleBLEND, fine-tuned": 1, "forest": 0})
    assert 'href="esol/report.md"' in (run / "leaderboard.html").read_text()


def test_models_of_several_runs_stand_side_by_side_under_the_shortest_names(tmp_path: Path) -> None:
    first = write_results(tmp_path / "old" / "sweep", 0.9)
    second = write_results(tmp_path / "new" / "sweep", 0.5)
    out = tmp_path / "compared"
    summary = leaderboard(LeaderboardConfig(run=str(first), against=(str(second),), out=str(out)))
    assert summary.wins == {
        "MoleBLEND, fine-tuned (new/sweep)": 1,
        "MoleBLEND, fine-tuned (old/sweep)": 0,
        "forest": 0,
    }
    assert summary.tasks == 1
    assert "href" not in (out / "leaderboard.html").read_text()
    assert storage.read_json(str(out / "leaderboard.json"))["tasks"][0]["results"] == str(
        first / "esol"
    )
    assert not list(first.glob("leaderboard*"))
    with pytest.raises(DataError, match="is a leaderboard of results in other directories"):
        leaderboard(LeaderboardConfig(run=str(out)))


def test_a_leaderboard_of_one_task_s_own_directory_can_be_made_again(tmp_path: Path) -> None:
    run = write_results(tmp_path, 0.5) / "esol"
    first, second = (leaderboard(LeaderboardConfig(run=str(run))) for _ in range(2))
    assert second.wins == first.wins == {"MoleBLEND, fine-tuned": 1, "forest": 0}
