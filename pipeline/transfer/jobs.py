"""The jobs of a suite. The unfinished jobs are a function of the existing results.

A job is one training of one task, or one probe. A suite that was stopped continues from its results. After all trial
learning rates have results, the jobs of the final training follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from models.cost import flops
from pipeline.transfer.protocols import SEEDLESS, Probe, TransferTask


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One unit of work. Phase "tune" trains and scores on the dev split to choose a
    learning rate; "final" gives the score."""

    task: TransferTask
    phase: Literal["tune", "final"] = "final"
    lr: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        lr = f"-lr{self.lr:g}" if self.lr else ""
        return f"{self.task.name}/{self.phase}{lr}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a job. `accuracy` is {"": top-1 in percent}; it is empty for
    few-shot, whose accuracies are in `details`."""

    task: str
    phase: str
    lr: float
    seed: int
    accuracy: dict[str, float]
    images: int
    """Number of labelled test images."""
    seconds: float
    images_per_second: float = 0.0
    """Training speed."""
    curve: list[list[float]] = field(default_factory=list)
    """Rows of (step, loss, learning rate)."""
    confusion: list[list[int]] | None = None
    """Rows are labels, columns are predictions."""
    details: dict[str, Any] = field(default_factory=dict)
    host: str = ""


def next_jobs(task: TransferTask, seeds: int, results: Mapping[str, Result]) -> list[Job]:
    """The jobs of a task that can start now and have no result.

    With several learning rates, each is tried once (seed 0); then the best rate is trained with every seed. In a tie
    the smaller rate is used.
    """
    if isinstance(task.protocol, Probe):
        probes = [Job(task=task, seed=seed) for seed in range(1 if task.protocol.kind in SEEDLESS else seeds)]
        return [job for job in probes if job.name not in results]
    lrs = sorted(task.protocol.lrs)
    if len(lrs) > 1:
        trials = [Job(task=task, phase="tune", lr=lr) for lr in lrs]
        missing = [job for job in trials if job.name not in results]
        if missing:
            return missing
        lr = max(trials, key=lambda job: (results[job.name].accuracy[""], -job.lr)).lr
    else:
        lr = lrs[0]
    finals = [Job(task=task, lr=lr, seed=seed) for seed in range(seeds)]
    return [job for job in finals if job.name not in results]


def final_jobs(task: TransferTask, seeds: int, results: Mapping[str, Result]) -> list[Job]:
    """The finished final jobs of a task, ordered by seed."""
    kept = {name: result for name, result in results.items() if result.task != task.name or result.phase == "tune"}
    wanted = [job for job in next_jobs(task, seeds, kept) if job.phase == "final"]
    return [job for job in wanted if job.name in results]


def count_jobs(task: TransferTask, seeds: int) -> int:
    """The number of jobs of a task, finished or not."""
    if isinstance(task.protocol, Probe):
        return 1 if task.protocol.kind in SEEDLESS else seeds
    return seeds + (len(task.protocol.lrs) if len(task.protocol.lrs) > 1 else 0)


def estimate_flops(task: TransferTask, model_config: dict[str, Any], test_images: int) -> float:
    """Estimated FLOPs of one job, by which the scheduler starts the longest job first."""
    if isinstance(task.protocol, Probe):
        return float(test_images)
    size = task.protocol.resolution
    # FLOPs of other libraries' models are not known here; the image area gives the same order of jobs
    forward = size**2 if "library" in model_config else flops({**model_config, "image_size": size})
    return float(forward) * (3 * task.protocol.steps * task.protocol.batch_size + test_images)
