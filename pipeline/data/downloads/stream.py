"""Parallel downloads with results in the order of the addresses. Memory does not depend on the number of addresses."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.data.codecs import Refused
from pipeline.data.downloads.config import DownloadConfig
from pipeline.data.downloads.fetch import Fetcher

HELD_BYTES = 128 << 20  # limit of finished files that wait for an earlier one; no download starts above it
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


class _Run:
    """State that the two threads share. `changed` guards `files`, `held`, `head` and `error`."""

    def __init__(self, addresses: list[str], config: DownloadConfig, allow_private: bool) -> None:
        self.addresses, self.config, self.allow_private = addresses, config, allow_private
        self.uses = Counter(addresses)  # rows that still need the file of an address
        self.files: dict[str, Result] = {}
        self.held = self.head = 0
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self.stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None

    # ------------------------------------------------------------ the caller's thread

    def take(self) -> Result:
        """Returns the result of the address at `head` and advances `head`."""
        address = self.addresses[self.head]
        with self.changed:
            self.changed.wait_for(lambda: address in self.files or self.error is not None)
            if address not in self.files:
                assert self.error is not None
                raise self.error
            result = self.files[address]
            self.uses[address] -= 1
            if not self.uses[address]:
                del self.files[address]
                self.held -= _size(result)
            self.head += 1
        self._wake_up()
        return result

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
        self._wake_up()

    def _wake_up(self) -> None:
        with self.changed:
            if self._loop is not None and self._wake is not None:
                self._loop.call_soon_threadsafe(self._wake.set)

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
            async with Fetcher(self.config, allow_private=self.allow_private) as fetcher:
                seen: set[str] = set()
                for place, address in enumerate(self.addresses):
                    if address in seen:
                        continue
                    seen.add(address)
                    if not await self._may_start(place):
                        break
                    task = asyncio.create_task(self._download(fetcher, address))
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
                if place <= self.head or (self.held < HELD_BYTES and place < self.head + AHEAD):
                    return True
            await self._wake.wait()
        return False

    async def _download(self, fetcher: Fetcher, address: str) -> None:
        result: Result
        try:
            with await fetcher.fetch(address) as file:
                result = file.read()
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
            self.held += _size(result)
            self.changed.notify_all()


def _size(result: Result) -> int:
    return len(result) if isinstance(result, bytes) else 0
