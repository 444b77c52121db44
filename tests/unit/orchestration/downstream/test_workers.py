"""A trial that an interrupted sweep had trained is reported again, not trained again; steps of a seed are counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.evaluation.models.finetune import EpochReport
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.orchestration.downstream import workers


class Trials:
    """Stands for Tune and for training: counts epochs trained, and kills the process at a report."""

    def __init__(self) -> None:
        self.trained = 0
        self.reported: list[int] = []
        self.kill_after = 99

    def report(self, values: dict[str, Any]) -> None:
        if len(self.reported) == self.kill_after:
            raise KeyboardInterrupt
        self.reported.append(values["epoch"])

    def finetune_once(self, *_: Any, settings: FinetuneSettings, report: Any, **__: Any) -> None:
        for epoch in range(1, settings.epochs + 1):
            self.trained += 1
            report(
                EpochReport(
                    epoch=epoch,
                    train_loss=1.0,
                    valid_score=0.5,
                    best_valid_score=0.5,
                    best_epoch=1,
                    seconds=1.0,
                )
            )

    def run(self, folder: Path, **drawn: Any) -> None:
        self.trained, self.reported = 0, []
        data: Any = SimpleNamespace(molecules=None, train=None, valid=None, task=None, start=None)
        workers.run_trial(
            drawn,
            data,
            FinetuneSettings(epochs=3),
            0,
            ClusterConfig(),
            str(folder),
        )


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    trials = Trials()
    monkeypatch.setattr(workers, "finetune_once", trials.finetune_once)
    monkeypatch.setattr(workers, "tune", SimpleNamespace(report=trials.report))
    return trials


def test_a_trial_that_was_over_is_reported_again_without_training(
    trials: Trials, tmp_path: Path
) -> None:
    trials.run(tmp_path, batch_size=8)
    assert (trials.trained, trials.reported) == (3, [1, 2, 3])
    trials.run(tmp_path, batch_size=8)
    assert (trials.trained, trials.reported) == (0, [1, 2, 3])
    trials.run(tmp_path, batch_size=16)
    assert (trials.trained, trials.reported) == (3, [1, 2, 3])


def test_a_trial_killed_in_the_middle_reports_each_epoch_once_and_is_trained_to_its_end(
    trials: Trials, tmp_path: Path
) -> None:
    trials.kill_after = 1
    with pytest.raises(KeyboardInterrupt):
        trials.run(tmp_path)
    trials.kill_after = 99
    trials.run(tmp_path)
    assert (trials.trained, trials.reported) == (3, [1, 2, 3])


class Counted:
    """Stands for the reporter: adds up what is counted."""

    def __init__(self) -> None:
        self.messages: list[int] = []

    def count(self, name: str, number: int) -> None:
        assert name == "done"
        self.messages.append(number)


def test_steps_are_told_a_few_times_a_second_and_all_when_a_training_ends_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: now))
    counted: Any = Counted()
    steps = workers.StepCount(counted, 40)
    for _ in range(25):
        now += 0.0625
        steps.add()
    assert counted.messages == [8, 8, 8]
    steps.end()
    assert counted.messages == [8, 8, 8, 16]


def test_a_seed_counts_every_step_of_its_training(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FinetuneSettings(epochs=5, batch_size=4)
    result = object()

    def train(*arguments: Any, after_step: Any) -> object:
        assert arguments[:4] == (experiment, settings, 7, "out")
        for _ in range(6):  # two epochs, after which validation got no better
            after_step()
        return result

    monkeypatch.setattr(workers, "train_and_test", train)
    monkeypatch.setattr(workers, "use_reserved", lambda cluster: None)
    experiment: Any = SimpleNamespace(split=SimpleNamespace(train=range(9)))
    counted: Any = Counted()
    found = workers.train_seed(experiment, settings, 7, "out", ClusterConfig(), counted)
    assert found is result
    assert sum(counted.messages) == 15
