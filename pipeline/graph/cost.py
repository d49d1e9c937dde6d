"""The measured cost of stages: seconds, occupied CPU-hours and GPU-hours, bytes, dollars."""

import math
import time
from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.graph import fingerprints, results
from pipeline.graph.executor import Ended, Executor
from pipeline.graph.file import Prices
from pipeline.graph.instances import Instance
from pipeline.graph.plan import Plan
from pipeline.graph.state import Running

COLUMNS = ("seconds", "cpu_hours", "gpu_hours", "read", "written", "dollars")


def gpus(instance: Instance, available: float) -> float:
    """GPUs that an instance occupies. available: those of the executor; if infinite, the number requested counts."""
    optional = instance.kind.optional_gpus(instance.config) if math.isfinite(available) else 0.0
    return instance.gpus or min(optional, available)


def of_attempt(instance: Instance, executor: Executor, running: Running, ended: Ended) -> dict[str, float]:
    """The cost of one attempt. Hours are those of the occupied CPUs and GPUs; `used_cpu_hours` is the CPU time used."""
    seconds = ended.seconds if ended.seconds is not None else max(0.0, time.time() - running.started)
    cpus = executor.cpus if instance.cpus is None else instance.cpus
    taken = {"seconds": seconds, "attempts": 1.0, "gpu_hours": gpus(instance, executor.gpus) * seconds / 3600}
    if math.isfinite(cpus):
        taken["cpu_hours"] = cpus * seconds / 3600
    for name, value in ended.spent.items():
        taken["used_cpu_hours" if name == "cpu_hours" else name] = value
    return taken


def add(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The sum of two costs."""
    return {key: first.get(key, 0.0) + second.get(key, 0.0) for key in {**first, **second}}


def finished(
    plan: Plan, instance: Instance, running: Running, spent: Mapping[str, float], output: str
) -> dict[str, Any]:
    """The cost of a finished instance over all attempts. Bytes read are those of its inputs, each counted once."""
    read = 0.0
    for address in (
        address for group in (instance.reads, instance.observes) for many in group.values() for address in many
    ):
        if address.instance is not None:
            read += fingerprints.size(storage.join(plan.outputs[address.instance], address.below))
        elif address.covers:
            read += sum(fingerprints.size(plan.outputs[up]) for up in address.covers)
        else:
            read += plan.external.size(address.text)
    total = {**spent, "read": read, "written": float(fingerprints.size(output))}
    if not total.get("gpu_hours"):  # a cluster job that used the GPUs it found
        total["gpu_hours"] = results.gpus(instance.kind.name, output) * total.get("seconds", 0.0) / 3600
    money = dollars(plan.pipeline.prices, total)
    return total if money is None else {**total, "dollars": money}


def dollars(prices: Prices, hours: Mapping[str, float]) -> float | None:
    """The price of CPU-hours and GPU-hours; None if the file gives no prices."""
    if prices.cpu_hour is None and prices.gpu_hour is None:
        return None
    return hours.get("cpu_hours", 0.0) * (prices.cpu_hour or 0.0) + hours.get("gpu_hours", 0.0) * (
        prices.gpu_hour or 0.0
    )


def total(costs: list[Mapping[str, float]]) -> dict[str, float]:
    """The sum of the costs of stages."""
    found: dict[str, float] = {}
    for one in costs:
        found = add(found, {key: value for key, value in one.items() if isinstance(value, int | float)})
    return found


# ---------------------------------------------------------------- as text


def duration(seconds: float) -> str:
    """48 s, 3 min, 2.1 h, 4.0 d."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} d" if seconds < 100 * 86400 else f"{seconds / 86400:,.0f} d"


def money(dollars: float) -> str:
    """12,345.67, or 0.0123 below a dollar."""
    return f"{dollars:,.2f}" if dollars >= 1 or not dollars else f"{dollars:.4f}"
