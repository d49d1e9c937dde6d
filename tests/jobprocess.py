"""The jobs in processes of their own, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def job(
    name: str, *arguments: str, cwd: Path, timeout: int = 280, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A job of jobs/, ended; its runs are in an MLflow database in `cwd`."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{cwd}/mlflow.db", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
