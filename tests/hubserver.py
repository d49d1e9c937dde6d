"""A small Hugging Face Hub on loopback: data sets in folders, with the parts of its API that reading needs.

with HubServer(folder) as hub: ...         # HF_ENDPOINT is hub.address; folder/OWNER/NAME/REVISION holds the files
"""

import hashlib
import json
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.fileserver import FileHandler, FileServer


class HubServer:
    """Files larger than `large` bytes are redirected to a server of another address, as the Hub does with those of LFS.

    token: required in every request. page: entries per page of a listing. `requests` holds (path, Authorization).
    """

    def __init__(self, folder: Path, large: int = 1000, page: int = 7) -> None:
        self.folder, self.large, self.page, self.token = folder, large, page, ""
        self.pages = ""  # the server that the address of the next page names, if it is another one
        self.requests: list[tuple[str, str]] = []
        self.files = FileServer(folder)
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self, "web": self.files})
        )
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self.files.__enter__()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.files.__exit__()


class _Handler(FileHandler):
    hub: HubServer

    def do_GET(self) -> None:
        self.hub.requests.append((self.path, self.headers.get("Authorization", "")))
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, b"Repository Not Found")
            return
        parts = urlsplit(self.path)
        words = parts.path.strip("/").split("/")
        if words[:2] == ["api", "datasets"] and words[4] == "tree":
            self._tree("/".join(words[2:4]), unquote(words[5]), unquote("/".join(words[6:])), parse_qs(parts.query))
            return
        _, owner, name, _, revision, *path = words
        file = self.hub.folder / owner / name / unquote(revision) / unquote("/".join(path))
        if file.is_file() and file.stat().st_size > self.hub.large:
            where = "/".join((owner, name, revision, *path))
            self.answer(302, b"", Location=f"{self.hub.files.address}/{where}?X-Amz-Signature=cdn-5e7f22")
            return
        self.send_file(file)

    def _tree(self, name: str, revision: str, folder: str, query: dict[str, list[str]]) -> None:
        root = self.hub.folder / name / revision
        top = root / folder
        if not top.is_dir():
            self.answer(404, b'{"error": "not found"}')
            return
        found = sorted(top.rglob("*") if query["recursive"] == ["true"] else top.iterdir())
        entries = [
            {"type": "directory", "path": str(path.relative_to(root)), "oid": "tree", "size": 0}
            if path.is_dir()
            else {
                "type": "file",
                "path": str(path.relative_to(root)),
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                "size": path.stat().st_size,
            }
            for path in found
        ]
        first, page = int(query.get("cursor", ["0"])[0]), int(query.get("limit", [str(self.hub.page)])[0])
        more = {}
        if first + page < len(entries):
            address = f"{self.hub.pages or self.hub.address}{self.path.partition('&cursor')[0]}&cursor={first + page}"
            more = {"Link": f'<{address}>; rel="next"'}
        self.answer(200, json.dumps(entries[first : first + page]).encode(), **more)
