"""Plans bind where they should, agree with measured runs, and never hide an assumption."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from synthetic import write_dataset

from moleblend_ray.config.compose import load_config
from moleblend_ray.config.plan import PlanConfig
from moleblend_ray.data.batches.order import DataOrder
from moleblend_ray.data.config import OrderConfig
from moleblend_ray.data.dataset.manifest import Manifest, load_manifest
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.plan import (
    CHART_NAME,
    PLAN_NAME,
    _described,
    build_setup,
    plan,
)
from moleblend_ray.orchestration.plan_tables import show_plan
from moleblend_ray.orchestration.progress.terminal import json_text
from moleblend_ray.planning.capacity import Setup, amplification, throughput
from moleblend_ray.planning.figures import Basis, measured
from moleblend_ray.planning.plan import Plan
from moleblend_ray.planning.planner import flops_per_molecule
from moleblend_ray.quantities import duration_text
from moleblend_ray.training.rehearsal import Found
from moleblend_ray.vocabulary import NUM_DESCRIPTORS

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


def config(*overrides: str) -> PlanConfig:
    return load_config(PlanConfig, "plan", overrides)


def planned(*overrides: str) -> Plan:
    return plan(config(*overrides)).plan


def setup_of(*overrides: str) -> Setup:
    return build_setup(config("molecules=1e9", *overrides), None, None)


def recorded(name: str) -> Any:
    file = RESULTS / name
    if not file.is_file():
        pytest.skip("the benchmark results are not part of this installation")
    return json.loads(file.read_text())


def test_a_plan_leaves_out_larger_clusters_that_would_fail_too_fast() -> None:
    found = planned("molecules=1e9", "gpus=64", "failures.per_node_day=200")
    assert 64 in [point.workers for point in found.scaling]
    assert max(point.workers for point in found.scaling) < 8192


@pytest.mark.parametrize("rate", [20, 50])
def test_a_cluster_that_fails_faster_than_it_starts_is_refused(rate: int) -> None:
    with pytest.raises(
        ConfigError, match=r"failures.per_node_day: .*one every \d+ s, and each costs \d+ s"
    ):
        planned("molecules=1e9", "gpus=8192", f"failures.per_node_day={rate}")


# ------------------------------------------------------------------------------------- against measured runs


def recorded_runs() -> list[Any]:
    if not (RESULTS / "plan-2026-11-27.json").is_file():
        return []
    document = json.loads((RESULTS / "plan-2026-11-27.json").read_text())
    return [document["result"], *document["config"]["others"]]


@pytest.mark.parametrize(
    "run", recorded_runs(), ids=lambda run: f"{run['preset']}-{run['strategy']}"
)
def test_two_measured_workers_are_predicted_from_one_within_20_percent(run: Any) -> None:
    overrides = [
        f"model={run['preset']}",
        f"strategy={run['strategy']}",
        f"batch={run['batch_a_worker']}",
        f"cpu_workers={run['workers']}",
        f"cpu_node_cores={run['cpus']}",
        "molecules=3000",
    ]
    found = Found(**run["rehearsal"])
    setup = build_setup(config(*overrides), None, found)
    predicted = throughput(setup, run["workers"]).rate.value
    assert predicted == pytest.approx(run["measured_molecules_per_s"], rel=0.2)
    # It is a prediction: twice one worker's rate alone would be far off on two shared cores.
    assert predicted < 0.9 * run["workers"] * run["one_worker_molecules_per_s"]
    assert run["predicted_checkpoint_bytes"] == pytest.approx(run["checkpoint_bytes"], rel=0.02)


def test_a_step_under_fsdp_follows_from_single_processes_and_the_exchange_of_ddp() -> None:
    """benchmarks/scaling.py: one worker alone, two independent ones, bytes and time of DDP -> two workers under
    FSDP2."""
    result = recorded("scaling-2026-11-26.json")["result"]
    ddp, fsdp = result["ddp"], result["fsdp"]
    sent_gb = ddp["sent_mib"] * 2**20 / 1e9
    setup = replace(
        setup_of("cpu_workers=2", f"batch={result['batch_a_worker']}", "cpu_node_cores=2"),
        step_s=measured(fsdp["step_s_alone"], "s", ""),
        contention=measured(fsdp["step_s_independent"] / fsdp["step_s_alone"], "", ""),
        exchange_gb_s=measured(sent_gb / (ddp["step_s"] - ddp["step_s_independent"]), "GB/s", ""),
        ray_cores=None,
    )
    found = throughput(setup, 2)
    # That benchmark had neither Ray nor a data side; the latter's share of the step is small.
    assert found.step_s == pytest.approx(fsdp["step_s"], rel=0.05)


def test_processes_of_ray_delay_trainers_only_where_no_core_is_free() -> None:
    def step_s(cores: int, standing: float) -> float:
        setup = replace(
            setup_of("cpu_workers=2", f"cpu_node_cores={cores}"),
            ray_cores=measured(standing, "cores", ""),
        )
        found = throughput(setup, 2)
        assert found.step_s == pytest.approx(
            found.step_s * sum(part.use for part in found.resources)
        )
        return found.step_s

    assert step_s(3, 0.2) == step_s(3, 0.0)
    # Interrupted a fifth of the time, computing takes a quarter longer; exchange and the data side do not.
    assert 1.15 < step_s(2, 0.2) / step_s(2, 0.0) < 1.25
    assert step_s(2, 5.0) < 11 * step_s(2, 0.0)


def test_a_gpu_does_what_the_page_on_performance_tells() -> None:
    recorded_on = recorded("train_step-gpu-2026-11-26.json")
    steps = [recorded_on["config"]["batch_1024"], recorded_on["result"]]
    for step, binding in zip(steps, ("launching kernels", "computing"), strict=True):
        found = throughput(setup_of("gpus=1", "gpu=h200", f"batch={step['batch']}"), 1)
        assert found.binding == binding
        assert found.rate.value == pytest.approx(step["molecules_per_s"], rel=0.02)
    setup = setup_of("gpus=1")
    assert flops_per_molecule(setup.model, setup.atom_counts) == pytest.approx(4.24e9, rel=0.01)
    words = ("gpus=64", "batch=4096", "fsdp_replicas=8", "network.message_us=0")
    replicas = throughput(setup_of(*words), 64)
    # The page says 2.3 to 2.5 million for 64 GPUs, communication included.
    assert replicas.binding == "computing"
    assert 2.3e6 < replicas.rate.value < 2.5e6


# ---------------------------------------------------------------------------------------- resources that bind


@pytest.mark.parametrize(
    ("overrides", "way"),
    [
        (("gpus=8", "network.within_node_gb_s=10"), "fsdp_reshard=false"),
        (("gpus=64",), "fsdp_replicas=8 (strategy=fsdp)"),
        (("gpus=64", "strategy=ddp"), "fsdp_replicas=8 (strategy=fsdp)"),
        (("gpus=8", "model=base", "batch=2048", "network.message_us=100"), "strategy=ddp"),
        (("gpus=8", "model=base"), "the GPUs wait for their hosts: batch=4096"),
        # What is sent is a small part of the step.
        (("gpus=8", "model=xl"), None),
        # Nothing to gather and to add up.
        (("gpus=1",), None),
    ],
)
def test_the_best_other_way_to_spread_the_model_is_told(
    overrides: tuple[str, ...], way: str | None
) -> None:
    if not any(word.startswith("model=") for word in overrides):
        overrides = (*overrides, "model=large")
    told = planned("molecules=1e9", *overrides).hints
    assert [line.split(" would train")[0] for line in told] == ([] if way is None else [way])


def test_larger_steps_are_proposed_only_where_enough_of_them_are_left() -> None:
    for molecules, is_told in (("1e9", True), ("1e6", False)):
        found = planned(f"molecules={molecules}", "gpus=8", "model=base")
        assert found.binding == "launching kernels"
        assert any("batch=4096" in line for line in found.hints) is is_told


def test_more_trainers_bring_more_but_never_in_excess_of_their_number() -> None:
    setup = setup_of("gpus=8", "model=large")
    rates = [throughput(setup, workers).rate.value for workers in (1, 2, 4, 8, 16, 32, 64)]
    for fewer, more in itertools.pairwise(rates):
        assert fewer < more <= 2 * fewer * (1 + 1e-9)


@pytest.mark.parametrize(
    ("overrides", "binding"),
    [
        (("gpus=8", "model=xl"), "computing"),
        (("gpus=64", "network.between_nodes_gb_s=0.5"), "exchange between trainers"),
        (("gpus=8", "model=base"), "launching kernels"),
        (("gpus=8", "model=base", "batch=4096"), "computing"),
        (("gpus=8", "model=tiny", "batch=4096"), "feeding threads"),
        (("gpus=8", "cpu_nodes=1", "cpu_node_cores=2"), "data actors"),
        (("gpus=8", "storage.total_gb_s=0.01"), "storage"),
        (("gpus=8", "network.node_gb_s=0.05"), "network into trainers"),
        (("gpus=256",), "Ray Data's executor"),
        (("cpu_workers=2", "model=base"), "computing"),
    ],
)
def test_the_scarce_resource_binds(overrides: tuple[str, ...], binding: str) -> None:
    found = planned("molecules=1e9", *overrides)
    assert found.binding == binding
    assert max(resource.use for resource in found.resources) == found.resources[0].use
    assert found.resources[0].name == binding
    if "gpus" in overrides[0]:
        assert found.resources[0].use == pytest.approx(1.0)
        assert all(resource.use <= 1 + 1e-9 for resource in found.resources)


def test_doubling_what_binds_brings_most_and_what_is_idle_nothing() -> None:
    changes = {
        change.what: change for change in planned("molecules=1e9", "gpus=8", "model=xl").changes
    }
    assert changes["speed of each GPU"].rate > 1.8
    assert changes["bandwidth of storage"].rate == pytest.approx(1.0)
    assert changes["CPU nodes alone"].rate == pytest.approx(1.0)
    starved = planned("molecules=1e9", "gpus=8", "cpu_nodes=1", "cpu_node_cores=2")
    changes = {change.what: change for change in starved.changes}
    # Not twice as much: each of two nodes decodes nearly every row group.
    assert changes["CPU nodes alone"].rate > 1.35
    assert changes["speed of each GPU"].rate == pytest.approx(1.0)
    assert any("with cpu_nodes=1 the trainers wait for data" in line for line in starved.warnings)


def test_the_data_side_is_sized_with_room_to_spare() -> None:
    found = throughput(setup_of("gpus=96"), 96)
    data = next(resource for resource in found.resources if resource.name == "data actors")
    assert data.use <= 1 / 1.25 + 1e-9
    fewer = throughput(setup_of("gpus=96"), 96, found.cpu_nodes - 1)
    data = next(resource for resource in fewer.resources if resource.name == "data actors")
    assert data.use > 1 / 1.25


def test_nodes_that_bring_next_to_nothing_are_not_asked_for() -> None:
    # Every machine reads nearly every row group with its descriptors: storage limits two as it limits twenty. The cores of one
    # are too few.
    setup = setup_of("gpus=64", "descriptors=true", "cpu_node_cores=16")
    found = throughput(setup, 64)
    assert found.binding == "storage"
    best = max(throughput(setup, 64, nodes).rate.value for nodes in range(1, 64))
    assert found.rate.value >= 0.95 * best
    assert throughput(setup, 64, found.cpu_nodes - 1).rate.value < 0.95 * best
    assert found.cpu_nodes == 2


def test_chunks_that_begin_within_row_groups_are_counted_as_an_order_reads_them() -> None:
    """Of shards as `prepare` leaves them, whose rows are no multiple of a row group's."""
    shard_rows = np.random.default_rng(0).binomial(8192, 0.95, 4000)
    starts = np.concatenate([[0], np.cumsum(shard_rows)])
    for group_rows, chunk_rows in ((2048, 2048), (2048, 8192), (1024, 2048)):
        order = OrderConfig(chunk_rows=chunk_rows)
        window = DataOrder(int(starts[-1]), order).molecules_at(np.arange(order.shuffle_window))
        shard = np.searchsorted(starts, window, side="right") - 1
        group = (window - starts[shard]) // group_rows
        read = np.unique(np.stack([shard, group]), axis=1)
        rows = np.minimum(group_rows, shard_rows[read[0]] - read[1] * group_rows).sum()
        setup = replace(setup_of("gpus=8"), order=order, row_group_rows=group_rows)
        # A little less: the last row group of a shard is shorter.
        assert setup.rows_read == pytest.approx(rows / order.shuffle_window, rel=0.06)


def test_the_row_groups_of_a_data_set_are_those_of_its_plan(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), 200, row_group_rows=64)
    given = config(f"data={tmp_path}", "gpus=8")
    assert build_setup(given, load_manifest(str(tmp_path)), None).rows_read == 1 + 64 / 2048
    bare = setup_of("gpus=8")
    assert bare.rows_read == 2
    wide = replace(bare, order=OrderConfig(chunk_rows=65_536), row_group_rows=2048)
    read = [throughput(setup, 8).resources for setup in (bare, wide)]
    storage = [next(one for one in found if one.name == "storage") for found in read]
    assert storage[1].capacity.value / storage[0].capacity.value == pytest.approx(2, rel=0.05)


def test_machines_that_share_windows_fetch_row_groups_again() -> None:
    setup = setup_of("gpus=64")
    assert amplification(setup, 64, 8, 1) == 1.0
    values = [amplification(setup, 64, 8, nodes) for nodes in (2, 4, 16, 64, 1000)]
    # Each of the 64 blocks of a window is built on a random machine.
    for nodes, value in zip((2, 4, 16, 64, 1000), values, strict=True):
        drawn = np.sort(np.random.default_rng(0).integers(0, nodes, (1000, 64)), axis=1)
        met = 1 + (np.diff(drawn, axis=1) > 0).sum(axis=1)
        assert value == pytest.approx(met.mean(), rel=0.01)
    # A step smaller than a window: one block of one stream covers many of them less often.
    assert amplification(setup, 1, 64, 16) < 2


def test_small_steps_cost_more_exchange_for_each_molecule() -> None:
    small, large = (throughput(setup_of("gpus=64", f"batch={batch}"), 64) for batch in (128, 1024))
    assert small.rate.value < large.rate.value


# --------------------------------------------------------------------------------------- hours, bytes and cost


def test_hours_follow_from_presentations_rate_and_goodput() -> None:
    once, twice = (planned("molecules=1e9", "gpus=8", f"epochs={number}") for number in (1, 2))
    hours = [plan.stages[1].hours.value for plan in (once, twice)]
    start_h = 12.78 / 3600
    assert hours[1] - start_h == pytest.approx(2 * (hours[0] - start_h), rel=0.01)
    assert once.rate.value * 3600 * (hours[0] - start_h) == pytest.approx(1e9, rel=0.02)
    steps = planned("molecules=1e9", "gpus=8", "steps=1000").stages[1]
    assert steps.hours.value == pytest.approx(
        1000 * 8192 / once.rate.value / 3600 + start_h, rel=0.02
    )


def test_failing_machines_cost_time_and_want_more_checkpoints() -> None:
    def rows(rate: float) -> dict[str, float]:
        found = planned(
            "molecules=1e12", "gpus=1024", f"failures.per_node_day={rate}", "model=large"
        )
        return {row.what: row.figure.value for row in found.stages[1].rows}

    rare, often = rows(0.001), rows(0.1)
    assert often["goodput"] < rare["goodput"] < 100
    assert often["checkpoint interval"] == pytest.approx(rare["checkpoint interval"] / 10, rel=0.01)
    never = planned("molecules=1e9", "gpus=8", "failures.per_node_day=0")
    assert "goodput" in {row.what for row in never.stages[1].rows}


def test_costs_add_up_and_name_what_has_no_price() -> None:
    found = planned("molecules=1e9", "gpus=8", "prices.gpu_hour=3", "prices.storage_gb_month=0.02")
    pretrain = found.stages[1]
    assert pretrain.cost is not None
    assert pretrain.cost.value == pytest.approx(24 * pretrain.hours.value, rel=0.02)
    assert "without a price: CPU nodes, egress" in pretrain.cost.source
    total = {row.what: row.figure.value for row in found.total}
    costs = [stage.cost.value if stage.cost else math.nan for stage in found.stages]
    assert total["cost"] == pytest.approx(sum(costs))
    assert total["hours"] == pytest.approx(sum(stage.hours.value for stage in found.stages))
    without = planned("molecules=1e9", "gpus=8")
    assert all(stage.cost is None for stage in without.stages)


def test_each_core_prepares_what_each_of_two_actors_did() -> None:
    measured_rows_s = recorded("prepare-2026-11-26.json")["result"]["qm9"]["molecules_per_s_2"]
    for nodes in (1, 2):
        found = planned("molecules=1e9", "gpus=8", f"cpu_nodes={nodes}", "cpu_node_cores=2")
        (rate,) = (row.figure for row in found.stages[0].rows if row.what == "rate")
        assert rate is not None
        assert rate.value == pytest.approx(nodes * measured_rows_s)
        assert found.stages[0].hours.value == pytest.approx(1e9 / rate.value / 3600)


def test_conformers_and_then_descriptors_are_most_of_prepare() -> None:
    hours = [
        planned("molecules=1e6", "gpus=8", *asked).stages[0].hours.value
        for asked in ([], ["descriptors=true"], ["conformers=true"])
    ]
    both = planned("molecules=1e6", "gpus=8", "conformers=true", "descriptors=true")
    plain, described, made = hours
    assert described > 3 * plain
    assert made > 50 * plain
    assert both.stages[0].hours.value == pytest.approx(made + described - plain, rel=1e-6)


def test_data_with_descriptors_are_planned_with_them(tmp_path: Path) -> None:
    """Time of `prepare` and bytes of shards are those of the same molecules."""
    bare, described = str(tmp_path / "bare"), str(tmp_path / "described")
    write_dataset(bare, 20)
    write_dataset(described, 20, described=True)

    def hours_and_bytes(data: str, *asked: str) -> tuple[float, float]:
        given = config(f"data={data}", "molecules=1e6", "gpus=8", *asked)
        setup = build_setup(given, load_manifest(data), None)
        return plan(given).plan.stages[0].hours.value, setup.shard_bytes.value

    there = hours_and_bytes(described)
    assert there == hours_and_bytes(described, "descriptors=true")
    without, asked = hours_and_bytes(bare), hours_and_bytes(bare, "descriptors=true")
    assert there[0] == asked[0] > 3 * without[0]
    assert asked[1] > without[1] + NUM_DESCRIPTORS


def test_descriptors_take_room_in_shards_stream_and_cache() -> None:
    plain, described = (
        build_setup(config("molecules=1e9", "gpus=64", setting), None, None)
        for setting in ("descriptors=false", "descriptors=true")
    )
    assert described.molecule_bytes - plain.molecule_bytes == 2 * NUM_DESCRIPTORS
    assert described.decoded_bytes - plain.decoded_bytes == 4 * NUM_DESCRIPTORS
    assert described.shard_bytes.value > 1.5 * plain.shard_bytes.value
    implied = build_setup(
        config("molecules=1e9", "gpus=64", "model.descriptor_head=true"), None, None
    )
    assert implied.molecule_bytes == described.molecule_bytes
    bare = cast("Manifest", SimpleNamespace(descriptors=None))
    with pytest.raises(ConfigError, match="runs/data has no descriptors to predict"):
        _described(config("data=runs/data", "gpus=8", "model.descriptor_head=true"), bare)


# ------------------------------------------------------------------------------------------------- honesty


def test_no_figure_of_a_gpu_passes_for_measured() -> None:
    for batch, assumption in (
        (4096, "NVIDIA H100 SXM reaches 17 %"),
        (1024, "hosts launch kernels"),
    ):
        found = planned("molecules=1e9", "gpus=8", f"batch={batch}")
        for stage in found.stages[1:]:
            assert any(assumption in name for name in stage.hours.rests_on)
        assert any(assumption in name for name in found.assumptions)
    assert found.rate.basis is Basis.COMPUTED
    given = planned("molecules=1e9", "gpus=8", "rate=50000")
    assert not any("hosts launch" in name for name in given.assumptions)
    assert not any("NVIDIA" in name for name in given.assumptions)
    assert given.rate.value == pytest.approx(8 * 50_000, rel=0.1)


def test_this_machines_own_figures_rest_on_no_assumption_of_speed() -> None:
    found = Found(
        step_s=0.2,
        contention=1.1,
        message_s=1e-3,
        sent_bytes_per_s=1e9,
        actor_us=12.0,
        trainer_host_us=5.0,
    )
    setup = build_setup(config("molecules=1e6", "cpu_workers=2", "model=tiny"), None, found)
    result = throughput(setup, 2)
    assert result.rate.rests_on == ()
    assert result.rate.value < 2 * 64 / (0.2 * 1.1)


def test_one_worker_on_this_machine_sends_nothing() -> None:
    found = Found(
        step_s=0.2,
        contention=1.0,
        message_s=None,
        sent_bytes_per_s=None,
        actor_us=12.0,
        trainer_host_us=5.0,
    )
    setup = build_setup(config("molecules=1e6", "cpu_workers=1", "model=tiny"), None, found)
    result = throughput(setup, 1)
    assert result.rate.rests_on == ()
    assert result.rate.value == pytest.approx(64 / 0.2, rel=0.05)


def shown(*words: str, width: int = 160) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(show_plan(plan(config("molecules=1e9", "gpus=64", *words))))
    return console.export_text()


def test_only_a_rate_that_is_assumed_asks_for_a_measurement() -> None:
    assert "Measure one trainer" in shown()
    given = shown("rate=40000")
    assert "assumed, not measured: " in given, "networks"
    assert "Measure one trainer" not in given


def test_every_row_of_the_tables_says_its_basis() -> None:
    text = shown("prices.gpu_hour=2")
    lines = text.splitlines()
    for row in ("steps", "goodput", "checkpoint interval", "read from storage", "data actors"):
        assert any(line.startswith(row) and "computed" in line for line in lines), row
    assert "assumed, not measured: " in text
    assert "moleblend pretrain data=DATA out=RUN model=base cluster.num_workers=64" in text


def test_times_are_told_alike_in_every_table() -> None:
    found = plan(config("molecules=1e9", "gpus=64")).plan
    lines = shown().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("other numbers"))
    rows = {words[0]: line for line in lines[first:] if (words := line.split())}
    for point in found.scaling:
        assert f" {duration_text(3600 * point.hours)} " in rows[f"{point.workers:,}"]
    times = [line for line in lines[:first] if re.match(r"time  ", line)]
    hours_told = (found.total[0].figure, *(stage.hours for stage in found.stages))
    for hours, line in zip(hours_told, times, strict=True):
        assert f" {duration_text(3600 * hours.value)} " in line


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_proposed_command_may_be_copied_from_a_terminal_of_any_width(width: int) -> None:
    lines = shown("model.dropout=0.2", width=width).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("moleblend pretrain"))
    length = next(i for i, line in enumerate(lines[first:]) if not line.endswith("\\")) + 1
    copied = "\n".join(lines[first : first + length])
    assert max(map(len, lines[first : first + length])) <= width
    words = subprocess.run(
        ["bash", "-c", f"moleblend() {{ printf '%s\\n' \"$@\"; }}\n{copied}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    plan_words = planned("molecules=1e9", "gpus=64", "model.dropout=0.2").settings.items()
    settings = [f"{name}={value}" for name, value in plan_words]
    first_words = ["pretrain", "data=DATA", "out=RUN", "model=base", "model.dropout=0.2"]
    assert words == [*first_words, *settings]


def test_the_proposed_settings_are_those_of_a_valid_run() -> None:
    from moleblend_ray.config.pretrain import PretrainConfig

    for overrides in (
        ("gpus=64",),
        ("gpus=8", "model=large", "fsdp_replicas=2"),
        ("gpus=8", "model=large", "fsdp_reshard=false"),
        ("cpu_workers=2", "model=tiny"),
        ("gpus=8", "steps=1000"),
    ):
        found = planned("molecules=1e9", *overrides)
        settings = found.settings
        words = [f"{name}={value}" for name, value in settings.items()]
        run = load_config(PretrainConfig, "pretrain", ["data=d", "out=o", *words])
        assert run.order.global_batch_size % run.cluster.num_workers == 0
        if run.cluster.use_gpu:
            # As planned, a host launches the kernels of one pass in each step.
            assert run.stream.micro_batch_size == run.order.stream_batch_size
        # As long as the hours that the plan tells.
        (steps,) = (row for row in found.stages[1].rows if row.what == "steps")
        assert steps.figure is not None
        assert run.train.num_steps == steps.figure.value


def test_it_is_written_and_drawn(tmp_path: Path) -> None:
    report = plan(config("molecules=1e8", "gpus=8", f"out={tmp_path}/plan", "prices.gpu_hour=2"))
    stored = json.loads((tmp_path / "plan" / PLAN_NAME).read_text())
    assert stored == json.loads(json_text(report))
    assert stored["config"]["gpus"] == 8
    assert stored["written"] == [f"{tmp_path}/plan/{name}" for name in (PLAN_NAME, CHART_NAME)]
    assert stored["plan"]["stages"][1]["hours"]["basis"] == "computed"
    assert (tmp_path / "plan" / CHART_NAME).read_bytes().startswith(b"\x89PNG")
    assert [point["workers"] for point in stored["plan"]["scaling"]] == [1, 2, 4, 8, 16, 32]


# -------------------------------------------------------------------------------------------------- settings


def test_counts_may_be_written_as_powers_of_ten() -> None:
    assert config("molecules=1e9", "gpus=8").molecules == 10**9
    assert config("molecules=1000000000", "gpus=8", "steps=1e5").steps == 10**5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("gpus=8",), "molecules: required unless data names a prepared dataset"),
        (("molecules=0", "gpus=8"), "molecules: expected a whole number from 1 to 1e12"),
        (("molecules=-1e9", "gpus=8"), "molecules: expected a whole number"),
        (("molecules=1.5", "gpus=8"), "found 1.5"),
        (("molecules=1e9",), "gpus: expected gpus=N or cpu_workers=N, one of them"),
        (("molecules=1e9", "gpus=8", "cpu_workers=2"), "found gpus=8 and cpu_workers=2"),
        (("molecules=1e9", "gpus=12"), "a multiple of it, found 12"),
        (("molecules=1e9", "gpus=8", "epochs=2", "steps=9"), "2.0 epochs and 9.0 steps contradict"),
        (("molecules=1e9", "gpus=8", "gpu=a10"), "did you mean a100"),
        (("molecules=1e9", "gpus=8", "fsdp_replicas=3"), "expected a divisor of the trainers"),
        (("molecules=1e9", "gpus=8", "measure=true"), "says nothing about GPUs"),
        (("molecules=1e9", "gpus=8", "mfu=1.2"), "mfu: expected more than 0 and at most 1"),
        (
            ("molecules=1e9", "gpus=8", "prices.gpu_hour=-1"),
            "prices.gpu_hour: expected null or at least 0",
        ),
        (("molecules=1e9", "gpus=8", "strategy=none"), "strategy: none trains one worker alone"),
        (("molecules=1e9", "gpus=8", "model=bsae"), "did you mean base?"),
        (("molecules=1e9", "cpu_workers=2", "cpu_nodes=2"), "cpu_nodes: expected null"),
        (("data=d", "gpus=8", "atoms=20"), "atoms: data says how large"),
    ],
)
def test_wrong_settings_are_told_with_what_was_expected(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        config(*overrides)
    assert message in str(error.value)


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        config("molecules=0", "gpus=12", "mfu=2", "storage.total_gb_s=0")
    text = str(error.value)
    assert all(name in text for name in ("molecules:", "gpus:", "mfu:", "storage.total_gb_s:"))


def test_a_plan_without_measuring_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, moleblend_ray.orchestration.plan as p, moleblend_ray.orchestration.plan_tables\n"
        "from moleblend_ray.config.plan import PlanConfig\n"
        "p.plan(PlanConfig(molecules=1e9, gpus=8))\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"ray", "torch", "rdkit"} & set(done.stdout.split())
