"""`moleblend sweep` over the files of MoleculeNet, killed in the middle and started again: what is kept, and the scores.

    python benchmarks/sweep_moleculenet.py --data DIR --work DIR [--tasks bbbp,esol] [--kill-at 0.5] [KEY=VALUE ...]

``--data`` holds a file for each task, found by name; by default every task of MoleculeNet that is there is swept. ``KEY=VALUE`` are
settings of the sweep (checkpoint=URI num_trials=10 ...). When ``--kill-at`` of all trials have begun, the command's process group gets
SIGKILL, and the same command is started once more.

What was finished at the kill is told by the files it left: results of tasks and seeds, records of trials that reached their last
epoch (`tune/epochs`), and trials that were stopped early by the last stored state of a search. Repeated is a task, seed or record whose file was
written again, and a trial that took more than a tenth of its training time once more, by Ray Tune's log of it (a trial
whose end the stored state had not seen reports its epochs again from the record, in no time). One JSON line comes last, with
the scores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moleblend_ray.config.compose import load_config
from moleblend_ray.config.downstream import SweepConfig
from moleblend_ray.config.paths import with_absolute_paths
from moleblend_ray.data.files import storage
from moleblend_ray.evaluation.search import with_drawn
from moleblend_ray.evaluation.sources import task_sources
from moleblend_ray.evaluation.tasks import GROUPS, TASKS
from moleblend_ray.orchestration.downstream.workers import TrialRecord

COMMAND = (sys.executable, "-m", "moleblend_ray.cli", "sweep")
POLL_S = 0.5
REPEATED_SHARE = 0.1
"""Of its training time: a trial that takes longer after the kill was trained again."""
REPLAY_S = 5.0
"""A trial that takes less was not, however short its training is: epochs are reported again on a busy machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What was finished at a moment: file -> (time of writing in ns, SHA-256)."""

    tasks: dict[Path, tuple[int, str]]
    seeds: dict[Path, tuple[int, str]]
    trials: dict[Path, tuple[int, str]]
    """Records of trials that reached their last epoch."""
    ended: frozenset[Path]
    """Folders of trials that had ended, early or not, by the stored states of the searches."""

    @classmethod
    def of(cls, out: Path) -> Kept:
        # At any depth: the encoder without pretraining, a baseline, has a search of its own within the task's folder.
        records = out.glob("**/tune/epochs/*.json")
        searches = out.glob("**/tune/search")
        return cls(
            tasks={path: _signature(path) for path in out.glob("*/results.json")},
            seeds={path: _signature(path) for path in out.glob("**/models/*/result.json")},
            trials={path: _signature(path) for path in records if _is_over(path)},
            ended=frozenset(folder for search in searches for folder in _ended(search)),
        )

    @staticmethod
    def rewritten(files: dict[Path, tuple[int, str]]) -> list[Path]:
        """Those that are not as they were."""
        return [path for path, signature in files.items() if _signature(path) != signature]


def main() -> None:
    arguments = parse_arguments()
    work = Path(arguments.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    out = work / "out"
    tasks = arguments.tasks.split(",") if arguments.tasks else found_tasks(arguments.data)
    overrides = [
        f"task.name=[{','.join(tasks)}]",
        f"task.source={Path(arguments.data).absolute()}",
        f"out={out}",
        *arguments.overrides,
    ]
    config = with_absolute_paths(load_config(SweepConfig, "sweep", overrides))
    num_trials = len(tasks) * config.num_trials
    say(f"{len(tasks)} tasks, {num_trials} trials: {', '.join(tasks)}")
    began = time.monotonic()
    with (work / "log.txt").open("a") as log:
        process = start(overrides, log)
        was_killed = kill_at(process, out, arguments.kill_at * num_trials)
        first_s = time.monotonic() - began
        kept, killed_at = Kept.of(out), time.time()
        say(
            f"{'killed' if was_killed else 'ended'} after {first_s:.0f} s: {len(kept.tasks)} tasks, {len(kept.seeds)} seeds, "
            f"{len(kept.trials)} trials were finished, {len(kept.ended)} ended by the stored states"
        )
        began = time.monotonic()
        status = start(overrides, log).wait()
    repeated = repeated_trials(config, out, kept, killed_at)
    line = {
        "benchmark": "sweep_moleculenet",
        "tasks": list(tasks),
        "status": status,
        "killed": was_killed,
        "first_command_s": round(first_s, 1),
        "second_command_s": round(time.monotonic() - began, 1),
        "finished_at_kill": {
            "tasks": len(kept.tasks),
            "seeds": len(kept.seeds),
            "trials": len(kept.trials),
            "trials_by_state": len(kept.ended),
        },
        "repeated": {
            "tasks": len(Kept.rewritten(kept.tasks)),
            "seeds": len(Kept.rewritten(kept.seeds)),
            "trials": len(repeated) + len(Kept.rewritten(kept.trials)),
        },
        **outcome(out, config.num_trials),
    }
    print(json.dumps(line))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="directory with a file for each task")
    parser.add_argument("--work", required=True, help="directory of the results and the log")
    parser.add_argument("--tasks", help="names with commas between; all that are there")
    parser.add_argument("--kill-at", type=float, default=0.5, help="share of all trials; 2: never")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    return parser.parse_intermixed_args()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def found_tasks(data: str) -> list[str]:
    return list(task_sources(data, [TASKS[name] for name in GROUPS["moleculenet"]]).found)


def start(overrides: Sequence[str], log: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *overrides], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def kill_at(process: subprocess.Popen[bytes], out: Path, num_trials: float) -> bool:
    """SIGKILL for the process group as soon as so many trials have begun; False if it ended before."""
    while process.poll() is None:
        if len(list(out.glob("*/tune/epochs/*.json"))) >= num_trials:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(POLL_S)
    return False


def repeated_trials(config: SweepConfig, out: Path, kept: Kept, killed_at: float) -> list[Path]:
    """Folders of trials that had ended at the kill and were trained again after it."""
    found = []
    for folder in (path.parent for path in out.glob("**/tune/search/trial-*/result.json")):
        lines = [json.loads(line) for line in (folder / "result.json").open() if line.strip()]
        record = _record_path(config, folder)
        if record not in kept.trials and folder not in kept.ended:
            continue
        again_s = sum(line["time_this_iter_s"] for line in lines if line["timestamp"] > killed_at)
        training_s = json.loads(record.read_text())[-1]["seconds"]
        if again_s > max(REPLAY_S, REPEATED_SHARE * training_s):
            found.append(folder)
    return found


def _record_path(config: SweepConfig, trial: Path) -> Path:
    drawn = json.loads((trial / "params.json").read_text())
    settings = with_drawn(config.finetune, drawn)
    records = str(trial.parents[1] / "epochs")
    return Path(TrialRecord.read(records, settings, config.search_seed).uri)


def _ended(search: Path) -> list[Path]:
    """Folders of the trials that the newest stored state of a search knows as ended."""
    states = sorted(search.glob("experiment_state-*.json"))
    if not states:
        return []
    try:
        stored = json.loads(states[-1].read_text())["trial_data"]
    except json.JSONDecodeError:
        # Cut short by the kill: the search begins again, or from the state before.
        return []
    trials = [json.loads(trial) for trial, _ in stored]
    return [
        search / trial["relative_logdir"] for trial in trials if trial["status"] == "TERMINATED"
    ]


def outcome(out: Path, num_trials: int) -> dict[str, Any]:
    """Scores and standings, and whether each finished task has all its trials, each epoch of them once."""
    board = storage.read_json(str(out / "leaderboard.json"))
    complete = []
    for path in sorted(out.glob("*/results.json")):
        trials = json.loads(path.read_text())["trials"]
        records = [json.loads(r.read_text()) for r in path.parent.glob("tune/epochs/*.json")]
        epochs_once = all(
            [epoch["epoch"] for epoch in epochs] == list(range(1, len(epochs) + 1))
            for epochs in records
        )
        numbers = [trial["number"] for trial in trials]
        complete.append(numbers == list(range(num_trials)) and epochs_once)
    return {
        "tasks_complete": sum(complete),
        "states": {row["name"]: row["status"] for row in board["tasks"]},
        "scores": {
            row["name"]: {
                model["name"]: {
                    "test": round(model["test"]["mean"], 5),
                    "std": round(model["test"]["std"], 5),
                }
                for model in row["models"]
            }
            for row in board["tasks"]
            if row["models"]
        },
        "standings": board["standings"],
    }


def _is_over(record: Path) -> bool:
    epochs = json.loads(record.read_text())
    return bool(epochs) and bool(epochs[-1]["over"])


def _signature(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
