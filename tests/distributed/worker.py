"""One rank of a distributed test: ``python worker.py PLAN.json``, with the environment that torchrun would set.

The plan is a list of tasks done one after the other in one process group, for starting processes is what costs.
A task trains the toy model and writes its records to ``<task's result>``.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import toy
from torch.utils._python_dispatch import TorchDispatchMode

from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.errors import MoleBlendError
from moleblend_ray.training import saving
from moleblend_ray.training.checkpoint import restore_training_state
from moleblend_ray.training.config import CheckpointConfig
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.metrics import Record
from moleblend_ray.training.ranks import Ranks, current_ranks
from moleblend_ray.training.saving import CheckpointWriter
from moleblend_ray.training.validation import build_validation


def run(task: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    start = task.get("start", 0)
    model = toy.DROPOUT_MODEL if task.get("dropout") else toy.MODEL
    learner = toy.learner(
        ranks,
        strategy=task["strategy"],
        fsdp_replicas=task.get("replicas", 1),
        fsdp_reshard=task.get("reshard", True),
        compile=task.get("compile", False),
        on_non_finite=task.get("on_non_finite", "stop"),
        num_steps=task.get("num_steps", 8),
        model=model,
        precision=task.get("precision", "fp32"),
        validate_every=2,
    )
    validate = None
    if "data" in task:
        manifest = load_manifest(task["data"])
        validate = build_validation(task["data"], manifest, learner, micro_batch_size=4)
    writer = None
    if "run" in task:
        if start:
            restore_training_state(learner.model, learner.optimizer, task["run"], start, ranks)
        writer = CheckpointWriter(
            CheckpointConfig(every_steps=2, keep_last=3, max_failed_saves=1),
            task["run"],
            ranks,
            identity={"data_fingerprint": "toy"},
            config_fingerprint="toy",
            start_step=start,
        )
    if "failing_saves" in task:
        fail_saves(task["failing_saves"], ranks)
    steps = toy.steps(ranks.rank, ranks.world_size, start)
    poison = task.get("poison")
    if poison is not None:
        steps = (_poisoned(batch, poison) for batch in steps)
    stop_after = task.get("stop_after")
    polls = iter(range(start, 1000))
    records: list[Record] = []
    collectives = Collectives()
    with collectives if task.get("count") else nullcontext():
        result = fit(
            learner,
            steps,
            start_step=start,
            checkpoints=writer,
            validate=validate,
            hooks=Hooks(
                report=records.append,
                # Only the last rank asks: all must follow.
                should_stop=lambda: (
                    ranks.rank == ranks.world_size - 1 and next(polls) == stop_after
                ),
            ),
        )
    return {
        "step": result.step,
        "stopped": result.stopped,
        "records": records,
        "collectives": collectives.counts,
    }


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How often each operation of torch.distributed is called within."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def fail_saves(steps: list[int], ranks: Ranks) -> None:
    """The last rank cannot bring its files of these steps to their place."""
    place = saving._place_file

    def maybe(path: Path, folder: str) -> Any:
        if ranks.rank == ranks.world_size - 1 and int(folder[-8:]) in steps:
            raise OSError(28, "No space left on device")
        return place(path, folder)

    saving._place_file = maybe


def _poisoned(batch: Any, molecule_id: int) -> Any:
    """Coordinates of one molecule become infinite, though they claim to be known."""
    for micro in batch.micro_batches:
        ids = micro.molecule_ids.repeat(micro.num_atoms)
        micro.positions[ids == molecule_id] = float("inf")
    return batch


def main(plan: Path) -> None:
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    ranks = current_ranks(use_gpu=False, local_rank=int(os.environ["LOCAL_RANK"]))
    for task in json.loads(plan.read_text()):
        # The type of parameters, and so of everything computed from them.
        torch.set_default_dtype(getattr(torch, task.get("dtype", "float32")))
        try:
            outcome = run(task, ranks)
        except MoleBlendError as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        Path(f"{task['result']}.{ranks.rank}").write_text(json.dumps(outcome))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All results are on file and the group is closed. Leave without the interpreter's teardown, in which torch's
    # communication threads now and then abort the process ("terminate called without an active exception").
    sys.stderr.flush()
    os._exit(0)
