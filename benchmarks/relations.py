"""Shards to packed micro-batches on one core, beside a plain per-molecule NumPy implementation.

    python benchmarks/relations.py [--molecules 65536] [--source molecules.parquet] [--growth]

Reads shards with the training order, builds all relations and packs micro-batches. The source is the PCQM4Mv2
sample beside the project if it is there, else 500 sample molecules made here; its molecules are taken in turn until
there are as many as asked, in shards as a shuffle writes them. ``stage_us`` is what each stage takes of a molecule's time, measured one
after the other: the order, fetching and decoding row groups, gathering molecules from them, relations and packing, and
what the trainer then does, unpacking and padding. ``limit_us`` is what memory alone would take for such amounts.
``attention_padding`` is the share of pairs of tokens that are padding: as cut, and if molecules were not ordered
by size; layers that work token by token see no padding.

``--growth`` adds runs on 10^4, 10^5 and 10^6 molecules: microseconds a molecule, the median over stretches of 8,192 of
which the three collections take turns, and the peak memory of a process that reads one of them. The shuffle window
is two row groups and the cache holds little more, so that each row group is decoded about once an epoch at any size and
only what grows with the collection can differ.
Prints one JSON line last. ``benchmarks/results`` keeps some.
"""

from __future__ import annotations

import os

# Before NumPy and Arrow start their pools: the claim is about one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moleblend_ray.chemistry.samples import write_samples
from moleblend_ray.data.batches.batch import build_steps, unpack_micro_batch
from moleblend_ray.data.batches.builder import MicroBatchBuilder
from moleblend_ray.data.batches.order import DataOrder
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.dataset.block import MoleculeBlock, block_from_table
from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME
from moleblend_ray.data.dataset.manifest import Manifest, ShardInfo, fingerprint, load_manifest
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.dataset.shards import GRAPH_COLUMNS
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.assembly import write_manifest
from moleblend_ray.data.preparation.claim import claim_output
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.receipts import write_part
from moleblend_ray.data.preparation.shard_writer import convert_chunk
from moleblend_ray.data.sources import ColumnConfig, find_sources, inspect_sources, read_chunks
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.relations.topology import topology
from moleblend_ray.vocabulary import NUM_HOPS, UNREACHABLE

SHARED_SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "pcqm4mv2_2k.parquet"
STREAM = StreamConfig(micro_batch_size=64, steps_per_block=16)
ORDER = OrderConfig(global_batch_size=1024, num_streams=4)
SHARD_ROWS = 65_536
"""`rows_per_shard` of `prepare` unless told otherwise."""
GROWTH_SIZES = (10**4, 10**5, 10**6)
GROWTH_STEPS = 16
GROWTH_BATCH_SIZE = OrderConfig().global_batch_size
GROWTH_ORDER = OrderConfig(shuffle_window=GROWTH_STEPS * GROWTH_BATCH_SIZE)
GROWTH_STREAM = StreamConfig(cache_bytes=8 << 20, steps_per_block=GROWTH_STEPS)
GROWTH_STRETCH = 2 * GROWTH_STEPS
"""Steps whose time is one measurement: 8,192 molecules."""
REPEATS = 3
PLAIN_MOLECULES = 200


def main() -> None:
    arguments = parse_arguments()
    stay_on_one_core()
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.source or default_source(folder)
        sample, uri = os.path.join(folder, "sample"), os.path.join(folder, "dataset")
        reader = ShardReader(sample, prepared(source, sample), "train")
        table = reader.read(np.arange(reader.num_rows))
        molecules = arguments.molecules
        grow(uri, sample, molecules)
        seconds, num_bytes = measure_stream(uri, molecules, ORDER, STREAM)
        plain = measure_plain(block_from_table(table, np.arange(len(table))))
        stages = measure_stages(uri)
        limits = measure_limits(uri, round(num_bytes / molecules))
        padding = measure_padding(uri)
        shards = load_manifest(uri).shards_of("train")
        growth = measure_growth(sample, folder) if arguments.growth else {}
    per_second = molecules / seconds
    print(
        json.dumps(
            {
                "benchmark": "relations",
                "source": Path(source).name,
                "molecules": molecules,
                "mean_atoms": round(float(np.mean(table["num_atoms"].to_numpy())), 2),
                "molecules_per_s": round(per_second),
                "us_per_molecule": round(1e6 / per_second, 2),
                "stage_us": stages,
                "limit_us": limits,
                "bytes_per_molecule": round(num_bytes / molecules),
                "shard_bytes_per_molecule": round(
                    sum(shard.num_bytes for shard in shards) / molecules
                ),
                "attention_padding": padding,
                "plain_molecules_per_s": round(plain, 1),
                "speedup": round(per_second / plain, 1),
                "cpus": os.cpu_count(),
                **growth,
            }
        )
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--molecules", type=int, default=65536)
    parser.add_argument("--source", help="SDF, CSV or Parquet file to take molecules from")
    parser.add_argument(
        "--growth", action="store_true", help="also measure how cost grows with the molecules"
    )
    return parser.parse_args()


def stay_on_one_core() -> None:
    """Row groups are fetched and decoded in threads: they all share the core with everything else."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def default_source(folder: str) -> str:
    if SHARED_SAMPLE.exists():
        return str(SHARED_SAMPLE)
    path = os.path.join(folder, "samples.parquet")
    write_samples(path, 500)
    return path


def prepared(source: str, uri: str) -> Manifest:
    """The source as a data set of one split."""
    options = ConvertOptions(columns=ColumnConfig(label_columns=()), valid_fraction=0.0)
    found = inspect_sources(find_sources(source), options.columns)
    claim_output(uri, found, options)
    receipts = [
        convert_chunk(chunk, layout, found.labels, options, uri)
        for index, layout in enumerate(found.layouts)
        for chunk in read_chunks(layout, index, options.rows_per_chunk)
    ]
    return write_manifest(uri, found, options, receipts)


def grow(uri: str, source_uri: str, num_molecules: int, num_shard_rows: int = SHARD_ROWS) -> None:
    """A data set of ``num_molecules``, those of another one in turn, with shards of the size that a shuffle makes.

    Full shards are equal: they are one file that the manifest names repeatedly.
    """
    source = load_manifest(source_uri)
    molecules = ShardReader(source_uri, source, "train").read(
        np.arange(source.num_molecules("train"))
    )

    def write(name: str, num_rows: int) -> list[ShardInfo]:
        table = molecules.take(np.arange(num_rows) % len(molecules))
        return write_part(uri, f"train/{name}.parquet", "train", table, source.row_group_rows)

    full, rest = divmod(num_molecules, num_shard_rows)
    shards = (*write("full", num_shard_rows if full else 0) * full, *write("rest", rest))
    manifest = dataclasses.replace(
        source,
        shards=shards,
        fingerprint=fingerprint(
            source.featurizer_version,
            source.options,
            source.labels,
            shards,
            format_version=source.format_version,
        ),
    )
    storage.write_json(storage.join(uri, MANIFEST_NAME), manifest.to_json())


def measure_stream(
    uri: str, num_molecules: int, order: OrderConfig, stream: StreamConfig
) -> tuple[float, int]:
    """Median seconds and payload bytes of one epoch, cold cache of row groups each time."""
    block_steps = stream.steps_per_block
    assert block_steps is not None
    groups = max(1, num_molecules // (order.global_batch_size * block_steps))
    # Loads the compiled kernels.
    MicroBatchBuilder(uri, order, stream).build(0, 1, 0)
    seconds = []
    for _ in range(REPEATS):
        builder = MicroBatchBuilder(uri, order, stream)
        started = time.perf_counter()
        num_bytes, molecules = 0, 0
        for group in range(groups):
            for number in range(order.num_streams):
                first_step = group * block_steps
                micro_batches = builder.build(first_step, block_steps, number)
                num_bytes += sum(len(micro.payload) for micro in micro_batches)
                molecules += sum(len(micro) for micro in micro_batches)
        elapsed = time.perf_counter() - started
        seconds.append(elapsed * num_molecules / molecules)
        num_bytes = num_bytes * num_molecules // molecules
    return statistics.median(seconds), num_bytes


def measure_stages(uri: str) -> dict[str, float]:
    """Microseconds a molecule of each stage: median of runs over the blocks of four groups of steps."""
    manifest = load_manifest(uri)
    data_order = DataOrder(manifest.num_molecules("train"), ORDER)
    groups = [range(group * 16, group * 16 + 16) for group in range(4)]
    runs = []
    for _ in range(REPEATS):
        reader = ShardReader(uri, manifest, "train", columns=GRAPH_COLUMNS)
        started = time.perf_counter()
        asked = [
            (steps, data_order.stream_batches(steps.start, len(steps), stream).ravel())
            for steps in groups
            for stream in range(ORDER.num_streams)
        ]
        ordered = time.perf_counter()
        for _, positions in asked:
            reader.read_block(positions)
        decoded = time.perf_counter()
        blocks = [(steps, reader.read_block(positions)) for steps, positions in asked]
        gathered = time.perf_counter()
        pack = pad = 0.0
        # Block by block: to keep them all would measure new memory.
        for steps, block in blocks:
            begun = time.perf_counter()
            micro_batches = build_steps(block, steps, 0, STREAM.num_at_once)
            packed = time.perf_counter()
            for micro in micro_batches:
                MoleculeBatch.from_micro_batch(unpack_micro_batch(micro.payload))
            pack, pad = pack + packed - begun, pad + time.perf_counter() - packed
        gather = gathered - decoded
        runs.append((ordered - started, decoded - ordered - gather, gather, pack, pad))
    molecules = sum(len(positions) for _, positions in asked)
    names = ("order", "fetch_and_decode", "gather", "relate_and_pack", "unpack_and_pad")
    medians = [statistics.median(run) for run in zip(*runs, strict=True)]
    return {
        name: round(1e6 * value / molecules, 2) for name, value in zip(names, medians, strict=True)
    }


def measure_padding(uri: str) -> dict[str, dict[str, float]]:
    """Share of token pairs that are padding, by molecules of a (step, stream), cut into micro-batches of 64."""
    shares = {}
    for size in (64, 256, 1024):
        order = OrderConfig(global_batch_size=size, num_streams=1)
        builder = MicroBatchBuilder(uri, order, STREAM)
        micro_batches = builder.build(0, 64, 0)
        sizes = np.concatenate([micro.num_atoms for micro in micro_batches])
        mixed = np.random.default_rng(0).permutation(sizes).reshape(-1, STREAM.num_at_once)
        shares[f"{size}_molecules"] = {
            "ordered": padding_share([micro.num_atoms for micro in micro_batches]),
            "unordered": padding_share(list(mixed)),
        }
    return shares


def padding_share(batches: list[np.ndarray]) -> float:
    """Padding among the pairs of tokens (atoms and a graph token) of rectangular batches with these atom counts."""
    tokens = [sizes.astype(np.int64) + 1 for sizes in batches]
    real = sum(int(n @ n) for n in tokens)
    return round(1 - real / sum(len(n) * int(n.max()) ** 2 for n in tokens), 4)


def measure_growth(sample: str, folder: str) -> dict[str, Any]:
    """Time a molecule and peak memory at three sizes, and how far the times lie apart."""
    uris = [os.path.join(folder, str(size)) for size in GROWTH_SIZES]
    for uri, size in zip(uris, GROWTH_SIZES, strict=True):
        grow(uri, sample, size)
    stretches = [stretch_seconds(uri) for uri in uris]
    rounds = GROWTH_SIZES[-1] // (GROWTH_STRETCH * GROWTH_BATCH_SIZE)
    seconds = [[next(stretch) for stretch in stretches] for _ in range(rounds)]
    times = [
        1e6 * statistics.median(column) / (GROWTH_STRETCH * GROWTH_BATCH_SIZE)
        for column in zip(*seconds, strict=True)
    ]
    context = multiprocessing.get_context("spawn")
    rows = []
    for uri, size, microseconds in zip(uris, GROWTH_SIZES, times, strict=True):
        with ProcessPoolExecutor(1, mp_context=context) as process:
            megabytes = process.submit(epoch_megabytes, uri).result()
        rows.append(
            {
                "molecules": size,
                "us_per_molecule": round(microseconds, 2),
                "peak_rss_mb": round(megabytes),
            }
        )
    return {"growth": rows, "growth_spread": round(max(times) / min(times) - 1, 3)}


def stretch_seconds(uri: str) -> Iterator[float]:
    """Seconds of one stretch after the other, for ever, each epoch with a reader of its own."""
    molecules = load_manifest(uri).num_molecules("train")
    last = molecules // GROWTH_BATCH_SIZE - GROWTH_STRETCH
    while True:
        builder = MicroBatchBuilder(uri, GROWTH_ORDER, GROWTH_STREAM)
        for first in range(0, last + 1, GROWTH_STRETCH):
            started = time.perf_counter()
            for step in range(first, first + GROWTH_STRETCH, GROWTH_STEPS):
                for number in range(GROWTH_ORDER.num_streams):
                    builder.build(step, GROWTH_STEPS, number)
            yield time.perf_counter() - started


def epoch_megabytes(uri: str) -> float:
    """Peak resident megabytes of this process after one epoch."""
    stretches = stretch_seconds(uri)
    molecules = load_manifest(uri).num_molecules("train")
    for _ in range(molecules // (GROWTH_STRETCH * GROWTH_BATCH_SIZE)):
        next(stretches)
    return peak_resident_kilobytes() / 1024


def peak_resident_kilobytes() -> int:
    """From the kernel: what ``getrusage`` says of a process begins with its parent's peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def measure_limits(uri: str, packed_bytes: int) -> dict[str, float]:
    """Microseconds a molecule that memory alone would take: to copy what decoding and packing write, and to take rows of the
    decoded size at random."""
    reader = ShardReader(uri, load_manifest(uri), "train", columns=GRAPH_COLUMNS)
    molecules = reader.num_rows
    decoded_bytes = reader.read(np.arange(molecules)).nbytes // molecules
    rows = np.ones((molecules, decoded_bytes), np.uint8)
    packed = np.ones((molecules, packed_bytes), np.uint8)
    order = np.random.default_rng(0).permutation(molecules)
    rows_out, packed_out = np.empty_like(rows), np.empty_like(packed)
    runs = {
        "copy_decoded": lambda: np.copyto(rows_out, rows),
        "gather_decoded": lambda: np.take(rows, order, axis=0, out=rows_out),
        "copy_packed": lambda: np.copyto(packed_out, packed),
    }
    return {
        "decoded_bytes": decoded_bytes,
        **{name: round(1e6 * best_seconds(run) / molecules, 3) for name, run in runs.items()},
    }


def best_seconds(run: Callable[[], object]) -> float:
    run()  # the first touches new memory
    seconds = []
    for _ in range(2 * REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure_plain(block: MoleculeBlock) -> float:
    """Molecules a second of the plain implementation, whose results are checked against the kernels'."""
    block = block.take(np.arange(min(PLAIN_MOLECULES, len(block))))
    started = time.perf_counter()
    results = []
    bond_start = 0
    for n, num_bonds in zip(block.num_atoms.tolist(), block.num_bonds.tolist(), strict=True):
        bonds = slice(bond_start, bond_start + num_bonds)
        results.append(plain_relations(n, block.bonds[bonds], block.bond_features[bonds]))
        bond_start += num_bonds
    per_second = len(block) / (time.perf_counter() - started)
    found = topology(block.num_atoms, block.num_bonds, block.bonds, block.bond_features)
    assert np.array_equal(found.spd, np.concatenate([spd.ravel() for spd, _ in results]))
    codes = np.concatenate([codes.reshape(-1, NUM_HOPS) for _, codes in results])
    assert np.array_equal(found.path_codes, codes)
    return per_second


def plain_relations(
    n: int, bonds: np.ndarray, features: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Floyd-Warshall and a walk along each path, one molecule at a time."""
    distance = np.full((n, n), UNREACHABLE, dtype=np.int64)
    middle = np.full((n, n), -1, dtype=np.int64)
    code = np.zeros((n, n), dtype=np.int64)
    np.fill_diagonal(distance, 0)
    for (a, b), (kind, stereo, conjugated) in zip(bonds.tolist(), features.tolist(), strict=True):
        distance[a, b] = distance[b, a] = 1
        code[a, b] = code[b, a] = 1 + (kind * 6 + stereo) * 2 + conjugated
    for k in range(n):
        through = distance[:, k, None] + distance[None, k, :]
        better = through < distance
        distance[better] = through[better]
        middle[better] = k
    codes = np.zeros((n, n, NUM_HOPS), dtype=np.int64)
    for a in range(n):
        for b in range(n):
            if a != b and distance[a, b] < UNREACHABLE:
                path = [a, *interior(middle, a, b), b]
                for hop in range(min(len(path) - 1, NUM_HOPS)):
                    codes[a, b, hop] = code[path[hop], path[hop + 1]]
    return distance, codes


def interior(middle: np.ndarray, a: int, b: int) -> list[int]:
    """Atoms strictly between a and b on the recovered path."""
    k = int(middle[a, b])
    return [] if k < 0 else [*interior(middle, a, k), k, *interior(middle, k, b)]


if __name__ == "__main__":
    main()
