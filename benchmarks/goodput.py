"""What failures cost a run on many GPUs: a simulation that compares checkpoint intervals, ways to save and ways to go on.

    python benchmarks/goodput.py [--gpus 1024] [--preset base] [--days 30] [--seeds 100] [--replacement-min 10]

**Goodput** is the time that the steps of the run would have taken on all GPUs without a failure, over the time they took.
Nodes fail independently at a published rate (``RATES``), and now and then several at once (``correlated_share``). A failure
ends the step; the run goes on from the newest committed checkpoint, on as many workers as before (``fixed``, which waits for
another node) or on the most that divide ``num_streams`` (``elastic``, which grows when the node is back). Between two
events everything is computed at once, so a month costs as many operations as it has failures, not steps. The limits of
the model are in `docs/scale.md`. All seeds are fixed. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from moleblend_ray.planning.goodput import (
    BYTES_A_PARAMETER,
    DAY,
    HOUR,
    MINUTE,
    RATES,
    Cluster,
    Costs,
    Saving,
    Scenario,
    Workers,
    expected_goodput,
    good_intervals_s,
    simulate,
    young_interval_s,
)

PARAMETERS: Final = {"base": 44_906_506, "large": 306_165_770, "xl": 914_676_218}
"""Of the presets in `docs/model.md`."""

INTERVALS_MIN: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
REPLACEMENTS_MIN: Final = (1.0, 5.0, 10.0, 30.0, 120.0, 1440.0)


WAYS: Final = {
    "fixed_1024": Workers(num_streams=1024),
    "fixed_5040": Workers(num_streams=5040),
    "elastic_1024": Workers(num_streams=1024, elastic=True),
    "elastic_5040": Workers(num_streams=5040, elastic=True),
    "elastic_15360": Workers(num_streams=15360, elastic=True),
}
"""1,024 streams leave 512 workers when a node is lost, 15,360 leave 960. 5,040 train on 1,008 of 1,024 GPUs from the
start, so that two nodes are spare."""


def main() -> None:
    arguments = parse_arguments()
    costs = Costs(
        checkpoint_bytes=PARAMETERS[arguments.preset] * BYTES_A_PARAMETER,
        num_nodes=arguments.gpus // 8,
    )
    cluster = Cluster(num_nodes=costs.num_nodes, replacement_s=arguments.replacement_min * MINUTE)
    sizes = tuple(sorted({1, 8, costs.num_nodes}))
    seeds, end_s = range(arguments.seeds), arguments.days * DAY
    clusters = [
        *(replace(cluster, replacement_s=minutes * MINUTE) for minutes in REPLACEMENTS_MIN),
        *(replace(cluster, correlated_share=0.1, correlated_nodes=nodes) for nodes in (4, 16)),
    ]
    line = {
        "benchmark": "goodput",
        "preset": arguments.preset,
        "gpus": cluster.num_gpus,
        "days": arguments.days,
        "seeds": arguments.seeds,
        "replacement_min": arguments.replacement_min,
        "costs_s": {
            name: round(getattr(costs, name), 2)
            for name in ("save_s", "stage_s", "detect_s", "start_s", "compile_s", "read_s")
        },
        "intervals_min": INTERVALS_MIN,
        "intervals": list(interval_rows(cluster, costs, seeds, end_s)),
        "clusters": list(cluster_rows(clusters, costs, seeds, end_s)),
        "recommended": list(recommended_rows(sizes, costs)),
    }
    print(json.dumps(line))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=1024, help="a multiple of 8")
    parser.add_argument("--preset", choices=tuple(PARAMETERS), default="base")
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--replacement-min", type=float, default=10.0)
    return parser.parse_args()


def interval_rows(
    cluster: Cluster, costs: Costs, seeds: Sequence[int], end_s: float
) -> Iterator[dict[str, Any]]:
    """Each rate, way to go on and way to save, over the intervals."""
    for rate, way, asynchronous in itertools.product(RATES, WAYS, (False, True)):
        failing = replace(cluster, failures_per_node_day=RATES[rate])
        cells = []
        for minutes in INTERVALS_MIN:
            saving = costs.saving(minutes * MINUTE, asynchronous=asynchronous)
            cells.append(summary(failing, saving, costs, WAYS[way], seeds, end_s))
        means = [cell["goodput"] for cell in cells]
        young_s = young_interval_s(costs.saving(1, asynchronous=asynchronous), failing.mtbf_s)
        yield {
            "rate": rate,
            "mtbf_h": round(failing.mtbf_s / HOUR, 1),
            "way": way,
            "asynchronous": asynchronous,
            "young_min": round(young_s / MINUTE, 1),
            "best_min": INTERVALS_MIN[means.index(max(means))],
            **{name: [cell[name] for cell in cells] for name in ("goodput", "p5", "p95")},
        }


def cluster_rows(
    clusters: Iterable[Cluster], costs: Costs, seeds: Sequence[int], end_s: float
) -> Iterator[dict[str, Any]]:
    """Each way to go on, on clusters that differ in how nodes fail and return; a checkpoint every ten minutes."""
    saving = costs.saving(10 * MINUTE, asynchronous=True)
    for cluster in clusters:
        ways = {
            way: summary(cluster, saving, costs, workers, seeds, end_s)
            for way, workers in WAYS.items()
        }
        yield {
            "replacement_min": cluster.replacement_s / MINUTE,
            "correlated_share": cluster.correlated_share,
            "correlated_nodes": cluster.correlated_nodes if cluster.correlated_share else 1,
            "by_way": ways,
        }


def recommended_rows(node_counts: Iterable[int], costs: Costs) -> Iterator[dict[str, Any]]:
    """Young's interval and those as good, by cluster, model, rate and way to save; from the closed form."""
    rates = ("llama3", "rsc1_jobs")
    for num_nodes, preset, rate, asynchronous in itertools.product(
        node_counts, PARAMETERS, rates, (False, True)
    ):
        num_bytes = PARAMETERS[preset] * BYTES_A_PARAMETER
        sized = replace(costs, checkpoint_bytes=num_bytes, num_nodes=num_nodes)
        recovery_s = sized.recovery().detect_s + sized.recovery().restart_s
        mtbf_s = DAY / (RATES[rate] * num_nodes)
        saving = sized.saving(1.0, asynchronous=asynchronous)
        young_s = young_interval_s(saving, mtbf_s)
        goodput = expected_goodput(replace(saving, interval_s=young_s), mtbf_s, recovery_s)
        near = good_intervals_s(saving, mtbf_s, recovery_s)
        yield {
            "gpus": 8 * num_nodes,
            "preset": preset,
            "rate": rate,
            "mtbf_h": round(mtbf_s / HOUR, 1),
            "asynchronous": asynchronous,
            "young_min": round(young_s / MINUTE, 1),
            "good_min": [round(seconds / MINUTE, 1) for seconds in near],
            "goodput": round(goodput, 4),
        }


def summary(
    cluster: Cluster,
    saving: Saving,
    costs: Costs,
    workers: Workers,
    seeds: Sequence[int],
    end_s: float,
) -> dict[str, float]:
    """Mean and 5-95 % band of goodput over seeds, and where the rest went."""
    scenario = Scenario(cluster=cluster, saving=saving, recovery=costs.recovery(), workers=workers)
    runs = [simulate(scenario, seed, end_s) for seed in seeds]
    values = sorted(run.goodput for run in runs)
    result = {
        "goodput": statistics.fmean(values),
        "p5": values[math.floor(0.05 * (len(values) - 1))],
        "p95": values[math.ceil(0.95 * (len(values) - 1))],
        "failures": statistics.fmean(run.failures for run in runs),
    }
    for share in ("redone", "saving", "recovering", "waiting", "fewer"):
        result[share] = statistics.fmean(getattr(run, share) / run.total for run in runs)
    return {name: round(value, 4) for name, value in result.items()}


if __name__ == "__main__":
    main()
