"""Leaving in time: workers that are told to go agree on one step, save their state there, and end.

vote = PreemptionVote(is_preempted, host_group(world))
if vote.poll(): ...save...; raise Preempted(...)       # once a step, on every worker

A node that goes away tells them through Ray; a driver that is stopped (Ctrl-C, SIGTERM) through a `StopSignal`.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist


class Preempted(RuntimeError):
    """A worker has saved its state and ends, because its node goes away or the number of workers changes."""


class Stopped(Preempted):
    """A worker has saved its state and ends, because its driver was told to stop: it is not started again."""


class StopSignal:
    """An actor beside the driver that workers listen to: `ray.remote(num_cpus=0)(StopSignal).remote()`."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self.listeners = 0

    async def wait(self) -> None:
        """Until `stop` is called."""
        self.listeners += 1
        await self.stopped.wait()

    async def stop(self) -> int:
        """Tells all listeners; their number."""
        self.stopped.set()
        return self.listeners


def listen(signal: Any) -> threading.Event:
    """In a worker: an event that is set when the driver's StopSignal is given. signal: the actor's handle."""
    import ray

    event = threading.Event()

    def wait() -> None:
        try:
            ray.get(signal.wait.remote())
        except Exception:  # the driver is gone, and this process with it
            return
        event.set()

    threading.Thread(target=wait, name="stop-signal", daemon=True).start()
    return event


def host_group(world: int) -> dist.ProcessGroup | None:
    """A group of all workers for small collectives of their hosts in the thread that trains; None for a single worker.

    The checkpoint's collectives run in another thread and in another order: they have a group of their own. Each group connects
    every pair of workers, which takes long beyond some hundred.
    """
    return dist.new_group(backend="gloo") if world > 1 else None


class PreemptionVote:
    """Whether any worker has been told to leave, agreed by all of them at the same step, without waiting for each other.

    The question of one step is sent in the background and answered at the next: by then every worker has long asked it.
    is_preempted: whether this worker has been told. group: of the hosts (`host_group`); None for a single worker.
    """

    def __init__(self, is_preempted: Callable[[], bool], group: dist.ProcessGroup | None):
        self.is_preempted, self.group = is_preempted, group
        self.asked: tuple[dist.Work, torch.Tensor] | None = None

    def poll(self) -> bool:
        """Call it once a step, on every worker."""
        told = self.is_preempted()
        if self.group is None:
            return told
        answer = False
        if self.asked is not None:
            work, flag = self.asked
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([int(told)], dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self.asked = work, flag
        return answer
