"""https:// addresses, read only: files and datasets on any web server, through fsspec's HTTP session (aiohttp).

Web servers have no listings, so an address names one file, or a dataset whose manifest names its files. The server must
support byte ranges, except for small files. A signed query (SAS, presigned S3 or Google URLs) is removed from the
address: see `pipeline.credentials.take_queries`. http:// is accepted only for this machine. A login of ~/.netrc is sent
only to the host of the address.
"""

import asyncio
import contextlib
import netrc
import os
import urllib.parse
import urllib.request
from typing import Any

from pipeline import credentials
from pipeline.errors import UserError
from pipeline.libraries import import_library
from pipeline.stores import base
from pipeline.stores.base import Entry, ObjectStore, check_range

WHOLE = 64 << 20  # maximum file size on a server without ranges, which sends the complete file for each part
REDIRECTS = 5
LOOPBACK = ("localhost", "127.0.0.1", "::1")
EMPTY = "bytes */0"  # Content-Range of an empty file


class WebStore(ObjectStore):
    EXAMPLE = "https://host/file.tar"
    ROOT = "host"
    WRITABLE = False
    LISTS = False
    ACCESS = "check that the address, or its signature, is still valid"
    REMEDY = "check that the server is up, and the address"

    def __init__(self) -> None:
        super().__init__()
        self._aiohttp: Any = import_library("aiohttp")
        from fsspec.implementations.http import HTTPFileSystem
        from yarl import URL

        self._url: Any = URL

        timeout = self._aiohttp.ClientTimeout(
            total=None, sock_connect=base.CONNECT_TIMEOUT, sock_read=base.READ_TIMEOUT
        )
        # Without automatic decompression, so that a .tar.gz that is served with Content-Encoding: gzip is unchanged.
        options = {
            "timeout": timeout,
            "trust_env": False,  # aiohttp would send a login of ~/.netrc to the host of a redirect; see `_proxy`
            "auto_decompress": False,
            "headers": {"Accept-Encoding": "identity", "User-Agent": "vit-pipeline"},
        }
        self._fs = HTTPFileSystem(client_kwargs=options, skip_instance_cache=True)

    @classmethod
    def endpoint(cls, uri: str) -> str:
        scheme, _, rest = credentials.redacted(uri).partition("://")
        return f"{scheme}://{rest.partition('/')[0]}"

    def _get(self, uri: str, start: int, end: int | None, exact: bool) -> bytes:
        if not start and end is None:
            return self._ask(uri, None)[1]
        headers, data = self._ask(uri, f"bytes={start}-{'' if end is None else end - 1}")
        return check_range(data, headers.get("Content-Range"), start, end, uri if exact else None)

    def _head(self, uri: str) -> Entry:
        """Requests the first byte, because many servers, and all presigned URLs, refuse HEAD."""
        try:
            headers, _ = self._ask(uri, "bytes=0-0", body=False)
        except self._aiohttp.ClientResponseError as error:
            if error.status != 416 or (error.headers or {}).get("Content-Range") != EMPTY:
                raise
            headers = {"Content-Length": "0"}
        size = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
        if not size.isdigit():
            raise UserError(
                f"{credentials.redacted(uri)}: the server does not report the size of the file; download it first"
            )
        return Entry("", int(size), headers.get("ETag") or headers.get("Last-Modified") or "")

    def _page(self, uri: str, recursive: bool, token: Any, limit: int | None) -> tuple[list[Entry], Any]:
        raise NotImplementedError

    def _ask(self, uri: str, part: str | None, body: bool = True) -> tuple[Any, bytes]:
        """(headers, body) of a response. part: the Range header. body: False does not read the body."""
        from fsspec.asyn import sync

        return sync(self._fs.loop, self._request, uri, part, body)

    def _address(self, uri: str) -> str:
        """The URL of the file."""
        return credentials.with_query(uri)

    def _login(self, endpoint: str) -> dict[str, str]:
        """The headers for authentication, from ~/.netrc or the file that NETRC names."""
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            logins = netrc.netrc(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
            if found := logins.authenticators(urllib.parse.urlsplit(endpoint).hostname or ""):
                return {"Authorization": self._aiohttp.BasicAuth(found[0], found[2] or "", "utf-8").encode()}
        return {}

    async def _request(self, uri: str, part: str | None, body: bool) -> tuple[Any, bytes]:
        session = await self._fs.set_session()
        address, endpoint = self._address(uri), self.endpoint(uri)
        for count in range(REDIRECTS + 1):
            _check_scheme(address, uri, endpoint, redirected=count > 0)
            headers = {"Range": part} if part else {}
            if _origin(address) == _origin(endpoint):
                headers |= self._login(endpoint)  # never sent to another host, of a redirect or a page
            # Quoted parts are unchanged, because a signature covers them.
            url = self._url(address, encoded="%" in address and address.isascii() and " " not in address)
            async with session.get(url, headers=headers, proxy=_proxy(address), allow_redirects=False) as answer:
                if answer.status in (301, 302, 303, 307, 308) and (target := answer.headers.get("Location")):
                    address = urllib.parse.urljoin(address, target)
                    continue
                answer.raise_for_status()
                if part and answer.status == 200 and body:
                    _refuse_whole(uri, answer.content_length)
                return answer.headers, await answer.read() if body else b""
        raise UserError(f"{credentials.redacted(uri)}: more than {REDIRECTS} redirects")

    # ------------------------------------------------------------ errors

    def _status(self, error: Exception) -> int:
        status = error.status if isinstance(error, self._aiohttp.ClientResponseError) else 0
        return 404 if status == 410 else status

    def _may_pass(self, error: Exception) -> bool:
        if isinstance(error, (self._aiohttp.ClientConnectorCertificateError, self._aiohttp.InvalidURL)):
            return False
        return isinstance(error, (self._aiohttp.ClientError, asyncio.TimeoutError, OSError))

    def _unsent(self, error: Exception) -> str | None:
        if isinstance(error, self._aiohttp.ClientConnectorCertificateError):
            return f"the server's certificate is not trusted ({error}); correct the address, or set SSL_CERT_FILE"
        return None


def _check_scheme(address: str, uri: str, endpoint: str, redirected: bool) -> None:
    """Raises UserError for an unencrypted address or another protocol. http:// is allowed between servers of this
    machine; no other server may redirect to one of these."""
    parts = urllib.parse.urlsplit(address)
    is_local = parts.hostname in LOOPBACK and urllib.parse.urlsplit(endpoint).hostname in LOOPBACK
    if parts.scheme != "https" and not (parts.scheme == "http" and is_local):
        where = credentials.redacted(uri)
        to = f" redirects to {parts.scheme}://{parts.hostname}, which" if redirected else ""
        raise UserError(f"{where}:{to} is not encrypted; use https://")


def _origin(address: str) -> tuple[str, str]:
    """(protocol, host and port) of an address, for comparison."""
    parts = urllib.parse.urlsplit(address)
    return parts.scheme, parts.netloc.lower().removesuffix(":443" if parts.scheme == "https" else ":80")


def _proxy(address: str) -> str | None:
    """The proxy of the environment (HTTPS_PROXY, NO_PROXY, ...) for an address."""
    parts = urllib.parse.urlsplit(address)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _refuse_whole(uri: str, size: int | None) -> None:
    if size is None or size > WHOLE:
        raise UserError(
            f"{credentials.redacted(uri)}: the server does not support byte ranges; download the file first"
        )
