"""Credentials put wherever a user may put them reach no file of a run, no log and no screen."""

from __future__ import annotations

import contextlib
import http.server
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch

from moleblend_ray import cli
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.hub import save_pretrained
from moleblend_ray.model.moleblend import MoleBlendModel

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MARK = f"s3cr3t{uuid.uuid4().hex}"
"""In every fake credential, so that whatever gets out is found."""

TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)
ROWS = [f"{'C' * (1 + row % 9)}{'ON'[row % 2]},{row}" for row in range(60)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a web server with molecules, which asks for no credentials and takes any."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "mols.csv").write_text("\n".join(["smiles,size", *ROWS, "not a molecule,1"]) + "\n")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "SOME_PASSWORD"):
        monkeypatch.setenv(name, f"{MARK}{name.lower()}")


def presigned(site: str, name: str = "mols.csv") -> str:
    return f"http://{site}/{name}?X-Amz-Credential={MARK}id&X-Amz-Signature={MARK}sig&Expires=9"


def with_user(site: str, name: str = "mols.csv") -> str:
    return f"http://{MARK}user:{MARK}password@{site}/{name}"


def texts_of(path: Path) -> Iterator[bytes]:
    """The content of a file; of a Parquet file, where it is compressed, its cells and metadata as well."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        yield repr(table.to_pylist()).encode()
        yield repr(table.schema.metadata).encode()


def leaks(*folders: Path) -> list[str]:
    """Files that hold a secret."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    found = []
    for path in files:
        # Ray's own files come and go.
        with contextlib.suppress(FileNotFoundError):
            if any(MARK.encode() in text for text in texts_of(path)):
                found.append(str(path))
    return found


def session_logs() -> Path:
    node = ray._private.worker.global_worker.node
    assert node is not None
    return Path(node.get_logs_dir_path())


def run(
    capfd: pytest.CaptureFixture[str], arguments: list[str], *, status: int = cli.EXIT_ERROR
) -> str:
    """What a command shows, which holds no secret."""
    assert cli.main(arguments) == status
    shown = "".join(capfd.readouterr())
    assert MARK not in shown
    return shown


@pytest.mark.usefixtures("ray_cluster", "secrets")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_from_molecules_to_embeddings_nothing_is_written_down(
    site: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    log_format: str,
) -> None:
    monkeypatch.setenv("MOLEBLEND_LOG_FORMAT", log_format)
    data, out = tmp_path / "data", tmp_path / "run"
    sources = f"source=['{presigned(site)}','{with_user(site)}']"
    shown = run(capfd, ["prepare", sources, f"out={data}", "valid_fraction=0.1"], status=0)
    assert "***" in shown
    if log_format == "text":
        small = ["num_layers=1", "dim=16", "ffn_dim=16", "num_heads=2", "num_kernels=4"]
        settings = [
            # No coordinates: that must be asked for.
            "loss.denoise_weight=0",
            "loss.direction_weight=0",
            *(f"model.{setting}" for setting in [*small, "pair_dim=2"]),
            "order.global_batch_size=8",
            "order.num_streams=2",
            "stream.micro_batch_size=4",
            "train.num_steps=4",
            "tracking.mode=offline",
            f"tracking.dir={tmp_path / 'wandb'}",
        ]
        monkeypatch.setenv("WANDB_MODE", "offline")
        run(capfd, ["pretrain", f"data={data}", f"out={out}", *settings], status=0)
        assert any((tmp_path / "wandb").rglob("*.wandb"))
    else:
        torch.manual_seed(0)
        save_pretrained(MoleBlendModel(TINY), str(out))
        vectors = tmp_path / "vectors"
        source = f"source='{presigned(site)}'"
        arguments = ["embed", f"checkpoint={out}", source, f"out={vectors}", "conformers=false"]
        run(capfd, arguments, status=0)
    assert leaks(tmp_path, session_logs()) == []


@pytest.mark.usefixtures("ray_cluster", "secrets")
def test_results_of_a_fine_tuning_name_the_source_without_its_signature(
    site: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    save_pretrained(MoleBlendModel(TINY), str(tmp_path / "model"))
    out = tmp_path / "out"
    arguments = [
        "task.name=size",
        f"task.source='{presigned(site)}'",
        "task.columns=[size]",
        "task.kind=regression",
        "task.split=random",
        "task.conformers=0",
        f"checkpoint={tmp_path / 'model'}",
        f"out={out}",
        "finetune.epochs=1",
        "seeds=[1]",
        "baseline.kinds=[]",
        "cluster.num_workers=1",
    ]
    run(capfd, ["finetune", *arguments], status=0)
    assert (out / "results.json").is_file()
    assert leaks(tmp_path, session_logs()) == []


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("address", [presigned, with_user])
def test_errors_and_dry_runs_show_no_credentials(
    site: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    address: object,
    log_format: str,
) -> None:
    monkeypatch.setenv("MOLEBLEND_LOG_FORMAT", log_format)
    monkeypatch.setenv("MOLEBLEND_STORAGE_RETRY_S", "0")
    make = presigned if address is presigned else with_user
    missing = f"source='{make(site, 'missing.csv')}'"
    assert "missing.csv" in run(capfd, ["prepare", missing, f"out={tmp_path / 'a'}"])
    run(capfd, ["prepare", missing, f"out={tmp_path / 'a'}", "--dry-run"], status=0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{MARK}user:{MARK}password@127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"{MARK}keyid")
    shown = run(capfd, ["prepare", "source=s3://bucket/mols.csv", f"out={tmp_path / 'b'}"])
    assert "s3://bucket/mols.csv" in shown
