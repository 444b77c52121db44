"""What `moleblend plan` plans: a collection, a model, machines, prices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from moleblend_ray.checks import Check, above, at_least, check_all, locations, within
from moleblend_ray.errors import ConfigError
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.planning.rates import gpu as gpu_of
from moleblend_ray.planning.settings import (
    FailureSettings,
    NetworkSettings,
    PriceSettings,
    StorageSettings,
)
from moleblend_ray.settings import typed
from moleblend_ray.training.config import Precision, Strategy

_MOST_MOLECULES = 1e12
"""What the data order is tested for."""


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """A collection, a model and a number of trainers -> hours, machines, bytes, cost, and what limits."""

    molecules: float | None = None
    """Molecules of the collection, a whole number; 1e9 is one. Or give `data`."""
    data: str | None = None
    """A prepared dataset, as a path or URI: its molecules (unless `molecules` says how many) and their sizes count. Needed for
    `measure`."""
    epochs: float | None = None
    """How often training sees each molecule; null: once, or as `steps` say."""
    steps: float | None = None
    """Optimizer steps of the run, a whole number, instead of `epochs`."""
    atoms: float | None = None
    """Atoms of a molecule on average, without hydrogens; null: 14.9 (PCQM4Mv2), or those of `data`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder and heads."""
    gpus: int = 0
    """GPUs, each with one trainer. Up to `gpus_per_node`, or a multiple of it."""
    cpu_workers: int = 0
    """Trainers without GPU, all on one machine, instead of `gpus`."""
    gpu: str = "h100"
    """Kind of GPU: a100, b200, h100, h200, l4, l40s. Its data sheet's rate is taken; of them one, an H200, was measured."""
    mfu: float = 0.17
    """Share of that rate that training reaches: what an H200 does with `base` and 4,096 molecules a step
    (docs/performance.md), an assumption for others. Ignored with `rate`."""
    rate: float | None = None
    """Molecules/s of one trainer alone that you measured (molecules_per_s of a run with one worker): replaces `gpu` and `mfu`."""
    measure: bool = False
    """Measure this machine for a minute (a training step, its exchange, data actors) and plan with that; for `cpu_workers`,
    with `data`."""
    batch: int | None = None
    """Molecules of each trainer in a step; null: 1,024 on a GPU, 64 without."""
    precision: Precision | None = None
    """Arithmetic of `train.precision`; null: bf16 on GPUs, fp32 without."""
    strategy: Strategy = "fsdp"
    """`train.strategy`."""
    fsdp_replicas: int = 1
    """`train.fsdp_replicas`."""
    fsdp_reshard: bool = True
    """`train.fsdp_reshard`."""
    conformers: bool = False
    """Let `prepare` make a conformer of each molecule."""
    descriptors: bool = False
    """Let `prepare` store RDKit's descriptors of each molecule; implied by `model.descriptor_head`, and by `data` that have
    them."""
    gpus_per_node: int = 8
    """GPUs of one machine."""
    cpu_nodes: int | None = None
    """CPU nodes for `prepare` and the data actors; null: as many as keep the GPUs busy."""
    cpu_node_cores: int | None = None
    """Cores of a CPU node, and of the machine of `cpu_workers`; null: 32, or this machine's."""
    network: NetworkSettings = field(default_factory=NetworkSettings)
    """Assumed bandwidths."""
    storage: StorageSettings = field(default_factory=StorageSettings)
    """Assumed bandwidths of object storage."""
    failures: FailureSettings = field(default_factory=FailureSettings)
    """Assumed failures of machines."""
    prices: PriceSettings = field(default_factory=PriceSettings)
    """What things cost."""
    out: str | None = None
    """Directory for plan.json and plan.png, as a path or URI; null writes nothing."""
    format: Literal["text", "json"] = "text"
    """Tables for people, or one JSON document on standard output."""

    def __post_init__(self) -> None:
        check_all(
            *self._amounts(),
            *self._machines(),
            *at_least(self, 1, "batch"),
            (0.0 < self.mfu <= 1.0, f"mfu: expected more than 0 and at most 1, found {self.mfu}"),
            *above(self, 0, "rate"),
            (
                self.rate is None or not self.measure,
                "rate: measure finds the rate by itself; leave one of the two out",
            ),
            (
                not self.measure or (self.cpu_workers > 0 and self.data is not None),
                "measure: expected cpu_workers=N and data=URI with it; this machine says nothing about GPUs "
                "(give rate= for those)",
            ),
            *locations(self, "out", "data"),
        )

    def _amounts(self) -> list[Check]:
        return [
            (
                self.molecules is not None or self.data is not None,
                "molecules: required unless data names a prepared dataset; expected a whole number like 1e9",
            ),
            _whole("molecules", self.molecules),
            _whole("steps", self.steps),
            (
                self.epochs is None or (math.isfinite(self.epochs) and self.epochs > 0),
                f"epochs: expected null or more than 0, found {self.epochs}",
            ),
            (
                self.epochs is None or self.steps is None,
                f"epochs: {self.epochs} epochs and {self.steps} steps contradict each other; give one of the two",
            ),
            *within(self, 1, 500, "atoms"),
            (
                self.atoms is None or self.data is None,
                "atoms: data says how large its molecules are; leave one of the two out",
            ),
        ]

    def _machines(self) -> list[Check]:
        workers, per_node = self.gpus + self.cpu_workers, self.gpus_per_node
        return [
            (
                self.gpus >= 0
                and self.cpu_workers >= 0
                and (self.gpus > 0) != (self.cpu_workers > 0),
                f"gpus: expected gpus=N or cpu_workers=N, one of them, found gpus={self.gpus} and "
                f"cpu_workers={self.cpu_workers}",
            ),
            *_known_gpu(self.gpu),
            *at_least(self, 1, "gpus_per_node", "cpu_node_cores"),
            (
                per_node < 1 or self.gpus <= per_node or self.gpus % per_node == 0,
                f"gpus: expected at most gpus_per_node ({per_node}) or a multiple of it, found {self.gpus}",
            ),
            (
                self.fsdp_replicas >= 1 and workers % max(1, self.fsdp_replicas) == 0,
                f"fsdp_replicas: expected a divisor of the trainers ({workers}), found {self.fsdp_replicas}",
            ),
            (
                self.fsdp_replicas == 1 or self.strategy == "fsdp",
                f"fsdp_replicas: {self.fsdp_replicas} copies are for strategy fsdp, found strategy {self.strategy}",
            ),
            (
                self.fsdp_reshard or self.strategy == "fsdp",
                f"fsdp_reshard: false is for strategy fsdp, found strategy {self.strategy}",
            ),
            (
                self.strategy != "none" or workers <= 1,
                f"strategy: none trains one worker alone, found {workers}; use fsdp or ddp",
            ),
            (
                self.cpu_nodes is None or (self.cpu_nodes >= 1 and self.gpus > 0),
                f"cpu_nodes: expected null, or at least 1 beside gpus, found {self.cpu_nodes}",
            ),
        ]


def _whole(name: str, value: float | None) -> Check:
    """A whole number that may be written as 1e9, which YAML and hydra read as a float."""
    is_whole = value is None or (
        math.isfinite(value) and value == int(value) and 1 <= value <= _MOST_MOLECULES
    )
    return (
        is_whole,
        f"{name}: expected a whole number from 1 to 1e12 (1e9 is one), found {value:g}"
        if value is not None
        else name,
    )


def _known_gpu(name: str) -> list[Check]:
    try:
        gpu_of(name)
    except ConfigError as error:
        return [(False, str(error))]
    return []
