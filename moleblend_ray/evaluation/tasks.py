"""The table of tasks: labels, splits, metrics and units of MoleculeNet and QM7 to QM9.

Tasks are defined only here; ``conf/task/<name>.yaml`` just names an entry. A user's own table of molecules is a task as
well: name its label columns and say whether they are classes or numbers.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from moleblend_ray.errors import ConfigError


class TaskKind(StrEnum):
    """Type of the labels."""

    CLASSIFICATION = "classification"
    """0 or 1 in each column; several columns are independent questions."""
    REGRESSION = "regression"
    """A real number in each column."""


class ReplicateRule(StrEnum):
    """What becomes of several rows of one molecule."""

    KEEP = "keep"
    """Each counts by itself."""
    MEAN = "mean"
    """One row, with the mean of the labels."""
    MEDIAN = "median"
    """One row, with their median."""


class Metric(StrEnum):
    """How predictions are scored."""

    ROC_AUC = "roc_auc"
    """Area under the ROC curve, averaged over the columns that have both classes."""
    PR_AUC = "pr_auc"
    """Average precision (area under the precision-recall curve by steps), averaged over the columns that have both
    classes. A random order scores the share of positives."""
    BALANCED_ACCURACY = "balanced_accuracy"
    """Mean over both classes of the share that is taken for what it is (a probability above a half is class 1), averaged over
    the columns that have both. Of more than two classes, the mean over all: the most probable one counts."""
    MCC = "mcc"
    """Matthews' correlation coefficient of the same decisions with the labels (Biochim. Biophys. Acta 405, 442 (1975)), averaged
    over the columns that have both classes. Of more than two classes, each against the rest."""
    RMSE = "rmse"
    """Root mean square error in the task's units, averaged over columns."""
    MAE = "mae"
    """Mean absolute error in the task's units, averaged over columns."""
    R2 = "r2"
    """Coefficient of determination, averaged over the columns whose labels differ. The mean of the scored labels as
    prediction scores 0."""
    SPEARMAN = "spearman"
    """Spearman's rank correlation, averaged over the columns whose labels differ."""

    @property
    def kind(self) -> TaskKind:
        """Type of the labels that it scores."""
        of_classes = (Metric.ROC_AUC, Metric.PR_AUC, Metric.BALANCED_ACCURACY, Metric.MCC)
        return TaskKind.CLASSIFICATION if self in of_classes else TaskKind.REGRESSION

    @property
    def is_error(self) -> bool:
        """Whether it is in the task's units, and a smaller one is better."""
        return self in (Metric.RMSE, Metric.MAE)

    @property
    def decides(self) -> bool:
        """Whether it judges which class a molecule is taken for, and not the order of the molecules."""
        return self in (Metric.BALANCED_ACCURACY, Metric.MCC)

    @property
    def is_ratio(self) -> bool:
        """Whether a difference can be told in percent: correlations have no zero that means "nothing left to gain"."""
        return self not in (Metric.R2, Metric.SPEARMAN, Metric.MCC)

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is better."""
        return not self.is_error

    @property
    def shown_name(self) -> str:
        """Name in tables."""
        return _SHOWN_NAMES[self]


_SHOWN_NAMES: Final = {
    Metric.ROC_AUC: "ROC-AUC",
    Metric.PR_AUC: "PR-AUC",
    Metric.BALANCED_ACCURACY: "balanced accuracy",
    Metric.MCC: "MCC",
    Metric.RMSE: "RMSE",
    Metric.MAE: "MAE",
    Metric.R2: "R²",
    Metric.SPEARMAN: "Spearman's rho",
}


def metrics_of(kind: TaskKind) -> tuple[Metric, ...]:
    """The metrics that score labels of this type."""
    return tuple(metric for metric in Metric if metric.kind is kind)


class SplitKind(StrEnum):
    """How molecules are divided into training, validation and test."""

    SCAFFOLD = "scaffold"
    """Murcko scaffolds, largest groups first into training (DeepChem's order); no scaffold is in two parts."""
    SCAFFOLD_BALANCED = "scaffold_balanced"
    """Murcko scaffolds; groups too large for validation and test first, then the others in a seeded order
    (chemprop's)."""
    RANDOM = "random"
    """Random by a seed, over distinct SMILES; no molecule is in two parts."""
    BUTINA = "butina"
    """Butina's clusters of similar molecules, largest first into training (DeepChem's); no cluster is in two parts."""
    TIME = "time"
    """The newest tenth for test, the tenth before it for validation, by a column of dates or numbers."""
    GROUP = "group"
    """By a column of groups, such as projects; groups too large for validation and test first, then the others in a seeded order. No
    group is in two parts."""
    GIVEN = "given"
    """Given with the data, by a column, a split file or the splits of a prepared dataset."""

    @property
    def is_of_data(self) -> bool:
        """Whether the data say which part each molecule is in."""
        return self in (SplitKind.TIME, SplitKind.GIVEN)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A benchmark, or a question of a user."""

    name: str
    """Name by which the task is asked for."""
    kind: TaskKind
    """Classes or numbers."""
    metric: Metric
    """How predictions are scored and configurations chosen."""
    split: SplitKind
    """How molecules are divided."""
    columns: tuple[str, ...]
    """Label columns; empty: every label column of the data."""
    unit: str
    """Unit of the labels; empty for classes and plain numbers."""
    citation: str
    """Where the data comes from."""
    epochs: tuple[int, int] = (40, 100)
    """Fewest and most epochs that a sweep tries (the published search ranges)."""
    files: tuple[str, ...] = ()
    """Other names under which its table is published, without ending and in lower case."""

    def __post_init__(self) -> None:
        if self.metric.kind is not self.kind:
            fitting = ", ".join(metric.value for metric in metrics_of(self.kind))
            raise ConfigError(
                f"task {self.name!r}: metric {self.metric.value} does not fit {self.kind.value}, which is scored by "
                f"one of {fitting}"
            )


_MOLECULENET: Final = "Wu et al., Chem. Sci. 9, 513 (2018); "
_QM7: Final = "Blum & Reymond, J. Am. Chem. Soc. 131, 8732 (2009); Rupp et al., Phys. Rev. Lett. 108, 058301 (2012)"
_QM8: Final = "Ruddigkeit et al., J. Chem. Inf. Model. 52, 2864 (2012); Ramakrishnan et al., J. Chem. Phys. 143, 084111 (2015)"
_QM9: Final = "Ruddigkeit et al., J. Chem. Inf. Model. 52, 2864 (2012); Ramakrishnan et al., Sci. Data 1, 140022 (2014)"

_TOX21: Final = (
    "NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD",
    "NR-PPAR-gamma", "SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53",
)  # fmt: skip
_MUV: Final = tuple(
    f"MUV-{number}"
    for number in (466, 548, 600, 644, 652, 689, 692, 712, 713, 733, 737, 810, 832, 846, 852, 858, 859)
)  # fmt: skip

_QM8_COLUMNS: Final = tuple(
    f"{quantity}-{method}"
    # MoleculeNet's header has PBE0 twice (def2SVP, then def2TZVP); these are the names that its readers see.
    for method in ("CC2", "PBE0", "PBE0.1", "CAM")
    for quantity in ("E1", "E2", "f1", "f2")
)
"""Energies in hartree and oscillator strengths (no unit) of two transitions, by four methods."""

_QM9_UNITS: Final = {
    "mu": "Debye",
    "alpha": "bohr^3",
    "homo": "hartree",
    "lumo": "hartree",
    "gap": "hartree",
    "r2": "bohr^2",
    "zpve": "hartree",
    "u0": "hartree",
    "u298": "hartree",
    "h298": "hartree",
    "g298": "hartree",
    "cv": "cal/(mol K)",
    "u0_atom": "kcal/mol",
    "u298_atom": "kcal/mol",
    "h298_atom": "kcal/mol",
    "g298_atom": "kcal/mol",
}


def _classes(
    name: str,
    columns: tuple[str, ...],
    citation: str,
    epochs: tuple[int, int] = (40, 100),
    files: tuple[str, ...] = (),
) -> Task:
    return Task(
        name=name,
        kind=TaskKind.CLASSIFICATION,
        metric=Metric.ROC_AUC,
        split=SplitKind.SCAFFOLD,
        columns=columns,
        unit="",
        citation=_MOLECULENET + citation,
        epochs=epochs,
        files=files,
    )


def _numbers(name: str, column: str, unit: str, citation: str, files: tuple[str, ...] = ()) -> Task:
    return Task(
        name=name,
        kind=TaskKind.REGRESSION,
        metric=Metric.RMSE,
        split=SplitKind.SCAFFOLD,
        columns=(column,),
        unit=unit,
        citation=_MOLECULENET + citation,
        files=files,
    )


def _quantum(
    name: str, columns: tuple[str, ...], unit: str, citation: str, files: tuple[str, ...]
) -> Task:
    return Task(
        name=name,
        kind=TaskKind.REGRESSION,
        metric=Metric.MAE,
        split=SplitKind.RANDOM,
        columns=columns,
        unit=unit,
        citation=citation,
        files=files,
    )


_ALL: Final = (
    _classes("bbbp", ("p_np",), "Martins et al., J. Chem. Inf. Model. 52, 1686 (2012)"),
    _classes("tox21", _TOX21, "Huang et al., Front. Environ. Sci. 3, 85 (2016)"),
    _classes(
        "toxcast",
        (),
        "Richard et al., Chem. Res. Toxicol. 29, 1225 (2016)",
        files=("toxcast_data",),
    ),
    _classes("sider", (), "Kuhn et al., Nucleic Acids Res. 44, D1075 (2016)"),
    _classes(
        "clintox", ("FDA_APPROVED", "CT_TOX"), "Gayvert et al., Cell Chem. Biol. 23, 1294 (2016)"
    ),
    _classes("muv", _MUV, "Rohrer & Baumann, J. Chem. Inf. Model. 49, 169 (2009)", (20, 40)),
    _classes("hiv", ("HIV_active",), "DTP AIDS Antiviral Screen, NCI", (5, 15)),
    _classes("bace", ("Class",), "Subramanian et al., J. Chem. Inf. Model. 56, 1936 (2016)"),
    _numbers(
        "esol",
        "measured log solubility in mols per litre",
        "log10(mol/L)",
        "Delaney, J. Chem. Inf. Comput. Sci. 44, 1000 (2004)",
        files=("delaney-processed", "delaney"),
    ),
    _numbers(
        "freesolv",
        "expt",
        "kcal/mol",
        "Mobley & Guthrie, J. Comput. Aided Mol. Des. 28, 711 (2014)",
        files=("sampl",),
    ),
    _numbers("lipophilicity", "exp", "logD at pH 7.4", "Hersey, ChEMBL CHEMBL3301361 (2015)"),
    _quantum("qm7", ("u0_atom",), "kcal/mol", _QM7, ("gdb7",)),
    _quantum("qm8", _QM8_COLUMNS, "hartree and oscillator strength", _QM8, ("gdb8",)),
    *(
        _quantum(f"qm9_{column}", (column,), unit, _QM9, ("qm9", "qm9_deepchem"))
        for column, unit in _QM9_UNITS.items()
    ),
)

TASKS: Final[dict[str, Task]] = {task.name: task for task in _ALL}
"""Every known task by name."""

_CLASSES: Final = ("bbbp", "tox21", "toxcast", "sider", "clintox", "muv", "hiv", "bace")
_NUMBERS: Final = ("esol", "freesolv", "lipophilicity")

GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "moleculenet": _CLASSES + _NUMBERS,
    "moleculenet_small": tuple(n for n in _CLASSES if n not in ("muv", "hiv")) + _NUMBERS,
    "moleculenet_classification": _CLASSES,
    "moleculenet_regression": _NUMBERS,
    "qm9": tuple(f"qm9_{column}" for column in _QM9_UNITS),
}
"""Tasks that are asked for together, in the order in which they are worked on."""


def is_group(name: str | Sequence[str]) -> bool:
    """Whether a name stands for several tasks: that of a group, or a list of names."""
    return not isinstance(name, str) or name in GROUPS


def task_names(name: str | Sequence[str]) -> tuple[str, ...]:
    """The names that a name, a group or a list of them stands for, in order, each once.

    Raises ConfigError if a list is empty, or has a name that is neither in the table nor a group: a user's own table is
    described by settings for a single task.
    """
    if isinstance(name, str):
        return GROUPS.get(name, (name,))
    unknown = [item for item in name if item not in TASKS and item not in GROUPS]
    if unknown or not name:
        near = difflib.get_close_matches(unknown[0], [*TASKS, *GROUPS], n=1) if unknown else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"name: expected tasks of the table or groups ({', '.join(GROUPS)}), found {unknown or 'none'}{hint} "
            "A table of your own is a task by itself: name it alone"
        )
    return tuple(dict.fromkeys(member for item in name for member in GROUPS.get(item, (item,))))


def resolve_task(
    name: str,
    *,
    columns: tuple[str, ...] = (),
    kind: TaskKind | None = None,
    metric: Metric | None = None,
    split: SplitKind | None = None,
    unit: str | None = None,
) -> Task:
    """The task with this name and the given fields replaced, or a user's own task described by these fields."""
    known = TASKS.get(name)
    if known is None:
        return _own_task(name, columns, kind, metric, split, unit)
    if kind is not None and kind is not known.kind:
        raise ConfigError(
            f"task {name!r} is {known.kind.value}, not {kind.value}; give your own task another name"
        )
    return dataclasses.replace(
        known,
        columns=columns or known.columns,
        metric=metric or known.metric,
        split=split or known.split,
        unit=known.unit if unit is None else unit,
    )


def no_column_has(columns: Sequence[str]) -> str:
    """How a sentence begins which says that none of the label columns has something; names the only one."""
    if len(columns) == 1:
        return f"label column {columns[0]!r} does not have"
    return f"none of the {len(columns)} label columns has"


def _own_task(
    name: str,
    columns: tuple[str, ...],
    kind: TaskKind | None,
    metric: Metric | None,
    split: SplitKind | None,
    unit: str | None,
) -> Task:
    if not columns or kind is None:
        near = difflib.get_close_matches(name, [*TASKS, *GROUPS], n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? Known" if near else "known"
        known = f"{', '.join(TASKS)}; groups {', '.join(GROUPS)}"
        raise ConfigError(
            f"task {name!r} is not in the table; {hint}: {known}. For a table of your own, "
            "set task.columns (label columns) and task.kind (classification or regression)"
        )
    usual = Metric.ROC_AUC if kind is TaskKind.CLASSIFICATION else Metric.RMSE
    return Task(
        name=name,
        kind=kind,
        metric=metric or usual,
        split=split or SplitKind.SCAFFOLD,
        columns=columns,
        unit=unit or "",
        citation="the user's own data",
    )
