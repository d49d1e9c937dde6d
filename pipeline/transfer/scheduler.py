"""Schedules the jobs of a suite on Ray actors, with retries.

for event in Scheduler(tasks, seeds, results, pool, costs, features, retries).run():
    match event:
        case Finished(): ...      # a result
        case Failed(): ...        # an error; the task of that job stops, the others continue
        case Tick(): ...          # twice per second: the running jobs
"""

import logging
import math
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from pipeline import cluster, host_memory
from pipeline.errors import StorageError
from pipeline.transfer.jobs import Job, Result, next_jobs
from pipeline.transfer.protocols import TransferTask

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Pool:
    """Up to `limit` processes, which start when there is a job for them. `actor` is a Ray actor class with options, and
    with the methods `run(job, features)` and `progress()`, such as `worker.TransferWorker`."""

    actor: Any
    arguments: tuple[Any, ...]
    limit: int
    idle: list[Any] = field(default_factory=list)
    busy: int = 0
    startup_timeout: float = 30.0
    """Seconds after which a starting process is assumed to wait for CPUs or GPUs that idle processes hold."""

    def start(self, count: int) -> None:
        """Starts processes before there are jobs, because their imports take seconds."""
        self.idle += [self.actor.remote(*self.arguments) for _ in range(min(count, self.limit))]

    def take(self) -> Any | None:
        """An idle process or a new one; None if all processes are busy."""
        if not self.idle and self.busy >= self.limit:
            return None
        self.busy += 1
        return self.idle.pop() if self.idle else self.actor.remote(*self.arguments)

    def give_back(self, worker: Any) -> None:
        self.busy -= 1
        self.idle.append(worker)

    def discard(self, worker: Any) -> None:
        """Kills a busy process, which may already be dead."""
        self.busy -= 1
        ray.kill(worker)

    def stop_idle(self) -> None:
        while self.idle:
            ray.kill(self.idle.pop())


@dataclass(slots=True)
class RunningJob:
    """A running job."""

    job: Job
    worker: Any
    started: float
    attempt: int
    progress: tuple[int, int, float] = (0, 0, math.nan)
    """(step, steps, loss)"""
    question: Any = None
    """Ray reference to the pending answer of `progress()`."""
    answered: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    job: Job
    result: Result
    predictions: bytes | None


@dataclass(frozen=True, slots=True)
class FailedJob:
    job: Job
    error: str


@dataclass(frozen=True, slots=True)
class Tick:
    running: list[RunningJob]


@dataclass(slots=True)
class Scheduler:
    """Runs the unfinished jobs of `tasks`. Adds to `results` ({job name: result}) when jobs finish."""

    tasks: Sequence[TransferTask]
    seeds: int
    results: dict[str, Result]
    pool: Pool
    costs: Mapping[str, float]
    """{task: cost of one of its jobs}; the longest job starts first."""
    features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """{task: folders of its train and test features}, for probes."""
    retries: int = 0
    """Maximum number of restarts of a job after its process or machine died or storage was unavailable. Other errors
    are not retried."""
    _attempts: dict[str, int] = field(default_factory=dict)
    _stopped: set[str] = field(default_factory=set)
    """Tasks with a failed job."""
    _running: dict[Any, RunningJob] = field(default_factory=dict)
    """By the Ray reference of the call."""

    def run(self) -> Generator[Finished | FailedJob | Tick, None, None]:
        """Runs until all jobs have ended. All processes of the pool are then ended, also after an error."""
        try:
            while True:
                self._start_jobs()
                if not self._running:
                    return
                if any(self._waits_for_resources(entry) for entry in self._running.values()):
                    self.pool.stop_idle()
                done, _ = ray.wait(list(self._running), timeout=0.5)
                for call in done:
                    if (event := self._collect(call)) is not None:
                        yield event
                ask_progress(self._running.values())
                yield Tick(list(self._running.values()))
        finally:
            self.pool.stop_idle()
            for entry in self._running.values():
                ray.kill(entry.worker)

    def _start_jobs(self) -> None:
        queue = deque(self._waiting())
        while queue and (worker := self.pool.take()) is not None:
            job = queue.popleft()
            attempt = self._attempts[job.name] = self._attempts.get(job.name, 0) + 1
            call = worker.run.remote(job, self.features.get(job.task.name))
            self._running[call] = RunningJob(job, worker, time.monotonic(), attempt)

    def _waiting(self) -> list[Job]:
        """The jobs that can start now, the longest first."""
        busy = {entry.job.name for entry in self._running.values()}
        tasks = (task for task in self.tasks if task.name not in self._stopped)
        ready = (job for task in tasks for job in next_jobs(task, self.seeds, self.results))
        return sorted((job for job in ready if job.name not in busy), key=lambda job: -self.costs[job.task.name])

    def _waits_for_resources(self, entry: RunningJob) -> bool:
        return not entry.answered and time.monotonic() - entry.started > self.pool.startup_timeout

    def _collect(self, call: Any) -> Finished | FailedJob | None:
        """The event of a finished call; None if its job is restarted."""
        entry = self._running.pop(call)
        job = entry.job
        try:
            result, predictions = ray.get(call)
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.OutOfMemoryError,
        ) as error:  # the process or its machine has died
            self.pool.discard(entry.worker)
            out_of_memory = host_memory.describe_out_of_memory(str(error))
            why = f"{out_of_memory}. {cluster.memory_remedy()}" if out_of_memory else first_line(error)
            if entry.attempt <= self.retries:
                logger.warning("%s: its process died (%s); restarting the job", job.name, why)
                return None
            return self._fail(job, f"its process died {entry.attempt} times ({why})")
        except Exception as error:
            # Use a new process for the next job, because this one may not recover from a device error.
            self.pool.discard(entry.worker)
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, StorageError) and entry.attempt <= self.retries:
                logger.warning("%s: %s; restarting the job", job.name, first_line(cause))
                return None
            return self._fail(job, first_line(cause))
        self.pool.give_back(entry.worker)
        self.results[job.name] = result
        return Finished(job, result, predictions)

    def _fail(self, job: Job, error: str) -> FailedJob:
        self._stopped.add(job.task.name)
        return FailedJob(job, error)


def ask_progress(running: Iterable[RunningJob]) -> None:
    """Collects progress without blocking, and requests it again."""
    for entry in running:
        if entry.question is not None:
            done, _ = ray.wait([entry.question], timeout=0)
            if not done:
                continue
            try:
                entry.progress = ray.get(entry.question)
                entry.answered = True
            except ray.exceptions.RayError:  # the result of the job reports the error
                continue
        entry.question = entry.worker.progress.remote()


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:500]
