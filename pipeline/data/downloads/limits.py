"""Limits the requests to one host, over all processes of a node. Processes are coordinated with file locks: a request
to a host locks one byte of a file, and each host has as many bytes as it may have concurrent requests. The kernel
releases the locks of a killed process. A second, memory-mapped file has the times of the next allowed requests; its
clock starts at boot, so each boot has a file of its own. Both files are sparse and indexed
by a hash of the host name.
"""

import asyncio
import contextlib
import errno
import fcntl
import functools
import hashlib
import mmap
import os
import random
import stat
import struct
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from pipeline.data.codecs import Refused
from pipeline.errors import UserError

SLOTS = 4096  # bytes of the lock file for each host
HOSTS = 1 << 18  # entries in the file of times
# Earliest next request, and end of the pause that the host asked for: seconds of time.monotonic.
ENTRY = struct.Struct("dd")
MAX_PAUSE = 3600.0  # seconds that a host may ask for
MAX_QUEUE = 86_400.0  # seconds until the next allowed request, which is later with each waiting request
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of the machine, on Linux
POLL = 0.02  # seconds between attempts to get a lock that another process holds


class _Files:
    """The two files in a folder. A process opens them once and never closes them,
    because closing a file releases all its locks."""

    def __init__(self, folder: str, start: str) -> None:
        self.folder = folder
        self.locks, times = _open_private(folder, "locks"), _open_private(folder, f"times-{start}")
        if os.fstat(times).st_size != HOSTS * ENTRY.size:
            os.ftruncate(times, HOSTS * ENTRY.size)
        self.times = mmap.mmap(times, HOSTS * ENTRY.size)
        os.close(times)
        self.held: set[int] = set()  # positions locked by this process, which its own locks do not block
        self.mutex = threading.Lock()

    def try_lock(self, position: int) -> bool:
        with self.mutex:
            if position in self.held:
                return False
            if not self._lock(position, fcntl.LOCK_NB):
                return False
            self.held.add(position)
            return True

    def _lock(self, position: int, flags: int = 0) -> bool:
        """False if another process has the lock and `flags` has LOCK_NB. Raises UserError if the file system has no
        locks."""
        try:
            fcntl.lockf(self.locks, fcntl.LOCK_EX | flags, 1, position)
        except OSError as error:
            if flags and error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise UserError(f"{self.folder}: files cannot be locked ({error}); set TMPDIR to a local folder") from error
        return True

    def unlock(self, position: int) -> None:
        with self.mutex:
            fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, position)
            self.held.discard(position)

    @contextlib.contextmanager
    def entry(self, place: int) -> Iterator[tuple[int, float, float]]:
        """(offset of a host's times, earliest next request, end of its pause), locked."""
        number = place % HOSTS
        position, at = (1 << 60) + number, number * ENTRY.size
        with self.mutex:
            self._lock(position)
            try:
                following, pause = ENTRY.unpack_from(self.times, at)
                now = time.monotonic()  # the file may be older than the machine where BOOT_ID does not exist
                if not following <= now + MAX_QUEUE:
                    following = 0.0
                if not pause <= now + MAX_PAUSE:
                    pause = 0.0
                yield at, following, pause
            finally:
                fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, position)


_files = functools.cache(_Files)


class HostLimits:
    """per_host: concurrent requests. rate: requests per second, None for no limit. max_wait: the longest pause in
    seconds that a host may request; requests fail if it is longer. Processes share
    the limits through the files in `folder`."""

    def __init__(self, per_host: int, rate: float | None, max_wait: float, folder: str | None = None) -> None:
        self.per_host, self.interval, self.max_wait = min(per_host, SLOTS), 1 / rate if rate else 0.0, max_wait
        self._files = _files(folder or os.path.join(tempfile.gettempdir(), f"vit-hosts-{os.getuid()}"), _start())
        self._next = 0
        self._waiting: dict[int, tuple[asyncio.Semaphore, int]] = {}

    @contextlib.asynccontextmanager
    async def request(self, host: str, crawl_delay: float = 0.0) -> AsyncIterator[None]:
        """Waits until a request to `host` may be made. crawl_delay: seconds between requests that the host requires.
        Raises Refused (http 429) if the host requested a longer pause than `max_wait`.
        """
        place = _place(host)
        semaphore, users = self._waiting.get(place) or (asyncio.Semaphore(self.per_host), 0)
        self._waiting[place] = (semaphore, users + 1)
        try:
            async with semaphore:
                position = await self._lock(place)
                try:
                    await self._wait(place, max(self.interval, crawl_delay))
                    yield
                finally:
                    self._files.unlock(position)
        finally:
            semaphore, users = self._waiting.pop(place)
            if users > 1:
                self._waiting[place] = (semaphore, users - 1)

    async def _lock(self, place: int) -> int:
        while True:
            self._next += 1  # the slot after the last one is the likeliest to be free
            for offset in range(self._next, self._next + self.per_host):
                position = place * SLOTS + offset % self.per_host
                if self._files.try_lock(position):
                    return position
            await asyncio.sleep(POLL * (0.5 + random.random()))

    async def _wait(self, place: int, interval: float) -> None:
        """Waits until the next request is allowed, and reserves it."""
        with self._files.entry(place) as (at, following, pause):
            now = time.monotonic()
            if pause - now > self.max_wait:
                raise Refused("http 429", f"the host requests a pause of {pause - now:.0f} s")
            turn = max(now, following, pause)
            if interval:
                ENTRY.pack_into(self._files.times, at, turn + interval, pause)
        if turn > now:
            await asyncio.sleep(turn - now)

    def pause(self, host: str, seconds: float) -> None:
        """Stops requests to `host` from this node for this number of seconds (at most an hour)."""
        with self._files.entry(_place(host)) as (at, following, pause):
            until = max(pause, time.monotonic() + min(seconds, MAX_PAUSE))
            ENTRY.pack_into(self._files.times, at, following, until)


def _start() -> str:
    """Identifies the start of the machine; "any" where the system does not tell."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return "any"


def _place(host: str) -> int:
    return int.from_bytes(hashlib.blake2b(host.encode(), digest_size=5).digest(), "big")


def _open_private(folder: str, name: str) -> int:
    """Opens a file in a folder that only this user can write to."""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise UserError(f"{folder}: belongs to another user; set TMPDIR to a folder of your own")
        return os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); set TMPDIR to a folder of your own") from error
