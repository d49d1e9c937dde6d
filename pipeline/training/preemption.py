"""Preemption: all workers agree on a step, save their state, and end.

vote = PreemptionVote(is_preempted, host_group(world))
if vote.poll(): ...save...; raise Preempted(...)       # once a step, on every worker

A worker learns from Ray that its node is being drained, and from a `StopSignal` that the driver was stopped (Ctrl-C,
SIGTERM)."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist


class Preempted(RuntimeError):
    """Raised by a worker after saving its state, because its node is drained or the number of workers changes."""


class Stopped(Preempted):
    """Raised by a worker after saving its state, because the driver was stopped. The run is not restarted."""


class ValidationStopped(Exception):
    """Raised on every worker between two batches of a validation, because the workers have to leave. The next start
    validates the same step."""


class StopSignal:
    """An actor through which the driver stops the workers: `ray.remote(num_cpus=0)(StopSignal).remote()`."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self.listeners = 0

    async def wait(self) -> None:
        """Returns after `stop` was called."""
        self.listeners += 1
        await self.stopped.wait()

    async def stop(self) -> int:
        """Notifies all listeners. Returns their number."""
        self.stopped.set()
        return self.listeners


def listen(signal: Any) -> threading.Event:
    """In a worker: an event that is set when the driver stops the run. signal: handle of the StopSignal actor."""
    import ray

    event = threading.Event()

    def wait() -> None:
        try:
            ray.get(signal.wait.remote())
        except Exception:  # the driver has ended, and this process will end as well
            return
        event.set()

    threading.Thread(target=wait, name="stop-signal", daemon=True).start()
    return event


def host_group(world: int) -> dist.ProcessGroup | None:
    """A process group of all workers for small collectives on the host, in the training thread; None for a single
    worker.

    The collectives of checkpoints run in another thread and in another order, so they have a separate group. A group
    connects every pair of workers, which is slow for more than a few hundred."""
    return dist.new_group(backend="gloo") if world > 1 else None


class PreemptionVote:
    """Agreement of all workers, at the same step, that one of them has to leave. Does not block training.

    Each poll starts an asynchronous all-reduce and returns the result of the previous one, which has usually finished.
    is_preempted: whether this worker has to leave. group: process group (`host_group`); None for a single worker."""

    def __init__(self, is_preempted: Callable[[], bool], group: dist.ProcessGroup | None):
        self.is_preempted, self.group = is_preempted, group
        self.asked: tuple[dist.Work, torch.Tensor] | None = None
        self.leaves = False
        """The answer of the last poll; True is final."""

    def poll(self) -> bool:
        """Whether to leave. Call it once per step, and per batch of a validation, on every worker."""
        if not self.leaves:
            self.leaves = self._ask()
        return self.leaves

    def _ask(self) -> bool:
        preempted = self.is_preempted()
        if self.group is None:
            return preempted
        answer = False
        if self.asked is not None:
            work, flag = self.asked
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([int(preempted)], dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self.asked = work, flag
        return answer
