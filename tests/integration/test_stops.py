"""All ways to stop a run: the current step is saved, MLflow has the reason, and
the next start continues from that step."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import mlflow
import numpy as np
import psutil
import pytest

from pipeline import config as configuration
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.training.config import EngineConfig, ModelConfig, PretrainConfig
from pipeline.weights import checkpoints
from tests.rayhead import ray_head
from tests.runs import pretrain_config

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture
def run(tmp_path) -> PretrainConfig:
    """A run of thousands of short steps without periodic checkpoints; config.yaml in its folder."""
    import cv2

    pictures = np.random.default_rng(0).integers(0, 255, (64, 20, 20, 3), dtype=np.uint8)
    rows = ((f"{i}", cv2.imencode(".png", picture)[1].tobytes(), i % 4, 20, 20) for i, picture in enumerate(pictures))
    write_dataset(str(tmp_path / "data"), rows, classes=["a", "b", "c", "d"])
    config = pretrain_config(
        data=str(tmp_path / "data"),
        output=str(tmp_path / "run"),
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        steps="4000steps",
        batch_size=8,
        image_size=16,
        model=ModelConfig(variant="mu/8", depth=1),
        augment=Augment(size=16),
        engine=EngineConfig(precision="fp32"),
        lanes=4,
        log_every="1steps",
        wait_warning=1.0,
        checkpoint_every="100000steps",
        cpus_per_worker=0.5,
        register=None,
    )
    (tmp_path / "config.yaml").write_text(configuration.to_yaml(config))
    return config


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Ends processes that a failed test has left running."""
    before = set(psutil.Process().children(recursive=True))
    yield
    for process in set(psutil.Process().children(recursive=True)) - before:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def record(config: PretrainConfig) -> mlflow.entities.Run:
    """The one MLflow run."""
    client = mlflow.MlflowClient(config.runtime.tracking_uri)
    (found,) = client.search_runs([client.get_experiment_by_name("pretrain").experiment_id])
    return found


def content(log: Path) -> str:
    """The text of a log. A terminal may show "^C" between two bytes of one character."""
    return log.read_text(errors="replace")


def until(log: Path, pattern: str, seconds: float = 900) -> re.Match:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := re.search(pattern, content(log)):
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {pattern} in {seconds} s:\n{content(log)}")


def in_session(command: list[str], log: IO) -> subprocess.Popen:
    """A session, and in it a process group, without a terminal: as under systemd or cron."""
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


class Terminal:
    """A pseudo-terminal of 200 columns with a command in the foreground. The output
    is written to `log` as plain text."""

    def __init__(self, command: list[str], log: Path):
        log.touch()
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            os.environ["COLUMNS"] = "200"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background processes may ignore it
            os.execv(command[0], command)
        self.reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self.reader.start()

    def _read(self, log: Path) -> None:
        with open(log, "wb") as out, contextlib.suppress(OSError):
            while shown := os.read(self.fd, 1 << 16):
                out.write(re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown))
                out.flush()

    def press_control_c(self) -> None:
        os.write(self.fd, b"\x03")

    def close(self) -> None:
        """Closes the terminal, as when the connection is lost: the kernel sends SIGHUP to the process group."""
        os.close(self.fd)

    def wait(self, seconds: float = 300) -> int:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        raise AssertionError("still running")


def saved_step(config: PretrainConfig, reason: str) -> int:
    """What a stopped run leaves behind; the step it continues from."""
    tags = record(config).data.tags
    assert record(config).info.status == "KILLED"
    assert tags["reason"] == reason
    assert f"**Stopped:** {reason}" in tags["mlflow.note.content"]
    assert not os.path.exists(os.path.join(config.runtime.output, "launch.json"))
    return checkpoints.latest(config.runtime.output).step


def check_continues(config: PretrainConfig, command: list[str], log: Path, saved: int) -> None:
    """The next start continues from this step, and the reason of the last stop is removed."""
    with open(log, "w") as out:
        job = in_session(command, out)
        until(log, rf"resumed from .*step-{saved:08d}")
        until(log, rf"step {saved + 1}/")
        assert "reason" not in record(config).data.tags
        job.terminate()
        assert job.wait(300) == 143, content(log)
    assert saved_step(config, "stopped with SIGTERM") > saved


def send_to_all(pid: int, number: int) -> None:
    """Signals every process of the job in all process groups, as Slurm's scancel and systemd do."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@pytest.mark.parametrize(
    "send",
    [os.kill, os.killpg, send_to_all],
    ids=["to the driver", "to its group, as timeout does", "to every process, as Slurm and systemd do"],
)
def test_sigterm_saves_the_current_step(run, tmp_path, send):
    log = tmp_path / "log"
    command = [sys.executable, "jobs/pretrain.py", "--config", str(tmp_path / "config.yaml")]
    with open(log, "w") as out:
        job = in_session(command, out)
        until(log, r"step 30/")
        send(job.pid, signal.SIGTERM)
        assert job.wait(300) == 143, content(log)
    saved = saved_step(run, "stopped with SIGTERM")
    text = content(log)
    assert f"step {saved}/4000  saved, and the workers leave" in text
    assert int(re.findall(r"step (\d+)/\d+ .*loss", text)[-1]) == saved  # nothing that was computed is lost
    assert "Traceback" not in text
    check_continues(run, command, tmp_path / "again", saved)


def test_control_c_in_a_terminal(run, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "jobs/pretrain.py", "--config", str(tmp_path / "config.yaml")]
    terminal = Terminal(command, log)
    until(log, r"step 30/")
    terminal.press_control_c()
    assert terminal.wait() == 130, content(log)
    saved = saved_step(run, "stopped with Ctrl-C")
    assert f"step {saved}/4000  saved, and the workers leave" in content(log)
    assert "Traceback" not in content(log)
    check_continues(run, command, tmp_path / "again", saved)


def test_closing_the_terminal_saves_the_current_step(run, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "jobs/pretrain.py", "--config", str(tmp_path / "config.yaml")]
    terminal = Terminal(command, log)
    until(log, r"step 30/")
    terminal.close()
    assert terminal.wait() == 129
    saved = saved_step(run, "stopped because its terminal was closed (SIGHUP)")
    assert saved >= 30
    check_continues(run, command, tmp_path / "again", saved)


def test_control_c_that_ends_the_reader_of_a_pipe_too(run, tmp_path):
    """`jobs/pretrain.py | tee log` in a terminal: nobody reads the last lines, and the step is saved all the same."""
    log, code = tmp_path / "log", tmp_path / "code"
    job = f"{sys.executable} jobs/pretrain.py --config {tmp_path}/config.yaml"
    terminal = Terminal(["/bin/bash", "-c", f"trap : INT; {{ {job}; echo $? > {code}; }} 2>&1 | cat"], log)
    until(log, r"step 30/")
    terminal.press_control_c()
    terminal.wait()
    deadline = time.monotonic() + 300
    while not code.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert code.read_text() == "130\n"
    assert saved_step(run, "stopped with Ctrl-C") >= 30


def test_second_control_c_exits_at_once_and_reports_what_was_saved(run, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "jobs/pretrain.py", "--config", str(tmp_path / "config.yaml"), "--log-every", "5steps"]
    terminal = Terminal([*command, "--steps", "400000steps"], log)
    until(log, r"step 30/")
    workers = [
        p
        for p in psutil.Process(terminal.pid).children(recursive=True)
        if "train_worker" in " ".join(p.cmdline()) or "RayTrainWorker" in p.name() + " ".join(p.cmdline())
    ]
    assert workers
    for worker in workers:
        worker.suspend()  # a step that never ends
    terminal.press_control_c()
    until(log, "stopping: the workers finish their step")
    terminal.press_control_c()
    assert terminal.wait() == 130, content(log)
    assert "stopped at once: the next start begins at step 0" in content(log)
    assert record(run).data.tags["reason"] == "stopped with Ctrl-C"
    _, alive = psutil.wait_procs(workers, timeout=60)  # a busy kernel takes a moment to end them
    assert [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE] == []


def test_pre_stop_hook_of_the_head_pod(run, tmp_path, monkeypatch):
    """Kubernetes runs infra/stop_jobs.py in the pod before it stops the pod: no job is left when the hook returns."""
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    (tmp_path / "home").mkdir()
    log = tmp_path / "log"
    with ray_head(tmp_path / "home", "4a1c" * 16, keep=("RAY_JOB_STOP_WAIT_TIME_S",)) as (address, _, environment):
        runtime = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
        options = [f"--address={address}", f"--runtime-env-json={runtime}"]
        job = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), "--config", str(tmp_path / "config.yaml")]
        with open(log, "w") as out:
            submit = ["ray", "job", "submit", *options, "--", *job]
            submitted = subprocess.Popen(submit, env=environment, stdout=out, stderr=out)
            until(log, r"step 30/")
            hook = [sys.executable, "infra/stop_jobs.py", "--address", address, "--grace", "75"]
            done = subprocess.run(hook, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
            assert (done.returncode, done.stderr) == (0, "")
            saved = saved_step(run, "stopped with SIGTERM")
            submitted.wait(300)
            nothing = subprocess.run(hook, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
            assert (nothing.returncode, nothing.stdout) == (0, "stop_jobs: no job runs\n")
    assert f"step {saved}/4000  saved, and the workers leave" in content(log)


@pytest.mark.parametrize("wait", ["60", None], ids=["head as infra/ starts it", "Ray's own 3 s"])
def test_ray_job_stop(run, tmp_path, monkeypatch, wait):
    if wait:
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", wait)
    (tmp_path / "home").mkdir()
    log = tmp_path / "log"
    with ray_head(tmp_path / "home", "4a1c" * 16, keep=("RAY_JOB_STOP_WAIT_TIME_S",)) as (address, _, environment):
        runtime = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
        options = [f"--address={address}", "--submission-id=stopped", f"--runtime-env-json={runtime}"]
        job = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), "--config", str(tmp_path / "config.yaml")]
        with open(log, "w") as out:
            submitted = subprocess.Popen(
                ["ray", "job", "submit", *options, "--", *job], env=environment, stdout=out, stderr=out
            )
            until(log, r"step 30/")
            stop = ["ray", "job", "stop", f"--address={address}", "stopped"]
            subprocess.run(stop, env=environment, check=True, timeout=120)
            submitted.wait(300)
    warned = "`ray job stop` kills this job after 3 s" in content(log)
    assert warned == (wait is None), content(log)
    if wait:
        saved = saved_step(run, "stopped with SIGTERM")
        assert f"step {saved}/4000  saved, and the workers leave" in content(log)
