"""Pre-training on several workers of this machine, without Ray: one process each, joined by gloo."""

import json
import os
import shutil
from pathlib import Path

import torch

from pipeline.training.config import PretrainConfig
from pipeline.weights import checkpoints
from tests.ports import free_port
from tests.runs import changed, lines_of_log


def work(rank: int, world: int, port: int, jobs: list) -> None:
    """Runs `jobs` (name, config) in sequence in one process group; losses of every step go to <output>/losses.json."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    from pipeline.training.engine import Worker
    from pipeline.training.loop import train

    for config in jobs:
        with lines_of_log() as lines:
            result = train(config, Worker(rank=rank, world=world, device=torch.device("cpu")))
        if rank == 0:
            steps = [line.split() for line in lines if line.startswith("step") and "loss" in line and "lr" in line]
            losses = {words[1].split("/")[0]: words[words.index("loss") + 1] for words in steps}
            Path(config.runtime.output, "result.json").write_text(
                json.dumps({"losses": losses, "lines": lines, **result})
            )
    torch.distributed.destroy_process_group()


def run(world: int, *jobs: PretrainConfig) -> list[dict]:
    torch.multiprocessing.spawn(work, args=(world, free_port(), jobs), nprocs=world)
    return [json.loads(Path(job.runtime.output, "result.json").read_text()) for job in jobs]


def continued(job: PretrainConfig, tmp_path: Path, step: int) -> PretrainConfig:
    """A copy of a run in its state after `step`."""
    copy = changed(job, output=str(tmp_path / f"continued-{Path(job.runtime.output).name}"))
    shutil.copytree(checkpoints.folder(job.runtime.output, step), checkpoints.folder(copy.runtime.output, step))
    return copy
