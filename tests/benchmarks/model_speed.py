"""Forward and backward of ViT beside timm and Hugging Face: time and peak memory on this machine's CPU.

    python tests/benchmarks/model_speed.py                    S/16 and B/16, fp32 and bf16, batch 8, 224 px
    python tests/benchmarks/model_speed.py --repeats 9 --output tests/benchmarks/results/model_speed.json

Each library trains the same architecture with the same weights (class token, exact GELU, 1000 classes) on the same
images: forward, cross-entropy, backward, eager mode. Every case runs in a process of its own, since peak memory is the
process's; inside a round the libraries take turns, so that a busy machine slows all of them alike. Time is the median over
all steps, in seconds of the clock and of the processor (with --threads 1 the second holds up on a busy machine); memory is
the growth of the resident set over the model with its gradients. The logits are compared first.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

PROJECT = Path(__file__).parents[2]
LIBRARIES = ("ours", "timm", "huggingface")
SHAPES = {"S/16": ("vit_small_patch16_224", 384, 6, 1536), "B/16": ("vit_base_patch16_224", 768, 12, 3072)}
BATCH, SIZE, CLASSES = 8, 224, 1000


def build(library: str, variant: str):
    """(model, function from images to logits), all three with the weights of ours."""
    import torch

    sys.path.insert(0, str(PROJECT))
    from models import create_model
    from models.convert import to_huggingface

    torch.manual_seed(0)
    ours = create_model(variant, CLASSES, gelu="exact", ln_eps=1e-6)
    torch.nn.init.normal_(ours.head.weight, std=0.02)
    if library == "ours":
        return ours, ours
    if (
        not torch.cuda.is_available()
    ):  # torchvision's CUDA build beside a CPU torch lacks two operators that nobody calls
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        build.operators = operators
    name, width, heads, mlp = SHAPES[variant]
    if library == "timm":
        import timm

        model = timm.create_model(name, num_classes=CLASSES)
        model.load_state_dict(ours.state_dict())
        return model, model
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=mlp, num_labels=CLASSES, layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = ViTForImageClassification(config)
    weights, _, _ = to_huggingface(ours)
    old = {"encoder.layer": "layers", "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj", "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}  # fmt: skip
    for theirs, new in old.items():
        weights = {key.replace(theirs, new): tensor for key, tensor in weights.items()}
    model.load_state_dict(weights)
    return model, lambda x: model(x).logits


def measure(library: str, variant: str, precision: str, steps: int, threads: int) -> dict:
    """One process's share: seconds of each step, megabytes at the peak, the first logits."""
    import torch

    torch.set_num_threads(threads)
    model, run = build(library, variant)
    model.train()
    x = torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    label = torch.arange(BATCH)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = run(x)
        torch.nn.functional.cross_entropy(logits.float(), label).backward()
        model.zero_grad(set_to_none=False)
        return logits

    for parameter in model.parameters():  # gradients are there before the measurement: only activations count
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building the model left behind would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    base = memory("VmRSS")
    first = step().detach().float()[0, :5].tolist()
    seconds, cpu_seconds = [], []
    for _ in range(steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "megabytes": (memory("VmHWM") - base) / 1024,
        "logits": first,
    }


def memory(field: str) -> int:
    """Kilobytes of this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds over the libraries")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--variants", nargs="+", default=list(SHAPES))
    parser.add_argument("--output", type=Path, default=PROJECT / "tests/benchmarks/results/model_speed.json")
    parser.add_argument("--case", nargs=3, metavar=("LIBRARY", "VARIANT", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*options.case, options.steps, options.threads)))
        return
    results = []
    for variant in options.variants:
        for precision in ("fp32", "bf16"):
            runs: dict[str, list[dict]] = {library: [] for library in LIBRARIES}
            for turn in range(options.repeats):
                for library in LIBRARIES[turn % 3 :] + LIBRARIES[: turn % 3]:
                    case = [
                        "--case",
                        library,
                        variant,
                        precision,
                        "--steps",
                        options.steps,
                        "--threads",
                        options.threads,
                    ]
                    command = [sys.executable, __file__, *map(str, case)]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    runs[library].append(json.loads(done.stdout.splitlines()[-1]))
            tolerance = 1e-4 if precision == "fp32" else 0.05
            for library in LIBRARIES[1:]:
                pairs = zip(runs["ours"][0]["logits"], runs[library][0]["logits"], strict=True)
                assert all(abs(a - b) < tolerance for a, b in pairs), f"{library} computes something else"
            row: dict = {"variant": variant, "precision": precision}
            for library in LIBRARIES:
                steps = {key: [s for run in runs[library] for s in run[key]] for key in ("seconds", "cpu_seconds")}
                row[library] = {
                    "seconds": round(median(steps["seconds"]), 4),
                    "cpu_seconds": round(median(steps["cpu_seconds"]), 4),
                    "megabytes": round(median([run["megabytes"] for run in runs[library]])),
                }
            for library in LIBRARIES[1:]:
                row[f"of_{library}"] = {k: round(row["ours"][k] / value, 3) for k, value in row[library].items()}
            results.append(row)
            print(json.dumps(row), flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True
    ).stdout.strip()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "what": f"forward + backward, batch {BATCH}, {SIZE} px, eager, {options.threads} threads",
        "command": " ".join(["python", "tests/benchmarks/model_speed.py", *sys.argv[1:]]),
        "host": platform.processor() or platform.machine(),
        "versions": {package: version(package) for package in ("torch", "timm", "transformers")},
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
    }
    options.output.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
