"""The same run on 1, 2 and 4 processes, under FSDP2, HSDP and DDP, interrupted and continued at another world size."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy
from synthetic import write_dataset

from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME
from moleblend_ray.data.dataset.manifest import fingerprint, load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.training.commits import committed_steps
from moleblend_ray.training.metrics import read_records

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT_S = 300
COMPARED = ("loss", "loss_spd", "loss_edge", "loss_direction", "loss_denoise", "grad_norm")


def launch(world_size: int, tasks: dict[str, dict[str, Any]], folder: Path) -> dict[str, list[Any]]:
    """Run tasks (name -> settings) one after the other on ``world_size`` processes: name -> outcome of each rank."""
    folder.mkdir()
    plan = folder / "plan.json"
    plan.write_text(
        json.dumps([{**task, "result": str(folder / name)} for name, task in tasks.items()])
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(plan)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                # What PyTorch is about to take away.
                "PYTHONWARNINGS": "error::FutureWarning",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return {
        name: [json.loads((folder / f"{name}.{rank}").read_text()) for rank in range(world_size)]
        for name in tasks
    }


def assert_same_steps(
    found: list[dict[str, Any]], expected: list[dict[str, Any]], *, tolerance: float = 1e-5
) -> None:
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in COMPARED:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (
                ours["step"],
                name,
            )
        for name in ("molecules", "molecules_checksum", "atoms", "learning_rate"):
            assert ours[name] == theirs[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world_sizes")


@pytest.fixture(scope="module")
def data(folder: Path) -> str:
    """A data set whose valid split has 10 molecules: three micro-batches of 4, so two ranks have unequal shares."""
    uri = str(folder / "data")
    write_dataset(uri, 40, shard_rows=30)
    manifest = load_manifest(uri)
    shards = (manifest.shards[0], replace(manifest.shards[1], split="valid"))
    manifest = replace(manifest, shards=shards, fingerprint=fingerprint(1, {}, (), shards))
    storage.write_json(storage.join(uri, MANIFEST_NAME), manifest.to_json())
    return uri


@pytest.fixture(scope="module")
def one(folder: Path, data: str) -> dict[str, list[Any]]:
    """One process without a process group; it leaves a checkpoint at step 4 for the others."""
    return launch(
        1,
        {
            "whole": {"strategy": "none", "data": data},
            "first_half": {"strategy": "none", "run": str(folder / "from_one"), "stop_after": 3},
            "float64": {"strategy": "none", "dtype": "float64"},
            "dropout": {"strategy": "none", "dtype": "float64", "dropout": True},
        },
        folder / "one",
    )


@pytest.fixture(scope="module")
def two(folder: Path, data: str, one: dict[str, list[Any]]) -> dict[str, list[Any]]:
    from_one, from_two = str(folder / "from_one"), str(folder / "from_two")
    return launch(
        2,
        {
            "fsdp": {"strategy": "fsdp", "count": True},
            "long": {"strategy": "fsdp", "num_steps": 40},
            "kept": {"strategy": "fsdp", "reshard": False, "count": True},
            # Validations and checkpoints between the steps.
            "kept_and_saved": {
                "strategy": "fsdp",
                "reshard": False,
                "data": data,
                "run": str(folder / "kept"),
            },
            "ddp": {"strategy": "ddp"},
            **({"compiled": {"strategy": "fsdp", "compile": True}} if shutil.which("g++") else {}),
            "float64": {"strategy": "ddp", "dtype": "float64"},
            "dropout": {"strategy": "fsdp", "dtype": "float64", "dropout": True},
            "bf16": {"strategy": "fsdp", "precision": "bf16"},
            "from_one": {"strategy": "ddp", "run": from_one, "start": 4},
            # Step 3 ends with a validation, then a checkpoint.
            "stopped": {"strategy": "fsdp", "run": from_two, "stop_after": 4, "data": data},
            "poisoned": {"strategy": "fsdp", "poison": 7},
            "skipped": {"strategy": "fsdp", "poison": 7, "on_non_finite": "skip"},
            # Last, for the failures stay.
            "failed_save": {"strategy": "fsdp", "run": str(folder / "a"), "failing_saves": [4]},
            "failed_saves": {"strategy": "ddp", "run": str(folder / "b"), "failing_saves": [4, 6]},
        },
        folder / "two",
    )


@pytest.fixture(scope="module")
def four(folder: Path, two: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return launch(
        4,
        {
            "fsdp": {"strategy": "fsdp"},
            "long": {"strategy": "fsdp", "num_steps": 40},
            "ddp": {"strategy": "ddp"},
            "hsdp": {"strategy": "fsdp", "replicas": 2},
            "float64": {"strategy": "fsdp", "dtype": "float64"},
            "dropout": {"strategy": "ddp", "dtype": "float64", "dropout": True},
            "three_replicas": {"strategy": "fsdp", "replicas": 3},
            "from_two": {
                "strategy": "fsdp",
                "replicas": 2,
                "run": str(folder / "from_two"),
                "start": 5,
            },
        },
        folder / "four",
    )


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_two_processes_give_the_steps_of_one(one: Any, two: Any, strategy: str) -> None:
    assert_same_steps(two[strategy][0]["records"], one["whole"][0]["records"])


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp", "ddp"])
def test_four_processes_give_the_steps_of_one(one: Any, four: Any, strategy: str) -> None:
    assert_same_steps(four[strategy][0]["records"], one["whole"][0]["records"])


def test_sharded_runs_of_two_and_four_processes_are_equal_to_the_last_bit(
    two: Any, four: Any
) -> None:
    # Gradients of different ranks are added in float64 on CPU; a float32 sum would depend on its order. And an update
    # rounds an element in the same way wherever its tensor is cut.
    for one, other in (("fsdp", "fsdp"), ("fsdp", "hsdp"), ("long", "long")):
        for ours, theirs in zip(two[one][0]["records"], four[other][0]["records"], strict=True):
            assert {name: ours[name] for name in COMPARED} == {
                name: theirs[name] for name in COMPARED
            }


@pytest.mark.parametrize("task", ["kept", "kept_and_saved"])
def test_gathered_parameters_that_are_kept_during_a_step_change_no_bit(two: Any, task: str) -> None:
    for ours, theirs in zip(two[task][0]["records"], two["fsdp"][0]["records"], strict=True):
        assert {name: ours[name] for name in COMPARED} == {name: theirs[name] for name in COMPARED}


def test_parameters_are_gathered_twice_in_each_micro_batch_or_once_a_step(two: Any) -> None:
    gathered = {task: two[task][0]["collectives"]["_allgather_base_"] for task in ("fsdp", "kept")}
    steps, blocks, micro_batches = 8, toy.MODEL.num_layers, 4
    # What is outside the blocks stays gathered during a micro-batch anyway.
    assert gathered["fsdp"] == steps * micro_batches * (2 * blocks + 1)
    assert gathered["kept"] == steps * (blocks + 1)


def test_workers_that_cannot_form_the_replicas_are_an_error_naming_both(four: Any) -> None:
    for outcome in four["three_replicas"]:
        assert "4 workers cannot form 3 equal groups" in outcome["error"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_steps_from_few_programs(one: Any, two: Any) -> None:
    records = two["compiled"][0]["records"]
    assert_same_steps(records, one["whole"][0]["records"])
    # Micro-batches of many shapes: one program for them, and one where two sizes were equal by chance.
    assert 1 <= records[-1]["compiled_graphs"] <= 3


def test_all_ranks_have_the_same_records(two: Any) -> None:
    first, second = two["fsdp"]
    for ours, theirs in zip(first["records"], second["records"], strict=True):
        assert {name: ours[name] for name in COMPARED} == {name: theirs[name] for name in COMPARED}


@pytest.mark.parametrize("task", ["float64", "dropout"])
def test_only_rounding_tells_world_sizes_apart(one: Any, two: Any, four: Any, task: str) -> None:
    # Updates divide by small moments, so rounding grows from step to step: float64 shows that there is nothing else.
    # Norms of gradients are recorded in float32.
    for outcomes in (two, four):
        assert_same_steps(outcomes[task][0]["records"], one[task][0]["records"], tolerance=2e-7)


def test_dropout_changes_the_steps_that_are_compared(one: Any) -> None:
    assert one["dropout"][0]["records"][0]["loss"] != one["float64"][0]["records"][0]["loss"]


def test_bf16_trains_near_fp32(one: Any, two: Any) -> None:
    ours, theirs = two["bf16"][0]["records"], one["whole"][0]["records"]
    assert ours[0]["loss"] != theirs[0]["loss"]
    for low, full in zip(ours, theirs, strict=True):
        assert low["loss"] == pytest.approx(full["loss"], rel=0.1)


def test_two_processes_continue_the_run_of_one(one: Any, two: Any) -> None:
    assert one["first_half"][0]["step"] == 4
    assert_same_steps(two["from_one"][0]["records"], one["whole"][0]["records"][4:])


def test_a_stop_on_one_rank_stops_all_after_the_same_committed_step(two: Any, folder: Path) -> None:
    assert [(outcome["step"], outcome["stopped"]) for outcome in two["stopped"]] == [(5, True)] * 2
    assert (folder / "from_two/checkpoints/step-00000005/COMMIT.json").is_file()


def test_validation_losses_do_not_depend_on_the_number_of_processes(one: Any, two: Any) -> None:
    alone = {r["step"]: r for r in one["whole"][0]["records"] if "valid_loss" in r}
    shared = {r["step"]: r for r in two["stopped"][0]["records"] if "valid_loss" in r}
    assert list(alone) == [1, 3, 5, 7]
    assert list(shared) == [1, 3]
    for step, record in shared.items():
        for name in ("valid_loss", "valid_loss_spd", "valid_loss_direction"):
            assert record[name] == pytest.approx(alone[step][name], rel=1e-5)


def test_four_processes_continue_the_sharded_run_of_two(one: Any, four: Any) -> None:
    assert_same_steps(four["from_two"][0]["records"], one["whole"][0]["records"][5:])


def test_all_ranks_skip_the_same_non_finite_steps_and_go_on(two: Any) -> None:
    first, second = (outcome["records"] for outcome in two["skipped"])
    counts = [record["skipped_steps"] for record in first]
    assert counts == [record["skipped_steps"] for record in second]
    assert 1 <= counts[-1] < 8
    skipped = [now > before for now, before in zip(counts, [0, *counts], strict=False)]
    assert skipped == ["loss" not in record for record in first]
    assert not all(skipped[skipped.index(True) :])


def test_a_non_finite_loss_stops_every_rank_and_names_the_molecules(two: Any) -> None:
    for outcome in two["poisoned"]:
        assert outcome["error"].startswith("NotFiniteError: step ")
        assert "not finite" in outcome["error"]
        assert "7" in outcome["error"].split("molecule ids")[1]


def test_a_save_that_fails_on_one_rank_is_left_out_by_all(one: Any, two: Any, folder: Path) -> None:
    for outcome in two["failed_save"]:
        assert outcome["step"] == 8
        assert_same_steps(outcome["records"], one["whole"][0]["records"])
    assert committed_steps(str(folder / "a")) == [8, 6, 2]
    assert [record["step"] for record in read_records(str(folder / "a"))] == list(range(8))


def test_one_failing_save_too_many_on_one_rank_is_an_error_on_all(two: Any, folder: Path) -> None:
    for outcome in two["failed_saves"]:
        assert "No space left on device" in outcome["error"]
        assert "save 2 in a row" in outcome["error"]
    assert committed_steps(str(folder / "b")) == [2]
