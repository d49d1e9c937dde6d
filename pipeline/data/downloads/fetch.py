"""Downloads the image file at one address. A failed download raises Refused; its reason is from a small set, for
counting: `http 404`, `timeout`, `connection failed`, `no such host`, `private address`, `bad address`, `too many
redirects`, `certificate`, `incomplete body`, `bad response`, `too many bytes`, `not an image`, `empty`, `unsupported
encoding`, `robots.txt`, `robots.txt unreachable`, `x-robots-tag`. `config.is_temporary` tells which failures are
temporary. Details never contain an address with a password.
"""

import asyncio
import contextlib
import email.utils
import errno
import ipaddress
import random
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

import aiohttp
import yarl

from pipeline.data import codecs
from pipeline.data.codecs import Refused
from pipeline.data.downloads import robots
from pipeline.data.downloads.addresses import AddressPolicy, CheckedResolver, RefusedAddress, checked_socket
from pipeline.data.downloads.bodies import Body, Memory
from pipeline.data.downloads.config import DownloadConfig, is_temporary
from pipeline.data.downloads.limits import HostLimits
from pipeline.errors import UserError

REDIRECTS = frozenset({301, 302, 303, 307, 308})
HEADER_BYTES = 32 << 10  # limit of one header field and of the status line
BODY_BYTES = 128 << 20  # of the bodies in memory of a Fetcher, unless it is given a `Memory`
HEAD_BYTES = 32  # first bytes, which identify the image format
MAX_BACKOFF = 30.0  # seconds between two attempts


class Gate(Protocol):
    """Says when the request for an image may begin."""

    def is_open(self) -> bool: ...

    async def wait(self) -> None:
        """Waits until it is open."""


class Fetcher:
    """An HTTP session with its limits: `async with Fetcher(config) as fetcher: await fetcher.fetch(address)`."""

    def __init__(
        self,
        config: DownloadConfig,
        *,
        allow_private: bool = False,
        limits: HostLimits | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.config = config
        self._memory = memory or Memory(BODY_BYTES)
        networks = tuple(ipaddress.ip_network(text) for text in config.private_networks)
        self._policy = AddressPolicy(allow_private, networks)
        self._limits = limits or HostLimits(config.per_host, config.rate, config.max_wait)
        self._robots = robots.RobotsFiles(config.robot_name)
        self._connections = asyncio.Semaphore(config.connections)

    async def __aenter__(self) -> "Fetcher":
        connector = aiohttp.TCPConnector(
            limit=0,  # the semaphore limits
            resolver=CheckedResolver(self._policy),
            socket_factory=checked_socket(self._policy),
            ttl_dns_cache=300,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={
                "User-Agent": self.config.user_agent,
                "Accept": "image/*,*/*;q=0.1",
                "Accept-Encoding": "identity",
            },
            max_line_size=HEADER_BYTES,
            max_field_size=HEADER_BYTES,
            timeout=aiohttp.ClientTimeout(
                total=self.config.timeout,
                sock_connect=self.config.connect_timeout,
                sock_read=self.config.stall_timeout,
            ),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def fetch(self, address: str, gate: Gate | None = None) -> Body:
        """The image file at an address. Raises Refused; NotWritten for a problem of the temporary folder; UserError
        if this machine has no locks or open files left."""
        return await self._with_retries(lambda: self._image(_parse(address), gate))

    async def _with_retries(self, attempt: Any) -> Any:
        for number in range(self.config.retries + 1):
            try:
                return await attempt()
            except Refused as refused:
                if number == self.config.retries or not is_temporary(refused.reason):
                    raise
            await asyncio.sleep(min(MAX_BACKOFF, 2.0**number) * (0.5 + random.random()))

    # ------------------------------------------------------------ redirects

    async def _image(self, url: yarl.URL, gate: Gate | None) -> Body:
        for _ in range(self.config.max_redirects + 1):
            delay = await self._crawl_delay(url)
            async with self._answer(url, delay, gate) as answer:
                target = _redirect(answer, url)
                if target is None:
                    return await self._body(answer)
            url = target
        raise Refused("too many redirects", f"more than {self.config.max_redirects}")

    async def _crawl_delay(self, url: yarl.URL) -> float:
        if self.config.robots != "obey":
            return 0.0
        return await self._robots.crawl_delay(str(url.origin()), str(url.with_user(None)), self._robots_file)

    async def _robots_file(self, address: str) -> tuple[int, bytes]:
        """(status, body) of robots.txt, after redirects."""

        async def attempt() -> tuple[int, bytes]:
            url = _parse(address)
            for _ in range(self.config.max_redirects + 1):
                async with self._answer(url, 0.0) as answer:
                    target = _redirect(answer, url)
                    if target is None:
                        if answer.status != 200:
                            return answer.status, b""
                        decoder = _Decoder(answer, robots.MAX_BYTES, cut=True)
                        with await decoder.read(Body(self._memory)) as body:
                            return answer.status, body.read()
                url = target
            return 404, b""  # RFC 9309, section 2.3.1.2: too many redirects count as no robots.txt

        return await self._with_retries(attempt)

    # ------------------------------------------------------------ one request

    @contextlib.asynccontextmanager
    async def _turn(self, host: str, crawl_delay: float, gate: Gate | None) -> AsyncIterator[None]:
        """Waits until a request may begin. Nothing is reserved while the gate is closed, because the request for which it
        closed may need a connection."""
        while gate is not None:
            await gate.wait()
            async with self._limits.request(host, crawl_delay), self._connections:
                if gate.is_open():
                    yield
                    return
        async with self._limits.request(host, crawl_delay), self._connections:
            yield

    @contextlib.asynccontextmanager
    async def _answer(
        self, url: yarl.URL, crawl_delay: float, gate: Gate | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to one request, with its headers read. Network errors, also in
        the with block, are raised as Refused."""
        host = f"{url.host}:{url.port}"
        async with self._turn(host, crawl_delay, gate):
            try:
                async with self._session.get(url, allow_redirects=False) as answer:
                    try:
                        self._note_pause(host, answer)
                        yield answer
                    finally:
                        if not answer.content.at_eof():
                            answer.close()  # a connection with an unread body cannot be reused
            except Refused:
                raise
            except (TimeoutError, aiohttp.ClientError, OSError, ValueError, zlib.error) as error:
                if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                    raise UserError(
                        f"this process has no open files left ({error.strerror}); lower --download.connections "
                        f"{self.config.connections}, or raise the limit (ulimit -n)"
                    ) from error
                raise _refused(error) from error

    def _note_pause(self, host: str, answer: aiohttp.ClientResponse) -> None:
        if answer.status in (429, 503) and (seconds := _retry_after(answer.headers.get("Retry-After"))):
            self._limits.pause(host, seconds)

    async def _body(self, answer: aiohttp.ClientResponse) -> Body:
        """The checked body of a response that is not a redirect."""
        if answer.status != 200:
            raise Refused(f"http {answer.status}")
        if self.config.robots != "ignore":
            tags = answer.headers.getall("X-Robots-Tag", ())
            if directive := robots.forbidden_by(tags, self.config.robot_name):
                raise Refused("x-robots-tag", directive)
        if (answer.content_length or 0) > self.config.max_bytes:
            raise Refused("too many bytes", f"{answer.content_length:,}, the limit is {self.config.max_bytes:,}")
        return await _Decoder(answer, self.config.max_bytes).read(Body(self._memory), _refuse_other_types)


class _Decoder:
    """Reads and decompresses a body up to a limit. cut: truncate a longer body instead of refusing it."""

    def __init__(self, answer: aiohttp.ClientResponse, limit: int, *, cut: bool = False) -> None:
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise Refused("unsupported encoding", encoding[:40])
        self._answer, self._limit, self._cut = answer, limit, cut
        self._is_deflate = encoding == "deflate"
        self._inflate = None if encoding in ("identity", "") else zlib.decompressobj(15 + 32)  # detects gzip or zlib
        self._start = b""

    async def read(self, body: Body, check: Any = None) -> Body:
        """Writes to `body`. check(answer, first bytes) may raise Refused before the rest is read. Closes the body if it
        raises an exception."""
        try:
            await self._read(body, check)
        except BaseException:
            body.close()
            raise
        return body

    async def _read(self, body: Body, check: Any) -> None:
        checked = check is None
        async for chunk in self._answer.content.iter_any():
            for part in self._parts(chunk, self._limit - body.size):
                if body.size + len(part) > self._limit and not self._cut:
                    raise Refused("too many bytes", f"more than the limit of {self._limit:,}")
                body.write(part)
                if not checked and body.size >= HEAD_BYTES:
                    check(self._answer, body.head(HEAD_BYTES))
                    checked = True
            if body.size > self._limit:
                break
        else:
            if self._inflate is not None and not self._inflate.eof:
                raise Refused("incomplete body", "the compressed body is incomplete")
        if not body.size and check is not None:
            raise Refused("empty")
        if not checked:
            check(self._answer, body.head(HEAD_BYTES))

    def _parts(self, chunk: bytes, room: int):
        """A chunk, decompressed in parts of at most 64 KiB. The last part may exceed `room`."""
        if self._inflate is None:
            yield chunk
            return
        if self._is_deflate:
            chunk = self._start = self._start + chunk
            if len(chunk) < 2:
                return
            self._is_deflate = False
            if not _has_header(chunk):  # some servers send deflate without the zlib header that RFC 9110 requires
                self._inflate = zlib.decompressobj(-15)
        while chunk and room >= 0 and not self._inflate.eof:
            part = self._inflate.decompress(chunk, 1 << 16)
            chunk = self._inflate.unconsumed_tail
            room -= len(part)
            yield part


def _has_header(data: bytes) -> bool:
    """Whether compressed data begins like zlib (RFC 1950, section 2.2) or gzip."""
    return (data[0] & 15 == 8 and (data[0] << 8 | data[1]) % 31 == 0) or data.startswith(b"\x1f\x8b")


def _refuse_other_types(answer: aiohttp.ClientResponse, head: bytes) -> None:
    """Raises Refused if the first bytes are not those of an image, for any content type."""
    if not codecs.is_image_data(head):
        kind = answer.headers.get("Content-Type", "none")[:60]
        raise Refused("not an image", f"content type {kind}, first bytes {head[:12]!r}")


def _parse(address: str) -> yarl.URL:
    """Raises Refused (bad address) unless the text is an absolute http:// or https:// address."""
    try:
        return _checked(yarl.URL(address.strip()))
    except (ValueError, UnicodeError) as error:
        raise Refused("bad address", "cannot be parsed") from error


def _checked(url: yarl.URL) -> yarl.URL:
    if url.scheme not in ("http", "https"):
        raise Refused("bad address", f"the scheme is {url.scheme[:20]!r}" if url.scheme else "no http:// or https://")
    if not url.host:
        raise Refused("bad address", "no host")
    url.port  # noqa: B018
    return url.with_fragment(None)


def _redirect(answer: aiohttp.ClientResponse, url: yarl.URL) -> yarl.URL | None:
    """The target of a redirect; None for other responses. The login of the first address is not sent to the target."""
    location = answer.headers.get("Location")
    if answer.status not in REDIRECTS or location is None:
        return None
    try:
        return _checked(url.join(yarl.URL(location))).with_user(None)
    except (ValueError, UnicodeError) as error:
        raise Refused("bad address", "of a redirect, cannot be parsed") from error


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which may contain a date; 0 without the header."""
    if not value:
        return 0.0
    if value.strip().isdecimal():
        return float(value.strip()[:9])
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _refused(error: BaseException) -> Refused:
    """The reason for a network exception."""
    chain: list[Any] = [error]
    while (cause := getattr(chain[-1], "os_error", None) or chain[-1].__cause__) and cause not in chain:
        chain.append(cause)
    for each in chain:
        if isinstance(each, RefusedAddress):
            return Refused("private address", str(each))
        if isinstance(each, ssl.SSLCertVerificationError | aiohttp.ClientConnectorCertificateError):
            return Refused("certificate", getattr(each, "verify_message", "") or "not valid for this host")
        if isinstance(each, socket.gaierror):
            gone = each.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None))
            return Refused("no such host" if gone else "connection failed", str(each.strerror))
    if isinstance(error, asyncio.TimeoutError):
        return Refused("timeout")
    if isinstance(error, aiohttp.ClientPayloadError | zlib.error):
        return Refused("incomplete body", "the connection ended early, or the body is damaged")
    if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError | UnicodeError):
        return Refused("bad address", "cannot be asked for")
    if isinstance(error, aiohttp.ClientConnectionError | OSError):
        return Refused("connection failed", getattr(chain[-1], "strerror", None) or type(error).__name__)
    return Refused("bad response", type(error).__name__)
