"""A live head answers what dashboard and alerts ask, while a pretraining runs; and its workers log JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import yaml
from synthetic import write_dataset

from moleblend_ray.chemistry.rejection import RejectionCode
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME
from moleblend_ray.data.dataset.manifest import fingerprint, load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.orchestration.preparation.prepare import prepare
from moleblend_ray.orchestration.pretraining.pretrain import pretrain
from moleblend_ray.orchestration.progress.metrics import METRICS, PREFIX
from moleblend_ray.training.config import (
    CheckpointConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)

COMPONENT = Path(__file__).parents[2] / "infra" / "kuberay" / "components" / "monitoring"
GPU_METRICS = {"ray_node_gpus_utilization", "ray_node_gram_used"}
PATIENCE_S = 240.0
"""Ray's processes report every 10 s; the rest is for a machine that is busy."""


def asked_metrics() -> set[str]:
    """Whatever the dashboard and the alerts ask for, on a machine without GPUs."""
    dashboard = json.loads((COMPONENT / "moleblend.json").read_text())
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    rules = yaml.safe_load((COMPONENT / "rules.yaml").read_text())["spec"]["groups"]
    queries += [rule["expr"] for group in rules for rule in group["rules"]]
    found = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    return {name for name in found if not name.startswith("ray_io_")} - GPU_METRICS


class Page:
    """What a node shows to Prometheus: the newest value of every series that was seen."""

    def __init__(self) -> None:
        node = ray.nodes()[0]  # type: ignore[no-untyped-call]
        self._url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        self._series: dict[str, float] = {}

    def look(self) -> None:
        """Take the values of now."""
        with urllib.request.urlopen(self._url, timeout=30) as answer:
            text = answer.read().decode()
        self._series |= {
            series: float(value)
            for series, value in re.findall(r"^(ray_\w+\{.*\}) (\S+)$", text, re.M)
        }

    def names(self) -> set[str]:
        """Of all metrics."""
        return {series.partition("{")[0] for series in self._series}

    def of(self, name: str, **labels: str) -> list[float]:
        """Values of the series of ``name`` with these labels."""
        return [
            value
            for series, value in self._series.items()
            if series.startswith(f"{PREFIX}{name}{{")
            and all(f'{label}="{text}"' in series for label, text in labels.items())
        ]

    def one(self, name: str, **labels: str) -> float:
        """The value of the only one."""
        found = self.of(name, **labels)
        assert len(found) == 1, f"{name} {labels}: {found}"
        return found[0]


def watch(page: Page, expected: set[str], then: Callable[[], None]) -> threading.Thread:
    """Look until everything expected was seen, of both ranks, or patience ends; then do ``then``."""

    def is_missing() -> bool:
        ranks = [page.of("moleblend_train_peak_memory_bytes", rank=rank) for rank in ("0", "1")]
        return bool(expected - page.names()) or not all(ranks)

    def look() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and is_missing():
            time.sleep(1.0)
            # A machine that is busy may not answer this time.
            with contextlib.suppress(OSError):
                page.look()
        then()

    thread = threading.Thread(target=look)
    thread.start()
    return thread


def settings(data: str, out: str) -> PretrainConfig:
    return PretrainConfig(
        data=data,
        out=out,
        order=OrderConfig(global_batch_size=16, num_streams=2, shuffle_window=64, chunk_rows=32),
        stream=StreamConfig(micro_batch_size=8, steps_per_block=4),
        model=ModelConfig(num_layers=2, dim=32, ffn_dim=32, num_heads=4, num_kernels=8, pair_dim=4),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=5),
        # Longer than anybody waits: the test stops it.
        train=TrainConfig(num_steps=100_000, validate_every=10, validation_molecules=20),
        checkpoint=CheckpointConfig(every_steps=4),
        tracking=TrackingConfig(mode="disabled"),
        cluster=ClusterConfig(num_workers=2),
    )


def prepared(folder: Path) -> str:
    """300 random molecules, the last 60 of them the valid split."""
    uri = str(folder / "data")
    write_dataset(uri, 300, shard_rows=60, row_group_rows=32, max_conformers=2)
    manifest = load_manifest(uri)
    shards = (*manifest.shards[:-1], replace(manifest.shards[-1], split="valid"))
    manifest = replace(manifest, shards=shards, fingerprint=fingerprint(1, {}, (), shards))
    storage.write_json(storage.join(uri, MANIFEST_NAME), manifest.to_json())
    return uri


@pytest.fixture(scope="module")
def page(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page in the middle of a pretraining, after a preparation in the same process."""
    folder = tmp_path_factory.mktemp("metrics")
    rows = "".join(f"{'C' * (1 + number % 9)}O\n" for number in range(40))
    (folder / "mols.csv").write_text(f"smiles\n{rows}no molecule\n")
    seen, wanted = Page(), asked_metrics() | {PREFIX + name for name in METRICS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLEBLEND_LOG_FORMAT", "json")
        prepare(
            PrepareConfig(source=str(folder / "mols.csv"), out=str(folder / "runs" / "prepared"))
        )
        stop = watch(seen, wanted, lambda: os.kill(os.getpid(), signal.SIGTERM))
        summary = pretrain(settings(prepared(folder), str(folder / "runs" / "watched")))
        stop.join()
    assert not summary.finished
    assert summary.steps > 0
    return seen


@pytest.mark.ray
@pytest.mark.slow
def test_everything_that_dashboard_and_alerts_ask_for_is_on_the_page(page: Page) -> None:
    assert asked_metrics() - page.names() == set()
    assert {PREFIX + name for name in METRICS} - page.names() == set()


@pytest.mark.ray
@pytest.mark.slow
def test_the_numbers_of_a_run_make_sense(page: Page) -> None:
    run = {"run": "runs/watched"}
    step = page.one("moleblend_train_step", **run)
    assert 0 < page.one("moleblend_checkpoint_step", **run) <= step <= 100_000
    assert page.one("moleblend_train_target_steps", **run) == 100_000
    assert page.one("moleblend_train_workers", **run) == 2
    assert page.one("moleblend_checkpoint_interval_steps", **run) == 4
    steps = page.one("moleblend_train_steps_total", **run)
    molecules = page.one("moleblend_train_molecules_total", **run)
    assert molecules == pytest.approx(16 * steps, rel=0.2)
    atoms = page.one("moleblend_train_atoms_total", **run)
    assert 1 < atoms / molecules < 100
    assert 0 <= 1 - atoms / page.one("moleblend_train_atom_slots_total", **run) < 1
    assert 0 < page.one("moleblend_train_mfu_ratio", **run) < 2
    for rank in ("0", "1"):
        seconds = page.one("moleblend_train_step_seconds_total", rank=rank, **run)
        waited = page.one("moleblend_train_data_wait_seconds_total", rank=rank, **run)
        assert 0 <= waited <= seconds < PATIENCE_S
        assert page.one("moleblend_train_peak_memory_bytes", rank=rank, **run) > 10 << 20
    for name in ("moleblend_train_loss", "moleblend_train_validation_loss"):
        for head in ("total", "spd", "edge", "direction", "denoise"):
            assert 0 < page.one(name, head=head, **run) < math.inf
    now = time.time()
    for name in (
        "moleblend_checkpoint_timestamp_seconds",
        "moleblend_job_progress_timestamp_seconds",
        "moleblend_job_start_timestamp_seconds",
    ):
        assert now - 2 * PATIENCE_S < page.one(name, **run) <= now
    assert page.one("moleblend_train_worker_group_starts_total", **run) == 1
    assert page.one("moleblend_train_recoveries_total", **run) == 0
    assert page.one("moleblend_checkpoint_failures_total", **run) == 0
    assert page.one("moleblend_stream_actors", **run) >= 1
    built = page.one("moleblend_stream_blocks_total", **run)
    assert built >= page.one("moleblend_stream_taken_blocks_total", **run) > 0


@pytest.mark.ray
@pytest.mark.slow
def test_rows_and_quarantine_of_prepare_are_counted(page: Page) -> None:
    assert page.one("moleblend_prepare_rows_total", run="runs/prepared") == 41
    quarantined = "moleblend_prepare_quarantined_rows_total"
    assert sum(page.of(quarantined, run="runs/prepared")) == 1
    # rate() needs the 0 before the first of a kind.
    assert page.one(quarantined, run="runs/prepared", reason=RejectionCode.TOO_MANY_ATOMS) == 0


@pytest.mark.ray
@pytest.mark.slow
def test_workers_write_json_lines_among_the_logs_of_the_session(page: Page) -> None:
    node = ray._private.worker.global_worker.node
    assert node is not None
    logs = Path(node.get_logs_dir_path())
    lines = [
        json.loads(line)
        for path in logs.glob("moleblend-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    commits = [
        line
        for line in lines
        if line["message"].startswith("committed step") and line.get("run") == "runs/watched"
    ]
    assert commits
    assert {line["rank"] for line in commits} == {0}
    assert all(line["step"] >= int(line["message"].split()[2].rstrip(":")) for line in commits)
