"""The description of the prepared data set names what the code writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moleblend_ray.chemistry.rejection import RejectionCode
from moleblend_ray.data.dataset.manifest import Counts, Manifest
from moleblend_ray.data.dataset.shards import MOLECULE_FIELDS, QUARANTINE_SCHEMA

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data-format.md").read_text()


def test_every_reason_column_and_key_is_described() -> None:
    names = [str(code) for code in RejectionCode]
    names += [field.name for field in MOLECULE_FIELDS] + QUARANTINE_SCHEMA.names
    names += [field.name for cls in (Manifest, Counts) for field in dataclasses.fields(cls)]
    assert [name for name in names if f"`{name}`" not in TEXT] == []
