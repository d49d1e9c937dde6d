"""Steps that must not reach the weights: loss spikes, and gradients that are not finite.

    guard = LossSpikeGuard(factor=3.0, window=64, stop_after=50, device=device, world=world, state=checkpoint's)
    loss = engine.train_step(micro_losses, lr, skip_step=guard.skip_step)
    guard.note(step, engine.dropped)                 # no wait for the device
    for step, warning in guard.read():               # raises RuntimeError after too many skipped steps in a row
        ...

A spike is a loss of more than `factor` times the median of the last `window` losses. Gradients that are not finite are
found and dropped by the engine; the guard counts them. Its state is a few numbers in the checkpoint, so that a continued run
decides as the uninterrupted one.

On a GPU the verdict on a step is read while the next step runs, so that the host never waits for the step in hand.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one step, on the host once `copied` has happened."""

    step: int
    values: Tensor
    """float32 (4,): dropped, spike, loss, median of the window."""
    copied: torch.cuda.Event | None


class LossSpikeGuard:
    """Decides which steps of a run are skipped, the same on every worker, and counts them."""

    def __init__(
        self,
        *,
        factor: float | None,
        window: int,
        stop_after: int,
        device: torch.device,
        world: int,
        state: dict[str, Any] | None = None,
    ):
        """factor None looks for no spikes. state: what `state()` returned when the checkpoint was made."""
        state = state or {}
        self.factor, self.window, self.stop_after, self.world = factor, window, stop_after, world
        self.spikes, self.nonfinite = int(state.get("spikes", 0)), int(state.get("nonfinite", 0))
        self.in_a_row = int(state.get("in_a_row", 0))
        self._verdicts: deque[Verdict] = deque()  # not yet read
        # Places not yet filled are infinite: until half of the window is there, the median is, and nothing is a spike.
        losses = [math.inf] * window + list(state.get("losses", []))
        self._losses = torch.tensor(losses[-window:], dtype=torch.float32, device=device)
        self._loss = torch.zeros((), device=device)
        self._spike = torch.zeros((), dtype=torch.bool, device=device)
        self._median = torch.zeros((), device=device)

    @property
    def skip_step(self) -> Callable[[Tensor], Tensor] | None:
        """What the engine asks before a step; None when spikes do not matter."""
        return self._is_spike if self.factor is not None else None

    def _is_spike(self, loss: Tensor) -> Tensor:
        """Whether a worker's mean loss belongs to a spike of the global batch: a bool scalar, without leaving the device."""
        self._loss = loss.clone()
        if self.world > 1:
            dist.all_reduce(self._loss)
            self._loss /= self.world
        assert self.factor is not None
        self._median = self._losses.median()
        self._spike = self._loss > self.factor * self._median
        usual = self._loss.isfinite() & ~self._spike
        self._losses = torch.where(usual, torch.cat([self._losses[1:], self._loss[None]]), self._losses)
        return self._spike

    @property
    def skipped(self) -> int:
        """Skipped steps of the whole run."""
        return self.spikes + self.nonfinite

    def note(self, step: int, dropped: Tensor) -> None:
        """Remembers whether step `step` (1-based) was dropped, a bool scalar on the device. Waits for nothing."""
        values = torch.stack([dropped.float(), self._spike.float(), self._loss, self._median])
        if values.device.type != "cuda":
            self._verdicts.append(Verdict(step, values, None))
            return
        values = values.to("cpu", non_blocking=True)  # pinned memory
        copied = torch.cuda.Event()
        copied.record()
        self._verdicts.append(Verdict(step, values, copied))

    def read(self, newest: bool = False) -> list[tuple[int, str]]:
        """(step, warning) of every step that was skipped among those noted and not yet read.

        On a GPU the newest step is left for the next call, unless `newest`: its verdict is still being computed.
        Raises RuntimeError after `stop_after` skipped steps in a row.
        """
        warnings = []
        while self._verdicts and (newest or self._verdicts[0].copied is None or len(self._verdicts) > 1):
            verdict = self._verdicts.popleft()
            if verdict.copied is not None:
                verdict.copied.synchronize()
            warning = self._count(verdict)
            if warning:
                warnings.append((verdict.step, warning))
        return warnings

    def _count(self, verdict: Verdict) -> str | None:
        dropped, spike, loss, median = verdict.values.tolist()
        if not dropped:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        if self.factor is not None and spike:
            self.spikes += 1
            reason = f"loss {loss:.4g} is more than {self.factor:g} x the median {median:.4g}"
        else:
            self.nonfinite += 1
            reason = "gradient not finite"
        if self.in_a_row >= self.stop_after:
            raise RuntimeError(
                f"{self.in_a_row} steps in a row were skipped; the last one, {verdict.step}, because of: {reason}. Lower "
                "optimizer.lr, use engine.precision bf16 or fp32, or look at the data; the last checkpoint is kept"
            )
        return f"step {verdict.step}: {reason}, step skipped ({self.skipped} so far)"

    def state(self) -> dict[str, Any]:
        """JSON values; float32 losses survive exactly. Read every verdict before."""
        losses = [] if self.factor is None else [x for x in self._losses.tolist() if math.isfinite(x)]
        return {"spikes": self.spikes, "nonfinite": self.nonfinite, "in_a_row": self.in_a_row, "losses": losses}
