"""Checks of a machine: shared memory, compiler, stale locks, ports and GPUs."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Mapping

from pipeline import cluster
from pipeline.operations.doctor.finding import CheckResult, error, ok, warning

SHARED_MEMORY = 2 << 30  # used by Ray's object store and NCCL; the default in containers is 64 MB
# Ports of `ray start --head`, and its port range for workers (ray start --help).
PORTS = {
    6379: "Ray's control store",
    8265: "Ray's dashboard and job server",
    10001: "Ray's client server",
    52365: "Ray's dashboard agent",
}
WORKER_PORTS = range(10002, 20000)


def shared_memory(folder: str = "/dev/shm") -> CheckResult:
    from ray._common.utils import get_system_memory

    try:
        size = shutil.disk_usage(folder).total
    except OSError:
        return warning("shared memory", f"there is no {folder}", "Ray will use files in /tmp, which is slow")
    wanted = min(SHARED_MEMORY, int(0.3 * get_system_memory()))
    if size < wanted:
        return warning(
            "shared memory",
            f"{folder} has {size / 1e6:,.0f} MB: Ray's object store moves to disk, and NCCL may fail",
            f"give the container at least --shm-size={wanted >> 20}m, or on Kubernetes an emptyDir with medium: Memory there",
        )
    return ok("shared memory", f"{folder} has {size / 1e9:,.1f} GB")


def compiler(required: bool) -> CheckResult:
    """Checks for the C++ compiler and ninja, with which workers build torch.compile kernels and DeepSpeed's
    operators."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    compilers = [os.environ.get("CXX") or "c++", "g++", "clang++"]
    missing = [] if any(shutil.which(program, path=path) for program in compilers) else ["C++ compiler"]
    missing += [] if shutil.which("ninja", path=path) else ["ninja"]
    if not missing:
        return ok("compiler", "C++ compiler and ninja found")
    found = error if required else warning
    return found(
        "compiler",
        f"no {' and no '.join(missing)}: {'--engine.compile' if required else 'torch.compile'} and DeepSpeed's own operators need it",
        "apt-get install g++ (pip install ninja), or use the image of infra/",
    )


def build_locks() -> CheckResult:
    """Checks for locks of killed builds, for which torch would wait forever without a message."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    locks = [os.path.join(folder, "lock") for folder, _, files in os.walk(root) if "lock" in files]
    stale = sorted(set(locks) - _open_files(locks))
    if stale:
        return error(
            "build locks",
            f"{', '.join(stale)}: no process holds it, so workers would wait forever",
            f"rm {' '.join(stale)}",
        )
    return ok("build locks", "an operator is being built" if locks else "none")


def _open_files(paths: Iterable[str]) -> set[str]:
    """The files that a process of this user has open. A running build keeps its lock file open."""
    import psutil

    wanted, held = set(paths), set()
    for process in psutil.process_iter() if wanted else ():
        with contextlib.suppress(psutil.Error, OSError):
            held |= {name for name in map(os.readlink, _links(process.pid)) if name in wanted}
    return held


def _links(pid: int) -> list[str]:
    folder = f"/proc/{pid}/fd"
    return [os.path.join(folder, name) for name in os.listdir(folder)]


def ports(wanted: Mapping[int, str] = PORTS, workers: range = WORKER_PORTS) -> CheckResult:
    """Checks for processes that use the ports of `ray start --head`. An embedded Ray finds free ports."""
    import psutil

    try:
        listening = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    except psutil.AccessDenied:  # macOS without root
        return ok("ports", "not visible to this user")
    owners = {port: _name(listening[port]) for port in sorted(listening)}
    taken = [f"{port} ({what}) by {owners[port]}" for port, what in wanted.items() if port in owners]
    taken = [text for text in taken if "gcs_server" not in text]
    inside = [f"{port} by {owner}" for port, owner in owners.items() if port in workers and "ray" not in owner]
    if not taken and not inside:
        return ok("ports", "free for `ray start --head`")
    message = "taken: " + ", ".join(taken) if taken else ""
    if inside:
        message += ("; " if message else "") + f"in the range of Ray's workers: {', '.join(inside[:5])}"
    return warning(
        "ports", message, "end it, or give ray start --port, --dashboard-port, --min-worker-port and --max-worker-port"
    )


def _name(pid: int | None) -> str:
    import psutil

    try:
        return psutil.Process(pid).name() if pid else "another user's process"
    except psutil.Error:
        return f"process {pid}"


def devices(wanted: bool) -> CheckResult:
    """Checks for GPUs, and runs an NCCL all-reduce over the GPUs of this node."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        if wanted and not cluster.is_ray_job():
            return warning(
                "GPUs",
                "none found, but the run needs one per worker",
                "expected on a head; otherwise check nvidia-smi, or use --no-gpus",
            )
        return ok("GPUs", "none, and none needed" if not wanted else "none on this node")
    kinds = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
    try:
        ones = [torch.ones(1024, device=f"cuda:{i}") for i in range(count)]
        torch.cuda.nccl.all_reduce(ones)
        right = all(float(values[0]) == count for values in ones)
    except Exception as cause:
        return error(
            "GPUs",
            f"{count} x {kinds}: NCCL fails ({cause})",
            "run with NCCL_DEBUG=INFO; check the driver and /dev/shm",
        )
    if not right:
        return error(
            "GPUs",
            f"{count} x {kinds}: NCCL returns wrong sums",
            "check the interconnect: nvidia-smi topo -m, NCCL_P2P_DISABLE=1",
        )
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return ok("GPUs", f"{count} x {kinds}, NCCL {version} all-reduce works")
