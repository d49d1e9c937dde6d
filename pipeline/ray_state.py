"""What Ray knows about a cluster and has no public way to ask: its private names outside Ray Train, all of them, are here.

Written against Ray 2.60.0 (`WRITTEN_FOR`; tests/unit/test_private_interfaces.py compares it with the one that is installed).
`pipeline.training.ray_compat` has the names of Ray Train.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

WRITTEN_FOR = "2.60.0"


def take_messages(handle: Callable[[str], None]) -> None:
    """Gives `handle` what Ray would print on the driver's standard output about its processes: each task that it starts again
    because a process died, in up to a hundred lines."""
    from ray._private import worker

    def take(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        handle("\n".join(data["lines"]))

    cast(Any, worker).print_to_stdstream = take


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray that is started meanwhile has the node address 127.0.0.1, so that all of its servers listen there alone.

    Ray does this by itself on Windows and macOS, where it makes no clusters; on Linux its variable for that is read once, at the
    import.
    """
    from ray._private import ray_constants

    constants, name = cast(Any, ray_constants), ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before[0]
        if before[1] is None:
            del os.environ[name]
        else:
            os.environ[name] = before[1]


def available_resources_per_node() -> Mapping[str, Mapping[str, float]]:
    """Node id -> what no task or actor has taken."""
    from ray._private.state import state

    return state.available_resources_per_node()


def draining_nodes() -> set[str]:
    """Ids of nodes that are about to go away."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def infeasible_requests() -> Iterator[Mapping[str, float]]:
    """The bundles of resources that the autoscaler (v2) says it can never serve."""
    from ray._private.worker import global_worker
    from ray.core.generated import autoscaler_pb2

    answer = cast(Any, global_worker).gcs_client.get_cluster_status(timeout_s=10)
    found = cast(Any, autoscaler_pb2).GetClusterStatusReply.FromString(answer).autoscaling_state
    gangs = found.infeasible_gang_resource_requests
    requests = [*found.infeasible_resource_requests, *(request for gang in gangs for request in gang.requests)]
    requests += [r for gang in gangs for selector in gang.bundle_selectors for r in selector.resource_requests]
    for request in requests:
        yield request.resources_bundle


def packaged_files(folder: str, excludes: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """(path below `folder`, bytes) of every file that Ray would upload as a job's working directory.

    Ray leaves out what .gitignore and .rayignore name, its default list (.git, .venv, venv, __pycache__) and `excludes`.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    root, found = Path(folder).absolute(), []

    def note(path: Path) -> None:
        if path.is_file():
            found.append((str(path.relative_to(root)), os.path.getsize(path)))

    silent = logging.Logger("packaging", logging.ERROR)
    left_out = [packaging._get_excludes(root, [*get_runtime_env_default_excludes(), *excludes])]
    packaging._dir_travel(root, left_out, note, include_gitignore=True, logger=silent)
    yield from found


def upload_limit() -> int:
    """Bytes that the job server accepts as a working directory (`ray job submit --working-dir`)."""
    from ray._private import ray_constants

    return ray_constants.DASHBOARD_CLIENT_MAX_SIZE
