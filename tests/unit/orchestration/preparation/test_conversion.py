"""What a conversion reads by which task, with how many actors, and what its rate counts: the time when all were at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data.preparation.receipts import Receipt, Statistics
from moleblend_ray.data.sources import ColumnConfig, find_sources, inspect_sources
from moleblend_ray.orchestration.preparation.conversion import Effort, _Chunks, _num_actors


def result(process: str | None, started_s: float, ended_s: float, peak: int = 0) -> dict[str, Any]:
    return {"process": process, "started_s": started_s, "ended_s": ended_s, "peak_bytes": peak}


def test_a_late_process_and_a_last_chunk_do_not_count() -> None:
    effort = Effort()
    # a: 0-2, 2-4, 4-6; b: 1-3, 3-5. Together from 1 to 5, each 10 records in 2 s.
    for process, started_s in (("a", 0.0), ("a", 2.0), ("a", 4.0), ("b", 1.0), ("b", 3.0)):
        effort.add(10, result(process, started_s, started_s + 2.0, peak=int(started_s)))
    assert effort.rows_per_s == pytest.approx(10.0)
    assert effort.seconds == pytest.approx(6.0)
    assert effort.peak_bytes == 4


def test_chunks_of_a_former_run_took_no_time() -> None:
    effort = Effort()
    effort.add(10, result(None, 0.0, 0.0))
    assert (effort.rows_per_s, effort.seconds, effort.peak_bytes) == (0.0, 0.0, 0)


def test_processes_that_never_met_have_no_common_rate() -> None:
    effort = Effort()
    effort.add(10, result("a", 0.0, 1.0))
    effort.add(10, result("b", 2.0, 3.0))
    assert effort.rows_per_s == 0.0
    assert effort.seconds == 3.0


@pytest.mark.parametrize(
    ("name", "content", "generate", "expected"),
    [
        ("a.smi", "c1ccccc1O\n" * 2000, True, 4),
        ("a.smi", "c1ccccc1O\n" * 2000, False, 1),
        ("a.smi", "c1ccccc1O\n" * 100_000, False, 3),
        ("a.smi", "c1ccccc1O\n" * 100, True, 1),
        ("a.sdf", "a\n\n\n  0  0  0     0  0            999 V2000\nM  END\n$$$$\n" * 500, True, 1),
    ],
)
def test_actors_start_where_they_have_work_for_longer_than_that_takes(
    tmp_path: Path, name: str, content: str, generate: bool, expected: int
) -> None:
    (tmp_path / name).write_text(content)
    config = PrepareConfig(
        source=str(tmp_path / name),
        out=str(tmp_path / "out"),
        featurize=FeaturizeConfig(conformers=ConformerConfig(generate=generate)),
        cluster=ClusterConfig(num_data_actors=100),
    )
    sources = inspect_sources(find_sources(str(tmp_path)), ColumnConfig())
    assert _num_actors(config, sources) == expected


def receipt(chunk_index: int, digest: str) -> Receipt:
    return Receipt(
        file_index=0,
        chunk_index=chunk_index,
        first_row=10 * chunk_index,
        digest=digest,
        rows_in=10,
        files=(),
        quarantined_by_reason={},
        unreadable_labels={},
        without_inchikey=0,
        memory_bytes=0,
        statistics=Statistics(),
    )


def test_a_reading_task_gets_the_digests_of_its_own_chunks_only(tmp_path: Path) -> None:
    table = pa.table({"smiles": ["CCO"] * 500})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    sources = inspect_sources(find_sources(str(tmp_path)), ColumnConfig())
    # All but one of 50 chunks, of which a task reads 16, were converted by an earlier command.
    done = {(0, index): receipt(index, f"digest-{index}") for index in range(49)}
    chunks = _Chunks(sources, 10, done)
    assert chunks.num_tasks == 4
    of_tasks = [read.args[-1] for read, _ in chunks._tasks]
    assert [len(digests) for digests in of_tasks] == [16, 16, 16, 1]
    assert dict(item for digests in of_tasks for item in digests.items()) == {
        index: f"digest-{index}" for index in range(49)
    }
