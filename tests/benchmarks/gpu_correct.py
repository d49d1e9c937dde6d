"""Sections of gpu.py that check whether a GPU computes the right numbers, and the same numbers every time."""

import contextlib
import copy
import hashlib
import os
import re
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from models import create_model
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.data.loading.upload import Upload
from pipeline.training import loop
from pipeline.training.config import EngineConfig, ModelConfig, OptimizerConfig, PretrainConfig, RuntimeConfig
from pipeline.training.engine import Engine, Worker, micro_losses
from pipeline.training.preemption import Preempted
from pipeline.training.schedule import ScheduleConfig
from pipeline.training.spikes import LossSpikeGuard
from pipeline.training.zero_layout import drop_nonfinite_gradients
from tests.benchmarks.gpu_parts import CLASSES, Bench, process_group
from tests.hostreads import HostReads

FP32, BF16 = 2e-4, 5e-2  # relative differences from float64 that pass in any case
STEPS = 24  # whose losses are compared


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float(
        (found.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm().clamp_min(1e-30)
    )


def correct(bench: Bench) -> None:
    """Logits and gradients of one batch in float32 and bf16 against float64 of the CPU; dropped patches.

    ReLUs and weight standardisation make the gradients of a ResNet sensitive to rounding: 2% off in float32 on a CPU. A model
    passes when the device is at most twice as far off as the CPU in the same precision, or within FP32 and BF16."""
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("B/16", {}, 224),
        ("H/14", {"depth": 4, "pool": "gap"}, 224),
        ("B/16", {"pool": "map", "posemb": "sincos2d", "qk_norm": True, "registers": 4, "depth": 4}, 224),
        ("R50+B/16", {"depth": 2}, 224),
        ("R50x1", {}, 224),
    ]
    if bench.tiny:
        cases = [("mu/16", {}, 32), ("R+mu/16", {}, 32)]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for variant, more, side in cases:
        with bench.attempt("against float64", variant=variant, options=more):
            torch.manual_seed(0)
            model = create_model(variant, CLASSES, side, **more).eval()
            torch.nn.init.normal_(model.head.weight, std=0.02)  # it starts as zero
            images = torch.randint(0, 256, (2 if bench.tiny else 4, side, side, 3), dtype=torch.uint8)
            row = _against_float64(bench, model, images)
            most = {"fp32": FP32, "bf16": BF16}
            ok = all(
                row[what] <= max(most[what[-4:]], 2 * row[f"cpu_{what}"]) for what in row if not what.startswith("cpu")
            )
            bench.put("against float64", variant=variant, options=more, ok=ok, **row)


def _against_float64(bench: Bench, model: Any, images: torch.Tensor) -> dict[str, float]:
    """Relative differences of logits, gradients and (`dropped`) logits of half of the patches, by precision and device."""
    labels = torch.arange(len(images)) % CLASSES
    drops, tokens = hasattr(model, "patch_embed") and model.shape.stem is None, getattr(model, "grid", 0) ** 2
    kept = torch.rand(len(images), tokens).argsort(1)[:, : max(1, tokens // 2)].sort(1).values if drops else None

    def outputs(device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        there = copy.deepcopy(model).to(device, dtype)
        logits = there(images.to(device))
        found = {"logits": logits.detach()}
        if dtype != torch.bfloat16:
            torch.nn.functional.cross_entropy(logits, labels.to(device)).backward()
            found["gradients"] = torch.cat([p.grad.flatten() for p in there.parameters() if p.grad is not None])
            if kept is not None:
                with torch.no_grad():
                    found["dropped"] = there(images.to(device), kept.to(device))
        return {key: value.cpu() for key, value in found.items()}

    cpu = torch.device("cpu")
    expected = outputs(cpu, torch.float64)
    row = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for prefix, device in (("", bench.device), ("cpu_", cpu)):
            found = outputs(device, dtype)
            row |= {f"{prefix}{key}_{name}": difference(value, expected[key]) for key, value in found.items()}
    return row


# ---------------------------------------------------------------- losses of a short training, by engine


def curves(bench: Bench) -> None:
    """The first losses of Ti/8 on an easy problem for each engine, against float32 of stage 0; steps of ZeRO 1 and 2 against
    DeepSpeed's own, bit for bit. After some 35 steps differences of the last bit have grown to 0.1, on a CPU, too."""
    process_group(bench.device)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 10, (256,), generator=generator)
    noise = torch.randint(0, 128, (256, 32, 32, 3), generator=generator)
    batch = {"image": (noise + 12 * labels[:, None, None, None]).to(torch.uint8), "label": labels}
    compiled = not bench.tiny
    engines: dict[str, tuple[dict[str, Any], float]] = {
        "fp32": ({"zero": 0, "precision": "fp32"}, 0.0),
        "fp32 ZeRO-1": ({"zero": 1, "precision": "fp32"}, 1e-3),
        "fp32 ZeRO-2, 8 micro-batches": ({"zero": 2, "precision": "fp32", "micro_batch": 32}, 1e-3),
        "fp32 recomputed": ({"zero": 1, "precision": "fp32", "activation_checkpointing": True}, 1e-3),
        "fp32 offload": ({"zero": 1, "precision": "fp32", "offload": True}, 1e-3),
        "fp32 compiled": ({"zero": 1, "precision": "fp32", "compile": compiled}, 1e-3),
        "tf32": ({"zero": 1, "precision": "fp32", "tf32": True}, BF16),
        "bf16 ZeRO-0": ({"zero": 0}, BF16),
        "bf16 ZeRO-1": ({"zero": 1}, BF16),
        "bf16 compiled": ({"zero": 1, "compile": compiled}, BF16),
        "bf16 CUDA graphs": ({"zero": 1, "compile": compiled, "compile_mode": "reduce-overhead"}, BF16),
        "bf16 overlap": ({"zero": 1, "overlap_comm": True}, BF16),
        "bf16 ZeRO-2, fp32 gradients": ({"zero": 2, "gradient_precision": "fp32"}, BF16),
        "bf16 products kept": (
            {"zero": 1, "compile": compiled, "activation_checkpointing": True, "checkpoint_keeps": "products"}, BF16,
        ),
        "fp16": ({"zero": 1, "precision": "fp16"}, BF16),
        "bf16 ZeRO-3": ({"zero": 3}, BF16),  # last: it replaces functions of torch for the whole process
    }  # fmt: skip
    if bench.tiny:
        del engines["bf16 ZeRO-3"]
    expected: list[float] = []
    for name, (settings, most) in engines.items():
        if settings.get("precision") == "fp16" and not bench.cuda:
            continue
        with bench.attempt("loss curve", engine=name):
            found = _curve(bench, batch, {"precision": "bf16", **settings})
            expected = expected or found
            differences = [abs(x - y) for x, y in zip(found, expected, strict=True)]
            off = max(differences)
            about = {"first": round(found[0], 4), "last": round(found[-1], 4), "largest_difference": off}
            about["after_8_steps"] = max(differences[:8])
            bench.put("loss curve", engine=name, ok=off <= most, **about)
        if settings == {"zero": 1, "precision": "fp32"} or settings == {"zero": 1}:
            with bench.attempt("steps of DeepSpeed", engine=name):
                ours, theirs = (
                    _curve(bench, batch, {"precision": "bf16", **settings}, own=own) for own in (True, False)
                )
                bench.put("steps of DeepSpeed", engine=name, ok=ours == theirs)


def _curve(bench: Bench, batch: dict[str, Any], settings: dict[str, Any], own: bool = True) -> list[float]:
    """own: with this project's optimiser step, not DeepSpeed's."""
    micro = settings.get("micro_batch") or 256
    torch.manual_seed(0)
    engine = Engine(
        create_model("mu/8" if bench.tiny else "Ti/8", 10, 32, depth=2),
        OptimizerConfig(lr=1e-3),
        EngineConfig(**settings),
        accumulation=256 // micro,
        micro_batch=micro,
        device=bench.device,
    )
    if not own:
        del engine.engine.optimizer.step
        engine.step_on_device = None
        drop_nonfinite_gradients(engine.engine.optimizer, engine.config.zero)
    losses = [
        engine.train_step(micro_losses(batch, micro, bench.device, "softmax"), 1e-3 * min(1.0, (step + 1) / 10))
        for step in range(2 if bench.tiny else STEPS)
    ]
    return torch.stack(losses).tolist()


# ---------------------------------------------------------------- waits of the host


def waits(bench: Bench) -> None:
    """Every moment of one training step, upload included, at which the host waits for the device; none is expected under ZeRO 0
    to 2. On a GPU torch's sync debug mode finds them, with their Python frames; on a CPU the operations are counted."""
    process_group(bench.device)
    variant, batch, side = bench.shape("B/16")
    options = {"variant": variant, "num_classes": CLASSES, "image_size": side}
    batch = min(batch, 64)
    for zero, precision in ((1, "bf16"), (0, "fp32"), (0, "bf16"), (2, "bf16"), (1, "fp32"), (3, "bf16")):
        if zero == 3 and bench.tiny:  # it replaces functions of torch for the whole process
            continue
        with bench.attempt("waits", zero=zero, precision=precision):
            step, engine = bench.engine(
                options, batch, zero=zero, precision=precision, compile=zero < 3 and not bench.tiny
            )
            step()
            step()
            bench.wait()
            guard = LossSpikeGuard(factor=3.0, window=8, stop_after=9, device=bench.device, world=1)
            upload, host = Upload(bench.device), bench.batch(options, batch, on_device=False)
            engine.train_step(micro_losses(upload(host), batch, bench.device, "softmax"), 1e-3, guard.skip_step)

            def one(
                engine: Engine = engine, guard: LossSpikeGuard = guard, upload: Upload = upload, host: Any = host
            ) -> None:
                engine.train_step(micro_losses(upload(host), batch, bench.device, "softmax"), 1e-3, guard.skip_step)
                guard.note(1, engine.dropped)

            found = _waits_on_gpu(one) if bench.cuda else _waits_on_cpu(one)
            bench.put("waits", zero=zero, precision=precision, ok=zero == 3 or not found, found=dict(found))


def _waits_on_cpu(function: Callable[[], None]) -> Counter[str]:
    with HostReads() as reads:
        function()
    return reads.counted


def _waits_on_gpu(function: Callable[[], None]) -> Counter[str]:
    found: Counter[str] = Counter()

    def note(message: Any, *rest: Any, **more: Any) -> None:
        if "called a synchronizing" in str(message):
            frames = [f for f in traceback.extract_stack()[:-1] if not re.search(r"/torch/|warnings\.py", f.filename)]
            found[" < ".join(f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in reversed(frames[-4:]))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


# ---------------------------------------------------------------- whole runs


def restore(bench: Bench) -> None:
    """`loop.train` from data to checkpoint: a whole run, and one that leaves at step 4 and continues. With deterministic kernels the
    weights are equal, bit for bit; without them the rows say whether they were."""
    process_group(bench.device)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder, contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        write_dataset(f"{folder}/data", _pictures(), classes=["red", "green", "blue"])
        cases: dict[str, dict[str, Any]] = {
            "ZeRO-1 bf16": {"zero": 1},
            "ZeRO-0 fp32": {"zero": 0, "precision": "fp32"},
            "hybrid": {"zero": 1, "variant": "R+mu/16"},
            "hybrid, compiled": {"zero": 1, "variant": "R+mu/16", "compile": True},
            "ZeRO-2 bf16, two micro-batches": {"zero": 2, "micro_batch": 16},
            "ZeRO-1 offload": {"zero": 1, "offload": True},
            "ZeRO-0 bf16": {"zero": 0},
            "ZeRO-1 fp16": {"zero": 1, "precision": "fp16"},
            "ZeRO-3 bf16": {"zero": 3},  # last: it replaces functions of torch for the whole process
        }
        if not bench.cuda:
            del cases["ZeRO-1 fp16"]
        if bench.tiny:
            _restored(bench, folder, "ZeRO-1 bf16", {"zero": 1}, deterministic=True)
            return
        _restored(bench, folder, "ZeRO-1 bf16, default kernels", {"zero": 1}, deterministic=False)
        for name, settings in cases.items():
            _restored(bench, folder, name, settings, deterministic=True)
        config = _run_config(bench, folder, "muon", {"zero": 1})
        with bench.attempt("muon"):
            result = _train(bench, replace(config, ema_decay=0.0, optimizer=OptimizerConfig(name="muon", lr=1e-3)))
            bench.put("muon", ok=result is not None, loss=result and result[1])


def _restored(bench: Bench, folder: str, name: str, settings: dict[str, Any], *, deterministic: bool) -> None:
    with bench.attempt("restore", case=name, deterministic=deterministic):
        place = f"{name}-{deterministic}".replace(" ", "-").replace(",", "")
        settings = {"deterministic": deterministic, **settings}
        whole = _train(bench, _run_config(bench, folder, f"{place}-whole", settings))
        again = _train(bench, _run_config(bench, folder, f"{place}-again", settings))
        parts = _run_config(bench, folder, f"{place}-parts", settings)
        left, resumed = _train(bench, parts, leave_at=4), _train(bench, parts)
        assert whole is not None
        assert again is not None
        assert resumed is not None
        same = {"same_again": whole[0] == again[0], "same_after_restore": whole[0] == resumed[0]}
        ok = left is None and (all(same.values()) or not deterministic)
        bench.put(
            "restore", case=name, deterministic=deterministic, ok=ok, **same, loss=[whole[1], again[1], resumed[1]]
        )


def _pictures() -> Iterator[tuple[str, bytes, int, int, int]]:
    """96 noisy pictures of three colours."""
    generator = np.random.default_rng(0)
    for i in range(96):
        picture = generator.integers(0, 90, (64, 64, 3), dtype=np.uint8)
        picture[:, :, i % 3] += 150
        yield f"{i:04d}", cv2.imencode(".jpg", picture)[1].tobytes(), i % 3, 64, 64


def _run_config(bench: Bench, folder: str, name: str, settings: dict[str, Any]) -> PretrainConfig:
    """settings: of the engine, and `variant`."""
    side = 32 if bench.tiny else 64
    variant = settings.get("variant", "mu/16" if bench.tiny else "Ti/8")
    settings = {key: value for key, value in settings.items() if key != "variant"}
    return PretrainConfig(
        steps="8steps",
        batch_size=32,
        image_size=side,
        model=ModelConfig(variant=variant, depth=2, dropout=0.1),
        augment=Augment(size=side),
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(warmup="2steps"),
        engine=EngineConfig(**{"precision": "bf16", **settings}),
        ema_decay=0.99,
        spike=3.0,
        spike_window=4,
        lanes=4,
        runtime=RuntimeConfig(
            data=f"{folder}/data", validation=f"{folder}/data", output=f"{folder}/{name}", gpus=bench.cuda, threads=2,
            log_every="1steps", validate_every="8steps", checkpoint_every="4steps", wait_warning=1.0,
        ),
    )  # fmt: skip


def _train(bench: Bench, config: PretrainConfig, leave_at: int | None = None) -> tuple[list[str], float] | None:
    """(checksums of the weights and of their moving average, last loss); None for a run that left at step `leave_at`."""
    steps = 0

    def is_preempted() -> bool:
        nonlocal steps
        steps += 1
        return leave_at is not None and steps >= leave_at

    try:
        result = loop.train(config, Worker(rank=0, world=1, device=bench.device), is_preempted=is_preempted)
    except Preempted:
        return None
    files = [Path(result["checkpoint"], name) for name in ("model.safetensors", "ema.safetensors")]
    return [hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files if file.exists()], result["loss_last"]
