"""A loader that decodes in several processes: the batches of `Loader`, bit for bit, for GPUs that one process cannot feed.

    with ProcessLoader(open_dataset(uri), processes=4, threads=14, batch_size=1024) as loader:
        for batch in loader: ...          # like Loader, for training

Decoding releases Python's interpreter lock, but the code around it does not: a JPEG needs the lock for about 0.1 ms, and with
RandAugment for 0.25 ms. So the threads of one process deliver 4,000 to 10,000 images per second whatever their number, and the
thread that trains waits for the lock, too. Here each process has a share of the lanes, as if it were one more rank, and writes
its rows into memory that it shares with the training process. A thread of the training process copies them into batches.

The processes start when the loader is created (an import of torch, a few seconds) and end with it, or with the training process
however that ends."""

import contextlib
import itertools
import logging
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, cast

import numpy as np

from pipeline.data.format import Dataset
from pipeline.data.loading.batch import Batch
from pipeline.data.loading.loader import Loader
from pipeline.errors import UserError, plural

logger = logging.getLogger(__name__)

SLOTS = 2
"""Batches of each process that may wait in shared memory."""


def default_processes(dataset: Dataset, threads: int, lanes: int) -> int:
    """How many processes decode with so many threads in all: if possible one for each thread. 1: `Loader`, in this process.

    lanes: of this rank; each process has as many of them as the others. Patches need no decoding.
    """
    if dataset.encoding != "jpeg" or not hasattr(os, "memfd_create"):
        return 1
    return max(n for n in range(1, max(1, threads) + 1) if lanes % n == 0)


class ProcessLoader(Loader):
    """`Loader` for training (train=True), with `threads` threads in `processes` processes. Linux only.

    processes: a divisor of this rank's lanes. Raises UserError otherwise, and all errors of `Loader`; RuntimeError when a
    process has died.
    """

    def __init__(self, dataset: Dataset, *, processes: int, threads: int, **options: Any) -> None:
        super().__init__(dataset, threads=1, **options)  # its only thread collects the batches, in order
        lanes = len(self._lane_range)
        if not self.train or processes < 1 or lanes % processes:
            self.close()
            raise UserError(
                f"{plural(processes, 'loading process')} cannot share {plural(lanes, 'lane')} of training: use a divisor"
            )
        share = {
            **options, "threads": -(-threads // processes), "lanes": self.lanes, "augment": self.augment,
            "world_size": self.world_size * processes, "pin_memory": False, "prefetch": min(self.prefetch, 1),
        }  # fmt: skip
        rows = self._share // processes
        self._children = [
            _Child(dataset, {**share, "rank": self.rank * processes + i}, rows, self.shape) for i in range(processes)
        ]
        weakref.finalize(self, _end, self._children)
        for child in self._children:
            self._pool.submit(child.begin)

    @property
    def counters(self) -> dict[str, int]:
        names = self._reader.counters
        read = {name: sum(child.counters.get(name, 0) for child in self._children) for name in names}
        return {**read, "replaced": len(self.replaced)}

    def _read_ahead(self, epoch: int, step: int) -> None:
        """The processes read."""

    def _submit(self, batch: Batch) -> None:
        batch.tasks.append(self._pool.submit(_collect, self._children, batch, self.replaced))

    def _finish(self, batch: Batch) -> dict[str, Any]:
        if self.max_replaced is not None and len(self.replaced) > self.max_replaced:
            key, reason = list(self.replaced.items())[-1]
            raise self._too_many_replaced(key, reason)
        return super()._finish(batch)

    def close(self) -> None:
        """Ends the processes and the thread. Batches that were returned stay valid."""
        _end(getattr(self, "_children", []))
        super().close()


@dataclass(slots=True)
class _Share:
    """What a process says about its rows of a batch. The pixels are in its slot of the shared memory."""

    slot: int
    labels: list[Any]
    keys: list[str]
    kept: np.ndarray | None
    replaced: dict[str, str]  # since the step before
    counters: dict[str, int]
    messages: list[tuple[int, str]]  # (level, text) for the log


class _Child:
    """One process, seen from the training process. It delivers its rows of every step, in the order of the steps."""

    def __init__(self, dataset: Dataset, options: dict[str, Any], rows: int, shape: tuple[int, ...]) -> None:
        self.counters: dict[str, int] = {}
        size = SLOTS * rows * int(np.prod(shape))
        memory = os.memfd_create("loader")  # without a name in the file system, so nothing is left behind
        self.connection, theirs = Pipe()
        try:
            os.ftruncate(memory, size)
            self.slots = np.frombuffer(mmap.mmap(memory, size), np.uint8).reshape(SLOTS, rows, *shape)
            # Not multiprocessing, which would run the caller's main module again.
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main({theirs.fileno()}, {memory})"],
                pass_fds=(theirs.fileno(), memory), stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip
        finally:
            os.close(memory)
            theirs.close()
        self._task = (dataset, options, rows, shape)

    def begin(self) -> None:
        """Sends the process its work. A large dataset is received only after the process has imported torch."""
        with contextlib.suppress(OSError):  # `receive` says so
            self.connection.send(self._task)
            for slot in range(SLOTS):
                self.connection.send(slot)

    def receive(self) -> _Share:
        """Waits for the rows of the next step."""
        try:
            share = self.connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"a process that loads images (pid {self.process.pid}) has ended with exit code {self.process.wait(10)}; "
                "-9 usually means that the machine had no memory left: use fewer --loading-processes"
            ) from error
        if isinstance(share, Exception):
            raise share
        return share

    def release(self, slot: int) -> None:
        """The process may write into this slot again."""
        with contextlib.suppress(BrokenPipeError):  # the next `receive` says so
            self.connection.send(slot)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def _end(children: list[_Child]) -> None:
    for child in children:
        child.end()


def _collect(children: list[_Child], batch: Batch, replaced: dict[str, str]) -> None:
    """Puts the shares of the processes together, by lane."""
    at = 0
    for child in children:
        share = child.receive()
        rows = slice(at, at + len(share.keys))
        np.copyto(batch.pixels[rows], child.slots[share.slot, : len(share.keys)])
        child.release(share.slot)
        batch.labels[rows], batch.keys[rows] = share.labels, share.keys
        if batch.kept is not None:
            batch.kept[rows] = share.kept
        replaced.update(share.replaced)
        child.counters = share.counters
        for level, text in share.messages:
            logger.log(level, "%s", text)
        at = rows.stop


# ---------------------------------------------------------------- in a process


class _ShareLoader(Loader):
    """Gives batches as they are, without tensors."""

    def _finish(self, batch: Batch) -> Any:
        return batch


class _Messages(logging.Handler):
    """Keeps log messages for the training process, which shows them."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        self.waiting.put((record.levelno, record.getMessage()))

    def take(self) -> list[tuple[int, str]]:
        return [self.waiting.get() for _ in range(self.waiting.qsize())]


def main(socket: int, memory: int) -> None:
    """A process: loads its rows of every step, epoch after epoch, until the training process closes the connection.

    socket, memory: file descriptors of the connection and of the shared memory.
    """
    connection = Connection(socket)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the training process, which ends this one
    messages = _Messages()
    logging.getLogger("pipeline").addHandler(messages)
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    try:
        dataset, options, rows, shape = connection.recv()
        slots = np.frombuffer(mmap.mmap(memory, 0), np.uint8).reshape(SLOTS, rows, *shape)
        threading.Thread(target=_listen, args=(connection, free), daemon=True).start()
        with _ShareLoader(dataset, **options) as loader:
            said = 0
            while True:
                for batch in cast(Iterable[Batch], loader):
                    slot = free.get()
                    np.copyto(slots[slot, : batch.n], batch.pixels)
                    replaced = dict(itertools.islice(loader.replaced.items(), said, None))
                    said += len(replaced)
                    share = _Share(
                        slot, batch.labels, batch.keys, batch.kept, replaced, loader.counters, messages.take()
                    )
                    connection.send(share)
                    del batch
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        connection.send(_picklable(error))


def _listen(connection: Connection, free: "queue.SimpleQueue[int]") -> None:
    """Receives the slots that are free. When the training process is gone, ends this process at once, whatever its
    other threads wait for."""
    try:
        while True:
            free.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
