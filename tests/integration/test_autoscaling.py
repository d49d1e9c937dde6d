"""Changing nodes: notices of clouds and Kubernetes reach Ray, and jobs make an autoscaling cluster grow and shrink.

The cluster uses Ray's fake provider: the real autoscaler with real Ray nodes, which are processes of this machine."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from tests.images import tinted
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
WATCHER = ROOT / "infra" / "preemption.py"

spec = importlib.util.spec_from_file_location("preemption", WATCHER)
preemption = importlib.util.module_from_spec(spec)
sys.modules["preemption"] = preemption
spec.loader.exec_module(preemption)


# ---------------------------------------------------------------- the notices


class Metadata(BaseHTTPRequestHandler):
    """EC2's IMDSv2 and Compute Engine's metadata server, as far as preemption notices are concerned. `server.notices`
    maps a path to its
    answer."""

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


def test_without_a_notice_nothing_is_reported(metadata, monkeypatch):
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
        "MIGRATE_ON_HOST_MAINTENANCE"  # a machine without GPUs is migrated and keeps running
    )
    assert preemption.gcp_notice(metadata.url) is None
    metadata.notices[f"{GCP}maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert preemption.gcp_notice(metadata.url).seconds == 3600
    metadata.notices[f"{GCP}preempted"] = "TRUE"
    assert preemption.gcp_notice(metadata.url) == preemption.Notice("Compute Engine spot: preempted", 30)


def test_watching_continues_while_the_metadata_server_fails_now_and_then(metadata, capsys):
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
            assert hook.poll() is None  # work is in progress
            busy.kill()
            output, _ = hook.communicate(timeout=50)
            assert hook.returncode == 0, output
            assert "draining" in output
        finally:
            hook.kill()
            busy.kill()


@pytest.mark.slow
def test_sigterm_drains_and_a_missing_cluster_is_an_error(metadata):
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


# ---------------------------------------------------------------- a cluster that grows and shrinks


class AutoscalingCluster:
    """A head without CPUs under Ray's autoscaler v2, whose nodes are processes of this machine (Ray's fake provider).

    ray.cluster_utils has a class of this name, which stops every Ray of the user, and needs a file that wheels lack.
    """

    HEAD = "f" * 51 + "00000"  # its name at the provider

    def __init__(self, folder: Path, node_types: dict[str, dict]) -> None:
        from ray._private.services import get_node_ip_address

        self.folder, port = folder, free_port()
        self.address = f"{get_node_ip_address()}:{port}"
        commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        config = {
            "cluster_name": "test",
            "max_workers": 8,
            "idle_timeout_minutes": 0.1,
            "upscaling_speed": 10,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "head_node_id": self.HEAD,
                "gcs_address": self.address,
                "launch_multiple": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            **{f"{name}_commands": [] for name in commands},
            **{"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": []},
            "file_mounts_sync_continuously": False,
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                **{name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in node_types.items()},
            },
        }
        (folder / "cluster.json").write_text(json.dumps(config))
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
        command += ["--num-cpus=0", "--num-gpus=0", f"--autoscaling-config={folder}/cluster.json"]
        command += [f"--temp-dir={folder}", "--object-store-memory=100000000", "--disable-usage-stats"]
        command += ["--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        self.environment = {**os.environ, "RAY_AUTH_MODE": "token"}
        settings = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
        settings |= dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), self.HEAD)
        with open(folder / "head.log", "w") as log:
            self.head = subprocess.Popen(command, env=self.environment | settings, stdout=log, stderr=log)
        while "This command will now block" not in (folder / "head.log").read_text():
            assert self.head.poll() is None, (folder / "head.log").read_text()
            time.sleep(0.2)

    def start(self, job: str, *arguments) -> subprocess.Popen:
        """Starts jobs/<job>.py on this cluster; its output goes to a file."""
        command = [
            sys.executable,
            "-u",
            str(ROOT / "jobs" / f"{job}.py"),
            "--address",
            self.address,
            *map(str, arguments),
        ]
        self.output = self.folder / f"{job}.log"
        uri = f"sqlite:///{self.folder}/mlflow.db"
        with open(self.output, "w") as log:
            return subprocess.Popen(
                command, env=self.environment | {"MLFLOW_TRACKING_URI": uri}, cwd=self.folder, stdout=log, stderr=log
            )

    def watch(self) -> subprocess.Popen:
        """Writes the pools of the nodes that are alive, without the head, to a file whenever they change."""
        self.seen = self.folder / "nodes.log"
        with open(self.seen, "w") as log:
            return subprocess.Popen(
                [sys.executable, "-u", "-c", WATCH, self.address],
                env=self.environment,
                stdout=log,
                stderr=subprocess.DEVNULL,
            )

    def history(self) -> list[list[str]]:
        return [json.loads(line) for line in self.seen.read_text().splitlines() if line.startswith("[")]

    def wait_for(self, what, seconds: float) -> None:
        """Waits until `what()` is true; otherwise fails with the output of the job and the cluster."""
        deadline = time.time() + seconds
        while not what():
            assert time.time() < deadline, f"{self.output.read_text()[-3000:]}\nnodes: {self.history()}"
            time.sleep(0.2)

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's processes of this cluster whose name has `name` in it, without those of the head."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or [])
            if str(self.folder) in command and name in command and self.HEAD not in command:
                found.append(process)
        return found

    def stop(self) -> None:
        self.head.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.head.wait(60)
        self.head.kill()
        for process in self.processes(""):  # nodes of the provider outlive the head
            with suppress(psutil.Error):
                process.kill()


WATCH = """
import json, ray, sys, time

ray.init(sys.argv[1], log_to_driver=False, logging_level="error")
last = None
while True:
    pools = sorted(n["Labels"].get("pool", "?") for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU"))
    if pools != last:
        print(json.dumps(pools), flush=True)
        last = pools
    time.sleep(0.3)
"""


@pytest.fixture(scope="module")
def autoscaling(tmp_path_factory):
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # a short path, because Ray's sockets are below it
    memory = {"object_store_memory": 100_000_000}
    cluster = AutoscalingCluster(
        folder,
        {
            "cpu": {"resources": {"CPU": 1, **memory}, "labels": {"pool": "cpu"}, "max_workers": 2},
            "gpu": {"resources": {"CPU": 2, "GPU": 1, **memory}, "labels": {"pool": "gpu"}, "max_workers": 2},
        },
    )
    watcher = cluster.watch()
    try:
        yield cluster
    finally:
        watcher.kill()
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes of 300 pictures: two units of work."""
    root = tmp_path_factory.mktemp("source")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("red", "green")):
        (root / name).mkdir()
        for i in range(300):
            cv2.imwrite(str(root / name / f"{i:03d}.png"), tinted(generator, 20, 20, 2 - label))
    return root


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_jobs_make_a_cluster_grow_and_shrink(autoscaling, pictures, tmp_path):
    """prepare adds CPU nodes, which are removed afterwards; pretrain adds nodes of the GPU pool, loses one, and
    succeeds."""
    cluster = autoscaling
    prepare = cluster.start("prepare", "--source", pictures, "--output", tmp_path / "set", "--size", 20)
    assert prepare.wait(240) == 0, cluster.output.read_text()
    text = cluster.output.read_text()
    assert "waiting for 1 x (1 CPU): the cluster has room for 0; the job starts when an autoscaler" in text
    assert "prepared=600" in text
    assert any("cpu" in nodes for nodes in cluster.history())
    cluster.wait_for(lambda: cluster.history()[-1] == [], 120)  # idle for six seconds

    # Only the GPU pool has nodes of two CPUs. (There is no GPU here to train on.)
    run = ("--data", tmp_path / "set", "--validation", "None", "--output", tmp_path / "run", "--model.variant", "mu/8")
    run += (
        "--image-size",
        16,
        "--augment.size",
        16,
        "--batch-size",
        16,
        "--steps",
        "400steps",
        "--checkpoint-every",
        "20steps",
    )
    run += ("--validate-every", "400steps", "--log-every", "10steps", "--workers", 2, "--cpus-per-worker", 2)
    pretrain = cluster.start("pretrain", *run)
    cluster.wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("*/COMMIT.json")), 240)
    assert cluster.history()[-1] == ["gpu", "gpu"]
    victim = cluster.processes("raylet/raylet")[0]
    victim.kill()
    cluster.wait_for(lambda: cluster.history()[-1] == ["gpu"], 60)
    assert pretrain.wait(400) == 0, cluster.output.read_text()
    text = cluster.output.read_text()
    assert "waiting for 2 x (2 CPU): the cluster has room for 0; the job starts when an autoscaler" in text
    assert "resumed from" in text
    assert "pretrain: steps=400" in text
    cluster.wait_for(lambda: cluster.history()[-1] == [], 120)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_jobs_say_what_they_wait_for(autoscaling, pictures, tmp_path):
    cluster = autoscaling
    prepare = cluster.start("prepare", "--source", pictures, "--output", tmp_path / "set", "--size", 20)
    assert prepare.wait(240) == 0, cluster.output.read_text()
    run = (
        "--data",
        tmp_path / "set",
        "--validation",
        "None",
        "--model.variant",
        "mu/8",
        "--image-size",
        16,
        "--augment.size",
        16,
    )
    run += ("--batch-size", 64, "--steps", "10steps")

    never = cluster.start("pretrain", *run, "--output", tmp_path / "never", "--workers", 16, "--gpus")
    said = "waiting for 16 x (1 CPU, 1 GPU): the autoscaler can never add them. Raise max_workers"
    try:
        cluster.wait_for(lambda: said in cluster.output.read_text(), 120)
    finally:
        never.terminate()
    assert never.wait(60) == 143

    known = len(cluster.history())
    later = cluster.start("pretrain", *run, "--output", tmp_path / "later", "--workers", 1, "--gpus")
    try:
        cluster.wait_for(lambda: any("gpu" in nodes for nodes in cluster.history()[known:]), 120)
        said = "waiting for 1 x (1 CPU, 1 GPU): the cluster has room for 0; the job starts when an autoscaler"
        assert said in cluster.output.read_text()
    finally:
        later.terminate()
    later.wait(120)
