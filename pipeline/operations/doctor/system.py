"""Checks of the operating system: GPU driver, clock, limits, network devices."""

import email.utils
import os
import re
import resource
import time
import urllib.error
import urllib.request
from pathlib import Path

from pipeline.hardware import MINIMUM_DRIVER
from pipeline.operations.doctor.finding import CheckResult, error, ok, warning

OPEN_FILES = 8192  # a node with dozens of workers has several thousand open, mostly sockets
CLOCK_WARNING, CLOCK_ERROR = 30.0, 900.0  # seconds; S3 rejects signatures that are 15 minutes off


def driver(wanted: bool, version_file: str = "/proc/driver/nvidia/version", cuda: str | None = None) -> CheckResult:
    """Checks that the NVIDIA driver supports PyTorch's CUDA version. cuda: for example "13.0"; None: that of
    PyTorch."""
    import torch

    cuda = cuda or torch.version.cuda
    try:
        text = Path(version_file).read_text()
    except OSError:
        return ok("GPU driver", "none, and no GPU is visible" if wanted else "none, and none needed")
    match = re.search(r"Kernel Module.*?\s(\d{3,})\.\d+", text)
    if match is None:
        return warning("GPU driver", f"{version_file} contains no version", "run nvidia-smi")
    have = int(match[1])
    if cuda is None:
        report = error if wanted else warning
        return report(
            "GPU driver",
            f"driver {have} is installed, but this PyTorch ({torch.__version__}) was built without CUDA",
            "install the CUDA build: docs/install.md",
        )
    need = MINIMUM_DRIVER.get(int(cuda.partition(".")[0]))
    if need is not None and have < need:
        return error(
            "GPU driver",
            f"driver {have} is older than {need}, which PyTorch's CUDA {cuda} needs",
            f"install driver {need} or later, or a machine image that has it (docs/clusters.md)",
        )
    return ok("GPU driver", f"{have}, supports CUDA {cuda}")


def clock(uri: str, patience: float = 5.0) -> CheckResult:
    """Compares the clock with the Date header of an HTTP server. uri: the MLflow server or the S3 endpoint."""
    if not uri.startswith(("http://", "https://")):
        return ok("clock", "no server to compare it with")
    begin = time.time()
    try:
        with urllib.request.urlopen(urllib.request.Request(uri, method="HEAD"), timeout=patience) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as answer:  # error responses also have a Date header
        date = answer.headers["Date"]
    except (OSError, ValueError):
        return ok("clock", f"{uri} does not respond")
    if not date:
        return ok("clock", f"{uri} sends no Date header")
    middle = (begin + time.time()) / 2
    off = middle - email.utils.parsedate_to_datetime(date).timestamp()
    if abs(off) < CLOCK_WARNING:
        return ok("clock", f"agrees with {uri}")
    way = "ahead of" if off > 0 else "behind"
    report = error if abs(off) >= CLOCK_ERROR else warning
    return report(
        "clock",
        f"{abs(off):,.0f} s {way} {uri}; S3 rejects requests that are {CLOCK_ERROR / 60:.0f} minutes off",
        "start a time service: systemctl enable --now chrony",
    )


def limits(is_node: bool = False, wanted: int = OPEN_FILES) -> CheckResult:
    """Checks the limits of open files per process.

    is_node: whether this process belongs to a node of `ray start`, which keeps the soft limit of the shell that started
    it. `ray.init` raises the soft limit of an embedded Ray up to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else hard
    if most < wanted:
        return warning(
            "open files",
            f"at most {hard:,}; Ray and its workers want {wanted:,}",
            "raise it: --ulimit nofile=65536:65536, LimitNOFILE in systemd, or /etc/security/limits.conf",
        )
    if is_node and 0 <= soft < wanted:
        return warning(
            "open files",
            f"{soft:,} for this node (soft limit); Ray and its workers want {wanted:,}, and {most:,} are permitted",
            "run `ulimit -n 65536` in the shell before `ray start`",
        )
    return ok("open files", f"{soft:,} now, {hard:,} at most" if hard >= 0 else f"{soft:,} now, no limit")


def network(wanted: bool, devices: str = "/sys/class/infiniband") -> CheckResult:
    """Checks that RDMA devices (InfiniBand, RoCE, EFA) of a GPU node are present and usable by this process."""
    try:
        found = sorted(os.listdir(devices))
    except OSError:
        found = []
    if not found:
        return ok("fast network", "no RDMA device: NCCL uses TCP between nodes" if wanted else "none, and none needed")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if wanted and locked != resource.RLIM_INFINITY:
        return warning(
            "fast network",
            f"{len(found)} RDMA devices, but only {locked >> 10:,} KiB of memory can be locked: NCCL falls back to TCP or fails",
            "--ulimit memlock=-1, or LimitMEMLOCK=infinity for the container runtime",
        )
    return ok("fast network", f"{len(found)} RDMA devices: {', '.join(found[:4])}{' ...' if len(found) > 4 else ''}")
