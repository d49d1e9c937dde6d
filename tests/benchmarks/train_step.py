"""The training step of jobs/pretrain.py without Ray and data loading, compared with plain PyTorch and timm.

    python tests/benchmarks/train_step.py                                   this machine's CPU: S/16, float32
    python tests/benchmarks/train_step.py --device cuda                     one GPU: S/16 B/16 L/16 H/14, bf16
    python tests/benchmarks/train_step.py --device cuda --variants L/16 --batch 256 --rows ours --recompute

Rows, on the same batch of random uint8 images that lie on the device (on a GPU in a process each, on a CPU taking turns in
one, so that other load slows them alike: compare `fastest_cpu`, processor seconds, when the machine is not idle):

    ours      pipeline.training.engine: DeepSpeed ZeRO-1, float32 master weights, torch.compile by block
    torch     the same model, torch.compile as a whole, fused AdamW, autocast to bf16 on a GPU
    timm      timm's model trained the same way as `torch`
    two       ours on two workers, half of the batch each, one core each (CPU only; `one` is ours on one core)

Clipping at norm 1 everywhere. FLOPs are 2 x multiply-accumulates of one forward pass times 3 (forward and backward), of
matrix products, convolutions and attention only, without anything that is computed twice; `mfu` counts what our model
really computes (its last block answers the class token alone), `mfu_architecture` the architecture's own number, as papers
do. Both relate to the dense bf16 peak of the GPU's data sheet; on a CPU, to the rate of large matrix products of the same
precision, measured in the same process. Needs torch, deepspeed, simplejpeg, OpenCV and this project's files; `timm` for its row.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT))

TIMM = {
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
    "H/14": "vit_huge_patch14_224",
}
BATCH = {"cpu": {"S/16": 16, "B/16": 8}, "cuda": {"S/16": 1024, "B/16": 512, "L/16": 256, "H/14": 128}}
CLASSES, SIZE = 1000, 224
# The environment that pipeline.training.launch gives its workers, here for every row: freed activations stay in the
# heap.
HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


@functools.cache
def missing_operators():
    """With a CPU build of torch, torchvision's CUDA build lacks two operators, which timm imports but does not call."""
    import torch

    if torch.cuda.is_available():
        return None
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators  # they live as long as this object, which the cache keeps


def step_function(
    row: str, variant: str, batch_size: int, options: argparse.Namespace, rank: int
) -> Callable[[], None]:
    """One training step with `batch_size` images on this worker."""
    import torch

    from models import create_model

    device, size = torch.device(options.device), options.size
    generator = torch.Generator().manual_seed(rank)
    images = torch.randint(0, 256, (batch_size, size, size, 3), generator=generator, dtype=torch.uint8).to(device)
    labels = torch.randint(0, CLASSES, (batch_size,), generator=generator).to(device)
    torch.manual_seed(0)
    if row in ("ours", "one", "two"):
        from pipeline.training.config import EngineConfig, OptimizerConfig
        from pipeline.training.engine import Engine, micro_losses

        micro = min(options.micro or batch_size, batch_size)
        engine = Engine(
            create_model(variant, CLASSES, size),
            OptimizerConfig(lr=1e-3, clip=1.0),
            EngineConfig(
                zero=options.zero,
                precision=options.precision,
                compile=options.compile,
                activation_checkpointing=options.recompute,
            ),
            accumulation=batch_size // micro,
            micro_batch=micro,
            device=device,
        )
        batch = {"image": images, "label": labels}
        return lambda: engine.train_step(micro_losses(batch, micro, device, "softmax"), 1e-3)

    if row == "timm":
        missing_operators()
        import timm

        model = timm.create_model(TIMM[variant], num_classes=CLASSES, img_size=size).to(device).train()
        images = (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
    else:
        model = create_model(variant, CLASSES, size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    run = torch.compile(model) if options.compile else model

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            logits = run(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(rows: list[str], variant: str, options: argparse.Namespace) -> list[dict]:
    """The rows' numbers, the rows taking turns step by step, so that a busy machine slows all of them alike."""
    import torch

    from models.cost import flops
    from pipeline.hardware import peak_flops
    from pipeline.training.meter import memory_gb

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(options.device)
    if device.type == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        if rows[0] in ("one", "two"):  # one core each
            os.sched_setaffinity(0, {cores[rank % len(cores)]})
            cores = cores[:1]
        torch.set_num_threads(min(options.threads or len(cores), len(cores)))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo" if device.type == "cpu" else "nccl", rank=rank, world_size=world)
    total = options.batch or BATCH[device.type].get(variant, 64)
    peak = peak_flops(device, options.precision) * world

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    steps, warm_up = {}, {}
    for row in rows:
        start = time.perf_counter()
        steps[row] = step_function(row, variant, total // world, options, rank)
        for _ in range(2):  # compiles, allocates, makes the optimiser's states
            steps[row]()
        wait()
        warm_up[row] = time.perf_counter() - start
    clock: dict[str, list[float]] = {row: [] for row in rows}
    processor: dict[str, list[float]] = {row: [] for row in rows}
    for turn in range(options.repeats):
        shift = turn % len(rows)
        for row in rows[shift:] + rows[:shift]:
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(options.steps):
                steps[row]()
            wait()
            clock[row].append((time.perf_counter() - start) / options.steps)
            processor[row].append((time.process_time() - cpu_start) / options.steps)
    model = {"variant": variant, "num_classes": CLASSES, "image_size": options.size}
    results = []
    for row in rows:
        median = statistics.median(clock[row])
        rate = 3 * total / median / peak
        results.append(
            {
                "variant": variant,
                "row": row,
                "batch": total,
                "seconds": round(median, 4),
                "fastest": round(min(clock[row]), 4),
                "fastest_cpu": round(min(processor[row]), 4),
                "images_per_second": round(total / median, 1),
                "mfu": round(flops(model, computed=row != "timm") * rate, 4),
                "mfu_architecture": round(flops(model) * rate, 4),
                "memory_gb": round(memory_gb(device), 2),
                "peak_tflops": round(peak / 1e12, 3),
                "warm_up_seconds": round(warm_up[row], 1),
            }
        )
    return results


def measure_in_processes(rows: list[str], variant: str, arguments: list[str]) -> list[dict]:
    """The rows' numbers from a fresh process (row "two": from two); "error" when it failed."""
    world = 2 if rows == ["two"] else 1
    command = [sys.executable, __file__, *arguments, "--case", ",".join(rows), variant]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **HEAP, "RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            return [{"variant": variant, "row": row, "error": errors.strip()[-600:]} for row in rows]
    return json.loads(outputs[0][0].strip().splitlines()[-1])


def rows_of(variant: str, options: argparse.Namespace) -> list[dict]:
    """All rows of a variant. On a GPU a process each; on a CPU one for times, and one each for the peak of memory."""
    gpu, arguments = options.device == "cuda", sys.argv[1:]
    wanted = options.rows or (["ours", "torch", "timm"] if gpu else ["ours", "torch", "timm", "one", "two"])
    together = [] if gpu else [row for row in wanted if row not in ("one", "two")]
    results = measure_in_processes(together, variant, arguments) if together else []
    for result in results:
        (alone,) = measure_in_processes([result["row"]], variant, [*arguments, "--steps", "1", "--repeats", "1"])
        result["memory_gb"] = alone.get("memory_gb")
    for row in wanted:
        if row not in together:
            results += measure_in_processes([row], variant, arguments)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variants", nargs="+", help="default: S/16 on a CPU, S/16 B/16 L/16 H/14 on a GPU")
    parser.add_argument("--rows", nargs="+", help="ours torch timm, and on a CPU one two")
    parser.add_argument("--batch", type=int, help="images per step; default by variant")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the images in pixels")
    parser.add_argument("--micro", type=int, help="of ours: images per forward pass")
    parser.add_argument("--steps", type=int, default=1, help="per turn")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of rows ours, torch and timm on a CPU; default: all cores")
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing, of ours")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # rows, variant: one process's share
    options = parser.parse_args()
    gpu = options.device == "cuda"
    options.precision = options.precision or ("bf16" if gpu else "fp32")
    if options.case:
        rows, variant = options.case
        print(json.dumps(measure(rows.split(","), variant, options)))
        return
    results = []
    for variant in options.variants or (list(TIMM) if gpu else ["S/16"]):
        for result in rows_of(variant, options):
            results.append(result)
            print(json.dumps(result), flush=True)
    output = options.output or PROJECT / f"tests/benchmarks/results/train_step_{options.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**about(options), "results": results}, indent=1) + "\n")


def about(options: argparse.Namespace) -> dict:
    """Host, versions and commit."""
    import torch

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
    return {
        "what": f"one training step, {options.size} px, {options.precision}, compile {options.compile}, ZeRO-{options.zero}",
        "command": " ".join(["python", "tests/benchmarks/train_step.py", *sys.argv[1:]]),
        "host": torch.cuda.get_device_name()
        if options.device == "cuda"
        else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {package: installed(package) for package in ("torch", "deepspeed", "timm")},
        "commit": head.stdout.strip() or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
