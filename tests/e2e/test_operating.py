"""Runs every command of docs/operating.md in order, on one small run in an S3 store.

The test also does what the guide describes between its commands: it stops the run before continuing it, on two workers,
then one, then four; it drains a node during the run; it damages the newest checkpoint. The rows of the runbook have
tests in other files."""

import ast
import contextlib
import itertools
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import mlflow
import numpy as np
import psutil
import pytest

from pipeline import storage
from pipeline.vtab import miniature
from pipeline.weights import checkpoints
from tests.documents import code_blocks, script_lines
from tests.images import tinted
from tests.objectstore import make_bucket

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "operating.md"
COMMANDS = [line for block in code_blocks(GUIDE) for line in script_lines(block)]
RUN, STEPS = "s3://bucket/vit/b16", 1000
LOGGED = r"^\S+ INFO +"  # time and level of a line of the log
ATTEMPT = r"(?:-\w+)?"  # end of the name of a checkpoint that a later attempt has saved

# Flags that make a job small. If a flag is given twice, the last one applies. Worker counts are divided by eight.
TRAINING = (
    f"--model.variant mu/8 --image-size 16 --augment.size 16 --batch-size 16 --lanes 4 --steps {STEPS}steps --log-every 5steps "
    "--checkpoint-every 20steps --engine.no-compile --no-gpus --cpus-per-worker 0.5 --workers 1"
)
SMALL = {
    "jobs/prepare.py": "--num-cpus 2",
    "jobs/prepare.py verify": "",
    "jobs/prepare.py describe": "",
    "jobs/doctor.py": TRAINING,
    "jobs/pretrain.py": TRAINING,
    "jobs/transfer.py": "--steps 2 --batch-size 8 --resolution 16",
    "jobs/evaluate.py": f"--every-step {STEPS} --transfer.steps 2 --transfer.batch-size 8 --transfer.resolution 16",
}

# Part of a command line -> pattern in its output after success. Other commands only have to exit with 0.
EXPECTED_OUTPUT = {
    "jobs/plan.py": r"wrote scaling\.png$",
    "--source": r"^train: prepared=29\d shards=\d+ rejects=0 [^\n]*\nval: prepared=\d ",
    "prepare.py vtab": r"^smallnorb_elevation +test ",
    "jobs/doctor.py": r"^doctor: 0 error, ",
    "--dry-run": rf"^  schedule  {STEPS:,} steps of 16 ",
    "prepare.py describe": r"^  images +29\d as jpeg",
    "prepare.py verify": r"/data/train: verified, no problems found$",
    "jobs/transfer.py": r"^mean of 19 ",
    "--every": r"^evaluate: evaluated=1  failed=0 ",
    "--repair": rf"^damaged +{RUN}/checkpoints/step-0*{STEPS}{ATTEMPT}: model\.safetensors has \d+ bytes instead of ",
    "--prune": rf"^would delete {RUN}/checkpoints/step-0*{STEPS - 40}{ATTEMPT}$",
    "upload": r"^uploaded operating/left ",
}

UNDELIVERED_RUN = """
import os
from pipeline.tracking import server, start_run

def away(uri):
    raise ConnectionError("MLflow is away")

run = start_run("operating", "left")
run.flush()
server.client = away
run.log({"train/loss": 1.0}, step=1)
os._exit(1)
"""


# First cell of each row of the guide's runbook -> the tests that show its action.
TESTS = {
    "a worker or a node died": (
        "integration/test_survival.py::test_worker_killed",
        "integration/test_survival.py::test_node_killed",
    ),
    "a spot node received a preemption notice": (
        "integration/test_autoscaling.py::test_a_notice_drains_the_node",
        "integration/test_survival.py::test_preempted_node_loses_no_step",
    ),
    # An embedded Ray dies with its driver, so this test covers both.
    "the head or the driver died": ("integration/test_survival.py::test_driver_killed",),
    "a run makes no steps": (
        "integration/test_survival.py::test_stalled_worker_is_named_and_restarted",
        "integration/test_survival.py::test_stalled_thread_logs_its_stack_and_ends_its_process",
    ),
    "training waits for data": (
        "integration/test_engine.py::test_waiting_for_data_is_reported_with_the_setting_that_helps",
    ),
    "the newest checkpoint is damaged": (
        "integration/test_training.py::test_damaged_checkpoint_is_skipped",
        "integration/test_training.py::test_repair_lists_every_checkpoint_and_removes_when_asked",
    ),
    "the object store was unavailable": (
        "integration/test_training.py::test_uploads_run_in_parallel_and_are_retried",
        "integration/test_training.py::test_full_disk_costs_one_checkpoint_and_the_next_one_is_written",
        "integration/test_loader_s3.py::test_temporary_faults_are_retried_and_counted_and_change_nothing",
        "integration/test_loader_s3.py::test_a_shard_that_stays_unreadable_is_named",
    ),
    "MLflow was unavailable or rejected a record": (
        "unit/test_tracking.py::test_refused_records_outlive_uploads_and_are_named_with_the_reason",
        "integration/test_mlflow_server.py::test_server_is_killed_and_restarted_during_a_run",
        "unit/test_tracking.py::test_a_server_that_never_comes_leaves_records_and_the_command_that_uploads_them",
    ),
    "units of work failed": (
        "integration/test_workqueue.py::test_a_finished_unit_is_not_done_again",
        "integration/test_workqueue.py::test_a_process_that_dies_repeatedly_is_one_line",
    ),
    "checkpoints cannot be evaluated": (
        "integration/test_evaluate.py::test_a_failing_suite_is_retried_a_few_times_and_then_waits_for_a_person",
    ),
    "prepare was killed": ("integration/test_prepare_survival.py::test_killed_at_random_moments",),
    "a list of URLs has many dead links": (
        "integration/test_prepare_urls.py::test_rejects_are_counted_by_reason_and_show_no_password",
        "integration/test_prepare_urls.py::test_the_same_command_repeats_only_temporary_failures",
        "unit/test_downloads.py::test_retry_after_holds_for_the_whole_host",
    ),
    "some VTAB tasks failed": (
        "integration/test_transfer.py::test_one_failing_task_does_not_stop_the_others",
        "integration/test_transfer.py::test_nineteen_tasks_survive_the_death_of_the_driver_and_of_a_worker",
    ),
    "the loss is not finite": (
        "integration/test_engine.py::test_neither_a_spike_nor_nan_reaches_the_weights",
        "integration/test_engine.py::test_too_many_bad_steps_in_a_row_end_the_run",
        "e2e/test_jobs.py::test_repeated_command_continues_and_changed_command_is_refused",
        "integration/test_weights.py::test_google_files_and_registered_models_through_the_jobs",
    ),
    "out of memory": (
        "integration/test_survival.py::test_permanent_failures_are_not_retried",
        "integration/test_engine.py::test_options_of_the_engine_do_not_change_the_losses",
        "integration/test_training.py::test_other_number_of_workers_and_stage_see_the_same_samples",
    ),
    "host memory is almost full": (
        "integration/test_survival.py::test_worker_killed_by_the_memory_monitor",
        "integration/test_embedded_ray.py::test_prepare_reports_a_lack_of_host_memory_in_one_line_and_continues_later",
    ),
    "workers hang at 0% CPU": ("integration/test_doctor.py::test_a_stale_build_lock_is_distinguished_from_a_held_one",),
    "Ray responds with 401": ("integration/test_security.py::test_a_submission_without_the_token_is_refused",),
    "MLflow responds with 403": (
        "integration/test_doctor.py::test_a_broken_tracking_server",
        "integration/test_mlflow_server.py::test_wrong_password_and_wrong_host_are_errors_that_say_what_to_do",
    ),
    "the disk is full": (
        "integration/test_training.py::test_full_disk_costs_one_checkpoint_and_the_next_one_is_written",
        "integration/test_evaluate.py::test_pruning_lists_by_default_and_deletes_on_request",
    ),
}


def test_every_row_of_the_runbook_has_a_test():
    _, _, runbook = GUIDE.read_text().partition("## Runbook")
    rows = re.findall(r"^\| (.+?) \|", runbook.partition("\n## ")[0], re.MULTILINE)
    assert rows == ["problem", "---", *TESTS]
    for test in itertools.chain(*TESTS.values()):
        path, _, name = test.partition("::")
        module = ast.parse((ROOT / "tests" / path).read_text())
        assert name in {item.name for item in module.body if isinstance(item, ast.FunctionDef)}, test


class Command:
    """Process of a command of the guide with small settings. Its output goes to a file."""

    numbers = itertools.count(1)

    def __init__(self, line: str, *more: str):
        python, *words = shlex.split(line)
        assert python == "python", line
        words += shlex.split(SMALL.get(" ".join(words[:2]), SMALL.get(words[0], "")))
        for flag, count in re.findall(r"(--(?:min-)?workers) (\d+)", line):
            words += [flag, str(max(1, int(count) // 8))]
        self.line, self.log = line, Path(f"{next(self.numbers)}.log")
        command = [sys.executable, *(str(ROOT / word) if (ROOT / word).is_file() else word for word in words), *more]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def until(self, pattern: str, seconds: float = 300) -> re.Match:
        """Waits for a line of output. Fails if the command ends first."""
        deadline = time.monotonic() + seconds
        while True:
            over = self.process.poll() is not None or time.monotonic() > deadline
            text = self.log.read_text()
            if found := re.search(pattern, text, re.MULTILINE):
                return found
            assert not over, f"{self.line}: no {pattern!r} in\n{text}"
            time.sleep(0.2)

    def end(self, code: int = 0, seconds: float = 600) -> str:
        assert self.process.wait(seconds) == code, f"{self.line}:\n{self.log.read_text()}"
        return self.log.read_text()

    def stop(self) -> None:
        assert self.process.poll() is None, self.log.read_text()
        self.process.send_signal(signal.SIGTERM)
        assert "stopped; repeat the command to continue" in self.end(128 + signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


@pytest.fixture
def store(s3, tmp_path, monkeypatch) -> None:
    """The two buckets of the guide, with 300 images and the miniature VTAB archives; an MLflow database for all
    commands."""
    for bucket in ("bucket", "corpus"):
        make_bucket(bucket)
    generator = np.random.default_rng(0)
    for i in range(300):
        picture = tinted(generator, 20, 20, i % 3)
        storage.write_bytes(f"s3://corpus/raw/{'abc'[i % 3]}/{i:03d}.png", cv2.imencode(".png", picture)[1].tobytes())
    storage.copy_tree(miniature.write("all", str(tmp_path / "archives"), per_class=3), "s3://corpus/vtab")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("VIT_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cluster() -> Iterator["Cluster"]:
    """Local cluster: a head without CPUs and two nodes with one CPU each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Starts a command of the guide. Kills commands that still run at the end of the test."""
    started: list[Command] = []

    def start(line: str, *more: str) -> Command:
        started.append(Command(line, *more))
        return started[-1]

    yield start
    for command in started:
        command.kill()


def newest() -> int:
    """Step of the newest checkpoint; 0 without checkpoints."""
    return max((found.step for found in checkpoints.find(RUN)), default=0)


def resumed(training: Command, line: str, step: int) -> int:
    """Waits until a training command has resumed on the requested number of workers. Returns the step."""
    if step:
        workers = int(re.search(r"--workers (\d+)", line)[1]) // 8
        step = int(
            training.until(rf"{LOGGED}resumed from {RUN}/checkpoints/step-(\d+){ATTEMPT} on {workers} workers?$")[1]
        )
    training.until(LOGGED + r"step \d+/\d+  loss ")
    return step


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_guide(store, start, request):
    training = None
    for line in COMMANDS:
        began, step = time.monotonic(), newest()
        if "preemption.py" in line:
            cluster = request.getfixturevalue("cluster")
            node = min(cluster.worker_nodes, key=lambda node: node.node_id)  # of the two on this machine
            drain = start(line, "--address", cluster.address, "--node-id", node.node_id)
            assert f"draining {node.node_id}" in drain.end()
            saved = int(training.until(LOGGED + r"step (\d+)/\d+  saved, and the workers leave")[1])
            training.until(rf"{LOGGED}resumed from {RUN}/checkpoints/step-0*{saved}{ATTEMPT} on 2 workers")
            assert "starting again" not in training.end()  # draining is not a failure
        elif "--min-workers" in line:
            training = start(line, "--address", request.getfixturevalue("cluster").address)
            assert resumed(training, line, step) >= step
        elif "pretrain.py" in line and "--output" in line and "--dry-run" not in line:
            training = start(line)
            continued = resumed(training, line, step)
            assert continued >= step
            while newest() == continued and training.process.poll() is None:
                time.sleep(0.1)
            training.stop()
        elif "--every" in line:
            scheduler = start(line)
            scheduler.until(EXPECTED_OUTPUT["--every"])
            with pytest.raises(subprocess.TimeoutExpired):  # waits for the next pass
                scheduler.process.wait(3)
            scheduler.stop()
        else:
            if "--repair" in line:
                weights = storage.join(checkpoints.find(RUN)[-1].uri, "model.safetensors")
                storage.write_bytes(weights, storage.read_bytes(weights)[:-10])
            elif "upload" in line:
                subprocess.run([sys.executable, "-c", UNDELIVERED_RUN], timeout=120)
            text = start(line).end(1 if "--repair" in line else 0)
            expected = next((pattern for part, pattern in EXPECTED_OUTPUT.items() if part in line), "")
            assert re.search(expected, text, re.MULTILINE), text
        print(f"{time.monotonic() - began:4.0f} s  {line}", flush=True)

    left = [found.step for found in checkpoints.find(RUN)]
    assert left == [STEPS - 40, STEPS - 20, STEPS]  # --repair and --prune only list
    client = mlflow.MlflowClient()
    experiments = {found.name: found.experiment_id for found in client.search_experiments()}
    assert experiments.keys() >= {"prepare", "pretrain", "transfer", "evaluate"}
    (run,) = client.search_runs([experiments["pretrain"]])
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    assert max(steps) == STEPS
