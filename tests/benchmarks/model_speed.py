"""Forward and backward pass of ViT compared with timm and Hugging Face: time and peak memory on this machine's CPU.

    python tests/benchmarks/model_speed.py                    S/16 and B/16, fp32 and bf16, batch 8, 224 px
    python tests/benchmarks/model_speed.py --threads 1 --variants S/16

Each library trains the same architecture with the same weights (class token, exact GELU, 1000 classes) on the same
images: forward, cross-entropy, backward, eager mode; the logits are compared first. For time the libraries take turns, step
by step in one process, so that a busy machine slows all of them alike: median, and the fastest step by the clock and in
processor seconds (which with --threads 1 hold up best under load). Memory is measured in fresh processes, the libraries
taking turns: growth of the resident set over the model with its gradients, median of --repeats. There glibc maps every block
of a megabyte apart and gives it back when it is freed; by default it moves that bound while it runs, and the resident set
then tells more of its habits than of the tensors.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
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
    """(model, function from images to logits), all three with the same weights."""
    import torch

    sys.path.insert(0, str(PROJECT))
    from models import create_model
    from models.weights import to_huggingface
    from pipeline.libraries import load_torchvision

    torch.manual_seed(0)
    ours = create_model(variant, CLASSES, gelu="exact", ln_eps=1e-6)
    torch.nn.init.normal_(ours.head.weight, std=0.02)
    if library == "ours":
        # a second model here too: what building the first leaves in the heap is reused, and would count as memory saved
        model = create_model(variant, CLASSES, gelu="exact", ln_eps=1e-6)
        model.load_state_dict(ours.state_dict())
        return model, model
    load_torchvision()
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


def prepare(library: str, variant: str, precision: str):
    """(step function that returns logits) of a model in training, gradients allocated."""
    import torch

    model, run = build(library, variant)
    model.train()
    x = torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    label = torch.arange(BATCH)
    for parameter in model.parameters():  # allocate gradients before the measurement, which then shows only activations
        parameter.grad = torch.zeros_like(parameter)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = run(x)
        torch.nn.functional.cross_entropy(logits.float(), label).backward()
        model.zero_grad(set_to_none=False)
        return logits.detach().float()

    return step


def measure_memory(library: str, variant: str, precision: str) -> float:
    """Megabytes that the process grows by, over model and gradients, at the peak of three steps."""
    step = prepare(library, variant, precision)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building the model left behind would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    base = memory("VmRSS")
    for _ in range(3):
        step()
    return (memory("VmHWM") - base) / 1024


def measure_time(variant: str, precision: str, steps: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step, the libraries taking turns in one process. Checks first that they compute the same."""
    runs = {library: prepare(library, variant, precision) for library in LIBRARIES}
    logits = {library: step() for library, step in runs.items()}  # also the warm-up
    for library in LIBRARIES[1:]:
        difference = (logits[library] - logits["ours"]).abs().max().item()
        assert difference < (1e-4 if precision == "fp32" else 0.05), f"{library} computes something else: {difference}"
    times: dict[str, dict[str, list[float]]] = {library: {"seconds": [], "cpu_seconds": []} for library in LIBRARIES}
    for turn in range(steps):
        for library in LIBRARIES[turn % 3 :] + LIBRARIES[: turn % 3]:
            start, cpu_start = time.perf_counter(), time.process_time()
            runs[library]()
            times[library]["cpu_seconds"].append(time.process_time() - cpu_start)
            times[library]["seconds"].append(time.perf_counter() - start)
    return times


def memory(field: str) -> int:
    """Kilobytes of this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each library")
    parser.add_argument("--repeats", type=int, default=5, help="processes that measure memory, of each library")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--variants", nargs="+", default=list(SHAPES))
    parser.add_argument("--output", type=Path, default=PROJECT / "tests/benchmarks/results/model_speed.json")
    parser.add_argument(
        "--case", nargs="+", help=argparse.SUPPRESS
    )  # variant, precision[, library]: one process's share
    options = parser.parse_args()
    if options.case:
        import torch

        torch.set_num_threads(options.threads)
        variant, precision, *library = options.case
        result = (
            measure_memory(*library, variant, precision) if library else measure_time(variant, precision, options.steps)
        )
        print(json.dumps(result))
        return

    def process(*case: str):
        arguments = ["--case", *case, "--steps", str(options.steps), "--threads", str(options.threads)]
        environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if len(case) == 3 else {})
        command = [sys.executable, __file__, *arguments]
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    results = []
    for variant in options.variants:
        for precision in ("fp32", "bf16"):
            times = process(variant, precision)
            grown: dict[str, list[float]] = {library: [] for library in LIBRARIES}
            for turn in range(options.repeats):
                for library in LIBRARIES[turn % 3 :] + LIBRARIES[: turn % 3]:
                    grown[library].append(process(variant, precision, library))
            row: dict = {"variant": variant, "precision": precision}
            for library in LIBRARIES:
                row[library] = {
                    "seconds": round(statistics.median(times[library]["seconds"]), 4),
                    "fastest": round(min(times[library]["seconds"]), 4),
                    "fastest_cpu": round(min(times[library]["cpu_seconds"]), 4),
                    "megabytes": round(statistics.median(grown[library]), 1),
                }
            for library in LIBRARIES[1:]:
                row[f"of_{library}"] = {k: round(row["ours"][k] / value, 3) for k, value in row[library].items()}
            row["megabytes_of_all"] = {library: [round(value, 1) for value in grown[library]] for library in LIBRARIES}
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
