"""What tests of data share."""

from __future__ import annotations

import pytest
from source_files import LIMIT

from moleblend_ray.data.sources import reading, text


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of more than 1 MiB are too large."""
    monkeypatch.setattr(text, "MAX_RECORD_BYTES", LIMIT)
    monkeypatch.setattr(reading, "MAX_RECORD_BYTES", LIMIT)
