"""Throughput metrics between log lines, and the text of a log line."""

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping

import torch

from pipeline import hardware
from pipeline.tracking import names
from pipeline.training.plan import TrainPlan


class Meter:
    """Metrics between log lines: images per second, fraction of time spent waiting for data, MFU, memory."""

    def __init__(self, device: torch.device, train_flops: int, world: int, precision: str):
        self.device, self.train_flops = device, train_flops
        self.peak = hardware.peak_flops(device, precision) * world
        self.machine = hardware.CpuShare(world) if device.type == "cpu" else None
        self.images, self.waited = 0, 0.0
        self.since = self.began = time.perf_counter()
        self.trained = 0.0  # seconds in steps until the last read
        self.rate = 0.0

    def wait(self, batches: Iterator[dict]) -> dict:
        """The next batch. The time until it arrives counts as data wait."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def paused(self) -> "Meter":
        """`with meter.paused():` excludes validation and snapshots from the training time."""
        return self

    def __enter__(self) -> None:
        self._paused = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.since += time.perf_counter() - self._paused

    def read(self) -> dict[str, float]:
        """Values since the last read."""
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        self.rate = self.images / seconds
        values = {
            names.IMAGES_PER_SECOND: self.rate,
            names.DATA_WAIT: min(self.waited / seconds, 1.0),
            names.MEMORY_GB: memory_gb(self.device),
        }
        # MFU is meaningless on CPUs that other processes also use, and unknown for an unknown GPU.
        if math.isfinite(self.peak) and (self.machine is None or self.machine.is_quiet()):
            mfu = self.rate * self.train_flops / self.peak
            if mfu <= 1 or self.machine is None:  # above, the peak of the CPU was measured beside other work
                values[names.MFU] = mfu
        self.trained += seconds - min(self.waited, seconds)
        self.images, self.waited, self.since = 0, 0.0, now
        return values

    def goodput(self) -> float:
        """Fraction of the time since creation that was spent in steps, not in data wait, validation or checkpoints."""
        return self.trained / max(time.perf_counter() - self.began, 1e-9)

    def remaining(self, images: float) -> float:
        """Estimated seconds for a number of images at the last rate."""
        return images / self.rate if self.rate else float("nan")


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def describe_scores(scores: dict[str, float]) -> str:
    """Validation scores as text: "top-1 97.54%  loss 0.1234"."""
    shown = {
        names.VAL_TOP1: "top-1 {:.2f}%",
        names.VAL_LOSS: "loss {:.4f}",
        names.FEWSHOT_TOP1: "few-shot top-1 {:.2f}%",
        names.FEWSHOT_SECONDS: "in {:.1f} s",
    }
    return "  ".join(text.format(scores[name]) for name, text in shown.items() if name in scores)


def mixture_metrics(seen: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    """Images and epochs so far of each data set of a mixture (`Loader.images_seen`), by the names of their metrics."""
    metrics: dict[str, float] = {}
    for name, (images, epochs) in seen.items():
        metrics |= {f"{names.MIXTURE_IMAGES}{name}": images, f"{names.MIXTURE_EPOCHS}{name}": epochs}
    return metrics


def describe_step(
    step: int,
    plan: TrainPlan,
    metrics: dict[str, float],
    seconds: float,
    seen: Mapping[str, tuple[int, float]] | None = None,
) -> list[str]:
    """The metrics of a logging step as text, most important first. seconds: the estimated remaining time. seen: images
    and epochs so far of each data set of a mixture."""
    minutes, rest = divmod(int(seconds) if seconds == seconds else 0, 60)
    hours, minutes = divmod(minutes, 60)
    eta = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
    return [
        f"step {step}/{plan.total}",
        f"loss {metrics[names.LOSS]:.4f}",
        f"{metrics[names.IMAGES_PER_SECOND]:.0f} img/s",
        *([f"replaced {metrics[names.REPLACED]:.0f}"] if metrics.get(names.REPLACED) else []),
        f"lr {metrics[names.LEARNING_RATE]:.2e}",
        f"grad {metrics[names.GRAD_NORM]:.3f}",
        f"wait {metrics[names.DATA_WAIT]:.1%}",
        f"epoch {step / plan.steps_per_epoch:.2f}",
        *(f"{name} {images:,} ({epochs:.2f} epochs)" for name, (images, epochs) in (seen or {}).items()),
        *([f"mfu {metrics[names.MFU]:.1%}"] if names.MFU in metrics else []),
        f"{metrics[names.MEMORY_GB]:.1f} GB",
        f"eta {eta}",
    ]
