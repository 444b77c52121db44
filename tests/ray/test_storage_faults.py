"""Object storage that fails three requests of ten changes nothing but the time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, ProxyProgram
from in_process import prepare_in_process
from storage_worker import (
    NUM_STEPS,
    ORDER,
    ROW_GROUP_ROWS,
    ROWS_PER_CHUNK,
    STREAM,
    digests,
)

from moleblend_ray.data.batches.builder import local_step_batches
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.sources import ColumnConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WORKER = Path(__file__).resolve().parents[1] / "storage_worker.py"
PROXY_PROGRAM = WORKER.parents[2] / "shared" / "bin" / "fault-proxy"


def write_source(path: Path) -> None:
    rows = [
        f"{'C' * a}{middle}{'C' * b},{a * b}"
        for a in range(1, 7)
        for b in range(1, 7)
        for middle in ("O", "N", "S")
    ]
    path.write_text("\n".join(["smiles,y", *rows, "C1CC,0"]) + "\n")


def failing_proxy() -> FaultProxy | ProxyProgram:
    """The program where there is one: it also cuts connections after the server has done the work."""
    upstream = os.environ["AWS_ENDPOINT_URL"]
    if PROXY_PROGRAM.exists():
        return ProxyProgram(PROXY_PROGRAM, upstream, rate=0.3, seed=7)
    return FaultProxy(upstream, rate=0.3, seed=7)


def test_prepare_and_stream_behind_a_failing_proxy_end_with_identical_output(
    tmp_path: Path, s3_uri: str
) -> None:
    write_source(tmp_path / "table.csv")
    undisturbed = str(tmp_path / "out")
    options = ConvertOptions(
        columns=ColumnConfig(), rows_per_chunk=ROWS_PER_CHUNK, row_group_rows=ROW_GROUP_ROWS
    )
    prepare_in_process(str(tmp_path / "table.csv"), undisturbed, options)
    expected = local_step_batches(undisturbed, ORDER, STREAM, first_step=0, num_steps=NUM_STEPS)
    storage.upload(tmp_path / "table.csv", storage.join(s3_uri, "table.csv"))
    out = storage.join(s3_uri, "out")
    with failing_proxy() as proxy:
        # Without the retries of the S3 client, all are ours.
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url, "AWS_MAX_ATTEMPTS": "1"}
        worker = subprocess.run(
            [sys.executable, str(WORKER), storage.join(s3_uri, "table.csv"), out],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert worker.returncode == 0, worker.stderr[-4000:]
    assert proxy.faults >= 10
    assert proxy.cuts
    assert json.loads(worker.stdout.splitlines()[-1]) == digests(list(expected))
    for file in storage.list_files(undisturbed):
        name = file.uri.removeprefix(undisturbed)
        if name.startswith(("/train", "/valid", "/quarantine")):
            content = storage.read_bytes(out + name)
            if not name.startswith("/quarantine"):  # it names the source's URI
                assert content == storage.read_bytes(file.uri), name
