"""Seeded HTTP proxies that refuse requests, reset connections, cut bodies and lose answers, and count what they did."""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("unavailable", "reset", "cut", "lost_answer")
_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


class ProxyProgram:
    """The program beside the project, of the same use as :class:`FaultProxy`: its draws hold in whatever order requests come.

    It fails ``rate`` of the requests and cuts the connections of a third as many.
    """

    def __init__(self, program: Path, upstream: str, *, rate: float, seed: int) -> None:
        settings = {"upstream": upstream, "seed": seed}
        settings |= {"fail-rate": rate, "cut-rate": rate / 3}
        self._command = [sys.executable, str(program)]
        self._command += [f"--{name}={value}" for name, value in settings.items()]

    def __enter__(self) -> ProxyProgram:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().split()[-1]
        return self

    def __exit__(self, *_: object) -> None:
        with urllib.request.urlopen(f"{self.url}/-/fault-proxy") as answer:
            counts = json.load(answer)["counts"]
        self.faults = counts["failed"] + sum(
            count for name, count in counts.items() if name.startswith("cut")
        )
        self.cuts = self.faults - counts["failed"]
        self._process.terminate()
        self._process.communicate()


class FaultProxy:
    """``with FaultProxy(upstream, rate=0.3, seed=7) as proxy``: ``proxy.url`` fails so often.

    ``rate``, and ``delay_s`` before every request, may be changed while it runs.
    """

    def __init__(self, upstream: str, *, rate: float, seed: int) -> None:
        self.upstream, self.rate = urlsplit(upstream), rate
        self.delay_s = 0.0
        self.counts: Counter[str] = Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def draw(self) -> str:
        """The fault of the next request, "" for none."""
        with self._lock:
            fault = self._random.choice(FAULTS) if self._random.random() < self.rate else ""
            self.counts[fault or "passed"] += 1
        return fault

    @property
    def faults(self) -> int:
        """Requests that got a fault so far."""
        return sum(count for name, count in self.counts.items() if name != "passed")

    @property
    def cuts(self) -> int:
        """Answers that ended early."""
        return self.counts["cut"]


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.draw()
            time.sleep(proxy.delay_s)
            self.close_connection = True
            if fault == "reset":
                return
            if fault == "unavailable":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.send_header("Connection", "close")
                self.end_headers()
                return
            upstream = http.client.HTTPConnection(proxy.upstream.netloc, timeout=30)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            if fault == "lost_answer":
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") or str(len(content))
            self.send_header("Content-Length", length)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
