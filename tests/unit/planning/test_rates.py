"""Bundled figures are those of the benchmark results that they name."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from moleblend_ray.errors import ConfigError
from moleblend_ray.planning.figures import Basis, assumed, computed, given, measured
from moleblend_ray.planning.goodput import RATES
from moleblend_ray.planning.rates import bundled, cpu_efficiency, gpu

STORED = json.loads(
    resources.files("moleblend_ray.planning").joinpath("rates.json").read_text("utf-8")
)
FIGURES: dict[str, dict[str, Any]] = STORED["figures"]
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


def number_at(document: Any, path: str) -> float:
    for key in path.split("."):
        document = document[key]
    return float(document)


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_each_is_the_number_of_its_result(name: str) -> None:
    entry = FIGURES[name]
    if not RESULTS.is_dir():
        pytest.skip("the benchmark results are not part of this installation")
    document = json.loads((RESULTS / entry["result"]).read_text())
    root = document if entry["path"].startswith("config.") else document["result"]
    total = sum(number_at(root, path) for path in entry["path"].split("+"))
    assert entry["value"] * entry.get("divided_by", 1) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_each_says_what_it_is_of_and_on_which_machine(name: str) -> None:
    figure = bundled(name)
    assert figure.basis is Basis.MEASURED
    assert figure.rests_on == ()
    assert "vCPU" in figure.source
    assert FIGURES[name]["result"] in figure.source


def test_gpus_are_known_by_their_data_sheet_alone() -> None:
    assert gpu("h100").peak("bf16") == 989e12
    # train.precision=fp32 does not use the tensor cores.
    assert gpu("h100").peak("fp32") == 67e12
    with pytest.raises(ConfigError, match=r"found 'h10'; did you mean h100\?.* give rate="):
        gpu("h10")


def test_small_models_use_a_core_worse() -> None:
    values = [cpu_efficiency(gflop).value for gflop in (0.01, 0.0526, 0.1, 0.35, 1.0, 4.2987, 90.0)]
    assert values == sorted(values)
    assert values[0] == values[1] > 0.05
    assert values[-2:] == pytest.approx([1.0, 1.0])


def test_computed_figures_inherit_assumptions_but_no_measurements() -> None:
    peak = assumed(1.0, "", "data sheet", "the GPU's rate")
    network = assumed(2.0, "", "a guess", "network")
    first = computed(3.0, "", "formula", peak, measured(1.0, "", "benchmark"))
    second = computed(4.0, "", "formula", first, network, first, given(1.0, "", "setting"))
    assert first.rests_on == ("the GPU's rate",)
    assert second.rests_on == ("the GPU's rate", "network")


def test_failures_are_those_of_the_goodput_simulation() -> None:
    from moleblend_ray.planning.settings import FailureSettings

    assert FailureSettings().per_node_day == max(RATES.values())
