"""Simulates a day of one cluster: the nodes that the autoscaler of infra/ray-up/aws.yaml starts and ends, and the cost.

    python tests/benchmarks/autoscaling_day.py --output docs/autoscaling-day.png

Decisions are those of Ray's own autoscaler (the scheduler of its version 2) for the file's node types, limits and idle time-out.
The clock, the jobs and the machines are simulated: a node takes BOOT_MINUTES to start, a task runs for as long as its job says,
a node that is lost loses its tasks, and a training run loses what it did since its last checkpoint.
"""

import argparse
import itertools
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "infra" / "ray-up" / "aws.yaml"
STEP = 0.25  # minutes of simulated time between two decisions of the autoscaler
BOOT_MINUTES = 5.0  # assumed: from the request of a machine to a Ray node with the image pulled
CHECKPOINT_MINUTES = 10.0

# Dollars per hour in us-east-1, Linux. On demand: AWS's price list as of November 2025. The spot price of the CPU nodes
# changes by the hour; 40% of the on-demand price is assumed.
PRICES = {"head": 0.4032, "cpu": 0.4 * 1.428, "gpu": 55.04}


@dataclass
class Job:
    """One command of the day: `tasks` bundles of `bundle`, each for `minutes`; a gang starts with all of them or not at all."""

    name: str
    stage: str
    start: float  # minutes after midnight
    bundle: dict[str, float]
    tasks: int
    minutes: float
    at_once: int = 10**6  # tasks in flight, as Ray Data bounds them
    gang: bool = False
    done: int = 0
    progress: float = 0.0  # of a gang: minutes of work that a checkpoint or the running workers hold
    saved: float = 0.0
    began: float | None = None
    ended: float | None = None


@dataclass
class Task:
    job: Job
    left: float


@dataclass
class Node:
    kind: str
    id: str
    requested: float
    resources: dict[str, float]
    ready: bool = False
    tasks: list[Task] = field(default_factory=list)
    idle_since: float = 0.0

    def free(self) -> dict[str, float]:
        free = dict(self.resources)
        for task in self.tasks:
            for name, amount in task.job.bundle.items():
                free[name] = free.get(name, 0) - amount
        return free

    def fits(self, bundle: dict[str, float]) -> bool:
        free = self.free()
        return self.ready and all(free.get(name, 0) >= amount for name, amount in bundle.items())


def day() -> list[Job]:
    """Prepare at 1:00, a run on two GPU nodes at 4:30, an evaluation every hour, transfers of the result in the evening."""
    jobs = [
        Job("prepare", "prepare", 60, {"CPU": 1}, tasks=30_000, minutes=4, at_once=640),
        Job("pretrain", "pretrain", 270, {"CPU": 20, "GPU": 1}, tasks=16, minutes=14 * 60, gang=True),
        Job("transfer", "transfer", 1_260, {"CPU": 8, "GPU": 1}, tasks=19, minutes=12),
    ]
    jobs += [Job(f"evaluate {hour}:07", "evaluate", hour * 60 + 7, {"CPU": 1}, 4, 6) for hour in range(5, 23)]
    return jobs


LOSSES = {90.0: ("cpu", 8), 180.0: ("cpu", 6), 720.0: ("gpu", 1)}  # minute: nodes that the cloud takes away


class Cluster:
    """Nodes of a `ray up` file under Ray's autoscaler, on a simulated clock."""

    def __init__(self, config: dict) -> None:
        from ray.autoscaler._private.util import prepare_config
        from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
        from ray.autoscaler.v2.scheduler import ResourceDemandScheduler

        logging.getLogger("ray").setLevel(logging.ERROR)
        self.config = AutoscalingConfig(prepare_config(config), skip_content_hash=True)
        self.scheduler = ResourceDemandScheduler()
        self.names = itertools.count()
        self.now = 0.0
        self.nodes = [self.node("head")]
        self.nodes[0].ready = True

    def node(self, kind: str) -> Node:
        resources = self.config.get_node_resources(kind)
        return Node(kind, f"{kind}-{next(self.names)}", self.now, resources, idle_since=self.now)

    def workers(self, kind: str) -> list[Node]:
        return [node for node in self.nodes if node.kind == kind]

    def instance(self, node: Node):
        """The node as the autoscaler sees it."""
        from ray.autoscaler.v2.schema import AutoscalerInstance
        from ray.core.generated.autoscaler_pb2 import NodeState, NodeStatus
        from ray.core.generated.instance_manager_pb2 import Instance, NodeKind

        kind = NodeKind.HEAD if node.kind == "head" else NodeKind.WORKER
        status = Instance.RAY_RUNNING if node.ready else Instance.REQUESTED
        instance = Instance(
            instance_id=node.id, instance_type=node.kind, status=status, node_kind=kind, node_id=node.id
        )
        if not node.ready:
            return AutoscalerInstance(im_instance=instance)
        idle = 0 if node.tasks else int((self.now - node.idle_since) * 60_000)
        state = NodeState(
            node_id=node.id.encode(),
            instance_id=node.id,
            ray_node_type_name=node.kind,
            total_resources=node.resources,
            available_resources=node.free(),
            labels=self.config.get_node_labels(node.kind),
            status=NodeStatus.RUNNING if node.tasks else NodeStatus.IDLE,
            idle_duration_ms=idle,
        )
        return AutoscalerInstance(cloud_instance_id=node.id, ray_node=state, im_instance=instance)

    def autoscale(self, waiting: list[tuple[dict[str, float], int, bool]]) -> None:
        """One decision of Ray's autoscaler about `waiting`: (bundle, how many, all at once)."""
        from ray.autoscaler.v2.scheduler import SchedulingRequest
        from ray.autoscaler.v2.utils import ResourceRequestUtil
        from ray.core.generated.autoscaler_pb2 import (
            BundleSelector,
            GangResourceRequest,
            ResourceRequestByCount,
        )

        make = ResourceRequestUtil.make
        gangs = [
            GangResourceRequest(bundle_selectors=[BundleSelector(resource_requests=[make(bundle)] * count)])
            for bundle, count, gang in waiting
            if gang
        ]
        single = [
            ResourceRequestByCount(request=make(bundle), count=count) for bundle, count, gang in waiting if not gang
        ]
        reply = self.scheduler.schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=self.config.get_node_type_configs(),
                max_num_nodes=self.config.get_max_num_nodes(),
                idle_timeout_s=self.config.get_idle_timeout_s(),
                resource_requests=single,
                gang_resource_requests=gangs,
                current_instances=[self.instance(node) for node in self.nodes],
            )
        )
        ended = {request.instance_id for request in reply.to_terminate}
        self.nodes = [node for node in self.nodes if node.id not in ended]
        for request in reply.to_launch:
            self.nodes += [self.node(request.instance_type) for _ in range(request.count)]

    def lose(self, kind: str, count: int) -> None:
        """The cloud takes `count` nodes away. Their tasks run again; a gang continues from its checkpoint."""
        lost = [node for node in self.workers(kind) if node.ready][:count]
        gangs = {id(task.job): task.job for node in lost for task in node.tasks if task.job.gang}
        self.nodes = [node for node in self.nodes if node not in lost]
        for job in gangs.values():
            job.progress = job.saved
            for node in self.nodes:
                node.tasks = [task for task in node.tasks if task.job is not job]


def place(cluster: Cluster, jobs: list[Job]) -> list[tuple[dict[str, float], int, bool]]:
    """Starts every task that fits and returns the tasks that wait for nodes. Tasks without a GPU use GPU nodes last."""
    waiting = []
    for job in jobs:
        if job.ended is not None or job.start > cluster.now:
            continue
        running = sum(task.job is job for node in cluster.nodes for task in node.tasks)
        missing = min(job.at_once, job.tasks - job.done) - running
        if job.gang and running:
            continue
        placed: list[Node] = []
        for node in sorted(cluster.nodes, key=lambda node: node.resources.get("GPU", 0)):
            while len(placed) < missing and node.fits(job.bundle):
                node.tasks.append(Task(job, job.minutes - job.progress))
                placed.append(node)
        if job.gang and len(placed) < missing:  # all or none
            for node in placed:
                node.tasks = [task for task in node.tasks if task.job is not job]
            placed = []
        if placed and job.began is None:
            job.began = cluster.now
        if missing > len(placed):
            waiting.append((job.bundle, missing - len(placed), job.gang))
    return waiting


def work(cluster: Cluster, jobs: list[Job]) -> None:
    """Advances the clock by one step."""
    cluster.now += STEP
    for node in cluster.nodes:
        if not node.ready and cluster.now - node.requested >= BOOT_MINUTES:
            node.ready, node.idle_since = True, cluster.now
        if node.tasks:
            node.idle_since = cluster.now
        for task in node.tasks:
            task.left -= STEP
        for task in node.tasks:
            if task.left <= 0:
                task.job.done += 1
        node.tasks = [task for task in node.tasks if task.left > 0]
    for job in jobs:
        if job.gang and any(task.job is job for node in cluster.nodes for task in node.tasks):
            job.progress += STEP
            job.saved = job.progress // CHECKPOINT_MINUTES * CHECKPOINT_MINUTES
        if job.done >= job.tasks and job.ended is None:
            job.ended = cluster.now


@dataclass
class Sample:
    minute: float
    nodes: dict[str, int]
    busy: dict[str, int]
    stages: dict[str, int]  # nodes on which a task of the stage runs


def simulate(config: dict, jobs: list[Job], losses: dict[float, tuple[str, int]], hours: float = 24) -> list[Sample]:
    cluster, samples, losses = Cluster(config), [], dict(losses)
    while cluster.now < hours * 60:
        for minute in [minute for minute in losses if minute <= cluster.now]:
            cluster.lose(*losses.pop(minute))
        cluster.autoscale(place(cluster, jobs))
        kinds = list(config["available_node_types"])
        stages = {
            stage: sum(any(task.job.stage == stage for task in node.tasks) for node in cluster.nodes)
            for stage in {job.stage: None for job in jobs}
        }
        busy = {kind: sum(bool(node.tasks) for node in cluster.workers(kind)) for kind in kinds}
        samples.append(Sample(cluster.now, {kind: len(cluster.workers(kind)) for kind in kinds}, busy, stages))
        work(cluster, jobs)
    return samples


def costs(samples: list[Sample], prices: dict[str, float]) -> dict[str, dict[str, float]]:
    """Node-hours, the share of them with work, and dollars, by node type."""
    rows = {}
    for kind in samples[0].nodes:
        hours = sum(sample.nodes[kind] for sample in samples) * STEP / 60
        busy = sum(sample.busy[kind] for sample in samples) * STEP / 60
        most = max(sample.nodes[kind] for sample in samples)
        rows[kind] = {"most": most, "hours": hours, "busy": busy, "dollars": hours * prices[kind]}
    return rows


def draw(samples: list[Sample], jobs: list[Job], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    hours = [sample.minute / 60 for sample in samples]
    stages = list(samples[0].stages)
    figure, axes = pyplot.subplots(3, 1, figsize=(9, 6.4), sharex=True, height_ratios=(1, 1, 1), layout="constrained")
    for axis, kind, title in zip(axes, ("cpu", "gpu"), ("CPU nodes (spot)", "GPU nodes"), strict=False):
        axis.fill_between(hours, [s.nodes[kind] for s in samples], step="post", color="0.85", label="rented")
        axis.fill_between(hours, [s.busy[kind] for s in samples], step="post", color="tab:blue", label="with work")
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
    axes[1].yaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(loc="upper right", frameon=False)
    for row, stage in enumerate(stages):
        for job in (job for job in jobs if job.stage == stage and job.began is not None):
            start, end = job.began / 60, (job.ended or samples[-1].minute) / 60
            axes[2].broken_barh([(job.start / 60, start - job.start / 60)], (row - 0.3, 0.6), color="0.85")
            axes[2].broken_barh([(start, end - start)], (row - 0.3, 0.6), color=f"C{row}")
    axes[2].set_yticks(range(len(stages)), stages)
    axes[2].invert_yaxis()
    axes[2].set_xlabel("hour of the day (grey: waiting for nodes)")
    axes[2].set_xlim(0, 24)
    axes[2].set_xticks(range(0, 25, 2))
    for minute, (kind, count) in LOSSES.items():
        axis = axes[0 if kind == "cpu" else 1]
        axis.axvline(minute / 60, color="tab:red", linewidth=1)
        text = f"{count} lost"
        axis.annotate(
            text, (minute / 60, axis.get_ylim()[1]), xytext=(3, -10), textcoords="offset points", color="tab:red"
        )
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a PNG of nodes and stages over the day")
    parser.add_argument(
        "--price", nargs=3, type=float, metavar=("HEAD", "CPU", "GPU"), help="dollars per node and hour"
    )
    options = parser.parse_args()
    prices = dict(zip(PRICES, options.price, strict=True)) if options.price else PRICES
    jobs = day()
    samples = simulate(yaml.safe_load(FILE.read_text()), jobs, LOSSES)
    print("| nodes | maximum | node-hours | busy | dollars |\n| --- | --- | --- | --- | --- |")
    rows = costs(samples, prices)
    for kind, row in rows.items():
        share = f"{row['busy'] / row['hours']:.0%}" if row["hours"] and kind != "head" else ""
        print(f"| {kind} | {row['most']} | {row['hours']:.1f} | {share} | {row['dollars']:,.0f} |")
    print(f"| all | | | | {sum(row['dollars'] for row in rows.values()):,.0f} |\n")
    print("| job | waited for nodes | ran |\n| --- | --- | --- |")
    for job in jobs:
        if job.began is not None and job.ended is not None:
            print(f"| {job.name} | {job.began - job.start:.1f} min | {(job.ended - job.began) / 60:.2f} h |")
        else:
            print(f"| {job.name} | did not end | |")
    if options.output:
        draw(samples, jobs, options.output)
        print(f"\nwrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
