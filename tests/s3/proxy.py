"""An HTTP proxy that answers badly, by a seeded draw for each request in turn."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar
from urllib.parse import urlsplit

STALL_S = 2
MOST_IN_A_ROW = 3  # bad answers to one request, of the attempts that a reader has
SHARES = {"503": 0.15, "reset": 0.05, "cut": 0.05, "short": 0.05}
_HOP = ("connection", "keep-alive", "transfer-encoding")


P = TypeVar("P", bound="FaultProxy")


class FaultProxy(ThreadingHTTPServer):
    """Passes requests on; ``faults`` counts the bad answers by kind.

    ``503``: without a body. ``reset`` and ``cut``: the connection ends in mid-body, by RST or FIN.
    ``short``: a range of a shard is answered with half of it, as if that were all. ``stall``: one
    answer comes after two seconds.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: str, *, seed: int, stall_at: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: Counter[str] = Counter()
        self.stopping = threading.Event()
        self._seed, self._stall_at, self._count = seed, stall_at, 0
        self._in_a_row: Counter[tuple[str, ...]] = Counter()
        self._lock = threading.Lock()

    def fault(self, request: tuple[str, ...]) -> str | None:
        """What goes wrong with the next answer."""
        with self._lock:
            self._count += 1
            kind = self._drawn(of_shard="/data/" in request[1] and bool(request[-1]))
            if self._count == self._stall_at:
                kind = "stall"
            elif kind is None or self._in_a_row[request] == MOST_IN_A_ROW:
                self._in_a_row[request] = 0
                return None
            self._in_a_row[request] += 1
            self.faults[kind] += 1
            return kind

    def _drawn(self, *, of_shard: bool) -> str | None:
        draw = random.Random(f"{self._seed} {self._count}").random()
        for kind, share in SHARES.items():
            draw -= share
            if draw < 0:
                return kind if of_shard or kind != "short" else None
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """A client may go away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.stopping.is_set():  # a connection that was kept
            self._break_off(hard=True)
            return
        status, headers, data = self._ask(body)
        kind = self.server.fault((self.command, self.path, self.headers.get("Range") or ""))
        if kind == "stall":
            self.server.stopping.wait(STALL_S)
        if kind == "503":
            status, headers, data = 503, {}, b""
        elif kind == "short":
            data = data[: len(data) // 2]
        length = str(len(data))
        if self.command == "HEAD" and kind != "503":
            length = headers.get("content-length", "0")
        self.send_response_only(status)
        for name, value in {**headers, "content-length": length}.items():
            self.send_header(name, value)
        self.end_headers()
        broken = kind in ("reset", "cut")
        with suppress(ConnectionError):
            self.wfile.write(data[: len(data) // 2] if broken else data)
        if broken:
            self._break_off(hard=kind == "reset")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():  # the host too: it is signed
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            data = answer.read()
        finally:
            connection.close()
        for name in _HOP:
            headers.pop(name, None)
        return answer.status, headers, data

    def _break_off(self, *, hard: bool) -> None:
        self.close_connection = True
        if hard:  # no lingering: what is unread is lost, and the peer gets RST
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)

    def log_message(self, *arguments: object) -> None:
        """Nothing: stderr belongs to the tests."""


@contextmanager
def serving(proxy: P) -> Iterator[P]:
    """A proxy that answers until the block ends."""
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stopping.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join()
