"""A web server on loopback that misbehaves on request: the path of an address says how it is answered."""

import contextlib
import email.utils
import gzip
import http.server
import os
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator

from tests.images import encoded, jpeg, picture

IMAGE = jpeg()
BOMB = gzip.compress(bytes(8 << 20))
IMAGE_BOMB = gzip.compress(IMAGE + bytes(8 << 20))
LARGE = IMAGE + bytes(1_000_000)  # trailing bytes are harmless
KEPT = IMAGE + bytes(200)  # a body that is long enough to be cut


_ports: set[int] = set()  # never used again, because a process asks an origin for robots.txt once


class WebServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Counts requests by path in `hits`, and records their headers in `seen` and
    the maximum of concurrent requests in `most`."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__((address, 0), _Handler)
        while self.server_port in _ports:
            self.server_close()
            super().__init__((address, 0), _Handler)
        _ports.add(self.server_port)
        self.hits: Counter[str] = Counter()
        self.visits: Counter[str] = Counter()  # as `hits`, but never cleared by a test
        self.seen: dict[str, dict[str, str]] = {}
        self.times: list[float] = []
        self.robots: tuple[int, bytes] = (404, b"")
        self.down = False  # whether every image is answered with 503
        self.now = self.most = 0
        self.mutex = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that went away is part of the tests."""


@contextlib.contextmanager
def web_server(address: str = "127.0.0.1") -> Iterator[WebServer]:
    server = WebServer(address)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    server: WebServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        server = self.server
        with server.mutex:
            server.hits[path] += 1
            server.visits[path] += 1
            server.seen[path] = dict(self.headers)
            server.times.append(time.monotonic())
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            kind = path.strip("/").partition("/")[0]
            if path == "/robots.txt":
                self.answer(*server.robots, {"Content-Type": "text/plain"})
            elif server.down:
                self.answer(503)
            else:
                getattr(self, f"do_{kind}", self.do_image)(path)
        finally:
            with server.mutex:
                server.now -= 1

    def answer(self, status: int = 200, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def do_image(self, path: str) -> None:
        name = path.rpartition("/")[2].partition(".")[0]
        seed = int(name) if name.isdecimal() else 0
        self.answer(200, jpeg(seed) if seed else IMAGE, {"Content-Type": "image/jpeg"})

    def do_png(self, path: str) -> None:
        self.answer(200, encoded(picture(), "PNG"), {"Content-Type": "text/plain"})

    def do_status(self, path: str) -> None:
        self.answer(int(path.split("/")[2]))

    def do_html(self, path: str) -> None:
        self.answer(200, b"<html><body>This image is no longer available</body></html>", {"Content-Type": "image/jpeg"})

    def do_flaky(self, path: str) -> None:
        """Status 500, then the image."""
        self.answer(500) if self.server.visits[path] == 1 else self.do_image(path)

    def do_busy(self, path: str) -> None:
        """/busy/SECONDS: status 429 with Retry-After, then the image. /busy/date: the same with a date."""
        if self.server.visits[path] > 1:
            return self.answer(200, IMAGE)
        wait = path.split("/")[2]
        value = email.utils.formatdate(time.time() + 2, usegmt=True) if wait == "date" else wait
        return self.answer(429, b"", {"Retry-After": value})

    def do_redirect(self, path: str) -> None:
        """/redirect?TARGET"""
        self.answer(302, b"", {"Location": self.path.partition("?")[2]})

    def do_loop(self, path: str) -> None:
        self.answer(301, b"", {"Location": f"/loop/{self.server.visits[path]}"})

    def do_drip(self, path: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(IMAGE)))
        self.end_headers()
        with contextlib.suppress(OSError):
            for i in range(len(IMAGE)):
                self.wfile.write(IMAGE[i : i + 1])
                self.wfile.flush()
                time.sleep(0.1)

    def do_silent(self, path: str) -> None:
        time.sleep(30)

    def do_endless(self, path: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.end_headers()
        self.wfile.write(IMAGE)
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 16))
        self.close_connection = True

    def do_huge(self, path: str) -> None:
        self.answer(200, IMAGE, {"Content-Length": str(1 << 40)})

    def do_short(self, path: str) -> None:
        """Fewer bytes than Content-Length says."""
        self.answer(200, KEPT[: len(KEPT) // 2], {"Content-Length": str(len(KEPT))})
        self.close_connection = True

    def do_long(self, path: str) -> None:
        """More bytes than Content-Length says."""
        self.answer(200, IMAGE, {"Content-Length": str(len(IMAGE) // 2)})

    def do_cut(self, path: str) -> None:
        """An image that ends early, in an answer that is complete."""
        self.answer(200, IMAGE[: len(IMAGE) // 2], {"Content-Type": "image/jpeg"})

    def do_reset(self, path: str) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        os.dup2(os.open(os.devnull, os.O_RDWR), self.connection.fileno())

    def do_gzip(self, path: str) -> None:
        self.answer(200, gzip.compress(IMAGE), {"Content-Encoding": "gzip"})

    def do_deflate(self, path: str) -> None:
        self.answer(200, zlib.compress(IMAGE), {"Content-Encoding": "deflate"})

    def do_rawdeflate(self, path: str) -> None:
        """Without the header of zlib, and the first byte alone."""
        body = zlib.compress(IMAGE, wbits=-15)
        self.answer(200, body[:1], {"Content-Encoding": "deflate", "Content-Length": str(len(body))})
        time.sleep(0.1)
        self.wfile.write(body[1:])

    def do_large(self, path: str) -> None:
        self.answer(200, LARGE)

    def do_bomb(self, path: str) -> None:
        self.answer(200, BOMB, {"Content-Encoding": "gzip", "Content-Type": "image/jpeg"})

    def do_imagebomb(self, path: str) -> None:
        self.answer(200, IMAGE_BOMB, {"Content-Encoding": "gzip"})

    def do_brotli(self, path: str) -> None:
        self.answer(200, IMAGE, {"Content-Encoding": "br"})

    def do_noai(self, path: str) -> None:
        self.answer(200, IMAGE, {"X-Robots-Tag": path.split("/")[2].replace("+", " ")})

    def do_empty(self, path: str) -> None:
        self.answer(200, b"", {"Content-Type": "image/jpeg"})

    def do_garbage(self, path: str) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")
        self.close_connection = True

    def do_headers(self, path: str) -> None:
        """A header of a megabyte."""
        self.answer(200, IMAGE, {"X-Long": "x" * (1 << 20)})
