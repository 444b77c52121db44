"""Predictions of a fine-tuning's models: every row once, the same from parts that were made before, also as one table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import PredictConfig
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.models.property_model import (
    Standardisation,
    TrainedProperty,
    save_property_model,
)
from moleblend_ray.evaluation.molecules.applicability import ApplicabilityDomain, save_domain
from moleblend_ray.evaluation.tasks import TaskKind
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel
from moleblend_ray.orchestration.library.part_writer import read_shard
from moleblend_ray.orchestration.library.predict import load_predictor, predict
from moleblend_ray.orchestration.preparation import molecules as molecules_module

pytestmark = pytest.mark.ray

TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)
SMILES = ["C" * (1 + row % 7) + "ONS"[row % 3] + "C" * (row % 4) for row in range(30)]
SEEDS = (0, 4)


@pytest.fixture
def config(tmp_path: Path) -> PredictConfig:
    """Two models of a finished fine-tuning, and 30 molecules with a row among them that is none."""
    trained = TrainedProperty(
        task="esol",
        kind=TaskKind.REGRESSION,
        columns=("y",),
        unit="log10(mol/L)",
        standardisation=Standardisation(mean=np.array([-3.0]), std=np.array([2.0])),
    )
    esol = tmp_path / "esol"
    for seed in SEEDS:
        torch.manual_seed(seed)
        folder = str(esol / f"models/seed-{seed}")
        save_domain(ApplicabilityDomain.of(SMILES[:8]), folder)
        save_property_model(PropertyModel(MoleBlendModel(TINY), 1), trained, folder)
    entries = [{"seed": seed, "model": f"models/seed-{seed}"} for seed in SEEDS]
    storage.write_json(str(esol / "results.json"), {"final": {"seeds": entries}})
    rows = [f"id-{row},{text}" for row, text in enumerate(SMILES)]
    rows.insert(10, "id-bad,not a molecule")
    (tmp_path / "molecules.csv").write_text("name,smiles\n" + "\n".join(rows) + "\n")
    return PredictConfig(
        models=str(esol),
        source=str(tmp_path / "molecules.csv"),
        out=str(tmp_path / "out"),
        id_column="name",
        conformers=0,
        cluster=ClusterConfig(num_data_actors=1),
    )


@pytest.mark.usefixtures("ray_cluster")
def test_every_row_is_predicted_once_and_what_is_missing_is_made_again(
    config: PredictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(molecules_module, "_FEWEST_ROWS", 20)
    config = dataclasses.replace(config, atom_contributions=True)
    summary = predict(config)
    assert (summary.predictions, summary.rejected, summary.parts, summary.models) == (30, 1, 2, 2)
    assert summary.rejected_by_reason == {"unparsable_smiles": 1}
    out = Path(config.out)
    paths = sorted(out.glob("parts/*.parquet"))
    table = pa.concat_tables(map(pq.read_table, paths))
    assert table["mol_id"].to_pylist() == [f"id-{row}" for row in range(30)]
    assert pq.read_table(out / "rejected.parquet")["mol_id"].to_pylist() == ["id-bad"]
    assert pq.read_schema(paths[0]).field("prediction:y").metadata[b"unit"] == b"log10(mol/L)"
    in_training = np.isin(np.arange(30), range(8))
    assert (table["similarity"].to_numpy()[in_training] == 1.0).all()

    # What the actors wrote is what the models say here.
    predictor = load_predictor(config, torch.device("cpu"))
    data = str(out / "prepared")
    manifest = load_manifest(data)
    here = predictor.part(read_shard(data, manifest, manifest.shards_of("train")[0]))
    assert pq.read_table(paths[0]).equals(here)

    stored = json.loads((out / "predictions.json").read_text())
    assert stored["predictions"] + stored["rejected"] == 31
    assert stored["molecules_per_s"] > 0
    models = [
        (Path(model["uri"]).name, model["training_fingerprints"]) for model in stored["models"]
    ]
    assert models == [("seed-0", 8), ("seed-4", 8)]

    # As a kill in the middle leaves it: no summary, a part missing.
    made = paths[0].stat().st_mtime_ns
    (out / "predictions.json").unlink()
    paths[1].unlink()
    again = predict(config)
    assert (again.parts_reused, again.already_finished) == (1, False)
    assert paths[0].stat().st_mtime_ns == made
    assert pa.concat_tables(map(pq.read_table, paths)).equals(table)

    as_csv = predict(dataclasses.replace(config, csv=True))
    assert as_csv.already_finished
    written = pa.csv.read_csv(out / "predictions.csv")
    assert written.column_names == table.column_names
    assert written["prediction:y"].to_pylist() == table["prediction:y"].to_pylist()
    of_atoms = table["atom_contributions:y"].to_pylist()
    for text, expected in zip(written["atom_contributions:y"].to_pylist(), of_atoms, strict=True):
        np.testing.assert_allclose(json.loads(text), expected, rtol=1e-5)

    with pytest.raises(ConfigError, match=r"applicability: None there, 0\.5 here"):
        predict(dataclasses.replace(config, applicability=0.5))
