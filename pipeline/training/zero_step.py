"""Optimiser steps for ZeRO 0 to 2 without host synchronisation.

    step = install_step(engine.optimizer, adamw, stage=1, clip=1.0)
    engine.step()                # DeepSpeed calls it instead of its own step
    step.norm, step.dropped      # scalars on the device

Before each step DeepSpeed copies the finiteness flag and the norm of the gradients to the host, and the device idles
until the host has launched the next kernels: `has_overflow().item()` and two tests of the norm under ZeRO 1 and 2, one
test per parameter under stage 0. Here both values stay on the device. The fused kernel of AdamW takes the flag
(`found_inf`) and leaves weights, moments and step count unchanged. All other arithmetic is the same as in DeepSpeed and
in the same order, so float32 weights are bit-identical (tests/integration/test_host_free_step.py). The norm of a
partition is one kernel over a flat tensor, accumulated in float64 as in DeepSpeed."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from pipeline.training import zero_layout


class DeviceStep(ABC):
    """An optimiser step. Only the device knows whether it was dropped."""

    def __init__(self, adamw: torch.optim.AdamW, clip: float | None, device: torch.device):
        self.adamw, self.clip = adamw, clip
        self.norm = torch.zeros((), device=device)
        """Global gradient norm of the last step before clipping; infinite when a gradient was not finite."""
        self.dropped = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the last step was dropped because a gradient was not finite."""

    @abstractmethod
    def __call__(self) -> None:
        """Clips the gradients and takes a step."""

    def judge(self, norm: Tensor) -> None:
        """Sets `norm`, `dropped` and AdamW's flag. The norm is finite only if all gradients and the sum of squares
        are."""
        self.dropped = ~norm.isfinite()
        self.norm = torch.where(self.dropped, float("inf"), norm)
        self.adamw.found_inf = self.dropped.float()  # type: ignore[attr-defined]

    def clip_(self, gradients: list[Tensor]) -> None:
        """Clipping as in DeepSpeed: divides by (norm + 1e-6) / clip if that is more than 1."""
        if self.clip:
            torch._foreach_mul_(gradients, 1.0 / torch.clamp((self.norm + 1e-6) / self.clip, min=1.0))


class PartitionedStep(DeviceStep):
    """ZeRO 1 and 2: each worker updates its partition of the float32 masters, then the weights are all-gathered."""

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
        """Norm over all groups and workers, float32."""
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64).pow(2).float() for g in gradients]
        for square in squares:
            dist.all_reduce(square, group=self.partitions.process_group)
        return torch.linalg.vector_norm(torch.stack(squares).sqrt())


class ReplicatedStep(DeviceStep):
    """Stage 0 in low precision: every worker updates all float32 masters with the reduced gradients."""

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
    """Stage 0 in float32: AdamW on the model's parameters. This clips the gradients, and DeepSpeed takes the step."""

    def __init__(self, module: nn.Module, adamw: torch.optim.AdamW, clip: float | None):
        self.parameters = list(module.parameters())
        super().__init__(adamw, clip, self.parameters[0].device)

    def __call__(self) -> None:
        self.judge(nn.utils.clip_grad_norm_(self.parameters, self.clip or float("inf")))


def install_step(optimizer: Any, module: nn.Module, adamw: torch.optim.AdamW, clip: float | None) -> DeviceStep:
    """Replaces the step of DeepSpeed's optimiser around `adamw` (ZeRO 0 to 2, without offload, not fp16).

    Stage 0 in float32 has no step to replace: the caller runs the returned step before DeepSpeed's.
    """
    if optimizer is adamw:
        return PlainStep(module, adamw, clip)
    kind = ReplicatedStep if hasattr(optimizer, "fp32_groups") else PartitionedStep
    step = kind(optimizer, adamw, clip)
    optimizer.step, optimizer.overflow = step, False
    return step
