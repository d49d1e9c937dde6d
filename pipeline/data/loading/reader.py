"""Reads row groups of a dataset ahead of time: local shards are memory-mapped, shards on an object store need one range
request each.

Requests that fail temporarily are repeated (`pipeline.stores`) and counted. With `cache_dir` (a fast local disk),
row groups of an object store are cached, up to `cache_bytes`.
"""

import contextlib
import mmap
import os
import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipeline import storage
from pipeline.data.format import Dataset, RowGroup
from pipeline.errors import UserError
from pipeline.stores import make_store


class Reader:
    """Reads row groups in `threads` threads. `start(i)` returns a future of the row group with index i.

    `counters` has reads, read_bytes, cache_hits and retries.
    """

    def __init__(
        self, dataset: Dataset, *, threads: int = 8, cache_dir: str | None = None, cache_bytes: int = 100 << 30
    ) -> None:
        self.dataset = dataset
        self._is_remote = [storage.is_remote(dataset.shard_uri(i)) for i in range(len(dataset.manifest.shards))]
        self.remote = any(self._is_remote)
        self.cache_dir = os.path.abspath(os.path.expanduser(cache_dir)) if cache_dir and self.remote else None
        self.cache_bytes = cache_bytes
        self._counters = dict.fromkeys(("reads", "read_bytes", "cache_hits"), 0)
        self._lock, self._cache_lock = threading.Lock(), threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        if self.remote:
            self._store = make_store(dataset.uri)
        if self.cache_dir:
            os.makedirs(self.cache_dir, exist_ok=True)

    def start(self, i: int) -> Future[RowGroup]:
        return self._pool.submit(self._read, i)

    def close(self) -> None:
        """Cancels reads that have not begun, interrupts pauses between retries, and waits for the threads."""
        if self.remote:
            self._store.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def counters(self) -> dict[str, int]:
        return {**self._counters, "retries": self._store.retries if self.remote else 0}

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counters[name] += by

    def _read(self, i: int) -> RowGroup:
        remote = self._is_remote[self.dataset.row_groups[i]["shard"]]
        data = self._remote_bytes(i) if remote else self._local_bytes(i)
        self._count("reads")
        self._count("read_bytes", len(data))
        return self.dataset.decode_row_group(i, data)

    def _local_bytes(self, i: int) -> memoryview:
        data = self.dataset.row_group_bytes(i)
        mapped, start = data.obj, int(self.dataset.row_groups[i]["start"]) // mmap.PAGESIZE * mmap.PAGESIZE
        if isinstance(mapped, mmap.mmap):
            mapped.madvise(mmap.MADV_WILLNEED, start, int(self.dataset.row_groups[i]["end"]) - start)
        # Touching every page waits for the disk here, in a read thread that does not hold the interpreter lock.
        np.frombuffer(data, np.uint8)[:: mmap.PAGESIZE].max()
        return data

    def _remote_bytes(self, i: int) -> memoryview:
        group = self.dataset.row_groups[i]
        shard = self.dataset.manifest.shards[group["shard"]]
        start, end = int(group["start"]), int(group["end"])
        cached = os.path.join(self.cache_dir, f"{shard.sha256[:32]}-{group['group']}") if self.cache_dir else None
        if cached:
            with contextlib.suppress(OSError, ValueError), open(cached, "rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                if len(data) == end - start and self.dataset.is_intact(i, data):
                    self._count("cache_hits")
                    return data
        data = memoryview(self._fetch(self.dataset.shard_uri(group["shard"]), start, end))
        if cached:
            self._keep(cached, data)
        return data

    def _fetch(self, uri: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of a shard on a store."""
        try:
            return self._store.read(uri, start, end, exact=True)
        except FileNotFoundError as error:
            raise UserError(f"{error}; `jobs/prepare.py verify {self.dataset.uri}` lists the problems") from error

    def _keep(self, path: str, data: memoryview) -> None:
        """Adds a file to the cache if there is space. Nothing is evicted: every row group is read once per epoch in
        random order, so a cached row group is as likely to be needed next as any other."""
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        with self._cache_lock:  # otherwise several threads could use the same free space
            if _folder_bytes(os.path.dirname(path)) + len(data) > self.cache_bytes:
                return
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                os.replace(temporary, path)
            except OSError:  # a full disk: continue without the cache
                with contextlib.suppress(OSError):
                    os.remove(temporary)


def _folder_bytes(folder: str) -> int:
    """The total size of the files in a folder, in bytes. Other threads and
    processes may rename files at the same time."""
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat().st_size
    return total
