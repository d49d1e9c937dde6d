"""The one retry policy: what may pass is tried again with growing pauses until a patience is used up.

Written here and not taken from a library: its patience may change while it waits, and another thread can end a pause.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import Unavailable, UserError

logger = logging.getLogger(__name__)

PATIENCE = 180.0  # seconds for which a request is tried again: a server restarts in minutes
VARIABLE = "VIT_STORE_PATIENCE"
"""Environment variable with other seconds than PATIENCE."""
LONGEST_PAUSE = 10.0  # seconds between two attempts; the first pauses are 0.1, 0.2, 0.4, ...

T = TypeVar("T")


def longest_patience() -> float:
    """Seconds for which a request is tried again. Raises UserError for a VIT_STORE_PATIENCE that is no number of seconds."""
    text = os.environ.get(VARIABLE)
    if not text:
        return PATIENCE
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise UserError(f"{VARIABLE}={text}: give seconds, from 0 to 86400")
    return seconds


_last_warning = -float("inf")


def _level() -> int:
    """A warning at most every ten seconds: in an outage hundreds of requests fail together."""
    global _last_warning
    now = time.monotonic()
    if now < _last_warning + LONGEST_PAUSE:
        return logging.DEBUG
    _last_warning = now
    return logging.WARNING


def retry(
    name: str,
    attempt: Callable[[], T],
    permanent: Callable[[Exception], Exception | None],
    remedy: str,
    *,
    patience: Callable[[], float] = longest_patience,
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
        logger.log(_level(), "%s: attempt %d failed: %s", name, failed, problem)
        seconds = patience()
        if time.monotonic() + pause > begin + seconds or (closing or threading.Event()).wait(pause):
            raise Unavailable(
                f"{name}: no answer after {failed} attempts in {seconds:g} s; the last one: {problem}; {remedy}"
            ) from problem
