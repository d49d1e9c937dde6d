"""infra/slurm/pretrain.sbatch and infra/ray_node.py: run by bash with substitutes for srun and scontrol, and by Slurm itself where it is
installed. Ray's nodes, the token and the training are real.

Slurm stops a job in two ways: a signal to the batch script alone (--signal=B:, scancel --batch) and a signal to all
processes (scancel, preemption, requeue)."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.weights import checkpoints
from tests.rayhead import STARTS
from tests.slurmcluster import DAEMONS, SUBSTITUTES, allocation, slurm
from tests.submitters import ROOT, User, user

SCRIPT = ROOT / "infra" / "slurm" / "pretrain.sbatch"
SMALL = ["--batch-size", "8", "--lanes", "2", "--validation", "None", "--augment.crop", "squash", "--register", "None"]
LONG = [*SMALL, "--steps", "100000steps", "--checkpoint-every", "100000steps", "--log-every", "1steps"]


@pytest.fixture
def submitter(tmp_path):
    with user(tmp_path, SUBSTITUTES) as found:
        yield found


def test_the_batch_script_trains(submitter):
    environment = submitter.environment | allocation(submitter.folder, 1)
    for _ in range(STARTS):  # a Ray node ends when its agent does not start in time, which it may not on a busy machine
        command = ["bash", SCRIPT, *SMALL, "--steps", "2"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        if "Ray did not start in time" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--nodelist=node1" in submitter.calls
    start = (
        f"start --head --node-ip-address=127.0.0.1 --port={environment['RAY_PORT']} --block --num-cpus 1 --num-gpus 1"
    )
    assert start in submitter.calls
    (commit,) = (submitter.folder / "out" / "checkpoints").glob("*/COMMIT.json")
    assert json.loads(commit.read_text())["step"] == 2
    assert submitter.left() == []


def test_the_batch_script_requires_an_mlflow_server(submitter):
    environment = submitter.environment | allocation(submitter.folder, 1)
    del environment["MLFLOW_TRACKING_URI"]
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "MLFLOW_TRACKING_URI: is not set: give the address of your MLflow server" in done.stderr


def until(log: Path, pattern: str, seconds: float = 600) -> re.Match:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.exists() and (found := re.search(pattern, log.read_text())):
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {pattern} in {seconds} s:\n{log.read_text() if log.exists() else ''}")


def saved(submitter: User, log: Path) -> int:
    """The step that a stopped job has saved; it is also the last one that was computed."""
    text = log.read_text()
    step = checkpoints.latest(str(submitter.folder / "out")).step
    assert f"step {step}/100000  saved, and the workers leave" in text, text
    assert int(re.findall(r"step (\d+)/\d+ .*loss", text)[-1]) == step
    return step


# ---------------------------------------------------------------- with substitutes for Slurm


def to_the_script(job: subprocess.Popen, submitter: User) -> None:
    """As `#SBATCH --signal=B:TERM@180` and `scancel --batch --signal TERM`."""
    job.send_signal(signal.SIGTERM)


def to_all(job: subprocess.Popen, submitter: User) -> None:
    """As `scancel`, a preemption and a requeue: all processes of the tasks and of the batch script."""
    for process in submitter.processes():
        if "tests.slurmcluster" not in (process.info["cmdline"] or []):  # srun
            process.send_signal(signal.SIGTERM)


def start(submitter: User, log: Path, pattern: str) -> subprocess.Popen:
    """A batch script on two nodes, after its log has the pattern."""
    environment = submitter.environment | allocation(submitter.folder, 2)
    for _ in range(STARTS):
        with open(log, "w") as out:
            job = subprocess.Popen(["bash", SCRIPT, *LONG], env=environment, stdout=out, stderr=out)
        if until(log, rf"{pattern}|error: Ray did not start")[0] != "error: Ray did not start":
            return job
        job.wait(60)
    raise AssertionError(log.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("send", [to_the_script, to_all])
def test_a_stopped_job_saves_its_step_and_the_next_submission_continues(submitter, send, tmp_path):
    log, again = tmp_path / "log", tmp_path / "again"
    job = start(submitter, log, r"step 20/")
    assert sum(process.name() == "raylet" for process in submitter.processes()) == 2
    send(job, submitter)
    assert job.wait(300) == 143, log.read_text()
    step = saved(submitter, log)
    assert submitter.left() == []
    job = start(submitter, again, rf"step {step + 5}/")
    assert re.search(rf"resumed from .*step-{step:08d}", again.read_text())
    send(job, submitter)
    assert job.wait(300) == 143, again.read_text()
    assert saved(submitter, again) > step


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_lost_node_ends_the_job(submitter, tmp_path):
    """Slurm then requeues it if the machine has failed."""
    log = tmp_path / "log"
    job = start(submitter, log, r"step 5/")
    raylet = next(p for p in submitter.processes() if p.name() == "raylet" and "--head" not in p.info["cmdline"])
    raylet.kill()
    assert job.wait(400) == 1, log.read_text()
    assert "error: Ray's nodes have ended before the training" in log.read_text()
    assert submitter.left() == []


# ---------------------------------------------------------------- with Slurm itself


@pytest.fixture(scope="module")
def real_slurm():
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.skip("needs root and Slurm: apt-get install slurmctld slurmd slurm-client munge")
    with slurm(2) as environment:
        yield environment


class Job:
    """pretrain.sbatch, submitted to Slurm, on two nodes with one CPU and one GPU."""

    def __init__(self, submitter: User, environment: dict[str, str], *more: str):
        self.environment = submitter.environment | environment
        self.log = submitter.folder / "job.log"
        options = ["--nodes=2", "--cpus-per-task=1", "--gpus-per-node=1", f"--output={self.log}", *more]
        self.id = self.run("sbatch", "--parsable", *options, str(SCRIPT), *LONG, cwd=submitter.folder).strip()

    def run(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def field(self, name: str) -> str:
        return re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", self.id))[1]

    def wait(self, seconds: float = 600) -> str:
        """The state of the job after its end."""
        deadline = time.monotonic() + seconds
        while (state := self.field("JobState")) in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(1)
        return state


@pytest.fixture
def slurm_user(tmp_path, real_slurm):
    with user(tmp_path) as found:
        yield found
        subprocess.run(["scancel", "--user=root"], env=found.environment | real_slurm)
        subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=found.environment | real_slurm)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_slurm_signals_the_script_before_the_time_limit(slurm_user, real_slurm):
    job = Job(slurm_user, real_slurm, "--time=00:04:00", "--signal=B:TERM@90")
    until(job.log, r"step 20/")
    job.wait()
    assert job.field("ExitCode") == "143:0"
    saved(slurm_user, job.log)
    assert "TIME LIMIT" not in job.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", [["scancel", "--batch", "--signal", "TERM"], ["scancel"]], ids=" ".join)
def test_scancel_saves_the_step(slurm_user, real_slurm, how):
    job = Job(slurm_user, real_slurm)
    until(job.log, r"step 20/")
    job.run(*how, job.id)
    job.wait()
    saved(slurm_user, job.log)
    assert slurm_user.left() == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", ["requeue", "preemption"])
def test_a_requeued_job_continues_from_the_saved_step(slurm_user, real_slurm, how):
    """A preemption first signals the steps alone; Ray's nodes survive that. At the end of GraceTime it is a requeue."""
    job = Job(slurm_user, real_slurm)
    until(job.log, r"step 20/")
    if how == "requeue":
        job.run("scontrol", "requeue", job.id)
    else:
        job.run("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 5")
    step = int(until(job.log, r"step (\d+)/100000  saved, and the workers leave")[1])
    until(job.log, rf"resumed from .*step-{step:08d}[\s\S]*step {step + 5}/")
    assert job.field("Restarts") == "1"
