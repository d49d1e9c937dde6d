"""All uses of Ray's private interfaces outside Ray Train (see `pipeline.training.ray_compat`): the state of a cluster.

Written for Ray 2.60.0 (`WRITTEN_FOR`); tests/unit/test_private_interfaces.py checks the installed version."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

WRITTEN_FOR = "2.60.0"


def take_messages(handle: Callable[[str], None]) -> None:
    """Passes Ray's messages about its processes to `handle` instead of printing them. Ray prints up to a hundred lines
    for each task that it repeats after the death of a process."""
    from ray._private import worker

    def take(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        handle("\n".join(data["lines"]))

    cast(Any, worker).print_to_stdstream = take


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Makes a Ray that is started inside the block listen on 127.0.0.1 only.

    Ray does this by default on Windows and macOS. On Linux it reads its variable for this only once, at import."""
    from ray._private import ray_constants

    constants = cast(Any, ray_constants)
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        with environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for the processes that are started inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


SERVERS = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's node that start a process which only dashboards, autoscalers and forwarded output need."""


@contextlib.contextmanager
def without_servers() -> Iterator[None]:
    """Makes a Ray that is started inside the block do without some of its processes (`SERVERS`).

    `ray.init` starts them even without a dashboard, and waits up to two seconds for the first."""
    from ray._private.node import Node

    before = {name: getattr(Node, name) for name in SERVERS}
    for name in before:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def available_resources_per_node() -> Mapping[str, Mapping[str, float]]:
    """{node id: resources that no task or actor uses}."""
    from ray._private.state import state

    return state.available_resources_per_node()


def draining_nodes() -> set[str]:
    """Ids of nodes that are being drained."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def infeasible_requests() -> Iterator[Mapping[str, float]]:
    """The bundles of resources that the autoscaler (v2) reports as infeasible."""
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
    """(path relative to `folder`, bytes) of every file that Ray would upload as the working directory of a job. Ray
    excludes files that match .gitignore, .rayignore, its default list (.git, .venv,
    venv, __pycache__) or `excludes`."""
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
    """Maximum size in bytes of a working directory that the job server accepts (`ray job submit --working-dir`)."""
    from ray._private import ray_constants

    return ray_constants.DASHBOARD_CLIENT_MAX_SIZE
