"""Reading ahead, for storage that makes its reader wait."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.data.sources.items import Item


def prefetched(items: Iterable[Item], depth: int = 64) -> Iterator[Item]:
    """The same items, read by a thread while the caller works; at most `depth` wait. Exceptions reach the caller."""
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(value: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put(value, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (value := ready.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
