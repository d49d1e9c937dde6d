#!/usr/bin/env python3
"""Drains the Ray node of this machine before it is preempted, so that training saves a checkpoint in time.

    python infra/preemption.py --watch aws         on a VM, next to `ray start`: runs until a notice or SIGTERM
    python infra/preemption.py --watch gcp
    python infra/preemption.py --now --grace 60    preStop hook of a pod: drains at once, waits until the node is idle

On a draining node Ray schedules nothing new, and training saves a checkpoint and continues without it. Ray does not
detect preemptions itself: clouds publish notices on the metadata server of the machine, and Kubernetes sends a signal.
Supported notices: EC2 spot, 120 s ahead (latest/meta-data/spot/instance-action, IMDSv2); Compute Engine spot, 30 s
(instance/preempted), and host maintenance of GPU machines, 60 minutes (instance/maintenance-event).

Exit codes: 0 drained, 1 Ray could not be reached before the deadline.
"""

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime

METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}


@dataclass(frozen=True, slots=True)
class Notice:
    reason: str
    seconds: float
    """Seconds until the machine is stopped."""


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--watch", choices=METADATA, help="wait for this cloud's notice, or SIGTERM")
    what.add_argument("--now", action="store_true", help="drain at once")
    parser.add_argument(
        "--grace", type=float, default=30, help="seconds until the machine stops, after SIGTERM or --now"
    )
    parser.add_argument("--every", type=float, default=2, help="seconds between polls of the metadata server")
    parser.add_argument("--metadata", help="address of the metadata server")
    parser.add_argument("--address", default="auto", help="Ray's address; default: the Ray of this machine")
    parser.add_argument("--node-id", help="node to drain; default: the Ray node of this machine")
    return parser.parse_args(argv)


def main() -> int:
    options = arguments(sys.argv[1:])
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    notice = Notice("asked for", options.grace)
    if options.watch:
        import ray  # noqa: F401  (a second that is not to be lost when the notice comes)

        base = options.metadata or METADATA[options.watch]
        print(f"preemption: watching {base}", flush=True)
        notice = watch(options.watch, base, options.every, terminated) or Notice("SIGTERM", options.grace)
    print(f"preemption: {notice.reason}, {notice.seconds:.0f} s left", flush=True)
    deadline = time.time() + notice.seconds
    nodes = drain(notice.reason, deadline, options.address, options.node_id)
    if not nodes:
        return 1
    print(f"preemption: draining {', '.join(nodes)}", flush=True)
    if options.now or terminated.is_set():  # the node is killed as soon as this process returns
        wait_until_idle(nodes, deadline)
    return 0


def watch(cloud: str, base: str, every: float, stopped: threading.Event) -> Notice | None:
    """Waits for a notice of the cloud. Returns None when `stopped` was set first."""
    look = {"aws": aws_notice, "gcp": gcp_notice}[cloud]
    while not stopped.is_set():
        try:
            if notice := look(base):
                return notice
        except (OSError, ValueError, KeyError) as error:  # retry after an error of the metadata server
            print(f"preemption: {base}: {error}", file=sys.stderr, flush=True)
        stopped.wait(every)
    return None


def aws_notice(base: str) -> Notice | None:
    """EC2's spot notice: {"action": "terminate", "time": "2026-01-01T00:02:00Z"}; 404 if there is none."""
    token = fetch(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    try:
        text = fetch(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    notice = json.loads(text)
    left = datetime.fromisoformat(notice["time"]).timestamp() - time.time()
    return Notice(f"EC2 spot: {notice['action']}", max(0.0, left))


def gcp_notice(base: str) -> Notice | None:
    """Compute Engine's notice: preemption of a spot machine, or host maintenance of a machine with GPUs."""
    header = {"Metadata-Flavor": "Google"}
    if fetch(f"{base}/computeMetadata/v1/instance/preempted", header) == "TRUE":
        return Notice("Compute Engine spot: preempted", 30)
    if fetch(f"{base}/computeMetadata/v1/instance/maintenance-event", header).startswith("TERMINATE"):
        return Notice("Compute Engine: host maintenance", 3600)
    return None


def fetch(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # link-local addresses must not go through a proxy
    with opener.open(request, timeout=5) as answer:
        return answer.read().decode().strip()


def drain(reason: str, deadline: float, address: str, node_id: str | None) -> list[str]:
    """Requests draining from Ray's control store. Returns the ids of the draining nodes, none after the deadline."""
    from ray._private import services
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    why = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    while True:
        try:
            store = GcsClient(address=services.canonicalize_bootstrap_address_or_die(address))
            nodes = [node_id] if node_id else sorted(services.find_node_ids())
            if not nodes:
                raise ConnectionError("no Ray node on this machine")
            for node in nodes:
                accepted, refusal = store.drain_node(node, why, reason, int(deadline * 1000))
                if not accepted:
                    raise ConnectionError(refusal)
            return nodes
        except Exception as error:
            print(f"preemption: cannot reach Ray: {error}", file=sys.stderr, flush=True)
            if time.time() + 1 > deadline:
                return []
            time.sleep(1)


def wait_until_idle(nodes: list[str], deadline: float) -> None:
    """Waits until Ray has stopped the drained nodes, which it does when they are idle, or until the deadline."""
    from ray._private import services

    with contextlib.suppress(KeyboardInterrupt):
        while time.time() < deadline and services.find_node_ids() & set(nodes):
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
