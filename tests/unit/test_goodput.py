"""The simulation of failures agrees with closed forms where there are any, and its time adds up."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moleblend_ray.planning import goodput

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "goodput.py"

SYNC = goodput.Saving(interval_s=600.0, block_s=40.0)
ASYNC = goodput.Saving(interval_s=600.0, block_s=2.0, flight_s=60.0, slow_down=0.25)
FIXED = goodput.Workers(num_streams=1024)
ELASTIC = goodput.Workers(num_streams=15_360, elastic=True)


def scenario(
    saving: Any = SYNC, workers: Any = FIXED, detect: float = 30.0, restart: float = 50.0, **cluster: Any
) -> Any:  # fmt: skip
    return goodput.Scenario(
        cluster=goodput.Cluster(**cluster),
        saving=saving,
        recovery=goodput.Recovery(detect_s=detect, restart_s=restart),
        workers=workers,
    )


def mean(setup: Any, seeds: int = 40, days: float = 20.0) -> tuple[float, float]:
    """Mean goodput and its standard error."""
    values = [goodput.simulate(setup, seed, days * 86400.0).goodput for seed in range(seeds)]
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(seeds)


@pytest.mark.parametrize(
    ("saving", "cycle_s"),
    [
        (SYNC, 640.0),
        (ASYNC, 617.0),  # 2 s of copying and a quarter of 60 s lost
        (goodput.Saving(interval_s=30.0, block_s=2.0, flight_s=60.0), 62.0),  # waits for the last
        (goodput.Saving(interval_s=600.0, block_s=0.0), 600.0),
    ],
)
def test_without_failures_only_saving_costs(saving: Any, cycle_s: float) -> None:
    interval_s = saving.interval_s
    length_s = interval_s + 1000 * cycle_s  # the first interval has no save before it
    shares = goodput.simulate(scenario(saving, failures_per_node_day=0.0), 0, length_s)
    assert shares.useful == pytest.approx(1001 * interval_s, rel=1e-12)
    assert shares.saving == pytest.approx(1000 * (cycle_s - interval_s), rel=1e-9)
    assert goodput.expected_goodput(saving, math.inf, 80.0) == pytest.approx(interval_s / cycle_s)
    assert shares.failures == shares.redone == shares.recovering == shares.waiting == 0


def test_progress_commits_only_what_is_written() -> None:
    at = [(599, 599, 0), (601, 600, 0), (661, 644.25, 0), (662.5, 645.5, 600), (1216, 1199, 600)]
    for elapsed, work, committed in at:
        assert goodput.progress(ASYNC, 1.0, elapsed) == pytest.approx((work, committed))
    # A save that blocks commits at its end; half as many workers need twice the time for the work.
    assert goodput.progress(SYNC, 1.0, 639.0) == (600.0, 0.0)
    assert goodput.progress(SYNC, 1.0, 641.0) == (601.0, 600.0)
    assert goodput.progress(SYNC, 0.5, 1239.0) == (600.0, 0.0)
    assert goodput.progress(SYNC, 0.5, 1242.0) == (601.0, 600.0)


@pytest.mark.parametrize("mtbf_s", [1800.0, 4 * 3600.0, 86400.0])
def test_closed_form_of_a_blocking_save_is_daly_s(mtbf_s: float) -> None:
    segment = mtbf_s * math.exp(80 / mtbf_s) * (math.exp(640 / mtbf_s) - 1)
    assert goodput.expected_goodput(SYNC, mtbf_s, 80.0) == pytest.approx(600 / segment)


@pytest.mark.parametrize("saving", [SYNC, ASYNC, replace(ASYNC, interval_s=40.0)])
@pytest.mark.parametrize("mtbf_h", [0.5, 2.0, 8.0])
def test_simulation_agrees_with_the_closed_form(saving: Any, mtbf_h: float) -> None:
    setup = scenario(saving, failures_per_node_day=24 / mtbf_h / 128, node_loss_share=0.0)
    assert setup.cluster.mtbf_s == pytest.approx(mtbf_h * 3600)
    found, error = mean(setup)
    expected = goodput.expected_goodput(saving, mtbf_h * 3600, 80.0)
    assert abs(found - expected) < 4 * error
    assert error < 0.005


@pytest.mark.parametrize("saving", [SYNC, ASYNC])
def test_the_interval_of_young_is_within_a_hair_of_the_best(saving: Any) -> None:
    for mtbf_h in (4.0, 24.0):
        young = goodput.young_interval_s(saving, mtbf_h * 3600)
        setup = scenario(failures_per_node_day=24 / mtbf_h / 128, node_loss_share=0.0)
        found = {
            factor: mean(
                replace(setup, saving=replace(saving, interval_s=young * factor)), seeds=20
            )
            for factor in (0.2, 0.5, 1.0, 2.0, 5.0)
        }
        best = max(value for value, _ in found.values())
        assert found[1.0][0] > best - 0.002
        assert found[1.0][0] > max(found[0.2][0], found[5.0][0]) + 0.002
        low, high = goodput.good_intervals_s(saving, mtbf_h * 3600, 80.0)
        assert low < young < high


@pytest.mark.parametrize("workers", [FIXED, ELASTIC, goodput.Workers(num_streams=5040)])
@pytest.mark.parametrize("saving", [SYNC, ASYNC])
def test_all_time_is_accounted_for(workers: Any, saving: Any) -> None:
    for seed in range(5):
        setup = scenario(
            saving, workers, failures_per_node_day=0.3, correlated_share=0.3, node_loss_share=0.7
        )
        shares = goodput.simulate(setup, seed, 864_000.0)
        assert shares.total == pytest.approx(864_000.0, rel=1e-9)
        parts = (shares.useful, shares.redone, shares.saving, shares.recovering, shares.waiting)
        assert min(*parts, shares.fewer) >= 0
        assert shares.failures > 100
    assert goodput.simulate(setup, 3, 864_000.0) == goodput.simulate(setup, 3, 864_000.0)


@pytest.mark.parametrize("workers", [FIXED, ELASTIC])
@pytest.mark.parametrize("saving", [SYNC, ASYNC])
def test_more_failures_never_raise_goodput(workers: Any, saving: Any) -> None:
    rates = (0.0, 0.004, 0.02, 0.1, 0.5)
    found = [mean(scenario(saving, workers, failures_per_node_day=rate))[0] for rate in rates]
    assert all(more < less for less, more in itertools.pairwise(found))


def test_failures_come_at_the_rate_asked_for() -> None:
    setup = scenario(failures_per_node_day=0.01, replacement_s=0.0)
    counts = [goodput.simulate(setup, seed, 50 * 86400.0).failures for seed in range(100)]
    assert abs(statistics.fmean(counts) - 64) < 4 * math.sqrt(64 / 100)


@pytest.mark.parametrize(
    ("streams", "alive", "workers"),
    [
        (1024, 1024, 1024),
        (1024, 1016, 512),
        (4096, 1016, 512),  # more streams of the same kind do not help
        (5040, 1024, 1008),
        (5040, 1008, 1008),
        (5040, 1000, 840),
        (15_360, 1016, 960),
        (15_360, 952, 768),
        (64_512, 1016, 1008),
        (61_440, 4088, 3840),
        (448, 56, 56),
        (7, 3, 1),
        (7, 0, 0),
    ],
)
def test_workers_are_the_largest_divisor_of_the_streams(
    streams: int, alive: int, workers: int
) -> None:
    assert goodput.largest_divisor(streams, alive) == workers
    total = max(alive, 1024)
    elastic = goodput.Workers(num_streams=streams, elastic=True)
    assert elastic.on(alive, total) == workers
    assert replace(elastic, min_workers=600).on(alive, total) == (workers if workers >= 600 else 0)
    full = elastic.full(total)
    assert replace(elastic, elastic=False).on(alive, total) == (full if workers == full else 0)


def test_a_fixed_run_waits_for_its_node_and_an_elastic_one_does_not() -> None:
    failing = {"failures_per_node_day": 0.0237, "replacement_s": 3600.0}
    fixed, elastic, halved, spare = (
        goodput.simulate(scenario(ASYNC, workers, **failing), 1, 40 * 86400.0)
        for workers in (
            FIXED,
            ELASTIC,
            goodput.Workers(num_streams=1024, elastic=True),
            goodput.Workers(num_streams=5040),
        )
    )
    assert fixed.waiting > 0.8 * 3600 * fixed.failures  # less where two waits overlap
    assert fixed.fewer == elastic.waiting == halved.waiting == 0
    assert elastic.goodput > halved.goodput > fixed.goodput
    # Two spare nodes: a sixty-fourth of the GPUs always, no time of waiting worth the name.
    assert spare.waiting < 0.01 * spare.total
    assert spare.fewer / (spare.total - spare.recovering - spare.waiting) == pytest.approx(
        1 / 64, rel=0.05
    )


def test_an_elastic_run_grows_though_its_node_is_back_before_it_has_started() -> None:
    # Detection and start take 80 s, the node 40: growing costs another start, not the rest of the run.
    setup = scenario(
        ASYNC, goodput.Workers(num_streams=1024, elastic=True),
        failures_per_node_day=0.0237, replacement_s=40.0,
    )  # fmt: skip
    shares = goodput.simulate(setup, 1, 40 * 86400.0)
    assert shares.fewer < 1e-3 * shares.total


def test_a_failing_spare_node_stops_nobody() -> None:
    setup = scenario(
        workers=goodput.Workers(num_streams=64), failures_per_node_day=0.05, replacement_s=60.0
    )
    shares = goodput.simulate(setup, 0, 100 * 86400.0)
    # Eight of 128 nodes train: 40 of 640 failures meet one of them.
    assert 40 - 4 * math.sqrt(40) < shares.failures < 40 + 4 * math.sqrt(40)
    assert shares.waiting == 0


def test_failures_of_whole_groups_cost_those_who_need_every_node_no_less() -> None:
    alone = {"failures_per_node_day": 0.0237, "replacement_s": 1800.0}
    spare = goodput.Workers(num_streams=5040)
    single = mean(scenario(ASYNC, spare, **alone))[0]
    groups = mean(scenario(ASYNC, spare, **alone, correlated_share=0.3, correlated_nodes=4))[0]
    assert groups < single - 0.005


def test_sources_and_costs_are_what_the_page_says() -> None:
    hours = {name: 24 / (rate * 128) for name, rate in goodput.RATES.items()}
    assert hours == pytest.approx(
        {"llama3": 49.5, "rsc1_nodes": 28.8, "opt175b": 13.3, "rsc1_jobs": 7.9}, rel=0.01
    )
    costs = goodput.Costs(checkpoint_bytes=12 * 914_676_218, num_nodes=128)
    assert costs.save_s == pytest.approx(5 + 10.98 / 20, rel=1e-3)
    assert costs.read_s == pytest.approx(10.98 + 128 * 10.98 / 20, rel=1e-3)


def test_the_benchmark_ends_with_one_line_of_json() -> None:
    command = [sys.executable, str(BENCHMARK), "--seeds=1", "--days=2", "--gpus=64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["benchmark"] == "goodput"
    assert all(0 < row["goodput"] <= 1 for row in result["recommended"])
