"""Shared parts of the sections of gpu.py: results that are written at once, clocks, and the training step of
jobs/pretrain.py on one device."""

import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models import create_model
from models.cost import flops
from pipeline.hardware import peak_flops
from pipeline.training.config import EngineConfig, OptimizerConfig
from pipeline.training.engine import Engine, micro_losses

BATCH = {"S/16": 1024, "B/16": 512, "L/16": 256, "H/14": 128, "R50+B/16": 256}
CLASSES = 1000


@dataclass(kw_only=True)
class Bench:
    """One section's view of the run. tiny: toy sizes without compilation, to try the program itself on a CPU."""

    device: torch.device
    tiny: bool
    results: Path
    section: str = ""
    began: float = 0.0
    failures: int = 0
    rows: tuple[str, ...] = ("ours", "torch", "timm")

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def put(self, what: str, **row: Any) -> None:
        """One finding, on disk before this returns. A row with ok=False or an error counts as a failure of the section."""
        self.failures += row.get("ok") is False or "error" in row
        write_row(self.results, {"section": self.section, "t": round(time.time() - self.began, 1), "what": what, **row})

    @contextlib.contextmanager
    def attempt(self, what: str, **row: Any) -> Iterator[None]:
        """Records an exception as a row, so that the section continues. Frees the device memory afterwards."""
        try:
            yield
        except Exception as error:
            self.put(what, **row, error=f"{type(error).__name__}: {str(error)[:500]}")
        finally:
            gc.collect()
            torch._dynamo.reset()
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def shape(self, variant: str) -> tuple[str, int, int]:
        """(variant, batch, image side) of a measurement."""
        if self.tiny:
            return ("R+mu/16" if "+" in variant else "mu/16"), 4, 32
        return variant, BATCH[variant], 224

    def clock(self, step: Callable[[], object], steps: int = 4, repeats: int = 3, warm: int = 3) -> tuple[float, float]:
        """(median seconds of a step, seconds of the warm-up, which compiles)."""
        if self.tiny:
            steps = repeats = warm = 1
        start = time.perf_counter()
        for _ in range(warm):
            step()
        self.wait()
        warmed, times = time.perf_counter() - start, []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(steps):
                step()
            self.wait()
            times.append((time.perf_counter() - start) / steps)
        return statistics.median(times), warmed

    def kernel_seconds(self, function: Callable[[], object], ms: int = 60) -> float:
        """Seconds of a call that may be as short as one kernel."""
        if self.cuda:
            from triton.testing import do_bench

            return do_bench(function, warmup=15, rep=ms, return_mode="median") / 1e3
        function()
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def speed(self, options: dict[str, Any], batch: int, seconds: float, keep_rate: float = 1.0) -> dict[str, Any]:
        """img/s, and MFU by what is computed and by the architecture's own number (see train_step.py)."""
        rate = 3 * batch / seconds / peak_flops(self.device, "bf16") if self.cuda else 0.0
        return {
            "ms": round(1e3 * seconds, 2),
            "images_per_second": round(batch / seconds, 1),
            "mfu": round(flops(options, computed=True, patch_keep_rate=keep_rate) * rate, 4),
            "mfu_architecture": round(flops(options, patch_keep_rate=keep_rate) * rate, 4),
            "gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.cuda else None,
        }

    def engine(
        self, options: dict[str, Any], batch: int, *, micro: int | None = None, optimizer: OptimizerConfig | None = None,
        loss: str = "softmax", keep: int | None = None, **engine: Any,
    ) -> tuple[Callable[[], object], Engine]:  # fmt: skip
        """(training step on a batch that lies on the device, its engine). keep: patches of each image, cut; None: whole images."""
        torch.manual_seed(0)
        settings: dict[str, Any] = {"zero": 1, "precision": "bf16", "compile": not self.tiny, **engine}
        micro = micro or batch
        built = Engine(
            create_model(**options),
            optimizer or OptimizerConfig(lr=1e-3),
            EngineConfig(**settings),
            accumulation=batch // micro,
            micro_batch=micro,
            device=self.device,
        )
        data = self.batch(options, batch, keep)
        return (lambda: built.train_step(micro_losses(data, micro, self.device, loss), 1e-3)), built

    def batch(
        self, options: dict[str, Any], batch: int, keep: int | None = None, on_device: bool = True
    ) -> dict[str, Any]:
        """Random images (or `keep` random patches of each) and labels."""
        generator, side = torch.Generator().manual_seed(0), options["image_size"]
        data: dict[str, Any] = {
            "label": torch.randint(0, max(2, options["num_classes"]), (batch,), generator=generator)
        }
        if keep is None:
            data["image"] = torch.randint(0, 256, (batch, side, side, 3), generator=generator, dtype=torch.uint8)
        else:
            tokens = (side // 16) ** 2
            data["patches"] = torch.randint(0, 256, (batch, keep, 768), generator=generator, dtype=torch.uint8)
            data["positions"] = torch.rand(batch, tokens, generator=generator).argsort(1)[:, :keep].sort(1).values
        return {key: value.to(self.device) for key, value in data.items()} if on_device else data

    def step_row(
        self, what: str, options: dict[str, Any], batch: int, *, keep_rate: float = 1.0, **engine: Any
    ) -> None:
        """Measures one step of the engine and writes its row."""
        with self.attempt(what, variant=options["variant"], batch=batch):
            step, built = self.engine(options, batch, **engine)
            try:
                seconds, warmed = self.clock(step)
            finally:
                built.engine.destroy()  # its hooks hold the parameters and their fp32 copies
            about = {"variant": options["variant"], "batch": batch, "warm_up": round(warmed, 1)}
            self.put(what, **about, **self.speed(options, batch, seconds, keep_rate))


def model_options(variant: str, side: int, **more: Any) -> dict[str, Any]:
    return {"variant": variant, "num_classes": CLASSES, "image_size": side, **more}


def write_row(path: Path, row: dict[str, Any]) -> None:
    line = json.dumps(row, default=str)
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(line[:2000], flush=True)


def process_group(device: torch.device) -> None:
    """Initialises a group of this process only, once."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
