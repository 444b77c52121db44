"""Several tasks on one cluster: one that fails stops nothing, and what is finished is not repeated."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import (
    BaselineConfig,
    PredictConfig,
    RefitConfig,
    SweepConfig,
    TaskConfig,
)
from moleblend_ray.config.status import StatusConfig
from moleblend_ray.data.files import storage
from moleblend_ray.errors import TrainingError
from moleblend_ray.evaluation.results.status import RefitStatus
from moleblend_ray.evaluation.search import SearchSpace
from moleblend_ray.inference import PropertyPredictor
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.orchestration.downstream.refit import (
    RefitTasksSummary,
    refit_or_tasks,
    refit_tasks,
)
from moleblend_ray.orchestration.downstream.task_groups import sweep_tasks
from moleblend_ray.orchestration.library.predict import predict
from moleblend_ray.orchestration.status import status

pytestmark = pytest.mark.ray

RINGS = ("c1ccccc1", "c1ccncc1", "C1CCCCC1", "C1CCNCC1", "c1ccsc1", "c1ccoc1", "C1CCOCC1")


def write_table(path: Path, column: str, *, first: float) -> None:
    """42 molecules, each labelled with the length of its chain, but the first one."""
    rows = [f"{'C' * length}{ring},{length}" for length in range(1, 7) for ring in RINGS]
    rows[0] = f"C{RINGS[0]},{first}"
    path.write_text("\n".join([f"smiles,{column}", *rows]) + "\n")


def test_a_group_goes_on_after_a_failing_task_and_only_that_one_is_tried_again(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_table(tmp_path / "bbbp.csv", "p_np", first=2.5)
    write_table(tmp_path / "SAMPL.csv", "expt", first=1.0)
    config = SweepConfig(
        task=TaskConfig(name=("bbbp", "freesolv"), source=str(tmp_path), conformers=0),
        out=str(tmp_path / "out"),
        model=ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2),
        search=SearchSpace(
            epochs=(1, 1),
            batch_size=(16,),
            searcher="random",
            scheduler="none",
            choices={"readout": ("token", "mean"), "frozen_blocks": (None, 0)},
        ),
        num_trials=2,
        final_seeds=(3,),
        baseline=BaselineConfig(kinds=()),
        cluster=ClusterConfig(num_workers=2),
    )
    with pytest.raises(TrainingError, match=r"1 of 2 tasks failed: bbbp: .*'p_np'.*2\.5"):
        sweep_tasks(config)
    out = tmp_path / "out"
    results = storage.read_json(str(out / "freesolv/results.json"))
    assert {trial["status"] for trial in results["trials"]} == {"finished"}
    assert {trial["settings"]["readout"] for trial in results["trials"]} <= {"token", "mean"}
    board = storage.read_json(str(out / "leaderboard.json"))
    assert [(row["name"], row["status"]) for row in board["tasks"]] == [
        ("bbbp", "failed"),
        ("freesolv", "finished"),
    ]
    assert board["tasks"][1]["models"][0]["test"] == results["final"]["test"]
    assert "classification labels are 0, 1 or empty" in (out / "leaderboard.html").read_text()

    finished = {path: path.stat().st_mtime_ns for path in (out / "freesolv").rglob("*.json")}
    with pytest.raises(TrainingError, match="1 of 2 tasks failed: bbbp"):
        sweep_tasks(config)
    assert {path: path.stat().st_mtime_ns for path in (out / "freesolv").rglob("*.json")} == (
        finished
    )

    # Once all are finished, models of both predict together: those that were scored, and those for use.
    rows = [f"{'C' * (1 + row % 5)}{RINGS[row % 7]},{row % 2}" for row in range(42)]
    (tmp_path / "bbbp.csv").write_text("\n".join(["smiles,p_np", *rows]) + "\n")
    with caplog.at_level(logging.WARNING):
        one = refit_tasks(
            RefitConfig(results=str(out), out=str(tmp_path / "one"), cluster=config.cluster)
        )
    assert (one.tasks, one.models) == (1, 1)
    assert "bbbp have no results, and get no models" in caplog.text
    shutil.rmtree(out / "bbbp/data")  # as the error says: its source is another one now
    assert sweep_tasks(config).tasks_finished == 2
    final = refit_or_tasks(
        RefitConfig(results=str(out), out=str(tmp_path / "final"), cluster=config.cluster)
    )
    assert isinstance(final, RefitTasksSummary)
    assert (final.tasks, final.models) == (2, 2)
    state = status(StatusConfig(run=final.out))
    assert isinstance(state, RefitStatus)
    assert (state.state, state.models_done) == ("finished", 2)
    again = refit_tasks(RefitConfig(results=str(out), out=final.out, cluster=config.cluster))
    assert again.already_finished
    (tmp_path / "new.csv").write_text("smiles\nCCCCc1ccccc1\nnothing\nCCO\n")
    found = predict(
        PredictConfig(
            models=final.out,
            source=str(tmp_path / "new.csv"),
            out=str(tmp_path / "predictions"),
            csv=True,
            cluster=ClusterConfig(num_data_actors=1),
        )
    )
    assert found.columns == ("bbbp", "freesolv")
    assert (found.models, found.unit) == (2, "kcal/mol")
    table = pd.read_csv(tmp_path / "predictions/predictions.csv")
    for name in ("bbbp", "freesolv"):
        alone = PropertyPredictor.from_pretrained(f"{final.out}/{name}").predict(table["smiles"])
        (column,) = (c for c in alone.column_names if c.startswith("prediction:"))
        np.testing.assert_allclose(table[f"prediction:{name}"], alone[column].to_numpy(), rtol=1e-5)
    assert PropertyPredictor.from_pretrained(str(out)).predict(["CCO"]).num_rows == 1
