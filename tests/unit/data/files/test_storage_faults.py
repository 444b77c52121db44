"""Storage behind a failing proxy: the same bytes, faults that really occurred, no retries of denied requests."""

from __future__ import annotations

import os
import random
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp import ClientConnectionError, ClientResponseError
from botocore.exceptions import ClientError, IncompleteReadError, ReadTimeoutError
from fault_proxy import FaultProxy

from moleblend_ray.data.files import retry, storage, storage_clients
from moleblend_ray.errors import ConfigError, StorageError


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
        calls: list[int] = []

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


def test_the_last_error_is_raised_before_a_wait_beyond_the_budget(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds)
    )
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setenv(retry.RETRY_VARIABLE, "100")
    errors: list[ConnectionResetError] = []

    def call() -> None:
        errors.append(ConnectionResetError())
        raise errors[-1]

    with pytest.raises(ConnectionResetError) as caught:
        retry.retried("read", "s3://key:hunter2@bucket/k", call)
    assert caught.value is errors[-1]
    # Waits are at most 15 s.
    assert 85 <= now[0] <= 100
    assert len(caplog.messages) == len(errors) - 1
    assert caplog.messages[0].startswith("Cannot read s3://***@bucket/k (ConnectionResetError)")


def s3_failure(code: str, status: int) -> Exception:
    """As s3fs raises it: an error of its own, caused by that of botocore."""
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    failure = OSError(5, "Input/output error")
    failure.__cause__ = ClientError(answer, "GetObject")
    return failure


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        # What some servers answer with a status of their own.
        *((s3_failure(code, 400), True) for code in ("RequestTimeout", "Throttling", "SlowDown")),
        (s3_failure("NoSuchUpload", 404), True),
        (s3_failure("OperationAborted", 409), True),
        *((s3_failure("?", status), True) for status in (429, 500, 502, 503, 504)),
        (s3_failure("NoSuchKey", 404), False),
        (s3_failure("AccessDenied", 403), False),
        (s3_failure("InvalidAccessKeyId", 403), False),
        (ClientResponseError(Mock(), (), status=503), True),
        (ClientResponseError(Mock(), (), status=404), False),
        (ClientConnectionError(), True),
        (IncompleteReadError(actual_bytes=1, expected_bytes=2), True),
        (ReadTimeoutError(endpoint_url="x"), True),
        (TimeoutError(), True),
        (retry.ShortReadError(), True),
        (FileNotFoundError(), False),
        (OSError(28, "No space left on device"), False),
        (ValueError(), False),
    ],
)
def test_what_may_succeed_later_is_told_from_what_may_not(error: Exception, expected: bool) -> None:
    assert retry.is_transient(error) == expected


def test_a_range_that_came_short_is_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    content = bytes(range(100))
    cuts = iter([7, 0, 0])

    def cat_file(path: str, start: int, end: int) -> bytes:
        return content[start : end - next(cuts)]

    monkeypatch.setattr(storage, "size", lambda uri: 100)
    monkeypatch.setattr(storage_clients, "resolve", lambda uri: (Mock(cat_file=cat_file), "x"))
    with storage.open_read("s3://bucket/x") as stream:
        assert stream.read() == content
    assert next(cuts, None) == 0, "one range was fetched twice"


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_budget_that_is_no_number_of_seconds_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    for variable, read in (
        (retry.RETRY_VARIABLE, retry.retry_seconds),
        (retry.TIMEOUT_VARIABLE, retry.timeout_seconds),
    ):
        monkeypatch.setenv(variable, "7")
        assert read() == 7.0
        monkeypatch.setenv(variable, text)
        with pytest.raises(ConfigError, match=f"{variable} is '{text}'"):
            read()
        monkeypatch.delenv(variable)


class HttpError(Exception):
    """As in gcsfs: no OSError, with the status as an attribute."""

    def __init__(self, code: int | str, message: str) -> None:
        super().__init__(f"{message}, {code}")
        self.code = code


class GoogleAuthError(Exception):
    """As in google.auth."""


class TransportError(GoogleAuthError):
    """As in google.auth."""


class RefreshError(GoogleAuthError):
    """As in google.auth."""


class ChecksumError(Exception):
    """As in gcsfs."""


class ProxyError(OSError):
    """As in requests; gcsfs raises it for status 502."""


class Bucket:
    """A file system whose reads fail with the given errors before they succeed."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def _strip_protocol(self, uri: str) -> str:
        return uri.removeprefix("gs://")

    def cat_file(self, path: str, **_: int) -> bytes:
        if self.errors:
            raise self.errors.pop(0)
        return path.encode()


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a bucket behind gs://, with the exceptions of packages that are optional."""
    content: dict[str, dict[str, type[Exception]]] = {
        "gcsfs.retry": {"HttpError": HttpError, "ChecksumError": ChecksumError},
        "google.auth.exceptions": {
            "GoogleAuthError": GoogleAuthError,
            "TransportError": TransportError,
        },
        "requests.exceptions": {
            "ConnectionError": ProxyError,
            "Timeout": ProxyError,
            "ChunkedEncodingError": ProxyError,
        },
    }
    for name, members in content.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("time.sleep", lambda _: None)

    def put(bucket: Bucket) -> None:
        monkeypatch.setattr(storage_clients, "_filesystem", lambda *_: bucket)

    return put


@pytest.mark.parametrize(
    "error",
    [
        HttpError(503, "backend error"),
        HttpError("429", "rate limit"),
        ProxyError(),
        TransportError("no route"),
        ChecksumError("md5"),
    ],
    ids=repr,
)
def test_what_google_s_storage_fails_at_for_a_while_is_tried_again(
    google: Any, error: Exception
) -> None:
    bucket = Bucket(error, error)
    google(bucket)
    assert storage.read_range("gs://b/k", 0, 3) == b"b/k"
    assert not bucket.errors


def test_a_range_behind_the_end_is_empty_in_google_s_storage_too(google: Any) -> None:
    google(Bucket(HttpError(416, "The requested range cannot be satisfied.")))
    assert storage.read_range("gs://b/k", 9, 3) == b""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HttpError(401, "Anonymous caller"), "no valid credentials.*Anonymous caller.*gcloud auth"),
        (RefreshError("expired"), "no valid credentials.*expired.*GOOGLE_APPLICATION_CREDENTIALS"),
        (OSError("Forbidden: b/k"), "access was denied.*Check the credentials"),
        (HttpError(400, "bad request"), "Cannot read gs://b/k: HttpError: bad request, 400"),
    ],
    ids=repr,
)
def test_what_google_s_storage_refuses_is_told_at_once(
    google: Any, error: Exception, message: str
) -> None:
    bucket = Bucket(error, AssertionError("tried again"))
    google(bucket)
    with pytest.raises(StorageError, match=message):
        storage.read_bytes("gs://b/k")
    assert len(bucket.errors) == 1


def test_google_s_storage_that_stays_away_is_an_error_of_the_storage(
    google: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(retry.RETRY_VARIABLE, "0")
    google(Bucket(HttpError(503, "backend error")))
    with pytest.raises(StorageError, match=r"Cannot read gs://b/k: .*backend error, 503"):
        storage.read_bytes("gs://b/k")
