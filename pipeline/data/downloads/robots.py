"""The rules of site owners for robots: the X-Robots-Tag header of a response, and robots.txt of a host (RFC 9309).

robots.txt is parsed by Protego. Python's urllib.robotparser treats `*` and `$` in a path literally and uses the first
matching rule instead of the longest, so it would ignore `Disallow: /*.jpg$`.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from protego import Protego

from pipeline.data.codecs import Refused

DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives of X-Robots-Tag that exclude an image; `none` means noindex and nofollow."""
MAX_BYTES = 500 << 10  # of robots.txt are read (RFC 9309, section 2.5)
MAX_CRAWL_DELAY = 60.0  # seconds; images of hosts with a longer delay are not downloaded
KEPT_HOSTS = 4096  # number of hosts whose robots.txt is cached
KEPT_SECONDS = 3600.0  # lifetime of the cache; RFC 9309 allows at most a day
KEPT_FAILURE_SECONDS = 60.0

Get = Callable[[str], Awaitable[tuple[int, bytes]]]
"""(status, body) of the file at an address; raises Refused if the host does not respond."""


def forbidden_by(values: Iterable[str], robot: str) -> str:
    """The directive among the values of X-Robots-Tag that excludes an image, for every robot or for `robot`; "" for
    none. A value is `noai, noindex` or `NAME: noai`."""
    for value in values:
        named: str | None = None
        for part in value.split(","):
            name, colon, directive = part.partition(":")
            if colon and name.strip().lower() not in ("unavailable_after", "max-snippet", "max-image-preview"):
                named, part = name.strip().lower(), directive  # also applies to the following directives
            word = part.strip().lower()
            if word in DIRECTIVES and named in (None, "*", robot):
                return word
    return ""


@dataclass(frozen=True, slots=True)
class _Known:
    """The cached robots.txt of a host, valid until a time of time.monotonic."""

    until: float
    rules: Protego | None = None
    failure: Refused | None = None


_answered: OrderedDict[str, _Known] = OrderedDict()  # by origin; kept after a unit of work, unlike failures


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
        rules = None  # any other status: no robots.txt
        if 200 <= status < 300:
            rules = await asyncio.to_thread(Protego.parse, body[:MAX_BYTES].decode("utf-8-sig", "replace"))
        known = _answered[origin] = _Known(now + KEPT_SECONDS, rules=rules)
        _answered.move_to_end(origin)
        while len(_answered) > KEPT_HOSTS:
            _answered.popitem(last=False)
        return known
