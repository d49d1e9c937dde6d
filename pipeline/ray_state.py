"""What Ray knows about a cluster and has no public way to ask: its private names outside Ray Train, all of them, are here.

Written against Ray 2.60.0 (`WRITTEN_FOR`; tests/unit/test_private_interfaces.py compares it with the one that is installed).
`pipeline.training.ray_compat` has the names of Ray Train.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

WRITTEN_FOR = "2.60.0"


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
