"""Predictions for molecules of a shard: mean, interval, spread over models and conformers, contributions of atoms, similarity to
training molecules."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from moleblend_ray.data.dataset.block import block_from_table
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.dataset.shards import MOLECULE_FIELDS
from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.models.atom_reference import element_counts
from moleblend_ray.evaluation.models.batches import (
    MOLECULE_COLUMNS,
    ViewDescriptors,
    batches_by_size,
    descriptors_of_views,
    molecules_at_once,
    views_of,
    without_coordinates,
)
from moleblend_ray.evaluation.models.property_model import TrainedProperty, distances_alone
from moleblend_ray.evaluation.molecules.applicability import ApplicabilityDomain
from moleblend_ray.evaluation.molecules.similarity import packed_ecfp
from moleblend_ray.evaluation.prediction.contributions import Ask, atom_contributions
from moleblend_ray.evaluation.prediction.ensemble import (
    Member,
    combine,
    conformers_of,
    form_of,
    question_of,
)
from moleblend_ray.evaluation.scoring.alternatives import most_probable
from moleblend_ray.evaluation.scoring.class_sets import SET_NAMES, ClassCalibration
from moleblend_ray.evaluation.scoring.intervals import Calibration
from moleblend_ray.evaluation.scoring.stored_predictions import PREDICTIONS_NAME, PartPredictions
from moleblend_ray.evaluation.tasks import TaskKind
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.moleblend import NUM_ELEMENTS

logger = logging.getLogger(__name__)

C = TypeVar("C")

_OF_CLASSES: Final = ("p0", "p1", "classes")
"""Columns for each property of classes: p-values of both, and the set of those that a molecule goes with."""

_OF_ATOMS: Final = ("atom_contributions", "atom_contributions_std")
"""Columns for each property with a list of the atoms of each molecule."""

_NAMED: Final = 5
"""Cases that a warning names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictor:
    """Models for one question and how to run them. Every molecule of a shard table becomes a row, in order."""

    members: tuple[Member, ...]
    """The models, at least one, in evaluation mode on `device`."""
    domains: tuple[ApplicabilityDomain, ...]
    """The distinct applicability domains of the members; empty if a member has none."""
    conformers: int
    """Number of conformers used per molecule, the first ones; 0: none, also where the source has coordinates."""
    trained_form: MoleculeForm | None
    """The form of the molecules of fine-tuning; None: unknown."""
    threshold: float | None
    """Least similarity of a molecule inside the domain; None: that of each model."""
    interval: float | None
    """Share of labels inside the intervals of numbers, or the sets of classes; None if there are to be none."""
    half_widths: NDArray[np.float64]
    """(T,) half of the width of each interval; NaN where it is not known, and for classes."""
    classes: ClassCalibration | None
    """What tells how well molecules go with each class; None if it is not known, and for numbers."""
    batch_size: int
    """Conformers computed at once."""
    device: torch.device
    """Device on which they are computed."""
    atom_contributions: bool = False
    """Whether to say what each atom adds to a prediction."""

    @classmethod
    def build(
        cls,
        members: Sequence[Member],
        *,
        conformers: int | None,
        threshold: float | None,
        batch_size: int | None,
        device: torch.device,
        interval: float | None = None,
        atom_contributions: bool = False,
    ) -> Predictor:
        """Move ``members`` to ``device``. ``conformers`` None: as many as they were fine-tuned with;
        ``batch_size`` None: as many as suit the device.

        Raises ConfigError as :func:`conformers_of` and :func:`form_of`, and if there are to be none for a model of distances
        alone.
        """
        count = conformers_of(members) if conformers is None else conformers
        for member in members:
            if count == 0 and member.saved.sees_geometry_alone:
                raise ConfigError(distances_alone("conformers: expected at least 1", member.uri))
            member.saved.model.to(device).eval()
        domains = {member.domain.checksum: member.domain for member in members if member.domain}
        all_known = all(member.domain for member in members)
        trained = members[0].saved.trained
        widths, classes = None, None
        if interval is not None and _is_scored_with(members, count):
            if trained.kind is TaskKind.CLASSIFICATION:
                classes = _class_calibration(members, interval)
            else:
                widths = _half_widths(members, interval)
        return cls(
            members=tuple(members),
            domains=tuple(domains.values()) if all_known else (),
            conformers=count,
            trained_form=form_of(members),
            threshold=threshold,
            interval=interval,
            half_widths=np.full(len(trained.columns), np.nan) if widths is None else widths,
            classes=classes,
            batch_size=molecules_at_once(batch_size, device),
            device=device,
            atom_contributions=atom_contributions,
        )

    def with_contributions(self, *, asked: bool) -> Predictor:
        """The same models, asked for contributions of atoms or not."""
        return dataclasses.replace(self, atom_contributions=asked)

    @property
    def form(self) -> MoleculeForm | None:
        """The form that molecules should have; None: unknown. For contributions, atoms have the order of the canonical SMILES."""
        if not self.atom_contributions:
            return self.trained_form
        return dataclasses.replace(self.trained_form or MoleculeForm(), canonical_order=True)

    @property
    def needs_coordinates(self) -> bool:
        """Whether predictions for molecules without coordinates mean nothing, as a model sees distances alone."""
        return any(member.saved.sees_geometry_alone for member in self.members)

    @property
    def trained(self) -> TrainedProperty:
        """What all members predict; each has its own standardisation."""
        return self.members[0].saved.trained

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the models and of the fingerprints of their training molecules, in order, and of what intervals or sets
        of classes come from."""
        parts = [
            f"{member.fingerprint} {member.domain.checksum if member.domain else None}"
            for member in self.members
        ]
        if self.interval is not None:
            parts.append(repr(self.half_widths.tolist()))
        if self.classes is not None:
            parts += [
                repr(values.tolist()) for both in self.classes.probabilities for values in both
            ]
        return storage.sha256_bytes("\n".join(parts).encode())

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table that :meth:`part` returns."""
        return prediction_schema(self.trained, self._statistics)

    @property
    def _statistics(self) -> list[str]:
        """What is said of each property."""
        return [
            "prediction",
            *(self._bounded if self.interval is not None else ()),
            "std",
            *(["conformer_std"] if self.conformers > 1 else []),
            *(_OF_ATOMS if self.atom_contributions else ()),
        ]

    @property
    def _bounded(self) -> tuple[str, ...]:
        """What is said of labels with a stated share."""
        return _OF_CLASSES if self.trained.kind is TaskKind.CLASSIFICATION else ("lower", "upper")

    def describe(self) -> dict[str, Any]:
        """The part of ``predictions.json`` that describes the models and the question."""
        return {
            **question_of(self.trained),
            "conformers": self.conformers,
            "interval": self.interval,
            "half_widths": self._named_widths(),
            "models": [
                {
                    "uri": member.uri,
                    "fingerprint": member.fingerprint,
                    "threshold": self._threshold(member.domain) if member.domain else None,
                    "training_fingerprints": (
                        len(member.domain.fingerprints) if member.domain else None
                    ),
                }
                for member in self.members
            ],
        }

    def _named_widths(self) -> dict[str, float | None]:
        """Property -> half width of its intervals, None if not known; empty without intervals."""
        if self.interval is None or self.trained.kind is TaskKind.CLASSIFICATION:
            return {}
        widths = zip(self.trained.columns, self.half_widths.tolist(), strict=True)
        return {name: None if math.isnan(width) else width for name, width in widths}

    def part(self, table: pa.Table) -> pa.Table:
        """The rows of a shard table in their order, with predictions and their uncertainty."""
        if not self.conformers:
            table = without_coordinates(table)
        views = views_of(table, self.conformers)
        ask = self._asker(table, views)
        combined = combine(self._values(table, views, ask), views)
        columns = [table[name] for name in MOLECULE_COLUMNS]
        values = {
            "prediction": combined.mean,
            "lower": combined.mean - self.half_widths,
            "upper": combined.mean + self.half_widths,
            "std": combined.std,
            "conformer_std": combined.conformer_std,
        }
        if self.interval is not None and self.trained.kind is TaskKind.CLASSIFICATION:
            values |= _class_columns(self.classes, combined.mean, self.interval)
        made = {name: _columns(name, found) for name, found in values.items()}
        if self.atom_contributions:
            made |= self._of_atoms(table, views, ask)
        for index in range(len(self.trained.columns)):
            columns += [made[name][index] for name in self._statistics]
        columns += _most_probable_classes(self.trained, combined.mean)
        similarity, in_domain = self._applicability(table)
        return pa.table([*columns, similarity, in_domain], schema=self.schema)

    def _asker(self, table: pa.Table, views: NDArray[np.int64]) -> Ask:
        """What asks all models for the views of the molecules of a shard table."""
        shown = descriptors_of_views(
            [member.saved.trained.descriptors for member in self.members],
            table["smiles"].to_pylist(),
            views,
        )
        return partial(self._ask, shown)

    @torch.no_grad()
    def _ask(
        self, shown: Sequence[ViewDescriptors], rows: NDArray[np.int64], batch: MoleculeBatch
    ) -> NDArray[np.float64]:
        """(S, B, T) outputs of S models for the views ``rows`` (B,): values in the unit, or log-odds."""
        answers = []
        for member, inputs in zip(self.members, shown, strict=True):
            output = member.saved.model(batch, inputs.of(rows, self.device))
            answers.append(member.saved.trained.restore(output.double().cpu().numpy()))
        return np.stack(answers)

    def _values(self, table: pa.Table, views: NDArray[np.int64], ask: Ask) -> NDArray[np.float64]:
        """(S, R, T) predictions of S models: values in the unit, or probabilities."""
        outputs = np.empty((len(self.members), int(views.sum()), len(self.trained.columns)))
        for rows, batch in batches_by_size(table, views, self.batch_size, self.device):
            outputs[:, rows] = ask(rows, batch)
        return self.trained.predictions(outputs)

    def _of_atoms(
        self, table: pa.Table, views: NDArray[np.int64], ask: Ask
    ) -> dict[str, list[pa.Array]]:
        """The columns of each of ``_OF_ATOMS``, one for each property."""
        found = atom_contributions(
            table,
            views,
            ask,
            shape=(len(self.members), len(self.trained.columns)),
            batch_size=self.batch_size,
            device=self.device,
        )
        return dict(zip(_OF_ATOMS, (found.lists(found.mean), found.lists(found.std)), strict=True))

    def _applicability(self, table: pa.Table) -> tuple[pa.Array, pa.Array]:
        """Similarity to the nearest training molecule, and whether it is high enough; null if not known.

        If the models were trained on different molecules, the smallest similarity counts, and a molecule is inside only
        if it is inside for all models.
        """
        if not self.domains:
            return pa.nulls(len(table), pa.float64()), pa.nulls(len(table), pa.bool_())
        queries = packed_ecfp(table["smiles"].to_pylist())
        similarity, inside = np.ones(len(table)), self._has_all_references(table)
        for domain in self.domains:
            nearest = domain.similarity(queries)
            similarity = np.minimum(similarity, nearest)
            inside &= nearest >= self._threshold(domain)
        return pa.array(similarity), pa.array(inside)

    def _has_all_references(self, table: pa.Table) -> NDArray[np.bool_]:
        """(M,) whether every element of a molecule is in the element references of those models and properties that have one.

        The sum over atoms lacks an element that no training molecule with a label of the property has: an energy of hundreds of
        hartree.
        """
        lacking = np.zeros(NUM_ELEMENTS, dtype=np.bool_)
        for member in self.members:
            known = (member.saved.model.reference != 0).cpu().numpy()
            lacking |= ~known[:, known.any(axis=0)].all(axis=1)
        if not lacking.any():
            return np.ones(len(table), dtype=np.bool_)
        counts = element_counts(block_from_table(table, np.arange(len(table), dtype=np.int64)))
        return np.asarray(counts[:, lacking].sum(axis=1) == 0)

    def _threshold(self, domain: ApplicabilityDomain) -> float:
        return domain.threshold if self.threshold is None else self.threshold


def prediction_schema(trained: TrainedProperty, statistics: Sequence[str]) -> pa.Schema:
    """Columns of predictions, with those of ``statistics`` for each property; the unit is in the metadata of the field."""
    return pa.schema(
        [
            *(field for field in MOLECULE_FIELDS if field.name in MOLECULE_COLUMNS),
            *(
                pa.field(
                    f"{statistic}:{name}",
                    _type_of(statistic),
                    metadata=_unit(trained, statistic),
                )
                for name in trained.columns
                for statistic in statistics
            ),
            *(pa.field(f"class:{one.column}", pa.string()) for one in trained.alternatives),
            pa.field("similarity", pa.float64()),
            pa.field("in_domain", pa.bool_()),
        ]
    )


def _most_probable_classes(
    trained: TrainedProperty, probabilities: NDArray[np.float64]
) -> list[pa.Array]:
    """The most probable class of each molecule, for each column of classes in words."""
    return [
        pa.array(
            np.array(one.words)[most_probable(one, trained.columns, probabilities)], pa.string()
        )
        for one in trained.alternatives
    ]


def _is_scored_with(members: Sequence[Member], conformers: int) -> bool:
    """Whether the models' errors are those of predictions from as many conformers; a warning if not."""
    scored = {one.saved.conformers for one in members if one.saved.model.readout.relations != "2d"}
    if not scored - {conformers}:
        return True
    logger.warning(
        "%s: %s stay empty: the models' errors are known for %s conformers, and these predictions are from %d",
        members[0].saved.trained.task,
        _what_stays_empty(members),
        " or ".join(map(str, sorted(scored))),
        conformers,
    )
    return False


def _what_stays_empty(members: Sequence[Member]) -> str:
    is_class = members[0].saved.trained.kind is TaskKind.CLASSIFICATION
    return "p-values and sets of classes" if is_class else "intervals"


def _learned(
    of: Callable[[Sequence[PartPredictions | None]], C | None], members: Sequence[Member]
) -> C | None:
    """What ``of`` learns from the validation molecules of ``members``; None, with a warning, if it is not known."""
    found = of([member.validation for member in members])
    if found is None:
        logger.warning(
            "%s: %s stay empty: it is not known how wrong these models together are for validation molecules (%s is absent "
            "beside one of them, or they had different molecules, some of them in common)",
            members[0].saved.trained.task,
            _what_stays_empty(members),
            PREDICTIONS_NAME,
        )
    return found


def _half_widths(members: Sequence[Member], interval: float) -> NDArray[np.float64] | None:
    """(T,) half widths of intervals for the mean of ``members``, NaN, with a warning, where they are not known; None if none
    is."""
    calibration = _learned(Calibration.of, members)
    if calibration is None:
        return None
    widths = calibration.half_widths(interval)
    named = zip(members[0].saved.trained.columns, widths, strict=True)
    if few := [name for name, width in named if math.isnan(width)]:
        logger.warning(
            "%s: intervals stay empty for %s: there are too few validation labels to tell what holds %g of them",
            members[0].saved.trained.task,
            ", ".join(few),
            interval,
        )
    return widths


def _class_calibration(members: Sequence[Member], interval: float) -> ClassCalibration | None:
    """What tells p-values of classes from the mean of ``members``; None if it is not known. A warning names classes that sets
    cannot leave out."""
    calibration = _learned(ClassCalibration.of, members)
    if calibration is None:
        return None
    never = calibration.never_excluded(interval)
    if never.any():
        columns = members[0].saved.trained.columns
        cases = [f"{columns[column]} ({value})" for column, value in np.argwhere(never)]
        more = f" and {len(cases) - _NAMED} more" if len(cases) > _NAMED else ""
        logger.warning(
            "%s: with %g, these classes are in every set, as there are too few validation molecules of them: %s%s",
            members[0].saved.trained.task,
            interval,
            ", ".join(cases[:_NAMED]),
            more,
        )
    return calibration


def _class_columns(
    classes: ClassCalibration | None, probabilities: NDArray[np.float64], interval: float
) -> dict[str, NDArray[Any]]:
    """p-values (M, T) and sets of classes (M, T) of molecules with these probabilities; NaN and None if not known."""
    if classes is None:
        unknown = np.full_like(probabilities, np.nan)
        return {"p0": unknown, "p1": unknown, "classes": np.full(unknown.shape, None)}
    found = classes.p_values(probabilities)
    words = np.array(SET_NAMES, dtype=object)[found.sets(interval)]
    return {"p0": found.of_0, "p1": found.of_1, "classes": words}


def _unit(trained: TrainedProperty, statistic: str) -> Mapping[str, str] | None:
    if statistic in _OF_CLASSES:
        return None
    if trained.kind is TaskKind.CLASSIFICATION:
        return {"unit": "log-odds" if statistic in _OF_ATOMS else "probability"}
    return {"unit": trained.unit} if trained.unit else None


def _columns(statistic: str, values: NDArray[Any]) -> list[pa.Array]:
    """The columns of (M, T) values, with null for NaN: not known, as the spread of one value."""
    return [pa.array(column, _type_of(statistic), from_pandas=True) for column in values.T]


def _type_of(statistic: str) -> pa.DataType:
    if statistic in _OF_ATOMS:
        return pa.list_(pa.float32())
    return pa.string() if statistic == "classes" else pa.float64()
