"""Files from elsewhere can neither refer to files outside their folders nor fill the machine; see docs/security.md."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
from synthetic import write_dataset

from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.sources import archives
from moleblend_ray.errors import CheckpointError, DataError
from moleblend_ray.training.commits import COMMIT_FORMAT, COMMIT_NAME, read_commit, step_uri


@pytest.mark.parametrize(
    "name", ["../../../etc/cron.d/x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", "a\n"]
)
def test_a_checkpoint_from_elsewhere_cannot_choose_where_its_files_go(
    tmp_path: Path, name: str
) -> None:
    folder = Path(step_uri(str(tmp_path), 4))
    folder.mkdir(parents=True)
    marker = {
        "format": COMMIT_FORMAT,
        "step": 4,
        "world_size": 1,
        "files": [{"name": name, "num_bytes": 1, "sha256": "0" * 64}],
        "identity": {},
        "config_fingerprint": "",
        "versions": {},
        "created": "2026-01-01T00:00:00+00:00",
    }
    (folder / COMMIT_NAME).write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match="is no file name"):
        read_commit(str(tmp_path), 4)
    marker["files"] = [{"name": ".metadata", "num_bytes": 1, "sha256": "0" * 64}]
    (folder / COMMIT_NAME).write_text(json.dumps(marker))
    assert read_commit(str(tmp_path), 4).files[0].name == ".metadata"


@pytest.mark.parametrize(
    "path", ["../other/secret.parquet", "/etc/passwd", "train/../../x", "s3://other/x", "a\\..\\b"]
)
def test_a_data_set_from_elsewhere_cannot_name_files_that_are_not_its_own(
    tmp_path: Path, path: str
) -> None:
    uri = str(tmp_path / "data")
    write_dataset(uri, 20, shard_rows=10, row_group_rows=10)
    load_manifest(uri)
    file = tmp_path / "data" / MANIFEST_NAME
    manifest = json.loads(file.read_text())
    manifest["shards"][1]["path"] = path
    file.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="lies outside of the data set"):
        load_manifest(uri)


def test_members_that_expand_together_are_refused_as_one_would_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archives, "_EXPANSION_GRACE_BYTES", 1 << 20)
    monkeypatch.setattr(archives, "_MAX_EXPANSION", 20)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(40):
            archive.writestr(f"{number}.smi", b"C\n" * 50_000)
    members = archives._zip_members("bomb.zip", packed, lambda _: True)
    with pytest.raises(DataError, match="all together expand to more than 20 times the archive"):
        list(members)
