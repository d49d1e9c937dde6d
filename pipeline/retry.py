"""The one retry policy: what may pass is tried again with growing pauses until a patience is used up.

Written here and not taken from a library: its patience may change while it waits, and another thread can end a pause.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import Unavailable

logger = logging.getLogger(__name__)

PATIENCE = 180.0  # seconds for which a request is tried again: a server restarts in minutes
LONGEST_PAUSE = 10.0  # seconds between two attempts; the first pauses are 0.1, 0.2, 0.4, ...

T = TypeVar("T")


def retry(
    name: str,
    attempt: Callable[[], T],
    permanent: Callable[[Exception], Exception | None],
    remedy: str,
    *,
    patience: Callable[[], float] = lambda: PATIENCE,
    closing: threading.Event | None = None,
    on_failure: Callable[[], None] = lambda: None,
) -> T:
    """What `attempt` returns.

    permanent: gives what to raise for an exception that another attempt cannot change, else None. patience: seconds, asked
    after each failure. closing: ends a pause, and the attempts with it. on_failure: called for each attempt that is repeated.
    Raises Unavailable that names `name`, the last failure and `remedy`.
    """
    begin, failed = time.monotonic(), 0
    while True:
        try:
            return attempt()
        except Exception as error:
            final = permanent(error)
            if final is not None:
                raise final from error
            problem = error
        pause = min(0.1 * 2**failed, LONGEST_PAUSE)
        failed += 1
        on_failure()
        logger.warning("%s: attempt %d failed: %s", name, failed, problem)
        seconds = patience()
        if time.monotonic() + pause > begin + seconds or (closing or threading.Event()).wait(pause):
            raise Unavailable(
                f"{name}: no answer after {failed} attempts in {seconds:g} s; the last one: {problem}; {remedy}"
            ) from problem
