"""Pre-training on several workers of this machine, without Ray: one process each, joined by gloo."""

import json
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.training.config import PretrainConfig
from pipeline.weights import checkpoints
from tests.ports import free_port
from tests.runs import changed, lines_of_log


def work(rank: int, world: int, port: int, jobs: list, stops_at: Sequence[int] = ()) -> None:
    """Runs `jobs` in sequence in one process group; losses of every step and the result go to
    <output>/result-<number of the job>.json.

    stops_at: for each job, the step in whose validation the last worker is told to leave."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    from pipeline.training.engine import Worker
    from pipeline.training.loop import train
    from pipeline.training.preemption import Preempted

    for number, config in enumerate(jobs):
        stopped, reached = threading.Event(), [0]

        def heartbeat(doing, step=None, number=number, stopped=stopped, reached=reached):
            reached.append(step or reached[-1])
            if rank == world - 1 and doing == "validating" and reached[-1] in stops_at[number : number + 1]:
                stopped.set()

        worker = Worker(rank=rank, world=world, device=torch.device("cpu"))
        with lines_of_log() as lines:
            try:
                result = train(config, worker, is_preempted=stopped.is_set, heartbeat=heartbeat)
            except Preempted as saved:
                result = {"left": str(saved)}
        if rank == 0:
            steps = [line.split() for line in lines if line.startswith("step") and "loss" in line and "lr" in line]
            losses = {words[1].split("/")[0]: words[words.index("loss") + 1] for words in steps}
            Path(config.runtime.output, f"result-{number}.json").write_text(
                json.dumps({"losses": losses, "lines": lines, **result})
            )
    torch.distributed.destroy_process_group()


def run(world: int, *jobs: PretrainConfig, stops_at: Sequence[int] = ()) -> list[dict]:
    torch.multiprocessing.spawn(work, args=(world, free_port(), jobs, stops_at), nprocs=world)
    places = [Path(job.runtime.output, f"result-{number}.json") for number, job in enumerate(jobs)]
    return [json.loads(place.read_text()) for place in places]


def continued(job: PretrainConfig, tmp_path: Path, step: int) -> PretrainConfig:
    """A copy of a run in its state after `step`."""
    copy = changed(job, output=str(tmp_path / f"continued-{Path(job.runtime.output).name}"))
    shutil.copytree(checkpoints.folder(job.runtime.output, step), checkpoints.folder(copy.runtime.output, step))
    return copy
