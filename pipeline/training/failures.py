"""Failure and scaling policies of Ray Train: which failures are retried, and the number of workers of the next
attempt."""

import contextlib
import logging
import time
from typing import Any

import ray

from pipeline import host_memory, logs, ray_state
from pipeline.errors import StorageError, UserError, plural
from pipeline.training.advice import out_of_memory as memory_advice
from pipeline.training.config import PretrainConfig
from pipeline.training.preemption import Preempted, Stopped
from pipeline.training.ray_compat import (
    ControllerError,
    DefaultFailurePolicy,
    ElasticPolicy,
    FailureConfig,
    FailureDecision,
    NoopDecision,
    ResizeDecision,
    ScalingConfig,
    ScalingDecision,
    TrainingFailedError,
    WorkerHealthCheckTimeoutError,
    count_failures,
    notify_workers,
    reset_failures,
)
from pipeline.weights import checkpoints

RESIZE_WITHIN = 600.0
"""Seconds for workers to save their state before their number changes."""

logger = logging.getLogger(__name__)


class Failures(DefaultFailurePolicy):
    """Retries lost workers and errors up to `max_failures` times in a row, always retries workers that left
    deliberately, and never retries wrong input. A new checkpoint resets the count, because a long run may lose many
    workers."""

    def __init__(self, failure_config: FailureConfig, config: PretrainConfig, micro_batch: int, records: Any = None):
        """micro_batch: images of one forward pass of a worker. records: handle of the driver's `logs.Collector`, because
        Ray runs the policy in a separate process."""
        super().__init__(failure_config)
        self.config, self.micro_batch, self.records = config, micro_batch, records
        self.reached = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if self.records is not None:
            logs.send_to(self.records)
        failures = getattr(training_failed_error, "worker_failures", {})
        if any(is_final(failure) for failure in failures.values()):
            return FailureDecision.RAISE
        if any(isinstance(failure, Preempted) for failure in failures.values()):
            return FailureDecision.RETRY
        with contextlib.suppress(UserError, OSError):  # without storage, progress is unknown
            reached = max((found.step for found in checkpoints.find(self.config.runtime.output)), default=0)
            if reached > self.reached:
                self.reached = reached
                reset_failures(self)
        before = count_failures(self)
        decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            rank, cause = root_cause(training_failed_error)
            if isinstance(training_failed_error, ControllerError):
                logger.warning("the workers failed to start, retrying: %s", first_line(cause))
            else:
                count = count_failures(self)
                counted = f" (failure {count} of at most {self.config.runtime.max_failures} in a row)"
                logger.warning(
                    "%s; starting again from the last checkpoint%s",
                    describe_failure(rank, cause, self.config, self.micro_batch),
                    counted if count > before else "",
                )
        return decision


class Elastic(ElasticPolicy):
    """Uses as many workers as the nodes allow and the run supports. The run saves its state before it grows.

    Ray's policy would stop the workers in the middle of a step and use any number between the minimum and the maximum.
    sizes: the supported numbers of workers.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: list[int], records: Any = None):
        """records: as for `Failures`."""
        super().__init__(scaling_config)
        self.sizes, self.records = sizes, records
        self.waiting_since = 0.0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if self.records is not None:
            logs.send_to(self.records)
        decision = super().make_decision_for_non_running_worker_group()
        if not isinstance(decision, NoopDecision):
            self.waiting_since = 0.0
        elif not self.waiting_since:
            self.waiting_since = time.monotonic()
        elif time.monotonic() - self.waiting_since > 30:
            self.waiting_since = time.monotonic()
            logger.warning(
                "not enough resources for the minimum of %s; waiting for nodes", plural(self.sizes[0], "worker")
            )
        if self.waiting_since:
            time.sleep(1)  # Ray calls this method again immediately
        return decision

    def count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        # Reservations are up to 20 s old, and a draining node counts until it is gone.
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - ray_state.draining_nodes()
        usable = {node: amounts for node, amounts in reserved_resources.items() if node in alive}
        possible = super().count_possible_workers(usable)
        return max((size for size in self.sizes if size <= possible), default=0)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            # The workers save their state and restart with the new number.
            workers, wanted = worker_group_state.num_workers, decision.num_workers
            logger.info("%s: saving the state to continue as %d", plural(workers, "worker"), wanted)
            notify_workers(worker_group_state, RESIZE_WITHIN)
            return NoopDecision()
        return decision


# ---------------------------------------------------------------- what happened


def is_final(failure: BaseException) -> bool:
    """Whether a failure must not be retried: wrong input (but not unavailable storage), or the driver was stopped."""
    return isinstance(failure, Stopped) or (isinstance(failure, UserError) and not isinstance(failure, StorageError))


def root_cause(error: Exception) -> tuple[int | None, BaseException]:
    """The failure that caused the others, and the rank of its worker."""

    def precedence(failure: tuple[int, BaseException]) -> int:
        exception = failure[1]
        if isinstance(exception, UserError):
            return 0
        # When one worker dies, the collectives of all others fail.
        return 2 if isinstance(exception, RuntimeError) and any(x in str(exception) for x in ("gloo", "NCCL")) else 1

    failures = getattr(error, "worker_failures", {})
    rank, cause = min(failures.items(), key=precedence) if failures else (None, error)
    while True:
        below = (
            getattr(cause, "controller_failure", None)
            or getattr(cause, "health_check_failure", None)
            or getattr(cause, "cause", None)
            or cause.__cause__
        )
        if not isinstance(below, BaseException):
            return rank, cause
        cause = below


def describe_failure(rank: int | None, cause: BaseException, config: PretrainConfig, micro_batch: int) -> str:
    """One line with the worker, the failure and the remedy. micro_batch: images of one forward pass of a worker."""
    who = "" if rank is None else f"worker {rank}: "
    if out_of_memory := host_memory.describe_out_of_memory(str(cause)):
        settings = memory_advice(config, micro_batch, host=True)
        return f"{who}{out_of_memory}; {settings.partition('; ')[2]}"
    if isinstance(cause, ray.exceptions.RayActorError):
        node = next((x.split(":")[1].strip() for x in str(cause).splitlines() if x.strip().startswith("ip:")), "")
        return f"{who}its process ended{' on ' + node if node else ''} (killed, node lost, or out of host memory)"
    if isinstance(cause, WorkerHealthCheckTimeoutError):
        return f"{who}its process does not answer (stopped, or hanging in the kernel; --stalled-after sets the time)"
    return f"{who}{type(cause).__name__}: {first_line(cause)}"


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
