"""Log records of a job and of its workers, on the driver's standard error. Standard output is reserved for results.

    setup()                              once in a job: every line has a time and a level (`config.run_job` calls it)
logger = logging.getLogger(__name__)
with Collector() as collector:     on the driver: workers that hold `collector.handle` log through it
send_to(handle)                    in such a worker, once
with captured() as records:        in a worker whose result carries its records back; `replay(records)` on the driver
with Progress("prepare", total=n) as progress:
    progress.advance(1)            a bar on a terminal, a line every ten seconds elsewhere
logger.info("a  b  c", extra={"parts": ["a", "b", "c"]})
                                   a terminal shows as many parts as fit on one line, the most important first
"""

import contextlib
import logging
import logging.handlers
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self, TextIO

from pipeline import storage
from pipeline.credentials import redacted

console: Any
"""The terminal; None if rich is not installed, as on machines that only run tests/benchmarks/gpu.py."""
try:
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
except ModuleNotFoundError:
    console = None
else:
    console = Console(stderr=True, highlight=False)

ROOTS = ("pipeline", "models", "jobs")  # loggers of this project; other libraries keep their levels
logger = logging.getLogger(__name__)


class _WithoutPasswords(logging.Formatter):
    """Removes passwords from addresses in log records."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _OneLine(_WithoutPasswords):
    """For a terminal: shortens a record with `parts` to one line by removing its
    last parts. The second part, the loss, is kept."""

    def format(self, record: logging.LogRecord) -> str:
        parts: Sequence[str] = getattr(record, "parts", ())
        while len(parts) > 1 and len("  ".join(parts)) > console.width - TAKEN:
            parts = parts[:-1] if len(parts) > 2 else parts[1:]
        return redacted("  ".join(parts)) if parts else super().format(record)


def setup(level: int = logging.INFO) -> None:
    """Shows records of `level` and above: with colour on a terminal, otherwise as
    "12:34:56 INFO text". May be called again."""
    handler: logging.Handler
    if on_terminal():
        handler = RichHandler(
            console=console, show_path=False, markup=False, omit_repeated_times=False, log_time_format="%H:%M:%S"
        )
        handler.setFormatter(_OneLine("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_WithoutPasswords("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    for name in ROOTS:
        ours = logging.getLogger(name)
        ours.handlers[:] = [handler]
        ours.setLevel(level)
        ours.propagate = False


def on_terminal() -> bool:
    """Whether standard error is a terminal."""
    return console is not None and console.is_terminal


def show(text: str) -> None:
    """Prints text for the user on standard error, without a time and without line breaks in commands."""
    if console is not None:
        console.print(text, soft_wrap=True, markup=False)


def reserve_stdout() -> TextIO:
    """Reserves standard output for results until the process ends, and redirects the output of libraries to standard
    error. Ray prints messages about lost processes even during its shutdown."""
    stdout, sys.stdout = sys.stdout, sys.stderr
    return stdout


# ---------------------------------------------------------------- records of workers


class Collector:
    """Receives log records of Ray workers and logs them on the driver. Ray must be connected.

    An actor on the driver's node holds the records and a thread fetches them, so that a
    lost node does not lose the records of other nodes."""

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        @ray.remote(num_cpus=0)
        class Records:
            def __init__(self) -> None:
                self.records: list[logging.LogRecord] = []

            def add(self, record: logging.LogRecord) -> None:
                self.records.append(record)

            def take(self) -> list[logging.LogRecord]:
                taken, self.records = self.records, []
                return taken

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.handle: Any = Records.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fetch, name="log-records", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(60)

    def _fetch(self) -> None:
        import ray

        pending, last = None, False
        while True:
            if pending is None:
                last = self._stop.wait(0.3)
                pending = self.handle.take.remote()
            try:
                records = ray.get(pending, timeout=10)
            except ray.exceptions.GetTimeoutError:  # the machine is busy; the records arrive later
                continue
            except Exception:  # the cluster is ending; its owner reports why
                return
            pending = None
            replay(records)
            if last:
                return


class _ToDriver(logging.handlers.QueueHandler):
    """Sends records to a Collector's actor. `prepare` of the base class makes them picklable."""

    def enqueue(self, record: logging.LogRecord) -> None:
        queue: Any = self.queue
        queue.add.remote(record)


def send_to(handle: Any) -> None:
    """In a worker: sends the records of this process at INFO and above to the driver's Collector."""
    for name in ROOTS:
        ours = logging.getLogger(name)
        ours.handlers[:] = [_ToDriver(handle)]
        ours.setLevel(logging.INFO)
        ours.propagate = False


@contextlib.contextmanager
def captured() -> Iterator[list[logging.LogRecord]]:
    """Collects the log records of this process inside the block as picklable objects, instead of printing them."""
    records: list[logging.LogRecord] = []

    class Keep(logging.handlers.QueueHandler):
        def enqueue(self, record: logging.LogRecord) -> None:
            records.append(record)

    before = {name: (list(logging.getLogger(name).handlers), logging.getLogger(name).level) for name in ROOTS}
    keep = Keep(None)  # type: ignore[arg-type]
    for name in ROOTS:
        logging.getLogger(name).handlers[:] = [keep]
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        yield records
    finally:
        for name, (handlers, level) in before.items():
            logging.getLogger(name).handlers[:] = handlers
            logging.getLogger(name).setLevel(level)


def replay(records: Iterable[logging.LogRecord]) -> None:
    """Logs records of another process in this process, with their original time."""
    for record in records:
        logging.getLogger(record.name).handle(record)


# ---------------------------------------------------------------- progress


SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 20
TAKEN = 18  # width of the time and the level of a log line
WIDE = 110  # minimum terminal width for a sparkline
NARROW = 60  # below this width only the first part of the note is shown


def sparkline(values: Sequence[float]) -> str:
    """The finite values as one character each, from ▁ (lowest) to █ (highest)."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(SPARKS[round((value - low) / span * (len(SPARKS) - 1)) if span else 0] for value in finite)


class Progress:
    """Progress of long work: a bar with percentage and remaining time on a terminal, otherwise a line every ten
    seconds.

    total: in the unit of `advance`; the share of it is that of the job, or of its part (`part_of_job`). lines: False for work that logs its own lines, to show only a bar on a terminal."""

    EVERY = 10.0  # seconds between two log lines

    def __init__(self, name: str, total: float, *, lines: bool = True) -> None:
        self.name, self.total, self.lines = name, max(total, 1e-9), lines
        self.done, self.note = 0.0, ""
        self._values: deque[float] = deque(maxlen=SPARK_WIDTH)
        self._begin = self._shown = time.monotonic()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        if on_terminal():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(compact=True),
            )
            self._bar = RichProgress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(self.name, total=self.total, note="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.done and self.lines:
            logger.info("%s", self.line())

    def advance(self, amount: float, note: str = "", value: float | None = None) -> None:
        """Advances by `amount`. note: text next to the bar, such as "1,234 images, 3 rejects". value: next point of a
        sparkline, such as a loss."""
        self.done, self.note = self.done + amount, note
        if value is not None:
            self._values.append(value)
        report_share(self.done / self.total, note)
        if self._bar is not None:
            curve = f"  {sparkline(self._values)}" if self._values and console.width >= WIDE else ""
            if console.width < NARROW:  # the percentage, a short bar and the remaining time need the rest
                note = note.partition("  ")[0][: max(0, console.width - len(self.name) - 19)]
            self._bar.update(self._task, completed=self.done, note=note + curve)
        elif self.lines and self.done < self.total and time.monotonic() - self._shown >= self.EVERY:
            self._shown = time.monotonic()
            logger.info("%s", self.line())

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self._begin, 1e-9)

    def line(self) -> str:
        share = min(self.done / self.total, 1.0)
        left = round(self.seconds * (1 - share) / share) if share else 0
        remaining = (
            f", {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left" if share < 1 else f" in {self.seconds:.1f} s"
        )
        return f"{self.name}: {share:.0%}{', ' if self.note else ''}{self.note}{remaining}"


# ---------------------------------------------------------------- for who watches from outside

PROGRESS = "VIT_PROGRESS"
"""Environment variable with the address of a small JSON file for the progress of this job."""
REPORT_EVERY = 2.0
_reported: dict[str, float] = {}
_part: ContextVar[tuple[float, float]] = ContextVar(
    "part", default=(0.0, 1.0)
)  # jobs may run in threads; a new thread starts with the default


@contextlib.contextmanager
def part_of_job(begin: float, end: float) -> Iterator[None]:
    """The shares that are reported within are those of a part of the job, from `begin` to `end` (0 to 1). Parts may be
    nested."""
    outer = _part.get()
    width = outer[1] - outer[0]
    _part.set((outer[0] + begin * width, outer[0] + end * width))
    try:
        yield
    finally:
        _part.set(outer)


def report_share(share: float, note: str = "") -> None:
    """Writes the progress of the whole job to the file in `VIT_PROGRESS`, at most every two seconds. Does nothing
    without this variable, and ignores failures of the store.

    share: of the job, or of the `part_of_job` (0 to 1). If it falls, because work is repeated from a checkpoint, the
    remaining time is estimated anew.
    """
    place = os.environ.get(PROGRESS)
    now = time.time()
    if not place or now - _reported.get("time", 0.0) < REPORT_EVERY:
        return
    begin, end = _part.get()
    share = begin + share * (end - begin)
    if share < _reported.get("share", 0.0):
        _reported.clear()
    _reported.setdefault("began", now)
    _reported.setdefault("first", share)
    _reported["share"], _reported["time"] = share, now
    with contextlib.suppress(Exception):
        storage.write_json(place, {"note": note, **_reported})
