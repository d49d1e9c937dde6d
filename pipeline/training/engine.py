"""The DeepSpeed engine of one worker, and its state in pieces that fit any number of workers.

The only file that imports deepspeed. `Engine` wraps a model for ZeRO 0-3; `Engine.fragments()` names which slice of which
parameter this worker's optimiser owns, so that a checkpoint is a set of named slices: written without communication, and
readable on another number of workers or another ZeRO stage (each worker reads the slices it now owns).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from models import weight_decay_groups
from models.losses import training_loss
from pipeline.errors import UserError
from pipeline.training.recipes import EngineConfig, OptimizerConfig

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class Fragment:
    """`flat[offset : offset + numel]` holds elements [start, start + numel) of parameter `name`, in float32."""

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int


def check_options(config: EngineConfig, optimizer: OptimizerConfig, *, gpu: bool) -> None:
    """Raises UserError for combinations that DeepSpeed does not have."""
    if config.precision == "fp16" and not gpu:
        raise UserError("engine.precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
    if config.offload and config.zero == 0:
        raise UserError("engine.offload needs engine.zero 1, 2 or 3")
    if optimizer.name == "muon" and (config.offload or (config.zero == 0 and config.precision != "fp32")):
        raise UserError("optimizer.name muon needs engine.zero 1, 2 or 3 without engine.offload (or zero 0 in fp32)")


class Engine:
    """One model under DeepSpeed.

    `train_step` takes the worker's share of one global batch; the learning rate is set from outside each step, so that
    the schedule is a function of the step alone and nothing about it needs saving.
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
        average: float = 0.0,
    ):
        import deepspeed

        check_options(config, optimizer, gpu=device.type == "cuda")
        if device.type == "cpu":
            # DeepSpeed would compile a shared-memory collective with the machine's C++ compiler, behind a lock that a
            # killed process never gives back. Training never calls it: gloo does the reductions.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if config.recompute:
            cast(Any, model).set_grad_checkpointing(True)
        inner = _optimizer(model, optimizer, config, device)
        self.engine, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=inner,
            config=_deepspeed_config(optimizer, config, accumulation, micro_batch),
        )
        if config.compile:
            for block in cast(Any, model).blocks:
                block.compile()
        self.inner = inner
        self.device = device
        self.config = config
        self.accumulation = accumulation
        self.clip = _clip(optimizer)
        self._dropped = 0
        self._plain_norm: Tensor | None = None
        inner.state.clear()  # stage 0 in bf16 has stepped once to make its states: Adam would count one step too many
        if config.zero == 3:
            # Stage 3 looks for non-finite gradients only in fp16; a bad batch must not reach the weights in any precision.
            self.engine.optimizer._overflow_check_and_loss_scale_update = self._check_stage_3
        elif hasattr(self.engine.optimizer, "check_grad_overflow"):
            self.engine.optimizer.check_grad_overflow = True
        self._fragments = list(self._find_fragments())
        parameters = model.named_parameters()
        self._muon = {name for name, p in parameters if optimizer.name == "muon" and cast(Any, p).use_muon}
        self._momentum = dict(self._find_momentum()) if self._muon and config.zero in (1, 2) else {}
        self.average = average
        self.averages = {id(flat): flat.detach().clone() for flat in self._flats()} if average else {}

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def train_step(
        self,
        micro_losses: Iterable[Callable[[nn.Module], Tensor]],
        lr: float,
        veto: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """One optimiser step over `accumulation` micro-batches.

        micro_losses: one function per micro-batch, from the model to its mean loss. veto: from this worker's mean loss to
        a bool scalar, alike on all workers: whether the step must not be taken.
        Returns this worker's mean loss, a detached scalar on the device (no host synchronisation).
        """
        for group in self.inner.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)
        total = torch.zeros((), device=self.device)
        for count, micro_loss in enumerate(micro_losses, start=1):
            loss = micro_loss(self.engine)
            total += loss.detach().float()
            if veto is not None and count == self.accumulation:
                # The gradients become NaN, which every stage knows how to drop; known on the device alone, without a wait.
                loss = loss * torch.where(veto(total / self.accumulation), float("nan"), 1.0)
            self.engine.backward(loss)
            if self.engine.optimizer is self.inner and count == self.accumulation:
                self._clip_plain()
            self.engine.step()
        if self.average:
            self._update_average()
        return total / self.accumulation

    @property
    def skipped(self) -> int:
        """Steps so far that were not taken because a gradient was not finite on some worker."""
        return self.engine.skipped_steps + self._dropped

    # What a loss scaler goes through (fp16): its scale, and when it moves next.
    SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

    @property
    def loss_scale(self) -> dict[str, float]:
        """State of the dynamic loss scale, to be kept in a checkpoint; empty where nothing is scaled."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        return {name: getattr(scaler, name) for name in self.SCALER} if getattr(scaler, "dynamic", False) else {}

    @loss_scale.setter
    def loss_scale(self, state: Mapping[str, float]) -> None:
        for name, value in state.items() if self.loss_scale else ():
            setattr(self.engine.optimizer.loss_scaler, name, value)

    def _check_stage_3(self, update_scale: bool = True) -> bool:
        optimizer = self.engine.optimizer
        optimizer.overflow = False
        optimizer.check_overflow()
        return optimizer._loss_scale_update_and_overflow_cleanup() if update_scale else optimizer.overflow

    def _clip_plain(self) -> None:
        """Stage 0 in float32 is a plain optimiser: clips here, and drops gradients that are not finite (reduced
        gradients are alike on all workers; a parameter without a gradient is left alone by the step)."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        self._plain_norm = nn.utils.clip_grad_norm_(parameters, self.clip or float("inf"))
        if not self._plain_norm.isfinite():
            self._dropped += 1
            for parameter in parameters:
                parameter.grad = None

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        norm = self.engine.get_global_grad_norm() if self._plain_norm is None else self._plain_norm
        return float(norm) if norm is not None else float("nan")

    @torch.no_grad()
    def _update_average(self) -> None:
        for flat in self._flats():
            self.averages[id(flat)].lerp_(flat, 1 - self.average)

    # ------------------------------------------------------------ state, as named slices

    def _flats(self) -> list[Tensor]:
        return list({id(fragment.flat): fragment.flat for fragment in self._fragments}.values())

    def _find_fragments(self) -> Iterator[Fragment]:
        """Where this worker's float32 parameters live inside DeepSpeed, for every stage."""
        optimizer = self.engine.optimizer
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self.config.zero == 3:
            for group, parameters in enumerate(optimizer.fp16_groups):
                flat, offset = optimizer.fp32_partitioned_groups_flat[group], 0
                for parameter in parameters:
                    share = parameter.partition_numel()
                    start = rank * share
                    numel = max(0, min(share, parameter.ds_numel - start))  # the last worker's share is padded
                    if numel:
                        yield Fragment(names[id(parameter)], start, numel, flat, offset)
                    offset += share
            return
        if self.config.zero == 0:  # every worker holds everything
            pairs: Iterable[tuple[Tensor, Tensor]]
            if hasattr(optimizer, "fp32_groups"):  # low precision, with float32 masters
                pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
            else:
                pairs = ((parameter, parameter) for parameter in self.module.parameters())
            for parameter, master in pairs:
                yield Fragment(names[id(parameter)], 0, master.numel(), master, 0)
            return
        partitions, lower = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        for flat, parameters in zip(partitions, lower, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield Fragment(names[id(parameter)], here.start, here.numel, flat, there.start)

    def _find_momentum(self) -> Iterator[tuple[str, tuple[Tensor, int, int]]]:
        """Muon under ZeRO 1 and 2 keeps the momentum of whole matrices, all that its partition touches: it orthogonalises
        matrices, not slices. {parameter: (its partition, first element in that partition's momentum, elements)}."""
        optimizer = self.engine.optimizer
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        for flat, parameters in zip(
            optimizer.single_partition_of_fp32_groups, optimizer.params_in_partition, strict=True
        ):
            offset = 0
            for parameter in parameters:
                if getattr(parameter, "use_muon", False):
                    yield names[id(parameter)], (flat, offset, parameter.numel())
                offset += parameter.numel()

    def snapshot(self) -> dict[str, Tensor]:
        """This worker's part of the training state on the host: {"kind:parameter:start": 1-D float32 slice}.

        Kinds: "param" (float32 master), the optimiser's states ("exp_avg", ...), "average". Copies: training may go on
        while they are written. What every worker holds alike (stage 0) is dealt out so that it is written once.
        """
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if world > 1 else 0
        replicated = self.config.zero == 0
        tensors: dict[str, Tensor] = {}
        for index, fragment in enumerate(self._fragments):
            if replicated and index % world != rank:
                continue
            kinds = {"param": fragment.flat, **_tensor_states(self.inner, fragment.flat)}
            if self.average:
                kinds["average"] = self.averages[id(fragment.flat)]
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
        """Fills this worker's slices. `read(kind, name, start, numel)` gives a 1-D float32 tensor; `kinds` are those stored.

        taken: steps that the optimiser has taken so far. The model itself must already hold the checkpoint's weights
        (low-precision copies are made from them).
        """
        muon = {id(fragment.flat) for fragment in self._fragments if fragment.name in self._muon}

        def states(flat: Tensor) -> set[str]:
            """The optimiser's states of this partition among those stored."""
            every = kinds - {"param", "average"}
            if not muon:
                return every
            return every & ({"momentum_buffer"} if id(flat) in muon else {"exp_avg", "exp_avg_sq"})

        for flat in self._flats():
            state = self.inner.state[flat]
            for kind in states(flat):
                state[kind] = torch.zeros_like(flat, requires_grad=False)
            if (
                "exp_avg" in state
            ):  # Adam's bias correction counts steps: torch with a float tensor, Muon's Adam with an int
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
            if self.average and "average" in kinds:
                targets["average"] = self.averages[id(fragment.flat)]
            for kind, target in {"param": fragment.flat, **targets}.items():
                value = read(kind, fragment.name, fragment.start, fragment.numel)
                target.data.reshape(-1)[fragment.offset : fragment.offset + fragment.numel].copy_(value)
        if self.average and "average" not in kinds:
            for flat in self._flats():
                self.averages[id(flat)].copy_(flat)


def micro_losses(
    batch: Mapping[str, Any], micro_batch: int, device: torch.device, loss: str, label_smoothing: float = 0.0
) -> Iterator[Callable[[nn.Module], Tensor]]:
    """A worker's batch, as the loader hands it out, as one loss function per micro-batch for `Engine.train_step`."""
    tensors = {key: value.to(device, non_blocking=True) for key, value in batch.items() if isinstance(value, Tensor)}
    images = tensors.pop("image") if "image" in tensors else tensors.pop("patches")
    for begin in range(0, len(images), micro_batch):
        part = slice(begin, begin + micro_batch)
        micro = {key: value[part] for key, value in tensors.items()}

        def micro_loss(model: nn.Module, x: Tensor = images[part], micro: dict[str, Tensor] = micro) -> Tensor:
            positions = {"positions": micro["positions"]} if "positions" in micro else {}
            return training_loss(model(x, **positions), micro, loss, label_smoothing)

        yield micro_loss


def _optimizer(
    model: nn.Module, config: OptimizerConfig, engine: EngineConfig, device: torch.device
) -> torch.optim.Optimizer:
    groups = weight_decay_groups(model, config.decay)
    if config.name == "adamw":
        fused = not engine.offload  # one pass over memory instead of eight, on a CPU too
        return torch.optim.AdamW(
            groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused
        )
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for name, parameter in model.named_parameters():
        # Of DeepSpeed's own choice the class token, registers and the head would be, too: they are no hidden matrices.
        parameter.use_muon = name.startswith("blocks.") and parameter.dim() == 2  # type: ignore[attr-defined]
    halves: list[dict[str, Any]] = []
    for group in groups:
        decay = {"weight_decay": group.get("weight_decay", config.weight_decay)}
        muon = [parameter for parameter in group["params"] if parameter.use_muon]
        other = [parameter for parameter in group["params"] if not parameter.use_muon]
        if muon:
            rate = config.muon_lr / config.lr
            halves.append({"params": muon, "use_muon": True, "momentum": 0.95, "lr": 0.0, "rate": rate, **decay})
        if other:
            adam = {"betas": config.betas, "eps": config.eps, "lr": 0.0}
            halves.append({"params": other, "use_muon": False, **adam, **decay})
    return MuonWithAuxAdam(halves)


def _clip(config: OptimizerConfig) -> float | None:
    """Muon's updates have the same size whatever the gradient's: the norm that DeepSpeed would clip is theirs."""
    return None if config.name == "muon" else config.clip


def _tensor_states(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """Optimiser states of the shape of the parameters (not the scalar step count)."""
    states = optimizer.state.get(flat, {})
    return {k: v for k, v in states.items() if isinstance(v, Tensor) and v.numel() == flat.numel() and v.dim() > 0}


def _deepspeed_config(optimizer: OptimizerConfig, config: EngineConfig, accumulation: int, micro_batch: int) -> dict:
    zero: dict = {
        "stage": config.zero,
        # Overlapping reductions with contiguous gradients has a long history of races; stage 3 needs it for speed.
        "overlap_comm": config.zero == 3 and torch.cuda.is_available(),
        # Against fragmentation of a GPU's memory; on a CPU a copy of every gradient for nothing (docs/journal.md).
        "contiguous_gradients": torch.cuda.is_available() or config.zero > 1,
    }
    if optimizer.name == "muon":
        zero["reduce_scatter"] = False  # it needs whole gradients; stage 3 refuses otherwise
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
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
    }
