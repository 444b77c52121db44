"""What `--help` and `--dry-run` show of a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moleblend_ray.config.describe import (
    changed_settings,
    describe,
    field_docs,
    json_values,
    redact,
)
from moleblend_ray.config.paths import path_settings, with_absolute_paths
from moleblend_ray.config.prepare import PrepareConfig


def test_every_key_has_a_type_a_default_and_a_docstring() -> None:
    keys = {key.path: key for key in describe(PrepareConfig)}
    assert keys["source"].default == "required"
    assert keys["featurize.conformers.generate"].default == "false"
    assert keys["label_columns"].type == "list of str or null"
    assert all(key.doc for key in keys.values())


def test_a_docstring_follows_its_field() -> None:
    assert field_docs(PrepareConfig)["split_seed"] == "Seed of that hash."


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("api_key", "abc", "***"),
        ("aws_secret_access_key", "abc", "***"),
        ("password", "", ""),
        ("source", "s3://key:secret@bucket/x", "s3://***@bucket/x"),
        (
            "source",
            "https://h/x?X-Amz-Signature=abc&part=1",
            "https://h/x?X-Amz-Signature=***&part=1",
        ),
        ("source", "s3://bucket/x@2", "s3://bucket/x@2"),
        ("source", "data/a.sdf", "data/a.sdf"),
    ],
)
def test_secrets_and_credentials_in_uris_are_hidden(key: str, value: str, shown: str) -> None:
    assert redact({"section": {key: [value]}}) == {"section": {key: [shown]}}


def test_changed_settings_are_those_that_differ_from_their_defaults() -> None:
    config = PrepareConfig(source="s3://u:p@b/x", out="o", rows_per_chunk=10)
    assert changed_settings(config) == {
        "source": "s3://***@b/x",
        "out": "o",
        "rows_per_chunk": "10",
    }


def test_local_paths_become_absolute_and_uris_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(PrepareConfig(source="s3://b/x", out="runs/o"))
    assert path_settings(config) == {"source": "s3://b/x", "out": str(tmp_path / "runs/o")}
    config = with_absolute_paths(PrepareConfig(source=("a.csv", "s3://b/x"), out="/o"))
    assert path_settings(config) == {
        "source[0]": str(tmp_path / "a.csv"),
        "source[1]": "s3://b/x",
        "out": "/o",
    }


def test_json_values_are_strict_json_without_secrets() -> None:
    value = {"a": [float("nan"), 1.5, (float("-inf"), 2)], "api_key": "hunter2", "n": None}
    found = json_values(value)
    assert found == {"a": [None, 1.5, [None, 2]], "api_key": "***", "n": None}
    json.dumps(found, allow_nan=False)
