"""Compares the prediction of pipeline/operations/scaling.py with a real run: two processes on one core each, gloo, the
training engine.

    python tests/benchmarks/scaling.py            about a minute on two idle cores; writes results/scaling.json

The inputs are measured separately: the step of one worker alone while the other core computes the same (two cores share
caches and memory, which is not communication), and the bandwidth of one large all-reduce. What comes out is compared
with the real step.
The fastest of 30 steps counts: whatever else the machine does only adds to the others.
"""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

VARIANT, SIDE, BATCH, STEPS = "Ti/16", 112, 8, 30
PAYLOAD = 32 << 20  # bytes of the all-reduce that measures the link


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def worker(rank: int, world: int, port: int, stage: int, queue) -> None:
    """Puts (rank, seconds of a step, bytes per second of an all-reduce or 0) into the queue."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % os.cpu_count()]})
    own = rank if world == 1 else 0  # alone: a separate process group
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port + own), WORLD_SIZE=str(world), LOCAL_RANK="0")
    os.environ.update(RANK=str(rank if world > 1 else 0), DS_ACCELERATOR="cpu")
    import torch
    import torch.distributed as dist

    from models import create_model
    from pipeline.training.config import EngineConfig, OptimizerConfig
    from pipeline.training.engine import Engine

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", rank=rank if world > 1 else 0, world_size=world)
    bandwidth = 0.0
    if world > 1:
        payload = torch.zeros(PAYLOAD // 4)
        times = []
        for _ in range(8):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(payload)
            times.append(time.perf_counter() - start)
        bandwidth = 2 * PAYLOAD * (world - 1) / world / min(times)
    engine = Engine(
        create_model(VARIANT, num_classes=1000, image_size=SIDE),
        OptimizerConfig(),
        EngineConfig(zero=stage, precision="fp32"),
        accumulation=1,
        micro_batch=BATCH,
        device=torch.device("cpu"),
    )
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(1000, (BATCH,))
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        engine.train_step([lambda model: torch.nn.functional.cross_entropy(model(images), labels)], 1e-3)
        seconds.append(time.perf_counter() - start)
    queue.put((rank, min(seconds), bandwidth))


def measure(world: int, stage: int) -> tuple[float, float]:
    """(seconds of a step, bytes per second) of two concurrent processes, in one group or each alone."""
    import torch.multiprocessing as processes

    context = processes.get_context("spawn")
    queue, port = context.Queue(), free_port()
    started = [context.Process(target=worker, args=(rank, world, port, stage, queue)) for rank in range(2)]
    for process in started:
        process.start()
    answers = [queue.get(timeout=240) for _ in started]
    for process in started:
        process.join()
    return max(seconds for _, seconds, _ in answers), min(bandwidth for *_, bandwidth in answers)


def main() -> None:
    from models.cost import parameters
    from pipeline.operations.scaling import Link, sent_bytes, step_seconds

    count = parameters({"variant": VARIANT, "num_classes": 1000, "image_size": SIDE})
    rows = []
    for stage in (0, 1):
        computing, _ = measure(1, stage)
        measured, bandwidth = measure(2, stage)
        link = Link(inside=bandwidth, outside=bandwidth)
        predicted = step_seconds(computing, count, stage, 2, link, width=4)
        rows.append(
            {
                "stage": stage,
                "computing_seconds": computing,
                "bytes_sent": sent_bytes(count, stage, 2, width=4),
                "bytes_per_second": bandwidth,
                "predicted_seconds": predicted,
                "measured_seconds": measured,
                "error": predicted / measured - 1,
            }
        )
        print(
            f"ZeRO-{stage}: computing {computing * 1e3:.0f} ms, {bandwidth / 1e9:.2f} GB/s; a step of two workers: predicted "
            f"{predicted * 1e3:.0f} ms, measured {measured * 1e3:.0f} ms ({predicted / measured - 1:+.0%})"
        )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    result = {
        "what": f"{VARIANT} at {SIDE} px, float32, {BATCH} images per worker, two workers pinned to a core each, gloo",
        "date": date.today().isoformat(),
        "host": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "commit": commit,
        "rows": rows,
    }
    (Path(__file__).parent / "results" / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
