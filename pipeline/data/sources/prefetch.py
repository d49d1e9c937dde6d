"""Reads ahead in a thread, for slow storage."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator

from pipeline.data.sources.items import Item

MAX_WAITING_BYTES = 64 << 20  # the reader pauses at this size, so that large images do not fill the memory


def prefetched(items: Iterable[Item], depth: int = 64) -> Iterator[Item]:
    """The same items, read by a thread while the caller works. Exceptions of the thread are raised in the caller.

    The thread pauses when `depth` items or MAX_WAITING_BYTES bytes are waiting.
    """
    waiting: deque[Item | BaseException | None] = deque()  # None: the end
    waiting_bytes = 0
    stopped = False
    changed = threading.Condition()

    def put(value: Item | BaseException | None) -> bool:
        """Returns False if the caller has stopped."""
        nonlocal waiting_bytes
        with changed:
            changed.wait_for(lambda: stopped or (len(waiting) < depth and waiting_bytes < MAX_WAITING_BYTES))
            waiting.append(value)
            waiting_bytes += _size(value)
            changed.notify_all()
            return not stopped

    def produce() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: bool(waiting))
                value = waiting.popleft()
                waiting_bytes -= _size(value)
                changed.notify_all()
            if value is None:
                return
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        with changed:
            stopped = True
            changed.notify_all()
        thread.join()


def _size(value: Item | BaseException | None) -> int:
    if not isinstance(value, Item):
        return 0
    return len(value.image) if isinstance(value.image, bytes) else value.image.nbytes
