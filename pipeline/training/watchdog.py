"""Kills a hanging worker, so that it is restarted, and logs where it hangs."""

import logging
import os
import sys
import threading
import time
import traceback

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LAST_WORDS = 2.0
"""Seconds between the last log record of a hanging worker and its exit, so that the record reaches the driver."""

logger = logging.getLogger(__name__)


class Watchdog:
    """Ends this process after `limit` seconds without a heartbeat, because Ray restarts dead workers but not hanging
    ones.

        with Watchdog(limit, rank) as watchdog:
            watchdog.heartbeat("waiting for data", step=8)

    After half of the time every hanging worker logs its position; the one at a different position blocks the others.
    limit: 0 disables the watchdog.
    """

    def __init__(self, limit: float, rank: int):
        self.limit, self.rank = limit, rank
        self.doing, self.since = "starting", time.monotonic()
        self.first: int | None = None
        """First step of this attempt."""
        self.step: int | None = None
        """Current step."""
        self.thread_id = threading.get_ident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def heartbeat(self, doing: str, step: int | None = None) -> None:
        """Reports progress. doing: the next operation."""
        self.doing, self.since = doing if step is None else f"{doing} {step}", time.monotonic()
        if step is not None and self.first is None:
            self.first = step
        self.step = step or self.step

    def __enter__(self) -> "Watchdog":
        if self.limit > 0:
            self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()

    def _watch(self) -> None:
        warned = 0.0
        while not self.stop.wait(min(self.limit / 20, 5.0)):
            still = time.monotonic() - self.since
            if still > self.limit:
                logger.warning(
                    "worker %d made no progress for %.0f s, %s: it is killed and restarted from the last checkpoint "
                    "(--stalled-after sets the time)",
                    self.rank,
                    still,
                    self.doing,
                )
                time.sleep(LAST_WORDS)
                os._exit(1)
            if still > self.limit / 2 and warned != self.since:
                warned = self.since
                logger.warning(
                    "worker %d made no progress for %.0f s, %s: %s", self.rank, still, self.doing, self._where()
                )

    def _where(self) -> str:
        """The innermost line of the hanging thread in this project, and the function it called."""
        frames = traceback.extract_stack(sys._current_frames().get(self.thread_id))
        if not frames:
            return "its thread has ended"
        ours = [frame for frame in frames if frame.filename.startswith(PROJECT)] or frames
        line, last = ours[-1], frames[-1]
        called = "" if last is line else f", in {last.name} ({os.path.basename(last.filename)}:{last.lineno})"
        return f"{os.path.relpath(line.filename, PROJECT)}:{line.lineno} {line.line or line.name}{called}"
