"""Nodes that come and go: the notices of clouds and Kubernetes reach Ray, and jobs make an autoscaling cluster grow and shrink.

The cluster is Ray's fake provider: the real autoscaler and real Ray nodes, which are processes of this machine.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WATCHER = ROOT / "infra" / "preemption.py"

spec = importlib.util.spec_from_file_location("preemption", WATCHER)
preemption = importlib.util.module_from_spec(spec)
sys.modules["preemption"] = preemption
spec.loader.exec_module(preemption)


# ---------------------------------------------------------------- the notices


class Metadata(BaseHTTPRequestHandler):
    """EC2's IMDSv2 and Compute Engine's metadata server, as far as notices go. `server.notices` maps a path to its answer."""

    def answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self):
        if self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
            return self.answer(200, "a-session")
        self.answer(400)

    def do_GET(self):
        self.server.asked += 1
        if self.path.startswith("/latest/") and self.headers.get("X-aws-ec2-metadata-token") != "a-session":
            return self.answer(401)
        if self.path.startswith("/computeMetadata/") and self.headers.get("Metadata-Flavor") != "Google":
            return self.answer(403)
        if self.server.stutter and self.server.asked % 2:
            return self.answer(503)
        self.answer(200, self.server.notices[self.path]) if self.path in self.server.notices else self.answer(404)

    def log_message(self, *_):
        pass


AWS, GCP = "/latest/meta-data/spot/instance-action", "/computeMetadata/v1/instance/"


@pytest.fixture
def metadata():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.notices = {f"{GCP}preempted": "FALSE", f"{GCP}maintenance-event": "NONE"}
    server.asked, server.stutter, server.daemon_threads = 0, False, True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_a_quiet_cloud_says_nothing(metadata, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # never asked: the address is link-local
    assert preemption.aws_notice(metadata.url) is None
    assert preemption.gcp_notice(metadata.url) is None


def test_the_notice_of_ec2(metadata):
    metadata.notices[AWS] = json.dumps({"action": "terminate", "time": in_seconds(120)})
    notice = preemption.aws_notice(metadata.url)
    assert notice.reason == "EC2 spot: terminate"
    assert 110 < notice.seconds <= 120
    metadata.notices[AWS] = json.dumps({"action": "stop", "time": in_seconds(-5)})
    assert preemption.aws_notice(metadata.url).seconds == 0


def test_the_notices_of_compute_engine(metadata):
    metadata.notices[f"{GCP}maintenance-event"] = (
        "MIGRATE_ON_HOST_MAINTENANCE"  # a machine without GPUs moves, and lives on
    )
    assert preemption.gcp_notice(metadata.url) is None
    metadata.notices[f"{GCP}maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert preemption.gcp_notice(metadata.url).seconds == 3600
    metadata.notices[f"{GCP}preempted"] = "TRUE"
    assert preemption.gcp_notice(metadata.url) == preemption.Notice("Compute Engine spot: preempted", 30)


def test_watching_goes_on_while_the_metadata_server_stutters(metadata, capsys):
    metadata.stutter = True
    threading.Timer(0.2, lambda: metadata.notices.update({f"{GCP}preempted": "TRUE"})).start()
    notice = preemption.watch("gcp", metadata.url, 0.02, threading.Event())
    assert notice.reason == "Compute Engine spot: preempted"
    assert metadata.asked > 4
    assert "503" in capsys.readouterr().err


def test_watching_ends_with_a_signal(metadata):
    stopped = threading.Event()
    threading.Timer(0.1, stopped.set).start()
    assert preemption.watch("aws", metadata.url, 0.02, stopped) is None


# ---------------------------------------------------------------- a real Ray node is drained


@contextmanager
def two_nodes():
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}, shutdown_at_exit=False
    )
    try:
        yield cluster, cluster.add_node(num_cpus=1)
    finally:
        cluster.shutdown()


def drain(address, node, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-u", str(WATCHER), "--address", address, "--node-id", node.node_id, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def draining(address: str) -> dict[str, int]:
    """{node: deadline in ms}, from another process than the test's: Ray joins one cluster per process."""
    code = (
        f"import ray; ray.init({address!r}, log_to_driver=False); print(ray._private.state.state.get_draining_nodes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return eval(done.stdout.splitlines()[-1], {"__builtins__": {}})


HOLD = """
import ray, sys, time
from pathlib import Path

ray.init(sys.argv[1], log_to_driver=False)

@ray.remote(max_retries=0, scheduling_strategy="SPREAD")
def task(name):
    Path(name).touch()
    time.sleep(600)

names = [f"{sys.argv[2]}/{i}" for i in range(2)]
held = [task.remote(name) for name in names]
while not all(Path(name).exists() for name in names):
    time.sleep(0.1)
print("held", flush=True)
time.sleep(600)
"""


def hold(address: str, folder: Path) -> subprocess.Popen:
    """A task on each CPU of the cluster: Ray ends idle nodes as soon as they are drained."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, address, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_notice_drains_the_node(metadata, tmp_path):
    with two_nodes() as (cluster, node):
        busy = hold(cluster.address, tmp_path)
        watcher = drain(cluster.address, node, "--watch", "aws", "--metadata", metadata.url, "--every", "0.1")
        try:
            assert "watching" in watcher.stdout.readline()
            assert draining(cluster.address) == {}
            metadata.notices[AWS] = json.dumps({"action": "terminate", "time": in_seconds(100)})
            output, _ = watcher.communicate(timeout=60)
            assert watcher.returncode == 0, output
            ((drained, deadline),) = draining(cluster.address).items()
            assert drained == node.node_id
            assert 20_000 < deadline - time.time() * 1000 < 100_000
        finally:
            watcher.kill()
            busy.kill()


@pytest.mark.slow
def test_a_pod_that_is_deleted_waits_until_it_is_idle(tmp_path):
    with two_nodes() as (cluster, node):
        busy = hold(cluster.address, tmp_path)
        hook = drain(cluster.address, node, "--now", "--grace", "60")
        try:
            while not draining(cluster.address):
                assert hook.poll() is None
            time.sleep(2)
            assert hook.poll() is None  # work is going on
            busy.kill()
            output, _ = hook.communicate(timeout=50)
            assert hook.returncode == 0, output
            assert "draining" in output
        finally:
            hook.kill()
            busy.kill()


@pytest.mark.slow
def test_sigterm_drains_too_and_a_cluster_that_is_gone_is_an_error(metadata):
    with two_nodes() as (cluster, node):
        watcher = drain(cluster.address, node, "--watch", "gcp", "--metadata", metadata.url, "--grace", "20")
        address = cluster.address
        try:
            assert "watching" in watcher.stdout.readline()
            watcher.send_signal(signal.SIGTERM)
            output, _ = watcher.communicate(timeout=60)
            assert watcher.returncode == 0, output
            assert f"draining {node.node_id}" in output
        finally:
            watcher.kill()
    hook = drain(address, node, "--now", "--grace", "3")
    output, _ = hook.communicate(timeout=120)
    assert hook.returncode == 1, output
