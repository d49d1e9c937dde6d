"""Simulates how training speed scales with the number of GPUs.

    rows = simulate(plan(config, recipe), counts=(1, 8, 64, 512))
    draw(rows, "scaling.png")

The time of a step is compute plus communication that does not overlap:

    compute         images per GPU x seconds per image of the plan, or the time for launching the kernels if that is longer,
                    as with the few images per GPU of a small batch on many GPUs
    communication   bytes that each GPU sends over the slowest link of the ring, plus a latency per hop and bucket bytes
    ring algorithms send (n-1)/n of a buffer for reduce-scatter or all-gather. Stages 0 and 1: gradients and
                    parameters once per step (2 passes); stage 2 reduces the gradients of every micro-batch; stage 3
                    also gathers parameters in every forward and backward pass (3 passes per micro-batch; arXiv
                    1910.02054, section 7)
    link            NVLink within a node; between nodes the network of the node, shared by the rings of its GPUs
    overlap         0 by default, because DeepSpeed reduces after the backward pass in stages 1 and 2

Weak scaling keeps the number of images per GPU, strong scaling the global batch size. The model omits data wait and
stragglers, and gives each GPU the model states of the plan, however many GPUs share them. tests/benchmarks/scaling.py
compares the prediction with a measurement on two CPU workers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.hardware import find_gpu

LATENCY = 5e-6  # seconds per hop
BUCKET_BYTES = 1e9  # DeepSpeed's reduce_bucket_size, 500M elements of 2 bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """Interconnect: bytes per second within a node and between nodes, GPUs per node, seconds per hop."""

    inside: float
    outside: float
    per_node: int = 8
    latency: float = LATENCY

    def bandwidth(self, workers: int) -> float:
        """Bandwidth of the slowest hop of a ring."""
        return self.inside if workers <= self.per_node else min(self.inside, self.outside)


def sent_bytes(parameters: int, stage: int, workers: int, *, width: int = 2, accumulation: int = 1) -> float:
    """Bytes that each worker sends in a step of `accumulation` micro-batches, with `width` bytes per element."""
    passes = {0: 2, 1: 2, 2: 1 + accumulation, 3: 3 * accumulation}[stage]
    return passes * parameters * width * (workers - 1) / workers


def step_seconds(
    computing: float,
    parameters: int,
    stage: int,
    workers: int,
    link: Link,
    *,
    width: int = 2,
    accumulation: int = 1,
    overlap: float = 0.0,
) -> float:
    """Seconds per step. overlap: fraction of the backward pass (two thirds of the compute time) that hides
    communication."""
    if workers == 1:
        return computing
    sent = sent_bytes(parameters, stage, workers, width=width, accumulation=accumulation)
    hops = math.ceil(sent / BUCKET_BYTES) * (workers - 1)
    communication = sent / link.bandwidth(workers) + hops * link.latency
    return computing + max(0.0, communication - overlap * computing * 2 / 3)


def computing_time(plan: Mapping[str, Any], stage: int, images: float) -> tuple[float, int]:
    """Seconds of a GPU for `images` images without communication, and in how many micro-batches."""
    run, memory = plan["run"], plan["memory"]
    taken = memory["stages"][str(stage)]["model_states"] + memory["stages"][str(stage)]["buffers"]
    fitting = max(1, (memory["usable"] - taken) // (memory["activations_per_image"] + memory["working_per_image"]))
    accumulation = max(1, math.ceil(images / fitting))
    seconds = images * plan["hardware"]["gpus"] / run["limits"]["gpus"]
    return max(seconds, accumulation * run["launch_seconds"]), accumulation


def simulate(
    plan: Mapping[str, Any],
    counts: Sequence[int] | None = None,
    *,
    stages: Sequence[int] = (1, 2, 3),
    width: int = 2,
    overlap: float = 0.0,
    network: float | None = None,
) -> list[dict[str, Any]]:
    """Rows of (mode, stage, gpus) with step time, images per second and efficiency, from `planning.plan`'s result.

    network: bandwidth between nodes in GB/s, if not the usual one for the GPU. Efficiency is the speed per GPU relative
    to a single GPU with the whole batch (strong) or with one GPU's part of it (weak)."""
    hardware = plan["hardware"]
    gpu = find_gpu(hardware["gpu"])
    per_node = max(1, hardware["gpus"] // hardware["nodes"])
    link = Link(
        inside=gpu.node_bandwidth,
        outside=gpu.network if network is None else network * 1e9,
        per_node=per_node,
    )
    per_gpu = plan["memory"]["images_per_gpu"]
    batch = per_gpu * hardware["gpus"]
    counts = counts or [2**i for i in range(int(math.log2(batch)) + 1) if 2**i <= 512]
    rows = []
    for stage in stages:
        for mode in ("weak", "strong"):
            most = per_gpu if mode == "weak" else batch
            alone = most / computing_time(plan, stage, most)[0]
            for count in counts:
                images = per_gpu if mode == "weak" else batch / count
                if images < 1:
                    continue
                computing, accumulation = computing_time(plan, stage, images)
                seconds = step_seconds(
                    computing,
                    plan["model"]["parameters"],
                    stage,
                    count,
                    link,
                    width=width,
                    accumulation=accumulation,
                    overlap=overlap,
                )
                rows.append(
                    {
                        "mode": mode,
                        "stage": stage,
                        "gpus": count,
                        "images_per_gpu": images,
                        "step_seconds": seconds,
                        "images_per_second": count * images / seconds,
                        "efficiency": images / seconds / alone,
                    }
                )
    return rows


def scaling_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Efficiency by number of GPUs, one line per mode and stage."""
    counts = sorted({row["gpus"] for row in rows})
    lines = [f"  {'scaling, GPUs':17s}" + "".join(f"{count:>6d}" for count in counts)]
    for key in dict.fromkeys((row["mode"], row["stage"]) for row in rows):
        mode, stage = key
        found = {row["gpus"]: row["efficiency"] for row in rows if (row["mode"], row["stage"]) == key}
        cells = "".join(f"{found[count]:>6.0%}" if count in found else f"{'':>6s}" for count in counts)
        lines.append(f"    {f'{mode}, ZeRO-{stage}':15s}{cells}")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], uri: str, title: str = "") -> None:
    """Plots efficiency over the number of GPUs (log axis) for weak and strong scaling. PNG, local or s3://."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, mode in zip(axes, ("weak", "strong"), strict=True):
        chosen = [row for row in rows if row["mode"] == mode]
        for stage in dict.fromkeys(row["stage"] for row in chosen):
            line = [row for row in chosen if row["stage"] == stage]
            axis.plot([r["gpus"] for r in line], [r["efficiency"] for r in line], "o-", label=f"ZeRO-{stage}", ms=3)
        counts = sorted({row["gpus"] for row in chosen})
        axis.set(xscale="log", ylim=(0, 1.05), xlabel="GPUs", title=f"{mode} scaling")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("speed per GPU, relative to one GPU")
    axes[0].legend()
    figure.suptitle(title)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    storage.write_bytes(uri, sink.getvalue())
