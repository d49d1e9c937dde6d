"""The real tracking server: infra/mlflow/serve.py with authorization.py on PostgreSQL, artifacts through it to an S3 endpoint, passwords on.

Runs where infra/mlflow/requirements.txt and the Debian package `postgresql` are installed; MLFLOW_SERVER_PYTHON names another
interpreter that has the former. If the tests run as root, PostgreSQL runs as an ordinary user.
"""

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import boto3
import numpy as np
import psutil
import pytest

from pipeline.errors import UserError, plural
from pipeline.tracking import names, registry, start_run
from pipeline.tracking import run as run_module
from pipeline.tracking.server import client
from pipeline.tracking.spool import spool_root
from tests.runs import commit_checkpoint

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SERVE = os.path.join(PROJECT, "infra", "mlflow", "serve.py")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Service:
    """A process that can be killed and started again."""

    def __init__(self, command, ready, environment=None, log=None):
        self.command, self.ready, self.log = command, ready, log
        self.environment = {**os.environ, **(environment or {})}
        self.process = None

    def start(self):
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log, cwd="/")
        deadline = time.monotonic() + 180
        while not self.ready():
            with open(self.log) as log:
                assert self.process.poll() is None, log.read()[-3000:]
            assert time.monotonic() < deadline, "did not start"
            time.sleep(0.3)

    def stop(self, number=signal.SIGTERM):
        """Sends SIGKILL to the child processes of the service, which answer the requests."""
        if number == signal.SIGKILL:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if "postgres" not in child.name():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
        else:
            self.process.send_signal(number)
        self.process.wait(60)


def answers(url):
    def ready():
        try:
            return urllib.request.urlopen(url, timeout=2).status == 200
        except OSError:
            return False

    return ready


@pytest.fixture(scope="module")
def room():
    """A folder that another user (PostgreSQL's) can enter, unlike pytest's folders."""
    folder = tempfile.mkdtemp(prefix="mlflow-server-")
    os.chmod(folder, 0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def store(room):
    port = free_port()
    moto = os.path.join(os.path.dirname(sys.executable), "moto_server")
    address = f"http://127.0.0.1:{port}"
    service = Service([moto, "-H", "127.0.0.1", "-p", str(port)], answers(address), log=f"{room}/moto.log")
    service.address = address

    def bucket():
        keys = {"aws_access_key_id": "testing-key", "aws_secret_access_key": "testing-secret"}
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="mlflow")
        return client

    service.bucket = bucket
    service.start()
    service.client = bucket()
    yield service
    service.stop()


@pytest.fixture(scope="module")
def server(room, store):
    port = free_port()
    python = os.environ.get("MLFLOW_SERVER_PYTHON", sys.executable)
    environment = {
        "AWS_ENDPOINT_URL": store.address,
        "AWS_ACCESS_KEY_ID": "testing-key",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        python,
        SERVE,
        "--data",
        f"{room}/data",
        "--artifacts",
        "s3://mlflow/artifacts",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    service = Service(command, answers(f"http://127.0.0.1:{port}/health"), environment, f"{room}/serve.log")
    service.uri = f"http://127.0.0.1:{port}"
    service.start()
    with open(f"{room}/data/admin-password") as file:
        service.password = file.read()
    yield service
    service.stop()


@pytest.fixture
def tracking(server, tmp_path, monkeypatch):
    """The server's address. This process has a login and no S3 credentials."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
    monkeypatch.setenv("VIT_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr(run_module, "RETRY_AT_MOST", 1.0)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    return server.uri


def steps(uri, run_id):
    return sorted(point.step for point in client(uri).get_metric_history(run_id, names.LOSS))


def log_steps(run, first, last):
    for step in range(first, last):
        started = time.perf_counter()
        run.log({names.LOSS: 1.0 / step, names.IMAGES_SEEN: step * 64}, step=step)
        costs.append(time.perf_counter() - started)
        time.sleep(0.002)


costs: list = []


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_runs_go_to_postgresql_and_artifacts_to_s3(tracking, store, room):
    with start_run("pretrain", "real", config={"lr": 1e-3}, tracking_uri=tracking) as run:
        log_steps(run, 1, 300)
        run.log_text("# hello", "notes/hello.md")
    assert steps(tracking, run.id) == list(range(1, 300))
    keys = [item["Key"] for item in store.client.list_objects_v2(Bucket="mlflow")["Contents"]]
    assert any(key.startswith("artifacts/") and key.endswith("notes/hello.md") for key in keys)
    assert os.path.exists(f"{room}/data/postgres/data/PG_VERSION")
    owner = os.stat(f"{room}/data/postgres/data").st_uid
    assert owner != 0
    for secret in ("accounts.ini", "admin-password", "session-key"):
        assert os.stat(f"{room}/data/{secret}").st_mode & 0o077 == 0


def test_wrong_password_and_wrong_host_are_errors_that_say_what_to_do(tracking, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD"):
        start_run("pretrain", "x", tracking_uri=tracking)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
    elsewhere = tracking.replace("127.0.0.1", "127.0.0.1.nip.invalid")
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **kw: real("127.0.0.1" if "nip" in str(host) else host, *rest, **kw)
    )
    with pytest.raises(UserError, match="--allowed-hosts"):
        start_run("pretrain", "x", tracking_uri=elsewhere)
    assert not os.path.exists(spool_root()) or not os.listdir(spool_root())


def test_only_an_admin_chooses_where_artifacts_are_stored(tracking, server, monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.server import get_app_client

    get_app_client("basic-auth", tracking).create_user("someone", "a-long-password-1")
    client(tracking).create_experiment("by admin", artifact_location="mlflow-artifacts:/elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "someone")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password-1")
    with pytest.raises(MlflowException, match="403"):
        client(tracking).create_experiment("by someone", artifact_location="file:///etc")
    assert client(tracking).get_experiment_by_name("by someone") is None
    with start_run("of someone", "allowed", tracking_uri=tracking) as run:
        run.log_text("hello", "hello.txt")
    assert run.finish()


def test_the_check_distinguishes_a_served_client_from_a_healthy_server(tracking, server):
    def check(address, password):
        environment = {**os.environ, "MLFLOW_TRACKING_PASSWORD": password}
        return subprocess.run(
            [sys.executable, SERVE, "--check", address], env=environment, capture_output=True, text=True
        )

    assert check(tracking, server.password).returncode == 0
    refused = check(tracking, "wrong")
    assert (refused.returncode, "401" in refused.stderr) == (2, True)


def test_a_registered_model_loads_through_the_server_and_classifies_bytes(tracking, tmp_path):
    import mlflow
    import pandas as pd
    from PIL import Image

    from models import create_model
    from pipeline import storage
    from pipeline.weights import save_checkpoint_weights

    folder = str(tmp_path / "run" / "checkpoints" / "step-00000010")
    model = create_model("Ti/16", num_classes=2, image_size=32)
    save_checkpoint_weights(model, model.config, folder)
    config = storage.read_json(f"{folder}/config.json")
    storage.write_json(f"{folder}/config.json", {**config, "classes": ["cat", "dog"]})
    commit_checkpoint(folder, 10)
    version = registry.register(folder, name="served", uri=tracking)
    assert registry.register(folder, name="served", uri=tracking).version == version.version
    registry.set_alias(version, registry.CHAMPION, tracking)
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(picture, "jpeg")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracking)
    try:
        loaded = mlflow.pyfunc.load_model("models:/served@champion")
    finally:
        mlflow.set_tracking_uri(before)
    answer = loaded.predict(pd.DataFrame({"image": [picture.getvalue()]}))
    assert answer["label"][0] in ("cat", "dog")
    assert 0.5 <= answer["probability"][0] <= 1.0


# ---------------------------------------------------------------- faults


def test_server_is_killed_and_restarted_during_a_run(tracking, server):
    run = start_run("pretrain", "server killed", tracking_uri=tracking)
    log_steps(run, 1, 100)
    server.stop(signal.SIGKILL)
    log_steps(run, 100, 400)
    wait_until(lambda: run.error)
    server.start()
    log_steps(run, 400, 500)
    assert run.finish()
    assert steps(tracking, run.id) == list(range(1, 500))
    assert sorted(costs)[int(len(costs) * 0.99)] < 0.010  # seconds that a step waits for tracking in all cases


def test_postgresql_is_restarted_during_a_run(tracking, room):
    data = f"{room}/data/postgres/data"
    found = (
        shutil.which("pg_ctl")
        or sorted(f"/usr/lib/postgresql/{v}/bin/pg_ctl" for v in os.listdir("/usr/lib/postgresql"))[-1]
    )
    run = start_run("pretrain", "database restarted", tracking_uri=tracking)
    log_steps(run, 1, 100)
    user = os.stat(data).st_uid if os.geteuid() == 0 else None
    settings = ["-o", f"-c listen_addresses= -c unix_socket_directories={room}/data/postgres"]
    with open(os.devnull, "w") as null:
        command = [found, "-D", data, "-m", "immediate", "-w"]
        subprocess.run([*command, "stop"], user=user, cwd="/", stdout=null, stderr=null, check=True)
        log_steps(run, 100, 300)
        time.sleep(3)
        subprocess.run([*command, *settings, "start"], user=user, cwd="/", stdout=null, stderr=null, check=True)
    log_steps(run, 300, 400)
    wait_until(lambda: not run.spool.pending)
    assert run.finish()
    assert steps(tracking, run.id) == list(range(1, 400))


FULL = """
import os, resource, sys
from pipeline.tracking import start_run
run = start_run("pretrain", "full disk", tracking_uri=sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # from here on every file is refused more: errno EFBIG
for step in range(1, int(sys.argv[2]) + 1):
    run.log({"train/loss": 1.0 / step}, step=step)
run.log_text("x" * 50_000, "large.txt")
print(run.id, run.finish(timeout=120))
"""


@pytest.mark.parametrize("count", [3_000, 40_000])
def test_disk_full_for_the_buffer(tracking, count):
    """The kernel limits the buffer file to 20 kB. Records that fit in memory arrive; at its end the run reports how
    many others were lost."""
    command = [sys.executable, "-c", FULL, tracking, str(count)]
    environment = {**os.environ, "PYTHONPATH": PROJECT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    run_id, complete = done.stdout.split()
    assert complete == "False"  # at least the large artifact did not fit
    stored = client(tracking).get_run(run_id)
    lost = int(stored.data.tags["lost"].split()[0].replace(",", ""))
    assert f"{plural(lost, 'record')} of run {run_id} lost" in done.stderr
    arrived = steps(tracking, run_id)
    assert arrived == sorted(set(arrived))
    assert len(arrived) - (count - lost) in (
        1,
        2,
    )  # the lost records include the artifact and possibly the cost of the run
    assert (lost == 1) == (count == 3_000)
    assert stored.info.status == "FINISHED"


def test_an_outage_of_the_object_store_delays_only_artifacts(tracking, store):
    run = start_run("pretrain", "store gone", tracking_uri=tracking)
    run.flush()
    store.stop()
    run.log_text("late", "late.txt")
    log_steps(run, 1, 50)
    wait_until(lambda: len(run.spool.metrics) == 0)  # metrics do not wait for artifacts
    assert len(run.spool.artifacts) == 1
    store.start()
    store.client = store.bucket()
    assert run.finish(timeout=120)
    assert client(tracking).list_artifacts(run.id)[-1].path == "late.txt"
