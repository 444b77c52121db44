"""Kill `moleblend sweep` among its trials, type it again: what was trained is not trained again, what fails ends nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import LIMIT_S, finish, kill_when, moleblend

from moleblend_ray.cli import EXIT_INTERRUPTED, EXIT_UNFINISHED

NUM_TRIALS, NUM_EPOCHS = 6, 3
NUM_SCORED = 4
"""Of the trials that the search's seed draws; the learning rates of the others are too high."""
LOG = "trainings.log"
RINGS = ("c1ccccc1", "c1ccncc1", "C1CCCCC1", "C1CCNCC1", "c1ccsc1", "c1ccoc1", "C1CCOCC1")

# Runs in the worker processes, to which Ray sends what `__main__` defines: each training writes down that it began.
COUNTED = """
import json
import time
from unittest import mock

from moleblend_ray.orchestration.downstream import sweep, workers

LOG, PAUSE_S = {log!r}, {pause_s}


def run_trial(drawn, **others):
    train = workers.finetune_once

    def counted(*arguments, report, **settings):
        with open(LOG, "a") as log:
            log.write(json.dumps(drawn, sort_keys=True) + "\\n")

        def slowly(epoch):
            report(epoch)
            time.sleep(PAUSE_S)

        return train(*arguments, report=slowly, **settings)

    with mock.patch.object(workers, "finetune_once", counted):
        workers.run_trial(drawn, **others)


sweep.run_trial = run_trial
"""


def write_table(path: Path) -> None:
    rows = [f"{'C' * length}{ring},{length}" for length in range(1, 9) for ring in RINGS]
    path.write_text("\n".join(["smiles,size", *rows]) + "\n")


def start(folder: Path, *, pause_s: float) -> subprocess.Popen[str]:
    return moleblend(
        "sweep",
        "task.name=size",
        "task.source=molecules.csv",
        "task.columns=[size]",
        "task.kind=regression",
        "task.conformers=0",
        "out=out",
        "model=tiny",
        "model.num_layers=1",
        "finetune.micro_batch_size=64",
        # The upper learning rates overflow: two of these trials must fail.
        "search.learning_rate=[1e-30,1e20]",
        "search.batch_size=[8,16]",
        f"search.epochs=[{NUM_EPOCHS},{NUM_EPOCHS}]",
        f"grace_epochs={NUM_EPOCHS}",
        f"num_trials={NUM_TRIALS}",
        "final_seeds=[3]",
        "baseline.kinds=[]",
        "cluster.num_workers=2",
        work=folder,
        before=COUNTED.format(log=str(folder / LOG), pause_s=pause_s),
    )


def trainings(folder: Path) -> Counter[str]:
    """How often training began, by the drawn settings."""
    return Counter((folder / LOG).read_text().splitlines())


def epochs_of(out: Path) -> dict[Path, list[dict[str, Any]]]:
    """The records of trials by file: what is known of each epoch."""
    return {path: json.loads(path.read_text()) for path in out.glob("tune/epochs/*.json")}


def over(out: Path) -> list[Path]:
    """The records of trials that reached their last epoch."""
    return [path for path, epochs in epochs_of(out).items() if epochs[-1]["over"]]


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_killed_at_its_start_and_among_its_trials_trains_each_finished_trial_once(
    tmp_path: Path,
) -> None:
    write_table(tmp_path / "molecules.csv")
    out = tmp_path / "out"
    # Between the settings of the search and the first record of its state there are seconds.
    settings = out / "tune/search/tuner.pkl"
    kill_when(settings.exists, start(tmp_path, pause_s=0.3))
    assert not list(out.glob("tune/search/experiment_state-*")), "the kill came too late"

    kill_when(lambda: len(over(out)) >= 2, start(tmp_path, pause_s=0.3))
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in over(out)}
    assert len(kept) < NUM_SCORED, "the kill came too late to prove anything"
    assert not (out / "results.json").exists()

    finish(start(tmp_path, pause_s=0.0))
    trials = json.loads((out / "results.json").read_text())["trials"]
    assert [trial["number"] for trial in trials] == list(range(NUM_TRIALS))
    assert len({json.dumps(trial["settings"], sort_keys=True) for trial in trials}) == NUM_TRIALS

    # A trial that was over is neither trained nor written again; each epoch of each trial is there once.
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept} == kept
    scored = [trial for trial in trials if trial["status"] == "finished"]
    records = list(epochs_of(out).values())
    assert len(records) == len(scored) == NUM_SCORED
    for epochs in records:
        assert [epoch["epoch"] for epoch in epochs] == list(range(1, NUM_EPOCHS + 1))
    assert {trial["epochs"] for trial in scored} == {NUM_EPOCHS}
    best = [epochs[-1]["best_valid_score"] for epochs in records]
    assert sorted(trial["valid_score"] for trial in scored) == sorted(best)
    begun = trainings(tmp_path)
    assert set(begun) == {json.dumps(trial["settings"], sort_keys=True) for trial in trials}
    scores = {json.loads(content)[-1]["best_valid_score"] for content, _ in kept.values()}
    once = [trial["settings"] for trial in scored if trial["valid_score"] in scores]
    assert len(once) == len(kept)
    assert {begun[json.dumps(drawn, sort_keys=True)] for drawn in once} == {1}

    # What fails is tried again by a command that continues, and recorded; the sweep goes on to its end.
    failed = [trial for trial in trials if trial["status"] == "failed"]
    assert len(failed) == NUM_TRIALS - NUM_SCORED
    assert all("finetune.learning_rate" in trial["error"] for trial in failed)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGTERM, EXIT_UNFINISHED, "stopped by SIGTERM; the same command continues"),
        (signal.SIGINT, EXIT_INTERRUPTED, "interrupted; the same command continues"),
    ],
)
def test_a_sweep_that_is_asked_to_stop_among_its_trials_says_so_and_chooses_among_none_of_them(
    tmp_path: Path, number: signal.Signals, status: int, said: str
) -> None:
    write_table(tmp_path / "molecules.csv")
    # Its process then waits for the trials within Ray, where the signal finds it.
    process = start(tmp_path, pause_s=5.0)
    deadline = time.monotonic() + LIMIT_S
    while not (tmp_path / LOG).exists():
        assert process.poll() is None, "it ended before it was asked to"
        assert time.monotonic() < deadline, "no trial began"
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == status, errors[-3000:]
    assert errors.splitlines()[-1].endswith(said)
    # Nor does the stack trace of Ray's own handler appear, which would also end a slow shutdown by SIGABRT.
    assert "SIGTERM received" not in errors
    assert not (tmp_path / "out/models").exists()
    if number is not signal.SIGINT:
        return
    # Tune itself ended these trials. Otherwise what is left is that of a killed command.
    finish(start(tmp_path, pause_s=0.0))
    trials = json.loads((tmp_path / "out/results.json").read_text())["trials"]
    assert len(trials) == NUM_TRIALS
    scored = [trial for trial in trials if trial["status"] == "finished"]
    assert [trial["epochs"] for trial in scored] == [NUM_EPOCHS] * NUM_SCORED
