"""Storage behind a failing proxy: the same bytes, faults that really occurred, no retries of denied requests."""

from __future__ import annotations

import os
import random

import pytest
from fault_proxy import FaultProxy

from moleblend_ray.data import retry, storage
from moleblend_ray.errors import ConfigError


def test_writes_and_streams_behind_a_failing_proxy_give_the_same_bytes(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(0).randbytes(9 << 20)
    upstream = os.environ["AWS_ENDPOINT_URL"]
    with FaultProxy(upstream, rate=0.3, seed=7) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for index in range(6):
            uri = storage.join(s3_uri, f"{index}.bin")
            part = content[index << 10 :]
            storage.write_bytes(uri, part)
            with storage.open_read(uri) as stream:
                assert stream.read(100) == part[:100]
                assert stream.read() == part[100:]
        assert len(storage.list_files(s3_uri)) == 6
    assert proxy.faults >= 5, proxy.counts
    monkeypatch.setenv("AWS_ENDPOINT_URL", upstream)
    assert storage.read_bytes(storage.join(s3_uri, "5.bin")) == content[5 << 10 :]


def test_a_transient_failure_is_tried_again_and_a_refusal_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    for error, expected in ((ConnectionResetError(), 3), (PermissionError(), 1)):
        calls = []

        def call(error: Exception = error, calls: list[int] = calls) -> int:
            calls.append(1)
            if len(calls) < 3:
                raise error
            return 7

        if expected == 3:
            assert retry.retried("read", "s3://b/k", call) == 7
        else:
            with pytest.raises(PermissionError):
                retry.retried("read", "s3://b/k", call)
        assert len(calls) == expected


def test_waits_double_up_to_the_longest_and_are_shortened_by_half_at_most() -> None:
    for num_failures, longest in [(1, 0.2), (2, 0.4), (3, 0.8), (8, 15.0), (100_000, 15.0)]:
        waits = [retry.backoff_seconds(num_failures, 0.2, 15.0) for _ in range(200)]
        assert longest / 2 <= min(waits) < 0.6 * longest
        assert 0.9 * longest < max(waits) <= longest


def test_a_budget_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retry.RETRY_VARIABLE, "soon")
    with pytest.raises(ConfigError, match="MOLEBLEND_STORAGE_RETRY_S is 'soon'"):
        retry.retry_seconds()
