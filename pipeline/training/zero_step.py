"""The optimiser's step of ZeRO 0 to 2 without a wait for the device.

    step = install_step(engine.optimizer, adamw, stage=1, clip=1.0)
    engine.step()                # DeepSpeed calls it where it would call its own
    step.norm, step.dropped      # scalars on the device

DeepSpeed reads back whether a gradient is finite and the gradient norm before it steps, so that the device idles until the host has
launched the rest: `has_overflow().item()` and two tests of the norm under ZeRO 1 and 2, one test for each parameter under
stage 0. Here both stay on the device. AdamW's fused kernel takes the flag (`found_inf`) and leaves weights, moments and
step count as they are. Everything else is DeepSpeed's arithmetic in DeepSpeed's order: in float32 the weights are equal to those of its own
step, bit for bit (tests/integration/test_host_free_step.py). The norm of a partition is one kernel over one flat tensor, accumulated in
float64 as DeepSpeed does.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from pipeline.training import zero_layout


class DeviceStep(ABC):
    """One optimiser step; whether it was taken is known on the device alone."""

    def __init__(self, adamw: torch.optim.AdamW, clip: float | None, device: torch.device):
        self.adamw, self.clip = adamw, clip
        self.norm = torch.zeros((), device=device)
        """Global gradient norm of the last step before clipping; infinite when a gradient was not finite."""
        self.dropped = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the last step left the weights alone because a gradient was not finite."""

    @abstractmethod
    def __call__(self) -> None:
        """Takes the gradients, clips them and steps."""

    def judge(self, norm: Tensor) -> None:
        """Sets `norm` and `dropped`, and tells AdamW. The norm is finite exactly if every gradient is (and their squares' sum)."""
        self.dropped = ~norm.isfinite()
        self.norm = torch.where(self.dropped, float("inf"), norm)
        self.adamw.found_inf = self.dropped.float()  # type: ignore[attr-defined]

    def clip_(self, gradients: list[Tensor]) -> None:
        """DeepSpeed's clipping: divides by (norm + 1e-6) / clip where that is more than 1."""
        if self.clip:
            torch._foreach_mul_(gradients, 1.0 / torch.clamp((self.norm + 1e-6) / self.clip, min=1.0))


class PartitionedStep(DeviceStep):
    """ZeRO 1 and 2: each worker steps its share of the float32 masters, then all gather the weights."""

    def __init__(self, optimizer: Any, adamw: torch.optim.AdamW, clip: float | None):
        self.partitions = zero_layout.Partitions(optimizer)
        super().__init__(adamw, clip, self.partitions.masters[0].device)

    def __call__(self) -> None:
        gradients = self.partitions.take_gradients()
        self.judge(self.global_norm(gradients))
        self.clip_(gradients)
        for master, gradient in zip(self.partitions.masters, gradients, strict=True):
            master.grad = gradient
        self.adamw.step()
        for master in self.partitions.masters:
            master.grad = None
        self.partitions.publish()

    def global_norm(self, gradients: list[Tensor]) -> Tensor:
        """Of all groups over all workers, float32."""
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64).pow(2).float() for g in gradients]
        for square in squares:
            dist.all_reduce(square, group=self.partitions.process_group)
        return torch.linalg.vector_norm(torch.stack(squares).sqrt())


class ReplicatedStep(DeviceStep):
    """Stage 0 in low precision: every worker steps all float32 masters with the reduced gradients."""

    def __init__(self, optimizer: Any, adamw: torch.optim.AdamW, clip: float | None):
        pairs = zero_layout.master_copies(optimizer)
        self.parameters, self.masters = [p for p, _ in pairs], [m for _, m in pairs]
        super().__init__(adamw, clip, self.masters[0].device)

    def __call__(self) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        gradients = [gradient.float() for gradient in gradients]
        self.judge(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        self.clip_(gradients)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self.adamw.step()
        for master in self.masters:
            master.grad = None
        torch._foreach_copy_([p.data for p in self.parameters], self.masters)


class PlainStep(DeviceStep):
    """Stage 0 in float32: the optimiser is AdamW itself, on the model's parameters. DeepSpeed steps; this clips before."""

    def __init__(self, module: nn.Module, adamw: torch.optim.AdamW, clip: float | None):
        self.parameters = list(module.parameters())
        super().__init__(adamw, clip, self.parameters[0].device)

    def __call__(self) -> None:
        self.judge(nn.utils.clip_grad_norm_(self.parameters, self.clip or float("inf")))


def install_step(optimizer: Any, module: nn.Module, adamw: torch.optim.AdamW, clip: float | None) -> DeviceStep:
    """The step for what DeepSpeed has made of `adamw` (ZeRO 0 to 2, without offload, not fp16), put in the place of its own.

    Stage 0 in float32 has no step to replace: the caller runs the result before DeepSpeed's.
    """
    if optimizer is adamw:
        return PlainStep(module, adamw, clip)
    kind = ReplicatedStep if hasattr(optimizer, "fp32_groups") else PartitionedStep
    step = kind(optimizer, adamw, clip)
    optimizer.step, optimizer.overflow = step, False
    return step
