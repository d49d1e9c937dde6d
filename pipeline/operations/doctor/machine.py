"""This machine: shared memory, compiler, stale locks, ports and GPUs."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Mapping

from pipeline import cluster
from pipeline.operations.doctor.finding import CheckResult, error, ok, warning

SHARED_MEMORY = 2 << 30  # Ray's object store and NCCL share it; containers have 64 MB unless told otherwise
# What `ray start --head` listens on, and the range that it gives to workers (ray start --help).
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
    """torch.compile and DeepSpeed's operators are built with a C++ compiler and ninja, on the worker."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    compilers = [os.environ.get("CXX") or "c++", "g++", "clang++"]
    missing = [] if any(shutil.which(program, path=path) for program in compilers) else ["C++ compiler"]
    missing += [] if shutil.which("ninja", path=path) else ["ninja"]
    if not missing:
        return ok("compiler", "C++ and ninja are there")
    found = error if required else warning
    return found(
        "compiler",
        f"no {' and no '.join(missing)}: {'--engine.compile' if required else 'torch.compile'} and DeepSpeed's own operators need it",
        "apt-get install g++ (pip install ninja), or use the image of infra/",
    )


def build_locks() -> CheckResult:
    """A process that was killed while it built an operator leaves a lock; torch then waits for it for ever, silently."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    locks = [os.path.join(folder, "lock") for folder, _, files in os.walk(root) if "lock" in files]
    stale = sorted(set(locks) - _open_files(locks))
    if stale:
        return error(
            "build locks",
            f"{', '.join(stale)}: nobody holds it, and workers would wait for it",
            f"rm {' '.join(stale)}",
        )
    return ok("build locks", "an operator is being built" if locks else "none")


def _open_files(paths: Iterable[str]) -> set[str]:
    """Which of the files some process of ours holds open: whoever builds keeps its lock open."""
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
    """Who listens where `ray start --head` would; an embedded Ray looks for free ports itself."""
    import psutil

    try:
        listening = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    except psutil.AccessDenied:  # macOS, to ordinary users
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
    """GPUs, and an all-reduce over those of this node through NCCL."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        if wanted and not cluster.submitted():
            return warning(
                "GPUs",
                "none here, and the run wants one per worker",
                "fine for a head; else check nvidia-smi, or --no-gpus",
            )
        return ok("GPUs", "none, and none wanted" if not wanted else "none on this node")
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
            f"{count} x {kinds}: NCCL adds up wrongly",
            "check the interconnect: nvidia-smi topo -m, NCCL_P2P_DISABLE=1",
        )
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return ok("GPUs", f"{count} x {kinds}, NCCL {version} adds up over all of them")
