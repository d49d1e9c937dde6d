"""What the runner asks of whatever executes the attempts of stages: processes on this machine, or jobs of a Ray cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How an attempt ended. code None: it was lost, with its node or by a signal; that is no fault of the stage."""

    code: int | None
    reason: str = ""
    seconds: float | None = None
    spent: dict[str, float] = field(default_factory=dict)
    """What was measured: cpu_hours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """What an executor needs to start one."""

    job: str
    """Its name with this executor, unique for ever."""
    title: str
    """pipeline/instance, for people."""
    words: Sequence[str]
    """The command, from the script on."""
    environment: dict[str, str]
    log: str
    """Where its log goes, local or s3://."""
    memory: float = 1.0


class Executor(Protocol):
    """Starts attempts and says how they are. Every method may be called again after the runner was killed."""

    cpus: float
    """That it has for stages; infinite where somebody else places them."""
    gpus: float
    pause: float
    """Seconds between two looks."""

    def start(self, attempt: Attempt) -> None:
        """Starts an attempt, unless it runs already."""

    def look(self, job: str, log: str) -> Ended | None:
        """How an attempt ended; None while it runs."""

    def stop(self, job: str) -> None:
        """Asks an attempt to stop, as Ctrl-C does."""

    def forget(self, job: str) -> None:
        """Removes what an attempt that has ended left behind, beside its log."""


def last_error(text: str) -> str:
    """The line of a log that says why its job failed: the last `error:` line, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    if errors:
        return errors[-1].removeprefix("error:").strip()[:500]
    return lines[-1][:500] if lines else ""
