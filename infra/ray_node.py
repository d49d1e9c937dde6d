#!/usr/bin/env python3
"""Runs one Ray node of a Slurm or SkyPilot job: the head in the task with rank 0, the others join it.

    srun python infra/ray_node.py 10.0.0.1:6379 --num-gpus 8        further options are those of `ray start`

The rank is SLURM_PROCID or SKYPILOT_NODE_RANK. SIGINT ends this node with all its processes; `ray stop` would also end
the other Ray nodes of the machine. SIGTERM and SIGHUP are blocked: `scancel`, a preemption and a requeue send SIGTERM
to all processes of a Slurm job, and Ray would end before the training has saved its step.

Exit codes: 0 after SIGINT, or after the head has ended; 1 if this node failed; 2 for wrong arguments.
"""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import psutil

PATIENCE = 600
"""Seconds that a node waits for the head."""
OPEN_FILES = 65536
"""Wanted limit of open files. A Ray node keeps the soft limit with which it was started."""


def main() -> int:
    host, _, port = sys.argv[1].rpartition(":") if len(sys.argv) > 1 else ("", "", "")
    if not host or not port.isdigit():
        print(__doc__, file=sys.stdout if "--help" in sys.argv else sys.stderr)
        return 0 if "--help" in sys.argv else 2
    is_head = (os.environ.get("SLURM_PROCID") or os.environ.get("SKYPILOT_NODE_RANK") or "0") == "0"
    if is_head:
        role = ["--head", f"--node-ip-address={host}", f"--port={port}"]
    else:
        role = [f"--address={host}:{port}"]
        if not answers(host, int(port), PATIENCE):
            print(f"ray_node: no Ray head at {host}:{port} after {PATIENCE} seconds", file=sys.stderr)
            return 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if 0 <= soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})  # inherited by all processes of the node
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    node = subprocess.Popen(["ray", "start", *role, "--block", *sys.argv[2:]], start_new_session=True)
    try:
        code = node.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        kill(node.pid)
    if code and not is_head and not answers(host, int(port), patience=0):
        print(f"ray_node: the head at {host}:{port} has ended")
        return 0
    return 1 if code else 0


def answers(host: str, port: int, patience: float) -> bool:
    """Whether the port accepts a connection within this many seconds; tries at least once."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(1)


def kill(pid: int) -> None:
    """Kills a process and its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


if __name__ == "__main__":
    sys.exit(main())
