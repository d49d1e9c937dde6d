"""Runs node checks on every node of the cluster."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.errors import plural
from pipeline.operations.doctor.finding import CheckResult, error


def everywhere(check: Callable[[], Sequence[CheckResult]]) -> list[CheckResult]:
    """The results of all nodes: one line if all nodes agree, otherwise one line per node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    # By default Ray hides GPUs from tasks that request none.
    environment = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    task = ray.remote(num_cpus=0, max_retries=0, runtime_env=environment)(_plain)
    asked = {
        node["NodeID"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(check)
        for node in nodes
    }
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    by_content: dict[tuple, list[str]] = {}
    for node, reference in asked.items():
        try:
            answers = ray.get(reference, timeout=120)
        except Exception as cause:
            answers = [
                dataclasses.astuple(error("node", f"no answer ({type(cause).__name__})", "look at its Ray logs"))
            ]
        for answer in answers:
            by_content.setdefault(tuple(answer), []).append(addresses[node])
    return [
        replace(CheckResult(**dict(zip(_FIELDS, content, strict=True))), where=_where(names, len(asked)))
        for content, names in by_content.items()
    ]


_FIELDS = [field.name for field in dataclasses.fields(CheckResult)]


def _plain(check: Callable[[], Sequence[CheckResult]]) -> list[tuple]:
    return [dataclasses.astuple(finding) for finding in check()]


def _where(names: Sequence[str], count: int) -> str:
    return f"{'all ' if count > 1 else ''}{plural(count, 'node')}" if len(names) == count else ", ".join(names)
