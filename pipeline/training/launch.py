"""The workers of a run under Ray Train: how many, what is tried again and what is not, and what they say.

Ray restarts a group of workers; which state they continue from is ours (`checkpoint.latest`). Two of Ray's decisions are
replaced: a wrong input is not tried again, and a group that grows saves its state first.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, cast

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.train.v2.api.preemption import PreemptionInfo
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import cluster, storage
from pipeline import config as configuration
from pipeline.errors import UserError
from pipeline.training import checkpoint
from pipeline.training.display import Display
from pipeline.training.loop import Plan, train_worker
from pipeline.training.recipes import PretrainConfig
from pipeline.training.survival import Leave, out_of_memory

# Activations come and go every step. By default glibc gives each large one back to the kernel and faults it in again,
# zeroed, page by page; kept in the heap they cost nothing.
HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
RESIZE_EVERY = 60.0
"""Seconds between looks for more nodes: each change costs one restart."""
RESIZE_WITHIN = 600.0
"""Seconds that workers get to save their state before a change of their number."""


def launch(plan: Plan, run_id: str, tracking_uri: str, sizes: list[int]) -> dict[str, Any]:
    """Runs the workers to the end of the plan and returns what rank 0 reports.

    sizes: the numbers of workers that fit the plan, ascending; more than one makes the run elastic. Every launch is a new
    run to Ray: its own resuming knows nothing of damaged checkpoints. Raises UserError for what repeating will not mend,
    RuntimeError when training failed for good.
    """
    config = plan.config
    check_room(config, sizes[0])
    resources: dict[str, float] = {"CPU": config.cpus_per_worker}
    if config.gpus:
        resources["GPU"] = 1
    fs, path = storage.filesystem(storage.join(config.output, "ray"))
    threads = str(max(1, int(config.cpus_per_worker)))
    environment = {"OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cuda" if config.gpus else "cpu", **HEAP}
    console = Console()
    trainer = Trainer(
        train_worker,
        train_loop_config={
            "config": configuration.to_dict(config),
            "run_id": run_id,
            "tracking_uri": tracking_uri,
            "say": console.say,
            "done": console.done,
        },
        torch_config=TorchConfig(backend="nccl" if config.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers if len(sizes) == 1 else (sizes[0], sizes[-1]),
            use_gpu=config.gpus,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=RESIZE_EVERY,
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=path,
            storage_filesystem=PyFileSystem(FSSpecHandler(fs)) if storage.is_remote(config.output) else None,
            failure_config=FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    trainer.sizes, trainer.say, trainer.config = sizes, console.say, config
    try:
        with console:
            # Off the main thread Ray leaves Ctrl-C to us; the workers end with this process.
            fitted: Future = Future()
            threading.Thread(target=_fit, args=(trainer, fitted), daemon=True).start()
            fitted.result()
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        rank, cause = _cause(error)
        if isinstance(cause, UserError):
            raise cause from None
        raise RuntimeError(f"training failed: {_describe(rank, cause, config)}") from error
    finally:
        with contextlib.suppress(storage.StorageError):  # the next launch removes it too
            storage.remove(storage.join(config.output, "ray"), recursive=True)
    return console.result()


def _fit(trainer: TorchTrainer, fitted: Future) -> None:
    try:
        fitted.set_result(trainer.fit())
    except BaseException as error:
        fitted.set_exception(error)


def check_room(config: PretrainConfig, workers: int) -> None:
    """Raises UserError when an embedded Ray has no room for so many workers; on a cluster it says what is waited for."""
    bundle = {"CPU": config.cpus_per_worker, **({"GPU": 1.0} if config.gpus else {})}
    if config.address is not None or cluster.submitted():
        cluster.announce(bundle, workers)
        return
    have = ray.cluster_resources()
    lacking = {name: amount * workers for name, amount in bundle.items() if have.get(name, 0) < amount * workers}
    if not lacking:
        return
    text = ", ".join(f"{have.get(name, 0):g} of {amount:g} {name}" for name, amount in lacking.items())
    if "GPU" in lacking:
        raise UserError(f"this machine has {text}; use --workers, --no-gpus, or --address of a cluster that has them")
    raise UserError(f"this machine has {text}; use fewer --workers or --cpus-per-worker")


# ---------------------------------------------------------------- failing and growing


class Trainer(TorchTrainer):
    """Ray's trainer with our two policies; Ray has no public way to pass them."""

    sizes: list[int]
    say: Callable[[str], None]
    config: PretrainConfig

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if len(self.sizes) > 1:
            parts["scaling_policy"] = Elastic(cast(ScalingConfig, self.scaling_config), self.sizes, self.say)
        parts["failure_policy"] = Failures(cast(FailureConfig, self.run_config.failure_config), self.config, self.say)
        return super()._initialize_and_run_controller(**parts)


class Failures(DefaultFailurePolicy):
    """What is tried again: lost workers and errors up to `max_failures` times in a row, workers that left on purpose always,
    wrong input never. A new checkpoint ends the row: a run of weeks loses more workers than any fixed number."""

    def __init__(self, failure_config: FailureConfig, config: PretrainConfig, say: Callable[[str], None]):
        super().__init__(failure_config)
        self.config, self.say = config, say
        self.reached = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = getattr(training_failed_error, "worker_failures", {})
        if any(isinstance(e, UserError) and not isinstance(e, storage.StorageError) for e in failures.values()):
            return FailureDecision.RAISE
        if any(isinstance(e, Leave) for e in failures.values()):
            return FailureDecision.RETRY
        with contextlib.suppress(UserError, OSError):  # a store that is away shows no progress
            reached = max((found.step for found in checkpoint.find(self.config.output)), default=0)
            if reached > self.reached:
                self.reached, self._worker_group_failures = reached, 0
        failures_before = self._worker_group_failures
        decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            rank, cause = _cause(training_failed_error)
            if isinstance(training_failed_error, ControllerError):
                self.say(f"warning: the workers do not start, trying again: {_first_line(cause)}")
            else:
                count = self._worker_group_failures
                counted = f" (failure {count} of at most {self.config.max_failures} in a row)"
                self.say(
                    f"warning: {_describe(rank, cause, self.config)}; starting again from the last checkpoint"
                    f"{counted if count > failures_before else ''}"
                )
        return decision


class Elastic(ElasticScalingPolicy):
    """As many workers as there are nodes for and as fit the run, which saves its state before it grows.

    Ray would stop the workers in the middle of a step and take any number between the two ends. sizes: those that fit.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: list[int], say: Callable[[str], None]):
        super().__init__(scaling_config)
        self.sizes, self.say = sizes, say
        self.waiting_since = 0.0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        decision = super().make_decision_for_non_running_worker_group()
        if not isinstance(decision, NoopDecision):
            self.waiting_since = 0.0
        elif not self.waiting_since:
            self.waiting_since = time.monotonic()
        elif time.monotonic() - self.waiting_since > 30:
            self.waiting_since = time.monotonic()
            self.say(f"warning: no room for {self.sizes[0]} workers, which is the least; waiting for nodes")
        if self.waiting_since:
            time.sleep(1)  # Ray asks again at once, for as long as it takes
        return decision

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        # What is reserved is up to 20 s old, and a node that is being drained counts until it is gone.
        draining = ray._private.state.state.get_draining_nodes()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - set(draining)
        usable = {node: amounts for node, amounts in reserved_resources.items() if node in alive}
        possible = super()._count_possible_workers(usable)
        return max((size for size in self.sizes if size <= possible), default=0)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            # The same notice as before a node goes away: they save, leave, and start again in the new number.
            self.say(f"{worker_group_state.num_workers} workers save their state to go on as {decision.num_workers}")
            deadline = int((time.time() + RESIZE_WITHIN) * 1000)
            notice = PreemptionInfo(deadline_ms=deadline, preempted_node_to_ranks={})
            for worker in worker_group_state.workers:
                worker.actor.mark_preempt.remote(notice)
            return NoopDecision()
        return decision


def _cause(error: Exception) -> tuple[int | None, BaseException]:
    """The failure that the others follow from, and the rank of its worker."""

    def telling(failure: tuple[int, BaseException]) -> int:
        exception = failure[1]
        if isinstance(exception, UserError):
            return 0
        # when one worker ends, the collectives of all others fail
        return 2 if isinstance(exception, RuntimeError) and any(x in str(exception) for x in ("gloo", "NCCL")) else 1

    failures = getattr(error, "worker_failures", {})
    rank, cause = min(failures.items(), key=telling) if failures else (None, error)
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


def _describe(rank: int | None, cause: BaseException, config: PretrainConfig) -> str:
    who = "" if rank is None else f"worker {rank}: "
    if "running low on memory" in str(cause):
        return f"{who}ended by Ray: {out_of_memory(config, config.workers, host=True)}"
    if isinstance(cause, ray.exceptions.RayActorError):
        node = next((x.split(":")[1].strip() for x in str(cause).splitlines() if x.strip().startswith("ip:")), "")
        return f"{who}its process ended{' on ' + node if node else ''} (killed, its node gone, or out of host memory)"
    return f"{who}{type(cause).__name__}: {_first_line(cause)}"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ---------------------------------------------------------------- what the workers say


class Console:
    """Lines from workers, printed by the driver as they come: an actor holds them, a thread fetches them.

    Ray's own forwarding of worker output adds a prefix to every line and comes with everyone else's.
    """

    def __init__(self) -> None:
        @ray.remote(num_cpus=0)
        class Lines:
            def __init__(self) -> None:
                self.lines: list[str] = []
                self.result: dict[str, Any] = {}

            def add(self, line: str) -> None:
                self.lines.append(line)

            def finish(self, result: dict[str, Any]) -> None:
                self.result = result

            def outcome(self) -> dict[str, Any]:
                return self.result

            def take(self) -> list[str]:
                taken, self.lines = self.lines, []
                return taken

        # beside the driver: a node that is lost must not take it along
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor = Lines.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._print, daemon=True)

    @property
    def say(self) -> Callable[[str], None]:
        actor = self.actor

        def say(line: str) -> None:
            actor.add.remote(line)

        return say

    @property
    def done(self) -> Callable[[dict[str, Any]], None]:
        actor = self.actor

        def done(result: dict[str, Any]) -> None:
            ray.get(actor.finish.remote(result))

        return done

    def result(self) -> dict[str, Any]:
        return ray.get(self.actor.outcome.remote())

    def __enter__(self) -> "Console":
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join(60)

    def _print(self) -> None:
        with Display() as display:
            pending, last = None, False
            while True:
                if pending is None:
                    last = self.stop.wait(0.3)
                    pending = self.actor.take.remote()
                try:
                    lines = ray.get(pending, timeout=10)
                except ray.exceptions.GetTimeoutError:  # a busy machine; what was taken is on its way
                    continue
                except Exception:  # the cluster is going away; what went wrong is reported by the trainer
                    return
                pending = None
                for line in lines:
                    display.show(line)
                if last:
                    return
