"""Sections of gpu.py that measure the machine, training steps of this project and of others, the parts of a step, and
the effect of each option."""

import argparse
import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import create_model
from pipeline.data import Loader, open_dataset
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.data.loading.processes import ProcessLoader
from pipeline.data.loading.upload import Upload
from pipeline.data.patches import patchify
from pipeline.hardware import peak_flops
from pipeline.training.engine import micro_losses
from pipeline.transfer.finetune import Examples, Execution, FineTuning
from pipeline.transfer.protocols import FineTune, Split
from tests.benchmarks import train_step
from tests.benchmarks.gpu_parts import CLASSES, Bench, model_options, process_group

PACKAGES = (
    "torch",
    "triton",
    "deepspeed",
    "timm",
    "numpy",
    "opencv-python-headless",
    "simplejpeg",
    "pyarrow",
    "flash_attn",
)


def facts(bench: Bench) -> None:
    """Versions; what the card multiplies cold and hot; what it copies, and how fast the host feeds it."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    bench.put("versions", python=sys.version.split()[0], cores=len(os.sched_getaffinity(0)), **versions)
    n = 8192 if bench.cuda else 256
    a, b = (torch.randn(n, n, device=bench.device).to(torch.bfloat16) for _ in range(2))
    bench.put("matmul", n=n, tflops=round(2 * n**3 / bench.kernel_seconds(lambda: a @ b, 200) / 1e12, 3))
    if not bench.cuda:
        return
    about = torch.cuda.get_device_properties(0)
    sheet = peak_flops(bench.device)
    bench.put("card", name=about.name, gb=round(about.total_memory / 1e9, 1), sms=about.multi_processor_count,
              cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), nccl=torch.cuda.nccl.version(),
              sheet_tflops=round(sheet / 1e12, 1), ok=sheet != float("inf"))  # fmt: skip
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit,temperature.gpu", "--format=csv,noheader"]
    bench.put("clocks", text=subprocess.run(query, capture_output=True, text=True).stdout.strip())
    until = time.perf_counter() + 3
    while time.perf_counter() < until:  # hot, as in training
        for _ in range(20):
            a @ b
        bench.wait()
    bench.put("matmul, hot", n=n, tflops=round(2 * n**3 / bench.kernel_seconds(lambda: a @ b, 300) / 1e12, 1))
    x = torch.empty(1 << 30, dtype=torch.bfloat16, device=bench.device)
    bench.put("copy on the device", tb_per_s=round(2 * x.nbytes / bench.kernel_seconds(x.clone) / 1e12, 2))
    target = torch.empty(256 << 20, dtype=torch.uint8, device=bench.device)
    for kind in ("pinned", "pageable"):
        host = torch.ones(256 << 20, dtype=torch.uint8, pin_memory=kind == "pinned")
        rate = host.nbytes / bench.kernel_seconds(lambda host=host: target.copy_(host, non_blocking=True))
        bench.put("host to device", memory=kind, gb_per_s=round(rate / 1e9, 1))


# ---------------------------------------------------------------- steps of ours, plain PyTorch, timm


def step_rows(variant: str) -> Callable[[Bench], None]:
    """The section of one variant: a row each for ours, the same model without DeepSpeed, and timm's."""

    def rows(bench: Bench) -> None:
        process_group(bench.device)
        name, batch, side = bench.shape(variant)
        values: dict[str, Any] = {
            "device": bench.device.type,
            "size": side,
            "precision": "bf16",
            "micro": None,
            "zero": 1,
        }
        options = argparse.Namespace(**values, compile=not bench.tiny, recompute=False)
        for row in bench.rows:
            if row == "timm" and (not _installed("timm") or name not in train_step.TIMM):
                continue
            about = {"variant": name, "batch": batch, "row": row}
            with bench.attempt("step", **about):
                step = train_step.step_function(row, name, batch, options, 0)
                seconds, warmed = bench.clock(step)
                speed = bench.speed(model_options(name, side), batch, seconds)
                bench.put("step", **about, warm_up=round(warmed, 1), **speed)

    rows.__doc__ = f"Training steps of {variant}: ours, plain PyTorch, timm."
    return rows


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


# ---------------------------------------------------------------- where the time goes

KINDS = (
    ("NCCL", r"nccl"),
    ("attention", r"flash|fmha|sdpa|attention|cudnn_generated|softmax_warp"),
    ("optimiser", r"multi_tensor|adam|Adam"),
    ("matrix product", r"gemm|nvjet|cutlass|xmma|cublas|gemv|splitK|mm$"),
    ("copy", r"Memcpy|Memset|copy_kernel|copy_device|copy_$"),
    ("fused by the compiler", r"triton_"),
)
SPANS = re.compile(r"^(## Call|Torch-Compiled Region|Optimizer\.|ProfilerStep|nccl:|record_param|CompiledFunction)")


def profile(bench: Bench) -> None:
    """L/16: shares of a step by kind of kernel, its costliest kernels, idle gaps, and how far the host is ahead."""
    process_group(bench.device)
    variant, batch, side = bench.shape("L/16")
    step, _ = bench.engine(model_options(variant, side), batch)
    bench.clock(step, repeats=1)
    start = time.perf_counter()
    step()
    returned = time.perf_counter() - start
    bench.wait()
    done = time.perf_counter() - start
    bench.put("host", returns_after_ms=round(1e3 * returned, 1), done_after_ms=round(1e3 * done, 1))
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if bench.cuda else [])
    steps = 1 if bench.tiny else 2
    with torch.profiler.profile(activities=kinds) as found:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        bench.wait()
        wall = time.perf_counter() - start
    wanted = torch.autograd.DeviceType.CUDA if bench.cuda else torch.autograd.DeviceType.CPU
    events = [
        event
        for event in found.events()
        if event.device_type == wanted
        and not getattr(event, "is_user_annotation", False)
        and not SPANS.match(event.name)
    ]
    _profile_rows(bench, events, wall, steps)


def _profile_rows(bench: Bench, events: list[Any], wall: float, steps: int) -> None:
    by_kind: dict[str, float] = {}
    by_name: dict[str, list[float]] = {}
    for event in events:
        spent = event.time_range.elapsed_us()
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, event.name)), "other")
        by_kind[kind] = by_kind.get(kind, 0.0) + spent
        entry = by_name.setdefault(event.name[:160], [0.0, 0])
        entry[0] += spent
        entry[1] += 1
    total, busy, end = max(sum(by_kind.values()), 1.0), 0.0, 0.0
    ordered = sorted(events, key=lambda event: event.time_range.start)
    gaps = []
    for event in ordered:
        if end and event.time_range.start > end:
            gaps.append((round(event.time_range.start - end, 1), event.name[:70]))
        busy += max(0.0, event.time_range.end - max(event.time_range.start, end))
        end = max(end, event.time_range.end)
    shares = {kind: round(spent / total, 4) for kind, spent in sorted(by_kind.items(), key=lambda item: -item[1])}
    bench.put("kinds", wall_ms=round(1e3 * wall / steps, 2), busy=round(busy / 1e6 / wall, 4),
              kernels=len(events) // steps, shares=shares)  # fmt: skip
    top = sorted(by_name.items(), key=lambda item: -item[1][0])[:40]
    bench.put("costliest", top=[[name, round(us / steps / 1e3, 3), int(count) // steps] for name, (us, count) in top])
    bench.put("idle before", gaps_us=sorted(gaps, reverse=True)[:15])


# ---------------------------------------------------------------- levers


def attention(bench: Bench) -> None:
    """Each backend of scaled_dot_product_attention at the models' shapes: ms forward, ms with backward, TFLOP/s."""
    shapes = {
        "S/16": (1024, 6, 197, 64), "B/16": (512, 12, 197, 64), "L/16": (256, 16, 197, 64), "H/14": (128, 16, 257, 80),
        "L/16 without class token": (256, 16, 196, 64), "H/14 without class token": (128, 16, 256, 80),
        "L/16, half of the patches": (512, 16, 99, 64),
    }  # fmt: skip
    backends = (None, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    if not bench.cuda:
        shapes, backends = {"mu/16": (2, 2, 17, 16)}, (None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)
    for name, (batch, heads, tokens, size) in shapes.items():
        qkv = torch.randn(
            batch, tokens, 3 * heads * size, device=bench.device, dtype=torch.bfloat16, requires_grad=True
        )
        for backend in backends:
            label = "default" if backend is None else backend.name.removesuffix("_ATTENTION").lower()
            with bench.attempt("attention", shape=name, backend=label):

                def forward(qkv: Any = qkv, backend: Any = backend, heads: int = heads) -> torch.Tensor:
                    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
                    if backend is None:
                        return F.scaled_dot_product_attention(q, k, v)
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(q, k, v)

                slope = torch.randn_like(forward())

                def both(qkv: Any = qkv, forward: Any = forward, slope: Any = slope) -> None:
                    qkv.grad = None
                    forward().backward(slope)

                seconds = bench.kernel_seconds(both)
                work = 3.5 * 4 * batch * heads * tokens**2 * size
                row = {
                    "forward_ms": round(1e3 * bench.kernel_seconds(forward, 40), 3),
                    "both_ms": round(1e3 * seconds, 3),
                }
                bench.put("attention", shape=name, backend=label, **row, tflops=round(work / seconds / 1e12, 2))


def modes(bench: Bench) -> None:
    """Ways to compile: eager, by block, as a whole, CUDA graphs, autotuned; B/16, and S/16 with few images."""
    process_group(bench.device)
    compiled = not bench.tiny
    ways: dict[str, dict[str, Any]] = {
        "eager": {"compile": False},
        "by block": {"compile": compiled},
        "CUDA graphs": {"compile": compiled, "compile_mode": "reduce-overhead"},
        "as a whole": {"compile": compiled, "compile_scope": "model"},
        "as a whole, CUDA graphs": {"compile": compiled, "compile_scope": "model", "compile_mode": "reduce-overhead"},
        "autotuned": {"compile": compiled, "compile_mode": "max-autotune-no-cudagraphs"},
    }
    for what, way in ways.items():
        variant, batch, side = bench.shape("S/16")
        if what != "autotuned":
            bench.step_row(f"{what}, few images", model_options(variant, side), min(batch, 128), **way)
        variant, batch, side = bench.shape("B/16")
        bench.step_row(what, model_options(variant, side), batch, **way)


def levers(bench: Bench) -> None:
    """L/16: attention backends forced, other batches, micro-batches, overlap, fp32 gradients."""
    process_group(bench.device)
    variant, batch, side = bench.shape("L/16")
    options = model_options(variant, side)
    bench.step_row("as it is", options, batch)
    forced = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if bench.cuda else (SDPBackend.MATH,)
    for backend in forced:
        with sdpa_kernel(backend):
            bench.step_row(f"attention {backend.name}", options, batch)
    bench.step_row("four micro-batches", options, 4 * batch, micro=batch)
    bench.step_row("no class token", {**options, "pool": "gap"}, batch)
    bench.step_row("larger batch", options, batch + batch // 2)
    bench.step_row("overlap", options, batch, overlap_comm=True)
    bench.step_row("fp32 gradients", options, batch, zero=2, gradient_precision="fp32")
    bench.step_row("half of the batch", options, max(1, batch // 2))
    bench.step_row("no class token, larger batch", {**options, "pool": "gap"}, batch + batch // 2)


def compilers(bench: Bench) -> None:
    """L/16: other options of the compiler: other fusion and tuning of kernels, and the model as a whole."""
    process_group(bench.device)
    variant, batch, side = bench.shape("L/16")
    options = model_options(variant, side)
    asked: dict[str, dict[str, Any]] = {
        "sums in one kernel": {"split_reductions": False},
        "pointwise kernels tuned": {"max_autotune_pointwise": True},
        "kernels tuned": {"coordinate_descent_tuning": True},
    }
    for what, patch in asked.items():
        with bench.attempt(what), torch._inductor.config.patch(patch):
            bench.step_row(what, options, batch)
    bench.step_row("autotuned", options, batch, compile_mode="max-autotune-no-cudagraphs")
    bench.step_row("as a whole", options, batch, compile_scope="model")


def recompute(bench: Bench) -> None:
    """H/14 with recomputed activations: all, all but products, half of the blocks; ZeRO-3."""
    process_group(bench.device)
    variant, batch, side = bench.shape("H/14")
    options = model_options(variant, side)
    all_blocks: dict[str, Any] = {"activation_checkpointing": True}
    bench.step_row("recomputed", options, batch, **all_blocks)
    bench.step_row("products kept", options, batch, **all_blocks, checkpoint_keeps="products")
    bench.step_row("half of the blocks", options, batch, **all_blocks, checkpointed_blocks=1 if bench.tiny else 16)
    if not bench.tiny:  # it replaces functions of torch for the whole process
        bench.step_row("ZeRO-3", options, batch, zero=3, compile=False)


def convolutions(bench: Bench) -> None:
    """The hybrid R50+B/16 and its stem's levers: compiled or eager, algorithms timed or not."""
    process_group(bench.device)
    variant, batch, side = bench.shape("R50+B/16")
    options = model_options(variant, side)
    bench.step_row("compiled", options, batch)
    bench.step_row("eager", options, batch, compile=False)
    bench.step_row("compiled, deterministic", options, batch, deterministic=True)
    torch.use_deterministic_algorithms(False)


def objectives(bench: Bench) -> None:
    """B/16: masked patch prediction; half of the patches dropped, as the loader cuts them."""
    process_group(bench.device)
    variant, batch, side = bench.shape("B/16")
    masked = {"variant": variant, "num_classes": 0, "image_size": side, "mpp": "mean", "pool": "gap"}
    bench.step_row("masked patch prediction", masked, batch, loss="masked")
    keep = (side // 16) ** 2 // 2
    bench.step_row("half of the patches", model_options(variant, side), batch, keep=keep, keep_rate=0.5)


# ---------------------------------------------------------------- from the loader


def loader(bench: Bench) -> None:
    """Speed of loading JPEG and patches for several numbers of threads, and of B/16
    with the loader and with a fixed batch."""
    process_group(bench.device)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        _write_images(bench, folder)
        batch, side = (16, 32) if bench.tiny else (512, 224)
        strong = {"randaug_layers": 2, "randaug_magnitude": 10, "mixup": 0.2}
        for threads in (1,) if bench.tiny else (1, 4, 8, 14):
            _rate(bench, "JPEG", f"{folder}/jpeg", batch, threads, Augment(size=side))
        most = 1 if bench.tiny else 14
        several = 2 if bench.tiny else 8
        _rate(bench, "JPEG", f"{folder}/jpeg", batch, most, Augment(size=side), several)
        for processes in (1, several):
            augment = Augment(size=side, **strong)
            _rate(bench, "JPEG, RandAugment and mixup", f"{folder}/jpeg", batch, most, augment, processes)
        _rate(bench, "patches", f"{folder}/patches", batch, min(most, 4), None)
        variant = "mu/16" if bench.tiny else "B/16"
        options = model_options(variant, side)
        step, engine = bench.engine(options, batch)
        alone, _ = bench.clock(step)
        bench.put("one batch on the device", batch=batch, **bench.speed(options, batch, alone))
        for name, threads, processes in (("jpeg", most, 1), ("jpeg", most, several), ("patches", min(most, 4), 1)):
            augment = Augment(size=side) if name == "jpeg" else None
            stream = _batches(f"{folder}/{name}", batch, threads, augment, processes)
            with bench.attempt(f"training from {name}", threads=threads, processes=processes):
                row = _train_from(bench, engine, options, batch, stream, alone)
                bench.put(f"training from {name}", threads=threads, processes=processes, batch=batch, **row)


def _write_images(bench: Bench, folder: str) -> None:
    generator, count = np.random.default_rng(0), 64 if bench.tiny else 2048
    height, width, side = (48, 64, 32) if bench.tiny else (375, 500, 224)

    def picture() -> np.ndarray:
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        return cv2.add(image, generator.integers(0, 24, image.shape, dtype=np.uint8))

    def jpegs() -> Iterator[tuple[str, bytes, int, int, int]]:
        for i in range(count):
            content = cv2.imencode(".jpg", picture(), [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()
            yield f"{i:05d}", content, i % 10, height, width

    def patches() -> Iterator[tuple[str, np.ndarray, int, int, int]]:
        for i in range(count):
            yield f"{i:05d}", patchify(np.ascontiguousarray(picture()[:side, :side]), 16), i % 10, side, side

    classes = [str(i) for i in range(CLASSES)]
    write_dataset(f"{folder}/jpeg", jpegs(), classes=classes)
    shape = {"height": side, "width": side, "channels": 3, "patch_size": 16}
    write_dataset(f"{folder}/patches", patches(), classes=classes, encoding="patches", image=shape)


def _batches(
    uri: str, batch: int, threads: int, augment: Augment | None, processes: int = 1
) -> Iterator[dict[str, Any]]:
    options: dict[str, Any] = {
        "batch_size": batch,
        "threads": threads,
        "lanes": 8,
        "augment": augment,
        "drop_last": True,
    }
    data = open_dataset(uri)
    with Loader(data, **options) if processes == 1 else ProcessLoader(data, processes=processes, **options) as feed:
        while True:
            yield from feed


def _rate(
    bench: Bench, what: str, uri: str, batch: int, threads: int, augment: Augment | None, processes: int = 1
) -> None:
    with bench.attempt(what, threads=threads, processes=processes):
        stream = _batches(uri, batch, threads, augment, processes)
        for _ in range(1 if processes == 1 else 4):  # what the processes have prepared
            next(stream)
        start, images = time.perf_counter(), 0
        while time.perf_counter() < start + (0.2 if bench.tiny else 3):
            images += len(next(stream)["label"])
        seconds = time.perf_counter() - start
        stream.close()  # type: ignore[attr-defined]
        bench.put(what, threads=threads, processes=processes, images_per_second=round(images / seconds))


def _train_from(
    bench: Bench, engine: Any, options: dict[str, Any], batch: int, stream: Iterator[dict[str, Any]], alone: float
) -> dict[str, Any]:
    """Trains on batches of a loader. alone: seconds of a step with a batch on the device."""
    upload = Upload(bench.device)
    waited, begun, steps = [], [], 3 if bench.tiny else 24
    for step in range(steps + 1):
        if step % 8 == 0:
            bench.wait()
        begun.append(time.perf_counter())
        data = next(stream)
        waited.append(time.perf_counter() - begun[-1])
        engine.train_step(micro_losses(upload(data), batch, bench.device, "softmax"), 1e-3)
    bench.wait()
    first = steps // 3
    seconds = (time.perf_counter() - begun[first]) / (len(begun) - first)
    stream.close()  # type: ignore[attr-defined]
    share = statistics.mean(waited[first:]) / seconds
    row = {"wait_share": round(share, 3), "slower_than_resident": round(seconds / alone - 1, 3)}
    return {**row, **bench.speed(options, batch, seconds)}


def finetuning(bench: Bench) -> None:
    """Fine-tuning B/16 at 384 px: images on the device, and streamed from shards; eager and compiled."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        _write_images(bench, folder)
        torch.manual_seed(0)
        variant, side = ("mu/16", 32) if bench.tiny else ("B/16", 384)
        model: Any = create_model(variant, CLASSES, 32 if bench.tiny else 224)
        split = Split(uri=f"{folder}/jpeg")
        data = Examples(open_dataset(split.uri), split)
        execution = Execution(device=str(bench.device), micro_batch=64, threads=1 if bench.tiny else 14)
        for crop in ("random", "inception"):
            for compiled in (False, True):
                if compiled and bench.tiny:
                    continue
                what = f"{'resident' if crop == 'random' else 'streamed'}, {'compiled' if compiled else 'eager'}"
                with bench.attempt(what):
                    length = {"steps": 2, "batch_size": 8} if bench.tiny else {"steps": 30, "batch_size": 512}
                    protocol = FineTune(resolution=side, crop=crop, **length)
                    how = dataclasses.replace(execution, compile=compiled)
                    warm = dataclasses.replace(protocol, steps=2)
                    FineTuning(model, data, warm, lr=1e-3, seed=0, execution=how).run()  # compiles, allocates
                    tuned = FineTuning(model, data, protocol, lr=1e-3, seed=0, execution=how).run()
                    speed = bench.speed(model_options(variant, side), 1, 1 / tuned.images_per_second)
                    bench.put(what, loss=round(tuned.curve[-1][1], 4), **speed)
