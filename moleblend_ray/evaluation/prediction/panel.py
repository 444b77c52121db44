"""Predictions of several properties at once, each by models of its own: a panel, such as all of ADMET, in one pass over the molecules.

Models are asked for together as an ensemble if they have the same task. Each task has its own conformers, intervals and domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.models.batches import MOLECULE_COLUMNS
from moleblend_ray.evaluation.models.property_model import TrainedProperty
from moleblend_ray.evaluation.prediction.ensemble import Member, form_of
from moleblend_ray.evaluation.prediction.prediction import Predictor


def build_predictor(
    members: Sequence[Member],
    *,
    conformers: int | None,
    threshold: float | None,
    batch_size: int | None,
    device: torch.device,
    interval: float | None = None,
    atom_contributions: bool = False,
) -> Predictor | Panel:
    """What asks ``members``, at least one: a panel if they have several tasks. Arguments and errors as of :meth:`Predictor.build`;
    ConfigError also if tasks differ in the form of molecules, or in whether molecules without coordinates can be predicted, or if two
    properties would have one name."""
    by_task: dict[str, list[Member]] = {}
    for member in members:
        by_task.setdefault(member.saved.trained.task, []).append(member)
    # For all: of a panel, too, molecules are prepared once.
    form_of(members)
    predictors = {
        task: Predictor.build(
            own,
            conformers=conformers,
            threshold=threshold,
            interval=interval,
            atom_contributions=atom_contributions,
            batch_size=batch_size,
            device=device,
        )
        for task, own in by_task.items()
    }
    if len(predictors) == 1:
        return next(iter(predictors.values()))
    return Panel(predictors=predictors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Models of several tasks. Every molecule of a shard table becomes a row, in order, with the properties of all."""

    predictors: Mapping[str, Predictor]
    """Task -> its models, at least two tasks."""

    def __post_init__(self) -> None:
        self._check_names()
        needing = [task for task, one in self.predictors.items() if one.needs_coordinates]
        if needing and len(needing) < len(self.predictors):
            others = [task for task in self.predictors if task not in needing]
            raise ConfigError(
                f"models: those of {', '.join(needing)} see distances alone, so molecules without coordinates would be rejected, which "
                f"those of {', '.join(others)} can do without. Predict with each kind into its own `out`"
            )

    def _check_names(self) -> None:
        """Raise ConfigError if two properties would have one name."""
        owner: dict[str, str] = {}
        for task, one in self.predictors.items():
            for name in _names(one.trained).values():
                if name in owner:
                    raise ConfigError(
                        f"models: those of the tasks {owner[name]!r} and {task!r} both predict what is called {name!r} in a table of "
                        "several tasks. Predict with each into its own `out`, or fine-tune one with another task.name"
                    )
                owner[name] = task

    def with_contributions(self, *, asked: bool) -> Panel:
        """The same models, asked for contributions of atoms or not."""
        return Panel(
            predictors={
                task: one.with_contributions(asked=asked) for task, one in self.predictors.items()
            }
        )

    @property
    def members(self) -> tuple[Member, ...]:
        """The models of all tasks."""
        return tuple(member for one in self.predictors.values() for member in one.members)

    @property
    def conformers(self) -> int:
        """Most conformers that models use of a molecule."""
        return max(one.conformers for one in self.predictors.values())

    @property
    def batch_size(self) -> int:
        """Conformers computed at once."""
        return next(iter(self.predictors.values())).batch_size

    @property
    def needs_coordinates(self) -> bool:
        """Whether predictions for molecules without coordinates mean nothing."""
        return any(one.needs_coordinates for one in self.predictors.values())

    @property
    def form(self) -> MoleculeForm | None:
        """The form that molecules should have; None: unknown."""
        known = (one for one in self.predictors.values() if one.trained_form is not None)
        return next(known, next(iter(self.predictors.values()))).form

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what those of the tasks are made of."""
        parts = (f"{task} {one.fingerprint}" for task, one in self.predictors.items())
        return storage.sha256_bytes("\n".join(parts).encode())

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table that :meth:`part` returns: those of the molecules, then those of each task."""
        return self._together({task: one.schema for task, one in self.predictors.items()})

    def describe(self) -> dict[str, Any]:
        """The part of ``predictions.json`` that describes the models and the questions, together and by task."""
        tasks = {task: one.describe() for task, one in self.predictors.items()}
        names = {task: _names(one.trained) for task, one in self.predictors.items()}
        units = {
            names[task][column]: found["unit"]
            for task, found in tasks.items()
            for column in found["columns"]
        }
        return {
            "columns": list(units),
            "unit": ", ".join(dict.fromkeys(unit for unit in units.values() if unit)),
            "units": units,
            "conformers": self.conformers,
            "interval": next(iter(tasks.values()))["interval"],
            "half_widths": {
                names[task][column]: width
                for task, found in tasks.items()
                for column, width in found["half_widths"].items()
            },
            "models": [model for found in tasks.values() for model in found["models"]],
            "tasks": tasks,
        }

    def part(self, table: pa.Table) -> pa.Table:
        """The rows of a shard table in their order, with predictions of all tasks and their uncertainty."""
        parts = {task: one.part(table) for task, one in self.predictors.items()}
        columns = [table[name] for name in MOLECULE_COLUMNS]
        for part in parts.values():
            columns += part.columns[len(MOLECULE_COLUMNS) :]
        return pa.table(columns, schema=self.schema)

    def _together(self, schemas: Mapping[str, pa.Schema]) -> pa.Schema:
        count = len(MOLECULE_COLUMNS)
        fields = list(next(iter(schemas.values())))[:count]
        for task, schema in schemas.items():
            names = _names(self.predictors[task].trained)
            fields += [
                field.with_name(_named(field.name, task, names)) for field in list(schema)[count:]
            ]
        return pa.schema(fields)


def _names(trained: TrainedProperty) -> dict[str, str]:
    """Column of the labels -> what a panel calls it: the task, and of a task with several ``task/column``.

    Columns of different tables often have the same name.
    """
    if len(trained.columns) == 1:
        return {trained.columns[0]: trained.task}
    return {column: f"{trained.task}/{column}" for column in trained.columns}


def _named(field: str, task: str, names: Mapping[str, str]) -> str:
    """The name of a column of predictions (``std:y``, ``in_domain``) in a panel."""
    statistic, _, column = field.partition(":")
    # A column of several classes is none of the labels that it becomes.
    known = names.get(column, f"{task}/{column}") if column else task
    return f"{statistic}:{known}"
