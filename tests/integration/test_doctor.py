"""Every check of the doctor, on a machine where it passes and on one where it fails; the job itself; the cheap
checks."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline import cluster, storage
from pipeline.data.format import write_dataset
from pipeline.errors import UserError
from pipeline.operations import doctor
from pipeline.operations.doctor import authentication, machine, pretraining, store, tracking
from pipeline.training.config import PretrainConfig
from pipeline.training.recipes import RECIPES
from tests.faultproxy import FaultProxy
from tests.ports import free_port
from tests.runs import changed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A user without tokens, credentials or settings."""
    for name in list(os.environ):
        if name.startswith(("RAY_", "MLFLOW_", "TORCH_EXTENSIONS")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("data") / "set")
    picture = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    write_dataset(root, ((f"{i:04d}", picture, i % 2, 8, 8) for i in range(64)), classes=["a", "b"])
    return root


def config(dataset, output, **changes) -> PretrainConfig:

    return changed(RECIPES["demo"](), data=dataset, validation=None, output=str(output), **changes)


# ---------------------------------------------------------------- authentication


def write_token(home: Path, mode: int = 0o600) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("a-token")
    (home / ".ray" / "auth_token").chmod(mode)


@pytest.mark.parametrize(
    ("mode", "address", "token", "status"),
    [
        ("", None, False, "ok"),  # Ray makes a token for a cluster of its own
        ("token", "10.0.0.1:6379", True, "ok"),
        ("", "auto", True, "ok"),  # Ray finds the token of this machine's cluster
        ("", "10.0.0.1:6379", True, "warning"),  # ... but sends none to an address
        ("disabled", None, True, "warning"),
        ("token", "10.0.0.1:6379", False, "error"),
        ("tokn", None, True, "error"),
    ],
)
def test_authentication(home, monkeypatch, mode, address, token, status):
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if token:
        write_token(home)
    found = authentication.authentication(address)
    assert found.status == status
    assert bool(found.remedy) == (status != "ok")


def test_a_token_in_the_environment_counts(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token")
    assert authentication.authentication("10.0.0.1:6379").status == "ok"
    assert authentication.token_file().status == "ok"


def test_a_token_that_others_can_read(home):
    assert authentication.token_file().status == "ok"
    write_token(home, 0o644)
    found = authentication.token_file()
    assert (found.status, found.remedy) == ("warning", f"chmod 600 {home}/.ray/auth_token")
    cluster.protect_token()  # what every job does once Ray runs
    assert authentication.token_file().status == "ok"


# ---------------------------------------------------------------- tracking server


@contextmanager
def server(code: int = 200, body: bytes = b'{"experiment": {}}', delay: float = 0.0):
    """Responds like MLflow's API; `.seen` has the headers of the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            httpd.seen.append((self.path, dict(self.headers)))
            time.sleep(delay)
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.seen, httpd.daemon_threads = [], True
    httpd.handle_error = lambda *_: None  # a client that gave up
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield httpd, f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_a_working_tracking_server(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret-password")
    with server() as (httpd, uri):
        found = tracking.tracking_server(uri)
    assert found.status == "ok"
    ((path, headers),) = httpd.seen
    assert path == "/api/2.0/mlflow/experiments/get?experiment_id=0"  # data, not /health
    assert base64.b64decode(headers["Authorization"].split()[1]) == b"admin:secret-password"
    assert "secret-password" not in str(found)


def test_credentials_of_a_file_and_of_the_address(home):
    (home / ".mlflow").mkdir()
    (home / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = 50%\n"
    )
    with server() as (httpd, uri):
        tracking.tracking_server(uri)
        found = tracking.tracking_server(uri.replace("//", "//you:hidden@"))
    assert [base64.b64decode(h["Authorization"].split()[1]) for _, h in httpd.seen] == [b"me:50%", b"me:50%"]
    assert "hidden" not in str(found)


@pytest.mark.parametrize(
    ("code", "body", "message", "remedy"),
    [
        (401, b"", "answers 401", "MLFLOW_TRACKING_PASSWORD"),
        (403, b"", "answers 403", "--allowed-hosts"),
        (500, b"", "answers 500", "log"),
        (200, b"<html>a hotel's login page</html>", "does not respond like an MLflow server", "MLFLOW_TRACKING_URI"),
        (200, b"[]", "does not respond like an MLflow server", "MLFLOW_TRACKING_URI"),
    ],
)
def test_a_broken_tracking_server(home, code, body, message, remedy):
    with server(code, body) as (_, uri):
        found = tracking.tracking_server(uri)
    assert found.status == "error"
    assert message in found.message
    assert remedy in found.remedy


def test_an_unreachable_or_hanging_tracking_server(home):
    found = tracking.tracking_server(f"http://127.0.0.1:{free_port()}")
    assert found.status == "error"
    assert "refused" in found.message
    with server(delay=1.0) as (_, uri):
        assert "did not answer in 0.2 s" in tracking.tracking_server(uri, patience=0.2).message
    assert tracking.tracking_server("sqlite:////tmp/mlflow.db").status == "ok"


# ---------------------------------------------------------------- cheap checks of every job


def test_a_tracking_server_whose_name_is_unknown(home):
    found = tracking.tracking_server("http://mlflow.invalid:5000")
    assert (found.status, found.message) == ("error", "the name mlflow.invalid cannot be resolved here")
    assert "every node" in found.remedy


def test_preflight_is_fast_and_gives_no_false_alarm(home, caplog):
    with server(delay=30.0) as (_, uri):
        start = time.perf_counter()
        doctor.preflight(None, uri)
        assert time.perf_counter() - start < 15  # 0.4 s on an idle machine
    with server() as (_, uri):
        doctor.preflight(None, uri)
    doctor.preflight(None, None)
    assert caplog.text == ""


def test_preflight_warns_about_a_server_and_fails_without_a_token(home, monkeypatch, caplog):
    with server(403) as (_, uri):
        doctor.preflight(None, uri)
    assert "answers 403; add 127.0.0.1" in caplog.text
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UserError, match="no token was found; copy the head's token"):
        doctor.preflight("10.0.0.1:6379", None)


# ---------------------------------------------------------------- storage


def statuses(findings) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


def test_a_store_that_works(s3):
    found = statuses(store.writable(f"{s3}/run"))
    assert found == dict.fromkeys(("output", "multipart upload", "conditional write", "checksum mode"), "ok")
    assert storage.list_files(s3) == []  # nothing is left behind
    storage.write_bytes(f"{s3}/set/manifest.json", b"{}")
    assert store.readable(f"{s3}/set").status == "ok"
    assert "not a finished dataset" in store.readable(f"{s3}/other").message


def broken(s3_server, monkeypatch, fault):
    proxy = FaultProxy(s3_server)
    proxy.fault = fault
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    return proxy


def test_a_store_without_permission_to_write(s3, s3_server, monkeypatch):
    with broken(s3_server, monkeypatch, lambda method, path, n: "403" if method == "PUT" else None):
        (found,) = store.writable(f"{s3}/run")
    assert (found.check, found.status) == ("output", "error")
    assert "access denied" in found.message
    assert "bucket policy" in found.remedy


def test_a_store_without_permission_to_delete(s3, monkeypatch):
    monkeypatch.setattr(storage, "remove", lambda uri: None)
    assert statuses(store.writable(f"{s3}/run"))["removal"] == "warning"


def test_a_store_that_requires_content_lengths(s3, s3_server, monkeypatch):
    with broken(s3_server, monkeypatch, lambda method, path, n: "411" if method == "PUT" else None):
        (found,) = store.writable(f"{s3}/run")
    assert (found.check, found.status) == ("checksum mode", "error"), found
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in found.remedy


def test_a_store_without_multipart(s3, s3_server, monkeypatch):
    with broken(s3_server, monkeypatch, lambda method, path, n: "403" if "uploads" in path else None):
        found = statuses(store.writable(f"{s3}/run"))
    assert found["multipart upload"] == "error"
    assert found["output"] == "ok"


def test_a_store_that_ignores_conditions(s3, monkeypatch):
    monkeypatch.setattr(storage, "create_bytes", lambda uri, data: True)
    assert statuses(store.writable(f"{s3}/run"))["conditional write"] == "warning"


def test_checksums_that_other_stores_refuse(s3, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    assert store.checksums().status == "warning"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert store.checksums().status == "ok"  # AWS itself


def test_an_endpoint_where_nobody_listens(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    start = time.perf_counter()
    assert "no response from AWS_ENDPOINT_URL" in store.readable(f"{s3}/set").message
    assert time.perf_counter() - start < 5
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    assert store.readable(f"{s3}/set").message.endswith("is not a URL")


def test_local_folders(tmp_path):
    (finding,) = store.writable(str(tmp_path / "run"))
    assert finding.status == "ok"
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    (finding,) = store.writable(str(tmp_path / "file"))
    assert finding.status == "error"
    assert store.readable(str(tmp_path / "none")).status == "error"


# ---------------------------------------------------------------- the machine


def test_shared_memory(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage(64 << 20, 0, 64 << 20))
    found = machine.shared_memory()
    assert found.status == "warning"
    assert "--shm-size=2048m" in found.remedy
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage(8 << 30, 0, 8 << 30))
    assert machine.shared_memory().status == "ok"
    monkeypatch.undo()
    assert machine.shared_memory(str(tmp_path / "none")).status == "warning"


def test_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.compiler(required=True).status == "error"
    found = machine.compiler(required=False)
    assert found.status == "warning"
    assert found.message.startswith("no C++ compiler and no ninja")
    for name in ("c++", "ninja"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert machine.compiler(required=True).status == "ok"


def test_a_stale_build_lock_is_distinguished_from_a_held_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert machine.build_locks().status == "ok"
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); print(1, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    assert machine.build_locks().message == "an operator is being built"
    holder.kill()
    holder.communicate()
    found = machine.build_locks()
    assert (found.status, found.remedy) == ("error", f"rm {lock}")


def test_ports():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert machine.ports({port + 1: "something"}, range(0)).status == "ok"
        found = machine.ports({port: "Ray's dashboard"}, range(0))
        assert found.status == "warning"
        assert f"{port} (Ray's dashboard) by " in found.message
        found = machine.ports({}, range(port, port + 1))
        assert f"in the range of Ray's workers: {port} by " in found.message


def test_a_machine_without_devices(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.devices(wanted=False).status == "ok"
    assert machine.devices(wanted=True).status == "warning"


def test_gpus_add_up(monkeypatch):
    """The NCCL check with a replacement whose sum is right, wrong or missing."""
    import torch

    real = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "H100")
    monkeypatch.setattr(torch, "ones", lambda count, device: real(count))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.cuda.nccl, "all_reduce", lambda values: [v.fill_(len(values)) for v in values])
    assert "NCCL 2.27.3 all-reduce works" in machine.devices(wanted=True).message
    monkeypatch.setattr(torch.cuda.nccl, "all_reduce", lambda values: None)
    assert machine.devices(wanted=True).status == "error"

    def fails(values):
        raise RuntimeError("unhandled system error")

    monkeypatch.setattr(torch.cuda.nccl, "all_reduce", fails)
    assert "unhandled system error" in machine.devices(wanted=True).message


# ---------------------------------------------------------------- room, and the name of the run


@pytest.mark.parametrize(
    ("free", "now", "status", "message"),
    [
        (4, 4, "ok", "fit now"),
        (1, 4, "warning", "other jobs leave capacity for 1"),
        (0, 2, "warning", "the current nodes have capacity for 2"),
    ],
)
def test_resources_for_the_workers(free, now, status, message):
    found = pretraining.cpu_budget(4, {"CPU": 2, "GPU": 1}, cluster.Capacity(free=free, now=now))
    assert found.status == status
    assert "4 workers of 2 CPU and 1 GPU" in found.message
    assert message in found.message


def test_resources_of_real_nodes(ray_local, caplog):
    assert cluster.capacity({"CPU": 1}).now == 2
    assert cluster.capacity({"CPU": 2}).now == 1
    assert cluster.capacity({"CPU": 4}).now == 0  # four CPUs do not fit on a node of two, however many nodes
    assert cluster.capacity({"CPU": 0.5, "GPU": 1}).now == 0
    cluster.log_waiting({"CPU": 1}, 2)
    assert caplog.text == ""
    cluster.log_waiting({"CPU": 4}, 2)
    assert "waiting for 2 x (4 CPU): the cluster has room for 0; the job starts when an autoscaler" in caplog.text


@pytest.mark.parametrize("form", ["resource", "gang", "selector"])
def test_requests_that_the_autoscaler_has_given_up(monkeypatch, form):
    """The three forms in which autoscaler v2 reports requests that it cannot serve."""
    from ray._private.worker import global_worker
    from ray.core.generated import autoscaler_pb2

    reply = autoscaler_pb2.GetClusterStatusReply()
    state = reply.autoscaling_state
    request = {
        "resource": lambda: state.infeasible_resource_requests.add(),
        "gang": lambda: state.infeasible_gang_resource_requests.add().requests.add(),
        "selector": lambda: (
            state.infeasible_gang_resource_requests.add().bundle_selectors.add().resource_requests.add()
        ),
    }[form]()
    request.resources_bundle.update({"CPU": 1.0, "GPU": 1.0, "bundle_group_x": 0.001})

    class Store:
        def get_cluster_status(self, timeout_s):
            return reply.SerializeToString()

    monkeypatch.setattr(global_worker, "gcs_client", Store(), raising=False)
    assert cluster.infeasible({"CPU": 1, "GPU": 1})
    assert not cluster.infeasible({"CPU": 2, "GPU": 1})
    reply.Clear()
    assert not cluster.infeasible({"CPU": 1, "GPU": 1})


def test_resources_of_this_machine(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert pretraining.own_budget(config(dataset, tmp_path, workers=2)).status == "ok"
    assert pretraining.own_budget(config(dataset, tmp_path, workers=2, cpus_per_worker=2)).status == "warning"


def test_the_name_of_the_run(dataset, tmp_path):
    from pipeline.training import run

    mine = config(dataset, tmp_path / "run")
    assert pretraining.run_name(mine).message.endswith("is unused")
    run.claim(run.check_run(mine), mine.runtime.output)
    assert "continues" in pretraining.run_name(mine).message
    # a run without a checkpoint does not block its output for another run
    assert pretraining.run_name(config(dataset, tmp_path / "run", seed=7)).status == "ok"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    assert pretraining.run_name(config(dataset, tmp_path / "photos")).status == "error"


# ---------------------------------------------------------------- the job


def examine(*arguments, **environment):
    command = [sys.executable, str(ROOT / "jobs" / "doctor.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


@pytest.mark.slow
def test_the_job_on_this_machine(dataset, tmp_path):
    good = examine("--data", dataset, "--output", tmp_path / "run", "--validation", "None", "--json")
    assert good.returncode == 0, good.stdout + good.stderr
    answer = json.loads(good.stdout)
    assert answer["ok"]
    assert {finding["check"] for finding in answer["findings"]} >= {
        *("authentication", "tracking server", "data", "output", "shared memory", "compiler", "build locks"),
        *("room", "ports", "run", "GPUs"),
    }
    bad = examine("--data", tmp_path / "none", "--output", tmp_path / "run", "--engine.zero", "2")
    assert bad.returncode == 1
    assert "error   data" in bad.stdout
    assert "-> run jobs/prepare.py" in bad.stdout
    assert "error" in bad.stdout.splitlines()[-1]
    assert examine("--dta", dataset).returncode == 2


@pytest.mark.parametrize(("flag", "variable"), [("auto", "http://127.0.0.1:8265"), ("http://127.0.0.1:8265", None)])
def test_the_address_of_a_job_server_is_not_that_of_a_cluster(home, flag, variable):
    """What happens to a job that is started in the shell that submits jobs."""
    code = f"from pipeline import cluster; cluster.configure({flag!r}); cluster.connect()"  # Ray may be running in this process
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"RAY_ADDRESS": variable} if variable else {})}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    error = done.stderr.strip().splitlines()[-1]
    assert "UserError: cannot join Ray at http://127.0.0.1:8265" in error
    assert "job server; start the command as a Ray job, with `ray job submit" in error


@pytest.mark.slow
def test_the_job_on_every_node_of_a_cluster(dataset, tmp_path):
    from ray.cluster_utils import Cluster

    cluster_of_two = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}, shutdown_at_exit=False
    )
    try:
        cluster_of_two.add_node(num_cpus=1)
        arguments = (
            "--address",
            cluster_of_two.address,
            "--data",
            dataset,
            "--output",
            tmp_path / "run",
            "--validation",
            "None",
        )
        fits = examine(*arguments, "--json")
        answer = json.loads(fits.stdout)
        assert fits.returncode == 0, answer
        (room,) = [finding for finding in answer["findings"] if finding["check"] == "room"]
        assert room["message"] == "2 workers of 1 CPU fit now"
        assert {f["where"] for f in answer["findings"] if f["check"] == "data"} == {"all 2 nodes"}
        never = examine(*arguments, "--cpus-per-worker", "2")
        assert "2 workers of 2 CPU: the current nodes have capacity for 0" in never.stdout
    finally:
        cluster_of_two.shutdown()
