"""Who watches a run hears of every step and of how every save ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy

from moleblend_ray.data.files import storage
from moleblend_ray.errors import StorageError
from moleblend_ray.training import saving
from moleblend_ray.training.commits import CommittedFile
from moleblend_ray.training.config import CheckpointConfig
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.metrics import Record
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.saving import CheckpointWriter, Save


def test_every_step_is_told_whatever_the_interval_of_reports(tmp_path: Path) -> None:
    steps: list[Record] = []
    reports: list[Record] = []
    learner = toy.learner(num_steps=6, log_every=4)
    fit(learner, toy.steps(), hooks=Hooks(on_step=steps.append, report=reports.append))
    assert [record["step"] for record in steps] == list(range(6))
    assert [record["step"] for record in reports] == [3, 5]
    assert all(record["step_s"] >= record["data_wait_s"] >= 0 for record in steps)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_saves_are_told_with_their_size_and_time_or_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    place = saving._place_file

    def maybe(path: Path, folder: str) -> CommittedFile:
        if folder.endswith("step-00000004"):
            raise StorageError("the bucket is full")
        return place(path, folder)

    monkeypatch.setattr(saving, "_place_file", maybe)
    saves: list[Save] = []
    writer = CheckpointWriter(
        CheckpointConfig(every_steps=2, asynchronous=asynchronous),
        str(tmp_path),
        Ranks(),
        identity={"data_fingerprint": "toy"},
        config_fingerprint="f",
        start_step=0,
        on_save=saves.append,
    )
    fit(toy.learner(num_steps=6), toy.steps(), checkpoints=writer)
    assert [(save.step, save.is_committed) for save in saves] == [
        (2, True),
        (4, False),
        (6, True),
    ]
    files = storage.list_files(str(tmp_path / "checkpoints" / "step-00000006"))
    written = sum(file.size for file in files if not file.uri.endswith("COMMIT.json"))
    assert 0 < written <= saves[2].num_bytes
    assert 0 < saves[2].waited_s <= saves[2].seconds
