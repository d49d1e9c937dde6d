"""Progress of a suite: a live table on a terminal; otherwise a log line per finished job and one every 30 seconds."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.live import Live
from rich.table import Table

from pipeline import logs
from pipeline.transfer.jobs import Job, Result, count_jobs
from pipeline.transfer.protocols import TransferTask
from pipeline.transfer.scheduler import RunningJob

EVERY = 30.0  # seconds between two log lines

logger = logging.getLogger(__name__)


class SuiteProgress:
    def __init__(self, tasks: Sequence[TransferTask], seeds: int, results: Mapping[str, Result]) -> None:
        self.tasks, self.seeds, self.results = tasks, seeds, results
        self.failures: dict[str, str] = {}
        self.started = self.shown = time.monotonic()
        self.live: Live | None = None

    def __enter__(self) -> Self:
        if logs.on_terminal():
            self.live = Live(console=logs.console, refresh_per_second=2, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def finished(self, job: Job, result: Result) -> None:
        accuracy = f" {result.accuracy['']:.2f}%" if "" in result.accuracy else ""
        speed = f", {result.images_per_second:.0f} img/s" if result.images_per_second else ""
        logger.info("transfer: %s%s (%.1f s%s)", job.name, accuracy, result.seconds, speed)

    def failed(self, job: Job, error: str) -> None:
        self.failures[job.task.name] = error
        logger.error("transfer: %s failed: %s", job.name, error)

    def update(self, running: list[RunningJob]) -> None:
        logs.report_share(*self._whole(running))
        if self.live is not None:
            self.live.update(self._table(running))
        elif time.monotonic() - self.shown > EVERY and running:
            self.shown = time.monotonic()
            parts = ", ".join(f"{entry.job.name} {_share(entry)}" for entry in running)
            logger.info("transfer: %.0f s, running %s", time.monotonic() - self.started, parts)

    def _whole(self, running: list[RunningJob]) -> tuple[float, str]:
        """(finished fraction of the suite, text). Running jobs count by their progress."""
        total = max(1, sum(count_jobs(task, self.seeds) for task in self.tasks))
        names = {task.name for task in self.tasks}
        done = sum(result.task in names for result in self.results.values())
        parts = sum(entry.progress[0] / entry.progress[1] for entry in running if entry.progress[1])
        return min(1.0, (done + parts) / total), f"{done} of {total} jobs"

    def _table(self, running: list[RunningJob]) -> Table:
        table = Table("task", "jobs", "now", "loss", "top-1 %", box=None)
        by_task: dict[str, list[RunningJob]] = {}
        for entry in running:
            by_task.setdefault(entry.job.task.name, []).append(entry)
        for task in self.tasks:
            table.add_row(*self._row(task, by_task.get(task.name, [])))
        return table

    def _row(self, task: TransferTask, now: list[RunningJob]) -> list[Any]:
        done = [result for result in self.results.values() if result.task == task.name]
        failed = "[red]failed" if task.name in self.failures else ""
        state = ", ".join(f"{entry.job.phase} {_share(entry)}" for entry in now) or failed
        loss = ", ".join(f"{entry.progress[2]:.3f}" for entry in now if entry.progress[1])
        tops = [result.accuracy[""] for result in done if result.phase == "final" and "" in result.accuracy]
        top = f"{sum(tops) / len(tops):.2f}" if tops else ""
        return [task.name, f"{len(done)}/{count_jobs(task, self.seeds)}", state, loss, top]


def _share(entry: RunningJob) -> str:
    step, steps, _ = entry.progress
    return f"{100 * step / steps:.0f}%" if steps else f"{time.monotonic() - entry.started:.0f} s"
