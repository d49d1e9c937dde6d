"""The interface of executors, which run the attempts of stages: as processes of this machine or as Ray jobs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The end of an attempt. code: its exit code; None if the attempt was lost with its node or killed by a signal."""

    code: int | None
    reason: str = ""
    seconds: float | None = None
    spent: dict[str, float] = field(default_factory=dict)
    """Measured resources: cpu_hours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """An attempt to run a stage, as an executor starts it."""

    job: str
    """Name of the attempt in this executor; never used again."""
    title: str
    """pipeline/instance, for people."""
    words: Sequence[str]
    """The command line, starting with the script."""
    environment: dict[str, str]
    log: str
    """URI of the log, local or s3://."""
    memory: float = 1.0
    """Memory of the entry point on a cluster, in GB."""


class Executor(Protocol):
    """Starts attempts and reports their state. A new runner may repeat every call of a killed one."""

    cpus: float
    """CPUs for stages; infinite if a cluster schedules them."""
    gpus: float
    """GPUs for stages, in the same way."""
    pause: float
    """Seconds between two calls of `look`."""

    def start(self, attempt: Attempt) -> None:
        """Starts an attempt unless it is already running."""

    def look(self, job: str, log: str) -> Ended | None:
        """Returns the end of an attempt; None while it is running."""

    def stop(self, job: str) -> None:
        """Asks an attempt to stop, like Ctrl-C."""

    def forget(self, job: str) -> None:
        """Removes the files of an ended attempt except its log."""


def last_error(text: str) -> str:
    """The line of a log that explains a failure: the last `error:` line, otherwise the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    if errors:
        return errors[-1].removeprefix("error:").strip()[:500]
    return lines[-1][:500] if lines else ""
