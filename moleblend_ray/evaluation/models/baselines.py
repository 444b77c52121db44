"""What a chemist would try first, on the same split: fingerprints or descriptors, and a model of scikit-learn.

Each kind has a small grid of settings, judged only on training and validation molecules: nothing here sees labels that
it is not given. This module imports neither RDKit nor torch; features are computed elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.dataset.descriptors import DescriptorScaling
from moleblend_ray.data.sources.classes import Exclusive
from moleblend_ray.evaluation.models.linear_model import fit_linear, linear_grid
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.scoring.scores import score
from moleblend_ray.evaluation.tasks import Task, TaskKind


class FeatureKind(StrEnum):
    """What a baseline gets of a molecule."""

    FINGERPRINTS = "fingerprints"
    """ECFP4: (M, 2048) uint8, 0 or 1."""
    DESCRIPTORS = "descriptors"
    """RDKit's 2D descriptors: (M, D) float64, some NaN or infinite."""


class BaselineKind(StrEnum):
    """A model to compare with."""

    FOREST = "forest"
    """ECFP4 + random forest (Breiman, Mach. Learn. 45, 5 (2001); on fingerprints: Svetnik et al., J. Chem. Inf.
    Comput. Sci. 43, 1947 (2003))."""
    BOOSTING = "boosting"
    """ECFP4 + histogram gradient boosting (scikit-learn's, after Ke et al., NeurIPS 2017)."""
    DESCRIPTORS = "descriptors"
    """RDKit descriptors + ridge regression for numbers, logistic regression for classes."""
    SCRATCH = "scratch"
    """The encoder without pretraining, trained in the same way as the model. It is not made in this module."""

    @property
    def label(self) -> str:
        """Name in tables."""
        return _LABELS[self]

    @property
    def features(self) -> FeatureKind:
        """Features that it is fitted to."""
        return (
            FeatureKind.DESCRIPTORS
            if self is BaselineKind.DESCRIPTORS
            else FeatureKind.FINGERPRINTS
        )

    @property
    def is_random(self) -> bool:
        """Whether another seed gives another model."""
        return self is not BaselineKind.DESCRIPTORS


_LABELS: Final = {
    BaselineKind.FOREST: "ECFP4 + random forest",
    BaselineKind.BOOSTING: "ECFP4 + gradient boosting",
    BaselineKind.DESCRIPTORS: "RDKit descriptors + linear model",
    BaselineKind.SCRATCH: "MoleBLEND, from scratch",
}

Settings = Mapping[str, float | int | str]
"""Hyper-parameters of a baseline, with the names of scikit-learn, and :data:`BOUNDS_SETTING`."""

BOUNDS_SETTING: Final = "bounds"
"""What trees do with labels of which only a bound is known: ``as_labels`` (``>10`` counts as 10) or ``left_out``."""

BOUNDS_AS_LABELS: Final = "as_labels"

MAX_FOREST_LABELS: Final = 80_000_000
"""Most known training labels that the trees of all columns process together. With the 1.3 million labels of ToxCast one
takes 2 to 3 us, and 63 of 200 trees per column remain."""

MAX_BOOSTING_LABELS: Final = 30_000_000
"""The same for rounds of boosting. There a label of ToxCast takes 5 us, and in columns of 12,000 labels (MUV) up to 9
us. For ToxCast 23 rounds per column remain."""

FULL_GRID_LABELS: Final = 20_000_000
"""With more labels only the first half of a grid is tried."""

MAX_TREE_MOLECULES: Final = 20_000
"""Most molecules that a tree of a forest draws: with 100,000, 200 trees for regression would take one core 20
minutes."""

MIN_LEAF_LABELS: Final = 20
"""Least number of labels in a leaf of a boosted tree (scikit-learn's default) ..."""

MIN_LEAF_SHARE: Final = 0.05
"""... or this share of all labels, if that is less: with 100 labels, leaves of 20 would be too coarse."""

BOOSTING_FEATURES: Final = 0.1
"""Share of the bits among which each split of a boosted tree chooses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineData:
    """Molecules as baselines see them, and which of them are for training and which for scores."""

    task: Task
    """The task."""
    mol_ids: tuple[str, ...]
    """(M,) ids as in the source."""
    smiles: tuple[str, ...]
    """(M,) canonical SMILES."""
    features: NDArray[Any]
    """(M, F) features of one :class:`FeatureKind`."""
    labels: NDArray[np.float64]
    """(M, T) labels; NaN where missing."""
    columns: tuple[str, ...]
    """(T,) names of the labels."""
    train: NDArray[np.int64]
    """Rows to fit to."""
    valid: NDArray[np.int64]
    """Rows by which settings are chosen."""
    test: NDArray[np.int64]
    """Rows scored at the end; empty while settings are chosen."""
    bounds: LabelBounds | None = None
    """Bounds of labels that have no number, for training; None if they count as missing."""
    exclusive: Exclusive = ()
    """Groups of columns of which one is 1, for scores: each column has a model of its own."""

    def known(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], tuple[str, ...], LabelBounds | None, Exclusive]:
        """Labels, columns and bounds of the molecules ``rows``, as :func:`score` takes them."""
        return self.labels[rows], self.columns, self.bounds and self.bounds[rows], self.exclusive

    def without_test(self) -> BaselineData:
        """The data with training and validation molecules only, in this order: what the choice of settings may see."""
        rows = np.concatenate([self.train, self.valid])
        return dataclasses.replace(
            self,
            mol_ids=tuple(self.mol_ids[row] for row in rows),
            smiles=tuple(self.smiles[row] for row in rows),
            features=self.features[rows],
            labels=self.labels[rows],
            bounds=None if self.bounds is None else self.bounds[rows],
            train=np.arange(len(self.train), dtype=np.int64),
            valid=np.arange(len(self.train), len(rows), dtype=np.int64),
            test=np.zeros(0, dtype=np.int64),
        )


def candidate_groups(
    kind: BaselineKind,
    task_kind: TaskKind,
    train_labels: NDArray[np.float64],
    *,
    num_trees: int,
    num_rounds: int,
    censored: bool = False,
) -> list[list[Settings]]:
    """The grid of a kind for (N, T) training labels, and bounds in their place. The settings of a group share one fit.

    With ``censored`` labels, trees try both of what they can do with bounds; linear models use them as the encoder does.
    Tasks with many labels (ToxCast: 617 columns) get fewer trees and settings, see :data:`MAX_FOREST_LABELS`,
    :data:`MAX_BOOSTING_LABELS` and :data:`FULL_GRID_LABELS`.
    """
    known = (~np.isnan(train_labels)).sum(axis=0)
    if kind is BaselineKind.DESCRIPTORS:
        return [list(linear_grid(task_kind))]
    if kind is BaselineKind.FOREST:
        num_labels = int(np.minimum(known, MAX_TREE_MOLECULES).sum())
        groups = _forest_grid(task_kind, num_labels, num_trees)
    else:
        groups = _boosting_grid(int(known.sum()), num_rounds)
    if not censored:
        return groups
    return [
        [{**settings, BOUNDS_SETTING: use} for settings in group]
        for use in (BOUNDS_AS_LABELS, "left_out")
        for group in groups
    ]


def _forest_grid(task_kind: TaskKind, num_labels: int, num_trees: int) -> list[list[Settings]]:
    # The bits among which each split chooses.
    shares: tuple[str | float, ...] = (0.1, 0.3)
    if task_kind is TaskKind.CLASSIFICATION:
        shares = ("sqrt", 0.1)
    if num_trees * num_labels > FULL_GRID_LABELS:
        shares = shares[:1]
    trees = _affordable(num_trees, num_labels, MAX_FOREST_LABELS)
    return [
        [{"n_estimators": trees, "max_features": share, "min_samples_leaf": leaf}]
        for share in shares
        for leaf in (1, 3)
    ]


def _boosting_grid(num_labels: int, num_rounds: int) -> list[list[Settings]]:
    leaves = (31, 8) if num_rounds * num_labels <= FULL_GRID_LABELS else (31,)
    most = _affordable(num_rounds, num_labels, MAX_BOOSTING_LABELS)
    # A fit with few rounds is the beginning of one with more: one fit serves all numbers of rounds.
    rounds = sorted({max(1, most * share // 8) for share in (1, 2, 4, 8)})
    return [[{"max_iter": n, "max_leaf_nodes": count} for n in rounds] for count in leaves]


def _affordable(asked: int, num_labels: int, max_labels: int) -> int:
    return max(1, min(asked, max_labels // max(1, num_labels)))


def validation_scores(
    data: BaselineData, kind: BaselineKind, group: Sequence[Settings], seed: int, num_jobs: int
) -> list[float]:
    """The task's metric on ``data.valid`` for each settings of a group, fitted to ``data.train``."""
    return [
        score(data.task.metric, predictions, *data.known(data.valid)).value
        for predictions in predict_group(data, kind, group, data.valid, seed, num_jobs)
    ]


def predict_group(
    data: BaselineData,
    kind: BaselineKind,
    group: Sequence[Settings],
    rows: NDArray[np.int64],
    seed: int,
    num_jobs: int,
) -> list[NDArray[np.float64]]:
    """(K, T) predictions for the molecules ``rows`` (K,) by each settings of a group, fitted to ``data.train``.

    There is one model per column, fitted to its known labels. Numbers are in the labels' unit; for classes they are
    probabilities of class 1. For a column without training labels the prediction is 0; if all training labels are equal,
    it is that label. Both score like chance. ``num_jobs`` threads are used; they change the time, and at most rounding.
    """
    # Imported here, as it takes some time and configurations import this module as well.
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    inputs = _inputs(kind, data)
    fit = _FITS[kind]
    asked = inputs[rows]
    found = [np.zeros((len(rows), data.labels.shape[1])) for _ in group]
    is_linear = kind is BaselineKind.DESCRIPTORS
    own = [_without_bounds(settings) for settings in group]
    with threadpool_limits(limits=num_jobs):
        for column, labels in enumerate(_labels_for(data, group).T):
            targets = labels[data.train]
            targets = targets[~np.isnan(targets)]
            if len(targets) == 0 or targets.min() == targets.max():
                constant = targets[0] if len(targets) else 0.0
                outputs = [np.full(len(rows), constant)] * len(group)
            else:
                bounds = data.bounds[:, [column]] if data.bounds and is_linear else None
                used = _taught(data.train, labels, bounds)
                examples = Examples(
                    inputs[used],
                    labels[used],
                    asked,
                    data.task.kind,
                    seed,
                    num_jobs,
                    bounds and bounds[used],
                )
                outputs = fit(examples, own)
            for predictions, output in zip(found, outputs, strict=True):
                predictions[:, column] = output
    return found


def _labels_for(data: BaselineData, group: Sequence[Settings]) -> NDArray[np.float64]:
    """(M, T) labels, of which some may be bounds that count as labels."""
    if data.bounds is None or group[0].get(BOUNDS_SETTING) != BOUNDS_AS_LABELS:
        return data.labels
    return data.bounds.filled(data.labels)


def _taught(
    train: NDArray[np.int64], labels: NDArray[np.float64], bounds: LabelBounds | None
) -> NDArray[np.int64]:
    """The rows of ``train`` of which a label (M,) or a bound (M, 1) is known."""
    known = ~np.isnan(labels)
    if bounds is not None:
        known = known | bounds.known[:, 0]
    return train[known[train]]


def _without_bounds(settings: Settings) -> Settings:
    """Those of scikit-learn."""
    return {name: value for name, value in settings.items() if name != BOUNDS_SETTING}


@dataclass(frozen=True, slots=True)
class Examples:
    """What the model of one column learns from, and what it predicts."""

    inputs: Any
    """(K, F) features of molecules with a label, as an array or a sparse matrix."""
    targets: NDArray[np.float64]
    """(K,) labels, at least two different ones; NaN where only a bound is known."""
    asked: Any
    """(Q, F) features of molecules to predict."""
    kind: TaskKind
    """Classes or numbers."""
    seed: int
    """Seed of the model, if it draws random numbers."""
    num_jobs: int
    """Number of threads."""
    bounds: LabelBounds | None = None
    """(K, 1) these bounds; None if all labels are known."""

    @property
    def classes(self) -> NDArray[np.int64]:
        """(K,) labels as classes."""
        return self.targets.astype(np.int64)


def _inputs(kind: BaselineKind, data: BaselineData) -> Any:
    if kind is BaselineKind.FOREST:
        from scipy.sparse import csr_matrix

        # 2 % of the bits are set: sparse input gives the same trees in half the time.
        return csr_matrix(data.features).astype(np.float32)
    if kind is BaselineKind.DESCRIPTORS:
        return DescriptorScaling.fit(data.features[data.train]).apply(data.features)
    return data.features


def _fit_forest(examples: Examples, group: Sequence[Settings]) -> list[NDArray[np.float64]]:
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    too_many = len(examples.targets) > MAX_TREE_MOLECULES
    fixed = {
        "max_samples": MAX_TREE_MOLECULES if too_many else None,
        "random_state": examples.seed,
        "n_jobs": examples.num_jobs,
    }
    outputs = []
    for settings in group:
        if examples.kind is TaskKind.CLASSIFICATION:
            forest = RandomForestClassifier(**settings, **fixed)
            forest.fit(examples.inputs, examples.classes)
        else:
            forest = RandomForestRegressor(**settings, **fixed)
            forest.fit(examples.inputs, examples.targets)
        # Several threads would add the trees in the order in which they finish, which varies.
        forest.n_jobs = 1
        if examples.kind is TaskKind.CLASSIFICATION:
            outputs.append(forest.predict_proba(examples.asked)[:, 1])
        else:
            outputs.append(forest.predict(examples.asked))
    return outputs


def _fit_boosting(examples: Examples, group: Sequence[Settings]) -> list[NDArray[np.float64]]:
    """One fit with the most rounds, and its outputs after each number of rounds in the group, which differ in nothing
    else."""
    from scipy.special import expit
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    count = len(examples.targets)
    least = min(MIN_LEAF_LABELS, max(1, int(MIN_LEAF_SHARE * count)))
    # A bit that is set (or unset) in fewer molecules than a leaf must have cannot be used for a split.
    num_set = examples.inputs.sum(axis=0, dtype=np.int64)
    usable = np.flatnonzero((num_set >= least) & (num_set <= count - least))
    if len(usable) == 0:
        return [np.full(len(examples.asked), examples.targets.mean()) for _ in group]
    rounds = [int(settings["max_iter"]) for settings in group]
    fixed = {
        "max_leaf_nodes": int(group[0]["max_leaf_nodes"]),
        "min_samples_leaf": least,
        "max_features": BOOSTING_FEATURES,
        # A bit has two values: of 255 bins of a histogram all others would be empty.
        "max_bins": 2,
        "early_stopping": False,
        "random_state": examples.seed,
    }
    inputs, asked = examples.inputs[:, usable], examples.asked[:, usable]
    if examples.kind is TaskKind.CLASSIFICATION:
        model = HistGradientBoostingClassifier(max_iter=max(rounds), **fixed)
        stages = map(expit, model.fit(inputs, examples.classes).staged_decision_function(asked))
    else:
        model = HistGradientBoostingRegressor(max_iter=max(rounds), **fixed)
        stages = model.fit(inputs, examples.targets).staged_predict(asked)
    after = {
        number: np.asarray(output, dtype=np.float64).reshape(len(asked))
        for number, output in enumerate(stages, start=1)
        if number in rounds
    }
    return [after[number] for number in rounds]


def _fit_linear(examples: Examples, group: Sequence[Settings]) -> list[NDArray[np.float64]]:
    from scipy.special import expit

    labels = examples.targets[:, None]
    models = (
        fit_linear(examples.kind, examples.inputs, labels, settings, bounds=examples.bounds)
        for settings in group
    )
    outputs = [model(examples.asked)[:, 0] for model in models]
    return list(map(expit, outputs)) if examples.kind is TaskKind.CLASSIFICATION else outputs


_FITS: Final[
    Mapping[BaselineKind, Callable[[Examples, Sequence[Settings]], list[NDArray[np.float64]]]]
] = {
    BaselineKind.FOREST: _fit_forest,
    BaselineKind.BOOSTING: _fit_boosting,
    BaselineKind.DESCRIPTORS: _fit_linear,
}
