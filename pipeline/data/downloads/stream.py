"""Parallel downloads with results in the order of the addresses. Memory does not depend on the number of addresses."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.data.codecs import Refused
from pipeline.data.downloads.bodies import Body, Memory
from pipeline.data.downloads.config import DownloadConfig
from pipeline.data.downloads.fetch import Fetcher

HELD_BYTES = 128 << 20
"""Limit of the files in memory, finished or not; the others are on the disk. No request for a later image begins while the
finished files that wait for an earlier one, in memory and on the disk, take as much."""
HELD_FILES = 256  # finished files on the disk, which are open; no request for a later image begins above it
AHEAD = 4096  # maximum number of addresses in progress or waiting
Result = bytes | Refused


def download(addresses: Sequence[str], config: DownloadConfig, *, allow_private: bool = False) -> Iterator[Result]:
    """Yields the image file at each address, or the reason of the failure, in order. A repeated address is fetched
    once. A thread downloads while the caller works; it ends when the iterator is closed.
    """
    run = _Run(list(addresses), config, allow_private)
    thread = threading.Thread(target=run.work, name="downloads", daemon=True)
    thread.start()
    try:
        for _ in range(len(run.addresses)):
            yield run.take()
    finally:
        run.stop()
        thread.join()
        run.close()


class _Gate:
    """Holds back requests while many files wait for the caller; the file that the caller waits for always passes."""

    def __init__(self) -> None:
        self.head = 0  # place of the address that the caller waits for
        self._bytes = self._files = 0
        self._is_closed = False
        self._waiting: dict[int, asyncio.Future[None]] = {}  # by place

    def add(self, size: int, files: int) -> None:
        """A file has finished, or was taken (negative numbers). The gate opens at half of what closes it, so that the
        requests do not all wake for each file."""
        self._bytes, self._files = self._bytes + size, self._files + files
        if self._bytes >= HELD_BYTES or self._files >= HELD_FILES:
            self._is_closed = True
        elif self._bytes <= HELD_BYTES // 2 and self._files <= HELD_FILES // 2:
            self._is_closed = False

    def is_open(self, place: int) -> bool:
        return place <= self.head or not self._is_closed

    async def wait(self, place: int) -> None:
        while not self.is_open(place):
            future = self._waiting[place] = asyncio.get_running_loop().create_future()
            await future

    def wake(self) -> None:
        """Continues the downloads that no longer have to wait. Called in the thread of the downloads."""
        open_places = [
            place for place in (self._waiting if not self._is_closed else [self.head]) if place in self._waiting
        ]
        for place in open_places:
            future = self._waiting.pop(place)
            if not future.done():
                future.set_result(None)


@dataclass(frozen=True, slots=True)
class _Place:
    """The gate for one address."""

    gate: _Gate
    place: int

    def is_open(self) -> bool:
        return self.gate.is_open(self.place)

    async def wait(self) -> None:
        await self.gate.wait(self.place)


class _Run:
    """State that the two threads share. `changed` guards `files`, `gate` and `error`."""

    def __init__(self, addresses: list[str], config: DownloadConfig, allow_private: bool) -> None:
        self.addresses, self.config, self.allow_private = addresses, config, allow_private
        self.uses = Counter(addresses)  # rows that still need the file of an address
        self.files: dict[str, Body | Refused] = {}
        self.memory = Memory(HELD_BYTES)
        self.gate = _Gate()
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self.stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None

    # ------------------------------------------------------------ the caller's thread

    def take(self) -> Result:
        """Returns the result of the next address."""
        address = self.addresses[self.gate.head]
        with self.changed:
            self.changed.wait_for(lambda: address in self.files or self.error is not None)
            if address not in self.files:
                assert self.error is not None
                raise self.error
            file = self.files[address]
            self.uses[address] -= 1
            is_last = not self.uses[address]
            if is_last:
                del self.files[address]
                self._count(file, -1)
            self.gate.head += 1
        result = file if isinstance(file, Refused) else file.read()
        if is_last:
            _close(file)
        self._wake_up()
        return result

    def _count(self, file: Body | Refused, sign: int) -> None:
        if isinstance(file, Body):
            self.gate.add(sign * file.size, sign * file.is_on_disk)

    def close(self) -> None:
        """Closes the files that were not taken."""
        for file in self.files.values():
            _close(file)

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
        self._wake_up()

    def _wake_up(self) -> None:
        with self.changed:
            if self._loop is not None and self._wake is not None:
                self._loop.call_soon_threadsafe(self._wake.set)
                self._loop.call_soon_threadsafe(self.gate.wake)

    # ------------------------------------------------------------ the downloads' thread

    def work(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        # name resolution blocks a thread per host, and by default there are only six threads on two cores
        loop.set_default_executor(ThreadPoolExecutor(min(64, self.config.connections), thread_name_prefix="resolve"))
        self._wake = asyncio.Event()
        with self.changed:
            self._loop = loop
        tasks: set[asyncio.Task[None]] = set()
        try:
            async with Fetcher(self.config, allow_private=self.allow_private, memory=self.memory) as fetcher:
                seen: set[str] = set()
                for place, address in enumerate(self.addresses):
                    if address in seen:
                        continue
                    seen.add(address)
                    if not await self._may_start(place):
                        break
                    task = asyncio.create_task(self._download(fetcher, address, _Place(self.gate, place)))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                while tasks and not self.stopped:
                    self._wake.clear()
                    waiter = asyncio.create_task(self._wake.wait())
                    await asyncio.wait({waiter, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                    waiter.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            with self.changed:
                self._loop = None

    async def _may_start(self, place: int) -> bool:
        """Waits until there is space for a file; the file that the caller waits for may
        always start. Returns False to stop."""
        assert self._wake is not None
        while not self.stopped:
            self._wake.clear()
            with self.changed:
                if self.gate.is_open(place) and place < self.gate.head + AHEAD:
                    return True
            await self._wake.wait()
        return False

    async def _download(self, fetcher: Fetcher, address: str, place: _Place) -> None:
        result: Body | Refused
        try:
            result = await fetcher.fetch(address, place)
        except Refused as refused:
            result = Refused(refused.reason, refused.detail)  # without its traceback, which would keep frames alive
        except asyncio.CancelledError:
            raise
        except Exception as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()
            return
        with self.changed:
            self.files[address] = result
            self._count(result, 1)
            self.changed.notify_all()


def _close(file: Body | Refused) -> None:
    if isinstance(file, Body):
        file.close()
