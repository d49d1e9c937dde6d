"""Runs that lose workers, nodes and their driver: jobs are started as a user starts them and killed from outside. The
loss of
every step in MLflow is compared at full precision with an uninterrupted run."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import mlflow
import numpy as np
import psutil
import pytest

from pipeline import config as configuration
from pipeline.commit import write_commit
from pipeline.data.format import open_dataset, write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.errors import StorageError, UserError, plural
from pipeline.training import build_locks, watchdog
from pipeline.training.advice import out_of_memory
from pipeline.training.config import EngineConfig, ModelConfig, OptimizerConfig, PretrainConfig
from pipeline.training.plan import make_plan
from pipeline.training.preemption import Preempted
from pipeline.training.run import check_run, sizes
from pipeline.training.schedule import ScheduleConfig
from pipeline.weights import checkpoints
from tests.images import tinted
from tests.runs import changed, lines_of_log, pretrain_config

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1500)  # with the run that it is compared with, on a machine that has other work
STEPS = 100
SEEDS = range(5)


class Job:
    """jobs/pretrain.py in a separate process, whose output is read line by line."""

    def __init__(self, config: PretrainConfig, folder: Path | None = None, before: str = "", **environment: str):
        """folder: folder of the config and MLflow's database, by default the output folder. before: Python code that
        the driver runs first; its definitions are sent to the workers by value."""
        folder = folder or Path(config.runtime.output).parent
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(configuration.to_yaml(config))
        self.tracking = f"sqlite:///{folder}/mlflow.db"
        arguments = ["jobs/pretrain.py", "--config", str(folder / "config.yaml")]
        code = f"import runpy, sys\nsys.path.insert(0, '.')\nsys.argv = {arguments!r}\n{textwrap.dedent(before)}\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')"],
            cwd=ROOT,
            env={**os.environ, "MLFLOW_TRACKING_URI": self.tracking, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self.news:
                self.lines.append(line.rstrip())
                self.news.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def until(self, pattern: str, timeout: float = 600) -> re.Match:
        """Waits for a line; the job must not end before it."""
        deadline, seen = time.monotonic() + timeout, 0
        while time.monotonic() < deadline:
            with self.news:
                for line in self.lines[seen:]:
                    if match := re.search(pattern, line):
                        return match
                seen = len(self.lines)
                self.news.wait(1)
            assert self.process.poll() is None or seen < len(self.lines), f"ended before {pattern!r}:\n{self.output}"
        raise AssertionError(f"no {pattern!r} in {timeout} s:\n{self.output}")

    def step(self, step: int) -> None:
        self.until(rf"^\S+ INFO +step {step}/")

    def end(self, code: int = 0, timeout: float = 600) -> str:
        assert self.process.wait(timeout) == code, self.output
        self.reader.join(10)
        return self.output


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Starts the jobs of one test, and kills the remaining ones when the test ends."""
    running: list[Job] = []
    yield running
    for job in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(job.process.pid).children(recursive=True), job.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        job.process.wait()


def workers() -> list[psutil.Process]:
    """Training workers of this test's jobs and clusters."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "TrainWorker" in "".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


@pytest.fixture
def cluster() -> Iterator["Cluster"]:
    """A head without CPUs and two nodes with one each, all on this machine."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def curve(job: Job) -> dict[int, float]:
    """The loss of every step, from the only MLflow run in the folder of this job."""
    client = mlflow.MlflowClient(job.tracking)
    experiment = client.get_experiment_by_name("pretrain")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    points = {point.step: point.value for point in history}
    assert len(points) == len(history), "a step was logged twice"
    return points


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """256 noisy pictures of four colours."""
    root = str(tmp_path_factory.mktemp("data") / "set")
    generator = np.random.default_rng(0)

    def rows():
        for i in range(256):
            picture = tinted(generator, 40, 40, i % 3, noise=200, tint=50 * (i % 4 > 0))
            yield f"{i:04d}", cv2.imencode(".png", picture)[1].tobytes(), i % 4, 40, 40

    write_dataset(root, rows(), classes=["a", "b", "c", "d"], row_group_bytes=40_000)
    return root


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> PretrainConfig:
    return pretrain_config(
        data=data,
        output=str(tmp_path_factory.mktemp("reference") / "run"),
        steps=f"{STEPS}steps",
        batch_size=32,
        image_size=32,
        model=ModelConfig(variant="Ti/8", depth=4),
        augment=Augment(size=32),
        optimizer=OptimizerConfig(lr=1e-4),
        schedule=ScheduleConfig(warmup="5steps"),
        engine=EngineConfig(zero=1, precision="fp32"),
        lanes=4,
        workers=2,
        log_every="1steps",
        checkpoint_every="7steps",
        register=None,
    )


@pytest.fixture(scope="module")
def reference(base) -> dict[int, float]:
    """The losses of an uninterrupted run with two workers."""
    job = Job(base)
    job.end()
    points = curve(job)
    assert sorted(points) == list(range(1, STEPS + 1))
    return points


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_worker_killed(base, reference, jobs, tmp_path, seed):
    draw = random.Random(seed)
    job = Job(changed(base, output=str(tmp_path / "run")))
    jobs.append(job)
    job.step(draw.randrange(2, 40))
    draw.choice(workers()).send_signal(signal.SIGKILL)
    text = job.end()
    assert "its process ended" in text
    assert "starting again from the last checkpoint (failure 1 of at most 3 in a row)" in text
    assert curve(job) == reference


@pytest.mark.slow
def test_worker_killed_with_checkpoints_on_s3(base, reference, jobs, s3, tmp_path):
    job = Job(changed(base, output=f"{s3}/run"), folder=tmp_path)
    jobs.append(job)
    job.step(20)
    workers()[0].kill()
    assert re.search(rf"resumed from {s3}/run/checkpoints/step-000000\d\d on 2 workers", job.end())
    assert curve(job) == reference


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_driver_killed(base, reference, jobs, tmp_path, seed):
    config = changed(base, output=str(tmp_path / "run"))
    first = Job(config)
    jobs.append(first)
    first.step(random.Random(seed).randrange(9, 40))
    first.process.kill()  # without waiting until the workers notice
    lock = tmp_path / "extensions" / "fused_adam" / "lock"  # as if a worker had been compiling an operator
    lock.parent.mkdir(parents=True)
    lock.touch()
    second = Job(changed(config, resume="must"), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    jobs.append(second)
    text = second.end()
    assert f"removed the stale build lock {lock}" in text
    assert "resumed from" in text
    assert curve(second) == reference


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_run_saves_its_step_and_continues_from_it(base, reference, jobs, tmp_path, number, code):
    config = changed(base, output=str(tmp_path / "run"), checkpoint_every="1000steps")
    first = Job(config)
    jobs.append(first)
    first.step(12)
    first.process.send_signal(number)
    text = first.end(code)
    saved = int(re.search(r"step (\d+)/\d+  saved, and the workers leave", text)[1])
    assert checkpoints.latest(config.runtime.output).step == saved
    client = mlflow.MlflowClient(first.tracking)
    (run,) = client.search_runs([client.get_experiment_by_name("pretrain").experiment_id])
    assert run.info.status == "KILLED"
    second = Job(config)
    jobs.append(second)
    assert f"step-{saved:08d} on 2 workers" in second.end()
    assert curve(second) == reference


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_node_killed(base, reference, jobs, cluster, tmp_path, seed):
    draw = random.Random(seed)
    job = Job(changed(base, output=str(tmp_path / "run"), address=cluster.address))
    jobs.append(job)
    job.step(draw.randrange(2, 40))
    cluster.remove_node(draw.choice(sorted(cluster.worker_nodes, key=lambda node: node.node_id)), allow_graceful=False)
    cluster.add_node(num_cpus=1)
    text = job.end()
    assert "starting again from the last checkpoint (failure 1 of at most 3 in a row)" in text
    assert curve(job) == reference


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_other_number_of_workers_after_the_driver_was_killed(base, reference, jobs, tmp_path, count):
    config = changed(base, output=str(tmp_path / "run"))
    first = Job(config)
    jobs.append(first)
    first.step(12)
    first.process.kill()
    second = Job(changed(config, workers=count, cpus_per_worker=min(1.0, 2 / count)))
    jobs.append(second)
    assert f"on {plural(count, 'worker')}" in second.end()
    points = curve(second)
    assert points.keys() == reference.keys()
    assert list(points.values()) == pytest.approx(list(reference.values()), abs=1e-5)
    assert list(points.values()) != list(reference.values())  # sums in another order


@pytest.mark.slow
def test_mixture_after_the_driver_was_killed(base, data, jobs, tmp_path):
    """Two workers on two data sets with a class in common: killed in the middle of their epochs, equal losses after it."""
    generator = np.random.default_rng(1)
    pictures = (tinted(generator, 48, 48, i % 3, noise=200, tint=50) for i in range(70))
    rows = ((f"{i:04d}", cv2.imencode(".png", p)[1].tobytes(), i % 2, 48, 48) for i, p in enumerate(pictures))
    write_dataset(f"{tmp_path}/other", rows, classes=["d", "e"], row_group_bytes=40_000)
    mixed = changed(base, data=f"{data}=0.65,{tmp_path}/other=0.35", output=str(tmp_path / "whole" / "run"))
    whole = Job(mixed)
    jobs.append(whole)
    assert re.search(r"step 100/100 .*set 2,080 \(8.12 epochs\)  other 1,120 \(16.00 epochs\)", whole.end())
    config = changed(mixed, output=str(tmp_path / "killed" / "run"))
    first = Job(config)
    jobs.append(first)
    first.step(23)
    first.process.kill()
    first.process.wait()
    second = Job(changed(config, resume="must"))
    jobs.append(second)
    assert re.search(r"resumed from .*step-000000\d\d on 2 workers", second.end())
    assert curve(second) == curve(whole)
    client = mlflow.MlflowClient(second.tracking)
    (run,) = client.search_runs([client.get_experiment_by_name("pretrain").experiment_id])
    found = {item.tags[0].value: json.loads(item.dataset.source)["uri"] for item in run.inputs.dataset_inputs}
    assert found == {"train.1": data, "train.2": f"{tmp_path}/other"}
    assert (run.data.metrics["mixture/images/set"], run.data.metrics["mixture/images/other"]) == (2080, 1120)
    assert [run.data.tags[f"data.share.train.{i}"] for i in (1, 2)] == ["13/20", "7/20"]
    third = Job(changed(config, data=f"{data}=0.7,{tmp_path}/other=0.3"))
    jobs.append(third)
    assert "contains another run (data: " in third.end(2)


def drain(cluster: "Cluster", node_id: str, seconds: int) -> None:
    """What `ray drain-node` does when a cloud takes a node back."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline = int((time.time() + seconds) * 1000)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=cluster.address).drain_node(node_id, reason, "taken back", deadline)
    assert accepted, why


@pytest.mark.slow
def test_preempted_node_loses_no_step(base, jobs, cluster, tmp_path):
    """A preemption notice, a checkpoint at the current step, and a restart from it on another node; no failure is
    allowed and none is
    counted."""
    config = changed(
        base, output=str(tmp_path / "run"), address=cluster.address, max_failures=0, checkpoint_every="1000steps"
    )
    config = changed(config, steps="200steps", model=replace(base.model, depth=6))
    undisturbed = Job(changed(config, output=str(tmp_path / "undisturbed" / "run")))
    jobs.append(undisturbed)
    undisturbed.end()
    job = Job(config, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1")
    jobs.append(job)
    job.step(10)
    victim = min(cluster.worker_nodes, key=lambda node: node.node_id)
    drain(cluster, victim.node_id, 60)
    leaving = workers()
    saved = int(job.until(r"step (\d+)/\d+  saved, and the workers leave")[1])
    assert saved > 10
    psutil.wait_procs(leaving, timeout=60)  # the node exists until the cloud's deadline
    cluster.remove_node(victim, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    text = job.end()
    assert f"step-{saved:08d} on 2 workers" in text
    assert "starting again" not in text
    steps = [int(step) for step in re.findall(r"INFO +step (\d+)/\d+  loss", text)]
    assert steps == list(range(1, 201))  # no step was repeated
    assert curve(job) == curve(undisturbed)


@pytest.mark.slow
def test_shrinks_and_grows_with_the_nodes(base, jobs, cluster, tmp_path):
    """Two workers, one after a node is lost, then two again: the run saves before it grows, and the batches are
    unchanged."""
    config = changed(base, steps="600steps", checkpoint_every="20steps")
    config = changed(config, address=cluster.address, min_workers=1)
    undisturbed = Job(changed(config, output=str(tmp_path / "undisturbed" / "run")))
    jobs.append(undisturbed)
    undisturbed.end()
    often = "import pipeline.training.launch as launch\nlaunch.RESIZE_EVERY = 5.0"
    job = Job(changed(config, output=str(tmp_path / "run")), before=often)
    jobs.append(job)
    job.step(30)
    cluster.remove_node(min(cluster.worker_nodes, key=lambda node: node.node_id), allow_graceful=False)
    job.until(r"resumed from .* on 1 worker")
    cluster.add_node(num_cpus=1)
    job.until("1 worker: saving the state to continue as 2")
    saved = int(job.until(r"step (\d+)/\d+  saved, and the workers leave")[1])
    job.until(rf"resumed from .*step-{saved:08d}(?:-\w+)? on 2 workers")
    text = job.end()
    assert "failure 1 of at most 3" in text
    assert "failure 2" not in text
    ours, theirs = curve(job), curve(undisturbed)
    assert ours.keys() == theirs.keys()
    assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=0.02)


# ---------------------------------------------------------------- what is tried again, and what is not

BROKEN_STEP = """
    def broken(task):
        import os, time, torch
        import ray.train
        from pipeline.errors import StorageError, UserError
        from pipeline.training.engine import Engine
        from pipeline.training.worker import train_worker

        mark, rank, right, calls = {mark!r}, ray.train.get_context().get_world_rank(), Engine.train_step, []

        def train_step(self, *arguments):
            calls.append(1)
            if rank == {rank} and len(calls) == {step} and not os.path.exists(mark):
                open(mark, "w").close()
                {what}
            return right(self, *arguments)

        Engine.train_step = train_step
        return train_worker(task)

    import pipeline.training.launch as launch
    launch.train_worker = broken
"""
OUT_OF_MEMORY = "raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise UserError('this model does not fit this data')", "error: this model does not fit this data"),
        (OUT_OF_MEMORY, "error: worker 1: out of device memory; try --engine.micro-batch 8 (now 16"),
    ],
)
def test_permanent_failures_are_not_retried(base, jobs, tmp_path, what, message):
    before = BROKEN_STEP.format(mark=str(tmp_path / "mark"), rank=1, step=1, what=what)
    job = Job(changed(base, output=str(tmp_path / "run")), before=before)
    jobs.append(job)
    text = job.end(2)
    assert message in text
    assert "Traceback" not in text
    assert "starting again" not in text


@pytest.mark.slow
def test_memory_that_others_took_for_a_while(base, reference, jobs, tmp_path):
    before = BROKEN_STEP.format(mark=str(tmp_path / "mark"), rank=0, step=10, what=OUT_OF_MEMORY)
    job = Job(changed(base, output=str(tmp_path / "run")), before=before)
    jobs.append(job)
    assert re.search(
        r"WARNING worker 0: .*out of device memory; try .*activation-checkpointing.*; starting again", job.end()
    )
    assert curve(job) == reference


@pytest.mark.slow
def test_stalled_worker_is_named_and_restarted(base, reference, jobs, tmp_path):
    before = BROKEN_STEP.format(mark=str(tmp_path / "mark"), rank=1, step=10, what="time.sleep(3600)")
    job = Job(changed(base, output=str(tmp_path / "run"), stalled_after=30.0), before=before)
    jobs.append(job)
    text = job.end()
    assert re.search(r"WARNING worker 1 made no progress for (1[5-9]|2\d) s, in step 10: .*train_step.*", text)
    assert re.search(r"WARNING worker 0 made no progress for (1[5-9]|2\d) s, in step 10: ", text)
    assert "it is killed and restarted from the last checkpoint" in text
    assert curve(job) == reference


@pytest.mark.slow
def test_a_stopped_worker_process_is_replaced_after_the_time_for_stalled_ones(base, jobs, tmp_path):
    """Its watchdog is stopped too, and no other worker waits for it."""
    job = Job(changed(base, output=str(tmp_path / "run"), workers=1, stalled_after=30.0))
    jobs.append(job)
    job.step(10)
    (stopped,) = workers()
    stopped.suspend()
    text = job.until(r"WARNING worker 0: its process does not answer .*--stalled-after.*; starting again", 300).string
    assert "failure 1 of at most" in text
    job.end()
    assert not stopped.is_running()


@pytest.mark.slow
def test_worker_killed_by_the_memory_monitor(base, jobs, tmp_path):
    """Sets the threshold of Ray's memory monitor to 1%."""
    environment = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "250"}
    job = Job(changed(base, output=str(tmp_path / "run"), max_failures=0), **environment)
    jobs.append(job)
    text = job.end(1)
    assert re.search(
        r"training failed: (worker \d: )?process \d+ \(\d+\.\d GB\) was ended: node \S+ ran out of host memory "
        r"\(\d+\.\d of \d+\.\d GB in use by all programs\); try --engine.micro-batch 8",
        text,
    ), text
    assert "(raylet)" not in text
    assert "Traceback" not in text


# ---------------------------------------------------------------- the parts, without Ray's cluster


def test_stalled_thread_logs_its_stack_and_ends_its_process(monkeypatch):
    codes, ended, let_go = [], threading.Event(), threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()
        raise SystemExit

    monkeypatch.setattr(watchdog.os, "_exit", end)
    monkeypatch.setattr(watchdog, "LAST_WORDS", 0.0)

    def work() -> None:
        with watchdog.Watchdog(0.6, 3) as dog:
            dog.heartbeat("in step", 7)
            let_go.wait(60)
            assert (dog.first, dog.step) == (7, 7)

    thread = threading.Thread(target=work)
    with lines_of_log() as lines:
        thread.start()
        assert ended.wait(60)
        let_go.set()
        thread.join()
    assert re.match(
        r"warning: worker 3 made no progress for \d+ s, in step 7: .*let_go.wait\(60\), in wait \(thread", lines[0]
    )
    assert re.search(r"worker 3 made no progress for \d+ s, in step 7: it is killed", lines[1])
    assert codes == [1]


def test_lock_of_a_killed_builder_is_removed_and_that_of_a_running_one_is_kept(tmp_path):
    """A lock file as DeepSpeed's compilation leaves it; torch would wait forever for its removal."""
    from torch.utils.file_baton import FileBaton

    lock = tmp_path / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    code = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(600)"
    builder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    builder.stdout.readline()
    assert build_locks.clear_stale_locks(str(tmp_path)) == []
    assert not FileBaton(str(lock)).try_acquire()
    builder.kill()
    builder.wait()
    assert lock.exists()
    assert build_locks.clear_stale_locks(str(tmp_path)) == [str(lock)]
    assert FileBaton(str(lock)).try_acquire()


def test_advice_when_memory_is_short(base):
    config = changed(base, workers=2, engine=EngineConfig(zero=1, precision="fp32"))
    text = out_of_memory(config, 16, host=False)
    for knob in (
        "micro-batch 8 (now 16",
        "activation-checkpointing",
        "zero 2 (now 1",
        "offload",
        "precision bf16",
    ):
        assert knob in text
    turned = changed(
        config, engine=EngineConfig(zero=3, precision="bf16", micro_batch=1, activation_checkpointing=True)
    )
    assert out_of_memory(turned, 1, host=False).endswith("try --engine.offload (optimiser states in host memory)")
    assert "fewer workers per node" in out_of_memory(turned, 1, host=True)


@pytest.mark.parametrize(("stalled_after", "limit"), [(30.0, "30.0"), (0.0, None), (1800.0, None)])
def test_silent_workers_are_given_up_after_the_shorter_time(monkeypatch, stalled_after, limit):
    """Of --stalled-after and Ray's ten minutes, unless the user has set Ray's variable."""
    from pipeline.training.launch import health_check_timeout

    name = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
    monkeypatch.setenv(name, "7")
    with health_check_timeout(stalled_after):
        assert os.environ[name] == "7"
    monkeypatch.delenv(name)
    with health_check_timeout(stalled_after):
        assert os.environ.get(name) == limit
    assert name not in os.environ


def test_failures_are_classified(base, tmp_path):
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2.api.config import FailureConfig
    from ray.train.v2.api.exceptions import WorkerGroupError

    from pipeline.training.failures import Failures

    config = changed(base, output=str(tmp_path), max_failures=1)
    policy = Failures(FailureConfig(max_failures=1), config, micro_batch=16)
    collateral = RuntimeError("[pair.cc:534] gloo: Connection closed by peer")
    dead = WorkerHealthCheckFailedError("", RayActorError(error_msg="died\n\tip: 10.0.0.7\n"))
    full = WorkerHealthCheckFailedError(
        "", RayActorError(error_msg="2 worker(s) were killed due to the node running low on memory.")
    )

    def decide(*failures: Exception) -> FailureDecision:
        with lines_of_log() as logged:
            decision = policy.make_decision(WorkerGroupError("", dict(enumerate(failures))))
        lines.extend(logged)
        return decision

    lines: list[str] = []

    assert decide(collateral, UserError("no such class")) == FailureDecision.RAISE
    assert decide(Preempted("saved at step 3"), collateral) == FailureDecision.RETRY
    assert decide(Preempted("saved at step 5"), Preempted("saved at step 5")) == FailureDecision.RETRY
    assert lines == []
    assert decide(collateral, dead) == FailureDecision.RETRY
    assert lines[0].startswith(
        "warning: worker 1: its process ended on 10.0.0.7 (killed, node lost, or out of host memory)"
    )
    assert decide(collateral, StorageError("no answer")) == FailureDecision.RAISE  # one failure was allowed
    write_commit(checkpoints.folder(config.runtime.output, 8), {"step": 8, "files": {}})
    assert decide(collateral, dead) == FailureDecision.RETRY  # there has been progress since
    assert decide(collateral, dead) == FailureDecision.RAISE
    lines.clear()
    policy = Failures(FailureConfig(max_failures=3), changed(config, max_failures=3), micro_batch=16)
    decide(collateral, StorageError("no answer"))
    decide(collateral, full)
    assert lines[0] == (
        "warning: worker 1: StorageError: no answer; starting again from the last checkpoint (failure 1 of at most 3 in a row)"
    )
    assert (
        "worker 1: a process was ended: its node ran out of host memory; try --engine.micro-batch 8 (now 16" in lines[1]
    )


def test_sizes_that_fit_a_run(base):
    """A batch of 32 in four lanes is divided over one, two or four workers; the micro-batch is limited by memory."""
    plan = check_run(changed(base, workers=4, min_workers=1))
    assert sizes(plan) == [1, 2, 4]
    assert [make_plan(plan.config, open_dataset(base.runtime.data), n).micro_batch for n in (1, 2, 4)] == [8, 8, 8]
    assert sizes(check_run(changed(base, workers=4))) == [4]
    with pytest.raises(UserError, match="min_workers 5 must be between 1 and workers"):
        check_run(changed(base, workers=4, min_workers=5))


def test_elastic_run_uses_the_workers_that_fit_on_the_remaining_nodes(monkeypatch):
    import ray
    from ray.train.v2.api.config import ScalingConfig

    from pipeline.training.failures import Elastic

    policy = Elastic(ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1}), [1, 2, 4])
    nodes = {f"node-{i}": {"CPU": 1.0} for i in range(4)}
    gone, draining = {"node-9"}, {}
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": node, "Alive": node not in gone} for node in nodes])
    monkeypatch.setattr("pipeline.ray_state.draining_nodes", lambda: set(draining))
    assert policy.count_possible_workers(nodes) == 4
    gone.add("node-0")
    assert policy.count_possible_workers(nodes) == 2
    draining["node-1"] = 0
    assert policy.count_possible_workers(nodes) == 2
    draining["node-2"] = 0
    assert policy.count_possible_workers(nodes) == 1
