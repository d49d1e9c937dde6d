"""An S3 store over a network: serves a folder read-only, with a latency for each request and one bandwidth for all.

    with slow_store(folder, latency=0.05, bandwidth=100e6) as endpoint:     # AWS_ENDPOINT_URL; also plain HTTP with ranges
        open_dataset("s3://bucket/shards")                                  # FOLDER/bucket/shards

The server is a process of its own. Answers are sent in pieces, each when the bandwidth that all connections share allows it.
Signatures are not checked.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PIECE = 256 << 10


@contextlib.contextmanager
def slow_store(folder: Path, latency: float, bandwidth: float) -> Iterator[str]:
    """Yields the endpoint. latency in seconds, bandwidth in bytes per second."""
    command = [sys.executable, __file__, str(folder), str(latency), str(bandwidth)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


class _Link:
    """The bandwidth that all answers share."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth, self._free, self._lock = bandwidth, 0.0, threading.Lock()

    def wait(self, size: int) -> None:
        """Returns when `size` bytes have passed."""
        with self._lock:
            now = time.monotonic()
            self._free = max(now, self._free) + size / self.bandwidth
            pause = self._free - now
        time.sleep(pause)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    latency: float
    link: _Link

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        time.sleep(self.latency)
        address = urlsplit(self.path)
        path, query = self.folder / unquote(address.path).strip("/"), parse_qs(address.query)
        if "list-type" in query:
            self._answer(200, self._listing(path, query).encode())
        elif not path.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._send_file(path)

    def log_message(self, *_: object) -> None:
        pass

    def _listing(self, bucket: Path, query: dict[str, list[str]]) -> str:
        prefix, delimiter = query.get("prefix", [""])[0], "delimiter" in query
        names = sorted(str(path.relative_to(bucket)) for path in bucket.rglob("*") if path.is_file())
        names = [name for name in names if name.startswith(prefix)]
        folders = {prefix + name[len(prefix) :].split("/")[0] + "/" for name in names if "/" in name[len(prefix) :]}
        rows = [
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;e&quot;"
            f"</ETag><Size>{(bucket / name).stat().st_size}</Size></Contents>"
            for name in names
            if not delimiter or "/" not in name[len(prefix) :]
        ]
        rows += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders if delimiter]
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        about = f"<Name>{bucket.name}</Name><KeyCount>{len(rows)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f'<?xml version="1.0"?><ListBucketResult xmlns="{space}">{about}{"".join(rows)}</ListBucketResult>'

    def _send_file(self, path: Path) -> None:
        size = path.stat().st_size
        first, last = 0, size - 1
        if asked := self.headers.get("Range"):
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end), last) if end else last
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.flush()
        with open(path, "rb") as file, contextlib.suppress(ConnectionError):
            for start in range(first, last + 1, PIECE):
                length = min(PIECE, last + 1 - start)
                self.link.wait(length)
                while length:
                    sent = os.sendfile(self.connection.fileno(), file.fileno(), start, length)
                    start, length = start + sent, length - sent

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def main() -> None:
    folder, latency, bandwidth = sys.argv[1:]
    settings = {"folder": Path(folder), "latency": float(latency), "link": _Link(float(bandwidth))}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), settings))
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
