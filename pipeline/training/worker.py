"""The training worker under Ray Train: runs `loop.train` with a watchdog and sends log records to the driver."""

import contextlib
import logging
from typing import Any

import ray.train
import ray.train.torch
import torch

from pipeline import config as configuration
from pipeline import logs
from pipeline.data.mixture import open_data
from pipeline.errors import UserError
from pipeline.hardware import device_memory
from pipeline.stores import expect_answers
from pipeline.tracking import attach_run
from pipeline.tracking.system import SystemMetrics
from pipeline.training.advice import out_of_memory
from pipeline.training.build_locks import clear_stale_locks
from pipeline.training.config import PretrainConfig
from pipeline.training.engine import Worker
from pipeline.training.loop import train
from pipeline.training.plan import make_plan
from pipeline.training.preemption import Preempted, Stopped, listen
from pipeline.training.ray_compat import is_preempted
from pipeline.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


def train_worker(task: dict[str, Any]) -> dict[str, Any]:
    """task: config (plain), run_id, tracking_uri, and two handles: records of the driver's `logs.Collector`, stop of
    its `StopSignal`."""
    logs.send_to(task["records"])
    expect_answers()
    stop, preempted = listen(task["stop"]), is_preempted()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = configuration.from_dict(PretrainConfig, task["config"])
    worker = Worker(rank=rank, world=world, device=ray.train.torch.get_device())
    run = attach_run(task["run_id"], task["tracking_uri"], resume=True) if rank == 0 else None
    try:
        with contextlib.ExitStack() as stack:
            watchdog = stack.enter_context(Watchdog(config.runtime.stalled_after, rank))
            for path in clear_stale_locks():
                logger.info("removed the stale build lock %s", path)
            if context.get_local_rank() == 0:
                node = f"node-{context.get_node_rank()}"
                stack.enter_context(SystemMetrics(task["run_id"], task["tracking_uri"], node=node))
            return train(
                config,
                worker,
                run,
                is_preempted=lambda: preempted() or stop.is_set(),
                heartbeat=watchdog.heartbeat,
            )
    except Preempted as saved:
        if stop.is_set():
            raise Stopped(str(saved)) from None
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        memory = device_memory(worker.device) if worker.device.type == "cuda" else None
        plan = make_plan(config, open_data(config.runtime.data), world, gpu_memory=memory)
        text = out_of_memory(config, plan.micro_batch, host=isinstance(error, MemoryError))
        # In the first step a retry would fail again; later another process may have used the memory.
        raise (UserError if watchdog.step == watchdog.first else RuntimeError)(f"worker {rank}: {text}") from error
    finally:
        if run is not None:
            run.finish()
