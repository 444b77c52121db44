"""Kill `moleblend embed` among its parts, type it again: each molecule once, with the vectors of an undisturbed run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import finish, kill_when, moleblend

from moleblend_ray.config.downstream import EmbedConfig
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.hub import save_pretrained
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.orchestration.library.embed import embed_job
from moleblend_ray.orchestration.library.part_writer import PartWriter

TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)
NUM_MOLECULES, ROWS_PER_PART = 60, 6
NUM_PARTS = NUM_MOLECULES // ROWS_PER_PART
IDS = [f"id-{row}" for row in range(NUM_MOLECULES)]

# Small parts, each of which takes its time. Runs in the actors too: Ray sends them what `__main__` defines.
SLOW = """
import time

from moleblend_ray.orchestration.preparation import molecules

from moleblend_ray.orchestration.library import parts

molecules._FEWEST_ROWS = {rows}


class Writer(parts.PartWriter):
    def _loaded(self):
        time.sleep({pause_s})
        return super()._loaded()


parts.PartWriter = Writer
"""


def start(folder: Path, *, pause_s: float) -> subprocess.Popen[str]:
    return moleblend(
        "embed",
        "checkpoint=model",
        "source=molecules.csv",
        "out=out",
        "id_column=name",
        "conformers=false",
        "cluster.num_data_actors=2",
        work=folder,
        before=SLOW.format(rows=ROWS_PER_PART, pause_s=pause_s),
    )


def parts_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("parts/*.parquet"))}


def made_at_once(folder: Path, data: str) -> dict[str, bytes]:
    """The parts of the prepared molecules, all from one writer in this process."""
    out = folder / "undisturbed"
    config = EmbedConfig(checkpoint=str(folder / "model"), source=data, out=str(out))
    manifest = load_manifest(data)
    job = embed_job(config)
    maker = job.load(torch.device("cpu"))
    writer = PartWriter(job, data, manifest, maker.fingerprint, maker.schema)
    for number in range(len(manifest.shards_of("train"))):
        writer.write(number, "train", number)
    return parts_of(out)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_embed_keeps_its_parts_and_gives_each_molecule_once(tmp_path: Path) -> None:
    rows = [f"{name},{'C' * (1 + row % 9)}{'ONS'[row % 3]}C" for row, name in enumerate(IDS)]
    rows.insert(10, "id-bad,not a molecule")
    (tmp_path / "molecules.csv").write_text("\n".join(["name,smiles", *rows]) + "\n")
    torch.manual_seed(0)
    save_pretrained(MoleBlendModel(TINY), str(tmp_path / "model"))

    out = tmp_path / "out"
    kill_when(lambda: len(parts_of(out)) >= 3, start(tmp_path, pause_s=0.5))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("parts/*.parquet")}
    assert len(kept) < NUM_PARTS, "the kill came too late to prove anything"
    assert not (out / "embeddings.json").exists()
    finish(start(tmp_path, pause_s=0.0))

    # Parts are written by renaming a new file: one that was made again would have another time.
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    parts = parts_of(out)
    assert parts == made_at_once(tmp_path, str(out / "prepared"))
    table = pa.concat_tables(pq.read_table(pa.BufferReader(part)) for part in parts.values())
    assert table["mol_id"].to_pylist() == IDS
    summary = json.loads((out / "embeddings.json").read_text())
    assert len(kept) <= summary["parts_reused"] < len(summary["parts"]) == len(parts)
    assert (summary["embeddings"], summary["rejected"]) == (NUM_MOLECULES, 1)
