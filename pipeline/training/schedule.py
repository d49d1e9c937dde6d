"""The learning rate as a pure function of the step, without state."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate schedule. The paper uses 10,000 warm-up steps, then linear or cosine decay (table 3)."""

    kind: Literal["linear", "cosine", "rsqrt", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup: str = "10000steps"
    """Length of the linear warm-up: steps, epochs, examples or percent of the run."""
    end: float = 0.0
    """Final learning rate of linear and cosine. The code of the paper uses 1e-5 for linear decay."""
    cooldown: str = "0steps"
    """Length of the final linear decay to zero of rsqrt and constant: steps, epochs, examples or percent of the run."""
    timescale: int = 10_000
    """Time scale of rsqrt: steps after the warm-up until the rate is 1/sqrt(2) of the peak."""


def schedule_warning(config: ScheduleConfig, *, total: int, warmup: int, cooldown: int) -> str:
    """Why a run of `total` steps never trains with its peak learning rate, or ignores its cool-down; "" if it fits.

    warmup: steps as written, which may be more than `total`."""
    if cooldown and config.kind not in ("rsqrt", "constant"):
        return (
            f"schedule.cooldown {config.cooldown} has no effect, because schedule.kind {config.kind} ends at schedule.end by "
            "itself; leave it out, or use rsqrt or constant"
        )
    if warmup + cooldown <= total or not warmup + cooldown:
        return ""
    parts = [f"schedule.warmup {config.warmup} ({warmup} steps)"] if warmup else []
    parts += [f"schedule.cooldown {config.cooldown} ({cooldown} steps)"] if cooldown else []
    longer = "are together" if len(parts) > 1 else "is"
    return (
        f"{' and '.join(parts)} {longer} longer than the run of {total} steps, so its peak learning rate is never reached; "
        "give shorter ones (10% of the run: 10%), or more --steps"
    )


def learning_rate(
    config: ScheduleConfig, step: int, *, peak: float, total: int, warmup: int, cooldown: int = 0
) -> float:
    """Learning rate of step `step` (0-based) of `total`.

    Warm-up multiplies the decayed rate by step / warmup, and the decay starts at the end of warm-up (section 4.1). The
    first step of warm-up has rate 0. Both follow the reference code."""
    progress = min(max((step - warmup) / max(total - warmup, 1), 0.0), 1.0)
    if config.kind == "linear":
        rate = config.end + (peak - config.end) * (1 - progress)
    elif config.kind == "cosine":
        rate = config.end + (peak - config.end) * 0.5 * (1 + math.cos(math.pi * progress))
    elif config.kind == "rsqrt":
        rate = peak / math.sqrt(1 + max(step - warmup, 0) / config.timescale)
    else:
        rate = peak
    if config.kind in ("rsqrt", "constant") and cooldown:
        rate *= min(1.0, (total - step) / cooldown)
    return rate * min(1.0, step / warmup) if warmup else rate
