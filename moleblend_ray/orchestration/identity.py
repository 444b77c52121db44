"""Whose results a directory holds: the question (settings, molecules, weights) that they answer, noted beside them.

Repeating a command is safe because of this: another question needs another directory, and the same one is answered once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from moleblend_ray.config.describe import redact
from moleblend_ray.data.dataset.dataset_files import LEASES_DIR, is_prepared, prepared_source
from moleblend_ray.data.dataset.dataset_files import PLAN_NAME as DATA_PLAN_NAME
from moleblend_ray.data.dataset.differences import differences, with_defaults
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError, DataError, StorageError
from moleblend_ray.evaluation.results.additions import ADDABLE, is_addition, with_those_of
from moleblend_ray.evaluation.results.result_files import (
    DATA_DIR,
    FOLDS_DIR,
    IDENTITY_NAME,
    LEADERBOARD_NAME,
    PREPARED_DIR,
    RESULTS_NAME,
    command_of,
    require_command,
)
from moleblend_ray.settings import to_dict

if TYPE_CHECKING:
    # Its modules are for chemistry too, which pretraining does without.
    from moleblend_ray.config.downstream import PropertyConfig, RefitConfig

logger = logging.getLogger(__name__)

_LATER_SETTINGS: Final[Mapping[str, Any]] = {
    "model": {"environment_bins": 0, "descriptor_head": False},
    "finetune": {"descriptors": False},
    "task": {
        "censored": False,
        "relation_column": None,
        "classes": [],
        "replicates": "keep",
        "folds": None,
        "fold": None,
    },
    "interval": None,
    "atom_contributions": False,
}
"""Settings, by section, that results of earlier versions do not name, and what these were made with."""

_ONE_OR_SEVERAL: Final = ("source", "models")
"""Settings of which a list of one means the same as its item."""

_NOTED: Final[Mapping[str, Any]] = {"config": dict[str, Any]}
"""What a note holds in any case."""


def question(config: PropertyConfig | RefitConfig) -> dict[str, Any]:
    """The settings that determine the results, without those that say where they are computed or stored."""
    settings = to_dict(config)
    for name in ("out", "cluster", "gpus_per_worker"):
        settings.pop(name)
    return {"job": type(config).__name__, **settings}


def claim(out: str, identity: Mapping[str, Any]) -> None:
    """Note in ``out`` that it is for this question, or check that it is; credentials are hidden in the note.

    A question that adds to the noted one (:data:`~moleblend_ray.evaluation.results.additions.ADDABLE`) takes its place, and any other
    one if there are no results.
    """
    uri = storage.join(out, IDENTITY_NAME)
    if not storage.exists(uri) or _compare(out, _noted(out), identity):
        storage.write_json(uri, redact(identity))


def require_own(out: str, command: str) -> None:
    """Raise ConfigError if ``out`` holds what another command than ``command`` has made.

    A data set and the results of several tasks are known by their files, all others by their note.
    """
    note = storage.join(out, IDENTITY_NAME)
    if storage.exists(note):
        with contextlib.suppress(DataError):  # it was not written completely
            stored = storage.read_object(note)
            require_command(out, stored.get("config", stored), command)
    elif command != "prepare" and (
        is_prepared(out) or storage.exists(storage.join(out, DATA_PLAN_NAME))
    ):
        raise ConfigError(
            f"out: {out} holds a data set of `moleblend prepare`. Give another `out` for `moleblend {command}`"
        )
    elif storage.exists(storage.join(out, f"{LEADERBOARD_NAME}.json")):
        raise ConfigError(
            f"out: {out} holds the results of several tasks. Give another `out` for `moleblend {command}`"
        )


def check_claim(out: str, known: Mapping[str, Any]) -> None:
    """Raise ConfigError if ``out`` is noted for another question; ``known`` is the part of the identity that is known before
    any work."""
    uri = storage.join(out, IDENTITY_NAME)
    if storage.exists(uri):
        stored = _noted(out)
        # If another question may take its place, `claim` says so.
        _compare(out, {name: stored.get(name) for name in known}, known, tells=False)
    elif (command := command_of(known.get("config"))) is not None:
        require_own(out, command)


def check_finished(
    out: str, question: Mapping[str, Any], inputs: Callable[[], Mapping[str, str | None]]
) -> None:
    """Raise ConfigError if the finished ``out`` is for another question, or for data or weights that have changed
    since.

    ``inputs`` gives the present fingerprints. If inputs are gone, the results still count as finished.
    """
    stored = _noted(out)
    _compare(out, stored["config"], question)
    try:
        present = inputs()
    except (StorageError, DataError, CheckpointError) as error:
        logger.warning("cannot check whether the inputs of %s changed: %s", out, error)
        return
    _compare(out, {name: stored[name] for name in present}, present)


def data_inputs(
    sources: Sequence[str], data_uri: str, prepare: Callable[[], str]
) -> dict[str, str | None]:
    """The present fingerprint of ``sources``, which are a prepared dataset or were prepared into ``data_uri``.

    Empty if the prepared dataset was deleted. ``prepare`` compares it with the source and refuses a change.
    """
    if prepared_source(sources) is None and not is_prepared(data_uri):
        return {}
    return {"data_fingerprint": load_manifest(prepare()).fingerprint}


def _noted(out: str) -> dict[str, Any]:
    """What ``out`` is for, by its note, and by its results, if there are any, with which seeds and baselines.

    So an addition that was begun and did not end can be given up, or be another one.
    """
    stored = storage.read_object(storage.join(out, IDENTITY_NAME), _NOTED)
    uri = storage.join(out, RESULTS_NAME)
    if storage.exists(uri):
        results = storage.read_object(uri, {"config": dict[str, Any]})["config"]
        stored = {**stored, "config": with_those_of(results, stored["config"])}
    return stored


def _completed(note: Mapping[str, Any]) -> dict[str, Any]:
    """With the settings that a note of an earlier version lacks, as it worked then, and one location for a list of one."""
    if "config" in note:
        return {**note, "config": _completed(note["config"])}
    settings = with_defaults(note, _LATER_SETTINGS)
    for name in _ONE_OR_SEVERAL:
        if isinstance(given := settings.get(name), list | tuple) and len(given) == 1:
            (settings[name],) = given
    return settings


def _compare(
    out: str, stored: Mapping[str, Any], asked: Mapping[str, Any], *, tells: bool = True
) -> bool:
    """Raise ConfigError if ``out`` has results of a question that is not this one or a part of it; otherwise, whether the note
    of ``out`` differs from this one."""
    # Credentials may differ between a command and its repetition; both are compared without them.
    # A note is a question, or an identity that may have one.
    theirs, ours = (note.get("config", note) for note in (stored, asked))
    if (command := command_of(ours)) is not None:
        require_command(out, theirs, command)
    differing = differences(redact(_completed(stored)), redact(_completed(asked)))
    changed = {
        name: values
        for name, values in differing.items()
        if not is_addition(name.removeprefix("config."), *values)
    }
    listed = "; ".join(
        f"{name}: {there!r} there, {here!r} here" for name, (there, here) in changed.items()
    )
    if changed and not _has_no_results(out):
        remedy = "Give another `out`, or repeat settings and inputs as they were"
        if {name.removeprefix("config.") for name in changed} <= set(ADDABLE):
            remedy += ". Further seeds are added after those that are there, further baselines beside them"
        raise ConfigError(
            f"{out} holds results of other settings or inputs; they differ in {listed}. {remedy}"
        )
    if changed and tells:
        logger.info("%s was begun otherwise and has no results: beginning anew (%s)", out, listed)
    return bool(differing)


def _has_no_results(out: str) -> bool:
    """Whether there is nothing beside the note in ``out`` but molecules that were prepared, and leases: whatever began there
    ended before its first result, such as by a learning rate that was too high."""
    base = storage.absolute(out)
    paths = [file.uri[len(base) + 1 :] for file in storage.list_files(out)]
    # The runs of a cross-validation have folders like this one, each with a note.
    below = [path.split("/", 2)[-1] if path.startswith(f"{FOLDS_DIR}/") else path for path in paths]
    names = {path.partition("/")[0] for path in below}
    return names <= {IDENTITY_NAME, DATA_DIR, PREPARED_DIR, LEASES_DIR}
