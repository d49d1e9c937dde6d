"""An HTTP proxy in front of an S3 server that misbehaves on command. The clients and the server are the real ones.

    with FaultProxy("http://127.0.0.1:5000") as proxy:
        proxy.fault = lambda method, path, n: "503" if n == 1 else None    # n counts requests for the same path and range
        # clients speak to proxy.endpoint; proxy.log holds (method, path, fault) of every request

Faults: "411", "500", "503", "403", "404" (a status with an S3 error body), "reset" (the connection is torn down before an answer), "cut"
(half of the promised body, then the connection is torn down), "short" (an answer with fewer bytes than asked, correctly framed),
"lost" (the store gets the request, the connection is torn down before its answer),
"stall" (no answer for `stall` seconds), "slow" (the body in ten pieces over `slow` seconds).
"""

import http.client
import io
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CODES = {
    "411": "MissingContentLength",
    "500": "InternalError",
    "503": "SlowDown",
    "403": "AccessDenied",
    "404": "NoSuchKey",
}


class FaultProxy:
    def __init__(self, upstream: str, stall: float = 2.0, slow: float = 1.0) -> None:
        self.upstream, self.stall, self.slow = urlsplit(upstream).netloc, stall, slow
        self.fault: Callable[[str, str, int], str | None] = lambda method, path, n: None
        self.log: list[tuple[str, str, str | None]] = []
        self._seen: Counter = Counter()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, address: None  # clients that gave up waiting
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="faultproxy", daemon=True)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def choose(self, method: str, path: str, byte_range: str) -> str | None:
        with self._lock:
            self._seen[method, path, byte_range] += 1
            count = self._seen[method, path, byte_range]
        fault = self.fault(method, path, count)  # may wait, and other requests go on meanwhile
        with self._lock:
            self.log.append((method, path, fault))
        return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.choose(self.command, self.path, self.headers.get("Range", ""))
        if fault in CODES:
            self._answer(
                int(fault), {}, f"<Error><Code>{CODES[fault]}</Code><Message>injected</Message></Error>".encode()
            )
            return
        if fault == "reset":
            self._tear_down()
            return
        if fault == "stall":
            time.sleep(self.proxy.stall)
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        payload, headers = response.read(), dict(response.getheaders())
        connection.close()
        if fault == "lost":
            self._tear_down()
            return
        if fault == "short":
            payload = payload[: len(payload) // 2]
        self._answer(response.status, headers, payload, fault)

    def _answer(self, status: int, headers: dict[str, str], payload: bytes, fault: str | None = None) -> None:
        self.send_response(status)
        told = {name.lower(): value for name, value in headers.items()}.get("content-length", "0")
        length = str(len(payload)) if self.command != "HEAD" else told
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(payload[: len(payload) // 2])
            self.wfile.flush()
            self._tear_down()
        elif fault == "slow":
            for i in range(10):
                self.wfile.write(payload[len(payload) * i // 10 : len(payload) * (i + 1) // 10])
                self.wfile.flush()
                time.sleep(self.proxy.slow / 10)
        else:
            self.wfile.write(payload)

    def _tear_down(self) -> None:
        """Closes the connection with a reset (RST) instead of an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.wfile = self.rfile = io.BytesIO()  # what the base class flushes and closes at the end

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve
