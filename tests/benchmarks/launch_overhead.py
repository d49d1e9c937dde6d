"""Host time to launch one block: what a GPU waits for when a step has little to compute.

    python tests/benchmarks/launch_overhead.py

The training engine steps a model whose blocks compute next to nothing (4 patches, one image) on one thread, with one and with
four micro-batches. The difference is the time of a micro-batch, without the optimiser; divided by the number of blocks it is
what `jobs/plan.py` takes for launching. Launches on a GPU are asynchronous, but Python, PyTorch's dispatch and the engine's hooks
are the same. Writes tests/benchmarks/results/launch_overhead.json.
"""

import dataclasses
import json
import os
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT))

from models import create_model  # noqa: E402
from pipeline.training.config import EngineConfig, OptimizerConfig  # noqa: E402
from pipeline.training.engine import Engine, micro_losses  # noqa: E402

CPU = torch.device("cpu")
STEPS = 30


def step_seconds(depth: int, micro_batches: int, compile: bool) -> float:
    """CPU seconds of the fastest of some steps of bf16 and ZeRO-1."""
    model = create_model("Ti/16", num_classes=10, image_size=32, depth=depth)
    config = dataclasses.replace(EngineConfig(), zero=1, precision="bf16", compile=compile)
    engine = Engine(model, OptimizerConfig(), config, accumulation=micro_batches, micro_batch=1, device=CPU)
    images = torch.zeros(micro_batches, 32, 32, 3, dtype=torch.uint8)
    batch = {"image": images, "label": torch.zeros(micro_batches, dtype=torch.long)}
    fastest = float("inf")
    for _ in range(STEPS):
        start = time.process_time()
        engine.train_step(micro_losses(batch, 1, CPU, "softmax"), 1e-3)
        fastest = min(fastest, time.process_time() - start)
    return fastest


def main() -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29617"))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    rows = []
    for compile in (False, True):
        one, four = (step_seconds(12, count, compile) for count in (1, 4))
        rows.append({"compile": compile, "blocks": 12, "step_ms": 1e3 * one, "block_ms": 1e3 * (four - one) / 3 / 12})
        print(rows[-1], flush=True)
    result = {
        "command": "python tests/benchmarks/launch_overhead.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "load_average": os.getloadavg()[0],
        "results": rows,
    }
    (PROJECT / "tests/benchmarks/results/launch_overhead.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
