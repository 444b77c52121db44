"""The numbers of a run: one JSON line per step, committed together with the checkpoint that ends them.

``metrics/steps-A-B.jsonl`` of a run holds steps A <= step < B. Such a file is written just before the commit
marker of step B, so after a restart at a committed step every step before it is on file. Steps of a save that failed come
again in the file of the next one, with the same numbers; readers take each step once.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from moleblend_ray.data.files import storage
from moleblend_ray.data.files.ahead import mapped_ahead
from moleblend_ray.errors import DataError

Record = dict[str, float | int]
"""Numbers of one step: name -> value, "step" among them."""

METRICS_DIR: Final = "metrics"
_FILE_NAME: Final = re.compile(r"steps-(\d{8,})-(\d{8,})\.jsonl$")

_FILES_AHEAD: Final = 8
"""Files that are read at the same time, of about 600 kB for a thousand steps."""
_MOST_AVERAGED: Final = 50
"""Steps at each end of a run."""

TOTAL_LOSS: Final = "loss"
"""The optimised, weighted loss in a record; a head's own, unweighted, is ``loss_<head>``."""

VALID_PREFIX: Final = "valid_"


def is_record(value: Any) -> bool:
    """Whether a JSON value is the record of a step: an object of numbers. There are millions, so this is quick."""
    return (
        isinstance(value, dict)
        and type(value.get("step")) is int
        and all(type(number) in (int, float) for number in value.values())
    )


def is_loss(name: str) -> bool:
    """Whether a number of a record is a loss of training, the total or that of a head."""
    return name == TOTAL_LOSS or name.startswith(f"{TOTAL_LOSS}_")


class RecordFile(NamedTuple):
    """One file of records of a run."""

    first: int
    """First step in it."""
    end: int
    """Step after the last one."""
    uri: str
    size: int
    """Bytes."""


def write_records(run_uri: str, records: Sequence[Record], first: int, end: int) -> None:
    """Write the records of steps ``first`` to ``end`` (exclusive) as one file of the run."""
    lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
    storage.write_bytes(
        storage.join(run_uri, METRICS_DIR, f"steps-{first:08d}-{end:08d}.jsonl"), lines.encode()
    )


def read_records(run_uri: str) -> list[Record]:
    """The records of every committed step of a run, in step order; empty if there are none yet.

    They take 2.3 kB each: of a run of unknown length, use :func:`iter_records`.
    """
    return list(iter_records(run_uri))


def iter_records(run_uri: str) -> Iterator[Record]:
    """As :func:`read_records`, but of a few files at a time: runs have millions of steps."""
    files = record_files(run_uri)
    next_step = 0
    contents = mapped_ahead(lambda file: storage.read_bytes(file.uri), files, _FILES_AHEAD)
    for file, content in zip(files, contents, strict=True):
        for record in _parse(file, content):
            if record["step"] >= next_step:
                yield record
        next_step = max(next_step, file.end)


def last_record(run_uri: str, step: int) -> Record:
    """The record of the step before ``step``, which must be committed; empty if that is the beginning of the run."""
    for file in record_files(run_uri):
        if file.first < step <= file.end:
            return next((record for record in _read(file) if record["step"] == step - 1), {})
    return {}


def drop_records_from(run_uri: str, step: int) -> None:
    """Remove what an abandoned attempt wrote for ``step`` and later; call when training starts at ``step``."""
    for file in record_files(run_uri):
        if file.end <= step:
            continue
        if file.first < step:
            kept = [record for record in _read(file) if record["step"] < step]
            write_records(run_uri, kept, file.first, step)
        storage.delete(file.uri)


def _read(file: RecordFile) -> list[Record]:
    return _parse(file, storage.read_bytes(file.uri))


def _parse(file: RecordFile, content: bytes) -> list[Record]:
    try:
        records = [json.loads(line) for line in content.splitlines()]
    except ValueError as error:
        raise _damaged(file, f"a line is not JSON ({error})") from error
    if not all(map(is_record, records)):
        number = next(number for number, one in enumerate(records, 1) if not is_record(one))
        raise _damaged(file, f"line {number} is no record of a step")
    return records


def _damaged(file: RecordFile, problem: str) -> DataError:
    return DataError(
        f"{file.uri} is damaged: {problem}. Restore it, or delete it: nothing but the numbers of its steps is lost"
    )


def record_files(run_uri: str) -> list[RecordFile]:
    """The files of a run by their first step; none before the first checkpoint."""
    try:
        found = storage.list_files(storage.join(run_uri, METRICS_DIR))
    except storage.NotFoundError:
        return []
    matches = ((_FILE_NAME.search(info.uri), info) for info in found)
    return sorted(
        RecordFile(int(match[1]), int(match[2]), info.uri, info.size)
        for match, info in matches
        if match
    )


class Totals(NamedTuple):
    """The records of a run in a few numbers."""

    steps: int
    """Steps that have a record."""
    molecules: int
    """Seen in all steps, repetitions counted."""
    seconds: float
    """Of all steps."""
    loss_first: dict[str, float]
    """Mean losses of the first steps, the total and each head's: of a tenth of the run, at least 1 and at most 50 steps, as
    single steps are noisy."""
    loss_last: dict[str, float]
    """The same of the last steps."""


def sum_up(records: Iterable[Record]) -> Totals:
    """The totals of all records of a run, in one pass that holds few of them."""
    first: list[Record] = []
    last: deque[Record] = deque(maxlen=_MOST_AVERAGED)
    count = molecules = 0
    seconds = 0.0
    for record in records:
        if len(first) < _MOST_AVERAGED:
            first.append(record)
        last.append(record)
        count += 1
        molecules += int(record["molecules"])
        seconds += record["step_s"]
    width = max(1, min(_MOST_AVERAGED, count // 10))
    losses = _mean_losses(first[:width]), _mean_losses([*last][-width:])
    return Totals(count, molecules, seconds, *losses)


def _mean_losses(records: Sequence[Record]) -> dict[str, float]:
    """Mean of each loss over the records that have it: a head without targets in a step is not in its record."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if is_loss(name):
                values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}
