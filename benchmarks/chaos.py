"""One pretraining run through a seeded schedule of faults, compared with the same run left alone.

    python benchmarks/chaos.py [--faults 24] [--seed 0] [--molecules 3000] [--kinds worker_kill ...] [--away 20] [--log FILE]

The cluster is a head and two nodes on this machine, the object store an S3 server behind a proxy that fails on demand (moto's, or the one
of ``AWS_ENDPOINT_URL``). The run is ``moleblend pretrain`` with the tiny preset, FSDP on one or two workers, elastic. Faults: a worker, a data actor or
the driver killed; the driver told to stop; a node lost or told to drain, and a new one later; storage failing three requests of ten, slow, or away
for ``--away`` seconds; the newest checkpoint damaged while a worker dies. A driver that ended is started again with the same command.

A fault is survived if a newer checkpoint is committed within two minutes, without any help but that (after a notice to drain: by
workers elsewhere). ``recovery_s`` is the time from a fault to
the next checkpoint, three steps and their upload included. At the end the records of the run tell what each committed step consumed
(``molecules_lost`` and ``molecules_repeated`` against the plan), and ``max_abs_weight_diff`` compares the exported weights with those of the
undisturbed run. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from moleblend_ray.data.batches.order import DataOrder
from moleblend_ray.data.config import OrderConfig
from moleblend_ray.data.files import storage
from moleblend_ray.training.commits import committed_steps, read_commit, step_uri
from moleblend_ray.training.export import load_model
from moleblend_ray.training.metrics import Record
from moleblend_ray.training.step import molecules_checksum

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from fault_proxy import FaultProxy
from nodes import drain, has_worker, title
from synthetic import write_dataset

ORDER = OrderConfig(global_batch_size=64, num_streams=4, shuffle_window=512, chunk_rows=64)
EVERY_STEPS = 3
STEPS_A_FAULT = 15
"""Mean number of committed steps between the end of one fault and the next."""
SURVIVED_WITHIN_S = 120.0
DISTURBED_S = 10.0
"""Least time that storage fails or is slow; until the next checkpoint after it."""
STOPPED_STATUS = 75
RESTARTS_AT_THE_END = 5

Injection = Callable[[], Callable[[], None] | None]
"""Begins a fault; what it returns ends it, once the run has got on."""


def main() -> None:
    arguments = parse_arguments()
    # The tokens of a loopback cluster that ends with this process.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with (
        tempfile.TemporaryDirectory(prefix="moleblend-chaos-") as folder,
        s3_server() as bucket,
        FaultProxy(os.environ["AWS_ENDPOINT_URL"], rate=0.0, seed=arguments.seed) as proxy,
    ):
        data = f"{bucket}/data"
        write_dataset(data, arguments.molecules, shard_rows=500, max_conformers=2)
        num_steps = (arguments.faults + 2) * STEPS_A_FAULT
        say(f"undisturbed run of {num_steps} steps")
        undisturbed = command(data, f"{bucket}/undisturbed", num_steps)
        finish(start_driver(undisturbed, folder, arguments.log, {}))
        say("disturbed run")
        out = f"{bucket}/disturbed"
        chaos = Chaos(data, out, num_steps, proxy, folder, arguments)
        with chaos.cluster():
            faults = chaos.run(arguments.faults, arguments.kinds)
        line = {
            "benchmark": "chaos",
            "seed": arguments.seed,
            "steps": num_steps,
            **tally(faults),
            **consumed(f"{bucket}/disturbed", arguments.molecules, num_steps),
            "max_abs_weight_diff": weight_difference(
                f"{bucket}/undisturbed", f"{bucket}/disturbed"
            ),
        }
    print(json.dumps(line))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--molecules", type=int, default=3000)
    parser.add_argument("--kinds", nargs="*", default=[], help="only faults of these kinds")
    parser.add_argument("--away", type=float, default=20.0, help="seconds without storage")
    parser.add_argument("--log", default=os.devnull, help="file for what the runs print")
    return parser.parse_args()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------- run and storage


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """URI of a new prefix on an S3 server that the environment names."""
    server = None
    if not os.environ.get("AWS_ENDPOINT_URL"):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    import s3fs

    bucket = f"moleblend-chaos-{random.getrandbits(32):08x}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(bucket)
    try:
        yield f"s3://{bucket}"
    finally:
        if server is not None:
            server.stop()


def command(data: str, out: str, num_steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "moleblend_ray.cli", "pretrain"),
        *(f"data={data}", f"out={out}", "model=tiny", "seed=3"),
        f"order.global_batch_size={ORDER.global_batch_size}",
        f"order.num_streams={ORDER.num_streams}",
        f"order.shuffle_window={ORDER.shuffle_window}",
        f"order.chunk_rows={ORDER.chunk_rows}",
        # A small budget: else the data actor has built everything before the first fault.
        *(
            "stream.micro_batch_size=16",
            "stream.steps_per_block=2",
            "stream.object_store_gib=0.002",
        ),
        *("stream.max_actors=1", "optim.warmup_steps=20"),
        *(f"train.num_steps={num_steps}", "train.validate_every=0", "model.dropout=0"),
        *(f"checkpoint.every_steps={EVERY_STEPS}", "tracking.mode=disabled"),
        *("cluster.num_workers=2", "cluster.min_workers=1", "cluster.resize_interval_s=1"),
    ]


def start_driver(
    arguments: list[str], folder: str, log: str, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    with Path(log).open("ab") as screen:
        return subprocess.Popen(
            arguments,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=screen,
            stderr=screen,
        )


def finish(driver: subprocess.Popen[bytes]) -> None:
    if driver.wait() != 0:
        raise SystemExit(f"the undisturbed run ended with status {driver.returncode}")


# ---------------------------------------------------------------------------------------------------- faults


class Fault:
    """One fault that was given, and what became of it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.survived = False
        self.recovery_s = 0.0


class Chaos:
    """The disturbed run: its cluster, its driver and what can happen to them."""

    def __init__(
        self,
        data: str,
        out: str,
        num_steps: int,
        proxy: FaultProxy,
        folder: str,
        arguments: argparse.Namespace,
    ) -> None:
        self._out = out
        self._num_steps = num_steps
        self._proxy = proxy
        self._folder = folder
        self._log = arguments.log
        self._away_s = arguments.away
        self._random = random.Random(arguments.seed)
        self._command = command(data, out, num_steps)
        self._nodes: list[Any] = []
        self._driver: Any = None
        self._kinds: dict[str, Injection] = {
            "worker_kill": self._kill_worker,
            "driver_kill": self._kill_driver,
            "node_loss": self._lose_node,
            "storage_failing": lambda: self._disturb_storage(rate=0.3),
            "damaged_checkpoint": self._damage_checkpoint,
            "node_drain": self._drain_node,
            "data_actor_kill": self._kill_data_actor,
            "storage_away": self._storage_away,
            "driver_stop": self._stop_driver,
            "storage_slow": lambda: self._disturb_storage(delay_s=0.3),
        }

    @contextlib.contextmanager
    def cluster(self) -> Iterator[None]:
        """A head and two nodes of one CPU each, for two workers and a data actor."""
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        # What runs on the cluster sees the storage through the proxy; we look at it directly.
        os.environ["AWS_ENDPOINT_URL"] = self._proxy.url
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        self._add_node()
        self._add_node()
        self._environment = {
            "AWS_ENDPOINT_URL": self._proxy.url,
            "RAY_ADDRESS": self._cluster.address,
        }
        try:
            yield
        finally:
            if self._driver is not None:
                self._driver.kill()
            self._cluster.shutdown()  # type: ignore[no-untyped-call]
            os.environ["AWS_ENDPOINT_URL"] = endpoint

    def run(self, count: int, kinds: list[str]) -> list[Fault]:
        """Train to the end through ``count`` faults, each kind (of ``kinds``, or of all) in turn, in an order and at steps
        that the seed decides."""
        chosen = kinds or list(self._kinds)
        order: list[str] = []
        while len(order) < count:
            order += self._random.sample(chosen, len(chosen))
        self._start()
        self._wait_for_newer(0)
        faults = []
        for kind in order[:count]:
            pause = self._random.randint(STEPS_A_FAULT // 2, STEPS_A_FAULT)
            self._wait_for_newer(self._newest() + pause - EVERY_STEPS)
            if self._newest() >= self._num_steps - 2 * EVERY_STEPS:
                say("the run is at its end: no more faults")
                break
            faults.append(self._give(kind))
        for _ in range(RESTARTS_AT_THE_END):
            if self._driver.wait() == 0:
                return faults
            say(f"the driver ended with status {self._driver.returncode}: again")
            self._start()
        raise SystemExit("the run does not come to its end; --log shows why")

    def _give(self, kind: str) -> Fault:
        fault, before, begin = Fault(kind), self._newest(), time.monotonic()
        end = self._kinds[kind]()
        fault.survived = self._wait_for_newer(max(before, self._newest()))
        fault.recovery_s = time.monotonic() - begin
        if end is not None:
            end()
        say(
            f"{kind} at step {before}: {'survived' if fault.survived else 'NOT SURVIVED'}, {fault.recovery_s:.1f} s"
        )
        return fault

    def _start(self) -> None:
        self._driver = start_driver(self._command, self._folder, self._log, self._environment)

    def _newest(self) -> int:
        return max(committed_steps(self._out), default=0)

    def _wait_for_newer(self, step: int) -> bool:
        """Whether a checkpoint later than ``step`` came in time; a driver that has ended is started again."""
        deadline = time.monotonic() + SURVIVED_WITHIN_S
        ended_by_itself = False
        while self._newest() <= min(step, self._num_steps - 1):
            status = self._driver.poll()
            if status is not None:
                if status not in (-signal.SIGKILL, STOPPED_STATUS):
                    say(f"the driver ended by itself with status {status}; --log shows why")
                    ended_by_itself = True
                self._start()
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return not ended_by_itself

    # Faults, each beginning where it stands.

    def _kill_worker(self) -> None:
        self._random.choice(self._processes("TrainWorker")).send_signal(signal.SIGKILL)

    def _kill_data_actor(self) -> None:
        self._random.choice(self._processes("MapWorker")).send_signal(signal.SIGKILL)

    def _kill_driver(self) -> None:
        self._driver.send_signal(signal.SIGKILL)
        self._driver.wait()

    def _stop_driver(self) -> None:
        self._driver.send_signal(signal.SIGTERM)
        self._driver.wait()

    def _lose_node(self) -> Callable[[], None]:
        node = self._random.choice(self._nodes)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        return self._add_node

    def _drain_node(self) -> Callable[[], None]:
        node = self._random.choice([node for node in self._nodes if has_worker(node)])
        drain(self._cluster.address, node.node_id, seconds=60.0)
        leaving = read_commit(self._out, self._newest()).attempt
        deadline = time.monotonic() + SURVIVED_WITHIN_S
        while read_commit(self._out, self._newest()).attempt == leaving:
            if time.monotonic() > deadline:
                raise SystemExit("the workers stay on a node that drains")
            time.sleep(0.1)

        def replace() -> None:
            self._nodes.remove(node)
            self._cluster.remove_node(node, allow_graceful=True)
            self._add_node()

        return replace

    def _add_node(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def _damage_checkpoint(self) -> None:
        """A worker dies, and what the others would start from is altered, cut off or gone."""
        self._kill_worker()
        folder = step_uri(self._out, self._newest())
        names = [storage.name_of(file.uri) for file in storage.list_files(folder)]
        victim = storage.join(folder, self._random.choice([n for n in names if "distcp" in n]))
        content = bytearray(storage.read_bytes(victim))
        how = self._random.choice(["altered", "cut", "gone"])
        if how == "gone":
            storage.delete(victim)
            return
        content[len(content) // 2] ^= 1
        storage.write_bytes(victim, bytes(content if how == "altered" else content[:-100]))

    def _disturb_storage(self, rate: float = 0.0, delay_s: float = 0.0) -> Callable[[], None]:
        def heal() -> None:
            self._proxy.rate = self._proxy.delay_s = 0.0

        self._proxy.rate, self._proxy.delay_s = rate, delay_s
        time.sleep(DISTURBED_S)
        return heal

    def _storage_away(self) -> None:
        self._proxy.rate = 1.0
        time.sleep(self._away_s)
        self._proxy.rate = 0.0

    def _processes(self, name: str) -> list[Any]:
        """Processes of the cluster whose title has ``name``; waits for one, as they may be about to start."""
        import psutil  # Ray brings its own copy

        for _ in range(int(SURVIVED_WITHIN_S)):
            found = [p for p in psutil.Process().children(recursive=True) if name in title(p)]
            if found:
                return found
            time.sleep(1.0)
        raise SystemExit(f"no process {name} is there")


# --------------------------------------------------------------------------------------------------- results


def tally(faults: list[Fault]) -> dict[str, Any]:
    """How many faults of each kind there were, how many were survived, and the seconds that they took."""
    seconds = [fault.recovery_s for fault in faults if fault.survived]
    kinds = Counter(fault.kind for fault in faults)
    return {
        "faults_given": len(faults),
        "faults_survived": sum(fault.survived for fault in faults),
        "median_recovery_s": round(statistics.median(seconds), 1) if seconds else None,
        "recovery_s": {
            kind: [round(fault.recovery_s, 1) for fault in faults if fault.kind == kind]
            for kind in kinds
        },
    }


def consumed(run: str, num_molecules: int, num_steps: int) -> dict[str, int]:
    """Molecules that committed steps lack or have too often, by the checksums of their ids and the plan of the data order."""
    order = DataOrder(num_molecules, ORDER)
    records: list[Record] = [
        json.loads(line)
        for file in storage.list_files(f"{run}/metrics")
        for line in storage.read_bytes(file.uri).splitlines()
    ]
    times = Counter(int(record["step"]) for record in records)
    right = {
        int(record["step"])
        for record in records
        if record["molecules_checksum"]
        == molecules_checksum(order.global_batch(int(record["step"])))
    }
    size = ORDER.global_batch_size
    return {
        "molecules_lost": size * sum(step not in right for step in range(num_steps)),
        "molecules_repeated": size * sum(count - 1 for count in times.values()),
    }


def weight_difference(one: str, other: str) -> float:
    """Largest difference of any weight of the two exported models."""
    first, second = (load_model(run).state_dict() for run in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


if __name__ == "__main__":
    main()
