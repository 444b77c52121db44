"""The models to use of a finished fine-tuning or sweep: trained on all labelled molecules, with the settings and for the epochs that
it chose.

A model that is scored has not seen the molecules of validation and test, which are the newest ones of a split by time. Once it is
known how good such models are, one that has seen all is better for new molecules, as a rule, and cannot be scored any more. How wrong
its predictions are is taken to be what the scored models' are.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from moleblend_ray.data.files import storage
from moleblend_ray.data.files.documents import member, require_types
from moleblend_ray.errors import CheckpointError, ConfigError
from moleblend_ray.evaluation.models.finetune import ChoiceRows, StartingPoint, refit_once
from moleblend_ray.evaluation.models.property_model import save_property_model
from moleblend_ray.evaluation.molecules.applicability import ApplicabilityDomain, save_domain
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.results.result_files import (
    IDENTITY_NAME,
    RESULTS_NAME,
    SEED_RESULT_NAME,
)
from moleblend_ray.evaluation.results.results import require_version
from moleblend_ray.evaluation.results.runs import model_path
from moleblend_ray.evaluation.scoring.stored_predictions import (
    PREDICTIONS_NAME,
    PartPredictions,
    joined,
    read_predictions,
    write_validation,
)
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Task
from moleblend_ray.model.hub import PROPERTY_NAME
from moleblend_ray.settings import build

logger = logging.getLogger(__name__)

_RESULTS: Final[Mapping[str, Any]] = {
    "config": dict[str, Any],
    "task.columns": list[str],
    "data.fingerprint": str,
    "checkpoint.fingerprint": str | None,
    "chosen": dict[str, Any] | None,
    "final.seeds": list[dict[str, Any]],
}
"""What is read of the results."""

_SEED: Final[Mapping[str, Any]] = {"seed": int, "epochs": int, "best_epoch": int, "model": str}
"""What is read of each model in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedFindings:
    """What the models of a seed found, one of them for each fold of a cross-validation."""

    epochs: int
    """Epochs to train: the best one, and of a cross-validation the (upper) median of the best ones."""
    folders: tuple[str, ...]
    """URIs of their folders."""

    @classmethod
    def of(cls, uri: str, seeds: Sequence[Mapping[str, Any]]) -> SeedFindings:
        """From what the results in ``uri`` say of them."""
        # Without a score in any epoch, the weights of the last one were kept.
        epochs = [seed["best_epoch"] or seed["epochs"] for seed in seeds]
        return cls(
            epochs=statistics.median_high(epochs),
            folders=tuple(storage.join(uri, seed["model"]) for seed in seeds),
        )

    def validation(self, columns: Sequence[str]) -> PartPredictions | None:
        """Their predictions for their validation molecules; None, with a warning, if a file of them is gone."""
        found = [read_predictions(folder, "valid", columns) for folder in self.folders]
        known = [part for part in found if part is not None]
        if len(known) < len(found):
            logger.warning(
                "intervals and sets of classes of predictions will stay empty: %s is gone from %s",
                PREDICTIONS_NAME,
                next(f for f, part in zip(self.folders, found, strict=True) if part is None),
            )
            return None
        return joined(known)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a finished fine-tuning or sweep chose."""

    settings: FinetuneSettings
    """Settings of training."""
    seeds: Mapping[int, SeedFindings]
    """Seed -> what its models found."""
    columns: tuple[str, ...]
    """Label columns."""
    data_fingerprint: str
    """Fingerprint of the molecules."""
    checkpoint_fingerprint: str | None
    """Fingerprint of the weights that training started from."""
    config: Mapping[str, Any]
    """All settings of the command."""
    split_fingerprint: str | None = None
    """Fingerprint of the splits that come with the data; None if there are none, or it was not noted."""

    @classmethod
    def read(cls, uri: str) -> Choice:
        """From the results in ``uri``. Raises ConfigError if there are none, if another release made them, or if each fold chose
        settings of its own."""
        path = storage.join(uri, RESULTS_NAME)
        if not storage.exists(path):
            raise ConfigError(
                f"results: {uri} has no {RESULTS_NAME}; expected the `out` of a finished fine-tuning or sweep, of several tasks the "
                "folder of one of them"
            )
        results = storage.read_object(path, {"results_version": Any})
        require_version(path, results)
        storage.require_members(path, results, _RESULTS)
        if results["chosen"] is None:
            raise ConfigError(
                f"results: in {uri} each fold of the cross-validation chose settings of its own, and a refit needs the same for "
                "all molecules. `moleblend sweep` without task.folds chooses them; `moleblend finetune` with task.folds tests them"
            )
        by_seed: dict[int, list[Mapping[str, Any]]] = {}
        for seed in results["final"]["seeds"]:
            storage.require_members(path, seed, _SEED)
            by_seed.setdefault(seed["seed"], []).append(seed)
        return cls(
            settings=build(FinetuneSettings, results["chosen"]),
            seeds={seed: SeedFindings.of(uri, entries) for seed, entries in by_seed.items()},
            columns=tuple(results["task"]["columns"]),
            data_fingerprint=results["data"]["fingerprint"],
            checkpoint_fingerprint=results["checkpoint"]["fingerprint"],
            config=results["config"],
            split_fingerprint=_noted_split(uri),
        )


def _noted_split(uri: str) -> str | None:
    """The fingerprint of splits that is noted beside results."""
    note = storage.join(uri, IDENTITY_NAME)
    if not storage.exists(note):
        return None
    found: str | None = member(storage.read_object(note), "split_fingerprint", str)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Everything:
    """What all models are trained on."""

    task: Task
    """The task."""
    molecules: LabelledMolecules
    """All that have a label."""
    chosen_on: tuple[ChoiceRows, ...]
    """Parts of the runs that chose settings; empty if the model reads no descriptors."""
    start: StartingPoint
    """Weights to start from."""
    settings: FinetuneSettings
    """Settings of training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitModel:
    """A model that was trained on all molecules."""

    seed: int
    """Seed of initialisation, order and dropout."""
    epochs: int
    """Epochs trained."""
    model: str
    """Its folder within ``out``."""
    seconds: float
    """Running time."""


def refit_and_save(
    everything: Everything,
    seed: int,
    epochs: int,
    validation: PartPredictions | None,
    out: str,
    device: torch.device,
    after_step: Callable[[], None] | None = None,
) -> RefitModel:
    """Train the model of a seed and save it in ``<out>/models/seed-<seed>``, as the commands that score models do.

    Beside it lie the predictions of the scored models for ``validation``, which tell how wide intervals have to be.
    """
    began = time.monotonic()
    molecules = everything.molecules
    model, trained = refit_once(
        molecules,
        epochs=epochs,
        chosen_on=everything.chosen_on,
        task=everything.task,
        start=everything.start,
        settings=everything.settings,
        seed=seed,
        device=device,
        after_step=after_step,
    )
    path = model_path(seed)
    folder = storage.join(out, path)
    # What an interrupted command left of other settings must not be beside files of these.
    for name in (SEED_RESULT_NAME, PROPERTY_NAME, PREDICTIONS_NAME):
        storage.delete(storage.join(folder, name))
    save_domain(ApplicabilityDomain.of(molecules.smiles), folder)
    if validation is not None:
        write_validation(folder, validation, molecules.columns)
    save_property_model(model, trained, folder)
    found = RefitModel(seed=seed, epochs=epochs, model=path, seconds=time.monotonic() - began)
    # Last: with this file the folder is complete.
    settings = dataclasses.asdict(everything.settings)
    storage.write_json(
        storage.join(folder, SEED_RESULT_NAME), {"settings": settings, **dataclasses.asdict(found)}
    )
    return found


def finished_model(
    out: str, seed: int, epochs: int, settings: FinetuneSettings
) -> RefitModel | None:
    """The model of ``seed`` that an earlier command made with these settings, if it did."""
    uri = storage.join(out, model_path(seed), SEED_RESULT_NAME)
    if not storage.exists(uri):
        return None
    value = storage.read_object(uri)
    if value.pop("settings", None) != dataclasses.asdict(settings) or value.get("epochs") != epochs:
        return None
    try:
        found = RefitModel(**value)
        require_types(found)
    except TypeError as error:
        raise CheckpointError(
            f"{uri} does not tell of a model ({error}): it was changed, or another version wrote it. Delete it, and the same "
            "command trains that seed again"
        ) from error
    return found
