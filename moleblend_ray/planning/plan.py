"""What a plan starts from and what it says, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moleblend_ray.planning.capacity import Resource, Setup
from moleblend_ray.planning.figures import Figure
from moleblend_ray.planning.settings import FailureSettings, PriceSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The work to plan."""

    molecules: int
    """Molecules in the collection."""
    presentations: int
    """Molecules that training sees, repetitions counted."""
    prepare_per_core_s: Figure
    """Records that one core converts per second, including conformers if they are made."""
    embed_per_trainer_s: Figure
    """Vectors that the device of one trainer makes per second."""
    first_step_s: Figure
    """Seconds from the start of the command to its first step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Premises:
    """What a plan takes as given, besides the numbers of trainers and of CPU nodes."""

    job: Job
    setup: Setup
    """The model, and the machines of each kind."""
    failures: FailureSettings
    prices: PriceSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a plan."""

    what: str
    figure: Figure
    remark: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """prepare, pretrain or embed."""

    name: str
    hours: Figure
    cost: Figure | None
    """In the currency of the prices; None if no price was given."""
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The effect of doubling one thing."""

    what: str
    rate: float
    """Molecules/s, divided by those of the plan."""
    hours: float
    """Hours of pretraining, divided by those of the plan."""
    cost: float | None
    """Cost of pretraining, divided by that of the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalePoint:
    """Pretraining with another number of trainers, with a data side of the right size; all else stays the same."""

    workers: int
    cpu_nodes: int
    molecules_per_s: float
    hours: float
    cost: float | None
    goodput: float
    binding: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a collection, a model and a cluster result in."""

    title: str
    rate: Figure
    """Molecules/s of pretraining, without interruptions."""
    binding: str
    stages: tuple[Stage, ...]
    total: tuple[Row, ...]
    resources: tuple[Resource, ...]
    changes: tuple[Change, ...]
    scaling: tuple[ScalePoint, ...]
    settings: Mapping[str, str]
    """Settings of `moleblend pretrain` that the plan assumes."""
    assumptions: tuple[str, ...]
    """What the hours rest on and was not measured."""
    hints: tuple[str, ...]
    """Other settings that would be faster."""
    warnings: tuple[str, ...]
