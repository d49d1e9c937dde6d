"""All uses of DeepSpeed's private interfaces, mostly the memory layout of its optimisers.

Written for DeepSpeed 0.19.8 (`WRITTEN_FOR`). tests/unit/test_private_interfaces.py checks the installed version and
every name. A new version may change the meaning of a name: before changing the number, run
tests/integration/test_engine.py and test_training.py, which compare all stages bit for bit."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

WRITTEN_FOR = "0.19.8"

# State of an fp16 loss scaler: the scale, and when it changes next.
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True, slots=True)
class Fragment:
    """`flat[offset : offset + numel]` holds elements [start, start + numel) of parameter `name`, in float32."""

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int


def private(owner: Any, name: str) -> Any:
    """`owner.name`. Raises RuntimeError with both versions when the installed DeepSpeed has no such name."""
    import deepspeed

    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} has no {type(owner).__name__}.{name}; this program was written for "
            f"{WRITTEN_FOR}: install that version (constraints.txt), or adapt pipeline/training/zero_layout.py"
        ) from error


def find_fragments(optimizer: Any, module: nn.Module, stage: int, rank: int) -> Iterator[Fragment]:
    """The fragments of this worker's float32 parameters in DeepSpeed's optimiser, for every ZeRO stage."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if stage == 0:
        yield from _replicated(optimizer, module, names)
    elif stage == 3:
        yield from _partitioned_parameters(optimizer, names, rank)
    else:
        flats = private(optimizer, "single_partition_of_fp32_groups")
        for flat, parameters in zip(flats, private(optimizer, "bit16_groups"), strict=True):
            for parameter in parameters:
                mapping = private(parameter, "_hp_mapping")
                if mapping is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield Fragment(names[id(parameter)], here.start, here.numel, flat, there.start)


def _replicated(optimizer: Any, module: nn.Module, names: Mapping[int, str]) -> Iterator[Fragment]:
    """Stage 0: all parameters are replicated."""
    pairs: Iterable[tuple[Tensor, Tensor]]
    if hasattr(optimizer, "fp32_groups"):  # low precision with float32 masters
        pairs = zip(chain(*private(optimizer, "fp16_groups")), chain(*optimizer.fp32_groups), strict=True)
    else:
        pairs = ((parameter, parameter) for parameter in module.parameters())
    for parameter, master in pairs:
        yield Fragment(names[id(parameter)], 0, master.numel(), master, 0)


def _partitioned_parameters(optimizer: Any, names: Mapping[int, str], rank: int) -> Iterator[Fragment]:
    """Stage 3: each worker has an equal part of every parameter; the part of the last worker is padded."""
    flats = private(optimizer, "fp32_partitioned_groups_flat")
    for group, parameters in enumerate(private(optimizer, "fp16_groups")):
        offset = 0
        for parameter in parameters:
            share = private(parameter, "partition_numel")()
            start = rank * share
            numel = max(0, min(share, private(parameter, "ds_numel") - start))
            if numel:
                yield Fragment(names[id(parameter)], start, numel, flats[group], offset)
            offset += share


def find_muon_momentum(optimizer: Any, module: nn.Module) -> Iterator[tuple[str, tuple[Tensor, int, int]]]:
    """(parameter, (its partition, first element in that partition's momentum, elements)), under ZeRO 1 and 2.

    Muon orthogonalises whole matrices, so it keeps the momentum of every matrix that overlaps the partition.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    flats = private(optimizer, "single_partition_of_fp32_groups")
    for flat, parameters in zip(flats, private(optimizer, "params_in_partition"), strict=True):
        offset = 0
        for parameter in parameters:
            if getattr(parameter, "use_muon", False):
                yield names[id(parameter)], (flat, offset, parameter.numel())
            offset += parameter.numel()


def drop_nonfinite_gradients(optimizer: Any, stage: int) -> None:
    """Makes the optimiser drop steps with non-finite gradients in every precision.

    By default stage 3 checks gradients only in fp16.
    """
    if stage != 3:
        if hasattr(optimizer, "check_grad_overflow"):
            optimizer.check_grad_overflow = True
        return
    update_and_clean_up = private(optimizer, "_loss_scale_update_and_overflow_cleanup")
    check_overflow = private(optimizer, "check_overflow")
    private(optimizer, "_overflow_check_and_loss_scale_update")

    def check(update_scale: bool = True) -> bool:
        optimizer.overflow = False
        check_overflow()
        return update_and_clean_up() if update_scale else optimizer.overflow

    optimizer._overflow_check_and_loss_scale_update = check


class Partitions:
    """Access to gradients and weights of the ZeRO 1 and 2 optimiser (without offload).

    Lists have one flat tensor per parameter group: this worker's partition.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.masters: list[Tensor] = private(optimizer, "single_partition_of_fp32_groups")
        self.process_group = private(optimizer, "dp_process_group")
        for name in ("averaged_gradients", "all_grad_tensors", "parallel_partitioned_bit16_groups", "micro_step_id"):
            private(optimizer, name)

    def take_gradients(self) -> list[Tensor]:
        """The reduced float32 gradients in the order of `masters`. Releases the gradients of the model."""
        optimizer, taken = self.optimizer, []
        for group in range(len(self.masters)):
            parts = optimizer.averaged_gradients[group]
            flat = getattr(parts, "flat_partition", None)  # accumulated in float32
            if flat is None:
                flat = torch.cat([part.reshape(-1) for part in parts])
            taken.append(flat.to(torch.float32))
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
            optimizer.free_grad_in_param_list(optimizer.bit16_groups[group])
        optimizer.micro_step_id = -1
        return taken

    def publish(self) -> None:
        """Copies the updated weights to the model, on every worker."""
        from deepspeed.runtime.utils import all_gather_dp_groups

        optimizer = self.optimizer
        for group, master in enumerate(self.masters):
            parts, members = optimizer.parallel_partitioned_bit16_groups[group], optimizer.real_dp_process_group[group]
            parts[torch.distributed.get_rank(members)].data.copy_(master.data)
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )


def master_copies(optimizer: Any) -> list[tuple[Tensor, Tensor]]:
    """(parameter of the model, its float32 master) under stage 0 in low precision."""
    parameters, masters = private(optimizer, "fp16_groups"), private(optimizer, "fp32_groups")
    return list(zip(chain(*parameters), chain(*masters), strict=True))


def loss_scale(optimizer: Any) -> dict[str, float]:
    """State of the dynamic loss scale; empty without loss scaling."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {name: private(scaler, name) for name in SCALER} if getattr(scaler, "dynamic", False) else {}


def set_loss_scale(optimizer: Any, state: Mapping[str, float]) -> None:
    """Restores the state from `loss_scale`."""
    for name, value in state.items() if loss_scale(optimizer) else ():
        setattr(optimizer.loss_scaler, name, value)


def without_compiled_collectives() -> None:
    """Prevents DeepSpeed from compiling a shared-memory collective on a CPU, which needs a C++ compiler and leaves a
    stale lock if the process is killed. Training does not need the collective, because gloo does the reductions."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
