"""Checks of the run: resources for its workers, and whether --output is unused and large enough."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline import cluster, storage
from pipeline.errors import UserError, plural
from pipeline.operations.doctor.finding import CheckResult, ok, refused, warning

if TYPE_CHECKING:
    from pipeline.training.config import PretrainConfig


def cpu_budget(workers: int, needed: Mapping[str, float], room: cluster.Capacity) -> CheckResult:
    """Checks whether all workers fit on the cluster, which is required for a start. Nodes that an autoscaler may add
    are not considered (see `cluster.log_waiting`)."""
    each = " and ".join(f"{amount:g} {name}" for name, amount in needed.items())
    want = f"{plural(workers, 'worker')} of {each}"
    if room.free >= workers:
        return ok("room", f"{want} fit now")
    if room.now >= workers:
        return warning(
            "room",
            f"{want}: other jobs leave capacity for {room.free}",
            "the run waits until they finish; `ray job list` shows them",
        )
    return warning(
        "room",
        f"{want}: the current nodes have capacity for {room.now}",
        "the run waits until an autoscaler adds nodes, at most max_workers (maxReplicas) of each type; on a cluster of "
        "fixed size, add nodes (ray start --address) or request less",
    )


def own_budget(config: "PretrainConfig") -> CheckResult:
    """The same check on one machine. An embedded Ray declares as many CPUs as the workers request."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    want = config.runtime.workers * config.runtime.cpus_per_worker
    if want > cores:
        return warning(
            "room",
            f"{plural(config.runtime.workers, 'worker')} of {config.runtime.cpus_per_worker:g} CPU share {plural(cores, 'core')}",
            "fewer --workers or --cpus-per-worker are faster",
        )
    return ok(
        "room",
        f"{plural(config.runtime.workers, 'worker')} of {config.runtime.cpus_per_worker:g} CPU on {plural(cores, 'core')}",
    )


def run_name(config: "PretrainConfig") -> CheckResult:
    """Checks whether --output is unused, contains this run, or contains another run, and whether its disk has space for
    the checkpoints."""
    from pipeline.training import run

    try:
        plan = run.check_run(config)
        held = run.find_record(plan, storage.normalise(config.runtime.output))
        scarce = run.check_space(plan)
    except UserError as cause:
        return refused("run", cause)
    if scarce:
        message, _, remedy = scarce.rpartition("; ")
        return warning("run", message, remedy)
    if held is None:
        return ok("run", f"{config.runtime.output} is unused")
    return ok("run", f"{config.runtime.output} contains this run, which continues")
