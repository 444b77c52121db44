"""Object store to trainer: shards in S3 -> Ray Data actors -> a trainer's loop without a model.

    python benchmarks/stream.py [--molecules 1500000] [--growth] [--consumer-pause-ms 0]

The consumer does what a training worker does before the model: it takes its steps from the stream, checks their order,
and unpacks every micro-batch into padded tensors with the trainer's own prefetch. The molecules are those of the
PCQM4Mv2 sample beside the project, else 500 sample molecules made here, taken in turn, in shards as a shuffle writes
them; every row group is read from the store and decoded. The S3 server is the object store beside the project, else
moto; its processes run on the same cores and are counted. Timing begins with the first step, by which less than 2 % of the
molecules are built.

`--growth` streams from data sets of 10^4, 10^5 and 10^6 molecules, which take turns; its times are the best of five rounds, as machines have slow moments. A
small collection would be decoded once and then come from the cache: here the shuffle window is two row groups, a block two
windows, and the cache holds one row group, so that each is fetched and decoded once an epoch at any size and only what
grows with the collection can differ. One JSON line comes last.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import dataclasses
import json
import logging
import resource
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from relations import default_source, grow, prepared

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.dataset.node_cache import remove_unused
from moleblend_ray.model.config import BlendConfig, LossConfig
from moleblend_ray.orchestration.cluster.session import ray_session
from moleblend_ray.orchestration.progress.progress import Progress
from moleblend_ray.orchestration.streaming.stream import (
    object_store_budget,
    shard_step_batches,
    stream_data_config,
    stream_dataset,
)
from moleblend_ray.training.prefetch import DevicePrefetch, prepare_step

OBJECT_STORE = Path(__file__).resolve().parents[2] / "shared" / "bin" / "object-store"
GROWTH = (10_000, 100_000, 1_000_000)
GROWTH_ROUNDS = 5
GROWTH_WINDOW = 4096
STORE_SAMPLE_S = 0.25
PROCESSES_SAMPLE_S = 2.0


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("moleblend_ray").setLevel(logging.INFO)
    torch.set_num_threads(1)
    sizes = GROWTH if arguments.growth else (arguments.dataset,)
    cluster = ClusterConfig(
        num_workers=1, local_cpus=arguments.cpus, object_store_gib=arguments.store_gib
    )
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder) / "store") as server:
        uris = upload(arguments.source or default_source(folder), folder, sizes)
        with ray_session(cluster), Progress("stream", unit="step", total=None) as progress:
            rounds = [
                [measure(uri, arguments, progress.reporter) for uri in uris]
                for _ in range(GROWTH_ROUNDS if arguments.growth else 1)
            ]
    line: dict[str, Any] = {"benchmark": "stream", "server": server, **rounds[-1][-1]}
    if arguments.growth:
        line |= growth(rounds)
    print(json.dumps(line))


def growth(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The best of the rounds for each size, and how far their times lie apart."""
    rows = [
        {
            "dataset": runs[0]["dataset"],
            "us_per_molecule": min(run["us_per_molecule"] for run in runs),
            "driver_rss_mib": max(run["driver_rss_mib"] for run in runs),
        }
        for runs in zip(*rounds, strict=True)
    ]
    times = [row["us_per_molecule"] for row in rows]
    return {"growth": rows, "growth_spread": round(max(times) / min(times) - 1, 3)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--molecules", type=int, default=1_500_000, help="presentations streamed")
    parser.add_argument("--dataset", type=int, default=1_000_000, help="molecules of the data set")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--global-batch-size", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=64)
    parser.add_argument("--max-actors", type=int, help="none: as measured rates say")
    parser.add_argument("--min-actors", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=3, help="logical CPUs; the trainer takes one")
    parser.add_argument("--store-gib", type=float, default=1.0, help="Ray's object store")
    parser.add_argument("--budget-gib", type=float, help="stream.object_store_gib")
    parser.add_argument("--consumer-pause-ms", type=float, default=0.0, help="a step's computation")
    parser.add_argument("--source", help="SDF, CSV or Parquet file to take molecules from")
    return parser.parse_args()


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """An S3 server whose address and keys are in the environment; says which."""
    if OBJECT_STORE.exists():
        started = subprocess.run(
            [str(OBJECT_STORE), "start", str(folder)], capture_output=True, text=True, check=False
        )
        if started.returncode == 0:
            for line in started.stdout.splitlines():
                name, _, value = line.removeprefix("export ").rstrip(";").partition("=")
                os.environ[name] = value.strip("'\"")
            try:
                yield "object-store"
            finally:
                subprocess.run(
                    [str(OBJECT_STORE), "stop", str(folder)], capture_output=True, check=False
                )
            return
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    address = next(line.split()[-1] for line in server.stderr if "Running on" in line)
    threading.Thread(target=server.stderr.read, daemon=True).start()
    os.environ.update(
        AWS_ENDPOINT_URL=address,
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_DEFAULT_REGION="us-east-1",
    )
    try:
        yield "moto"
    finally:
        server.terminate()
        server.wait()


def upload(source: str, folder: str, sizes: tuple[int, ...]) -> list[str]:
    """Data sets of these sizes in S3, with the molecules of the source in turn."""
    import s3fs

    sample = os.path.join(folder, "sample")
    prepared(source, sample)
    bucket = f"stream-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem().mkdir(bucket)
    uris = [f"s3://{bucket}/{size}" for size in sizes]
    for uri, size in zip(uris, sizes, strict=True):
        grow(uri, sample, size)
    return uris


def settings(arguments: argparse.Namespace) -> tuple[OrderConfig, StreamConfig]:
    """Order and stream of the runs: the defaults, but for what the command line and ``--growth`` say."""
    order = OrderConfig(global_batch_size=arguments.global_batch_size, num_streams=4)
    stream = StreamConfig(
        micro_batch_size=arguments.micro_batch_size,
        min_actors=arguments.min_actors,
        max_actors=arguments.max_actors,
        object_store_gib=arguments.budget_gib,
    )
    if arguments.growth:
        order = dataclasses.replace(order, num_streams=1, shuffle_window=GROWTH_WINDOW)
        block_steps = 2 * GROWTH_WINDOW // order.global_batch_size
        stream = dataclasses.replace(stream, steps_per_block=block_steps, cache_bytes=1 << 20)
    return order, stream


def measure(uri: str, arguments: argparse.Namespace, reporter: Any) -> dict[str, Any]:
    """One stream from its start to its end, read by one consumer."""
    order, stream = settings(arguments)
    # Whole blocks, of at most 64 steps: a stream that is left before its end would be closed some time after Ray is.
    steps = -(-arguments.molecules // (order.global_batch_size * 64)) * 64
    started = time.perf_counter()
    dataset = stream_dataset(uri, order, stream, 0, steps, reserved_cpus=1.0, reporter=reporter)
    dataset.context.execution_options = stream_data_config(stream)._resolve_execution_options(
        "train"
    )
    (shard,) = dataset.streaming_split(1, equal=True)
    batches = shard_step_batches(shard, order, stream, rank=0, world_size=1)
    with Watch() as watch:
        result = consume(batches, arguments.consumer_pause_ms / 1000, started, watch)
    remove_unused()
    molecules = result.molecules
    rate = molecules / result.seconds
    return {
        "source": Path(arguments.source).name if arguments.source else "default",
        "dataset": load_manifest(uri).num_molecules("train"),
        "molecules": molecules,
        "molecules_per_s": round(rate),
        "us_per_molecule": round(1e6 / rate, 2),
        "bytes_per_molecule": round(result.num_bytes / molecules),
        "first_step_s": round(result.first_step_s, 2),
        "data_wait_share": round(result.wait_s / result.seconds, 3),
        "object_store_budget_mib": object_store_budget(stream) >> 20,
        "object_store_peak_mib": watch.peak_bytes >> 20,
        "spilled_bytes": watch.spilled_bytes,
        "data_actors": watch.most_actors,
        "driver_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "cpu_us_per_molecule": {
            name: round(1e6 * seconds / molecules, 2)
            for name, seconds in sorted(watch.cpu_s.items())
            if 1e6 * seconds / molecules >= 0.05
        },
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }


@dataclass(frozen=True, kw_only=True)
class Consumed:
    """What a consumer saw after its first step."""

    molecules: int
    num_bytes: int
    seconds: float
    wait_s: float
    first_step_s: float


def consume(batches: Iterator[StepBatch], pause_s: float, started: float, watch: Watch) -> Consumed:
    molecules = num_bytes = 0
    wait_s = 0.0
    cpu = torch.device("cpu")
    prepare = partial(prepare_step, device=cpu, blend=BlendConfig(), loss=LossConfig(), seed=0)
    with DevicePrefetch(batches, prepare, cpu, 2) as steps:
        next(steps)
        begun = time.perf_counter()
        watch.begin()
        while True:
            asked = time.perf_counter()
            step = next(steps, None)
            wait_s += time.perf_counter() - asked
            if step is None:
                break
            molecules += sum(map(len, step.batch.micro_batches))
            num_bytes += sum(len(micro.payload) for micro in step.batch.micro_batches)
            time.sleep(pause_s)
        watch.end()
        return Consumed(
            molecules=molecules,
            num_bytes=num_bytes,
            seconds=time.perf_counter() - begun,
            wait_s=wait_s,
            first_step_s=begun - started,
        )


class Watch:
    """Looks at the object store and the processes of this machine from a thread."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.spilled_bytes = 0
        self.most_actors = 0
        self.cpu_s: dict[str, float] = {}
        self._spilled_before = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._spilled_before = store_statistics().spilled_bytes_total
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def begin(self) -> None:
        self._cpu_before = cpu_seconds()

    def end(self) -> None:
        for key, (kind, seconds) in cpu_seconds().items():
            before = self._cpu_before.get(key, (kind, 0.0))[1]
            self.cpu_s[kind] = self.cpu_s.get(kind, 0.0) + seconds - before

    def _run(self) -> None:
        looked = 0.0
        while not self._over.wait(STORE_SAMPLE_S):
            found = store_statistics()
            self.peak_bytes = max(self.peak_bytes, found.object_store_bytes_used)
            self.spilled_bytes = found.spilled_bytes_total - self._spilled_before
            if time.monotonic() - looked >= PROCESSES_SAMPLE_S:  # costs milliseconds
                looked = time.monotonic()
                actors = sum(kind == "data actors" for kind, _ in cpu_seconds().values())
                self.most_actors = max(self.most_actors, actors)


def store_statistics() -> Any:
    """Ray's own numbers of the object store: the ones behind `ray memory`."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    address = ray.get_runtime_context().gcs_address
    state = get_state_from_address(address)  # type: ignore[no-untyped-call]
    return get_memory_info_reply(state).store_stats  # type: ignore[no-untyped-call]


KINDS = {
    "ray::MapWorker": "data actors",
    "ray::_MapWorker": "data actors",
    "ray::SplitCoordinator": "executor",
    "raylet": "raylet",
    "gcs_server": "gcs",
    "import base64, hashlib": "object store",
    "moto.server": "object store",
}


def cpu_seconds() -> dict[tuple[int, str], tuple[str, float]]:
    """(process, start time) -> what it is and the CPU seconds it has used; of this benchmark's processes."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            kind = "driver" if int(entry.name) == os.getpid() else None
            for mark, name in KINDS.items():
                if kind is None and mark in command[:400]:
                    kind = name
            if kind is None and command.startswith("ray::"):
                kind = "other Ray"
            if kind is not None:
                found[int(entry.name), fields[19]] = (
                    kind,
                    (int(fields[11]) + int(fields[12])) / ticks,
                )
    return found


if __name__ == "__main__":
    main()
