"""What a worker does to be outlived: hear that its node will go, end when it hangs, say which knob to turn when memory is short.

Nothing here needs Ray; `pipeline.training.launch` is its other half, on the side that starts workers again.
"""

import contextlib
import glob
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch
from torch import distributed as dist

from pipeline.training.recipes import PretrainConfig

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

SPEAK = 2.0
"""Seconds between a stuck worker's last words and its end."""


class Leave(RuntimeError):
    """A worker's state is saved and it stops, since its node is going away or the number of workers changes."""


class Notice:
    """Whether any worker has been told to leave, agreed by all of them at the same step, without waiting for each other.

    The question of one step goes out in the background and is answered at the next: by then every worker has long asked
    it. told: whether this worker has been told.
    """

    def __init__(self, told: Callable[[], bool], world: int):
        self.told = told
        # A group of its own: the checkpoint's and the training's collectives run in other threads, in other orders.
        self.group = dist.new_group(backend="gloo") if world > 1 else None
        self.asked: tuple[dist.Work, torch.Tensor] | None = None

    def heard(self) -> bool:
        """Call it once a step, on every worker."""
        told = self.told()
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


class Stall:
    """Ends this process when nothing has moved for `limit` seconds: a worker that ends is started again, one that hangs is not.

        with Stall(limit, rank, say) as stall:
            stall.now("waiting for data", step=8)   # every mark counts as a move

    At half the time every stuck worker says where it is: the one that stands somewhere else than the others holds them up.
    limit: 0 never ends anything.
    """

    def __init__(self, limit: float, rank: int, say: Callable[[str], None]):
        self.limit, self.rank, self.say = limit, rank, say
        self.doing, self.since = "starting", time.monotonic()
        self.first: int | None = None
        self.step: int | None = None
        """The step that it began with, and the one it is in."""
        self.thread_id = threading.get_ident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="stall", daemon=True)

    def now(self, doing: str, step: int | None = None) -> None:
        self.doing, self.since = doing if step is None else f"{doing} {step}", time.monotonic()
        if step is not None and self.first is None:
            self.first = step
        self.step = step or self.step

    def __enter__(self) -> "Stall":
        if self.limit > 0:
            self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()

    def _watch(self) -> None:
        warned = 0.0
        while not self.stop.wait(min(self.limit / 20, 5.0)):
            still = time.monotonic() - self.since
            if still > self.limit:
                self.say(
                    f"warning: worker {self.rank} has not moved for {still:.0f} s, {self.doing}, and is ended to be started "
                    "again from the last checkpoint (--stalled-after sets the time)"
                )
                time.sleep(SPEAK)  # the line is on its way
                os._exit(1)
            if still > self.limit / 2 and warned != self.since:
                warned = self.since
                self.say(f"warning: worker {self.rank} has not moved for {still:.0f} s, {self.doing}: {self._where()}")

    def _where(self) -> str:
        """The stuck thread's innermost line in this project, and what it called."""
        frames = traceback.extract_stack(sys._current_frames().get(self.thread_id))
        if not frames:
            return "its thread has ended"
        ours = [frame for frame in frames if frame.filename.startswith(PROJECT)] or frames
        line, last = ours[-1], frames[-1]
        called = "" if last is line else f", in {last.name} ({os.path.basename(last.filename)}:{last.lineno})"
        return f"{os.path.relpath(line.filename, PROJECT)}:{line.lineno} {line.line or line.name}{called}"


def out_of_memory(config: PretrainConfig, workers: int, *, host: bool) -> str:
    """Which knobs are left to turn. host: the node's memory, not the device's."""
    engine = config.engine
    micro_batch = engine.micro_batch or config.batch_size // max(workers, config.workers)
    knobs = []
    if micro_batch > 1:
        knobs.append(f"--engine.micro-batch {micro_batch // 2} (now {micro_batch}; the batch stays as it is)")
    if not engine.recompute:
        knobs.append("--engine.recompute (activation checkpointing)")
    if engine.zero < 3:
        knobs.append(f"--engine.zero {engine.zero + 1} with more workers (now {engine.zero})")
    if host:
        knobs.append(f"fewer workers on a node, or a --shuffle-window below {config.shuffle_window}")
    else:
        knobs += [] if engine.offload or engine.zero == 0 else ["--engine.offload (optimiser states in host memory)"]
        knobs += [] if engine.precision != "fp32" else ["--engine.precision bf16"]
    return f"out of {'host' if host else 'device'} memory; try {'; '.join(knobs)}"


def clear_stale_locks(folder: str | None = None) -> list[str]:
    """Removes the locks of compiled extensions whose builder has been killed; returns their paths.

    torch builds an extension behind a file that it keeps open and removes at the end; whoever finds the file waits for
    ever. A builder that lives has the file open: a lock that no process of this machine holds is nobody's. folder: where
    extensions are built, by default torch's own.
    """
    if folder is None:
        from torch.utils.cpp_extension import get_default_build_root

        folder = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    # torch puts a folder per Python and device between its default root and the extensions, and none under a chosen one
    found = [
        os.path.realpath(path) for depth in ("*", "*/*") for path in glob.glob(os.path.join(folder, depth, "lock"))
    ]
    made = {path: _made(path) for path in found}
    if not made or not os.path.isdir("/proc/self/fd"):
        return []
    held = set()
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it ended while we looked, or is another user's
            held.add(os.readlink(descriptor))
    stale = sorted(path for path in made.keys() - held if _made(path) == made[path])  # not one made since we looked
    for path in stale:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    return stale


def _made(path: str) -> int:
    try:
        return os.stat(path).st_ctime_ns
    except FileNotFoundError:
        return 0
