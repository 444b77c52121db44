"""Downloads are resumed where they broke off and verified before they appear; malicious servers do no harm."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moleblend_ray.data.files import storage
from moleblend_ray.data.files.download import (
    Collection,
    FetchedFile,
    RemoteFile,
    download_collection,
)
from moleblend_ray.data.files.transfer import TransferOptions
from moleblend_ray.errors import ConfigError, DataError, MoleBlendError, StorageError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
OPTIONS = TransferOptions(timeout_s=0.5, attempts=3, first_wait_s=0.01)


class Server(ThreadingHTTPServer):
    """Serves ``files`` with ranges and ETags; the first requests are answered by ``surprises`` instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.surprises: list[Callable[[Handler], None]] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.with_etag = True
        self.with_ranges = True
        self.heeds_conditions = True
        self.is_over = threading.Event()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self) -> list[str | None]:
        """Range header of each request so far."""
        return [headers.get("Range") for _, headers in self.requests]


def etag_of(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        if self.server.surprises:
            self.server.surprises.pop(0)(self)
        else:
            self.serve()

    def serve(self, stop_after: int | None = None) -> None:
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = self.start_of(content)
        if start is not None and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.with_etag:
            self.send_header("ETag", etag_of(content))
        body = content[start or 0 :]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client may refuse an answer by its header
            self.wfile.write(body[:stop_after])

    def start_of(self, content: bytes) -> int | None:
        """First byte of the requested range; None if the whole file is requested."""
        asked = self.headers.get("Range")
        if asked is None or not self.server.with_ranges:
            return None
        condition = self.headers.get("If-Range")
        if self.server.heeds_conditions and condition not in (None, etag_of(content)):
            return None
        return int(asked.removeprefix("bytes=").removesuffix("-"))


def breaks_after(num_bytes: int) -> Callable[[Handler], None]:
    def serve(handler: Handler) -> None:
        handler.serve(stop_after=num_bytes)
        handler.close_connection = True

    return serve


def answers(status: int, **headers: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def hangs(handler: Handler) -> None:
    handler.server.is_over.wait(60)


def trickles(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    for _ in range(600):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        if handler.server.is_over.wait(0.1):
            return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        running.files["/data/set.csv"] = CONTENT
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.is_over.set()
        running.shutdown()
        thread.join()


def file_of(*urls: str, **changes: Any) -> RemoteFile:
    known = {"bytes": len(CONTENT), "md5": hashlib.md5(CONTENT).hexdigest()}
    return RemoteFile(**{"name": "set.csv", "urls": urls, **known, **changes})


def collection_of(*files: RemoteFile) -> Collection:
    return Collection(
        name="set",
        title="A set",
        homepage="https://example.org",
        licence="CC0",
        citation="Somebody (2026)",
        files=files,
    )


def fetch(file: RemoteFile, out: Path | str, **changes: Any) -> FetchedFile:
    changes = {"options": OPTIONS, **changes}
    (fetched,) = download_collection(collection_of(file), str(out), **changes)
    return fetched


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_file_appears_with_a_record_of_where_it_came_from(server: Server, tmp_path: Path) -> None:
    url = f"{server.base}/data/set.csv"
    seen: list[int] = []
    fetched = fetch(file_of(url), tmp_path / "out", report=lambda *what: seen.append(what[1]))
    assert (tmp_path / "out" / "set.csv").read_bytes() == CONTENT
    assert names_in(tmp_path / "out") == ["download.json", "set.csv"]
    assert seen[-1] == fetched.bytes == fetched.transferred == len(CONTENT)
    record = json.loads((tmp_path / "out" / "download.json").read_text())
    assert (record["licence"], record["citation"]) == ("CC0", "Somebody (2026)")
    assert record["files"] == [
        {
            "name": "set.csv",
            "url": url,
            "bytes": len(CONTENT),
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
            "verified_by": "published md5",
        }
    ]


def test_a_file_that_is_there_is_verified_and_not_fetched(server: Server, tmp_path: Path) -> None:
    file = file_of(f"{server.base}/data/set.csv")
    fetch(file, tmp_path)
    before = (tmp_path / "download.json").read_bytes()
    server.requests.clear()
    again = fetch(file, tmp_path)
    assert (again.transferred, server.requests) == (0, [])
    assert (tmp_path / "download.json").read_bytes() == before
    (tmp_path / "set.csv").write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(DataError, match=r"set\.csv is there, but its MD5 is .*Delete it"):
        fetch(file, tmp_path)


@pytest.mark.parametrize("with_etag", [True, False])
def test_a_broken_transfer_goes_on_where_it_broke(
    server: Server, tmp_path: Path, with_etag: bool
) -> None:
    server.with_etag = with_etag
    server.surprises = [breaks_after(1_000_000), breaks_after(500_000)]
    fetched = fetch(file_of(f"{server.base}/data/set.csv"), tmp_path)
    assert (tmp_path / "set.csv").read_bytes() == CONTENT
    assert fetched.transferred == len(CONTENT)
    assert server.ranges() == [None, "bytes=1000000-", "bytes=1500000-"]
    conditions = [headers.get("If-Range") for _, headers in server.requests]
    assert conditions == [None, *[etag_of(CONTENT) if with_etag else None] * 2]


def test_another_run_continues_an_interrupted_one(server: Server, tmp_path: Path) -> None:
    server.surprises = [breaks_after(700_000), *[answers(503)] * 2]
    file = file_of(f"{server.base}/data/set.csv")
    with pytest.raises(StorageError, match=r"HTTP 503.*given up after 3 attempts.*continues"):
        fetch(file, tmp_path)
    assert "set.csv" not in names_in(tmp_path)
    server.requests.clear()
    fetched = fetch(file, tmp_path)
    assert server.ranges() == ["bytes=700000-"]
    assert fetched.transferred == len(CONTENT) - 700_000
    assert names_in(tmp_path) == ["download.json", "set.csv"]


def test_attempts_count_only_while_nothing_new_comes(server: Server, tmp_path: Path) -> None:
    server.surprises = [breaks_after(100_000)] * 9
    fetch(file_of(f"{server.base}/data/set.csv"), tmp_path)
    assert len(server.requests) == 10 > OPTIONS.attempts


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.with_ranges = False
    server.surprises = [breaks_after(1_000_000)]
    fetched = fetch(file_of(f"{server.base}/data/set.csv"), tmp_path)
    assert (tmp_path / "set.csv").read_bytes() == CONTENT
    assert fetched.transferred == len(CONTENT) + 1_000_000


@pytest.mark.parametrize("heeds_conditions", [True, False])
def test_a_file_that_changed_in_between_is_fetched_anew(
    server: Server, tmp_path: Path, heeds_conditions: bool
) -> None:
    def changes(handler: Handler) -> None:
        server.files["/data/set.csv"] = CONTENT
        handler.serve()

    server.heeds_conditions = heeds_conditions
    server.files["/data/set.csv"] = CONTENT[::-1]
    server.surprises = [breaks_after(1_000_000), changes]
    fetch(file_of(f"{server.base}/data/set.csv", md5=None, bytes=None), tmp_path)
    assert (tmp_path / "set.csv").read_bytes() == CONTENT
    assert server.requests[1][1]["If-Range"] == etag_of(CONTENT[::-1])


def test_a_kill_while_another_version_begins_does_not_put_both_together(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of(f"{server.base}/data/set.csv", md5=None, bytes=None)
    server.files["/data/set.csv"] = CONTENT[::-1]
    server.surprises = [breaks_after(1_000_000), *[answers(503)] * 2]
    with pytest.raises(StorageError):
        fetch(file, tmp_path)
    server.files["/data/set.csv"] = CONTENT
    write_text = Path.write_text

    def killed(path: Path, text: str) -> int:
        write_text(path, text)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(file, tmp_path)
    fetch(file, tmp_path)
    assert (tmp_path / "set.csv").read_bytes() == CONTENT


def test_two_versions_put_together_are_noticed_and_fetched_anew(
    server: Server, tmp_path: Path
) -> None:
    server.with_etag = False
    server.files["/data/set.csv"] = CONTENT[::-1]
    server.surprises = [breaks_after(1_000_000), *[answers(503)] * 2]
    file = file_of(f"{server.base}/data/set.csv")
    with pytest.raises(StorageError):
        fetch(file, tmp_path)
    server.files["/data/set.csv"] = CONTENT
    server.requests.clear()
    fetch(file, tmp_path)
    assert server.ranges() == ["bytes=1000000-", None]
    assert (tmp_path / "set.csv").read_bytes() == CONTENT


def test_wrong_content_that_breaks_each_time_is_not_fetched_for_ever(
    server: Server, tmp_path: Path
) -> None:
    server.files["/data/set.csv"] = CONTENT[::-1]
    server.surprises = [breaks_after(1_000_000), Handler.serve] * 5
    with pytest.raises(DataError, match="is not what was published"):
        fetch(file_of(f"{server.base}/data/set.csv"), tmp_path)
    assert server.ranges() == [None, "bytes=1000000-"] * 2


def test_without_checksum_and_validator_nothing_is_continued(
    server: Server, tmp_path: Path
) -> None:
    server.with_etag = False
    server.surprises = [breaks_after(1_000_000)]
    fetch(file_of(f"{server.base}/data/set.csv", md5=None), tmp_path)
    assert server.ranges() == [None, None]


@pytest.mark.parametrize("kind", ["md5", "sha256", "bytes"])
def test_a_wrong_checksum_or_size_leaves_nothing_behind(
    server: Server, tmp_path: Path, kind: str
) -> None:
    wrong = {"md5": "0" * 32, "sha256": "0" * 64, "bytes": len(CONTENT) + 1}[kind]
    found = getattr(hashlib, kind)(CONTENT).hexdigest() if kind != "bytes" else len(CONTENT)
    with pytest.raises(MoleBlendError, match=rf"{found}.*expected {wrong}") as error:
        fetch(file_of(f"{server.base}/data/set.csv", **{kind: wrong}), tmp_path)
    assert isinstance(error.value, StorageError if kind == "bytes" else DataError)
    assert names_in(tmp_path) == []


def test_the_checksum_of_the_first_download_holds_from_then_on(
    server: Server, tmp_path: Path
) -> None:
    file = file_of(f"{server.base}/data/set.csv", md5=None, bytes=None)
    assert fetch(file, tmp_path).verified_by == "first download"
    assert fetch(file, tmp_path).verified_by == "recorded sha256"
    (tmp_path / "set.csv").unlink()
    assert fetch(file, tmp_path).verified_by == "recorded sha256"
    record = json.loads((tmp_path / "download.json").read_text())
    assert record["files"][0]["verified_by"] == "first download"
    (tmp_path / "set.csv").unlink()
    server.files["/data/set.csv"] = CONTENT[::-1]
    with pytest.raises(DataError, match=r"SHA-256 of the first download is .*, expected"):
        fetch(file, tmp_path)
    assert names_in(tmp_path) == ["download.json"]


def test_mirrors_come_first_and_the_published_url_remains(server: Server, tmp_path: Path) -> None:
    server.files["/mirror/set.csv"] = CONTENT
    url = f"{server.base}/data/set.csv"
    fetched = fetch(file_of(url), tmp_path / "a", mirrors=(f"{server.base}/mirror",))
    assert fetched.url == f"{server.base}/mirror/set.csv"
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "set.csv").write_bytes(CONTENT)
    fetched = fetch(file_of(url), tmp_path / "b", mirrors=(f"file://{tmp_path}/local",))
    assert fetched.url == f"file://{tmp_path}/local/set.csv"
    server.files["/mirror/set.csv"] = CONTENT[::-1]
    mirrors = (f"{server.base}/none", f"{server.base}/mirror/", f"file://{tmp_path}/none")
    assert fetch(file_of(url), tmp_path / "c", mirrors=mirrors).url == url
    with pytest.raises(ConfigError, match="mirrors: expected http"):
        fetch(file_of(url), tmp_path / "d", mirrors=("ftp://example.org",))


def test_a_missing_file_is_told_with_every_source(server: Server, tmp_path: Path) -> None:
    file = file_of(f"{server.base}/a", f"{server.base}/b")
    with pytest.raises(
        StorageError, match=r"(?s)set\.csv of set was not had.*/a: HTTP 404.*/b: HTTP"
    ):
        fetch(file, tmp_path)
    assert len(server.requests) == 2
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    server.surprises = [answers(status), answers(status, Retry_After="0")]
    fetch(file_of(f"{server.base}/data/set.csv"), tmp_path)
    assert len(server.requests) == 3


def test_retry_after_is_respected(server: Server, tmp_path: Path) -> None:
    server.surprises = [answers(503, Retry_After="1")]
    start_s = time.monotonic()
    fetch(file_of(f"{server.base}/data/set.csv"), tmp_path)
    assert time.monotonic() - start_s >= 1.0


@pytest.mark.parametrize("slowly", [hangs, trickles])
def test_a_server_that_stalls_is_given_up_and_asked_again(
    server: Server, tmp_path: Path, slowly: Callable[[Handler], None]
) -> None:
    server.surprises = [slowly]
    start_s = time.monotonic()
    fetch(file_of(f"{server.base}/data/set.csv"), tmp_path)
    assert time.monotonic() - start_s < 1.5
    # What had arrived was wrong: it is continued, found to be wrong, and downloaded again.
    assert len(server.requests) == (2 if slowly is hangs else 3)
    assert (tmp_path / "set.csv").read_bytes() == CONTENT


def test_redirects_are_followed_a_few_times_and_only_in_the_web(
    server: Server, tmp_path: Path
) -> None:
    url = f"{server.base}/start"
    server.surprises = [answers(302, Location="/data/set.csv")]
    assert fetch(file_of(url), tmp_path / "a").url == url
    server.surprises = [answers(302, Location="/start")] * 20
    with pytest.raises(StorageError, match="HTTP 302"):
        fetch(file_of(url), tmp_path / "b")
    server.surprises = []
    asked = len(server.requests)
    server.surprises = [answers(302, Location=f"/{step}") for step in range(20)]
    with pytest.raises(StorageError, match="HTTP 302"):
        fetch(file_of(url), tmp_path / "c")
    assert len(server.requests) - asked <= 6
    for place in ("file:///etc/passwd", "ftp://example.org/x"):
        server.surprises = [answers(302, Location=place)]
        with pytest.raises(StorageError, match=r"refused to follow it|is not allowed"):
            fetch(file_of(url), tmp_path / "d")
    assert names_in(tmp_path / "d") == []


def test_a_server_that_sends_too_much_is_stopped(server: Server, tmp_path: Path) -> None:
    def floods(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(CONTENT + b"more")

    server.surprises = [floods]
    with pytest.raises(StorageError, match="sends more than the 3000000 bytes"):
        fetch(file_of(f"{server.base}/data/set.csv"), tmp_path)
    assert "set.csv" not in names_in(tmp_path)


def test_an_object_store_gets_the_whole_file_through_a_spool(
    server: Server, tmp_path: Path, s3_uri: str
) -> None:
    file = file_of(f"{server.base}/data/set.csv")
    server.surprises = [breaks_after(900_000), *[answers(503)] * 2]
    out, spool = s3_uri + "/raw", str(tmp_path / "spool")
    with pytest.raises(StorageError):
        fetch(file, out, spool=spool)
    assert not storage.exists(out)
    server.requests.clear()
    fetch(file, out, spool=spool)
    assert server.ranges() == ["bytes=900000-"]
    assert storage.read_bytes(out + "/set.csv") == CONTENT
    assert [path for path in (tmp_path / "spool").rglob("*") if path.is_file()] == []
    assert fetch(file, out, spool=spool).transferred == 0


@pytest.mark.parametrize("kind", ["object", "file"])
def test_an_interrupted_copy_of_a_stored_file_is_continued_unless_the_file_changed(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    url = (s3_uri if kind == "object" else f"file://{tmp_path}/mirror") + "/set.csv"
    options = TransferOptions(attempts=1)
    opened = storage.open_read

    def breaking(uri: str) -> Any:
        stream = opened(uri)
        read = stream.read
        monkeypatch.setattr(stream, "read", lambda size: read(size) if not stream.tell() else b"")
        return stream

    for then in (CONTENT, CONTENT[::-1]):  # the same, and another of the same size
        storage.write_bytes(url, CONTENT)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "open_read", breaking)
            with pytest.raises(StorageError, match="ended at byte"):
                fetch(file_of(url, md5=None), tmp_path / "out", options=options)
        if then != CONTENT:
            storage.write_bytes(url, then)
        fetched = fetch(file_of(url, md5=None), tmp_path / "out", options=options)
        assert (fetched.transferred < len(CONTENT)) == (then == CONTENT)
        assert (tmp_path / "out" / "set.csv").read_bytes() == then
        storage.delete_tree(str(tmp_path / "out"))


def test_two_downloads_do_not_write_one_partial_file(server: Server, tmp_path: Path) -> None:
    def races(handler: Handler) -> None:
        with pytest.raises(StorageError, match="being written by another download"):
            fetch(file_of(f"{server.base}/data/set.csv"), tmp_path)
        handler.serve()

    server.surprises = [races]
    fetch(
        file_of(f"{server.base}/data/set.csv"),
        tmp_path,
        options=TransferOptions(timeout_s=5.0, attempts=1, first_wait_s=0.01),
    )


def test_a_lock_that_was_removed_before_it_was_got_is_none(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    with (tmp_path / "taken").open("w") as other:

        def ends_meanwhile(handle: Any, how: int) -> None:
            flock(handle, how)
            # The download that held the lock has removed it, and a third one has made a new one.
            flock(other, fcntl.LOCK_EX)
            os.replace(tmp_path / "taken", tmp_path / ".set.csv.part.lock")

        monkeypatch.setattr(fcntl, "flock", ends_meanwhile)
        with pytest.raises(StorageError, match="being written by another download"):
            fetch(file_of(f"{server.base}/data/set.csv"), tmp_path)
    assert names_in(tmp_path) == [".set.csv.part.lock"]


def test_an_unwritable_place_is_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot"):
        fetch(file_of(f"{server.base}/data/set.csv"), tmp_path / "file" / "out")


def test_secrets_in_urls_stay_out_of_the_record(server: Server, tmp_path: Path) -> None:
    server.files["/data/set.csv?X-Amz-Signature=abc"] = CONTENT
    url = f"{server.base}/data/set.csv?X-Amz-Signature=abc"
    assert "abc" not in fetch(file_of(url), tmp_path).url
    assert "abc" not in (tmp_path / "download.json").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../x"},
        {"name": ".hidden"},
        {"name": "download.json"},
        {"urls": ()},
        {"urls": ("ftp://example.org/x",)},
        {"urls": ("/etc/passwd",)},
        {"md5": "xyz"},
        {"sha256": "0" * 63},
        {"bytes": 0},
    ],
)
def test_a_file_that_is_described_wrongly_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}: expected"):
        file_of(**{"urls": ("https://example.org/x",), **changes})


def test_the_job_composes_a_collection_and_its_settings(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moleblend_ray import cli

    files = f"[{{name: set.csv, urls: ['{server.base}/data/set.csv']}}]"
    texts = [f"collection.{key}=x" for key in ("name", "title", "homepage", "licence", "citation")]
    out = os.path.relpath(tmp_path / "out")
    assert cli.main(["download", *texts, f"collection.files={files}", f"out={out}"]) == 0
    assert (tmp_path / "out" / "set.csv").read_bytes() == CONTENT
    shown = capsys.readouterr()
    assert "first download" in shown.out
    assert "its SHA-256" in shown.err
    assert cli.main(["download", "qm8", "out=x"]) == 2
    assert "did you mean qm9?" in capsys.readouterr().err
