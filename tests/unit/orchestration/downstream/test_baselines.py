"""The encoder from scratch is trained like the model, but for what only pretrained blocks have; nothing is computed twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moleblend_ray.config.downstream import SweepConfig, TaskConfig
from moleblend_ray.evaluation.models.baselines import FeatureKind
from moleblend_ray.evaluation.models.finetune import StartingPoint
from moleblend_ray.evaluation.molecules.descriptor_inputs import DescriptorTable
from moleblend_ray.evaluation.results.results import Training
from moleblend_ray.evaluation.results.runs import Experiment
from moleblend_ray.evaluation.search import SearchSpace
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import resolve_task
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.orchestration.downstream import baselines
from moleblend_ray.orchestration.downstream.downstream import Bench


def bench_with(molecules: Any) -> Bench:
    unused: Any = None
    start = StartingPoint(model=ModelConfig(num_layers=4), encoder={}, fingerprint="f")
    experiment = Experiment(
        task=resolve_task("esol"), molecules=molecules, split=unused, start=start
    )
    return Bench(
        data_uri="d",
        experiment=experiment,
        shared=experiment,
        split_hash="h",
        repeats=unused,
        replicates=unused,
    )


def test_no_trial_from_scratch_freezes_random_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.put", lambda value: value)
    bench = bench_with(molecules=None)
    start = bench.experiment.start
    config = SweepConfig(
        task=TaskConfig(name="esol", source="esol.csv"),
        checkpoint="run",
        out="out",
        finetune=FinetuneSettings(frozen_blocks=2, fresh_blocks=1),
        search=SearchSpace(choices={"frozen_blocks": (2, 4), "readout": ("token", "mean")}),
    )
    asked: list[SweepConfig] = []

    def train(config: SweepConfig, bench: Bench) -> Training:
        assert bench.experiment.start.encoder is None
        asked.append(config)
        return Training(chosen=config.finetune, final=())

    found = baselines._train_from_scratch(config, bench, train)
    (scratch,) = asked
    assert (scratch.finetune.frozen_blocks, scratch.finetune.fresh_blocks) == (None, 0)
    assert set(scratch.search.choices) == {"readout"}
    assert (scratch.out, scratch.model) == ("out/scratch", start.model)
    assert found.chosen["frozen_blocks"] is None


def test_descriptors_that_a_model_reads_are_those_of_the_baseline() -> None:
    table = DescriptorTable.of(("CCO", "c1ccccc1"))
    config = SweepConfig(task=TaskConfig(name="esol", source="esol.csv"), out="out")
    molecules = SimpleNamespace(smiles=("CCO", "c1ccccc1"), descriptors=table)
    experiment = bench_with(molecules).experiment
    found = baselines.Features(config).of(FeatureKind.DESCRIPTORS, experiment)
    assert found is table.values  # no task of Ray
