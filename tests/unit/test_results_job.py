"""The report of `make results` over the leaderboards of its stages."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moleblend_ray.evaluation.reports.leaderboard import Leaderboard, row_of_results
from moleblend_ray.evaluation.reports.leaderboard_page import write_leaderboard

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "results.py"


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_job", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def board(title: str) -> Leaderboard:
    def entry(name: str, score: float) -> dict[str, object]:
        spread = {"mean": score, "std": 0.0, "values": [score]}
        return {"name": name, "valid": spread, "test": spread}

    results = {
        "task": {"name": "logp", "metric": "rmse", "higher_is_better": False, "unit": ""},
        "data": {"molecules": 10, "split": {"kind": "scaffold", "hash": "5f"}},
        "final": entry("model", 0.5),
        "baselines": [entry("forest", 0.7)],
    }
    return Leaderboard(title=title, rows=(row_of_results(results, "logp"),))


def test_the_report_has_one_title_and_shows_figures_that_are_there(
    job: ModuleType, tmp_path: Path
) -> None:
    for name in ("samples", "qm9"):
        write_leaderboard(str(tmp_path / name), board(name))
    evidence = job.Evidence(data=None, out=str(tmp_path), budget=job.QUICK, threads=1)
    assert set(job.write_report(evidence)) == {"samples", "qm9"}
    text = (tmp_path / "report.md").read_text()
    assert re.findall(r"^# .*$", text, flags=re.MULTILINE) == ["# Results"]
    assert re.findall(r"^## .*$", text, flags=re.MULTILINE) == ["## samples", "## qm9"]
    figures = re.findall(r"\]\((.*\.png)\)", text)
    assert len(figures) == 2
    assert all((tmp_path / figure).is_file() for figure in figures)
    assert text.count(job.SAMPLES_NOTE) == 1


def test_pretraining_without_a_checkpoint_is_not_reported(job: ModuleType, tmp_path: Path) -> None:
    evidence = job.Evidence(data=None, out=str(tmp_path), budget=job.QUICK, threads=1)
    write_leaderboard(str(tmp_path / "samples"), board("samples"))
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/config.json").write_text("{}")
    assert set(job.write_report(evidence)) == {"samples"}
    assert "steps of pretraining" not in (tmp_path / "report.md").read_text()
