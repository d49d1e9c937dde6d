"""Log records of a job and of its workers, on the driver's standard error; results alone go to standard output.

setup()                            once in a job: every line has a time and a level (`config.run_job` calls it)
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
from types import TracebackType
from typing import Any, Self, TextIO

from pipeline import storage
from pipeline.credentials import redacted

console: Any
"""The terminal; None on a machine without rich, one that only computes (tests/benchmarks/gpu.py)."""
try:
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
except ModuleNotFoundError:
    console = None
else:
    console = Console(stderr=True, highlight=False)

ROOTS = ("pipeline", "models", "jobs")  # our loggers; other libraries keep their own levels
logger = logging.getLogger(__name__)


class _WithoutPasswords(logging.Formatter):
    """Shows addresses without the passwords in them, whoever logs them."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _OneLine(_WithoutPasswords):
    """For a terminal: a record with `parts` is cut to one line by leaving out its last parts. The second one, the loss, stays."""

    TAKEN = 18  # columns of the time and the level

    def format(self, record: logging.LogRecord) -> str:
        parts: Sequence[str] = getattr(record, "parts", ())
        while len(parts) > 1 and len("  ".join(parts)) > console.width - self.TAKEN:
            parts = parts[:-1] if len(parts) > 2 else parts[1:]
        return redacted("  ".join(parts)) if parts else super().format(record)


def setup(level: int = logging.INFO) -> None:
    """Shows records of `level` and above: with colour on a terminal, as "12:34:56 INFO text" elsewhere. Repeating it is
    harmless."""
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
    """Whether a person watches."""
    return console is not None and console.is_terminal


def show(text: str) -> None:
    """Text for the person at the terminal, on standard error: without a time, and without line breaks inside
    commands."""
    if console is not None:
        console.print(text, soft_wrap=True, markup=False)


def reserve_stdout() -> TextIO:
    """Standard output for results alone, until the process ends: what libraries print from now on goes to standard
    error.

    Ray prints there that it lost a process, even while it shuts down.
    """
    stdout, sys.stdout = sys.stdout, sys.stderr
    return stdout


# ---------------------------------------------------------------- records of workers


class Collector:
    """Receives the records of Ray workers and logs them on the driver as they come. Ray must be connected.

    An actor beside the driver holds them and a thread fetches them: a lost node takes no line of another with it.
    """

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
            except ray.exceptions.GetTimeoutError:  # a busy machine: the records are on their way
                continue
            except Exception:  # the cluster is ending; whoever started it reports why
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
    """In a worker: sends this process's records of INFO and above to the driver's Collector."""
    for name in ROOTS:
        ours = logging.getLogger(name)
        ours.handlers[:] = [_ToDriver(handle)]
        ours.setLevel(logging.INFO)
        ours.propagate = False


@contextlib.contextmanager
def captured() -> Iterator[list[logging.LogRecord]]:
    """The records that this process logs meanwhile, picklable, instead of anything that it would print."""
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
    """Logs records of another process here, with their own time."""
    for record in records:
        logging.getLogger(record.name).handle(record)


# ---------------------------------------------------------------- progress


SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 20
WIDE = 110  # columns from which a bar has room for a sparkline
NARROW = 60  # columns below which it has room for the first part of its note alone


def sparkline(values: Sequence[float]) -> str:
    """The finite values as one character each, the lowest as ▁ and the highest as █."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(SPARKS[round((value - low) / span * (len(SPARKS) - 1)) if span else 0] for value in finite)


class Progress:
    """Progress of a long piece of work: a bar with percentage and remaining time on a terminal, else a line every ten
    seconds.

    total: in the unit that `advance` counts. lines: False for work that logs lines of its own, so that there is a bar
    on a terminal and nothing elsewhere."""

    EVERY = 10.0  # seconds between lines in a log

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
        """note: text beside the bar, such as "1,234 images, 3 rejects". value: the last point of a sparkline, such as a
        loss."""
        self.done, self.note = self.done + amount, note
        if value is not None:
            self._values.append(value)
        report_share(self.done / self.total, note)
        if self._bar is not None:
            curve = f"  {sparkline(self._values)}" if self._values and console.width >= WIDE else ""
            if console.width < NARROW:  # the percentage, a short bar and the remaining time take the rest
                note = note.partition("  ")[0][: max(0, console.width - len(self.name) - 19)]
            self._bar.update(self._task, completed=self.done, note=note + curve)
        elif self.lines and time.monotonic() - self._shown >= self.EVERY:
            self._shown = time.monotonic()
            logger.info("%s", self.line())

    @property
    def seconds(self) -> float:
        """Since it began."""
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
"""Environment variable: the address of a small JSON file that says how far this job is."""
REPORT_EVERY = 2.0
_reported: dict[str, float] = {}


def report_share(share: float, note: str = "") -> None:
    """Writes how far the whole job is (0 to 1) to the file that `VIT_PROGRESS` names, at most every two seconds;
    without it, nothing. A store that is away is no reason to stop."""
    place = os.environ.get(PROGRESS)
    now = time.time()
    if not place or now - _reported.get("time", 0.0) < REPORT_EVERY:
        return
    _reported.setdefault("began", now)
    _reported.setdefault("first", share)
    _reported["time"] = now
    values = {"share": share, "note": note, **_reported}
    with contextlib.suppress(Exception):
        storage.write_json(place, values)
