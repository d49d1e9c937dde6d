"""Tracking: every record arrives once, despite failures of the server, and logging does not wait for it."""

import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import types
from dataclasses import dataclass, field

import pytest

from pipeline.address import data_name
from pipeline.credentials import redacted
from pipeline.errors import UserError
from pipeline.tracking import environment, names, resolve_tracking_uri, server, start_run
from pipeline.tracking import run as run_module
from pipeline.tracking.description import Description, checkpoint_name, model_name
from pipeline.tracking.spool import Queue, spool_root
from pipeline.tracking.system import SystemMetrics

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimiser:
    lr: float = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    variant: str = "Ti/16"
    optimiser: Optimiser = field(default_factory=Optimiser)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """Creating MLflow's tables takes seconds, so they are created once and copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    server.client(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(empty_database, tmp_path, monkeypatch):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("VIT_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr(run_module, "SEND_EVERY", 0.05)
    monkeypatch.setattr(run_module, "RETRY_AT_MOST", 0.1)
    return f"sqlite:///{tmp_path}/mlflow.db"


class Outage:
    """Wraps the MLflow client: `down` refuses every call; `lose_answers` performs the call and then fails."""

    def __init__(self, monkeypatch):
        self.real = server.client
        self.down = False
        self.lose_answers = 0
        self.delay = 0.0
        monkeypatch.setattr(server, "client", self)

    def __call__(self, uri):
        return _Proxy(self, self.real(uri))


class _Proxy:
    def __init__(self, outage, real):
        self.outage, self.real = outage, real

    def __getattr__(self, name):
        def call(*args, **kwargs):
            time.sleep(self.outage.delay)
            if self.outage.down:
                raise ConnectionError("connection refused")
            result = getattr(self.real, name)(*args, **kwargs)
            if self.outage.lose_answers and name in ("create_run", "log_batch", "log_artifact"):
                self.outage.lose_answers -= 1
                raise TimeoutError("the answer was lost")
            return result

        return call


@pytest.fixture
def outage(monkeypatch):
    return Outage(monkeypatch)


def history(uri, run_id, key):
    return [(point.step, point.value) for point in server.client(uri).get_metric_history(run_id, key)]


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_run_carries_config_data_code_and_metrics(uri):
    with start_run("pretrain", "one", config=Config(), tags={names.RECIPE: "demo"}, tracking_uri=uri) as run:
        for step in range(1, 2501):  # more than one request takes
            run.log({names.LOSS: 1 / step, names.IMAGES_SEEN: step * 64}, step=step)
        run.log_dataset("s3://bucket/shards/", {"fingerprint": "0a1b2c", "rows": 7}, role="train")
        run.log_text("# Report", "report.md")
    client = server.client(uri)
    stored = client.get_run(run.id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"variant": "Ti/16", "optimiser.lr": "0.001"}
    assert stored.data.tags[names.RECIPE] == "demo"
    assert stored.data.tags["data.fingerprint.train"] == "0a1b2c"
    assert history(uri, run.id, names.LOSS) == [(step, 1 / step) for step in range(1, 2501)]
    dataset = stored.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, json.loads(dataset.source)["uri"]) == (
        "bucket/shards",
        "0a1b2c",
        "s3://bucket/shards/",
    )
    files = {file.path for folder in ("", "data") for file in client.list_artifacts(run.id, folder)}
    assert {"config.yaml", "environment.json", "report.md", "data/train-manifest.json"} <= files
    assert not os.listdir(spool_root())


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_the_final_status_of_a_run_is_correct(uri, error, status):
    def body():
        with start_run("prepare", "end", tracking_uri=uri) as run:
            runs.append(run)
            if error:
                raise error

    runs: list = []
    if error:
        with pytest.raises(error):
            body()
    else:
        body()
    assert server.client(uri).get_run(runs[0].id).info.status == status


def test_a_resumed_run_has_every_step_once(uri):
    first = start_run("pretrain", "r", config=Config(), tracking_uri=uri)
    for step in range(10, 51, 10):
        first.log({names.LOSS: float(step)}, step=step)
    first.log({names.MEAN_SCORE: 1.0})
    first.log_cost({names.GPU_HOURS: 2.0})
    first.finish("FAILED")
    again = start_run("pretrain", "r", config=Config(variant="S/16"), run_id=first.id, tracking_uri=uri)
    for step in range(30, 81, 10):
        again.log({names.LOSS: float(step)}, step=step)
    again.log_cost({names.GPU_HOURS: 3.0})
    again.log({names.MEAN_SCORE: 2.0})  # a summary, without a step: the newer one counts
    again.finish()
    assert again.id == first.id
    assert history(uri, first.id, names.LOSS) == [(step, float(step)) for step in range(10, 81, 10)]
    stored = server.client(uri).get_run(first.id)
    assert stored.data.metrics[names.MEAN_SCORE] == 2.0
    assert stored.data.metrics[names.GPU_HOURS] == 5.0
    assert stored.data.params["variant"] == "Ti/16"
    assert stored.data.tags[names.CHANGED] == "variant: Ti/16 -> S/16"
    assert stored.data.tags[names.RESUMED] == "1"
    assert stored.info.status == "FINISHED"


def test_a_run_of_another_server_continues_as_a_new_one(uri):
    with start_run("pretrain", "moved", run_id="0" * 32, tracking_uri=uri) as run:
        run.log({names.LOSS: 1.0}, step=5)
    assert run.id != "0" * 32
    assert server.client(uri).get_run(run.id).data.tags["resumed.from"] == "0" * 32
    assert history(uri, run.id, names.LOSS) == [(5, 1.0)]


def test_a_point_logged_twice_is_stored_once(uri):
    with start_run("pretrain", "twice", tracking_uri=uri) as run:
        for step in (10, 20):
            run.log({names.LOSS: 1.0, names.IMAGES_SEEN: step * 64}, step=step)
            run.log({names.VAL_TOP1: 0.5, names.IMAGES_SEEN: step * 64}, step=step)  # validation at the same step
    assert history(uri, run.id, names.IMAGES_SEEN) == [(10, 640.0), (20, 1280.0)]
    assert history(uri, run.id, names.VAL_TOP1) == [(10, 0.5), (20, 0.5)]


def test_nonfinite_values_are_flagged_and_not_stored(uri):
    with start_run("pretrain", "nan", tracking_uri=uri) as run:
        for step, loss in enumerate([2.0, float("nan"), float("inf"), 1.0]):
            run.log({names.LOSS: loss}, step=step)
    assert history(uri, run.id, names.LOSS) == [(0, 2.0), (3, 1.0)]
    assert history(uri, run.id, names.NONFINITE + names.LOSS) == [(1, 1.0), (2, 2.0)]
    tags = server.client(uri).get_run(run.id).data.tags
    assert tags[names.NONFINITE_TAG] == f"{names.LOSS}: 2 since step 1"


def test_lineage_reaches_back_through_all_sources(uri):
    with start_run("prepare", "data", tracking_uri=uri) as prepare:
        prepare.log_dataset("/shards", {"fingerprint": "0a1b2c"}, made=True)
    with start_run("prepare", "other data", tracking_uri=uri) as other:
        other.log_dataset("/others", {"fingerprint": "ffffff"}, made=True)
    with start_run("pretrain", "model", tracking_uri=uri) as pretrain:
        pretrain.log_dataset("/a/copy/of/shards", {"fingerprint": "0a1b2c"})
    with start_run("transfer", "scores", tracking_uri=uri) as transfer:
        transfer.link("pretrain", pretrain.id)
    tags = server.client(uri).get_run(transfer.id).data.tags
    assert (tags["lineage.prepare"], tags["lineage.pretrain"]) == (prepare.id, pretrain.id)
    for run in (prepare, pretrain):
        assert f"/runs/{run.id})" in tags[names.NOTE]


def test_runs_that_log_the_same_datasets_at_once_all_have_them(uri):
    """As the run of a suite and those of its tasks. MLflow refuses a dataset that another run adds in the same moment."""
    runs = [start_run("transfer", f"run {number}", tracking_uri=uri) for number in range(4)]
    for number in range(20):
        for run in runs:
            run.log_dataset(f"/data/{number}", {"fingerprint": f"{number}"}, role=f"task {number}", linked=False)
    assert [run.finish() for run in runs] == [True] * 4
    for run in runs:
        assert len(server.client(uri).get_run(run.id).inputs.dataset_inputs) == 20


def test_system_metrics_of_each_node_join_the_one_run(uri):
    with start_run("pretrain", "nodes", tracking_uri=uri) as run:
        run.flush()
        with (
            SystemMetrics(run.id, uri, node="node-0", every=0.1),
            SystemMetrics(run.id, uri, node="node-1", every=0.1),
        ):
            time.sleep(0.3)
        assert server.client(uri).get_run(run.id).info.status == "RUNNING"  # only its owner ends it
    metrics = server.client(uri).get_run(run.id).data.metrics
    assert 0 <= metrics["system/node-0/cpu_percent"] <= 100
    assert metrics["system/node-1/memory_gb"] > 0
    assert history(uri, run.id, "system/node-0/cpu_percent")[0][0] < 60  # seconds since the run's start


def test_messages_within_a_machine_are_no_network_traffic(uri, monkeypatch):
    bytes_sent = itertools.count(0, 1 << 30)

    def counters(pernic=False):
        several = {"lo": next(bytes_sent), "eth0": 1 << 20}
        cards = {name: types.SimpleNamespace(bytes_recv=n, bytes_sent=n) for name, n in several.items()}
        return cards if pernic else types.SimpleNamespace(bytes_recv=sum(several.values()), bytes_sent=0)

    monkeypatch.setattr("psutil.net_io_counters", counters)
    with start_run("pretrain", "network", tracking_uri=uri) as run:
        run.flush()
        with SystemMetrics(run.id, uri, node="node-0", every=0.05):
            time.sleep(0.2)
    metrics = server.client(uri).get_run(run.id).data.metrics
    assert (metrics["system/node-0/network_in_mb_s"], metrics["system/node-0/network_out_mb_s"]) == (0, 0)


def test_energy_of_all_nodes_and_attempts_adds_up(uri, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '55, 1000, 360000.0'\necho '[N/A], 2000, 360000.0'\n")  # two GPUs of 360 kW
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with start_run("pretrain", "energy", tracking_uri=uri) as run:
        run.flush()
        readings = []
        for _attempt in (1, 2):
            for node in ("node-0", "node-1"):
                with SystemMetrics(run.id, uri, node=node, every=0.05):
                    time.sleep(0.1)
            readings.append(run.metrics())
        run.log_energy()
    first, second = readings
    for node in ("node-0", "node-1"):
        assert second[f"system/{node}/gpu_energy_kwh"] > first[f"system/{node}/gpu_energy_kwh"] > 0.2 * 0.05
    assert second["system/node-0/gpu0_percent"] == 55
    assert "system/node-0/gpu1_percent" not in second
    stored = server.client(uri).get_run(run.id).data.metrics[names.ENERGY_KWH]
    assert stored == pytest.approx(sum(second[f"system/{node}/gpu_energy_kwh"] for node in ("node-0", "node-1")))


def test_the_commit_and_what_is_not_committed_are_recorded(uri, tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path / "code"), *arguments], check=True, capture_output=True)

    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text("lr = 1\n")
    git("init", "-q")
    git("add", "train.py")
    git("-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "-m", "first")
    (tmp_path / "code" / "train.py").write_text("lr = 2\n")
    monkeypatch.setattr(environment, "PROJECT", str(tmp_path / "code"))
    for cached in (environment.code_tags, environment.code_diff):
        cached.cache_clear()
    try:
        with start_run("pretrain", "dirty", tracking_uri=uri) as run:
            pass
    finally:
        for cached in (environment.code_tags, environment.code_diff):
            cached.cache_clear()
    client = server.client(uri)
    tags = client.get_run(run.id).data.tags
    assert len(tags[names.COMMIT]) == 40
    assert tags[names.DIRTY] == "true"
    with open(client.download_artifacts(run.id, "code/diff.patch", str(tmp_path))) as file:
        assert "+lr = 2" in file.read()


# ---------------------------------------------------------------- the server misbehaves


def test_a_server_that_is_unavailable_at_the_start_receives_everything_later(uri, outage, caplog):
    outage.down = True
    parent = start_run("transfer", "parent", tracking_uri=uri)
    child = start_run("transfer", "child", parent_id=parent.id, tracking_uri=uri)
    assert parent.id.startswith("offline-")
    assert "is unreachable" in caplog.text
    child.log({"score/dtd": 50.0})
    parent.log({names.MEAN_SCORE: 50.0})
    outage.down = False
    wait_until(lambda: not parent.id.startswith("offline-") and not child.id.startswith("offline-"))
    assert child.finish()
    assert parent.finish()
    stored = outage.real(uri).get_run(child.id)
    assert stored.data.tags[names.PARENT] == parent.id
    assert stored.data.metrics["score/dtd"] == 50.0


def test_a_lost_answer_neither_doubles_nor_loses(uri, outage):
    outage.lose_answers = 3  # of the creation, of a batch, of an artifact or batch
    run = start_run("pretrain", "lost", tracking_uri=uri)
    for step in range(20):
        run.log({names.LOSS: float(step)}, step=step)
    wait_until(lambda: outage.lose_answers == 0 and not run.spool.pending)
    assert run.finish()
    experiment = outage.real(uri).get_experiment_by_name("pretrain").experiment_id
    assert len(outage.real(uri).search_runs([experiment])) == 1
    assert history(uri, run.id, names.LOSS) == [(step, float(step)) for step in range(20)]


def test_a_server_that_never_comes_leaves_records_and_the_command_that_uploads_them(uri, outage, caplog):
    outage.down = True
    run = start_run("pretrain", "offline", config=Config(), tracking_uri=uri)
    for step in range(1, 6):
        run.log({names.LOSS: float(step)}, step=step)
    run.log_text("hello", "notes/hello.txt")
    assert run.finish(timeout=1) is False
    assert "not delivered" in caplog.text
    assert "python -m pipeline.tracking upload" in caplog.text
    offline = run.id
    outage.down = False
    environment = {**os.environ, "PYTHONPATH": PROJECT}
    command = [sys.executable, "-m", "pipeline.tracking", "upload"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "uploaded pretrain/offline" in done.stdout
    run_id = server.find_run(uri, offline)
    assert history(uri, run_id, names.LOSS) == [(step, float(step)) for step in range(1, 6)]
    stored = outage.real(uri).get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params["variant"] == "Ti/16"
    assert outage.real(uri).list_artifacts(run_id, "notes")[0].path == "notes/hello.txt"
    assert not os.listdir(spool_root())


KILLED_WHILE_OTHERS_READ = """
import os, signal, sys, threading
from pipeline.tracking.spool import Queue
sys.setswitchinterval(1e-5)
queue = Queue(sys.argv[1])
def look():
    while True:
        len(queue)
        queue.read(10)
for _ in range(3):
    threading.Thread(target=look, daemon=True).start()
for step in range(300):
    queue.append({"kind": "metrics", "step": step, "values": {}})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_record_is_on_disk_when_append_returns(tmp_path):
    """Records that were logged before kill -9 are on disk, even if other threads held the lock of the queue."""
    environment = {**os.environ, "PYTHONPATH": PROJECT}
    for attempt in range(3):
        place = tmp_path / str(attempt)
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_WHILE_OTHERS_READ, str(place)], env=environment, timeout=120
        )
        assert killed.returncode == -9
        assert [json.loads(line)["step"] for line in place.read_text().splitlines()] == list(range(300))


def test_a_signal_handler_logs_into_the_queue_that_it_interrupted(tmp_path):
    """The interrupted code may hold the lock while it waits for the handler: there
    is no deadlock, and no record is lost."""
    queue = Queue(str(tmp_path / "queue"))
    signals = []

    def handler(*_):
        queue.append({"kind": "tags", "values": {"reason": "stopped"}})
        signals.append(1)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.15)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            queue.append({"kind": "metrics", "step": 0, "values": {}})
            queue.read(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(signals) > 2
    assert (tmp_path / "queue").read_text().count("stopped") == len(signals)


KILLED = """
import os, signal, sys
from pipeline.tracking import run as r, server
real = server.client
class Down:
    def __getattr__(self, name):
        if name in ("log_batch", "log_artifact"):
            raise ConnectionError("down")
        return getattr(real(sys.argv[1]), name)
server.client = lambda uri: Down()
run = r.start_run("pretrain", "killed", run_id=sys.argv[2] or None, tracking_uri=sys.argv[1])
print(run.id, flush=True)
for step in range(1, 31):
    run.log({"train/loss": float(step)}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_logged_is_delivered_by_the_next_attempt(uri):
    environment = {**os.environ, "PYTHONPATH": PROJECT}
    command = [sys.executable, "-c", KILLED, uri, ""]
    killed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120)
    run_id = killed.stdout.strip()
    assert killed.returncode == -9
    with start_run("pretrain", "killed", run_id=run_id, tracking_uri=uri) as run:
        for step in range(21, 41):
            run.log({names.LOSS: float(step)}, step=step)
    assert run.id == run_id
    assert history(uri, run_id, names.LOSS) == [(step, float(step)) for step in range(1, 41)]
    assert not os.listdir(spool_root())


def test_a_refused_record_does_not_hold_up_the_others(uri, monkeypatch, caplog):
    run = start_run("pretrain", "refused", config={"a": 1}, tracking_uri=uri)
    run.flush()
    run.log_params({"a": 2})  # MLflow never changes a parameter
    monkeypatch.setattr(names, "valid_name", str)  # an unexpected name
    for step in range(5):
        run.log({names.LOSS: 1.0, "bad|name": 2.0} if step == 2 else {names.LOSS: 1.0}, step=step)
    assert run.finish() is False
    assert [step for step, _ in history(uri, run.id, names.LOSS)] == [0, 1, 2, 3, 4]
    assert "2 of them refused" in caplog.text
    with open(os.path.join(run.spool.folder, "rejected.jsonl")) as file:
        assert [json.loads(line)["kind"] for line in file] == ["params", "metrics"]


def test_logging_costs_a_step_nothing_while_the_server_hangs(uri, outage):
    run = start_run("pretrain", "slow", tracking_uri=uri)
    outage.delay = 1.0
    costs = []
    for step in range(500):
        started = time.perf_counter()
        run.log({names.LOSS: 1.0, names.IMAGES_SEEN: step, names.LEARNING_RATE: 0.1}, step=step)
        costs.append(time.perf_counter() - started)
    outage.delay = 0.0
    run.finish()
    assert sorted(costs)[-5] < 0.2  # seconds; the server takes one, and the few slowest may be the scheduler's
    assert len(history(uri, run.id, names.LOSS)) == 500


def test_a_deleted_experiment_is_an_error_before_the_work(uri):
    start_run("gone", "x", tracking_uri=uri).finish()
    client = server.client(uri)
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(UserError, match='"gone" was deleted'):
        start_run("gone", "y", tracking_uri=uri)
    assert not os.listdir(spool_root())


# ---------------------------------------------------------------- the buffer itself


def test_queue_drops_a_torn_line_and_keeps_the_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"n":0}\n{"n":1}\n{"n":')
    queue = Queue(str(path))
    queue.append({"n": 2})
    assert queue.read(10) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_queue_reads_again_until_committed_and_then_takes_no_space(tmp_path):
    queue = Queue(str(tmp_path / "q"))
    for n in range(5):
        queue.append({"n": n})
    assert queue.read(2) == queue.read(2) == [{"n": 0}, {"n": 1}]
    queue.commit()
    queue.append({"n": 5})
    assert [record["n"] for record in queue.read(10)] == [2, 3, 4, 5]
    queue.commit()
    assert (len(queue), os.path.getsize(tmp_path / "q")) == (0, 0)


def test_queue_on_a_full_disk_keeps_records_in_memory_and_counts_what_it_loses(tmp_path, monkeypatch):
    queue = Queue(str(tmp_path / "q"))
    queue.append({"n": 0})
    real_write = os.write

    def full(file, data):
        real_write(file, data[:3])  # half a line is written before the disk is full
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.tracking.spool.os.write", full)
    monkeypatch.setattr("pipeline.tracking.spool.MAX_IN_MEMORY", 2)
    for n in (1, 2, 3):
        queue.append({"n": n})
    monkeypatch.setattr("pipeline.tracking.spool.os.write", real_write)
    queue.append({"n": 4})
    seen = []
    while records := queue.read(10):
        seen += [record["n"] for record in records]
        queue.commit()
    assert (sorted(seen), queue.lost) == ([0, 1, 2, 4], 1)


def test_queue_does_not_wait_for_the_lock_and_reads_in_portions(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.tracking.spool.READ_BYTES", 20)
    queue = Queue(str(tmp_path / "q"))
    with queue.lock:  # a delivery that is stuck
        queue.append({"n": 0})
        queue.append({"n": 1})
    queue.append({"n": 2})
    queue.append({"n": 3})
    assert len(queue) == 4
    read = []
    while portion := queue.read(1000):
        read.append([record["n"] for record in portion])
        queue.commit()
    assert read == [[0, 1, 2], [3]]


def test_queue_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.tracking.spool.MAX_BYTES", 20)
    queue = Queue(str(tmp_path / "q"))
    for n in range(4):
        queue.append({"n": n})
    assert (len(queue), queue.lost) == (2, 2)


# ---------------------------------------------------------------- addresses


def test_the_default_is_one_database_whatever_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_tracking_uri("sqlite:///runs/x.db") == f"sqlite:///{tmp_path}/runs/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000/")
    assert resolve_tracking_uri() == "http://mlflow:5000"
    with pytest.raises(UserError, match=r"sqlite:///mlruns/mlflow\.db"):
        resolve_tracking_uri("mlruns")


def test_passwords_do_not_reach_messages():
    assert redacted("postgresql://me:secret@db/mlflow") == "postgresql://***@db/mlflow"


# ---------------------------------------------------------------- nothing is lost


def upload():
    """`python -m pipeline.tracking upload`: (exit code, what it printed)."""
    environment = {**os.environ, "PYTHONPATH": PROJECT}
    command = [sys.executable, "-m", "pipeline.tracking", "upload"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("what", ["experiment", "run"])
def test_records_of_a_deleted_experiment_or_run_wait_until_it_is_restored(uri, what):
    run = start_run("pretrain", "deleted", tracking_uri=uri)
    for step in range(10):
        run.log({names.LOSS: float(step)}, step=step)
    assert run.flush()
    client = server.client(uri)
    experiment = client.get_experiment_by_name("pretrain").experiment_id
    deleted = {"experiment": experiment, "run": run.id}[what]
    getattr(client, f"delete_{what}")(deleted)
    for step in range(10, 20):
        run.log({names.LOSS: float(step)}, step=step)
    run.log_text("late", "late.txt")
    assert run.finish(timeout=1) is False
    for _ in range(2):  # any number of uploads
        code, said = upload()
        assert (code, "remaining: " in said) == (1, True), said
    getattr(client, f"restore_{what}")(deleted)
    assert upload()[0] == 0
    assert len(client.search_runs([experiment])) == 1
    assert history(uri, run.id, names.LOSS) == [(step, float(step)) for step in range(20)]
    assert client.get_run(run.id).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.id) if file.path == "late.txt"]
    assert not os.listdir(spool_root())


def test_refused_records_outlive_uploads_and_are_named_with_the_reason(uri):
    run = start_run("pretrain", "refused", config={"a": 1}, tracking_uri=uri)
    run.flush()
    run.log_params({"a": 2})  # MLflow never changes a parameter
    assert run.finish() is False
    for _ in range(3):
        code, said = upload()
        assert code == 1
        assert "remaining: 1," in said
        assert "refused: params a:" in said
    (folder,) = os.listdir(spool_root())
    with open(os.path.join(spool_root(), folder, "rejected.jsonl")) as file:
        assert [json.loads(line)["values"] for line in file] == [{"a": "2"}]


def test_a_spool_that_cannot_be_read_is_named_and_kept(uri):
    folder = os.path.join(spool_root(), "broken")
    os.makedirs(folder)
    for name, text in (("lock", ""), ("run.json", "[]"), ("metrics.jsonl", '{"kind":"metrics"}\n')):
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)
    code, said = upload()
    assert (code, f"cannot be read: {folder}: run.json" in said) == (1, True)
    assert os.path.exists(os.path.join(folder, "metrics.jsonl"))


BAD_LINES = [
    "{garbage",
    "[1]",
    "{}",
    "[" * 100_000,
    '{"kind":"link"}',
    '{"kind":"link","role":1,"run_id":[1]}',
    '{"kind":"unknown"}',
    '{"kind":"metrics"}',
    '{"kind":"metrics","values":[1]}',
    '{"kind":"metrics","values":{"a":"text"}}',
    '{"kind":"metrics","values":{"a":null}}',
    '{"kind":"metrics","values":{"\\ud800":1}}',
    '{"kind":"metrics","values":{"a":1' + "0" * 400 + "}}",
    '{"kind":"metrics","values":{"a":1},"step":"x"}',
    '{"kind":"metrics","values":{"a":1},"step":1e400}',
    '{"kind":"metrics","values":{"a":1},"time":99999999999999999999}',
    '{"kind":"params","values":{"a":{"b":1}}}',
    '{"kind":"tags","values":{"a":1}}',
    '{"kind":"tags","values":{"a":"\\u0000"}}',
    '{"kind":"end","status":"DONE","time":1}',
    '{"kind":"end","status":"FINISHED","time":"now"}',
    '{"kind":"resume","params":[1]}',
    '{"kind":"paragraph","markers":1,"text":[]}',
    '{"kind":"dataset","dataset":5,"role":"x"}',
]
BAD_ARTIFACTS = [
    '{"kind":"artifact"}',
    '{"file":"a","path":5}',
    '{"file":"","path":"a"}',
    '{"file":"a","path":"b/"}',
    '{"file":"pipe","path":"a"}',
]


def test_a_damaged_line_does_not_hold_up_the_others(uri, outage):
    outage.down = True
    run = start_run("pretrain", "damaged", tracking_uri=uri)
    run.log({names.LOSS: 1.0}, step=1)
    run.log_text("hello", "notes/hello.txt")
    run.finish(timeout=0.2)
    folder = os.path.join(spool_root(), os.listdir(spool_root())[0])
    os.mkfifo(os.path.join(folder, "files", "pipe"))
    for name, bad in (("metrics.jsonl", BAD_LINES), ("artifacts.jsonl", BAD_ARTIFACTS)):
        with open(os.path.join(folder, name), "r+b") as file:
            lines = file.readlines()
            file.seek(0)
            file.writelines([*(f"{line}\n".encode() for line in bad), *lines])
    outage.down = False
    for _ in range(2):
        code, said = upload()
        assert (code, f"remaining: {len(BAD_LINES) + len(BAD_ARTIFACTS)}," in said) == (1, True), said
        with open(os.path.join(folder, "rejected.jsonl"), "rb") as file:
            assert len(file.readlines()) == len(BAD_LINES) + len(BAD_ARTIFACTS)
    found = server.find_run(uri, run.id)
    assert history(uri, found, names.LOSS) == [(1, 1.0)]
    assert [file.path for file in server.client(uri).list_artifacts(found, "notes")] == ["notes/hello.txt"]
    assert server.client(uri).get_run(found).info.status == "FINISHED"


def test_a_copy_of_a_spool_without_its_lock_is_delivered(uri, outage):
    outage.down = True
    run = start_run("pretrain", "copied", tracking_uri=uri)
    run.log({names.LOSS: 1.0}, step=1)
    run.finish(timeout=0.2)
    os.remove(os.path.join(spool_root(), os.listdir(spool_root())[0], "lock"))
    outage.down = False
    assert upload()[0] == 0
    assert history(uri, server.find_run(uri, run.id), names.LOSS) == [(1, 1.0)]
    assert not os.listdir(spool_root())


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "artifacts.jsonl", "rejected.jsonl"])
def test_a_pipe_in_a_spool_is_named(uri, outage, name):
    outage.down = True
    start_run("pretrain", "piped", tracking_uri=uri).finish(timeout=0.2)
    path = os.path.join(spool_root(), os.listdir(spool_root())[0], name)
    if os.path.exists(path):
        os.remove(path)
    os.mkfifo(path)
    outage.down = False
    code, said = upload()
    assert (code, f"{path}: a pipe" in said) == (1, True), said


@pytest.mark.parametrize("name", ["bad+name", "v (1)", "données+2", "a//b", "../up", "x" * 400, "\udce9t\0"])
def test_any_name_of_a_data_set_is_logged(uri, name):
    with start_run("pretrain", name, tags={f"set.{name}": name}, tracking_uri=uri) as run:
        run.log({f"val/{name}/top1": 0.5, names.LOSS: 1.0}, step=1)
        run.log_params({name: name})
        run.log_dataset(f"/data/{name}", {"fingerprint": "0a1b2c"}, role=name)
    stored = server.client(uri).get_run(run.id).data
    assert stored.metrics[names.LOSS] == 1.0
    assert stored.metrics[names.valid_name(f"val/{name}/top1")] == 0.5
    assert not os.listdir(spool_root())


def test_names_that_mlflow_accepts_are_kept_and_others_stay_distinct():
    for name in (names.LOSS, "system/node-0/cpu_percent", "données"):
        assert names.valid_name(name) == name
    assert len({names.valid_name(name) for name in ("a+b", "a(b", "a)b", "a_b")}) == 4


@pytest.mark.parametrize(
    "folder",
    ["x%2Fy", "a?b", "with space", "ünï", "c#d", "dots..", "new\\nline", "100%", "a&b=c", "it's", 'q"', "a:b@c"],
)
def test_tracking_works_in_a_working_folder_of_any_name(uri, empty_database, tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    shutil.copy(empty_database, tmp_path / folder / "mlflow.db")
    monkeypatch.chdir(tmp_path / folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with start_run("pretrain", "odd") as run:
        run.log({names.LOSS: 1.0}, step=1)
        run.log_text("hello", "notes/hello.txt")
    assert history(run.uri, run.id, names.LOSS) == [(1, 1.0)]
    assert list((tmp_path / folder / "mlruns").rglob("notes/hello.txt"))
    with open(server.client(run.uri).download_artifacts(run.id, "notes/hello.txt")) as file:
        assert file.read() == "hello"
    assert not os.listdir(spool_root())


def test_only_the_owner_can_read_the_spool(uri, outage):
    outage.down = True
    before = os.umask(0)
    try:
        run = start_run("pretrain", "private", config=Config(), tracking_uri=uri)
        run.log_text("hello", "hello.txt")
        run.finish(timeout=0.2)
    finally:
        os.umask(before)
    paths = [os.path.join(folder, name) for folder, below, files in os.walk(spool_root()) for name in below + files]
    assert len(paths) > 5
    assert [path for path in paths if os.stat(path).st_mode & 0o077] == []


# ---------------------------------------------------------------- how a run ends


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("lr is nan"), "FAILED", "ValueError: lr is nan"),
        (SystemExit(143), "KILLED", "stopped with SIGTERM"),
        (KeyboardInterrupt(), "KILLED", "stopped with Ctrl-C"),
        (SystemExit(1), "FAILED", "exit code 1"),
        (OSError("http://me:hidden@proxy away"), "FAILED", "OSError: http://***@proxy away"),
    ],
)
def test_a_run_says_why_it_ended_until_it_continues(uri, error, status, reason):
    run = start_run("pretrain", "ends", tags={names.NOTE: "My run."}, tracking_uri=uri)
    with pytest.raises(type(error)), run:
        raise error
    stored = server.client(uri).get_run(run.id)
    assert (stored.info.status, stored.data.tags[names.REASON]) == (status, reason)
    word = "Stopped" if status == "KILLED" else "Failed"
    assert stored.data.tags[names.NOTE] == f"**{word}:** {reason}\n\nMy run."
    start_run("pretrain", "ends", run_id=run.id, tracking_uri=uri).finish()
    tags = server.client(uri).get_run(run.id).data.tags
    assert names.REASON not in tags
    assert tags[names.NOTE] == "My run."


# ---------------------------------------------------------------- addresses that are refused, or hold a password


def test_addresses_that_mlflow_cannot_use_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no store nonsense://"):
        resolve_tracking_uri("nonsense://x")
    package = tmp_path / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    with pytest.raises(UserError, match="Ray deletes"):
        resolve_tracking_uri("sqlite:///mlflow.db")


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://", "no valid host name and port; write http://HOST:PORT"),
        ("http://ex ample.com", "no valid host name and port"),
        ("http://host:99999", "Port out of range"),
        ("https://host:https/x", "Port could not be cast to integer"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("postgresql://db:port/mlflow", "Port could not be cast to integer"),
        ("sqlite:///", "is a folder; name a file in it"),
        ("sqlite:///folder", "is a folder; name a file in it"),
        ("sqlite:////dev/null", "is not a regular file"),
        ("sqlite:///image.png", "is not a SQLite database"),
        ("sqlite:///image.png/mlflow.db", "is not a folder; choose another --tracking-uri"),
        ("sqlite:////proc/mlflow.db", "cannot be written"),
    ],
)
def test_addresses_that_can_never_work_are_refused_before_work(address, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "image.png").write_bytes(b"\x89PNG" + bytes(100))
    with pytest.raises(UserError) as refused:
        resolve_tracking_uri(address)
    assert why in str(refused.value)
    assert str(refused.value).startswith(("tracking URI ", "--tracking-uri "))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "image.png"]


def test_a_database_that_does_not_answer_is_unavailable_at_once(uri, caplog):
    began = time.monotonic()
    run = start_run("pretrain", "x", tracking_uri="postgresql+psycopg://me@127.0.0.1:9/mlflow")
    assert "is unreachable" in caplog.text
    run.finish(timeout=1)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("address", "clean", "variable"),
    [
        ("https://me:p%40ss@mlflow:5000/x", "https://mlflow:5000/x", "MLFLOW_TRACKING_PASSWORD"),
        ("postgresql://me:p%40ss@db/mlflow", "postgresql://me@db/mlflow", "VIT_DATABASE_PASSWORD"),
    ],
)
def test_the_password_is_removed_from_the_address(monkeypatch, address, clean, variable):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "VIT_DATABASE_PASSWORD"):
        monkeypatch.setenv(name, "")
    assert resolve_tracking_uri(address) == clean
    assert os.environ[variable] == "p@ss"
    if address.startswith("postgresql"):
        assert server.mlflow_address(clean) == address


# ---------------------------------------------------------------- what a person reads first


def test_a_run_has_a_name_of_its_own_a_description_and_tags_for_its_places(uri):
    about = Description(what="Pre-training of Ti/16.", data=("s3://bucket/pets: 7 images",))
    config = {"optimizer": {"name": "adamw"}, "runtime": {"output": "s3://bucket/run", "name": "mine", "workers": 2}}
    with start_run("pretrain", "demo · pets", config=config, about=about, tracking_uri=uri) as run:
        run.log_cost({names.TRAIN_FLOPS: 3.9e12, names.GPU_HOURS: 0.0})
    stored = server.client(uri).get_run(run.id)
    assert stored.info.run_name == f"demo · pets · {run.id[:4]}"
    assert stored.data.params == {"optimizer.name": "adamw", "runtime.workers": "2"}
    assert stored.data.tags["place.runtime.output"] == "s3://bucket/run"
    paragraphs = stored.data.tags[names.NOTE].split("\n\n")
    assert paragraphs[:2] == ["Pre-training of Ti/16.", "**Data:** s3://bucket/pets: 7 images"]
    assert [part.partition(" ")[0] for part in paragraphs[2:]] == ["**Command:**", "**To", "**Cost:**"]
    assert paragraphs[-1].endswith("3.9 teraFLOPs of training")


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://bucket/imagenet/train", "imagenet"),
        ("runs/demo/data/train", "demo"),
        ("photos", "photos"),
        ("/data/train", "train"),
    ],
)
def test_data_sets_are_named_after_the_meaningful_part_of_the_address(uri, name):
    assert data_name(uri) == name


def test_checkpoints_and_models_have_names():
    assert checkpoint_name("s3://bucket/b16/checkpoints/step-00000528") == "b16 step 528"
    assert checkpoint_name("/tmp/runs/demo/pretrain/checkpoints/step-00000012") == "demo step 12"
    assert checkpoint_name("timm:vit_tiny") == "timm:vit_tiny"
    assert checkpoint_name("random:runs/b16/checkpoints/step-00000528") == "random weights like b16 step 528"
    assert model_name("demo", "runs/demo/data/train") == "demo"
    assert model_name("demo", "s3://bucket/photos/train") == "demo-photos"


@pytest.mark.parametrize("given", [None, "sqlite:////elsewhere/mlflow.db"])
def test_the_global_server_of_mlflow_changes_no_later_address(uri, monkeypatch, given):
    """MLflow writes its global server to MLFLOW_TRACKING_URI, where the next job would take it for the user's choice."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if given:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    before = resolve_tracking_uri()
    with server.global_server(uri):
        assert os.environ["MLFLOW_TRACKING_URI"] == uri
    assert os.environ.get("MLFLOW_TRACKING_URI") == given
    assert resolve_tracking_uri() == before


CREATE = """
import resource, sys
from pipeline.tracking import server
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
server.client(f"sqlite:///{sys.argv[1]}")
"""


@pytest.mark.parametrize("limit", [10_000, 300_000, 700_000])
def test_a_disk_that_is_full_when_the_database_is_made_leaves_no_broken_one(tmp_path, limit):
    path = tmp_path / "mlflow.db"
    command = [sys.executable, "-c", CREATE, str(path)]
    made = subprocess.run([*command, str(limit)], cwd=PROJECT, capture_output=True, text=True)
    assert made.returncode == 1
    assert [file.name for file in tmp_path.iterdir()] == [".mlflow.db.lock"]
    again = subprocess.run([*command, str(1 << 30)], cwd=PROJECT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert path.stat().st_size > limit


def test_a_database_with_incomplete_tables_is_named_with_the_remedy(empty_database, tmp_path):
    """As MLflow leaves it, if its creation is interrupted."""
    path = tmp_path / "mlflow.db"
    broken = sqlite3.connect(path)
    broken.executescript("CREATE TABLE experiments (experiment_id INTEGER); CREATE TABLE _alembic_tmp_runs (x INTEGER)")
    broken.close()
    with pytest.raises(UserError, match=rf"{path}: MLflow's tables are incomplete.*remove it and repeat the command"):
        server.client(f"sqlite:///{path}")
