"""Records are neither lost nor duplicated when a real MLflow server fails,
refuses requests and recovers, or when writers die."""

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import ViewType

from pipeline.tracking import names, start_run
from tests.faultproxy import FaultProxy
from tests.mlflowserver import mlflow_server

ROOT = Path(__file__).parents[2]
WRITER = """
    import os, sys
    from pipeline.tracking import names, run, start_run
    run.SEND_EVERY, run.RETRY_AT_MOST = 0.05, 0.2
    uri, experiment, run_id, first, last, how = sys.argv[1:]
    writer = start_run(experiment, "random", run_id=run_id, tracking_uri=uri)
    for step in range(int(first), int(last)):
        writer.log({names.LOSS: step / 2}, step=step)
    print("logged", flush=True)
    if how == "dies":
        os._exit(9)
    writer.finish(timeout=1)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as address, FaultProxy(address) as proxy:
        yield proxy, mlflow.MlflowClient(address)


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(4))
def test_no_record_is_lost_in_random_sequences_of_faults(server, tmp_path, monkeypatch, seed):
    """Writers that finish or die, uploads, a run that is deleted and restored, a server that resets, fails and loses answers."""
    monkeypatch.setenv("VIT_SPOOL", str(tmp_path / "spool"))
    (proxy, client), draw = server, random.Random(seed)
    proxy.fault = lambda method, path, n: None
    experiment = f"random {seed}"
    run = start_run(experiment, "random", tracking_uri=proxy.endpoint)
    assert run.finish(timeout=60)
    promised: dict[int, float] = {}
    for first in range(0, 80, 10):
        faults = draw.choice([(), ("reset",), ("500",), ("reset", "500", "lost"), ("lost",)])
        rate, deleted = draw.random(), draw.random() < 0.25
        proxy.fault = lambda method, path, n, f=faults, r=rate: draw.choice(f) if f and draw.random() < r else None
        if deleted:
            client.delete_run(run.id)
        action = draw.choice(["writes", "dies", "upload"])
        if action == "upload":
            python("-m", "pipeline.tracking", "upload")
        else:
            arguments = [proxy.endpoint, experiment, run.id, str(first), str(first + 10), action]
            if "logged" in python("-c", textwrap.dedent(WRITER), *arguments).stdout:
                promised |= {step: step / 2 for step in range(first, first + 10)}
        if deleted:
            client.restore_run(run.id)
    proxy.fault = lambda method, path, n: None
    done = python("-m", "pipeline.tracking", "upload")
    assert done.returncode == 0, done.stderr
    folder = client.get_experiment_by_name(experiment).experiment_id
    runs = client.search_runs([folder], run_view_type=ViewType.ALL)  # a writer of a deleted run starts another one
    points = [point for found in runs for point in client.get_metric_history(found.info.run_id, names.LOSS)]
    history = [(point.step, point.value) for point in points]
    assert dict(history) == promised
    assert len(history) == len(promised)
    assert not list((tmp_path / "spool").glob("*/run.json"))
