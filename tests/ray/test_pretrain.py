"""Pretraining through Ray Train: a killed worker, a stop and a damaged checkpoint change nothing about the result."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nodes import title
from synthetic import write_dataset

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.batches.order import DataOrder
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME
from moleblend_ray.data.dataset.manifest import fingerprint, load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError, DataError, TrainingError
from moleblend_ray.model.config import LossConfig, ModelConfig
from moleblend_ray.orchestration.pretraining import pretrain as pretrain_module
from moleblend_ray.orchestration.pretraining import pretrain_worker
from moleblend_ray.orchestration.pretraining.pretrain import (
    WorkersLostError,
    _train_until_done,
    pretrain,
)
from moleblend_ray.orchestration.pretraining.pretrain_group import WorkerOutcome, WorkerSettings
from moleblend_ray.orchestration.pretraining.pretrain_worker import _start_tracker
from moleblend_ray.orchestration.pretraining.run_folder import (
    PretrainSummary,
    open_run,
    run_identity,
)
from moleblend_ray.training.commits import committed_steps, step_uri
from moleblend_ray.training.config import (
    CheckpointConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)
from moleblend_ray.training.export import load_model
from moleblend_ray.training.metrics import Record, read_records
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.tracking import NoTracker, TrackerError

NUM_STEPS = 24
HEADS = ("spd", "edge", "direction", "denoise", "descriptor")
FAR_MOLECULE = 45
"""So far apart that distances overflow: not what `prepare` lets through, but what may be in a damaged world."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 random molecules, the last 60 of them the valid split; steps with one of the others are not finite."""
    uri = str(tmp_path_factory.mktemp("data"))
    write_dataset(
        uri,
        300,
        shard_rows=60,
        row_group_rows=32,
        max_conformers=2,
        far_molecule=FAR_MOLECULE,
        described=True,
    )
    manifest = load_manifest(uri)
    shards = (*manifest.shards[:-1], replace(manifest.shards[-1], split="valid"))
    identity = fingerprint(1, {}, (), shards, descriptors=manifest.descriptors)
    manifest = replace(manifest, shards=shards, fingerprint=identity)
    storage.write_json(storage.join(uri, MANIFEST_NAME), manifest.to_json())
    return uri


def settings(data: str, out: str, num_workers: int = 2) -> PretrainConfig:
    return PretrainConfig(
        data=data,
        out=out,
        seed=5,
        order=OrderConfig(global_batch_size=16, num_streams=4, shuffle_window=64, chunk_rows=32),
        stream=StreamConfig(micro_batch_size=4, steps_per_block=4),
        model=ModelConfig(
            num_layers=2,
            dim=32,
            ffn_dim=32,
            num_heads=4,
            num_kernels=8,
            pair_dim=4,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            drop_path=0.0,
            descriptor_head=True,
        ),
        loss=LossConfig(descriptor_weight=1.0),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=5),
        train=TrainConfig(
            num_steps=NUM_STEPS,
            validate_every=10,
            validation_molecules=50,
            max_failures=2,
            on_non_finite="skip",
        ),
        checkpoint=CheckpointConfig(every_steps=4),
        tracking=TrackingConfig(mode="disabled"),
        cluster=ClusterConfig(num_workers=num_workers),
    )


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, data: str, tmp_path_factory: pytest.TempPathFactory
) -> list[Record]:
    """The records of the same run on two workers, to its end in one go."""
    run = str(tmp_path_factory.mktemp("undisturbed") / "run")
    pretrain(settings(data, run))
    return read_records(run)


def assert_same_steps(found: list[Record], expected: list[Record]) -> None:
    """The same molecules at each step, and the same losses; other data or a lost moment give 1e-2."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    losses = ("loss", *(f"loss_{head}" for head in HEADS))
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("molecules_checksum", "skipped_steps"):
            assert ours[name] == theirs[name]
        for name in losses:
            # A skipped step lacks what was not finite.
            assert (name in ours) == (name in theirs), (ours["step"], name)
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=1e-5), (ours["step"], name)


def when_committed(run: str, step: int, action: Any) -> threading.Thread:
    """Do ``action`` once the checkpoint of ``step`` is committed."""

    def watch() -> None:
        marker = Path(step_uri(run, step)) / "COMMIT.json"
        deadline = time.monotonic() + 120
        while not marker.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def train_workers() -> list[Any]:
    """The processes of the current worker group, among the descendants of this process."""
    import psutil  # Ray brings its own copy

    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "TrainWorker" in title(process)
    ]


def steps_to_skip(data: str) -> list[int]:
    order = DataOrder(load_manifest(data).num_molecules("train"), settings(data, "unused").order)
    return [step for step in range(NUM_STEPS) if FAR_MOLECULE in order.global_batch(step)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_changes_no_step_and_no_count_of_skipped_ones(
    data: str, tmp_path: Path, undisturbed: list[Record]
) -> None:
    run = str(tmp_path / "run")
    killed: list[int] = []
    # One before the kill, whose count must come from the records, and one after it.
    first, second = bad = steps_to_skip(data)
    assert first < 4 < 12 < second

    def kill_one() -> None:
        victim = train_workers()[-1]
        victim.send_signal(signal.SIGKILL)
        killed.append(victim.pid)

    watcher = when_committed(run, 4, kill_one)
    summary = pretrain(settings(data, run))
    watcher.join()
    assert len(killed) == 1
    assert summary.finished
    assert (summary.steps, summary.world_size) == (NUM_STEPS, 2)
    assert summary.molecules == NUM_STEPS * 16
    records = read_records(run)
    assert_same_steps(records, undisturbed)
    expected = list(np.cumsum([step in bad for step in range(NUM_STEPS)]))
    assert [record["skipped_steps"] for record in records] == expected
    for step in bad:
        anomaly = storage.read_json(f"{run}/anomalies/step-{step:08d}-non_finite.json")
        assert any(FAR_MOLECULE in micro["molecule_ids"] for micro in anomaly["micro_batches"])
    assert [r["step"] for r in records if "valid_loss" in r] == [9, 19, 23]
    assert len(committed_steps(run)) == 3
    assert load_model(run).config == settings(data, run).model

    again = pretrain(settings(data, run))
    assert again == summary


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_interrupts_the_caller_as_before_the_run(
    data: str, tmp_path: Path, ray_cluster: None
) -> None:
    run, handler = str(tmp_path / "run"), signal.getsignal(signal.SIGINT)
    watcher = when_committed(run, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(data, run))
    watcher.join()
    assert committed_steps(run)
    deadline = time.monotonic() + 30  # The cluster goes on.
    while train_workers():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_of_four_workers_stopped_damaged_and_continued_by_one_takes_the_steps_of_two(
    data: str,
    tmp_path: Path,
    undisturbed: list[Record],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = str(tmp_path / "run")
    watcher = when_committed(run, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = pretrain(settings(data, run, num_workers=4))
    watcher.join()
    assert not stopped.finished
    assert 8 <= stopped.steps < NUM_STEPS
    assert committed_steps(run)[0] == stopped.steps
    assert stopped.export is None

    newest = next(Path(step_uri(run, stopped.steps)).glob("*.distcp"))
    newest.write_bytes(newest.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        finished = pretrain(settings(data, run, num_workers=1))
    assert "skipped a damaged checkpoint" in caplog.text
    assert newest.name in caplog.text
    assert finished.finished
    assert 4 <= finished.resumed_from < stopped.steps
    assert_same_steps(read_records(run), undisturbed)


class Fits:
    """What trainers, one after the other, come to: newest step before, and an outcome or an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, story: list[tuple[int, Any]]) -> None:
        self.count = 0
        self.newest = 0
        coming = iter(story)

        def fit(_: Any) -> Any:
            self.count += 1
            self.newest, result = next(coming)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(pretrain_module, "_fit", fit)
        monkeypatch.setattr(pretrain_module, "_new_trainer", lambda *_: None)
        monkeypatch.setattr(pretrain_module, "_newest_step", lambda _: self.newest)


class NoFlag:
    """A flag in the driver that SIGTERM has set or not."""

    def __init__(self, *, is_terminated: bool = False) -> None:
        self.is_terminated = threading.Event()
        if is_terminated:
            self.is_terminated.set()

    def ask(self, reason: str) -> None:
        assert reason == ""


class NoReporter:
    """Where nobody looks at the progress."""

    def count(self, name: str) -> None:
        assert name == "planned_restarts"


def outcome(step: int, stopped_by: Any = "") -> WorkerOutcome:
    return WorkerOutcome(step=step, world_size=2, stopped_by=stopped_by)


def test_lost_workers_end_a_run_only_if_it_gets_nowhere(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = replace(worker_settings(data, "run"), stop_flag=NoFlag())  # type: ignore[arg-type]
    lost = WorkersLostError("lost.")
    fits = Fits(monkeypatch, [(4, lost), (8, lost), (24, outcome(24))])
    assert _train_until_done(watched, "notes").step == 24
    assert fits.count == 3
    fits = Fits(monkeypatch, [(4, lost), (4, lost)])
    with pytest.raises(WorkersLostError):
        _train_until_done(watched, "notes")
    assert fits.count == 2


def test_workers_that_left_for_other_nodes_start_anew_and_others_do_not(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = replace(worker_settings(data, "run"), stop_flag=NoFlag())  # type: ignore[arg-type]
    fits = Fits(
        monkeypatch,
        [(5, outcome(5, "drain")), (9, outcome(9, "resize")), (11, outcome(11, "sigterm"))],
    )
    assert _train_until_done(watched, "notes").stopped_by == "sigterm"
    assert fits.count == 3


@pytest.mark.parametrize(
    "result", [outcome(5, "drain"), outcome(5, "resize"), TrainingError("no room")]
)
def test_sigterm_ends_a_run_between_two_groups_as_well(
    data: str, monkeypatch: pytest.MonkeyPatch, result: Any
) -> None:
    flag: Any = NoFlag(is_terminated=True)
    fits = Fits(monkeypatch, [(5, result)])
    stopped = _train_until_done(replace(worker_settings(data, "run"), stop_flag=flag), "notes")
    assert (stopped.step, stopped.stopped_by) == (5, "sigterm")
    assert fits.count == 1


def test_looks_come_less_often_while_room_comes_and_goes(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag: Any = NoFlag()
    Fits(monkeypatch, [(5, outcome(5, "resize"))] * 6 + [(24, outcome(24))])
    intervals: list[float] = []
    monkeypatch.setattr(
        pretrain_module, "_new_trainer", lambda *arguments: intervals.append(arguments[-1])
    )
    _train_until_done(replace(worker_settings(data, "run"), stop_flag=flag), "notes")
    assert intervals == [60.0 * factor for factor in (1, 2, 4, 8, 16, 16, 16)]


def write_marker(run: Path, identity: dict[str, Any]) -> None:
    """A committed checkpoint of step 2 without files."""
    marker = {
        "format": 1,
        "step": 2,
        "world_size": 1,
        "files": [],
        "identity": identity,
        "config_fingerprint": "",
        "versions": {},
        "created": "2026-01-01T00:00:00+00:00",
    }
    storage.write_json(str(run / "checkpoints" / "step-00000002" / "COMMIT.json"), marker)


def test_a_run_is_not_continued_as_another_one(data: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_marker(
        run,
        {
            "data_fingerprint": "another",
            "featurizer_version": 0,
            "order": {"global_batch_size": 512},
        },
    )
    with pytest.raises(CheckpointError) as caught:
        pretrain(settings(data, str(run)))
    for part in (
        "data_fingerprint",
        "'another'",
        "order.global_batch_size",
        "512",
        "16",
        "featurizer_version: the run has 0, ",
    ):
        assert part in str(caught.value)


def finished_summary(data: str) -> PretrainSummary:
    return PretrainSummary(
        out="where it was before",
        finished=True,
        steps=NUM_STEPS,
        resumed_from=0,
        world_size=2,
        molecules=1,
        loss_first={},
        loss_last={},
        molecules_per_s=1.0,
        seconds=1.0,
        data_fingerprint=load_manifest(data).fingerprint,
        export="export",
    )


def test_a_finished_run_is_reported_only_under_its_own_settings(data: str, tmp_path: Path) -> None:
    config = settings(data, str(tmp_path))
    # As an earlier version wrote it: without the settings of the run.
    storage.write_json(str(tmp_path / "FINISHED.json"), asdict(finished_summary(data)))
    damaged = tmp_path / "checkpoints/step-00000099/COMMIT.json"
    storage.write_bytes(str(damaged), b'{"format"')
    write_marker(tmp_path, run_identity(config, load_manifest(data)))
    assert pretrain(config).out == str(tmp_path)
    longer = replace(config.train, num_steps=2 * NUM_STEPS)
    for train in (config.train, longer):
        with pytest.raises(CheckpointError, match="seed: the run has 5, the configuration asks"):
            pretrain(replace(config, seed=6, train=train))
        assert (tmp_path / "FINISHED.json").is_file()


def test_a_finished_run_without_checkpoints_is_neither_another_one_nor_begun_anew(
    data: str, tmp_path: Path
) -> None:
    config = settings(data, str(tmp_path))
    storage.write_json(
        str(tmp_path / "FINISHED.json"),
        {
            **asdict(finished_summary(data)),
            "identity": run_identity(config, load_manifest(data)),
        },
    )
    storage.write_bytes(str(tmp_path / "metrics/steps-00000000-00000008.jsonl"), b"{}\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert pretrain(config).steps == NUM_STEPS
    longer = replace(config, train=replace(config.train, num_steps=2 * NUM_STEPS))
    with pytest.raises(CheckpointError, match=r"finished .* has no checkpoints any more"):
        pretrain(longer)
    with pytest.raises(CheckpointError, match="seed: the run has 5, the configuration asks for 6"):
        pretrain(replace(config, seed=6))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


SECRET = "s3://key:hunter2@bucket/folder?X-Amz-Signature=hunter2"


def test_the_configuration_in_the_run_s_folder_has_no_secrets(data: str, tmp_path: Path) -> None:
    config = replace(settings(data, str(tmp_path)), tracking=TrackingConfig(dir=SECRET))
    open_run(config, load_manifest(data))
    text = (tmp_path / "config.json").read_text()
    assert "bucket/folder" in text
    assert "hunter2" not in text


def worker_settings(data: str, out: str) -> WorkerSettings:
    return WorkerSettings(
        config=settings(data, out),
        manifest=load_manifest(data),
        start_step=0,
        began=0.0,
        reporter=NoReporter(),  # type: ignore[arg-type]
        stop_flag=None,  # type: ignore[arg-type]
    )


def test_the_tracker_gets_no_secrets(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def take(*arguments: object) -> NoTracker:
        given.append(str(arguments))
        return NoTracker()

    monkeypatch.setattr(pretrain_worker, "start_tracker", take)
    _start_tracker(worker_settings(data, SECRET), Ranks(), is_new_try=False)
    assert "bucket/folder" in given[0]
    assert "hunter2" not in given[0]


def test_a_tracker_that_does_not_start_ends_a_new_command_but_no_new_try(
    data: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> NoTracker:
        raise TrackerError("no key")

    monkeypatch.setattr(pretrain_worker, "start_tracker", refuse)
    with pytest.raises(ConfigError, match="no key"):
        _start_tracker(worker_settings(data, "run"), Ranks(), is_new_try=False)
    _start_tracker(worker_settings(data, "run"), Ranks(), is_new_try=True)
    assert "no key. Training goes on without" in caplog.text


def test_data_without_training_molecules_are_refused_before_anything_starts(
    data: str, tmp_path: Path
) -> None:
    manifest = load_manifest(data)
    shards = manifest.shards_of("valid")
    identity = fingerprint(1, {}, (), shards, descriptors=manifest.descriptors)
    empty = replace(manifest, shards=shards, fingerprint=identity)
    storage.write_json(str(tmp_path / "data" / MANIFEST_NAME), empty.to_json())
    with pytest.raises(DataError, match="train split is empty"):
        pretrain(settings(str(tmp_path / "data"), str(tmp_path / "run")))
