"""The rules of site owners for robots: the X-Robots-Tag header of a response, and robots.txt of a host (RFC 9309).

robots.txt is parsed by Protego. Python's urllib.robotparser treats `*` and `$` in a path literally and uses the first
matching rule instead of the longest, so it would ignore `Disallow: /*.jpg$`.
"""

import asyncio
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from protego import Protego

from pipeline.data.codecs import Refused

DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives of X-Robots-Tag that exclude an image; `none` means noindex and nofollow."""
VALUED = re.compile(r"max-|[\d\s-]+$")
"""What precedes a colon and is not the name of a robot: a directive with a value, or the hour of a date."""
DATE = re.compile(r"(?i)\bunavailable_after\s*:(\s*(mon|tue|wed|thu|fri|sat|sun)[a-z]*\s*,)?[^,]*")
"""A directive with a date, which may contain a comma and colons."""
MAX_BYTES = 500 << 10  # of robots.txt are read (RFC 9309, section 2.5)
MAX_CRAWL_DELAY = 60.0  # seconds; images of hosts with a longer delay are not downloaded
KEPT_BYTES = 4 << 20  # of all cached robots.txt; the parsed rules take about seventeen times as much
ENTRY_BYTES = 256  # counted for a host without rules
KEPT_SECONDS = 3600.0  # lifetime of the cache; RFC 9309 allows at most a day
KEPT_FAILURE_SECONDS = 60.0

Get = Callable[[str], Awaitable[tuple[int, bytes]]]
"""(status, body) of the file at an address; raises Refused if the host does not respond."""


def forbidden_by(values: Iterable[str], robot: str) -> str:
    """The directive among the values of X-Robots-Tag that excludes an image, for every robot or for `robot`; "" for
    none. A value is `noai, noindex` or `NAME: noai`."""
    for value in values:
        named: str | None = None
        for part in DATE.sub("", value).split(","):
            name, colon, directive = (text.strip().lower() for text in part.partition(":"))
            if colon and VALUED.match(name):
                continue
            if colon:
                named, name = name, directive  # also applies to the following directives
            if name in DIRECTIVES and named in (None, "*", robot.lower()):
                return name
    return ""


@dataclass(frozen=True, slots=True)
class _Known:
    """The cached robots.txt of a host, valid until a time of time.monotonic."""

    until: float
    rules: Protego | None = None
    failure: Refused | None = None


class _Cache:
    """The robots.txt of the hosts that were asked last, by origin; together at most KEPT_BYTES of text."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[_Known, int]] = OrderedDict()
        self._bytes = 0
        self._mutex = threading.Lock()

    def get(self, origin: str) -> _Known | None:
        known = self._known.get(origin)
        return known and known[0]

    def put(self, origin: str, known: _Known, size: int) -> None:
        size += ENTRY_BYTES
        with self._mutex:
            self._bytes += size - self._known.pop(origin, (known, 0))[1]
            self._known[origin] = known, size
            while self._bytes > KEPT_BYTES:
                self._bytes -= self._known.popitem(last=False)[1][1]


_answered = _Cache()  # kept after a unit of work, unlike failures


class RobotsFiles:
    """robots.txt of each host, fetched once per process. robot: our name in robots.txt."""

    def __init__(self, robot: str) -> None:
        self.robot = robot
        self._failed: dict[str, _Known] = {}
        self._fetching: dict[str, asyncio.Task[_Known]] = {}

    async def crawl_delay(self, origin: str, address: str, get: Get) -> float:
        """Seconds between requests that the host requires. origin: for example https://example.org. Raises Refused:
        robots.txt (the address is disallowed), robots.txt unreachable (a server error), or the reason why the host does
        not respond.
        """
        known = self._failed.get(origin) or _answered.get(origin)
        if known is None or known.until < time.monotonic():
            task = self._fetching.get(origin)
            if task is None:
                task = self._fetching[origin] = asyncio.create_task(self._read(origin, get))
                task.add_done_callback(lambda _: self._fetching.pop(origin, None))
            known = await asyncio.shield(task)
        if known.failure is not None:
            raise Refused(known.failure.reason, known.failure.detail)
        if known.rules is None:
            return 0.0
        if not known.rules.can_fetch(address, self.robot):
            raise Refused("robots.txt", "disallowed")
        delay = float(known.rules.crawl_delay(self.robot) or 0.0)
        if not 0 <= delay <= MAX_CRAWL_DELAY:
            raise Refused("robots.txt", f"crawl delay of {delay:g} s")
        return delay

    async def _read(self, origin: str, get: Get) -> _Known:
        now = time.monotonic()
        try:
            status, body = await get(f"{origin}/robots.txt")
            if status >= 500 or status == 429:
                raise Refused("robots.txt unreachable", f"http {status}")
        except Refused as failure:
            known = self._failed[origin] = _Known(now + KEPT_FAILURE_SECONDS, failure=failure)
            return known
        self._failed.pop(origin, None)
        rules, body = None, body[:MAX_BYTES] if 200 <= status < 300 else b""  # any other status: no robots.txt
        if body:
            rules = await asyncio.to_thread(Protego.parse, body.decode("utf-8-sig", "replace"))
        known = _Known(now + KEPT_SECONDS, rules=rules)
        _answered.put(origin, known, len(body))
        return known
