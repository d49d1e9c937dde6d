"""Every way in which a run is told to stop: its step is saved, MLflow knows why it ended, the next start goes on from there."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import mlflow
import numpy as np
import pytest

from pipeline import config as configuration
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.training.config import EngineConfig, ModelConfig, PretrainConfig
from pipeline.weights import checkpoints
from tests.rayhead import ray_head
from tests.runs import pretrain_config

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def run(tmp_path) -> PretrainConfig:
    """A run of thousands of short steps that saves nothing by itself; config.yaml in its folder."""
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


def record(config: PretrainConfig) -> mlflow.entities.Run:
    """The one MLflow run."""
    client = mlflow.MlflowClient(config.runtime.tracking_uri)
    (found,) = client.search_runs([client.get_experiment_by_name("pretrain").experiment_id])
    return found


def until(log: Path, pattern: str, seconds: float = 300) -> re.Match:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := re.search(pattern, log.read_text(errors="replace")):
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {pattern} in {seconds} s:\n{log.read_text()}")


def start(command: list[str], out: IO) -> subprocess.Popen:
    """A process group of its own, which hears Ctrl-C even when the tests run in a background that ignores it."""
    heard = (
        f"import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv({command[0]!r}, {command!r})"
    )
    return subprocess.Popen([sys.executable, "-c", heard], cwd=ROOT, stdout=out, stderr=out, start_new_session=True)


def check_stopped(config: PretrainConfig, log: str, reason: str) -> int:
    """What a stopped run leaves behind; the step it continues from."""
    saved = int(re.search(r"step (\d+)/\d+  saved, and the workers leave", log)[1])
    assert checkpoints.latest(config.runtime.output).step == saved
    steps = [int(step) for step in re.findall(r"step (\d+)/\d+  loss", log)]
    assert steps[-1] == saved
    tags = record(config).data.tags
    assert record(config).info.status == "KILLED"
    assert tags["reason"] == reason
    assert f"**Stopped:** {reason}" in tags["mlflow.note.content"]
    assert not os.path.exists(os.path.join(config.runtime.output, "launch.json"))
    return saved


@pytest.mark.parametrize(
    ("send", "number", "code", "reason"),
    [(os.killpg, signal.SIGINT, 130, "stopped with Ctrl-C"), (os.kill, signal.SIGTERM, 143, "stopped with SIGTERM")],
    ids=["Ctrl-C in a terminal, to the whole group", "SIGTERM to the driver"],
)
def test_stopped_run_continues_from_its_very_step(run, tmp_path, send, number, code, reason):
    log = tmp_path / "log"
    command = [sys.executable, "jobs/pretrain.py", "--config", str(tmp_path / "config.yaml")]
    with open(log, "w") as out:
        first = start(command, out)
        until(log, r"step 30/")
        send(first.pid, number)
        assert first.wait(120) == code, log.read_text()
    saved = check_stopped(run, log.read_text(), reason)
    again = tmp_path / "again"
    with open(again, "w") as out:
        second = start(command, out)
        until(again, rf"resumed from .*step-{saved:08d}")
        until(again, rf"step {saved + 1}/")
        assert "reason" not in record(run).data.tags
        second.terminate()
        assert second.wait(120) == 143
    assert check_stopped(run, again.read_text(), "stopped with SIGTERM") > saved


def test_sigterm_to_all_processes_is_a_stop_though_ray_ends_before_it_can_save(run, tmp_path):
    """As Slurm's scancel sends it: embedded Ray ends by itself, so that no step can be saved. It is said, and no failure."""
    log = tmp_path / "log"
    with open(log, "w") as out:
        job = start([sys.executable, "jobs/pretrain.py", "--config", str(tmp_path / "config.yaml")], out)
        until(log, r"step 30/")
        os.killpg(job.pid, signal.SIGTERM)
        assert job.wait(120) == 143, log.read_text()
    text = log.read_text()
    assert "the next start continues from the last checkpoint" in text or "saved, and the workers leave" in text
    assert "Traceback" not in text
    assert record(run).info.status == "KILLED"
    assert record(run).data.tags["reason"] == "stopped with SIGTERM"


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
            submitted.wait(120)
    warned = "`ray job stop` kills this job after 3 s" in log.read_text()
    assert warned == (wait is None), log.read_text()
    if wait:
        check_stopped(run, log.read_text(), "stopped with SIGTERM")
