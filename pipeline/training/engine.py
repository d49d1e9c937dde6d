"""The DeepSpeed engine of one worker, with its state as slices that can be loaded on any number of workers.

`Engine` wraps a model for ZeRO 0-3. `zero_layout` finds the parameter slices that the optimiser of this worker owns. A
checkpoint is a set of named slices: it is written without communication and can be read on another number of workers or
with another ZeRO stage (each worker reads the slices that it owns)."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from models import weight_decay_groups
from models.losses import training_loss
from pipeline.data.loading.upload import Upload
from pipeline.training import zero_layout
from pipeline.training.config import EngineConfig, OptimizerConfig
from pipeline.training.kernels import choose_kernels, compile_model
from pipeline.training.zero_step import DeviceStep, PlainStep, install_step

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """Rank, world size and device of a worker. With world > 1 a process group is initialised."""

    rank: int
    world: int
    device: torch.device


class Engine:
    """One model under DeepSpeed.

    `train_step` takes the worker's share of one global batch. The caller passes the learning rate of each step, so the
    schedule has no state to save.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        *,
        accumulation: int,
        micro_batch: int,
        device: torch.device,
        ema_decay: float = 0.0,
    ):
        import deepspeed

        if device.type == "cpu":
            zero_layout.without_compiled_collectives()
        choose_kernels(model, config, device)
        if config.activation_checkpointing:
            keeps_products = config.checkpoint_keeps == "products"
            cast(Any, model).set_grad_checkpointing(True, config.checkpointed_blocks, keeps_products)
        inner = make_optimizer(model, optimizer)
        self.engine, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=inner,
            config=deepspeed_config(optimizer, config, accumulation, micro_batch),
        )
        if config.compile:
            compile_model(self.engine.module, config)
        self.inner = inner
        self.device = device
        self.upload = Upload(device)
        self.config = config
        self.accumulation = accumulation
        self.clip = _clip(optimizer)
        inner.state.clear()  # stage 0 in bf16 takes a step to create its states; Adam's step count would be off by one
        self.step_on_device: DeviceStep | None = None
        if (
            isinstance(inner, torch.optim.AdamW)
            and config.zero < 3
            and config.precision != "fp16"
            and not config.offload
        ):
            self.step_on_device = install_step(self.engine.optimizer, self.module, inner, self.clip)
        else:
            zero_layout.drop_nonfinite_gradients(self.engine.optimizer, config.zero)
        self.dropped = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the last step was dropped because of non-finite gradients on any worker."""
        self._plain_norm: Tensor | None = None
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._fragments = list(zero_layout.find_fragments(self.engine.optimizer, self.module, config.zero, rank))
        parameters = model.named_parameters()
        self._muon = {name for name, p in parameters if optimizer.name == "muon" and cast(Any, p).use_muon}
        self._momentum: dict[str, tuple[Tensor, int, int]] = {}
        if self._muon and config.zero in (1, 2):
            self._momentum = dict(zero_layout.find_muon_momentum(self.engine.optimizer, self.module))
        self.ema_decay = ema_decay
        self.ema = {id(flat): flat.detach().clone() for flat in self._flats()} if ema_decay else {}

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def train_step(
        self,
        micro_losses: Iterable[Callable[[nn.Module], Tensor]],
        lr: float,
        skip_step: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """One optimiser step over `accumulation` micro-batches.

        micro_losses: one function per micro-batch that maps the model to its mean loss. skip_step: maps this worker's
        mean loss to a bool scalar, the same on all workers, that is true if the weights must not change. Returns this
        worker's mean loss, a detached scalar on the device. With `step_on_device` (AdamW, ZeRO 0 to 2, no offload, not
        fp16) there is no host synchronisation; otherwise DeepSpeed's step synchronises."""
        skipped_before = self.engine.skipped_steps
        for group in self.inner.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        total = torch.zeros((), device=self.device)
        for count, micro_loss in enumerate(micro_losses, start=1):
            loss = micro_loss(self.engine)
            total += loss.detach().float()
            if skip_step is not None and count == self.accumulation:
                # NaN gradients make every ZeRO stage drop the step, without a host synchronisation.
                loss = loss * torch.where(skip_step(total / self.accumulation), float("nan"), 1.0)
            self.engine.backward(loss)
            if count == self.accumulation:
                self._before_plain_step()
            self.engine.step()
        if self.step_on_device is not None:
            self.dropped = self.step_on_device.dropped
        elif self._plain_norm is None:
            self.dropped = torch.full_like(self.dropped, self.engine.skipped_steps > skipped_before)
        if self.ema_decay:
            self._update_ema()
        return total / self.accumulation

    @property
    def loss_scale(self) -> dict[str, float]:
        """State of the dynamic loss scale for checkpoints; empty without loss scaling."""
        return zero_layout.loss_scale(self.engine.optimizer)

    @loss_scale.setter
    def loss_scale(self, state: Mapping[str, float]) -> None:
        zero_layout.set_loss_scale(self.engine.optimizer, state)

    def _before_plain_step(self) -> None:
        """Clips gradients and drops non-finite ones. Stage 0 in float32 is a plain optimiser without this. All workers
        have the same reduced gradients; the step skips parameters without a gradient."""
        if self.engine.optimizer is not self.inner:
            return
        if isinstance(self.step_on_device, PlainStep):
            self.step_on_device()
            return
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        self._plain_norm = nn.utils.clip_grad_norm_(parameters, self.clip or float("inf"))
        self.dropped = ~self._plain_norm.isfinite()
        if self.dropped:  # SGD and Muon have no kernel that accepts the flag: this synchronises
            for parameter in parameters:
                parameter.grad = None

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping. Synchronises with the device."""
        if self.step_on_device is not None:
            return float(self.step_on_device.norm)
        norm = self.engine.get_global_grad_norm() if self._plain_norm is None else self._plain_norm
        return float(norm) if norm is not None else float("nan")

    @torch.no_grad()
    def _update_ema(self) -> None:
        for flat in self._flats():
            self.ema[id(flat)].lerp_(flat, 1 - self.ema_decay)

    # ------------------------------------------------------------ state, as named slices

    def _flats(self) -> list[Tensor]:
        return list({id(fragment.flat): fragment.flat for fragment in self._fragments}.values())

    def snapshot(self) -> dict[str, Tensor]:
        """A host copy of this worker's part of the training state: {"kind:parameter:start": 1-D float32 slice}.

        Kinds: "param" (float32 master), the optimiser's states ("exp_avg", ...), "ema". Copies: training may go on
        while they are written. What every worker holds alike (stage 0) is divided among them so that it is written
        once."""
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if world > 1 else 0
        replicated = self.config.zero == 0
        tensors: dict[str, Tensor] = {}
        for index, fragment in enumerate(self._fragments):
            if replicated and index % world != rank:
                continue
            kinds = {"param": fragment.flat, **_tensor_states(self.inner, fragment.flat)}
            if self.ema_decay:
                kinds["ema"] = self.ema[id(fragment.flat)]
            window = slice(fragment.offset, fragment.offset + fragment.numel)
            parts = {kind: flat.detach().reshape(-1)[window] for kind, flat in kinds.items()}
            if fragment.name in self._momentum and "momentum_buffer" in self.inner.state[fragment.flat]:
                flat, offset, _ = self._momentum[fragment.name]
                whole = self.inner.state[flat]["momentum_buffer"]
                parts["momentum_buffer"] = whole[offset + fragment.start : offset + fragment.start + fragment.numel]
            for kind, part in parts.items():
                tensors[f"{kind}:{fragment.name}:{fragment.start}"] = part.to("cpu", torch.float32, copy=True)
        return tensors

    @torch.no_grad()
    def restore(self, read: Callable[[str, str, int, int], Tensor], kinds: set[str], taken: int) -> None:
        """Loads this worker's slices. `read(kind, name, start, numel)` returns a 1-D float32 tensor; `kinds` are
        stored.

        taken: number of optimiser steps so far. The model must already have the weights of the checkpoint, because
        low-precision copies are made from them.
        """
        muon = {id(fragment.flat) for fragment in self._fragments if fragment.name in self._muon}

        def states(flat: Tensor) -> set[str]:
            """The stored optimiser states of this partition."""
            every = kinds - {"param", "ema"}
            if not muon:
                return every
            return every & ({"momentum_buffer"} if id(flat) in muon else {"exp_avg", "exp_avg_sq"})

        for flat in self._flats():
            state = self.inner.state[flat]
            for kind in states(flat):
                state[kind] = torch.zeros_like(flat, requires_grad=False)
            if (
                "exp_avg" in state
            ):  # step count of Adam's bias correction: a float tensor in torch, an int in Muon's Adam
                fused = self.inner.param_groups[0].get("fused")
                count = torch.tensor(float(taken), device=flat.device if fused else "cpu")
                state["step"] = taken if muon else count
        for flat in {id(flat): flat for flat, _, _ in self._momentum.values()}.values():
            sizes = [numel for other, _, numel in self._momentum.values() if other is flat]
            self.inner.state[flat]["momentum_buffer"] = torch.zeros(sum(sizes), device=flat.device)
        for name, (flat, offset, numel) in self._momentum.items():
            whole = self.inner.state[flat]["momentum_buffer"]
            whole[offset : offset + numel].copy_(read("momentum_buffer", name, 0, numel))
        for fragment in self._fragments:
            targets = {kind: self.inner.state[fragment.flat][kind] for kind in states(fragment.flat)}
            if fragment.name in self._momentum:
                targets = {}
            if self.ema_decay and "ema" in kinds:
                targets["ema"] = self.ema[id(fragment.flat)]
            for kind, target in {"param": fragment.flat, **targets}.items():
                value = read(kind, fragment.name, fragment.start, fragment.numel)
                target.data.reshape(-1)[fragment.offset : fragment.offset + fragment.numel].copy_(value)
        if self.ema_decay and "ema" not in kinds:
            for flat in self._flats():
                self.ema[id(flat)].copy_(flat)


def micro_losses(
    batch: Mapping[str, Any], micro_batch: int, device: torch.device, loss: str, label_smoothing: float = 0.0
) -> Iterator[Callable[[nn.Module], Tensor]]:
    """Splits a worker's batch from the loader into one loss function per micro-batch, for `Engine.train_step`."""
    tensors = {key: value.to(device, non_blocking=True) for key, value in batch.items() if isinstance(value, Tensor)}
    images = tensors.pop("image") if "image" in tensors else tensors.pop("patches")
    for begin in range(0, len(images), micro_batch):
        part = slice(begin, begin + micro_batch)
        micro = {key: value[part] for key, value in tensors.items()}

        def micro_loss(model: nn.Module, x: Tensor = images[part], micro: dict[str, Tensor] = micro) -> Tensor:
            positions = {"positions": micro["positions"]} if "positions" in micro else {}
            return training_loss(model(x, **positions), micro, loss, label_smoothing)

        yield micro_loss


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser, with learning rate 0 until the first step sets it. `lr_scale` of a group multiplies the learning
    rate."""
    groups = weight_decay_groups(model, config.decay_filter)
    if config.name == "adamw":
        # fused: one pass over memory instead of eight, also on a CPU (and so with offload)
        return torch.optim.AdamW(
            groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for name, parameter in model.named_parameters():
        # DeepSpeed's default also includes the class token, registers and the head, which are not hidden matrices.
        parameter.use_muon = name.startswith("blocks.") and parameter.dim() == 2  # type: ignore[attr-defined]
    halves: list[dict[str, Any]] = []
    for group in groups:
        decay = {"weight_decay": group.get("weight_decay", config.weight_decay)}
        muon = [parameter for parameter in group["params"] if parameter.use_muon]
        other = [parameter for parameter in group["params"] if not parameter.use_muon]
        if muon:
            scale = config.muon_lr / config.lr
            halves.append({"params": muon, "use_muon": True, "momentum": 0.95, "lr": 0.0, "lr_scale": scale, **decay})
        if other:
            adam = {"betas": config.betas, "eps": config.eps, "lr": 0.0}
            halves.append({"params": other, "use_muon": False, **adam, **decay})
    return MuonWithAuxAdam(halves)


def _clip(config: OptimizerConfig) -> float | None:
    """The clipping norm; None for muon, where DeepSpeed would clip the update, whose norm does not depend on the
    gradient."""
    return None if config.name == "muon" else config.clip


def _tensor_states(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """Optimiser states with the shape of the parameters (not the scalar step count)."""
    states = optimizer.state.get(flat, {})
    return {k: v for k, v in states.items() if isinstance(v, Tensor) and v.numel() == flat.numel() and v.dim() > 0}


def deepspeed_config(optimizer: OptimizerConfig, config: EngineConfig, accumulation: int, micro_batch: int) -> dict:
    """DeepSpeed's own configuration."""
    zero: dict = {
        "stage": config.zero,
        # Stage 3 needs the overlap for speed. Stages 1 and 2 had races with compiled blocks (DeepSpeed #8061, fixed in
        # 0.19.8), and their overlap synchronises after each backward pass.
        "overlap_comm": torch.cuda.is_available() and (config.zero == 3 or config.overlap_comm),
        # Avoids fragmentation of GPU memory. On a CPU it would copy every gradient without benefit (docs/journal.md).
        "contiguous_gradients": torch.cuda.is_available() or config.zero > 1,
    }
    if optimizer.name == "muon":
        zero["reduce_scatter"] = False  # muon needs whole gradients; stage 3 raises an error otherwise
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    in_float32 = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    return {
        **(in_float32 if config.gradient_precision == "fp32" else {}),
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if config.zero == 0 and config.precision == "fp32" else _clip(optimizer) or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16", "loss_scale": 0},  # 0: dynamic
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # synchronises twice per micro-batch
    }
