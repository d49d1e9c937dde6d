"""A web server on loopback for tests of https:// addresses: serves the files of
a folder, with ranges and optional conditions."""

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FileServer:
    """Serves the files under `folder` while the block lasts.

    ranges: whether it serves parts of files. sizes: whether it says how large a file is. query: the required end of
    every address.
    certificate: PEM file for https://, with the key. redirects: {path: where it is}. `requests` holds (method, path with its query, Range) of every request, `logins` its Authorization.
    """

    def __init__(self, folder: Path, host: str = "127.0.0.1", certificate: Path | None = None) -> None:
        self.folder, self.ranges, self.sizes, self.query = folder, True, True, ""
        self.redirects: dict[str, str] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.logins: list[str] = []
        self._server = ThreadingHTTPServer((host, 0), type("Handler", (FileHandler,), {"web": self}))
        self._server.daemon_threads = True
        self.address = f"http{'s' if certificate else ''}://{host}:{self._server.server_port}"
        if certificate:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> "FileServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class FileHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.web.requests.append((self.command, self.path, wanted))
        self.web.logins.append(self.headers.get("Authorization", ""))
        parts = urlsplit(self.path)
        if parts.path in self.web.redirects:
            self.answer(302, b"", Location=self.web.redirects[parts.path])
            return
        if self.web.query and parts.query != self.web.query:
            self.answer(403, b"no signature")
            return
        file = self.web.folder / unquote(parts.path).lstrip("/")
        self.send_file(file)

    def send_file(self, file: Path) -> None:
        """Sends the file, or the requested range."""
        wanted = self.headers.get("Range", "")
        if not file.is_file():
            self.answer(404, b"nothing here")
            return
        data = file.read_bytes()
        if not wanted or not self.web.ranges:
            self.answer(200, data, ETag='"whole"')
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            self.answer(416, b"", **{"Content-Range": f"bytes */{len(data)}"})
            return
        self.answer(206, data[start:end], **{"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    def do_HEAD(self) -> None:  # as presigned addresses do
        self.answer(403, b"")

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.web.sizes:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(data)
