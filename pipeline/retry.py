"""The retry policy for storage: repeats temporary failures with growing pauses until a timeout.

No library is used, because the timeout may change during retries and another thread can interrupt a pause."""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.credentials import redacted
from pipeline.errors import Unavailable, UserError, plural

logger = logging.getLogger(__name__)

PATIENCE = 180.0  # seconds for which a request is retried; servers restart within minutes
VARIABLE = "VIT_STORE_PATIENCE"
"""Environment variable that replaces PATIENCE."""
LONGEST_PAUSE = 10.0  # maximum seconds between two attempts; pauses begin with 0.1, 0.2, 0.4, ...

T = TypeVar("T")


def longest_patience() -> float:
    """Seconds for which a request is retried. Raises UserError for an invalid VIT_STORE_PATIENCE."""
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
    """The log level of a failure: a warning at most every ten seconds, because
    hundreds of requests fail in an outage."""
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
    """Calls `attempt` until it succeeds, and returns its result.

    permanent: returns the exception to raise for a failure that a retry cannot fix, or None. patience: returns the
    timeout in seconds; called after each failure. closing: an event that ends a pause and the retries. on_failure:
    called for each failure that is retried. Raises Unavailable with `name`, the
    last failure and `remedy` after the timeout."""
    begin, failed = time.monotonic(), 0
    while True:
        try:
            return attempt()
        except Exception as error:
            final = permanent(error)
            if final is not None:
                raise final from error
            problem, reason = error, redacted(str(error))
        pause = min(0.1 * 2**failed, LONGEST_PAUSE)
        failed += 1
        on_failure()
        logger.log(_level(), "%s: attempt %d failed: %s", name, failed, reason)
        seconds = patience()
        if time.monotonic() + pause > begin + seconds or (closing or threading.Event()).wait(pause):
            raise Unavailable(
                f"{name}: no answer after {plural(failed, 'attempt')} in {seconds:g} s; the last one: {reason}; {remedy}"
            ) from problem
