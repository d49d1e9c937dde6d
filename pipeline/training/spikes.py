"""Steps that must not reach the weights: loss spikes, and gradients that are not finite.

    guard = LossSpikeGuard(factor=3.0, window=64, stop_after=50, device=device, world=world, state=checkpoint's)
    loss = engine.train_step(micro_losses, lr, skip_step=guard.skip_step)
    warning = guard.count(step, engine.skipped)      # raises RuntimeError after too many skipped steps in a row

A spike is a loss of more than `factor` times the median of the last `window` losses. Gradients that are not finite are
found and dropped by the engine; the guard counts them. Its state is a few numbers in the checkpoint, so that a continued run
decides as the uninterrupted one.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


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
        self._counted = 0  # of this attempt's skipped steps
        # Places not yet filled are infinite: until half of the window is there, the median is, and nothing is a spike.
        losses = [math.inf] * window + list(state.get("losses", []))
        self._losses = torch.tensor(losses[-window:], dtype=torch.float32, device=device)
        self._loss = torch.zeros((), device=device)
        self._spike = torch.zeros((), dtype=torch.bool, device=device)

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
        self._spike = self._loss > self.factor * self._losses.median()
        usual = self._loss.isfinite() & ~self._spike
        self._losses = torch.where(usual, torch.cat([self._losses[1:], self._loss[None]]), self._losses)
        return self._spike

    @property
    def skipped(self) -> int:
        """Skipped steps of the whole run."""
        return self.spikes + self.nonfinite

    def count(self, step: int, skipped: int) -> str | None:
        """Counts step `step` (1-based) if it was skipped; a warning with the reason, or None when it was not skipped.

        skipped: steps that the engine has dropped in this attempt. Raises RuntimeError after `stop_after` in a row.
        """
        if skipped == self._counted:
            self.in_a_row = 0
            return None
        self._counted = skipped
        self.in_a_row += 1
        if self.factor is not None and bool(self._spike):
            self.spikes += 1
            reason = f"loss {float(self._loss):.4g} is more than {self.factor:g} x the median {float(self._losses.median()):.4g}"
        else:
            self.nonfinite += 1
            reason = "gradient not finite"
        if self.in_a_row >= self.stop_after:
            raise RuntimeError(
                f"{self.in_a_row} steps in a row were skipped; the last one, {step}, because of: {reason}. Lower optimizer.lr, "
                "use engine.precision bf16 or fp32, or look at the data; the last checkpoint is kept"
            )
        return f"step {step}: {reason}, step skipped ({self.skipped} so far)"

    def state(self) -> dict[str, Any]:
        """JSON values; float32 losses survive exactly."""
        losses = [] if self.factor is None else [x for x in self._losses.tolist() if math.isfinite(x)]
        return {"spikes": self.spikes, "nonfinite": self.nonfinite, "in_a_row": self.in_a_row, "losses": losses}
