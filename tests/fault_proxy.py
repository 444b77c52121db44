"""A seeded HTTP proxy that refuses requests, resets connections, cuts bodies and loses answers, and counts them."""

from __future__ import annotations

import http.client
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("unavailable", "reset", "cut", "lost_answer")
_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


class FaultProxy:
    """``with FaultProxy(upstream, rate=0.3, seed=7) as proxy``: ``proxy.url`` fails so often."""

    def __init__(self, upstream: str, *, rate: float, seed: int) -> None:
        self.upstream, self.rate = urlsplit(upstream), rate
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


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.draw()
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
