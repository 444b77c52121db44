"""Embeddings come in the source's order under the source's ids; what has none is listed with its reason."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import EmbedConfig
from moleblend_ray.errors import CheckpointError, ConfigError, TrainingError
from moleblend_ray.evaluation.prediction.encoders import load_encoder
from moleblend_ray.evaluation.results.result_files import EMBED
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.hub import save_pretrained
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.orchestration.library import embed as embed_module
from moleblend_ray.orchestration.library.embed import EmbedSummary, embed
from moleblend_ray.orchestration.library.part_writer import PartWriter
from moleblend_ray.orchestration.library.parts import _run_actors
from moleblend_ray.orchestration.preparation import molecules as molecules_module

pytestmark = pytest.mark.ray

TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)
SMILES = [
    "C" * (1 + row % 7) + ("O" if row % 2 else "N") + ("c1ccccc1" if row % 5 == 0 else "")
    for row in range(50)
]


@pytest.fixture
def config(tmp_path: Path) -> EmbedConfig:
    rows = [f"id-{row},{text}" for row, text in enumerate(SMILES)]
    rows.insert(10, "id-bad,not a molecule")
    (tmp_path / "molecules.csv").write_text("name,smiles\n" + "\n".join(rows) + "\n")
    torch.manual_seed(0)
    save_pretrained(MoleBlendModel(TINY), str(tmp_path / "model"))
    return EmbedConfig(
        checkpoint=str(tmp_path / "model"),
        source=str(tmp_path / "molecules.csv"),
        out=str(tmp_path / "out"),
        id_column="name",
        conformers=False,
        cluster=ClusterConfig(num_data_actors=2),
    )


def read_parts(out: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(Path(out, "parts").iterdir()))


def check_listed_parts(out: str) -> None:
    parts = json.loads(Path(out, "embeddings.json").read_text())["parts"]
    assert [part["path"] for part in parts] == [
        f"parts/part-0000{number}.parquet" for number in range(3)
    ]
    for part in parts:
        content = Path(out, part["path"]).read_bytes()
        assert part["bytes"] == len(content)
        assert part["sha256"] == hashlib.sha256(content).hexdigest()
        assert part["rows"] == pq.read_metadata(Path(out, part["path"])).num_rows


def run_in_small_parts(config: EmbedConfig, monkeypatch: pytest.MonkeyPatch) -> EmbedSummary:
    monkeypatch.setattr(molecules_module, "_FEWEST_ROWS", 20)
    return embed(config)


@pytest.mark.usefixtures("ray_cluster")
def test_order_and_ids_are_the_sources_and_what_is_missing_is_made_again(
    config: EmbedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run_in_small_parts(config, monkeypatch)
    table = read_parts(config.out)
    check_listed_parts(config.out)
    assert (summary.embeddings, summary.rejected, summary.parts, summary.dim) == (50, 1, 3, 16)
    assert table["mol_id"].to_pylist() == [f"id-{row}" for row in range(50)]
    assert table["source_row"].to_pylist() == [*range(10), *range(11, 51)]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 16)

    rejected = pq.read_table(Path(config.out, "rejected.parquet")).to_pylist()
    assert [(row["mol_id"], row["source_row"], row["reason"]) for row in rejected] == [
        ("id-bad", 10, "unparsable_smiles")
    ]
    assert summary.rejected_by_reason == {"unparsable_smiles": 1}

    # Equal molecules have equal vectors, wherever they stand; different ones do not.
    vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    smiles = np.array(table["smiles"].to_pylist())
    for text in set(smiles):
        np.testing.assert_allclose(
            vectors[smiles == text],
            vectors[smiles == text][:1].repeat((smiles == text).sum(), 0),
            atol=1e-5,
        )
    assert len(np.unique(vectors.round(4), axis=0)) == len(set(smiles))

    # Now its chunks would have more rows; what is begun or finished keeps those that it has.
    monkeypatch.undo()
    assert embed(config).already_finished

    # As a kill in the middle leaves it: no summary, a part missing.
    kept = Path(config.out, "parts/part-00000.parquet")
    made = kept.stat().st_mtime_ns
    Path(config.out, "embeddings.json").unlink()
    Path(config.out, "parts/part-00001.parquet").unlink()
    again = embed(config)
    check_listed_parts(config.out)
    assert (again.parts_reused, again.already_finished) == (2, False)
    assert kept.stat().st_mtime_ns == made
    np.testing.assert_array_equal(
        np.stack(read_parts(config.out)["embedding"].to_numpy(zero_copy_only=False)), vectors
    )


@pytest.mark.usefixtures("ray_cluster")
def test_several_sources_are_one_after_the_other(config: EmbedConfig, tmp_path: Path) -> None:
    (tmp_path / "first.smi").write_text("CCBr last-by-name\n")
    several = dataclasses.replace(
        config, source=(*config.sources(), str(tmp_path / "first.smi")), id_column=None
    )
    assert embed(several).embeddings == 51
    table = read_parts(config.out)
    assert table["mol_id"].to_pylist()[-2:] == ["molecules_50", "last-by-name"]
    parts = json.loads(Path(config.out, "embeddings.json").read_text())["parts"]
    assert [part["source_uri"] for part in parts] == list(several.sources())
    assert embed(several).already_finished
    swapped = dataclasses.replace(several, source=several.sources()[::-1])
    with pytest.raises(ConfigError, match="differ in source: "):
        embed(swapped)


@pytest.mark.usefixtures("ray_cluster")
def test_a_checkpoint_that_is_not_there_is_named(config: EmbedConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such-model"):
        embed(dataclasses.replace(config, checkpoint=str(tmp_path / "no-such-model")))


@pytest.mark.usefixtures("ray_cluster")
def test_a_checkpoint_that_changes_meanwhile_ends_the_run_with_its_own_error(
    config: EmbedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The driver reads the weights first; what the actors find must not make Ray start actors for ever.
    loaded = load_encoder(config.checkpoint)
    other = loaded._replace(start=dataclasses.replace(loaded.start, fingerprint="0" * 64))
    monkeypatch.setattr(embed_module, "load_encoder", lambda _: other)
    with pytest.raises(CheckpointError, match="changed while"):
        embed(config)


@pytest.mark.usefixtures("ray_cluster")
def test_molecules_that_end_every_process_end_the_command(
    config: EmbedConfig, tmp_path: Path
) -> None:
    """As a part does for which there is not enough memory: by default Ray tries it again for ever."""
    tries = tmp_path / "tries"

    class Writer:
        job = SimpleNamespace(kind=EMBED, config=config)

        def write(self, number: int, split: str, shard: int) -> dict[str, object]:
            if number == 1:
                with tries.open("a") as file:
                    file.write("once\n")
                os._exit(1)
            return {"rows": 1, "reused": False}

    places = [{"number": number, "split": "train", "shard": number, "rows": 1} for number in (0, 1)]
    with pytest.raises(
        TrainingError, match=r"ended its process 4 times.*Parts made so far are kept"
    ):
        _run_actors(cast("PartWriter", Writer()), places)
    assert tries.read_text().splitlines() == ["once"] * 4
