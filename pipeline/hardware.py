"""A table of GPUs, from the vendors' data sheets and common cloud machines, and the peak speed of devices.

GPUS["h100"].peak_flops, GPUS["h100"].memory
peak_flops(device, precision)                       of a device; measured on a CPU
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from pipeline.errors import UserError, nearest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU."""

    memory: float
    """Device memory in bytes."""
    peak_flops: float
    """Dense bf16 peak in FLOP/s (no sparsity); MFU is relative to it."""
    memory_bandwidth: float
    """Bandwidth of the device memory, in bytes per second."""
    node_bandwidth: float
    """Bandwidth from one GPU to the others in its node, in bytes per second: NVLink, or PCIe without NVLink."""
    network: float
    """Network bandwidth of a whole node, in bytes per second (p5, a3, p4d, g6e, g5, g6, p3dn)."""

    names: tuple[str, ...]
    """Exact names of the device in the driver. Similar names (L4, L40, L40S) differ by a factor of three in speed."""


# Peaks, memory and bandwidth are from the vendor's data sheets; H100 SXM and H100 PCIe are separate entries.
GPUS = {
    "h100": Gpu(80e9, 989.5e12, 3.35e12, 450e9, 400e9, ("NVIDIA H100 80GB HBM3",)),
    "h100-pcie": Gpu(80e9, 756e12, 2.0e12, 64e9, 50e9, ("NVIDIA H100 PCIe",)),
    "h100-nvl": Gpu(94e9, 835.5e12, 3.9e12, 64e9, 50e9, ("NVIDIA H100 NVL",)),
    "h200": Gpu(141e9, 989.5e12, 4.8e12, 450e9, 400e9, ("NVIDIA H200",)),
    "h200-nvl": Gpu(141e9, 835.5e12, 4.8e12, 64e9, 50e9, ("NVIDIA H200 NVL",)),
    "gh200": Gpu(96e9, 989.5e12, 4.0e12, 450e9, 50e9, ("NVIDIA GH200 480GB", "NVIDIA GH200 120GB")),
    "h800": Gpu(80e9, 989.5e12, 3.35e12, 200e9, 400e9, ("NVIDIA H800",)),
    "h20": Gpu(96e9, 148e12, 4.0e12, 450e9, 400e9, ("NVIDIA H20",)),
    "b200": Gpu(180e9, 2250e12, 8.0e12, 900e9, 400e9, ("NVIDIA B200",)),
    "b300": Gpu(270e9, 2250e12, 8.0e12, 900e9, 800e9, ("NVIDIA B300 SXM6 AC",)),
    "a100": Gpu(80e9, 312e12, 2.04e12, 300e9, 50e9, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
    "a100-40gb": Gpu(40e9, 312e12, 1.56e12, 300e9, 50e9, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    "a800": Gpu(80e9, 312e12, 2.04e12, 200e9, 50e9, ("NVIDIA A800-SXM4-80GB", "NVIDIA A800 80GB PCIe")),
    "l40s": Gpu(48e9, 362e12, 0.86e12, 32e9, 50e9, ("NVIDIA L40S",)),
    "l40": Gpu(48e9, 181e12, 0.86e12, 32e9, 50e9, ("NVIDIA L40",)),
    "a10g": Gpu(24e9, 70e12, 0.6e12, 16e9, 12.5e9, ("NVIDIA A10G",)),
    "l4": Gpu(24e9, 121e12, 0.3e12, 16e9, 12.5e9, ("NVIDIA L4",)),
    "v100": Gpu(32e9, 125e12, 0.9e12, 150e9, 12.5e9, ("Tesla V100-SXM2-32GB", "Tesla V100-SXM3-32GB")),
    "v100-16gb": Gpu(16e9, 125e12, 0.9e12, 150e9, 12.5e9, ("Tesla V100-SXM2-16GB",)),
}
USABLE_MEMORY = 0.92
"""Fraction of a GPU's memory that a plan may use. The rest is for the CUDA context, NCCL, kernels and fragmentation."""


def find_gpu(name: str) -> Gpu:
    """The GPU with this name, ignoring case. Raises UserError for an unknown name."""
    if name.lower() not in GPUS:
        raise UserError(f'unknown GPU "{name}"{nearest(name.lower(), GPUS)}; known: {", ".join(GPUS)}')
    return GPUS[name.lower()]


def identify_gpu(name: str) -> str | None:
    """The key in GPUS of a device, given its name in the driver; None for an unknown device or a MIG slice."""
    return next((key for key, gpu in GPUS.items() if name in gpu.names), None)


def device_memory(device: "torch.device") -> float:
    """Memory of one GPU in bytes: from the table for a known GPU, so that runs
    match their plans; otherwise from the driver."""
    import torch

    known = identify_gpu(torch.cuda.get_device_name(device))
    return GPUS[known].memory if known else float(torch.cuda.get_device_properties(device).total_memory)


def peak_flops(device: "torch.device", precision: str = "fp32") -> float:
    """Peak FLOP/s of one device. For a GPU: the dense bf16 peak of the data sheet, or infinity if it is unknown. For a
    CPU: measured with matrix products in `precision`."""
    import torch  # not needed by jobs/plan.py --help

    if device.type == "cuda":
        known = identify_gpu(torch.cuda.get_device_name(device))
        return GPUS[known].peak_flops if known else float("inf")
    size = 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    # Measures for half a second, because the first products are slow and shared cores vary.
    best, until = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


MAX_FOREIGN = 0.1
"""Maximum fraction of CPU time used by other processes at which the speed of this process is meaningful."""


class CpuShare:
    """Measures the CPU time that other processes use between two calls."""

    def __init__(self, processes: int = 1):
        """processes: number of processes of this job on the machine."""
        self.processes = processes
        self._last = self._read()

    def is_quiet(self) -> bool:
        """Whether other processes and the hypervisor used at most a tenth of the CPU time since the last call."""
        now = self._read()
        busy, mine, seconds = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        return busy - mine * self.processes <= MAX_FOREIGN * seconds

    def _read(self) -> tuple[float, float, float]:
        """CPU seconds of (all processes including time stolen by the hypervisor, this process, the machine)."""
        times = psutil.cpu_times()
        mine = psutil.Process().cpu_times()
        total, idle = sum(times), times.idle + getattr(times, "iowait", 0.0)
        return total - idle, mine.user + mine.system, total


# Minimum NVIDIA driver version by major CUDA version (NVIDIA, "CUDA Compatibility"). A test compares it with the
# version that infra/ and docs/ name for the pinned PyTorch.
MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}
