"""All uses of Ray Train's private interfaces: two policies, preemption notices, and a trainer that accepts custom
policies.

Written for Ray 2.60.0 (`pipeline.ray_state.WRITTEN_FOR`). tests/unit/test_private_interfaces.py checks the installed
version and every name. The error of a failed import names both versions."""

import time
from collections.abc import Callable
from typing import Any, cast

import ray

from pipeline.ray_state import WRITTEN_FOR

try:
    from ray.train.v2._internal.constants import (
        DEFAULT_WORKER_HEALTH_CHECK_TIMEOUT_S,
        WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
    )
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
    from ray.train.v2._internal.execution.context import get_train_context
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
    from ray.train.v2._internal.execution.scaling_policy import (
        ElasticScalingPolicy,
        NoopDecision,
        ResizeDecision,
        ScalingDecision,
    )
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
    from ray.train.v2.api.preemption import PreemptionInfo
    from ray.train.v2.torch.torch_trainer import TorchTrainer
except ImportError as error:
    raise ImportError(
        f"Ray {ray.__version__}: {error}; pipeline/training/ray_compat.py was written for Ray {WRITTEN_FOR}: install that "
        "version (constraints.txt), or adapt the file"
    ) from error

__all__ = [
    "DEFAULT_WORKER_HEALTH_CHECK_TIMEOUT_S",
    "WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR",
    "ControllerError",
    "DefaultFailurePolicy",
    "ElasticPolicy",
    "ElasticScalingPolicy",
    "FailureConfig",
    "FailureDecision",
    "NoopDecision",
    "PolicyTrainer",
    "ResizeDecision",
    "RunConfig",
    "ScalingConfig",
    "ScalingDecision",
    "TrainingFailedError",
    "WorkerGroupError",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
    "count_failures",
    "is_preempted",
    "notify_workers",
    "reset_failures",
]


class PolicyTrainer(TorchTrainer):
    """TorchTrainer with custom policies, for which Ray has no public interface.

    scaling, failures: create the policy from its config; None keeps Ray's policy.
    """

    scaling: Callable[[ScalingConfig], ElasticScalingPolicy] | None = None
    failures: Callable[[FailureConfig], DefaultFailurePolicy] | None = None

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if self.scaling is not None:
            parts["scaling_policy"] = self.scaling(cast(ScalingConfig, self.scaling_config))
        if self.failures is not None:
            parts["failure_policy"] = self.failures(cast(FailureConfig, self.run_config.failure_config))
        return super()._initialize_and_run_controller(**parts)


class ElasticPolicy(ElasticScalingPolicy):
    """Ray's elastic policy, with an overridable method for the number of workers that fit on the cluster."""

    def count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        """The number of workers that fit on the nodes, {node: {resource: amount}}."""
        return super()._count_possible_workers(reserved_resources)

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        return self.count_possible_workers(reserved_resources)


def is_preempted() -> Callable[[], bool]:
    """In a worker: a function that returns whether the worker has to leave. Ray's public function is a barrier."""
    context = get_train_context().preemption_context
    return lambda: context.preemption_info is not None


def notify_workers(worker_group_state: Any, seconds: float) -> None:
    """Asks all workers of a group to leave within a number of seconds, like a preemption notice."""
    notice = PreemptionInfo(deadline_ms=int((time.time() + seconds) * 1000), preempted_node_to_ranks={})
    for worker in worker_group_state.workers:
        worker.actor.mark_preempt.remote(notice)


def count_failures(policy: DefaultFailurePolicy) -> int:
    """Number of failures that count towards `max_failures`."""
    return policy._worker_group_failures


def reset_failures(policy: DefaultFailurePolicy) -> None:
    policy._worker_group_failures = 0
