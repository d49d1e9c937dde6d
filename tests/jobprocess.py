"""Runs jobs in separate processes, like a user."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def job(
    name: str, *arguments: str, cwd: Path, timeout: int = 280, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a job and waits for it. Its runs are in an MLflow database in `cwd`."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{cwd}/mlflow.db", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def running_jobs(folder: Path, job: str = "") -> list[psutil.Process]:
    """The running stages (of one job, or of all) of the pipeline that writes to `folder`, on any node of this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        script = Path(words[1] if len(words) > 1 else "")
        is_stage = script.parent.name == "jobs" and script.stem != "pipeline" and job in ("", script.stem)
        if is_stage and any(f"{folder}/" in word for word in words):
            found.append(process)
    return found


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)
