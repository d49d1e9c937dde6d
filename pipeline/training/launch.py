"""Launches the workers of a run with Ray Train and forwards their log records to the driver.

Ray restarts groups of workers. This project decides from which state they continue (`checkpoints.latest`), and replaces
two of Ray's policies (`failures`): wrong input is not retried, and a group saves its state before it grows."""

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any

import ray
from ray.train.torch import TorchConfig

from pipeline import cluster, logs, ray_watch, storage
from pipeline import config as configuration
from pipeline.errors import JobFailed, StorageError, Unavailable, UserError
from pipeline.training.config import PretrainConfig
from pipeline.training.failures import Elastic, Failures, describe_failure, root_cause
from pipeline.training.plan import TrainPlan
from pipeline.training.preemption import Stopped, StopSignal
from pipeline.training.ray_compat import (
    DEFAULT_WORKER_HEALTH_CHECK_TIMEOUT_S,
    WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
    FailureConfig,
    PolicyTrainer,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from pipeline.training.worker import train_worker
from pipeline.weights import checkpoints

# By default glibc returns large allocations to the kernel, so that activations cause page faults in every step. These
# settings keep them in the heap.
HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
logger = logging.getLogger(__name__)

RESIZE_EVERY = 60.0
"""Seconds between checks for more nodes. Each change costs one restart."""


def launch(plan: TrainPlan, run_id: str, tracking_uri: str, sizes: list[int]) -> dict[str, Any]:
    """Runs the workers to the end of the plan. Returns the result of rank 0.

    sizes: the supported numbers of workers, ascending; with more than one the run is elastic. Every launch is a new Ray
    Train run, because Ray's resume does not handle damaged checkpoints. Raises UserError for failures that a retry
    cannot fix, JobFailed when training failed permanently."""
    config = plan.config
    output = config.runtime.output
    check_room(config, sizes[0])
    cluster.warn_of_short_stop(config.runtime.stop_grace)
    collector = logs.Collector()
    stop: Any = ray.remote(num_cpus=0)(StopSignal).remote()  # type: ignore[attr-defined]
    trainer = PolicyTrainer(
        train_worker,
        train_loop_config={
            "config": configuration.to_dict(config),
            "run_id": run_id,
            "tracking_uri": tracking_uri,
            "records": collector.handle,
            "stop": stop,
        },
        torch_config=TorchConfig(backend="nccl" if config.runtime.gpus else "gloo"),
        scaling_config=_scaling(config, sizes),
        run_config=_run_config(config),
    )
    trainer.failures = partial(Failures, config=config, micro_batch=plan.micro_batch, records=collector.handle)
    if len(sizes) > 1:
        trainer.scaling = partial(Elastic, sizes=sizes, records=collector.handle)
    try:
        with _progress(plan), collector, health_check_timeout(config.runtime.stalled_after):
            # Outside the main thread Ray does not handle Ctrl-C; the workers end with this process.
            fitted: Future = Future()
            threading.Thread(target=_fit, args=(trainer, fitted), daemon=True).start()
            try:
                return fitted.result().return_value
            except (KeyboardInterrupt, SystemExit):
                if not ray_watch.ended():  # the workers ended with Ray
                    _stop(stop, fitted, config)
                raise
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        rank, cause = root_cause(error)
        if isinstance(cause, UserError) and not isinstance(cause, StorageError):
            raise cause from None
        logger.debug("training failed", exc_info=error)
        kind = Unavailable if isinstance(cause, StorageError) else JobFailed
        raise kind(f"training failed: {describe_failure(rank, cause, config, plan.micro_batch)}") from None
    finally:
        with contextlib.suppress(StorageError):  # the next launch removes it
            storage.remove(storage.join(output, "ray"), recursive=True)


@contextlib.contextmanager
def health_check_timeout(stalled_after: float) -> Iterator[None]:
    """Sets the seconds after which Ray Train gives up a worker process that does not answer at all, because it is stopped
    or hangs inside the kernel: its watchdog does not run then. Without --stalled-after, or a shorter one, Ray's own limit
    stays. Ray Train passes its variables on to the process that asks the workers."""
    name = WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR
    if name in os.environ or not 0 < stalled_after < DEFAULT_WORKER_HEALTH_CHECK_TIMEOUT_S:
        yield
        return
    os.environ[name] = str(stalled_after)
    try:
        yield
    finally:
        del os.environ[name]


def _stop(stop: Any, fitted: Future, config: PretrainConfig) -> None:
    """Lets the workers finish and save the current step, for at most `--stop-grace` seconds. Another signal ends the
    wait. Logs from which step the next start continues."""
    grace = config.runtime.stop_grace
    why = "nothing was saved at this stop"
    try:
        if not ray.get(stop.stop.remote(), timeout=min(grace, 10)):
            why = "no worker has started"
            return
        logger.info("stopping: the workers finish their step and save it (--stop-grace %g seconds)", grace)
        fitted.result(timeout=grace)
        why = ""  # that was the last step
    except (KeyboardInterrupt, SystemExit):
        why = "stopped at once"
        raise
    except ray.exceptions.RayError as error:
        why = "the workers are gone"
        logger.debug("the workers do not respond", exc_info=error)
    except FutureTimeout:
        why = f"not saved within --stop-grace {grace:g} seconds"
    except Exception as ended:
        why = "" if isinstance(root_cause(ended)[1], Stopped) else "the workers ended"
        logger.debug("the workers ended", exc_info=ended)
    finally:
        if why:
            logger.warning("%s: %s", why, describe_newest(config.runtime.output))


def describe_newest(output: str) -> str:
    """A text that says from which checkpoint the next start of a run continues."""
    try:
        newest = checkpoints.latest(output, checksums=False)
    except (UserError, OSError) as error:
        return f"it is unknown what has been saved ({error})"
    return "the next start begins at step 0" if newest is None else f"the next start continues from {newest.uri}"


def _fit(trainer: PolicyTrainer, fitted: Future) -> None:
    try:
        fitted.set_result(trainer.fit())
    except BaseException as error:
        fitted.set_exception(error)


def _scaling(config: PretrainConfig, sizes: list[int]) -> ScalingConfig:
    resources: dict[str, float] = {"CPU": config.runtime.cpus_per_worker}
    if config.runtime.gpus:
        resources["GPU"] = 1
    return ScalingConfig(
        num_workers=config.runtime.workers if len(sizes) == 1 else (sizes[0], sizes[-1]),
        use_gpu=config.runtime.gpus,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=RESIZE_EVERY,
    )


def _run_config(config: PretrainConfig) -> RunConfig:
    output = config.runtime.output
    path, filesystem = storage.arrow_filesystem(storage.join(output, "ray"))
    threads = str(max(1, int(config.runtime.cpus_per_worker)))
    environment = {"OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cuda" if config.runtime.gpus else "cpu", **HEAP}
    return RunConfig(
        name=uuid.uuid4().hex[:12],
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=config.runtime.max_failures),
        worker_runtime_env={"env_vars": environment},
    )


@contextlib.contextmanager
def _progress(plan: TrainPlan) -> Iterator[None]:
    """A progress bar on a terminal, updated by the records of logged steps, which are printed above the bar."""
    steps = logging.getLogger("pipeline.training.loop")
    with logs.Progress("pretrain", total=plan.total, lines=False) as progress:
        top1 = ""

        def follow(record: logging.LogRecord) -> bool:
            nonlocal top1
            if (score := getattr(record, "top1", None)) is not None:
                top1 = f"  top-1 {score:.1f}%"
            if (step := getattr(record, "step", None)) is not None:
                loss = getattr(record, "loss", float("nan"))
                progress.advance(step - progress.done, f"loss {loss:.3f}{top1}", loss)
            return True

        steps.addFilter(follow)
        try:
            yield
        finally:
            steps.removeFilter(follow)


def check_room(config: PretrainConfig, workers: int) -> None:
    """Raises UserError when an embedded Ray has too few resources for the workers;
    on a cluster, logs the missing resources."""
    bundle = {"CPU": config.runtime.cpus_per_worker, **({"GPU": 1.0} if config.runtime.gpus else {})}
    if config.runtime.address is not None or cluster.is_ray_job():
        cluster.log_waiting(bundle, workers)
        return
    have = ray.cluster_resources()
    lacking = {name: amount * workers for name, amount in bundle.items() if have.get(name, 0) < amount * workers}
    if not lacking:
        return
    text = ", ".join(f"{have.get(name, 0):g} of {amount:g} {name}" for name, amount in lacking.items())
    if "GPU" in lacking:
        raise UserError(f"this machine has {text}; use --workers, --no-gpus, or --address of a cluster that has them")
    raise UserError(f"this machine has {text}; use fewer --workers or --cpus-per-worker")
