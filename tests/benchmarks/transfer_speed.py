"""Time saved by parallel fine-tuning, and the cost of the feature pipeline.

    python tests/benchmarks/transfer_speed.py

1. six fine-tunings of about twenty seconds (a tenth of VTAB-1k's 2,500 steps, on a small model): by the scheduler on as many
   workers as there are CPUs, Ray's start included, against the same function called in sequence in one process with all CPUs,
   and in sequence with one process per task (what a shell loop over tasks does). More than ten minutes on two cores;
2. frozen features: images per second of `features.compute_features` (read, decode, forward) against the bare forward on a batch that
   is already in memory, one thread each. Target: at least 90%.

Writes tests/benchmarks/results/transfer_speed.json.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time

import cv2
import numpy as np
import torch

from models import create_model
from pipeline import cluster
from pipeline.data import open_dataset
from pipeline.data.format import write_dataset
from pipeline.transfer import features
from pipeline.transfer.finetune import Execution
from pipeline.transfer.jobs import Job
from pipeline.transfer.protocols import FineTune, Probe, Split, TransferTask
from pipeline.transfer.scheduler import FailedJob, Finished, Pool, Scheduler
from pipeline.transfer.worker import TransferWorker, finish_finetuning, start_finetuning

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SIZE, TASKS, STEPS = 64, 6, int(os.environ.get("TRANSFER_SPEED_STEPS", "250"))


def pictures(uri: str, n: int, side: int) -> None:
    generator = np.random.default_rng(n)

    def rows():
        for i in range(n):
            low = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            picture = cv2.resize(low, (side, side), interpolation=cv2.INTER_CUBIC)
            yield f"k{i}", cv2.imencode(".jpg", picture)[1].tobytes(), i % 10, side, side

    write_dataset(uri, rows(), classes=[str(k) for k in range(10)], image={"size": side, "quality": 95})


def tasks(folder: str) -> list[TransferTask]:
    protocol = FineTune(resolution=SIZE, crop="random", steps=STEPS, batch_size=32, lrs=(0.01,))
    train, test = Split(uri=f"{folder}/train"), Split(uri=f"{folder}/test")
    return [TransferTask(name=f"task{i}", train=train, test=test, protocol=protocol) for i in range(TASKS)]


def fan_out(folder: str, model_config: dict, arrays: dict) -> dict:
    import ray

    start = time.perf_counter()
    cluster.configure(num_cpus=os.cpu_count(), dashboard=False)
    cluster.connect()
    connected, finished = time.perf_counter(), []
    actor = ray.remote(TransferWorker).options(max_concurrency=2, num_cpus=1)
    pool = Pool(actor, (model_config, [ray.put(arrays)], 1, 32), limit=os.cpu_count() or 1)
    scheduler = Scheduler(tasks(folder), 1, {}, pool, costs={f"task{i}": 1.0 for i in range(TASKS)})
    for event in scheduler.run():
        assert not isinstance(event, FailedJob), event
        if isinstance(event, Finished):
            finished.append((time.perf_counter(), event.result.seconds))
    first, training = finished[0]
    return {
        "seconds": time.perf_counter() - start,
        "ray_start": connected - start,
        "workers_start": first - training - connected,  # until the first of them began to train
    }


def in_sequence(folder: str, model: torch.nn.Module, threads: int, wanted: list[TransferTask]) -> float:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    for task in wanted:
        job = Job(task=task, lr=0.01)
        finish_finetuning(job, start_finetuning(job, model, Execution(threads=threads, micro_batch=32)))
    return time.perf_counter() - start


def feature_rate(folder: str, model: torch.nn.Module) -> dict:
    """Best of three; the two measurements alternate."""
    torch.set_num_threads(1)
    model.set_image_size(SIZE)
    uri = f"{folder}/test"
    wanted = features.feature_set(Split(uri=uri), open_dataset(uri), "x", Probe(resolution=SIZE, resize=SIZE))
    batch = torch.randint(0, 255, (64, SIZE, SIZE, 3), dtype=torch.uint8)
    pipeline, bare = [], []
    for _ in range(3):
        start = time.perf_counter()
        features.compute_features(model, wanted, Execution(micro_batch=16))
        pipeline.append(wanted.rows / (time.perf_counter() - start))
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(wanted.rows // 64):
                model.features(batch)
            bare.append(wanted.rows // 64 * 64 / (time.perf_counter() - start))
    return {
        "pipeline_images_per_second": max(pipeline),
        "bare_images_per_second": max(bare),
        "share": max(pipeline) / max(bare),
    }


def main() -> None:
    folder = os.environ.get("TRANSFER_SPEED_FOLDER")
    torch.manual_seed(0)
    model = create_model("Ti/16", 10, SIZE).eval()
    if folder:  # one task in a separate process
        in_sequence(folder, model, os.cpu_count() or 1, tasks(folder)[:1])
        return
    with tempfile.TemporaryDirectory() as folder:
        pictures(f"{folder}/train", 200, 96)
        pictures(f"{folder}/test", 640, 96)
        arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        result: dict = {"features": feature_rate(folder, create_model("Ti/16", 10, SIZE).eval())}
        result["tasks"], result["steps"] = TASKS, STEPS
        result["in_sequence_seconds"] = in_sequence(folder, model, os.cpu_count() or 1, tasks(folder))
        start = time.perf_counter()
        for _ in range(TASKS):
            environment = {**os.environ, "TRANSFER_SPEED_FOLDER": folder}
            subprocess.run([sys.executable, os.path.abspath(__file__)], env=environment, check=True)
        result["process_per_task_seconds"] = time.perf_counter() - start
        result["fan_out"] = fan_out(folder, model.config, arrays)
    commit = subprocess.run(["git", "-C", PROJECT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result["host"] = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "machine": platform.machine()}
    result["versions"] = {"torch": torch.__version__, "python": platform.python_version(), "commit": commit}
    target = os.path.join(PROJECT, "tests", "benchmarks", "results", "transfer_speed.json")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, "w") as file:
        json.dump(result, file, indent=1)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
