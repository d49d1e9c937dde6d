"""MLflow's own server, for tests that need its answers over HTTP."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.ports import free_port


@contextmanager
def mlflow_server(folder: Path, port: int | None = None, password: str | None = None) -> Iterator[str]:
    """Runs an MLflow server on loopback. password: that of the user admin, whom all requests must name."""
    port = port or free_port()
    environment = dict(os.environ)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", f"{folder}/artifacts", "--port", str(port), "--workers", "1"]
    if password:
        command += ["--app-name", "basic-auth"]
        accounts = f"default_permission = READ\ndatabase_uri = sqlite:///{folder}/accounts.db\nadmin_username = admin"
        accounts += f"\nadmin_password = {password}\nauthorization_function = "
        accounts += "mlflow.server.auth:authenticate_request_basic_auth\n"
        (folder / "accounts.ini").write_text(f"[mlflow]\n{accounts}")
        environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "accounts.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "k"}
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(3000):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.2)
        else:
            raise AssertionError((folder / "server.log").read_text())
        yield address
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.terminate()
        process.wait(120)


def count_runs(address: str, password: str) -> int:
    """How many runs a server has whose user admin has this password."""
    headers = {"Content-Type": "application/json"}
    headers["Authorization"] = "Basic " + b64encode(f"admin:{password}".encode()).decode()
    body = json.dumps({"experiment_ids": [str(number) for number in range(5)]}).encode()
    request = urllib.request.Request(f"{address}/api/2.0/mlflow/runs/search", body, headers)
    return len(json.load(urllib.request.urlopen(request, timeout=60)).get("runs", []))
