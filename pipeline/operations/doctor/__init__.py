"""What would stop a job an hour after its launch, looked for before it.

    for result in examine(config): ...        # everything; jobs/doctor.py prints it
    preflight(address, tracking_uri)          # what costs milliseconds; every job calls it first

A check is a function that returns a result, or several: ok, warning (it works, but not as it should) or error (it will not
work), with the remedy. A new check is one function in the file of its family and one line in `OF_THE_LAUNCH`, `OF_A_NODE` or
`OF_THIS_MACHINE`. Checks of a node run on every node that the cluster has now; nodes that an autoscaler adds later are not
checked.

    authentication   Ray's token
    tracking         the MLflow server
    store            data and output
    machine          shared memory, compiler, locks, ports, GPUs
    system           GPU driver, clock, limits, RDMA devices
    upload           size of the working directory that Ray ships
    pretraining      room for the workers, whether --output is free
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
from pipeline.operations.doctor import authentication, machine, pretraining, store, system, tracking, upload
from pipeline.operations.doctor.finding import CheckResult, refused
from pipeline.operations.doctor.nodes import everywhere
from pipeline.operations.doctor.tracking import tracking_server as check_server
from pipeline.tracking import resolve_tracking_uri

if TYPE_CHECKING:
    from pipeline.training.config import PretrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeSettings:
    """What the checks of a node need to know of the run; it travels to the nodes."""

    tracking_uri: str
    data: str
    output: str
    gpus: bool
    compile: bool


# What has to be right where the job is started.
OF_THE_LAUNCH: tuple[Callable[["PretrainConfig"], CheckResult], ...] = (
    lambda config: authentication.authentication(config.runtime.address),
    lambda config: authentication.token_file(),
    lambda config: pretraining.run_name(config),
    lambda config: upload.working_folder(),
)
# What may differ from node to node.
OF_A_NODE: tuple[Callable[[NodeSettings], Sequence[CheckResult]], ...] = (
    lambda node: [machine.shared_memory()],
    lambda node: [machine.compiler(node.compile)],
    lambda node: [machine.build_locks()],
    lambda node: [system.driver(node.gpus)],
    lambda node: [machine.devices(node.gpus)],
    lambda node: [system.network(node.gpus)],
    lambda node: [system.limits()],
    lambda node: [system.clock(_time_server(node.tracking_uri))],
    lambda node: [tracking.tracking_server(node.tracking_uri)] if node.tracking_uri else [],
    lambda node: [store.readable(node.data)],
    lambda node: store.writable(node.output),
)
# What matters when the run starts a Ray of its own here.
OF_THIS_MACHINE: tuple[Callable[["PretrainConfig"], CheckResult], ...] = (
    lambda config: pretraining.own_budget(config),
    lambda config: machine.ports(),
)


def _time_server(tracking_uri: str) -> str:
    """An HTTP server whose clock matters: the S3 endpoint, or else MLflow's."""
    return os.environ.get("AWS_ENDPOINT_URL") or tracking_uri


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeChecks:
    """The checks of a node, in a form that travels there."""

    settings: NodeSettings

    def __call__(self) -> list[CheckResult]:
        return [result for check in OF_A_NODE for result in check(self.settings)]


def examine(config: "PretrainConfig") -> list[CheckResult]:
    """Every check that applies to a pre-training run with this config. Joins the cluster at `config.runtime.address`, if any."""
    runtime = config.runtime
    runtime = replace(runtime, data=storage.normalise(runtime.data), output=storage.normalise(runtime.output))
    config = replace(config, runtime=runtime)
    results = [check(config) for check in OF_THE_LAUNCH]
    try:
        uri = resolve_tracking_uri(config.runtime.tracking_uri)
    except UserError as cause:
        results.append(refused("tracking server", cause))
        uri = ""
    on_node = NodeChecks(
        settings=NodeSettings(
            tracking_uri=uri,
            data=config.runtime.data,
            output=config.runtime.output,
            gpus=config.runtime.gpus,
            compile=config.engine.compile,
        )
    )
    if config.runtime.address or cluster.submitted():
        needed = {"CPU": config.runtime.cpus_per_worker, **({"GPU": 1.0} if config.runtime.gpus else {})}
        try:
            cluster.configure(config.runtime.address)
            cluster.connect()
        except UserError as cause:
            return [*results, refused("cluster", cause)]
        results += store.places(config, uri)
        results.append(pretraining.cpu_budget(config.runtime.workers, needed, cluster.room(needed)))
        results += everywhere(on_node)
    else:
        results += [check(config) for check in OF_THIS_MACHINE]
        results += on_node()
    order = {"error": 0, "warning": 1, "ok": 2}
    return sorted(results, key=lambda result: order[result.status])


def results_table(results: Sequence[CheckResult]) -> str:
    """The results for people, the worst first."""
    lines = []
    for result in results:
        where = f"  [{result.where}]" if result.where else ""
        lines.append(f"{result.status:8s}{result.check:18s}{result.message}{where}")
        if result.remedy:
            lines.append(f"{'':26s}-> {result.remedy}")
    counts = [f"{sum(result.status == status for result in results)} {status}" for status in ("error", "warning", "ok")]
    return "\n".join([*lines, f"doctor: {', '.join(counts)}"])


def preflight(address: str | None, tracking_uri: str | None, tracking: bool = True) -> None:
    """The checks that every job starts with, in less than half a second. Raises UserError for what cannot work.

    A tracking server that turns clients away stops nothing (what is logged waits on disk), so that is a warning on stderr.
    Whether --output is free is part of each job's own checks; whether the cluster has room, `cluster.announce` says as soon
    as the job has joined it.
    """
    if (found := authentication.authentication(address)).status == "error":
        raise UserError(f"{found.message}; {found.remedy}")
    if not tracking:
        return
    uri = resolve_tracking_uri(tracking_uri)
    answers: list[CheckResult] = []
    # In a thread: looking up a name has no time-out. No answer in time means a busy server, which is none of our business.
    asking = threading.Thread(target=lambda: answers.append(check_server(uri, patience=0.3)), daemon=True)
    asking.start()
    asking.join(0.4)
    for found in answers:
        if found.status == "error" and "did not answer in" not in found.message:
            logger.warning("tracking server %s; %s", found.message, found.remedy)
