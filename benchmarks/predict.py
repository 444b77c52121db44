"""`moleblend predict` and `moleblend embed` from end to end: ZINC SMILES without coordinates, ZINC with conformers.

    python benchmarks/predict.py [--molecules 250000] [--model small] [--ensemble 1] [--actors 2] [--gpu]

The models are new: how fast they are does not depend on what they learnt. Their training molecules are the
first of ZINC (--training), so that likeness is part of the work. SMILES are prepared by the command
itself (2D), molecules with conformers beforehand. Rates are those of the commands: molecules in parts over the time
from the start of the actors to the last part, model and fingerprints loaded by each actor included; wall times begin
with the command's start. The sources are those beside the project if they are there, else sample molecules
made here. Prints one JSON line last.
"""

from __future__ import annotations

import os

# One thread a process: `--actors` is what uses the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Commands follow each other here. A thread that Ray Data leaves behind would otherwise start a cluster of its own.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

import argparse
import csv
import gzip
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from moleblend_ray.chemistry.samples import write_samples
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.compose import model_preset
from moleblend_ray.config.downstream import EmbedConfig, PredictConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.evaluation.models.property_model import (
    Standardisation,
    TrainedProperty,
    save_property_model,
)
from moleblend_ray.evaluation.molecules.applicability import ApplicabilityDomain, save_domain
from moleblend_ray.evaluation.tasks import TaskKind
from moleblend_ray.model.hub import save_pretrained
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel
from moleblend_ray.orchestration.library.embed import EmbedSummary, embed
from moleblend_ray.orchestration.library.predict import PredictSummary, predict
from moleblend_ray.orchestration.preparation.prepare import prepare

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--molecules", type=int, default=250_000, help="of each source, at most")
    parser.add_argument("--model", default="small", help="preset of conf/model")
    parser.add_argument("--ensemble", type=int, default=1, help="models that predict")
    parser.add_argument("--training", type=int, default=2_000, help="training molecules")
    parser.add_argument("--actors", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each actor")
    arguments = parser.parse_args()
    result: dict[str, object] = {
        "benchmark": "predict",
        **vars(arguments),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if arguments.gpu else "cpu",
    }
    with tempfile.TemporaryDirectory() as folder:
        smiles = smiles_file(folder, arguments.molecules)
        models = save_models(folder, arguments, training_smiles(smiles, arguments.training))
        conformers = prepared_conformers(folder, arguments.molecules)
        for name, source in (("smiles_2d", smiles), ("prepared_3d", conformers)):
            for command in ("predict", "embed"):
                figures = measure(command, models, source, folder, arguments)
                print(f"{name} {command}: {figures}", flush=True)
                result[f"{name}_{command}"] = figures
    print(json.dumps(result))


def smiles_file(folder: str, molecules: int) -> str:
    """A table of SMILES."""
    path = Path(folder) / "zinc.csv"
    zinc = SHARED / "zinc250k_smiles.csv.gz"
    if zinc.exists():
        with gzip.open(zinc, "rt") as lines:
            path.write_text("".join(itertools.islice(lines, molecules + 1)))
        return str(path)
    samples = Path(folder) / "samples.parquet"
    write_samples(str(samples), molecules)
    texts = pq.read_table(samples, columns=["smiles"])["smiles"].to_pylist()
    path.write_text("\n".join(["smiles", *texts]) + "\n")
    return str(path)


def training_smiles(path: str, count: int) -> list[str]:
    """The first SMILES of the table."""
    with open(path, newline="") as lines:
        return [row["smiles"] for row in itertools.islice(csv.DictReader(lines), count)]


def prepared_conformers(folder: str, molecules: int) -> str:
    """A prepared data set of molecules with coordinates."""
    path, out = Path(folder) / "conformers.parquet", str(Path(folder) / "conformers")
    zinc = SHARED / "zinc_conformers29k.parquet"
    if zinc.exists():
        pq.write_table(pq.read_table(zinc).slice(0, molecules), path)
    else:
        write_samples(str(path), min(molecules, 5_000))
    prepare(PrepareConfig(source=str(path), out=out, valid_fraction=0.0))
    return out


def save_models(folder: str, arguments: argparse.Namespace, training: list[str]) -> list[str]:
    """Folders of fine-tuned models, and in ``pretrained`` the encoder of the first."""
    trained = TrainedProperty(
        task="benchmark",
        kind=TaskKind.REGRESSION,
        columns=("y",),
        unit="",
        standardisation=Standardisation(mean=np.zeros(1), std=np.ones(1)),
    )
    domain = ApplicabilityDomain.of(training)
    uris = []
    for seed in range(arguments.ensemble):
        torch.manual_seed(seed)
        encoder = MoleBlendModel(model_preset(arguments.model))
        uris.append(str(Path(folder) / f"model-{seed}"))
        save_domain(domain, uris[-1])
        save_property_model(PropertyModel(encoder, 1), trained, uris[-1])
        if seed == 0:
            save_pretrained(encoder, str(Path(folder) / "pretrained"))
    return uris


def measure(
    command: str, models: list[str], source: str, folder: str, arguments: argparse.Namespace
) -> dict[str, float | int]:
    """Figures of one command on one source, into a fresh folder."""
    cluster = ClusterConfig(num_data_actors=arguments.actors, use_gpu=arguments.gpu)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        summary: PredictSummary | EmbedSummary
        if command == "predict":
            summary = predict(
                PredictConfig(
                    models=tuple(models),
                    source=source,
                    out=out,
                    batch_size=arguments.batch_size,
                    conformers=0,
                    cluster=cluster,
                )
            )
            count = summary.predictions
        else:
            summary = embed(
                EmbedConfig(
                    checkpoint=str(Path(folder) / "pretrained"),
                    source=source,
                    out=out,
                    batch_size=arguments.batch_size,
                    conformers=False,
                    cluster=cluster,
                )
            )
            count = summary.embeddings
    assert summary.molecules_per_s is not None
    return {
        "molecules": count,
        "rejected": summary.rejected,
        "molecules_per_s": round(summary.molecules_per_s, 1),
        "wall_s": round(summary.seconds, 1),
        "molecules_per_wall_s": round(count / summary.seconds, 1),
    }


if __name__ == "__main__":
    main()
