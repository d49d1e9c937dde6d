"""infra/skypilot/pretrain.yaml: SkyPilot's own parser reads it, and its `run` trains on two real Ray nodes with the variables that
SkyPilot gives to each node.

SkyPilot itself is in an environment of its own, because it needs other versions of libraries:
VIT_SKYPILOT names that environment's python."""

import json
import os
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from pipeline.weights import checkpoints
from tests.mlflowserver import count_runs, mlflow_server
from tests.rayhead import STARTS
from tests.submitters import PROGRAMS, ROOT, User, user

FILE = ROOT / "infra" / "skypilot" / "pretrain.yaml"
TASK = yaml.safe_load(FILE.read_text())
SMALL = "--steps 20steps --batch-size 8 --lanes 2 --validation None --augment.crop squash --register None"
PARSE = """
import json, os, sys
import sky, yaml
secrets = [(name, "x") for name in sys.argv[2:]]
task = sky.Task.from_yaml_config(yaml.safe_load(open(sys.argv[1])), secrets_overrides=secrets)
print(json.dumps({"nodes": task.num_nodes, "envs": task.envs, "run": task.run, "secrets": sorted(task.secrets)}))
"""


def parsed(path: Path, *secrets: str) -> subprocess.CompletedProcess:
    """SkyPilot's reading of a task with `--secret` for each of the names."""
    python = os.environ.get("VIT_SKYPILOT")
    if not python:
        pytest.skip("VIT_SKYPILOT names no python with SkyPilot")
    return subprocess.run([python, "-c", PARSE, path, *secrets], capture_output=True, text=True, timeout=200)


def test_skypilots_own_parser_reads_the_task(tmp_path):
    done = parsed(FILE, *TASK["secrets"])
    assert done.returncode == 0, done.stderr
    task = json.loads(done.stdout.splitlines()[-1])
    assert task["nodes"] == TASK["num_nodes"]
    assert task["run"] == TASK["run"]
    assert task["secrets"] == sorted(TASK["secrets"])
    for missing in TASK["secrets"]:
        lacking = parsed(FILE, *(name for name in TASK["secrets"] if name != missing)).stdout
        assert missing not in json.loads(lacking.splitlines()[-1])["secrets"]  # the file has no value for it
    (tmp_path / "wrong.yaml").write_text(FILE.read_text().replace("num_nodes:", "num_node:"))
    assert "num_node" in parsed(tmp_path / "wrong.yaml", *TASK["secrets"]).stderr


class NoNotice(BaseHTTPRequestHandler):
    """EC2's metadata server while no preemption is announced."""

    def do_PUT(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"session")

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


@contextmanager
def metadata():
    server = ThreadingHTTPServer(("127.0.0.1", 0), NoNotice)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def variables(rank: int, nodes: int) -> dict[str, str]:
    """What SkyPilot sets on a node."""
    found = {"SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * nodes), "SKYPILOT_NODE_RANK": str(rank)}
    found |= {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    return found | {"SKYPILOT_CLUSTER_INFO": json.dumps({"cluster_name": "vit", "cloud": "AWS", "region": "us-east-1"})}


SECRETS = {
    "MLFLOW_TRACKING_USERNAME": "admin",
    "MLFLOW_TRACKING_PASSWORD": "correct horse",
    "RAY_AUTH_TOKEN": "51ab" * 16,
}


def run_on(submitter: User, nodes: int, mlflow: str, metadata: str) -> list[subprocess.Popen]:
    """`run` on each node, with the variables and secrets of the task, in the folder to which SkyPilot copies `workdir`. Its output
    is in node-RANK.log."""
    script = TASK["run"].replace(":6379", f":{submitter.environment['RAY_PORT']}")
    script = script.replace("--resume auto", f"--resume auto {SMALL}")
    assert SECRETS.keys() == TASK["secrets"].keys()
    given = {"MLFLOW_TRACKING_URI": mlflow, "METADATA": metadata} | SECRETS
    started = []
    for rank in range(nodes):
        environment = submitter.environment | given | variables(rank, nodes)
        assert TASK["envs"].keys() <= environment.keys()
        with open(submitter.folder / f"node-{rank}.log", "w") as log:
            command = ["bash", "-c", script]
            started.append(subprocess.Popen(command, cwd=submitter.folder, env=environment, stdout=log, stderr=log))
    return started


@pytest.fixture
def submitter(tmp_path):
    # the machine's own metadata server is not asked
    python = f'[ "$1" != infra/preemption.py ] || set -- "$@" --metadata "$METADATA"\n{PROGRAMS["python"]}'
    with user(tmp_path, {"python": python}) as found:
        yield found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_run_script_trains_on_two_nodes(submitter):
    with metadata() as address, mlflow_server(submitter.folder, password=SECRETS["MLFLOW_TRACKING_PASSWORD"]) as mlflow:
        for _ in range(STARTS):  # a Ray node ends when its agent does not start in time, as on a busy machine
            jobs = run_on(submitter, 2, mlflow, address)
            codes = [job.wait(900) for job in jobs]
            logs = "\n".join((submitter.folder / f"node-{rank}.log").read_text() for rank in range(2))
            recorded = count_runs(mlflow, SECRETS["MLFLOW_TRACKING_PASSWORD"])
            if codes == [0, 0] or "step " in logs:
                break
    assert codes == [0, 0], logs
    assert "pretrain: steps=20" in logs
    assert recorded == 1
    assert checkpoints.latest(str(submitter.folder / "out")).step == 20
    head, worker = sorted(submitter.calls.splitlines()[-2:], key=lambda line: "--head" not in line)
    assert "--num-gpus 1 --dashboard-host 127.0.0.1 --dashboard-agent-listen-port 52366" in head
    assert f"start --address=127.0.0.1:{submitter.environment['RAY_PORT']}" in worker
    assert f"watching {address}" in (submitter.folder / "preemption.log").read_text()
    assert submitter.left() == []
