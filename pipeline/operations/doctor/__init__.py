"""Checks for problems that would stop a job after its launch.

    for result in examine(config): ...        # everything; jobs/doctor.py prints it
    preflight(address, tracking_uri)          # the fast checks; every job calls it first

A check is a function that returns one or several results: ok, warning (works with limitations) or error (will not
work), with the remedy. To add a check, write a function in the module of its category and add it to `OF_THE_LAUNCH`,
`OF_A_NODE` or `OF_THIS_MACHINE`. Node checks run on every current node of the cluster, but not on nodes that an
autoscaler adds later.

    authentication   Ray's token
    tracking         the MLflow server
    store            data and output
    machine          shared memory, compiler, locks, ports, GPUs
    system           GPU driver, clock, limits, RDMA devices
    upload           size of the working directory that Ray uploads
    pretraining      resources for the workers, whether --output is unused
    nodes            checks on every node of a cluster
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline import cluster, storage
from pipeline.errors import UserError
from pipeline.lines import fit
from pipeline.operations.doctor import authentication, machine, pretraining, store, system, tracking, upload
from pipeline.operations.doctor.finding import CheckResult, refused
from pipeline.operations.doctor.nodes import everywhere
from pipeline.operations.doctor.tracking import tracking_server as check_server
from pipeline.tracking import check_spool, resolve_tracking_uri

if TYPE_CHECKING:
    from pipeline.training.config import PretrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeSettings:
    """Settings of the run for the node checks; serialised and sent to the nodes."""

    tracking_uri: str
    data: Sequence[str]
    output: str
    gpus: bool
    compile: bool
    is_cluster: bool
    """Whether the nodes were started by `ray start`."""


# Checks on the machine where the job is started.
OF_THE_LAUNCH: tuple[Callable[["PretrainConfig"], CheckResult], ...] = (
    lambda config: authentication.authentication(config.runtime.address),
    lambda config: authentication.token_file(),
    lambda config: pretraining.run_name(config),
    lambda config: upload.working_folder(),
)
# Checks on every node.
OF_A_NODE: tuple[Callable[[NodeSettings], Sequence[CheckResult]], ...] = (
    lambda node: [machine.shared_memory()],
    lambda node: [machine.compiler(node.compile)],
    lambda node: [machine.build_locks()],
    lambda node: [system.driver(node.gpus)],
    lambda node: [machine.devices(node.gpus)],
    lambda node: [system.network(node.gpus)],
    lambda node: [system.limits(node.is_cluster)],
    lambda node: [system.clock(_time_server(node.tracking_uri))],
    lambda node: [tracking.tracking_server(node.tracking_uri)] if node.tracking_uri else [],
    lambda node: [store.readable(uri) for uri in node.data],
    lambda node: store.writable(node.output),
)
# Checks for a run with an embedded Ray.
OF_THIS_MACHINE: tuple[Callable[["PretrainConfig"], CheckResult], ...] = (
    lambda config: pretraining.own_budget(config),
    lambda config: machine.ports(),
)


def _time_server(tracking_uri: str) -> str:
    """An HTTP server for the clock check: the S3 endpoint, or MLflow."""
    return os.environ.get("AWS_ENDPOINT_URL") or tracking_uri


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeChecks:
    """The node checks as a serialisable callable."""

    settings: NodeSettings

    def __call__(self) -> list[CheckResult]:
        return [result for check in OF_A_NODE for result in check(self.settings)]


def examine(config: "PretrainConfig") -> list[CheckResult]:
    """Runs all checks for a pre-training config. Connects to the cluster at `config.runtime.address`, if given."""
    runtime = config.runtime
    config = replace(config, runtime=replace(runtime, output=storage.normalise(runtime.output)))
    results = [check(config) for check in OF_THE_LAUNCH]
    try:
        uri = resolve_tracking_uri(config.runtime.tracking_uri)
        check_spool()
    except UserError as cause:
        results.append(refused("tracking server", cause))
        uri = ""
    on_node = NodeChecks(
        settings=NodeSettings(
            tracking_uri=uri,
            data=store.data_sets(config.runtime.data),
            output=config.runtime.output,
            gpus=config.runtime.gpus,
            compile=config.engine.compile,
            is_cluster=config.runtime.address is not None or cluster.is_ray_job(),
        )
    )
    if config.runtime.address or cluster.is_ray_job():
        needed = {"CPU": config.runtime.cpus_per_worker, **({"GPU": 1.0} if config.runtime.gpus else {})}
        try:
            cluster.configure(config.runtime.address)
            cluster.connect()
        except UserError as cause:
            return [*results, refused("cluster", cause)]
        results += store.places(config, uri)
        results.append(pretraining.cpu_budget(config.runtime.workers, needed, cluster.capacity(needed)))
        results += everywhere(on_node)
    else:
        results += [check(config) for check in OF_THIS_MACHINE]
        results += on_node()
    order = {"error": 0, "warning": 1, "ok": 2}
    return sorted(results, key=lambda result: order[result.status])


def results_table(results: Sequence[CheckResult]) -> str:
    """The results as a text table, most severe first."""
    lines = []
    for result in results:
        where = f"  [{result.where}]" if result.where else ""
        lines.append(fit(f"{result.status:8s}{result.check:18s}{result.message}{where}", indent=26))
        if result.remedy:
            lines.append(fit(f"{'':26s}-> {result.remedy}", indent=3))
    counts = [f"{sum(result.status == status for result in results)} {status}" for status in ("error", "warning", "ok")]
    return "\n".join([*lines, f"doctor: {', '.join(counts)}"])


def preflight(address: str | None, tracking_uri: str | None, tracking: bool = True) -> None:
    """The checks at the start of every job, in less than half a second. Raises UserError for errors.

    A failing tracking server is only a warning, because records are kept on disk. Each job checks --output itself, and
    `cluster.log_waiting` reports missing resources after connecting to the cluster.
    """
    if (found := authentication.authentication(address)).status == "error":
        raise UserError(f"{found.message}; {found.remedy}")
    if not tracking:
        return
    uri = resolve_tracking_uri(tracking_uri)
    check_spool()
    answers: list[CheckResult] = []
    # In a thread, because name resolution has no time-out. A server that does not respond in time is ignored, as it may
    # be busy.
    asking = threading.Thread(target=lambda: answers.append(check_server(uri, patience=0.3)), daemon=True)
    asking.start()
    asking.join(0.4)
    for found in answers:
        if found.status == "error" and "did not answer in" not in found.message:
            logger.warning("tracking server %s; %s", found.message, found.remedy)
