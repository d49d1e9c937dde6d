"""Cost of tracking per training step: the time of `Run.log` for several states of the server.

    python tests/benchmarks/tracking_cost.py

A real MLflow server over HTTP that answers, that hangs (stopped with SIGSTOP), and that is gone (killed); in each state 3,000
steps of 12 metrics, one every 2 ms. The bound is 10 ms a step. Writes tests/benchmarks/results/tracking_cost.json.
"""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).parents[2]
STEPS = 3000
sys.path.insert(0, str(PROJECT))

from pipeline.tracking import start_run  # noqa: E402
from pipeline.tracking.server import client  # noqa: E402


def serve(folder: str, port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(f"{folder}/server.log", "a") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return process
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server did not start")


def steps(run, first: int) -> dict[str, float]:
    """Milliseconds that the calls took."""
    values = dict.fromkeys((f"train/metric{i}" for i in range(12)), 1.5)
    taken = []
    for step in range(first, first + STEPS):
        begin = time.perf_counter()
        run.log(values, step)
        taken.append(1e3 * (time.perf_counter() - begin))
        time.sleep(0.002)
    shares = {"median": 50, "99%": 99, "99.9%": 99.9}
    return {name: round(float(np.percentile(taken, share)), 3) for name, share in shares.items()} | {
        "largest": round(max(taken), 3)
    }


def main() -> None:
    result: dict = {"unit": "milliseconds of Run.log with 12 metrics", "steps": STEPS}
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        os.environ["VIT_SPOOL"] = f"{folder}/spool"
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        uri = f"http://127.0.0.1:{port}"
        server = serve(folder, port)
        run = start_run("pretrain", "cost", tracking_uri=uri)
        result["server answers"] = steps(run, 1)
        os.killpg(server.pid, signal.SIGSTOP)
        result["server hangs"] = steps(run, 1 + STEPS)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        result["server is gone"] = steps(run, 1 + 2 * STEPS)
        server = serve(folder, port)
        delivered = run.finish(timeout=120)
        arrived = sorted(point.step for point in client(uri).get_metric_history(run.id, "train/metric0"))
        result["all delivered once in the end"] = delivered and arrived == list(range(1, 1 + 3 * STEPS))
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    result["host"] = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    target = PROJECT / "tests" / "benchmarks" / "results" / "tracking_cost.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
