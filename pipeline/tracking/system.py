"""System metrics of a node during training: CPU, memory, network, disk and GPUs, logged as `system/<node>/...`."""

import contextlib
import subprocess
import threading
import time
from typing import Any

import psutil

from pipeline.tracking import names
from pipeline.tracking.run import attach_run

NVIDIA = ("utilization.gpu", "memory.used", "power.draw")
LOOPBACK = ("lo", "lo0")  # Ray's and MLflow's own messages on one machine are no network traffic


class SystemMetrics:
    """`with SystemMetrics(run_id, uri, node="node-0"):` samples this machine every 10 seconds until the block ends.

    Use one per node, regardless of the number of workers. The step of a sample is the number of seconds since the start
    of the run, so that a resumed run continues its curves. GPUs are read through nvidia-smi, if there is one. The
    energy is the integral of the GPUs' power in kWh over all attempts of the run (`Run.log_energy` adds up the nodes).
    """

    def __init__(self, run_id: str, uri: str, *, node: str, every: float = 10.0):
        self.run = attach_run(run_id, uri)
        self.prefix = f"{names.SYSTEM}{node}/"
        self.since = time.time()
        self.every = every
        self.energy = 0.0
        self._gpus = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)

    def __enter__(self) -> "SystemMetrics":
        psutil.cpu_percent()  # the first call only starts the interval
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(10)
        self.run.finish()

    def _sample(self) -> None:
        before, last = _counters(), time.monotonic()
        with contextlib.suppress(Exception):  # if the server is unreachable, seconds count from now
            self.since = self.run.started()
            self.energy = self.run.metrics().get(f"{self.prefix}{names.NODE_ENERGY}", 0.0)
        while True:
            ended = self._stop.wait(self.every)
            now, counters = time.monotonic(), _counters()
            seconds = max(now - last, 1e-3)
            values = {name: (counters[name] - before[name]) / 1e6 / seconds for name in counters}
            before, last = counters, now
            memory = psutil.virtual_memory()
            values |= {
                "cpu_percent": psutil.cpu_percent(),
                "memory_percent": memory.percent,
                "memory_gb": memory.used / 1e9,
            }
            values |= self._read_gpus(seconds)
            self.run.log({self.prefix + name: value for name, value in values.items()}, int(time.time() - self.since))
            if ended:
                return

    def _read_gpus(self, seconds: float) -> dict[str, float]:
        """Utilisation in percent, memory in GB and power in W of each GPU, and the node's energy so far."""
        if not self._gpus:
            return {}
        command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA)}", "--format=csv,noheader,nounits"]
        try:
            lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            self._gpus = False  # no GPUs, or no access to them
            return {}
        values: dict[str, float] = {}
        for index, line in enumerate(lines):
            for name, text in zip(("percent", "memory_gb", "watts"), line.split(","), strict=False):
                try:
                    values[f"gpu{index}_{name}"] = float(text) / (1e3 if name == "memory_gb" else 1)
                except ValueError:  # "[N/A]": the GPU does not report this value
                    continue
        self.energy += sum(value for name, value in values.items() if name.endswith("_watts")) * seconds / 3.6e6
        return values | {names.NODE_ENERGY: self.energy}


def _counters() -> dict[str, float]:
    """Bytes since boot, which are logged as MB/s."""
    cards = psutil.net_io_counters(pernic=True)
    network = [count for name, count in cards.items() if name not in LOOPBACK]
    counters = {
        "network_in_mb_s": sum(count.bytes_recv for count in network),
        "network_out_mb_s": sum(count.bytes_sent for count in network),
    }
    disk = psutil.disk_io_counters()
    if disk is not None:  # None in containers without access to it
        counters |= {"disk_read_mb_s": disk.read_bytes, "disk_write_mb_s": disk.write_bytes}
    return counters
