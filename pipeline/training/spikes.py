"""Skips steps with loss spikes and counts steps with non-finite gradients.

    guard = LossSpikeGuard(factor=3.0, window=64, stop_after=50, device=device, world=world, state=checkpoint's)
    loss = engine.train_step(micro_losses, lr, skip_step=guard.skip_step)
    guard.note(step, engine.dropped)                 # no host synchronisation
    for step, warning in guard.read():               # raises RuntimeError after too many skipped steps in a row
        ...

A spike is a loss of more than `factor` times the median of the last `window` losses. The engine drops steps with
non-finite gradients, and the guard counts them. Checkpoints contain the state of the guard, so that a resumed run makes
the same decisions as an uninterrupted one.

On a GPU the result of a step is read during the next step, so that the host does not wait for the current step.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from pipeline.errors import plural


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a step. It is on the host after the event `copied`."""

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
        """factor: None disables spike detection. state: the value of `state()` in the checkpoint."""
        state = state or {}
        self.factor, self.window, self.stop_after, self.world = factor, window, stop_after, world
        self.spikes, self.nonfinite = int(state.get("spikes", 0)), int(state.get("nonfinite", 0))
        self.in_a_row = int(state.get("in_a_row", 0))
        self._verdicts: deque[Verdict] = deque()  # not yet read
        # Empty entries are infinite, so that there are no spikes until the window is half full.
        losses = [math.inf] * window + list(state.get("losses", []))
        self._losses = torch.tensor(losses[-window:], dtype=torch.float32, device=device)
        self._loss = torch.zeros((), device=device)
        self._spike = torch.zeros((), dtype=torch.bool, device=device)
        self._median = torch.zeros((), device=device)

    @property
    def skip_step(self) -> Callable[[Tensor], Tensor] | None:
        """The `skip_step` argument of `Engine.train_step`; None without spike detection."""
        return self._is_spike if self.factor is not None else None

    def _is_spike(self, loss: Tensor) -> Tensor:
        """Whether the loss of the global batch is a spike, as a bool scalar on the device. loss: this worker's mean
        loss."""
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
        """Number of skipped steps of the run."""
        return self.spikes + self.nonfinite

    def note(self, step: int, dropped: Tensor) -> None:
        """Records whether step `step` (1-based) was dropped, a bool scalar on the device. Does not synchronise."""
        values = torch.stack([dropped.float(), self._spike.float(), self._loss, self._median])
        if values.device.type != "cuda":
            self._verdicts.append(Verdict(step, values, None))
            return
        values = values.to("cpu", non_blocking=True)  # pinned memory
        copied = torch.cuda.Event()
        copied.record()
        self._verdicts.append(Verdict(step, values, copied))

    def read(self, newest: bool = False) -> list[tuple[int, str]]:
        """(step, warning) of every skipped step since the last call.

        On a GPU the newest step is left for the next call, unless `newest`, because it may still be running.
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
                f"skipped {plural(self.in_a_row, 'step')} in a row; reason of the last one, {verdict.step}: {reason}. Lower "
                "optimizer.lr, use engine.precision bf16 or fp32, or check the data; the last checkpoint is kept"
            )
        return f"step {verdict.step}: {reason}, step skipped ({self.skipped} so far)"

    def state(self) -> dict[str, Any]:
        """State as JSON values; float32 losses are exact. Call `read(newest=True)` first."""
        losses = [] if self.factor is None else [x for x in self._losses.tolist() if math.isfinite(x)]
        return {"spikes": self.spikes, "nonfinite": self.nonfinite, "in_a_row": self.in_a_row, "losses": losses}
