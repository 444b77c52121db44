"""Storage: the same behaviour on local disk and on an S3 server, clear errors, no incomplete files."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError

from moleblend_ray.data.files import storage, storage_clients
from moleblend_ray.data.sources import ColumnConfig, find_sources, inspect_sources, read_chunks
from moleblend_ray.errors import DataError, StorageError


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty directory or prefix on each kind of storage."""
    return str(tmp_path / "base") if request.param == "local" else request.getfixturevalue("s3_uri")


def test_what_is_written_is_read_back_whole_and_by_range(base: str) -> None:
    uri = storage.join(base, "deep/er", "file.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"old content")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_range(uri, 3, 4) == b"3456"
    assert storage.read_range(uri, 8, 100) == b"89"
    assert storage.read_range(uri, 10, 1) == storage.read_range(uri, 99, 1) == b""
    assert storage.size(uri) == 10
    assert storage.exists(uri)
    assert storage.exists(base)
    with storage.open_read(uri) as file:
        assert file.read(4) == b"0123"
        assert file.read() == b"456789"


def test_of_many_that_create_a_document_at_once_one_succeeds(base: str) -> None:
    uri = storage.join(base, "deep", "one.json")
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: storage.create_json(uri, [number]), range(8)))
    assert created.count(True) == 1
    assert storage.read_json(uri) == [created.index(True)]
    assert [file.uri for file in storage.list_files(base)] == [storage.absolute(uri)]
    # A request whose answer was lost is repeated, and meets what it made.
    assert storage.create_json(uri, storage.read_json(uri))
    assert not storage.create_json(uri, ["later"])


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_document_is_created_once_on_a_file_system_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no links")

    monkeypatch.setattr(os, "link", refuse)
    uri = str(tmp_path / "one.json")
    assert storage.create_json(uri, 1)
    assert not storage.create_json(uri, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]
    assert storage.read_json(uri) == 1


def test_a_document_is_created_once_in_a_store_without_conditional_writes(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, _ = storage_clients.resolve(s3_uri)
    pipe_file = filesystem.pipe_file

    def refuse(*arguments: Any, mode: str = "overwrite", **options: Any) -> Any:
        if mode != "create":
            return pipe_file(*arguments, **options)
        response = {
            "Error": {"Code": "NotImplemented"},
            "ResponseMetadata": {"HTTPStatusCode": 501},
        }
        raise ClientError(response, "PutObject")

    monkeypatch.setattr(filesystem, "pipe_file", refuse)
    assert storage.create_json(s3_uri + "/one.json", 1)
    assert not storage.create_json(s3_uri + "/one.json", 2)
    assert storage.read_json(s3_uri + "/one.json") == 1


def test_a_web_server_without_range_requests_gives_the_range(tmp_path: Path) -> None:
    content = bytes(range(256)) * 8
    (tmp_path / "file").write_bytes(content)
    # Python's own server ignores the header "Range" and sends the whole file.
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/file"
        for offset, length in [(0, 10), (100, 10), (2000, 48), (0, 2048), (0, 4096), (5, 0)]:
            expected = content[offset : offset + length]
            assert storage.read_range(uri, offset, length) == expected
        server.shutdown()


class WithoutRanges(SimpleHTTPRequestHandler):
    """Python's own server, which ignores the header "Range" and sends the whole file; it may also say so."""

    def __init__(self, *arguments: Any, says_so: bool, **options: Any) -> None:
        self.says_so = says_so
        super().__init__(*arguments, **options)

    def end_headers(self) -> None:
        if self.says_so:
            self.send_header("Accept-Ranges", "none")
        super().end_headers()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with contextlib.suppress(ConnectionError):  # the client has seen enough
            super().copyfile(source, outputfile)

    def log_message(self, *_: object) -> None:
        """Be silent."""


@pytest.fixture(params=[False, True], ids=["silent", "says so"])
def rangeless(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Address of a web server without range requests that serves the test's folder."""
    handler = partial(WithoutRanges, directory=str(tmp_path), says_so=request.param)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("offset", [0, 100, (32 << 20) - 50])
def test_a_range_of_a_large_file_takes_the_memory_of_the_range(
    rangeless: str, tmp_path: Path, offset: int
) -> None:
    content = bytes(range(256)) * (32 << 12)
    (tmp_path / "large").write_bytes(content)
    storage.exists(f"{rangeless}/large")  # imports the client
    tracemalloc.start()
    found = storage.read_range(f"{rangeless}/large", offset, 70)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == content[offset : offset + 70]
    assert peak_bytes < 4 << 20


def test_a_web_server_without_range_requests_is_named_where_they_are_needed(
    rangeless: str, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).bytes(9 << 20).hex()
    table = pa.table({"smiles": ["C", "C"], "noise": [noise[::2], noise[1::2]]})
    pq.write_table(table, tmp_path / "m.parquet")
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("m.csv", "smiles,noise\nC," + noise)
    for name in ("m.parquet", "m.zip"):
        assert (tmp_path / name).stat().st_size > 9 << 20
        with pytest.raises(StorageError) as caught:
            inspect_sources(find_sources(f"{rangeless}/{name}?token=hunter2"), ColumnConfig())
        uri = f"{rangeless}/{name}?token=***"
        assert str(caught.value) == (
            f"Cannot read {uri}: the server does not support range requests, which reading Parquet files, zip archives "
            f"and files of more than 8 MiB needs. Download the file first (curl -O '{uri}') and give its path, or put it "
            "into object storage."
        )


@pytest.mark.parametrize("num_bytes", [2048, 9 << 20])
def test_a_file_from_a_web_server_without_range_requests_is_read_in_order(
    rangeless: str, tmp_path: Path, num_bytes: int, request: pytest.FixtureRequest
) -> None:
    content = bytes(range(256)) * (num_bytes >> 8)
    (tmp_path / "file").write_bytes(content)
    with storage.open_read(f"{rangeless}/file") as stream:
        assert stream.read(100) == content[:100]
        assert stream.tell() == 100
        assert stream.seek(0, io.SEEK_CUR) == 100
        rest = iter(lambda: stream.read(1000), b"")
        if num_bytes > 8 << 20 and "silent" in request.node.name:
            with pytest.raises(StorageError, match=r"/file: the server does not support range"):
                list(rest)
        else:
            assert b"".join(rest) == content[100:]


class WithoutLength(BaseHTTPRequestHandler):
    """A server that makes files when they are asked for, and does not know their size before; a path names the way."""

    protocol_version = "HTTP/1.1"
    content: ClassVar = b"smiles,y\n" + b"CC,1\n" * 500_000
    is_cut: ClassVar = False
    """Whether a connection of which the end is that of the file is closed earlier."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        if self.path.startswith("/zero"):
            self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        whole, middle = self.content, len(self.content) // 2
        if self.path.startswith("/zero"):
            self.send_header("Content-Length", str(len(whole)))
            pieces = [whole]
        elif self.path.startswith("/closing"):
            self.send_header("Connection", "close")
            pieces = [whole[:middle] if self.is_cut else whole]
        else:
            self.send_header("Transfer-Encoding", "chunked")
            parts = [whole[:middle], whole[middle:], b""]
            pieces = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts]
            if self.path.startswith("/broken"):
                self.close_connection = True
                pieces = pieces[:1]
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has seen enough
            for piece in pieces:
                self.wfile.write(piece)

    def log_message(self, *_: object) -> None:
        """Be silent."""


@pytest.fixture
def lengthless(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a web server that does not say how large files are."""
    monkeypatch.setenv("MOLEBLEND_STORAGE_RETRY_S", "0")
    with ThreadingHTTPServer(("127.0.0.1", 0), WithoutLength) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("way", ["chunked", "closing", "zero"])
def test_a_source_whose_size_a_web_server_does_not_say_is_read_whole(
    lengthless: str, way: str
) -> None:
    uri = f"{lengthless}/{way}.csv"
    size = len(WithoutLength.content)
    assert storage.size(uri) == size
    assert storage.list_files(uri) == [storage.FileInfo(uri, size)]
    (layout,) = inspect_sources(find_sources(uri), ColumnConfig()).layouts
    assert (layout.file.size, layout.columns) == (size, ("smiles", "y"))
    assert sum(chunk.num_rows for chunk in read_chunks(layout, 0, 100_000)) == 500_000


def test_a_file_of_unknown_size_that_breaks_off_is_an_error(lengthless: str) -> None:
    uri = f"{lengthless}/broken.csv"
    with pytest.raises(StorageError, match=rf"Cannot read {uri}: .*[Pp]ayload"):
        find_sources(uri)


def test_a_file_whose_end_is_that_of_the_connection_is_as_long_as_when_it_was_looked_at(
    lengthless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{lengthless}/closing.csv"
    (layout,) = inspect_sources(find_sources(uri), ColumnConfig()).layouts
    monkeypatch.setattr(WithoutLength, "is_cut", True)
    size = len(WithoutLength.content)
    with pytest.raises(DataError, match=f"ended after {size // 2:,} of {size:,} bytes"):
        list(read_chunks(layout, 0, 100_000))


class AnsweringWith(BaseHTTPRequestHandler):
    """Answers every request with the status that its path names."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Be silent."""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a web server; below it, a path is the status of the answer."""
    monkeypatch.setenv("MOLEBLEND_STORAGE_RETRY_S", "0")
    with ThreadingHTTPServer(("127.0.0.1", 0), AnsweringWith) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("look", [storage.size, storage.exists])
@pytest.mark.parametrize(
    ("status", "message"), [(403, r"access was denied \(403"), (500, "500, message='Internal")]
)
def test_a_web_server_that_refuses_or_fails_is_not_said_to_lack_the_file(
    web: str, look: Callable[[str], object], status: int, message: str
) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        look(f"{web}/{status}")
    assert not isinstance(caught.value, storage.NotFoundError)


def test_a_web_server_that_has_no_such_file_is_believed(web: str) -> None:
    assert not storage.exists(f"{web}/404")
    with pytest.raises(storage.NotFoundError, match="does not exist"):
        storage.size(f"{web}/410")


def test_a_web_server_that_is_down_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLEBLEND_STORAGE_RETRY_S", "0")
    for look in (storage.size, storage.exists, storage.open_read, storage.read_bytes):
        with pytest.raises(
            StorageError, match=r"cannot be reached .*Check the network and the address"
        ):
            look("http://127.0.0.1:9/x.csv")


@pytest.mark.parametrize(
    ("uri", "checked"),
    [
        ("s3://bucket/x", "the network and AWS_ENDPOINT_URL"),
        ("gs://bucket/x", "the network"),
        ("https://host/x", "the network and the address"),
    ],
)
def test_where_nobody_answers_only_what_says_where_the_storage_is_is_to_be_checked(
    uri: str, checked: str
) -> None:
    with (
        pytest.raises(StorageError, match=rf"cannot be reached \(down\)\. Check {checked}\.$"),
        storage.translate_errors("read", uri),
    ):
        raise ConnectionError("down")


def test_an_impossible_web_address_is_named_as_such() -> None:
    for look in (storage.size, storage.exists, storage.open_read):
        with pytest.raises(
            StorageError, match=r"http://\[::1/x is not a web address \(Invalid IPv6"
        ):
            look("http://[::1/x")


def test_listings_are_sorted_and_see_a_new_file_at_once(base: str) -> None:
    for name in ("b.csv", "a.csv", "sub/c.csv", "d.sdf"):
        storage.write_bytes(storage.join(base, name), name.encode())
        storage.list_files(base)
    root = storage.absolute(base)
    names = [file.uri.removeprefix(root + "/") for file in storage.list_files(base)]
    assert names == ["a.csv", "b.csv", "d.sdf", "sub/c.csv"]
    assert [file.size for file in storage.list_files(base)] == [5, 5, 5, 9]
    globbed = storage.list_files(storage.join(base, "*.csv"))
    assert [storage.name_of(file.uri) for file in globbed] == ["a.csv", "b.csv"]
    assert storage.read_bytes(globbed[0].uri) == b"a.csv"
    (single,) = storage.list_files(storage.join(base, "a.csv"))
    assert single == globbed[0]


def test_upload_download_and_delete(base: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100_000)
    uri = storage.join(base, "tree/object")
    storage.upload(source, uri)
    storage.download(uri, tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == source.read_bytes()
    storage.write_bytes(storage.join(base, "tree/second"), b"")
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)
    storage.delete_tree(storage.join(base, "tree"))
    storage.delete_tree(storage.join(base, "tree"))
    assert not storage.exists(storage.join(base, "tree/second"))


@pytest.mark.parametrize("name", ["run[1]", "run?", "run*"])
def test_a_name_that_looks_like_a_pattern_deletes_nothing_else(base: str, name: str) -> None:
    for folder in (name, "run1"):
        storage.write_bytes(storage.join(base, folder, "sub/shard"), b"x")
    storage.delete_tree(storage.join(base, name))
    root = storage.absolute(base)
    left = [file.uri.removeprefix(root + "/") for file in storage.list_files(base)]
    assert left == ["run1/sub/shard"]


def test_json_is_the_same_bytes_for_equal_values(base: str) -> None:
    one, two = storage.join(base, "1.json"), storage.join(base, "2.json")
    storage.write_json(one, {"b": [1, 2.5], "a": "Ångström"})
    storage.write_json(two, {"a": "Ångström", "b": [1, 2.5]})
    assert storage.read_bytes(one) == storage.read_bytes(two)
    assert storage.read_json(one) == {"a": "Ångström", "b": [1, 2.5]}
    # Other programs read no NaN.
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(two, {"a": float("nan")})
    storage.write_bytes(two, b'{"a": ')
    with pytest.raises(DataError, match=r"2\.json is not a JSON document"):
        storage.read_json(two)


def test_a_tilde_is_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes("~/runs/a", b"x")
    assert storage.absolute("~/runs/a") == str(tmp_path / "runs/a")
    assert (tmp_path / "runs/a").read_bytes() == storage.read_bytes("~/runs/a") == b"x"


def test_an_object_of_another_program_is_told_by_what_it_lacks(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.json")
    storage.write_json(uri, {"task": {"name": "esol", "unit": None}, "trials": []})
    members = {"task.name": str, "task.unit": str | None, "trials": list[Any]}
    assert storage.read_object(uri, members)["trials"] == []
    for member in ("final", "task.metric", "task.name.first", "trials.0"):
        with pytest.raises(
            DataError, match=rf"a\.json has no '{member}'.*another program wrote it"
        ):
            storage.read_object(uri, {"task": Any, member: Any})
    with pytest.raises(
        DataError, match=r"a\.json is wrong: task\.name: expected int, found 'esol'"
    ):
        storage.read_object(uri, {"task.name": int})
    others: list[Any] = [[], 3, None, "task"]
    for value in others:
        storage.write_json(uri, value)
        with pytest.raises(DataError, match=r"a\.json holds no JSON object"):
            storage.read_object(uri)


@pytest.mark.parametrize(
    "read",
    [
        storage.read_bytes,
        storage.size,
        storage.open_read,
        storage.list_files,
        lambda uri: storage.read_range(uri, 0, 1),
    ],
)
def test_a_missing_file_is_named(base: str, read: object) -> None:
    uri = storage.join(base, "not-there.csv")
    with pytest.raises(storage.NotFoundError, match=r"not-there\.csv: it does not exist"):
        read(uri).read() if read is storage.open_read else read(uri)  # type: ignore[operator]


def test_files_and_directories_are_not_mixed_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert not storage.exists(str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match="is a directory, where a file is expected"):
        storage.size(str(tmp_path))


def test_nothing_is_below_a_file(base: str) -> None:
    storage.write_bytes(storage.join(base, "molecules.csv"), b"smiles")
    below = storage.join(base, "molecules.csv", "manifest.json")
    assert not storage.exists(below)
    for read in (storage.read_bytes, storage.size, storage.list_files):
        with pytest.raises(storage.NotFoundError, match=r"molecules\.csv/manifest\.json: "):
            read(below)


def test_a_missing_bucket_is_named(s3_uri: str) -> None:
    with pytest.raises(storage.NotFoundError, match=r"s3://no-such-bucket-here/x"):
        storage.write_bytes("s3://no-such-bucket-here/x", b"")
    assert not storage.exists("s3://no-such-bucket-here/x")


def test_missing_credentials_are_told_with_the_variables_to_set(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"no credentials were found.*AWS_ACCESS_KEY_ID"):
        storage.read_bytes(storage.join(s3_uri, "x"))


def test_an_unreachable_server_is_told_with_the_variable_to_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("MOLEBLEND_STORAGE_RETRY_S", "0")
    with pytest.raises(StorageError, match=r"cannot be reached.*AWS_ENDPOINT_URL"):
        storage.read_bytes("s3://bucket/x")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:9000", "http://minio_1:9000", "http://localhost:port", "http://"]
)
def test_an_endpoint_that_is_no_address_is_told_with_the_variable_to_correct(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(StorageError, match=r"Correct AWS_ENDPOINT_URL; expected http://HOST:PORT"):
        storage.exists("s3://bucket/x")


class _Signatures(BaseHTTPRequestHandler):
    """Notes for which region each request was signed, and finds nothing."""

    regions: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        credential = self.headers["Authorization"].partition("Credential=")[2]
        self.regions.append(credential.split("/")[2])
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("variables", "region"),
    [
        ({}, "us-east-1"),
        ({"AWS_REGION": "eu-central-1"}, "eu-central-1"),
        ({"AWS_DEFAULT_REGION": "eu-north-1"}, "eu-north-1"),
        ({"AWS_REGION": "eu-central-1", "AWS_DEFAULT_REGION": "eu-north-1"}, "eu-north-1"),
    ],
)
def test_requests_are_signed_for_the_region_of_the_environment(
    variables: dict[str, str], region: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The Secret of the cluster manifests has AWS_REGION, which botocore does not read.
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _Signatures.regions.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Signatures) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(storage.NotFoundError):
            storage.read_bytes("s3://bucket/x")
        server.shutdown()
    assert set(_Signatures.regions) == {region}


def test_unknown_kinds_of_storage_and_empty_uris_are_refused() -> None:
    with pytest.raises(StorageError, match="Unknown kind of storage ftpx://"):
        storage.exists("ftpx://host/file")
    with pytest.raises(StorageError, match="empty"):
        storage.exists("")


def test_a_denied_file_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests may run as root, for whom mode bits have no effect.
    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    filesystem, _ = storage_clients.resolve(str(tmp_path))
    monkeypatch.setattr(filesystem, "cat_file", refuse)
    with pytest.raises(StorageError, match=r"access was denied .*owner and the rights"):
        storage.read_bytes(str(tmp_path / "x"))


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    storage.write_bytes(str(target), b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_hidden_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".part").write_bytes(b"")
    (tmp_path / "seen").write_bytes(b"")
    copy = tmp_path / ".ipynb_checkpoints" / "below" / "seen"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"")
    for listed in (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/*", f"{tmp_path}/**"):
        assert [storage.name_of(file.uri) for file in storage.list_files(listed)] == ["seen"]
    # What was asked for by its name is not hidden.
    asked = tmp_path / ".*/b*/seen"
    for named in (copy, copy.parent, copy.parent.parent, copy.parent / "s*", asked):
        (found,) = storage.list_files(str(named))
        assert found.uri.endswith(".ipynb_checkpoints/below/seen")


def test_files_in_linked_folders_are_listed_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real, far = tmp_path / "real", tmp_path / "far"
    for file in (real / "a", real / "v2" / "b", far / "deep" / "c", far / ".hidden" / "d"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"xy")
    links = {
        real / "more": Path("../far"),
        real / "again": far / "deep",
        real / "latest": real / "v2",
        real / "self": real,
        real / "up": tmp_path,
        far / "deep" / "back": real,
    }
    for link, target in links.items():
        link.symlink_to(target)
    found = storage.list_files(str(real))
    assert [(file.uri.removeprefix(f"{real}/"), file.size) for file in found] == [
        ("a", 2),
        ("more/deep/c", 2),
        ("v2/b", 2),
    ]
    assert caplog.messages == [f"{real}/up links to a folder around it: not followed"]


def test_what_killed_writers_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    names = {".a.parquet.0123abcd", ".notes", "a.parquet", ".a.parquet.lock", "b.0123abcd"}
    for name in names:
        (tmp_path / name).write_bytes(b"")
    storage.delete_temporaries(str(tmp_path))
    storage.delete_temporaries(str(tmp_path / "not there"))
    assert {path.name for path in tmp_path.iterdir()} == names - {".a.parquet.0123abcd"}


def test_folder_objects_of_an_object_store_are_not_listed(s3_uri: str) -> None:
    import s3fs

    bucket, _, key = s3_uri.removeprefix("s3://").partition("/")
    storage.write_bytes(f"{s3_uri}/folder/a.csv", b"x")
    client = s3fs.S3FileSystem(use_listings_cache=False)
    client.call_s3("put_object", Bucket=bucket, Key=f"{key}/folder/", Body=b"")
    assert [info.uri for info in storage.list_files(s3_uri)] == [f"{s3_uri}/folder/a.csv"]
    # Nothing is remembered of a folder to which others write.
    client.call_s3("put_object", Bucket=bucket, Key=f"{key}/folder/b.csv", Body=b"")
    assert len(storage.list_files(s3_uri)) == 2


def test_a_name_with_glob_characters_that_exists_is_that_file(tmp_path: Path) -> None:
    for name in ("a[1].csv", "a1.csv"):
        (tmp_path / name).write_bytes(b"")
    (found,) = storage.list_files(str(tmp_path / "a[1].csv"))
    assert storage.name_of(found.uri) == "a[1].csv"


@pytest.mark.parametrize("uri", ["/", "s3://bucket", "s3://bucket/"])
def test_whole_file_systems_and_buckets_are_never_deleted(uri: str, s3_endpoint: None) -> None:
    with pytest.raises(StorageError, match="Refused"):
        storage.delete_tree(uri)


@pytest.mark.parametrize(
    ("package", "uri", "message"),
    [
        ("gcsfs", "gs://b/x", r"not installed \(pip install gcsfs\)"),
        ("adlfs", "abfs://b/x", "not installed: Install adlfs"),
    ],
)
def test_storage_whose_software_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str, uri: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StorageError, match=message):
        storage.read_bytes(uri)


def test_joining_uris() -> None:
    assert storage.join("s3://b/p/", "/x/", "y.json") == "s3://b/p/x/y.json"
    assert storage.join("/", "x") == "/x"
    assert storage.join("rel", "") == "rel"
    assert storage.name_of("s3://b/p/x.csv") == "x.csv"
    assert storage.name_of("https://h/p/x.csv?X-Amz-Credential=a/b") == "x.csv"


def test_errors_show_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLEBLEND_STORAGE_RETRY_S", "0")
    with pytest.raises(StorageError) as caught:
        storage.read_bytes("http://user:hunter2@127.0.0.1:9/x.csv?X-Amz-Signature=hunter2")
    assert "hunter2" not in str(caught.value)
    assert "http://***@127.0.0.1:9/x.csv?X-Amz-Signature=***" in str(caught.value)


def test_the_client_of_s3_repeats_no_credentials_in_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOLEBLEND_STORAGE_RETRY_S", "0")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    with pytest.raises(StorageError) as caught:
        storage.read_bytes("s3://someone:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)
    assert "s3://***@bucket/x" in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "parts", "joined"),
    [
        ("s3://bucket/a/", ("/b/", "c"), "s3://bucket/a/b/c"),
        ("/", ("a",), "/a"),
        ("what?", ("a",), "what?/a"),
        ("https://host/dir?sig=x/y", ("a.csv",), "https://host/dir/a.csv?sig=x/y"),
        ("https://host/dir/", ("a.csv",), "https://host/dir/a.csv"),
    ],
)
def test_names_are_joined_before_the_query_of_a_web_address(
    uri: str, parts: tuple[str, ...], joined: str
) -> None:
    # Otherwise a signed link to a file would return that file for every path below it.
    assert storage.join(uri, *parts) == joined
