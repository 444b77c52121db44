"""A fine-tuned model as two files at any URI: ``model.safetensors`` and, written last, ``property.json``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.documents import lack
from moleblend_ray.data.sources.classes import Alternatives, exclusive_places
from moleblend_ray.errors import CheckpointError, ConfigError, DataError
from moleblend_ray.evaluation.molecules.descriptor_inputs import DescriptorInputs
from moleblend_ray.evaluation.tasks import Task, TaskKind, no_column_has
from moleblend_ray.model.config import ModelConfig, ReadoutConfig
from moleblend_ray.model.hub import PROPERTY_NAME, WEIGHTS_NAME
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel

logger = logging.getLogger(__name__)

_NAMED: Final = 5
"""Columns that a message names; the others it counts."""

FORMAT_VERSION: Final = 4
"""Version of the two files; it increases with every change that older code cannot read."""

_VERSION_OF_DESCRIPTORS: Final = 3
"""What older code can read is written in its version: models without classes in words ..."""

_VERSION_WITHOUT_DESCRIPTORS: Final = 2
"""... and those that read no descriptors either."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standardisation:
    """Affine map between labels and outputs of the model, fitted to the training part."""

    mean: NDArray[np.float64]
    """(T,) mean in the labels' unit; 0 for classes."""
    std: NDArray[np.float64]
    """(T,) standard deviation in the labels' unit; 1 for classes."""

    @classmethod
    def fit(
        cls, kind: TaskKind, labels: NDArray[np.float64], columns: tuple[str, ...]
    ) -> Standardisation:
        """Mean and standard deviation of the known values of each column in (M, T) training ``labels``."""
        if kind is TaskKind.CLASSIFICATION:
            return cls(mean=np.zeros(len(columns)), std=np.ones(len(columns)))
        empty = np.flatnonzero(np.isnan(labels).all(axis=0))
        if len(empty):
            raise DataError(
                f"label columns {[columns[index] for index in empty]} have no value among the "
                f"{len(labels)} training molecules; leave them out of task.columns"
            )
        # Because the mean is rounded, equal labels have a tiny deviation without meaning, on which a bound would lie far out.
        differ = np.nanmin(labels, axis=0) < np.nanmax(labels, axis=0)
        std = np.where(differ, np.nanstd(labels, axis=0), 1.0)
        return cls(mean=np.nanmean(labels, axis=0), std=std)

    def normalise(self, labels: NDArray[np.float64]) -> NDArray[np.float64]:
        """Labels as the model should predict them."""
        return (labels - self.mean) / self.std

    def restore(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Outputs in the labels' unit (as they are for classes)."""
        return outputs * self.std + self.mean


def require_learnable(
    kind: TaskKind, labels: NDArray[np.float64], columns: tuple[str, ...]
) -> None:
    """Raise DataError if (M, T) training ``labels`` teach nothing; name the columns whose known labels are all equal.

    A column of numbers needs a value, as :meth:`Standardisation.fit` says, and one column needs labels that differ.
    """
    if kind is TaskKind.REGRESSION:
        Standardisation.fit(kind, labels, columns)
    needed = "both classes" if kind is TaskKind.CLASSIFICATION else "labels that differ"
    differ = [len(np.unique(values[~np.isnan(values)])) > 1 for values in labels.T]
    lacking = [column for column, does in zip(columns, differ, strict=True) if not does]
    if len(lacking) == len(columns):
        raise DataError(
            f"nothing to learn: {no_column_has(columns)} {needed} among the {len(labels)} training molecules; use more molecules or another split"
        )
    if lacking:
        shown = ", ".join(lacking[:_NAMED]) + (" ..." if len(lacking) > _NAMED else "")
        logger.warning(
            "%d of %d columns do not have %s among the %d training molecules, and predictions of them mean "
            "nothing: %s",
            len(lacking),
            len(columns),
            needed,
            len(labels),
            shown,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedProperty:
    """What a property head predicts."""

    task: str
    """Name of the task it was trained for."""
    kind: TaskKind
    """Classes or numbers."""
    columns: tuple[str, ...]
    """(T,) names of the predicted properties."""
    unit: str
    """Unit of the predictions; empty for classes."""
    standardisation: Standardisation
    """Converts outputs of the head to that unit."""
    conformers: int = 1
    """Most conformers that a molecule had in fine-tuning, over which its scores are means; 0: no coordinates. Models from before
    this was stored count as having had one."""
    molecules: MoleculeForm | None = None
    """The form of the molecules of fine-tuning; None: unknown."""
    descriptors: DescriptorInputs | None = None
    """Descriptors that the model reads; None: none."""
    alternatives: tuple[Alternatives, ...] = ()
    """Which of the properties are the classes of one column."""

    @classmethod
    def of(
        cls,
        task: Task,
        columns: tuple[str, ...],
        standardisation: Standardisation,
        *,
        conformers: int,
        molecules: MoleculeForm | None,
        descriptors: DescriptorInputs | None = None,
        alternatives: tuple[Alternatives, ...] = (),
    ) -> TrainedProperty:
        """What a model predicts that was fine-tuned on ``task``, with ``molecules`` of a form and up to ``conformers`` of each."""
        return cls(
            task=task.name,
            kind=task.kind,
            columns=columns,
            unit=task.unit,
            standardisation=standardisation,
            conformers=conformers,
            molecules=molecules,
            descriptors=descriptors,
            alternatives=alternatives,
        )

    @property
    def num_descriptors(self) -> int:
        """Number of descriptors that the model reads."""
        return 0 if self.descriptors is None else len(self.descriptors.names)

    def readout(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M, T) head outputs as numbers in the unit, or as probabilities of class 1."""
        return self.predictions(self.restore(outputs))

    def restore(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., T) head outputs as numbers in the unit, or as log-odds of class 1; of classes that exclude each other, those of
        their softmax, so that their probabilities add up to 1."""
        values = self.standardisation.restore(outputs)
        for places in exclusive_places(self.alternatives, self.columns):
            logits = values[..., places]
            for index, place in enumerate(places):
                others = np.logaddexp.reduce(np.delete(logits, index, axis=-1), axis=-1)
                values[..., place] = logits[..., index] - others
        return values

    def predictions(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., T) restored outputs as predictions: numbers as they are, log-odds as probabilities of class 1."""
        if self.kind is TaskKind.REGRESSION:
            return values
        probabilities: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * values))
        return probabilities


class SavedProperty(NamedTuple):
    """The content of the folder of a fine-tuned model."""

    model: PropertyModel
    """The model, in evaluation mode on the CPU."""
    trained: TrainedProperty
    """What it predicts."""

    @property
    def conformers(self) -> int:
        """Most conformers of a molecule that the model saw in fine-tuning; 0: it sees 2D relations alone."""
        return 0 if self.model.readout.relations == "2d" else self.trained.conformers

    @property
    def sees_geometry_alone(self) -> bool:
        """Whether the model sees distances, but no paths and bonds. Without coordinates isomers are all the same to it."""
        return self.model.readout.relations == "3d"


def distances_alone(expected: str, uri: str) -> str:
    """What is told to those who ask the model at ``uri`` without coordinates, which it needs."""
    return (
        f"{expected}, found none: {uri} was fine-tuned on distances alone (finetune.relations=3d), and without coordinates "
        "all isomers are the same to it"
    )


def save_property_model(model: PropertyModel, trained: TrainedProperty, uri: str) -> None:
    """Write ``model`` and what it predicts to the directory ``uri``."""
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    storage.write_bytes(storage.join(uri, WEIGHTS_NAME), safetensors.torch.save(tensors))
    version = _VERSION_WITHOUT_DESCRIPTORS
    if trained.descriptors is not None:
        version = _VERSION_OF_DESCRIPTORS
    if trained.alternatives:
        version = FORMAT_VERSION
    document: dict[str, Any] = {
        "format_version": version,
        "model": dataclasses.asdict(model.config),
        "readout": dataclasses.asdict(model.readout),
        "task": trained.task,
        "kind": trained.kind.value,
        "columns": list(trained.columns),
        "unit": trained.unit,
        "mean": trained.standardisation.mean.tolist(),
        "std": trained.standardisation.std.tolist(),
        "conformers": trained.conformers,
    }
    if trained.molecules is not None:
        document["molecules"] = dataclasses.asdict(trained.molecules)
    if trained.alternatives:
        document["alternatives"] = {
            one.column: {"labels": list(one.labels), "words": list(one.words)}
            for one in trained.alternatives
        }
    if trained.descriptors is not None:
        document["descriptors"] = trained.descriptors.to_json()
    storage.write_json(storage.join(uri, PROPERTY_NAME), document)


def is_property_model(uri: str) -> bool:
    """Whether the directory ``uri`` holds a fine-tuned model."""
    return storage.exists(storage.join(uri, PROPERTY_NAME))


def load_property_model(uri: str) -> SavedProperty:
    """The fine-tuned model of the directory ``uri``."""
    document = storage.read_json(storage.join(uri, PROPERTY_NAME))
    version = document.get("format_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{uri}/{PROPERTY_NAME} has format version {version!r}; this installation reads up to "
            f"{FORMAT_VERSION}. Upgrade moleblend-ray"
        )
    try:
        trained = _trained(document)
        pretrained = MoleBlendModel.without_weights(ModelConfig(**document["model"]))
        state = safetensors.torch.load(storage.read_bytes(storage.join(uri, WEIGHTS_NAME)))
        # On the CPU and in float32 like the encoder, whatever PyTorch's defaults are. The head is drawn before it gets its
        # weights, from PyTorch's generator, which is the caller's.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            model = PropertyModel(
                pretrained,
                len(trained.columns),
                _readout(document),
                num_descriptors=trained.num_descriptors,
            ).float()
        # Models of the first version have no element reference, so atoms add 0.
        state.setdefault("reference", model.reference)
        model.load_state_dict(state)
    except (
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        ConfigError,
        safetensors.SafetensorError,
    ) as error:
        raise CheckpointError(
            f"the fine-tuned model at {uri} is damaged or of another version: {error}"
        ) from error
    require_finite(state, uri)
    return SavedProperty(model.eval(), trained)


def require_finite(state: Mapping[str, Tensor], uri: str) -> None:
    """Raise CheckpointError if a weight of the model at ``uri`` is NaN or infinite: so would be all that it gives."""
    wrong = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if wrong:
        raise CheckpointError(
            f"the model at {uri} has weights that are not finite, in {len(wrong)} of {len(state)} tensors ({wrong[0]}): its "
            "training diverged. Leave it out, or train it again with a lower learning rate"
        )


def _readout(document: dict[str, Any]) -> ReadoutConfig:
    if document["format_version"] == 1:
        return ReadoutConfig(dropout=document["head_dropout"])
    return ReadoutConfig(**document["readout"])


_DESCRIPTION: Final[Mapping[str, Any]] = {
    "task": str,
    "kind": str,
    "columns": list[str],
    "unit": str | None,
    "mean": list[float],
    "std": list[float],
}
"""What models of all versions say of the property."""


def _trained(document: dict[str, Any]) -> TrainedProperty:
    if problem := lack(document, _DESCRIPTION):
        raise TypeError(problem)
    if "alternatives" in document and document["format_version"] < FORMAT_VERSION:
        raise ValueError("its classes do not exclude each other. Fine-tune it again")
    inputs, molecules = document.get("descriptors"), document.get("molecules")
    return TrainedProperty(
        task=document["task"],
        kind=TaskKind(document["kind"]),
        columns=tuple(document["columns"]),
        unit=document["unit"],
        standardisation=Standardisation(
            mean=np.asarray(document["mean"], dtype=np.float64),
            std=np.asarray(document["std"], dtype=np.float64),
        ),
        conformers=document.get("conformers", 1),
        molecules=None if molecules is None else MoleculeForm.from_json(molecules),
        descriptors=DescriptorInputs.from_json(inputs) if inputs else None,
        alternatives=tuple(
            Alternatives(column, tuple(one["labels"]), tuple(one["words"]))
            for column, one in document.get("alternatives", {}).items()
        ),
    )
