"""Where the molecules of several tasks are: one directory with a table or prepared dataset per task, or one for all."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME, is_prepared
from moleblend_ray.data.files import storage
from moleblend_ray.data.sources.archives import container_of, text_format
from moleblend_ray.errors import ConfigError, StorageError
from moleblend_ray.evaluation.tasks import TASKS, Task

_PARQUET = (".parquet", ".pq")


class TaskSources(NamedTuple):
    """What a source holds for each task that was asked for."""

    found: dict[str, str]
    """Name of a task -> URI of its molecules; several tasks may have the same."""
    missing: dict[str, str]
    """Name of a task -> name that was looked for and not found."""


def task_sources(source: str, tasks: Sequence[Task]) -> TaskSources:
    """The molecules of each task in ``source``, a path or URI.

    A file, a glob or a prepared dataset is used for every task. In a directory each task has its own: a prepared
    dataset ``NAME/``, a file such as ``NAME.csv.gz`` or ``NAME.parquet``, or a folder ``NAME/`` with such files. NAME
    is the name of the task or one under which its table is published (``Task.files``), in upper or lower case. If tasks
    that share a table (those of QM9) find nothing under their names, the directory itself is their source. Raises
    ConfigError if there are several candidates that are not prepared, StorageError if the source does not exist.
    """
    entries = _entries_of(source)
    if entries is None:
        return TaskSources({task.name: source for task in tasks}, {})
    found, missing = {}, {}
    for task in tasks:
        entry = _entry_of(task, entries, source)
        if entry is None:
            missing[task.name] = " or ".join(f"{name}.csv" for name in _names(task))
        else:
            found[task.name] = storage.join(source, entry.name)
    share_a_table = len({task.files for task in tasks}) == 1 and len(tasks) > 1
    if not found and share_a_table and tasks[0].files and any(entries.values()):
        return TaskSources({task.name: source for task in tasks}, {})
    return TaskSources(found, missing)


def source_of_task(source: str, task: Task) -> str:
    """The molecules of a single task: its own table, as of several, if ``source`` is a directory that holds others beside it, and the
    task one of the table of tasks; else ``source`` itself."""
    if task.name not in TASKS:
        return source
    try:
        entries = _entries_of(source)
    except StorageError:  # Whoever reads it tells what is wrong.
        return source
    if entries is None or sum(map(len, entries.values())) == 1:
        return source
    entry = _entry_of(task, entries, source)
    return source if entry is None else storage.join(source, entry.name)


class _Entry(NamedTuple):
    """A file or folder in the directory."""

    name: str
    is_prepared: bool


def _entries_of(source: str) -> dict[str, list[_Entry]] | None:
    """What is in a directory, as :func:`_entries`; None if ``source`` is a file, a glob or a prepared dataset."""
    if is_prepared(source):
        return None
    files = [file.uri for file in storage.list_files(source)]
    base = storage.absolute(source).rstrip("/")
    if files == [base] or not all(uri.startswith(f"{base}/") for uri in files):
        return None
    return _entries([uri[len(base) + 1 :] for uri in files])


def _entries(paths: Sequence[str]) -> dict[str, list[_Entry]]:
    """Name without ending, in lower case -> tables, and folders with tables or a prepared dataset."""
    folders: dict[str, list[str]] = defaultdict(list)
    entries: dict[str, list[_Entry]] = defaultdict(list)
    for path in paths:
        folder, slash, below = path.partition("/")
        if slash:
            folders[folder].append(below)
        elif _holds_molecules(path):
            entries[_stem(path)].append(_Entry(path, is_prepared=False))
    for folder, below_it in folders.items():
        is_prepared = MANIFEST_NAME in below_it
        if is_prepared or any(map(_holds_molecules, below_it)):
            entries[folder.lower()].append(_Entry(folder, is_prepared=is_prepared))
    return entries


def _names(task: Task) -> tuple[str, ...]:
    """Names of the table of a task, without ending and in lower case."""
    return tuple(dict.fromkeys((task.name, *task.files)))


def _entry_of(task: Task, entries: Mapping[str, Sequence[_Entry]], source: str) -> _Entry | None:
    """The only entry of a task; a prepared dataset may be beside the table that it was made from."""
    named = [entry for name in _names(task) for entry in entries.get(name, ())]
    candidates = [entry for entry in named if entry.is_prepared] or named
    if len(candidates) > 1:
        raise ConfigError(
            f"task.source: {source} has {' and '.join(entry.name for entry in candidates)} for task {task.name!r}; "
            "expected one. Move the others away, or name the file with this task alone"
        )
    return candidates[0] if candidates else None


def _holds_molecules(path: str) -> bool:
    name = path.lower()
    return (
        text_format(name) is not None or container_of(name) is not None or name.endswith(_PARQUET)
    )


def _stem(name: str) -> str:
    return re.sub(r"\.[^.]+(\.(gz|bz2|xz|zst))?\Z", "", name.lower())
